//! The folder of `bridge exec` as a git repository that jobs can fetch from.
//!
//! Whatever the folder is, jobs fetch from a bare repository of our own: the user's branches may
//! move while the pipeline runs, and nothing may be written where the user works. A repository is
//! borrowed from (its objects are not copied); any other folder is put into a commit as it stands.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use url::Url;

/// Longest time for one git command: a shallow repository of some GiB is copied, not borrowed.
const PATIENCE: Duration = Duration::from_secs(900);

/// Most output kept from one git command; what is beyond it is read and dropped. Lists of files are
/// the longest: this is room for half a million.
const MAX_OUTPUT: u64 = 64 * 1024 * 1024;

/// Who commits a folder that is no repository. Git would otherwise ask for the user's name.
const COMMITTER: (&str, &str) = ("bridge exec", "bridge-exec@localhost");

/// Where the sources of a pipeline come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// A bare repository; [`Source::url`] gives it as a remote.
    pub repository: Utf8PathBuf,
    /// The commit the pipeline is for.
    pub sha: String,
    /// The branch or tag that points to it in the repository.
    pub ref_name: String,
    /// Which of the two it is.
    pub ref_type: RefType,
    /// The folder's name.
    pub project: String,
    /// Where the project is on its server, by the remote `origin`; the folder's name below `exec`
    /// without one.
    pub project_path: String,
    /// The branch that others are compared with.
    pub default_branch: String,
    /// The commit's message.
    pub message: String,
    /// First line of the commit's message.
    pub title: String,
    /// Who wrote the commit, with address.
    pub author: String,
    /// When it was committed, as GitLab writes times.
    pub committed_at: String,
    /// The repository that knows most: the user's, or ours when there is none.
    pub(super) origin: Utf8PathBuf,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// What a ref is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefType {
    /// A branch.
    Branch,
    /// A tag.
    Tag,
}

impl RefType {
    /// Gives GitLab's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Branch => "branch",
            Self::Tag => "tag",
        }
    }
}

