//! What a job that runs in a copy of its workspace has to bring home.
//!
//! The checkout on the submit node stays what artifacts and caches are packed from. So what the job is
//! asked for is named before it starts, and before that comes home, whatever has such a name here is
//! removed: a file that the script removed must not be packed from here.
//!
//! What is asked for may be more than is packed in the end, never less. `GITLAB_ENV` can change what a
//! path means, and comes home itself.

use std::cell::Cell;

use bridge_backend::Pattern;
use camino::Utf8Path;
use secrecy::ExposeSecret as _;

use super::artifacts::{Stop, blocking};
use super::expand::expand;
use super::script::ENV_FILE;
use super::sources::StageError;
use super::{Plan, hands};
use crate::archive::{self, Wanted};

/// The stage's name in errors.
const STAGE: &str = "collect_outputs";

/// Where a script leaves `GITLAB_ENV`'s file to be brought home: nothing beside the workspace is.
pub(super) const TRAVELLING_ENV: &str = ".bridge-gitlab-env";

/// The repository, which comes home only by its name.
const GIT: &str = ".git";

/// Asks for everything else.
const ALL: &str = "**";

impl Plan {
    /// Names what must come home for artifacts and caches; nothing where the workspace is shared.
    pub fn outputs(&self) -> Vec<Pattern> {
        if !self.runner.backend.sandbox {
            return Vec::new();
        }
        let mut names = Vec::new();
        for artifact in &self.transfers.artifacts {
            self.untracked_from(artifact.untracked, &mut names);
            names.extend(artifact.paths.iter().filter_map(|path| self.output(path)));
        }
        for (paths, untracked) in self.caches.kept() {
            self.untracked_from(untracked, &mut names);
            // These are expanded already.
            names.extend(paths.iter().filter_map(|path| within(path, &self.project_dir)));
        }
        if names.is_empty() {
            return Vec::new();
        }
        if names.iter().any(|name| name == ALL) {
            names.retain(|name| name == ALL || name.starts_with(GIT));
        }
        names.push(TRAVELLING_ENV.to_owned());
        let mut seen = std::collections::HashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        names.into_iter().map(Pattern).collect()
    }

    /// Asks for what git does not track: it may be anywhere, and only the repository knows.
    fn untracked_from(&self, untracked: bool, names: &mut Vec<String>) {
        if untracked {
            names.push(ALL.to_owned());
            if self.fetches_itself() {
                names.push(GIT.to_owned());
            }
        }
    }

    /// Makes a pattern of an artifact's path, as far as it is known before the job has run.
    fn output(&self, path: &str) -> Option<String> {
        let unknown = Cell::new(false);
        let lookup = |name: &str| {
            let known = self.env.iter().rev().find(|var| var.name == name);
            // The script may give any name another value, but for those that nobody would.
            if known.is_none() || (self.says_more && !name.starts_with("CI_")) {
                unknown.set(true);
            }
            known.map(|var| var.value.expose_secret())
        };
        match expand(path, &lookup) {
            Ok(expanded) if !unknown.into_inner() => within(&expanded, &self.project_dir),
            // The script may still say what it means.
            Ok(_) => Some(ALL.to_owned()),
            // It will be taken as it stands.
            Err(_error) => within(path, &self.project_dir),
        }
    }

    /// Removes what has the name of something that the job brings home. It can be begun again.
    ///
    /// # Errors
    ///
    /// When something could not be removed.
    pub async fn clear_outputs(&self) -> Result<(), StageError> {
        let paths = self.outputs().into_iter().map(|pattern| pattern.0).collect();
        let wanted = Wanted { paths, ..Wanted::default() };
        let stop = Stop::default();
        let (root, flag) = (self.project_dir.clone(), stop.flag());
        let broken = StageError::broken(STAGE);
        hands::make_dir(&root).await.map_err(&broken)?;
        let cleared = blocking(STAGE, move || -> Result<(), String> {
            let selection = archive::select(&root, &wanted, &flag)
                .map_err(|error| crate::cache::chain(&error))?;
            let names = selection.entries.iter();
            let names = names.filter(|entry| entry.kind != archive::Kind::Directory);
            hands::remove_files(&root, names.map(|entry| entry.name.as_slice()), &flag)
                .map_err(|error| format!("remove what the job writes anew: {error}"))
        })
        .await?;
        cleared.map_err(|detail| StageError::Broken { stage: STAGE, detail })
    }

    /// Puts what came home where later stages look for it. It can be begun again.
    ///
    /// # Errors
    ///
    /// When the file could not be moved.
    pub async fn take_in_outputs(&self) -> Result<(), StageError> {
        let broken = StageError::broken(STAGE);
        let came = self.project_dir.join(TRAVELLING_ENV);
        if hands::is_file(&came).await.map_err(&broken)? {
            hands::make_dir(&self.temp_dir).await.map_err(&broken)?;
            hands::rename(&came, &self.temp_dir.join(ENV_FILE)).await.map_err(&broken)?;
        }
        Ok(())
    }
}

