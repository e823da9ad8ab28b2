//! Changing the configuration file without disturbing what is not meant: comments, order, mode.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;

use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, value};

use super::exit::{Exit, Failure};
use crate::config::write::{Owner, replace};
use crate::config::{self, Config};

/// What a new file starts with.
const HEADER: &str = r#"# The configuration of bridge. Keys have the names of gitlab-runner's config.toml wherever
# they mean the same; durations are written as "3s", "1m 30s", "30 days".

# Jobs in flight, all runners together.
concurrent = 100
# How often each runner asks for a job.
check_interval = "3s"
# Database and job logs; must be on a local disk.
# state_dir = "/var/lib/bridge"
# /metrics and /health, on this machine only.
# listen_address = "127.0.0.1:9252"
"#;

/// The configuration file as it is about to be.
pub(super) struct ConfigFile {
    /// As the operator names it; relative paths in it count from here.
    named: Utf8PathBuf,
    /// Where it really is: links are followed, so that they stay links.
    path: Utf8PathBuf,
    /// Its text when it was read, if it was there.
    before: Option<String>,
    document: DocumentMut,
    /// Mode, user and group to keep.
    owner: Option<Owner>,
}

impl ConfigFile {
    /// Opens the file, or starts a new one.
    pub(super) fn open(path: &Utf8Path) -> anyhow::Result<Self> {
        let named = path.to_owned();
        let read = || -> io::Result<(Utf8PathBuf, String, Owner)> {
            let path = path.canonicalize_utf8()?;
            let owner = Owner::of(&path)?;
            Ok((path.clone(), fs::read_to_string(&path)?, owner))
        };
        match read() {
            Ok((path, text, owner)) => {
                let document = parse(&text)?;
                Ok(Self { named, path, before: Some(text), document, owner: Some(owner) })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let document = parse(HEADER)?;
                Ok(Self { path: named.clone(), named, before: None, document, owner: None })
            }
            Err(error) => Err(error).with_context(|| format!("read {path}")),
        }
    }

    /// Adds the backend that needs nothing but this machine.
    pub(super) fn add_local_backend(&mut self, jobs_dir: &Utf8Path) -> anyhow::Result<()> {
        let backends = self.document.entry("backends").or_insert_with(|| {
            let mut table = Table::new();
            // No `[backends]` line of its own.
            table.set_implicit(true);
            Item::Table(table)
        });
        let backends = backends.as_table_mut().context("add to `backends`, which is no table")?;
        let mut table = Table::new();
        table.insert("kind", value("local"));
        table.insert("jobs_dir", value(jobs_dir.as_str()));
        backends.insert("local", Item::Table(table));
        let comments = self.take_trailing();
        if let Some(table) = self.document.get_mut("backends").and_then(|b| b.get_mut("local"))
            && let Some(table) = table.as_table_mut()
        {
            table.decor_mut().set_prefix(comments);
        }
        Ok(())
    }

    /// Takes the comments at the end of the file, which stay above what is appended.
    fn take_trailing(&mut self) -> String {
        let trailing = self.document.trailing().as_str().unwrap_or_default().to_owned();
        self.document.set_trailing("");
        format!("{trailing}\n")
    }

    /// Appends a `[[runners]]` table.
    pub(super) fn add_runner(&mut self, mut runner: Table) -> anyhow::Result<()> {
        let comments = self.take_trailing();
        runner.decor_mut().set_prefix(comments);
        let runners =
            self.document.entry("runners").or_insert(Item::ArrayOfTables(ArrayOfTables::new()));
        let Some(runners) = runners.as_array_of_tables_mut() else {
            let failure = Failure::new(Exit::Configuration, "add to `runners`, which is a list")
                .hint("write each runner as a [[runners]] table");
            return Err(failure.into());
        };
        runners.push(runner);
        Ok(())
    }

    /// Removes the `[[runners]]` table of this name with the comments directly above it; those
    /// farther up, beyond an empty line, stay.
    pub(super) fn remove_runner(&mut self, name: &str) -> bool {
        let runners = self.document.get_mut("runners").and_then(Item::as_array_of_tables_mut);
        let Some(runners) = runners else { return false };
        let named = |table: &Table| table.get("name").and_then(Item::as_str) == Some(name);
        let Some(index) = runners.iter().position(named) else { return false };
        let above = runners.get(index).and_then(|table| table.decor().prefix()?.as_str());
        let kept = above.and_then(|above| above.rsplit_once("\n\n")).map(|(kept, _own)| kept);
        let kept = kept.filter(|kept| !kept.trim().is_empty()).map(|kept| format!("{kept}\n"));
        runners.remove(index);
        let next = runners.get_mut(index);
        match (kept, next) {
            (None, _) => {}
            (Some(kept), Some(next)) => {
                let own = next.decor().prefix().and_then(|prefix| prefix.as_str());
                let both = format!("{kept}{}", own.unwrap_or_default());
                next.decor_mut().set_prefix(both);
            }
            (Some(kept), None) => {
                let trailing = self.document.trailing().as_str().unwrap_or_default().to_owned();
                self.document.set_trailing(format!("{kept}{trailing}"));
            }
        }
        let runners = self.document.get("runners").and_then(Item::as_array_of_tables);
        if runners.is_some_and(ArrayOfTables::is_empty) {
            self.document.remove("runners");
        }
        true
    }

    /// Says what the file would mean, without writing it.
    pub(super) fn check(&self) -> anyhow::Result<Config> {
        let mode = self.owner.map_or(0o600, |owner| owner.mode);
        config::check_text(&self.named, self.document.to_string(), mode)
            .context("use the changed configuration")
    }

