//! The project's own repository: made or found, brought up to date, checked out.

use super::git::{Git, Heard, Place, Silence};
use super::repository::Repository;
use super::{GET_SOURCES, Out, Stage, StageError, Tone, leftovers};
use crate::job::hands;
use crate::job::{GitStrategy, Plan};

/// Git's own clone of one ref is as the official runner wants it from here on: `clone --revision`.
const NATIVE_CLONE: (u32, u32) = (2, 49);

impl Plan {
    /// Fetches into whatever is there and checks the commit out.
    pub(super) async fn bring_up_to_date(&self, repository: &Repository, out: Out<'_>) -> Stage {
        let broken = StageError::broken(GET_SOURCES);
        let git = self.git(repository, GET_SOURCES);
        let at = Place::checkout(&self.project_dir);
        let there = leftovers::is_repository(&self.project_dir).await.map_err(&broken)?;
        if !there {
            self.make_room().await?;
            if self.clones_natively(&git).await {
                return self.clone_natively(repository, &git, out).await;
            }
        }
        let depth = repository.depth;
        out.remark(
            Tone::Notice,
            &if depth > 0 {
                format!("Fetching changes with git depth set to {depth}...")
            } else {
                "Fetching changes...".to_owned()
            },
        );
        if !there {
            let mut init = vec!["init", "--quiet", "--template="];
            if repository.sha256 {
                init.push("--object-format=sha256");
            }
            git.run_plainly(&self.project_dir, &init, out).await?;
            out.remark(Tone::Notice, "Created fresh repository.");
        }
        leftovers::disarm(&at.git_dir, repository.config_file()).await.map_err(&broken)?;
        self.fetch(repository, &git, out).await?;
        self.check_out(repository, &git, out).await
    }

    /// Leaves an empty folder where no repository is: with what may lie in it, but without `.git`.
    pub(super) async fn make_room(&self) -> Stage {
        let broken = StageError::broken(GET_SOURCES);
        if !hands::is_dir(&self.project_dir).await.map_err(&broken)? {
            hands::remove(&self.project_dir).await.map_err(&broken)?;
        }
        hands::remove(&self.project_dir.join(".git")).await.map_err(&broken)?;
        hands::make_dir(&self.project_dir).await.map_err(&broken)
    }

    /// Fetches from the server, or through its mirror.
    async fn fetch(&self, repository: &Repository, git: &Git<'_>, out: Out<'_>) -> Stage {
        let broken = StageError::broken(GET_SOURCES);
        let depth = repository.depth.to_string();
        let mut fetch = vec!["fetch", "--no-recurse-submodules"];
        let shallow = self.project_dir.join(".git/shallow");
        if repository.depth > 0 {
            fetch.extend(["--depth", &depth]);
        } else if hands::is_file(&shallow).await.map_err(&broken)? {
            fetch.push("--unshallow");
        }
        fetch.extend(self.settings.git_fetch_flags.iter().map(String::as_str));
        let Some(mirror) = self.mirror(repository) else {
            return self.fetch_directly(repository, git, &fetch, out).await;
        };
        let Err(trouble) = mirror.fetch(self, repository, git, &fetch, out).await else {
            return Ok(());
        };
        tracing::warn!(mirror = %mirror.dir(), %trouble, "mirror not used");
        let text = format!(
            "the mirror of this project cannot be used ({trouble}); fetching from the server instead"
        );
        out.remark(Tone::Warning, &text);
        self.fetch_directly(repository, git, &fetch, out).await?;
        // Where the server could be fetched from, it is the mirror that is broken.
        mirror.suspect(&trouble).await;
        Ok(())
    }

    async fn fetch_directly(
        &self,
        repository: &Repository,
        git: &Git<'_>,
        fetch: &[&str],
        out: Out<'_>,
    ) -> Stage {
        let mut args = fetch.to_vec();
        args.extend(["--", "origin"]);
        args.extend(repository.refspecs.iter().map(String::as_str));
        git.run(&Place::checkout(&self.project_dir), &args, out).await
    }