/// Makes a clean relative pattern of a path; `None` if it leads out of the checkout.
fn within(path: &str, project_dir: &Utf8Path) -> Option<String> {
    let relative = match path.strip_prefix('/') {
        None => path,
        Some(_) => path
            .strip_prefix(project_dir.as_str())
            .filter(|rest| rest.is_empty() || rest.starts_with('/'))?,
    };
    let mut parts: Vec<&str> = Vec::new();
    for part in relative.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(if parts.is_empty() { ALL.to_owned() } else { parts.join("/") })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{payload, runner};
    use super::super::{FetchedBy, OnBackend, RunnerContext, Slot, plan};
    use super::*;
    use crate::gitlab::wire::{Artifact, Cache};

    fn on_a_grid() -> RunnerContext {
        RunnerContext { backend: OnBackend { sandbox: true, ..OnBackend::default() }, ..runner() }
    }

    fn outputs(artifacts: &[&str], caches: &[(&str, &str)], runner: &RunnerContext) -> Vec<String> {
        let mut payload = payload(&[("DIR", "out"), ("DEEP", "$DIR/deep")]);
        payload.artifacts = vec![Artifact {
            paths: artifacts.iter().map(ToString::to_string).collect(),
            ..Artifact::default()
        }];
        payload.cache = caches
            .iter()
            .map(|(policy, path)| Cache {
                policy: (*policy).into(),
                paths: vec![(*path).into()],
                ..Cache::default()
            })
            .collect();
        let plan = plan(&payload, runner, Slot::default()).unwrap();
        plan.spec(bridge_backend::Limits::default())
            .outputs
            .into_iter()
            .map(|pattern| pattern.0)
            .collect()
    }

    #[test]
    fn what_artifacts_and_caches_want_comes_home() {
        let grid = on_a_grid();
        let env = TRAVELLING_ENV;
        for (artifacts, caches, expected) in [
            (&["build/", "./a/*.log"][..], &[][..], &["build", "a/*.log", env][..]),
            (&["$DEEP/x", "$CI_PROJECT_DIR/y/../z"], &[], &["out/deep/x", "z", env]),
            (&["a", "$SAID_LATER/x"], &[], &["**", env]),
            (&["a", "."], &[], &["**", env]),
            (&["/etc/passwd", "../other", "a/../../b"], &[], &[]),
            (&[], &[("pull", "p"), ("", "q"), ("push", "$DIR")], &["q", "out", env]),
            (&["q"], &[("", "q")], &["q", env]),
        ] {
            assert_eq!(outputs(artifacts, caches, &grid), expected, "{artifacts:?} {caches:?}");
        }
        assert!(outputs(&["build/"], &[], &runner()).is_empty());
    }

    #[test]
    fn what_the_script_may_name_anew_is_looked_for_everywhere() {
        let mut payload = payload(&[("DIR", "out")]);
        payload.artifacts = vec![Artifact {
            paths: vec!["$DIR/x".into(), "$CI_PROJECT_DIR/y".into()],
            ..Artifact::default()
        }];
        let outputs = |payload: &crate::gitlab::wire::JobPayload| {
            let plan = plan(payload, &on_a_grid(), Slot::default()).unwrap();
            plan.outputs().into_iter().map(|pattern| pattern.0).collect::<Vec<_>>()
        };
        assert_eq!(outputs(&payload), ["out/x", "y", TRAVELLING_ENV]);
        payload.steps = vec![crate::gitlab::wire::Step {
            name: "script".into(),
            script: vec!["echo DIR=new >>$GITLAB_ENV".into()],
        }];
        assert_eq!(outputs(&payload), ["**", TRAVELLING_ENV]);
    }

    #[test]
    fn untracked_files_may_be_anywhere() {
        let mut payload = payload(&[]);
        payload.artifacts = vec![Artifact { untracked: true, ..Artifact::default() }];
        let mut grid = on_a_grid();
        for (sources, expected) in [
            (FetchedBy::SubmitNode, vec!["**", TRAVELLING_ENV]),
            (FetchedBy::Job, vec!["**", ".git", TRAVELLING_ENV]),
        ] {
            grid.sources = sources;
            let plan = plan(&payload, &grid, Slot::default()).unwrap();
            let outputs: Vec<String> = plan.outputs().into_iter().map(|p| p.0).collect();
            assert_eq!(outputs, expected);
        }
    }

    #[tokio::test]
    async fn what_the_script_removed_is_not_packed_from_here() {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(dir.path()).unwrap();
        let mut payload = payload(&[]);
        payload.artifacts = vec![Artifact { paths: vec!["out/".into()], ..Artifact::default() }];
        let runner = RunnerContext { builds_dir: root.to_owned(), ..on_a_grid() };
        let plan = plan(&payload, &runner, Slot::default()).unwrap();
        let project = &plan.project_dir;
        // Nothing is there yet: that is fine.
        plan.clear_outputs().await.unwrap();
        std::fs::create_dir_all(project.join("out/sub")).unwrap();
        std::fs::create_dir_all(project.join("src")).unwrap();
        for name in ["out/old", "out/sub/old", "src/kept"] {
            std::fs::write(project.join(name), "").unwrap();
        }
        std::os::unix::fs::symlink("../src", project.join("out/link")).unwrap();
        for _ in 0..2 {
            plan.clear_outputs().await.unwrap();
        }
        assert!(!project.join("out/old").exists() && !project.join("out/sub/old").exists());
        assert!(std::fs::symlink_metadata(project.join("out/link")).is_err());
        assert!(project.join("src/kept").exists(), "a link was followed");
        std::fs::write(project.join(TRAVELLING_ENV), "A=b\n").unwrap();
        for _ in 0..2 {
            plan.take_in_outputs().await.unwrap();
        }
        assert!(!project.join(TRAVELLING_ENV).exists());
        assert_eq!(std::fs::read(plan.temp_dir.join(ENV_FILE)).unwrap(), b"A=b\n");
    }
}
