//! What rules and includes may ask of the project: its files, what changed, predefined variables.

use std::fmt;

use camino::Utf8PathBuf;

use super::source::{RefType, Source, SourceError, git_of};
use super::{Variable, glob};

/// The commit of pipelines that have nothing to compare with.
const NO_COMMIT: &str = "0000000000000000000000000000000000000000";

/// A project as its pipeline sees it.
#[derive(Clone, Default)]
pub struct Project {
    /// The folder that includes are read from.
    pub root: Utf8PathBuf,
    /// The commit's files, sorted by path.
    pub files: Vec<TreeFile>,
    /// The paths that the pipeline is about; `None` when there is nothing to compare with, as for
    /// tags and first commits, and every `changes` holds.
    pub changed: Option<Vec<String>>,
    /// Predefined variables that do not depend on the job.
    pub variables: Vec<Variable>,
    /// Whether the pipeline is for a tag.
    pub tag: bool,
    /// The branch or tag.
    pub ref_name: String,
    pub(super) repository: Option<(Source, tokio::runtime::Handle)>,
}

/// A file of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeFile {
    /// Its path, relative to the top.
    pub path: String,
    /// The name of its content.
    pub blob: String,
}

impl fmt::Debug for Project {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Project")
            .field("root", &self.root)
            .field("ref_name", &self.ref_name)
            .field("files", &self.files.len())
            .finish_non_exhaustive()
    }
}

impl Project {
    /// Asks git for everything that a pipeline may want to know.
    pub async fn of(source: &Source, root: Utf8PathBuf) -> Result<Self, SourceError> {
        let git = git_of(source);
        let listed = git.run(&["ls-tree", "-r", "-z", "--full-tree", &source.sha]).await?;
        let mut files: Vec<TreeFile> = listed.split('\0').filter_map(tree_file).collect();
        files.sort_by(|left, right| left.path.cmp(&right.path));
        let parent = format!("{}^", source.sha);
        let parent = git.ask(&["rev-parse", "--verify", "--quiet", &parent]).await?;
        let tag = source.ref_type == RefType::Tag;
        // As in a merge request: all that the branch has and the default branch has not.
        let mut base = None;
        if !tag && source.ref_name != source.default_branch {
            let main = resolve(source, &source.default_branch).await?;
            if let Some(main) = main {
                base = git.ask(&["merge-base", &main, &source.sha]).await?;
            }
        }
        let base = base.filter(|base| *base != source.sha).or_else(|| parent.clone());
        let changed = match base {
            Some(base) if !tag => Some(paths_between(source, &base).await?),
            Some(_) | None => None,
        };
        Ok(Self {
            root,
            files,
            changed,
            variables: predefined(source, parent.as_deref()),
            tag,
            ref_name: source.ref_name.clone(),
            repository: Some((source.clone(), tokio::runtime::Handle::current())),
        })
    }

    /// Gives the paths that differ from where the commit and a ref parted.
    ///
    /// Blocks; not to be called where async code runs.
    pub(super) fn changed_since(&self, reference: &str) -> Result<Vec<String>, String> {
        let missing = || format!("`compare_to: {reference}` is no branch, tag or commit here");
        let Some((source, runtime)) = &self.repository else { return Err(missing()) };
        let asked = runtime.block_on(async {
            let Some(commit) = resolve(source, reference).await? else { return Ok(None) };
            let base = git_of(source).ask(&["merge-base", &commit, &source.sha]).await?;
            paths_between(source, &base.unwrap_or(commit)).await.map(Some)
        });
        let told: Option<Vec<String>> =
            asked.map_err(|error: SourceError| format!("`compare_to: {reference}`: {error}"))?;
        told.ok_or_else(missing)
    }

    /// Whether a file of the commit fits one of the patterns.
    pub(super) fn has_file(&self, patterns: &[String], most: usize) -> bool {
        let (plain, globs): (Vec<&String>, Vec<&String>) =
            patterns.iter().partition(|pattern| glob::Pattern::is_plain(pattern));
        let find = |path: &str| self.files.binary_search_by(|file| file.path.as_str().cmp(path));
        if plain.iter().any(|path| find(path).is_ok()) {
            return true;
        }
        let mut compared = 0;
        globs.iter().any(|pattern| {
            let pattern = glob::Pattern::new(pattern);
            self.files.iter().any(|file| {
                compared += 1;
                // GitLab stops looking and takes the rule for fulfilled.
                compared > most || pattern.matches(&file.path)
            })
        })
    }
}

