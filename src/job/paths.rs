//! Where a job's checkout lies.

use camino::{Utf8Component, Utf8Path, Utf8PathBuf};

use super::{GitStrategy, RunnerContext, Slot, Unrunnable};
use crate::gitlab::wire::JobPayload;

/// Derives the checkout's directory: `<builds_dir>/<short token>/<slot>/<project path>`.
///
/// The project's path is the one in the repository's URL, as in the official runner. It is taken from
/// the text as it came, since parsing a URL resolves the very `..` that must be refused.
///
/// # Errors
///
/// When the path would leave the builds directory.
pub(super) fn project_dir(
    payload: &JobPayload,
    runner: &RunnerContext,
    slot: Slot,
    strategy: GitStrategy,
) -> Result<Utf8PathBuf, Unrunnable> {
    let mut project = project_path(payload.git_info.repo_url.expose(), strategy)?
        .unwrap_or_else(|| format!("project-{}", payload.job_info.project_id));
    if strategy == GitStrategy::Empty {
        project.push_str("-empty");
    }
    Ok(runner
        .builds_dir
        .join(single_name(&runner.short_token))
        .join(slot.project.to_string())
        .join(project))
}

/// Takes the directory that `GIT_CLONE_PATH` asks for.
///
/// # Errors
///
/// When the runner does not allow it, or when it is not below the builds directory, or when jobs'
/// directories would lie below it.
pub(super) fn clone_path(
    wanted: &str,
    payload: &JobPayload,
    runner: &RunnerContext,
    slot: Slot,
    strategy: GitStrategy,
) -> Result<Utf8PathBuf, Unrunnable> {
    if !runner.custom_build_dir {
        return Err(Unrunnable::ClonePath);
    }
    let odd = wanted.contains(['\0', '\n', '\r']);
    let parts: Utf8PathBuf = Utf8Path::new(wanted).components().collect();
    let climbs = parts.components().any(|part| part == Utf8Component::ParentDir);
    let builds: Utf8PathBuf = runner.builds_dir.components().collect();
    if odd || climbs || !parts.starts_with(&builds) || parts == builds {
        return Err(Unrunnable::ClonePathOutside { path: wanted.to_owned(), builds_dir: builds });
    }
    // `clone` and `empty` begin by removing it.
    let usual = project_dir(payload, runner, slot, strategy)?;
    if usual != parts && usual.starts_with(&parts) {
        return Err(Unrunnable::ClonePathTooWide { path: wanted.to_owned() });
    }
    Ok(parts)
}

/// Gives the project's path, or `None` where there is no URL and none is needed.
pub(super) fn project_path(url: &str, strategy: GitStrategy) -> Result<Option<String>, Unrunnable> {
    let bad = |reason| Err(Unrunnable::Repository { reason });
    if url.is_empty() && !strategy.uses_git() {
        return Ok(None);
    }
    let Some((_, rest)) = url.split_once("://") else {
        return bad("it is no URL");
    };
    let path = rest.split_once('/').map_or("", |(_, path)| path);
    let path = path.split_once(['?', '#']).map_or(path, |(path, _)| path);
    let Some(path) = percent_decoded(path) else {
        return bad("its path is not UTF-8");
    };
    if path.contains(['\0', '\n', '\r', '\\']) {
        return bad("its path has characters that no project's path has");
    }
    let path = path.strip_suffix(".git").unwrap_or(&path);
    let parts: Vec<&str> =
        path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return bad("its path leads out of the builds directory");
    }
    if parts.iter().any(|part| part.len() > 255) {
        return bad("its path has a part that no file system takes");
    }
    if parts.is_empty() {
        return bad("it has no path");
    }
    Ok(Some(parts.join("/")))
}

/// Undoes percent-encoding.
pub(super) fn percent_decoded(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let mut result = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let hex = (*byte == b'%')
            .then(|| text.get(at + 1..at + 3))
            .flatten()
            .filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        result.push(hex.unwrap_or(*byte));
        at += if hex.is_some() { 3 } else { 1 };
    }
    String::from_utf8(result).ok()
}

/// Makes one directory name of a token's beginning.
pub(super) fn single_name(text: &str) -> String {
    let name: String = text.chars().map(|c| if c == '/' || c == '\0' { '_' } else { c }).collect();
    if matches!(name.as_str(), "" | "." | "..") { "runner".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{payload, runner};
    use super::*;
    use crate::gitlab::wire::Secret;

    fn dir(url: &str, strategy: GitStrategy) -> Result<String, Unrunnable> {
        let mut payload = payload(&[]);
        payload.git_info.repo_url = Secret::new(url);
        payload.job_info.project_id = 77;
        let slot = Slot { concurrent: 5, project: 2 };
        project_dir(&payload, &runner(), slot, strategy).map(String::from)
    }

    #[test]
    fn the_path_of_the_url_is_the_path_of_the_checkout() {
        let clone = |url| dir(url, GitStrategy::Clone).unwrap();
        assert_eq!(clone("https://u:t@h/hep/tracker.git"), "/builds/short/2/hep/tracker");
        assert_eq!(clone("https://h:8443/sub/hep/a.b.git"), "/builds/short/2/sub/hep/a.b");
        assert_eq!(clone("https://h/a//./b.git?x=/../y"), "/builds/short/2/a/b");
        assert_eq!(clone("https://h/a/b%2dc.git"), "/builds/short/2/a/b-c");
        assert_eq!(clone("file:///srv/repo/.git"), "/builds/short/2/srv/repo");
        assert_eq!(clone("https://h/a/b..c.git"), "/builds/short/2/a/b..c");
        assert_eq!(dir("https://h/a.git", GitStrategy::Empty).unwrap(), "/builds/short/2/a-empty");
        assert_eq!(dir("", GitStrategy::None).unwrap(), "/builds/short/2/project-77");
    }

    #[test]
    fn paths_that_climb_out_are_refused() {
        for url in [
            "https://h/../etc.git",
            "https://h/a/../../../etc.git",
            "https://h/a/%2e%2e/%2E./b.git",
            "https://h/a%2f..%2f..%2f..%2fetc",
            "https://h/a%00b.git",
            "https://h/a%0ab.git",
            "https://h/a\\..\\b.git",
            "https://h/%ff.git",
            "https://h/",
            "https://h/.git",
            "https://h",
            "git@h:a/b.git",
            "/etc/passwd",
            "",
        ] {
            assert!(dir(url, GitStrategy::Clone).is_err(), "{url}");
        }
    }

    #[test]
    fn an_error_does_not_show_the_url() {
        let error = dir("https://u:glcbt-1@h/../x", GitStrategy::Clone).unwrap_err().to_string();
        assert!(!error.contains("glcbt"), "{error}");
    }

    #[test]
    fn an_odd_token_is_one_directory() {
        assert_eq!(single_name("a/b"), "a_b");
        assert_eq!(single_name(".."), "runner");
        assert_eq!(single_name(""), "runner");
        assert_eq!(single_name("_x-Y1"), "_x-Y1");
    }
}