/// Why there is no source.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The folder cannot be opened.
    #[error("open the folder {path}")]
    Folder {
        /// The folder.
        path: Utf8PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Git could not be run.
    #[error("run `git {command}`")]
    Spawn {
        /// Its first words.
        command: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Git did not finish.
    #[error("`git {command}` took longer than {} s", .limit.as_secs())]
    Timeout {
        /// Its first words.
        command: String,
        /// How long it had.
        limit: Duration,
    },
    /// Git failed.
    #[error("`git {command}` failed ({status}): {message}")]
    Git {
        /// Its first words.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The first line it wrote to standard error that says why.
        message: String,
    },
}

impl Source {
    /// Gives the repository as a `file://` remote.
    pub fn url(&self) -> String {
        // Only a relative path cannot be a URL, and `source` makes the path absolute.
        Url::from_file_path(&self.repository)
            .map_or_else(|()| format!("file://{}", self.repository), String::from)
    }
}

/// Makes a repository from a folder, inside of `into`, where it stays as long as `into` does.
///
/// A folder that is the top of a git repository gives its HEAD. Any other is put into one commit
/// as it stands, less what its `.gitignore` files name; that holds for a folder inside of a
/// repository too, which is a project of its own then. The folder itself is only read.
pub async fn source(folder: &Utf8Path, into: &Utf8Path) -> Result<Source, SourceError> {
    let canonical = |path: &Utf8Path| {
        path.canonicalize_utf8()
            .map_err(|source| SourceError::Folder { path: path.to_owned(), source })
    };
    let folder = canonical(folder)?;
    let into = canonical(into)?;
    let project = folder.file_name().unwrap_or("project").to_owned();
    let repository = into.join(format!("{project}.git"));
    let found = match head(&folder).await? {
        Some(head) => borrow(&folder, &repository, head).await?,
        None => snapshot(&folder, &repository).await?,
    };
    let git = Git::bare(&repository);
    // Jobs fetch the commit by its name, also when its branch has been left out.
    git.run(&["config", "uploadpack.allowAnySHA1InWant", "true"]).await?;
    let told = git.run(&["log", "-1", "--format=%cI%n%an <%ae>%n%B", &found.sha, "--"]).await?;
    let (committed_at, rest) = told.split_once('\n').unwrap_or((&told, ""));
    let (author, message) = rest.split_once('\n').unwrap_or((rest, ""));
    let message = message.trim_end().to_owned();
    let Found { sha, ref_name, ref_type, notes, borrowed } = found;
    let origin = if borrowed { folder } else { repository.clone() };
    let theirs = Git { bare: !borrowed, ..Git::at(&origin) };
    let default_branch = default_branch(&theirs, &ref_name, ref_type).await?;
    let remote = theirs.ask(&["config", "--get", "remote.origin.url"]).await?;
    let remote_path = remote.as_deref().filter(|_| borrowed).and_then(path_of);
    let project_path = remote_path.unwrap_or_else(|| format!("exec/{project}"));
    Ok(Source {
        repository,
        sha,
        ref_name,
        ref_type,
        project,
        project_path,
        default_branch,
        title: message.lines().next().unwrap_or_default().to_owned(),
        message,
        author: author.to_owned(),
        committed_at: committed_at.to_owned(),
        origin,
        notes,
    })
}

/// Finds the branch that the remote calls its main one, else one of the usual names.
async fn default_branch(
    git: &Git,
    ref_name: &str,
    ref_type: RefType,
) -> Result<String, SourceError> {
    let remote =
        git.ask(&["symbolic-ref", "--quiet", "--short", "refs/remotes/origin/HEAD"]).await?;
    if let Some(branch) = remote.as_deref().and_then(|name| name.strip_prefix("origin/")) {
        return Ok(branch.to_owned());
    }
    for name in ["main", "master"] {
        let branch = format!("refs/heads/{name}");
        if git.ask(&["rev-parse", "--verify", "--quiet", &branch]).await?.is_some() {
            return Ok(name.to_owned());
        }
    }
    Ok(if ref_type == RefType::Branch { ref_name } else { "main" }.to_owned())
}

/// Gives `group/project` of a remote's address, if it has at least the two.
fn path_of(remote: &str) -> Option<String> {
    let path = match Url::parse(remote) {
        Ok(url) if url.has_host() => url.path().to_owned(),
        Ok(url) if !url.cannot_be_a_base() => return None,
        // git@host:group/project.git
        Ok(_) | Err(_) => {
            remote.split_once(':').filter(|(host, _)| !host.contains('/'))?.1.to_owned()
        }
    };
    let path = path.trim_matches('/');
    let path = path.strip_suffix(".git").unwrap_or(path);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    let safe = path.contains('/') && path.chars().all(plain) && !path.contains("..");
    safe.then(|| path.to_owned())
}

struct Found {
    borrowed: bool,
    sha: String,
    ref_name: String,
    ref_type: RefType,
    notes: Vec<String>,
}

/// Gives the commit of HEAD if the folder is the top of a repository that has one.
async fn head(folder: &Utf8Path) -> Result<Option<String>, SourceError> {
    let git = Git::at(folder);
    let top = git.ask(&["rev-parse", "--show-toplevel"]).await?;
    // Compared as directories, not as text: git and we may name the same one differently.
    let top = top.and_then(|top| Utf8PathBuf::from(top).canonicalize_utf8().ok());
    if top.as_deref() != Some(folder) {
        // Git also stays silent about a repository it does not trust, and the user should know.
        if !folder.join(".git").exists() {
            return Ok(None);
        }
        git.run(&["rev-parse", "--show-toplevel"]).await?;
    }
    git.ask(&["rev-parse", "--verify", "--quiet", "HEAD^{commit}"]).await
}

async fn borrow(
    folder: &Utf8Path,
    repository: &Utf8Path,
    sha: String,
) -> Result<Found, SourceError> {
    let theirs = Git::at(folder);
    let mut notes = Vec::new();
    let changes = theirs.run(&["status", "--porcelain", "--untracked-files=normal"]).await?;
    let changes = changes.lines().count();
    if changes > 0 {
        let paths = if changes == 1 { "path" } else { "paths" };
        notes.push(format!(
            "uncommitted changes are not included ({changes} {paths}): jobs run on commit {}",
            short(&sha)
        ));
    }
    let branch = theirs.ask(&["symbolic-ref", "--quiet", "--short", "HEAD"]).await?;
    let tag = match branch {
        Some(_) => None,
        None => theirs.ask(&["describe", "--tags", "--exact-match", &sha]).await?,
    };
    let empty = repository.parent().unwrap_or(repository);
    Git::at(empty)
        .run(&[
            "clone",
            "--quiet",
            "--bare",
            "--shared",
            "--template=",
            "--",
            folder.as_str(),
            repository.as_str(),
        ])
        .await?;
    let ours = Git::bare(repository);
    let (ref_name, ref_type) = match (branch, tag) {
        (Some(branch), _) => (branch, RefType::Branch),
        (None, Some(tag)) => (tag, RefType::Tag),
        (None, None) => (format!("detached-{}", short(&sha)), RefType::Branch),
    };
    if ref_type == RefType::Branch {
        // HEAD may have moved since it was read, and a detached one has no branch at all.
        ours.run(&["update-ref", &format!("refs/heads/{ref_name}"), &sha]).await?;
    }
    Ok(Found { borrowed: true, sha, ref_name, ref_type, notes })
}

async fn snapshot(folder: &Utf8Path, repository: &Utf8Path) -> Result<Found, SourceError> {
    let at = Git::at(repository.parent().unwrap_or(repository));
    at.run(&["init", "--quiet", "--bare", "--template=", repository.as_str()]).await?;
    let git = Git { work_tree: Some(folder.to_owned()), ..Git::bare(repository) };
    git.run(&["symbolic-ref", "HEAD", "refs/heads/main"]).await?;
    git.run(&["add", "--all", "--", "."]).await?;
    let mut notes = Vec::new();
    // Mode 160000: a repository inside of the folder, of which git keeps the commit's name only.
    let staged = git.run(&["ls-files", "--stage"]).await?;
    let inner: Vec<&str> = staged
        .lines()
        .filter(|line| line.starts_with("160000 "))
        .filter_map(|line| line.split_once('\t').map(|(_, path)| path))
        .collect();
    if !inner.is_empty() {
        notes
            .push(format!("not included, because repositories of their own: {}", inner.join(", ")));
    }
    // Plumbing, because `git commit` would sign, run hooks and open editors as the user likes it.
    let tree = git.line(&["write-tree"]).await?;
    let message = format!("Snapshot of {}", folder.file_name().unwrap_or("the folder"));
    let sha = git.line(&["commit-tree", &tree, "-m", &message]).await?;
    git.run(&["update-ref", "refs/heads/main", &sha]).await?;
    let ref_name = "main".to_owned();
    Ok(Found { borrowed: false, sha, ref_name, ref_type: RefType::Branch, notes })
}

fn short(sha: &str) -> &str {
    sha.get(..8).unwrap_or(sha)
}

/// Git in the repository that a source is asked about.
pub(super) fn git_of(source: &Source) -> Git {
    Git { bare: source.origin == source.repository, ..Git::at(&source.origin) }
}

/// Git with its place, an environment of its own and nothing that could ask or write elsewhere.
pub(super) struct Git {
    directory: Utf8PathBuf,
    bare: bool,
    work_tree: Option<Utf8PathBuf>,
}

impl Git {
    fn at(directory: &Utf8Path) -> Self {
        Self { directory: directory.to_owned(), bare: false, work_tree: None }
    }

    fn bare(repository: &Utf8Path) -> Self {
        Self { directory: repository.to_owned(), bare: true, work_tree: None }
    }

    /// Runs git and gives what it wrote.
    pub(super) async fn run(&self, arguments: &[&str]) -> Result<String, SourceError> {
        let command = arguments.iter().take(2).copied().collect::<Vec<_>>().join(" ");
        let (status, output, errors) = self.execute(arguments, &command).await?;
        if status.success() {
            return Ok(output);
        }
        let telling = errors.lines().find(|line| line.starts_with("fatal:"));
        let message = telling.or_else(|| errors.lines().next()).unwrap_or("no reason given");
        Err(SourceError::Git { command, status, message: message.trim().to_owned() })
    }

    /// Runs git and gives the one line it wrote.
    async fn line(&self, arguments: &[&str]) -> Result<String, SourceError> {
        Ok(self.run(arguments).await?.lines().next().unwrap_or_default().to_owned())
    }

    /// Asks git something that it answers with a line, or by failing.
    pub(super) async fn ask(&self, arguments: &[&str]) -> Result<Option<String>, SourceError> {
        let command = arguments.iter().take(2).copied().collect::<Vec<_>>().join(" ");
        let (status, output, _) = self.execute(arguments, &command).await?;
        let line = output.lines().next().unwrap_or_default();
        Ok((status.success() && !line.is_empty()).then(|| line.to_owned()))
    }

    async fn execute(
        &self,
        arguments: &[&str],
        command: &str,
    ) -> Result<(ExitStatus, String, String), SourceError> {
        let failed = |source| SourceError::Spawn { command: command.to_owned(), source };
        let working = async {
            let mut child = self.command(arguments).spawn()?;
            let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
            let (output, errors) = tokio::join!(read(stdout), read(stderr));
            Ok((child.wait().await?, output?, errors?))
        };
        match tokio::time::timeout(PATIENCE, working).await {
            Ok(done) => done.map_err(failed),
            Err(_elapsed) => {
                Err(SourceError::Timeout { command: command.to_owned(), limit: PATIENCE })
            }
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut git = Command::new("git");
        git.env_clear();
        for name in ["PATH", "HOME"] {
            if let Some(value) = std::env::var_os(name) {
                git.env(name, value);
            }
        }
        git.env("LC_ALL", "C").env("GIT_TERMINAL_PROMPT", "0");
        // `git status` would otherwise refresh the index of the user's repository.
        git.env("GIT_OPTIONAL_LOCKS", "0");
        let (name, email) = COMMITTER;
        for role in ["AUTHOR", "COMMITTER"] {
            git.env(format!("GIT_{role}_NAME"), name).env(format!("GIT_{role}_EMAIL"), email);
        }
        // The user's configuration applies, but not the parts that start programs of theirs.
        for setting in [
            "core.hooksPath=/dev/null",
            "core.fsmonitor=false",
            "advice.addEmbeddedRepo=false",
            "gc.auto=0",
        ] {
            git.args(["-c", setting]);
        }
        if self.bare {
            git.arg("--git-dir").arg(&self.directory);
        }
        match &self.work_tree {
            Some(tree) => git.arg("--work-tree").arg(tree).current_dir(tree),
            None => git.current_dir(&self.directory),
        };
        git.args(arguments);
        git.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        git
    }
}

/// Reads a pipe to its end and keeps the beginning.
async fn read(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<String> {
    let Some(mut pipe) = pipe else { return Ok(String::new()) };
    let mut kept = Vec::new();
    (&mut pipe).take(MAX_OUTPUT).read_to_end(&mut kept).await?;
    tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    Ok(String::from_utf8_lossy(&kept).into_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use super::*;

    struct Place {
        _guard: tempfile::TempDir,
        folder: Utf8PathBuf,
        into: Utf8PathBuf,
    }

    fn place() -> Place {
        let guard = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(guard.path()).unwrap().canonicalize_utf8().unwrap();
        let (folder, into) = (root.join("my project"), root.join("into"));
        fs::create_dir(&folder).unwrap();
        fs::create_dir(&into).unwrap();
        Place { _guard: guard, folder, into }
    }

    fn git(directory: &Utf8Path, arguments: &[&str]) -> String {
        let output = std::process::Command::new("git")
            .args([
                "-c",
                "user.name=n",
                "-c",
                "user.email=e@localhost",
                "-c",
                "commit.gpgsign=false",
            ])
            .args(["-c", "init.defaultBranch=trunk"])
            .args(arguments)
            .current_dir(directory)
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn files(directory: &Utf8Path) -> BTreeMap<Utf8PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut open = vec![directory.to_owned()];
        while let Some(directory) = open.pop() {
            for entry in directory.read_dir_utf8().unwrap() {
                let path = entry.unwrap().path().to_owned();
                if path.is_dir() {
                    found.insert(path.clone(), Vec::new());
                    open.push(path);
                } else {
                    found.insert(path.clone(), fs::read(&path).unwrap());
                }
            }
        }
        found
    }

    /// Clones from the source as a job would and gives the file's content.
    fn fetched(source: &Source, into: &Utf8Path, file: &str) -> Option<String> {
        let clone = into.join("clone");
        fs::create_dir(&clone).unwrap();
        git(&clone, &["init", "--quiet"]);
        git(&clone, &["fetch", "--quiet", "--depth=1", &source.url(), &source.sha]);
        git(&clone, &["checkout", "--quiet", &source.sha]);
        fs::read_to_string(clone.join(file)).ok()
    }

    #[tokio::test]
    async fn a_plain_folder_becomes_one_commit_and_stays_as_it_was() {
        let Place { _guard, folder, into } = place();
        fs::write(folder.join("a.txt"), "hello").unwrap();
        fs::write(folder.join(".gitignore"), "*.o\n").unwrap();
        fs::write(folder.join("b.o"), "object").unwrap();
        let before = files(&folder);
        let source = source(&folder, &into).await.unwrap();
        assert_eq!(files(&folder), before);
        assert_eq!((source.ref_name.as_str(), source.ref_type), ("main", RefType::Branch));
        assert_eq!(source.project, "my project");
        assert_eq!(source.title, "Snapshot of my project");
        assert!(source.notes.is_empty());
        assert_eq!(git(&source.repository, &["rev-parse", "main"]), source.sha);
        assert_eq!(fetched(&source, &into, "a.txt").unwrap(), "hello");
        assert!(!into.join("clone/b.o").exists());
    }

    #[tokio::test]
    async fn a_repository_gives_its_head_and_says_what_is_not_committed() {
        let Place { _guard, folder, into } = place();
        git(&folder, &["init", "--quiet"]);
        fs::write(folder.join("a.txt"), "committed").unwrap();
        git(&folder, &["add", "a.txt"]);
        git(&folder, &["commit", "--quiet", "-m", "First\n\nmore"]);
        let sha = git(&folder, &["rev-parse", "HEAD"]);
        fs::write(folder.join("a.txt"), "changed").unwrap();
        let before = files(&folder);
        let source = source(&folder, &into).await.unwrap();
        assert_eq!(files(&folder), before);
        assert_eq!((source.sha.as_str(), source.ref_name.as_str()), (sha.as_str(), "trunk"));
        assert_eq!(source.title, "First");
        assert_eq!(source.notes.len(), 1);
        assert!(source.notes[0].starts_with("uncommitted changes are not included (1 path)"));
        assert!(source.notes[0].ends_with(short(&sha)));
        assert_eq!(fetched(&source, &into, "a.txt").unwrap(), "committed");
    }

    #[tokio::test]
    async fn a_detached_head_is_its_tag_or_a_branch_of_its_own() {
        let Place { _guard, folder, into } = place();
        git(&folder, &["init", "--quiet"]);
        git(&folder, &["commit", "--quiet", "--allow-empty", "-m", "one"]);
        git(&folder, &["tag", "v1"]);
        git(&folder, &["commit", "--quiet", "--allow-empty", "-m", "two"]);
        git(&folder, &["checkout", "--quiet", "--detach"]);
        let detached = source(&folder, &into).await.unwrap();
        assert_eq!(detached.ref_name, format!("detached-{}", short(&detached.sha)));
        let named = git(&detached.repository, &["rev-parse", &detached.ref_name]);
        assert_eq!(named, detached.sha);
        git(&folder, &["checkout", "--quiet", "v1"]);
        let other = into.join("other");
        fs::create_dir(&other).unwrap();
        let tagged = source(&folder, &other).await.unwrap();
        assert_eq!((tagged.ref_name.as_str(), tagged.ref_type), ("v1", RefType::Tag));
    }

    #[tokio::test]
    async fn a_shallow_repository_and_a_second_work_tree_are_fetched_like_any_other() {
        let Place { _guard, folder, into } = place();
        git(&folder, &["init", "--quiet"]);
        for content in ["one", "two"] {
            fs::write(folder.join("x"), content).unwrap();
            git(&folder, &["add", "x"]);
            git(&folder, &["commit", "--quiet", "-m", content]);
        }
        let root = folder.parent().unwrap();
        let url = Url::from_file_path(&folder).unwrap();
        git(root, &["clone", "--quiet", "--depth=1", url.as_str(), "shallow"]);
        git(&folder, &["worktree", "add", "--quiet", "-b", "side", "../tree", "HEAD~1"]);
        for (name, branch, content) in [("shallow", "trunk", "two"), ("tree", "side", "one")] {
            let into = into.join(name);
            fs::create_dir(&into).unwrap();
            let before = files(&root.join(name));
            let source = source(&root.join(name), &into).await.unwrap();
            assert_eq!(files(&root.join(name)), before);
            assert_eq!(source.ref_name, branch);
            assert_eq!(fetched(&source, &into, "x").unwrap(), content);
        }
    }

    #[tokio::test]
    async fn a_folder_inside_of_a_repository_is_a_project_of_its_own() {
        let Place { _guard, folder, into } = place();
        git(&folder, &["init", "--quiet"]);
        git(&folder, &["commit", "--quiet", "--allow-empty", "-m", "one"]);
        let inner = folder.join("hello");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("x"), "inside").unwrap();
        let before = files(&folder);
        let source = source(&inner, &into).await.unwrap();
        assert_eq!(files(&folder), before);
        assert_eq!((source.project.as_str(), source.ref_name.as_str()), ("hello", "main"));
        assert_eq!(fetched(&source, &into, "x").unwrap(), "inside");
    }

    #[tokio::test]
    async fn a_repository_without_a_commit_is_taken_as_it_stands() {
        let Place { _guard, folder, into } = place();
        git(&folder, &["init", "--quiet"]);
        fs::write(folder.join("x"), "new").unwrap();
        let before = files(&folder);
        let source = source(&folder, &into).await.unwrap();
        assert_eq!(files(&folder), before);
        assert_eq!(fetched(&source, &into, "x").unwrap(), "new");
    }

    #[tokio::test]
    async fn a_repository_inside_of_a_plain_folder_is_told() {
        let Place { _guard, folder, into } = place();
        let inner = folder.join("inner");
        fs::create_dir(&inner).unwrap();
        git(&inner, &["init", "--quiet"]);
        git(&inner, &["commit", "--quiet", "--allow-empty", "-m", "one"]);
        let source = source(&folder, &into).await.unwrap();
        assert_eq!(source.notes, ["not included, because repositories of their own: inner"]);
    }

    #[test]
    fn the_project_s_path_is_that_of_its_remote() {
        for (remote, path) in [
            ("https://gitlab.com/group/sub/project.git", Some("group/sub/project")),
            ("git@gitlab.com:group/project.git", Some("group/project")),
            ("ssh://git@host:22/group/project", Some("group/project")),
            ("/srv/git/project.git", None),
            ("file:///srv/git/project.git", None),
            ("https://host/project", None),
            ("https://host/a/../b", None),
            ("host:group/project", Some("group/project")),
        ] {
            assert_eq!(path_of(remote).as_deref(), path, "{remote}");
        }
    }

    #[tokio::test]
    async fn a_missing_folder_and_a_broken_repository_are_named() {
        let Place { _guard, folder, into } = place();
        let error = source(&folder.join("nowhere"), &into).await.unwrap_err();
        assert!(error.to_string().ends_with("my project/nowhere"), "{error}");
        fs::write(folder.join(".git"), "gitdir: /nowhere/at/all\n").unwrap();
        let error = source(&folder, &into).await.unwrap_err();
        assert!(error.to_string().contains("not a git repository"), "{error}");
    }
}