fn tree_file(line: &str) -> Option<TreeFile> {
    let (facts, path) = line.split_once('\t')?;
    let blob = facts.split(' ').nth(2)?;
    Some(TreeFile { path: path.to_owned(), blob: blob.to_owned() })
}

/// Finds the commit of a branch, tag or commit; a branch may be known as the remote's only.
async fn resolve(source: &Source, reference: &str) -> Result<Option<String>, SourceError> {
    let git = git_of(source);
    let name = reference.strip_prefix("refs/heads/").unwrap_or(reference);
    // A name that begins with a dash would be an option.
    if name.starts_with('-') {
        return Ok(None);
    }
    for wanted in [format!("{name}^{{commit}}"), format!("refs/remotes/origin/{name}^{{commit}}")] {
        let found = git.ask(&["rev-parse", "--verify", "--quiet", &wanted]).await?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

async fn paths_between(source: &Source, base: &str) -> Result<Vec<String>, SourceError> {
    let words = ["diff-tree", "-r", "-z", "--no-renames", "--name-only", base, &source.sha];
    let listed = git_of(source).run(&words).await?;
    Ok(listed.split('\0').filter(|path| !path.is_empty()).map(str::to_owned).collect())
}

/// Gives what GitLab would tell a pipeline of this commit, as if it had just been pushed.
fn predefined(source: &Source, parent: Option<&str>) -> Vec<Variable> {
    let mut variables = Vec::new();
    let mut set = |name: &str, value: &str| {
        variables.push(Variable { raw: true, ..Variable::new(name, value) });
    };
    let path = &source.project_path;
    let (namespace, name) = path.rsplit_once('/').unwrap_or(("", path));
    set("CI", "true");
    set("GITLAB_CI", "true");
    set("CI_SERVER", "yes");
    set("CI_PIPELINE_SOURCE", "push");
    set("CI_DEFAULT_BRANCH", &source.default_branch);
    set("CI_PROJECT_ID", "1");
    set("CI_PROJECT_NAME", name);
    set("CI_PROJECT_TITLE", name);
    set("CI_PROJECT_PATH", path);
    set("CI_PROJECT_PATH_SLUG", &slug(path));
    set("CI_PROJECT_NAMESPACE", namespace);
    set("CI_PROJECT_NAMESPACE_SLUG", &slug(namespace));
    set("CI_PROJECT_ROOT_NAMESPACE", namespace.split('/').next().unwrap_or_default());
    set("CI_PROJECT_VISIBILITY", "private");
    set("CI_COMMIT_SHA", &source.sha);
    set("CI_COMMIT_SHORT_SHA", source.sha.get(..8).unwrap_or(&source.sha));
    set("CI_COMMIT_BEFORE_SHA", parent.unwrap_or(NO_COMMIT));
    set("CI_COMMIT_REF_NAME", &source.ref_name);
    set("CI_COMMIT_REF_SLUG", &slug(&source.ref_name));
    set("CI_COMMIT_REF_PROTECTED", "true");
    set("CI_COMMIT_MESSAGE", &source.message);
    set("CI_COMMIT_TITLE", &source.title);
    let described = source.message.split_once('\n').map_or("", |(_, rest)| rest.trim_start());
    set("CI_COMMIT_DESCRIPTION", described);
    set("CI_COMMIT_AUTHOR", &source.author);
    set("CI_COMMIT_TIMESTAMP", &source.committed_at);
    match source.ref_type {
        RefType::Branch => set("CI_COMMIT_BRANCH", &source.ref_name),
        RefType::Tag => set("CI_COMMIT_TAG", &source.ref_name),
    }
    variables
}

/// Lower case, everything but letters and digits a dash, at most 63 characters.
pub(super) fn slug(text: &str) -> String {
    let letter = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let slug: String = text.chars().map(letter).take(63).collect();
    slug.trim_matches('-').to_owned()
}