    /// Writes the file: whole or not at all, for the same owner, with the same mode.
    pub(super) fn write(&self) -> anyhow::Result<()> {
        let now = match fs::read_to_string(&self.path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("read {}", self.path)),
        };
        if now != self.before {
            let failure = Failure::new(
                Exit::Configuration,
                format!("write {}: it was changed meanwhile", self.path),
            );
            return Err(failure.hint("run the command again").into());
        }
        replace(&self.path, self.document.to_string().as_bytes(), self.owner)
            .with_context(|| format!("write {}", self.path))
    }

    /// Writes a secret beside the configuration, for its owner only.
    pub(super) fn write_secret(&self, path: &Utf8Path, secret: &str) -> anyhow::Result<()> {
        let owner = self.owner.map(Owner::private);
        replace(path, format!("{secret}\n").as_bytes(), owner)
            .with_context(|| format!("write {path}"))
    }

    /// Makes the directory of the configuration.
    pub(super) fn make_dir(&self) -> anyhow::Result<()> {
        let Some(dir) = self.named.parent() else { return Ok(()) };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("make the directory {dir}"))
    }
}

fn parse(text: &str) -> anyhow::Result<DocumentMut> {
    text.parse::<DocumentMut>().map_err(|error| {
        // Its Display would show the line, which may hold a token.
        Failure::new(Exit::Configuration, format!("read the file as TOML: {}", error.message()))
            .into()
    })
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const BEFORE: &str = r#"# top comment
concurrent = 5   # why five

# about the backends
[backends.here]
kind = "local" # a kind

# the old one
[[runners]]
name = "old"
url = "https://a.example"   # odd   spacing
token_file = "old.token"
backend = "here"
[runners.feature_flags]
FF_X = true
"#;

    fn place() -> (tempfile::TempDir, Utf8PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("config.toml");
        (dir, path)
    }

    fn runner(name: &str) -> Table {
        let mut table = Table::new();
        table.insert("name", value(name));
        table
    }

    #[test]
    fn appending_disturbs_nothing_and_removing_restores_it() {
        let (_dir, path) = place();
        fs::write(&path, BEFORE).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let mut file = ConfigFile::open(&path).unwrap();
        file.add_runner(runner("new")).unwrap();
        file.write().unwrap();
        let after = fs::read_to_string(&path).unwrap();
        assert_eq!(after, format!("{BEFORE}\n[[runners]]\nname = \"new\"\n"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        let mut file = ConfigFile::open(&path).unwrap();
        assert!(file.remove_runner("new"));
        assert!(!file.remove_runner("new"));
        file.write().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), BEFORE);
    }

    #[test]
    fn comments_at_the_end_stay_above_what_is_appended_and_outlive_it() {
        let (_dir, path) = place();
        let before = format!("{BEFORE}\n# [[runners]]\n# name = \"off\"\n");
        fs::write(&path, &before).unwrap();
        let mut file = ConfigFile::open(&path).unwrap();
        file.add_runner(runner("new")).unwrap();
        file.add_runner(runner("newer")).unwrap();
        file.write().unwrap();
        let after = fs::read_to_string(&path).unwrap();
        let added = "\n[[runners]]\nname = \"new\"\n\n[[runners]]\nname = \"newer\"\n";
        assert_eq!(after, format!("{before}{added}"));
        let mut file = ConfigFile::open(&path).unwrap();
        assert!(file.remove_runner("new") && file.remove_runner("newer"));
        file.write().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), before);
    }

    #[test]
    fn removing_the_last_runner_leaves_a_file_without_runners() {
        let (_dir, path) = place();
        fs::write(&path, BEFORE).unwrap();
        let mut file = ConfigFile::open(&path).unwrap();
        assert!(file.remove_runner("old"));
        file.write().unwrap();
        let after = fs::read_to_string(&path).unwrap();
        assert!(after.starts_with("# top comment\nconcurrent = 5   # why five\n"), "{after}");
        assert!(
            after.contains("kind = \"local\" # a kind") && !after.contains("runners"),
            "{after}"
        );
    }

    #[test]
    fn a_new_file_is_private_and_has_a_header() {
        let (_dir, path) = place();
        let mut file = ConfigFile::open(&path).unwrap();
        file.add_local_backend("/x/jobs".into()).unwrap();
        file.add_runner(runner("one")).unwrap();
        file.write().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with(HEADER), "{text}");
        let rest = text.strip_prefix(HEADER).unwrap();
        assert_eq!(
            rest,
            "\n[backends.local]\nkind = \"local\"\njobs_dir = \"/x/jobs\"\n\n[[runners]]\nname = \"one\"\n"
        );
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_link_stays_a_link() {
        let (dir, path) = place();
        let real = Utf8Path::from_path(dir.path()).unwrap().join("real.toml");
        fs::write(&real, BEFORE).unwrap();
        std::os::unix::fs::symlink("real.toml", &path).unwrap();
        let mut file = ConfigFile::open(&path).unwrap();
        file.add_runner(runner("new")).unwrap();
        file.write().unwrap();
        assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
        assert!(fs::read_to_string(&real).unwrap().contains("\"new\""));
    }

    #[test]
    fn what_somebody_else_wrote_meanwhile_is_not_overwritten() {
        let (_dir, path) = place();
        fs::write(&path, BEFORE).unwrap();
        let mut file = ConfigFile::open(&path).unwrap();
        file.add_runner(runner("new")).unwrap();
        fs::write(&path, "concurrent = 7\n").unwrap();
        let error = file.write().unwrap_err();
        assert!(error.to_string().contains("changed meanwhile"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "concurrent = 7\n");
    }
}
