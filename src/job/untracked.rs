//! The names that git does not track in a checkout, ignored ones too, as `untracked: true` means them.

use camino::Utf8Path;

use super::hands::{self, Call, HandsError};
use super::sources::{Output, Tone};
use crate::gitlab::wire::Secret;

/// The most that git may list: a million names of a hundred bytes.
const MOST: usize = 100 * 1024 * 1024;

/// Asks git for the names, relative to the checkout; what git complains about goes to `out`.
///
/// The job could write to the checkout's configuration, so nothing that could be run is taken from it.
///
/// # Errors
///
/// When git could not be started or failed.
pub(super) async fn names(
    project_dir: &Utf8Path,
    out: &mut (dyn Output + Send),
) -> Result<Result<Vec<Vec<u8>>, i32>, HandsError> {
    let plain = |name: &str, value: &str| (name.to_owned(), Secret::new(value));
    let git_dir = project_dir.join(".git");
    let call = Call {
        program: "git",
        args: ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
            .into_iter()
            .chain(["-c", "safe.directory=*", "ls-files", "-o", "-z"])
            .map(str::to_owned)
            .collect(),
        env: vec![
            plain("HOME", "/nonexistent"),
            plain("LC_ALL", "C.UTF-8"),
            plain("GIT_DIR", git_dir.as_str()),
            plain("GIT_WORK_TREE", project_dir.as_str()),
        ],
        dir: project_dir.to_owned(),
        input: None,
    };
    let mut listed = Vec::new();
    let code = hands::capture(call, &mut listed, MOST, out).await?;
    if code != 0 {
        return Ok(Err(code));
    }
    if listed.len() >= MOST {
        out.remark(Tone::Warning, "git lists too many untracked files; the rest is left out");
        // The last name may be cut.
        listed.truncate(listed.iter().rposition(|byte| *byte == 0).map_or(0, |at| at + 1));
    }
    let names = listed.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(Ok(names.map(<[u8]>::to_vec).collect()))
}