    async fn check_out(&self, repository: &Repository, git: &Git<'_>, out: Out<'_>) -> Stage {
        if !self.settings.git_checkout {
            out.remark(Tone::Notice, "Skipping Git checkout");
            return Ok(());
        }
        let at = Place::checkout(&self.project_dir);
        let text = format!(
            "Checking out {} as detached HEAD (ref is {})...",
            repository.sha.get(..8).unwrap_or_default(),
            repository.reference
        );
        out.remark(Tone::Notice, &text);
        git.run(&at, &["checkout", "-f", "-q", "--detach", &repository.sha], out).await?;
        if self.settings.git_clean_flags.is_empty() {
            return Ok(());
        }
        let mut clean = vec!["clean"];
        clean.extend(self.settings.git_clean_flags.iter().map(String::as_str));
        git.run(&at, &clean, out).await
    }

    /// Asks the server for nearly nothing, to see whether it answers.
    pub(super) async fn server_answers(&self, repository: &Repository) -> bool {
        let probe = ["ls-remote", "--quiet", "origin", "HEAD"];
        let git = self.git(repository, GET_SOURCES);
        let at = Place::checkout(&self.project_dir);
        git.run(&at, &probe, &mut Silence).await.is_ok()
    }

    async fn clones_natively(&self, git: &Git<'_>) -> bool {
        if self.settings.git_strategy != GitStrategy::Clone
            || !self.settings.flag("FF_USE_GIT_NATIVE_CLONE")
        {
            return false;
        }
        let mut heard = Heard::default();
        let asked = git.run_plainly(&self.project_dir, &["version"], &mut heard).await;
        asked.is_ok() && version(&heard.0).is_some_and(|version| version >= NATIVE_CLONE)
    }

    /// Clones with git's own command, which brings one ref; the commit is fetched if it is another one.
    pub(super) async fn clone_natively(
        &self,
        repository: &Repository,
        git: &Git<'_>,
        out: Out<'_>,
    ) -> Stage {
        let broken = StageError::broken(GET_SOURCES);
        out.remark(Tone::Notice, &cloning(repository));
        hands::remove(&self.project_dir).await.map_err(&broken)?;
        hands::make_dir(&self.project_dir).await.map_err(&broken)?;
        let depth = repository.depth.to_string();
        let args = clone_args(repository, &depth, &self.settings.git_clone_flags);
        git.run_plainly(&self.project_dir, &args, out).await?;
        let at = Place::checkout(&self.project_dir);
        leftovers::disarm(&at.git_dir, repository.config_file()).await.map_err(&broken)?;
        let commit = format!("{}^{{commit}}", repository.sha);
        let there = git.run(&at, &["cat-file", "-e", &commit], &mut Silence).await;
        if self.settings.git_checkout && there.is_err() {
            self.fetch(repository, git, out).await?;
        }
        self.check_out(repository, git, out).await
    }
}

fn cloning(repository: &Repository) -> String {
    let what = if repository.reference.is_empty() {
        "Cloning repository".to_owned()
    } else {
        format!("Cloning repository for {}", repository.reference)
    };
    match repository.depth {
        depth @ 1.. => format!("{what} with git depth set to {depth}..."),
        _ => format!("{what}..."),
    }
}

fn clone_args<'a>(repository: &'a Repository, depth: &'a str, flags: &'a [String]) -> Vec<&'a str> {
    let mut args = vec!["clone", "--no-checkout", "--template="];
    if repository.depth > 0 {
        args.extend(["--depth", depth]);
    }
    let reference = repository.reference.as_str();
    if reference.starts_with("refs/") {
        args.extend(["--revision", reference]);
    } else if !reference.is_empty() {
        args.extend(["--branch", reference]);
    }
    args.extend(flags.iter().map(String::as_str));
    args.extend(["--", &repository.origin, "."]);
    args
}

/// Reads what `git version` says.
fn version(text: &[u8]) -> Option<(u32, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let mut numbers = text.trim().strip_prefix("git version ")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        for (text, expected) in [
            ("git version 2.39.5\n", Some((2, 39))),
            ("git version 2.49.0.windows.1\n", Some((2, 49))),
            ("git version 2.50.1 (Apple Git-155)\n", Some((2, 50))),
            ("git version 3.0\n", Some((3, 0))),
            ("hub version 1\n", None),
            ("", None),
        ] {
            assert_eq!(version(text.as_bytes()), expected, "{text}");
        }
    }
}
