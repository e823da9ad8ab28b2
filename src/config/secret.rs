//! Reading the files of the configuration, and who else may read them.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;

use camino::{Utf8Path, Utf8PathBuf};

use super::error::{ConfigError, Problem};
use crate::gitlab::wire::Secret;

/// No token is longer; what is longer is the wrong file.
const MAX_TOKEN_LEN: u64 = 16 * 1024;

/// The bits that let group and others read, write or enter.
const OTHERS: u32 = 0o077;

/// The configuration's text with what is known of its file.
pub(super) struct ConfigText {
    /// Where it is, absolute.
    pub(super) path: Utf8PathBuf,
    /// What it says.
    pub(super) text: String,
    /// Its permission bits.
    pub(super) mode: u32,
}

/// Reads the configuration file; text and mode are those of the same open file.
pub(super) fn read_config(path: &Utf8Path) -> Result<ConfigText, ConfigError> {
    let absolute = absolute(path);
    let read = || -> io::Result<(String, u32)> {
        let mut file = File::open(&absolute)?;
        let mode = file.metadata()?.permissions().mode() & 0o7777;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok((text, mode))
    };
    match read() {
        Ok((text, mode)) => Ok(ConfigText { path: absolute, text, mode }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(ConfigError::whole(absolute, Problem::NoFile))
        }
        Err(error) => Err(ConfigError::whole(absolute, Problem::Unreadable(error))),
    }
}

/// Reads a token file that nobody else can read.
pub(super) fn read_token(path: &Utf8Path) -> Result<Secret, Problem> {
    let unreadable = |source| Problem::TokenFile { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.permissions().mode() & 0o7777;
    if readable_by_others(mode) {
        return Err(Problem::TokenMode { path: path.to_owned(), mode });
    }
    let mut text = String::new();
    file.take(MAX_TOKEN_LEN).read_to_string(&mut text).map_err(unreadable)?;
    let token = text.trim();
    if is_token(token) {
        Ok(Secret::new(token))
    } else {
        Err(Problem::NoTokenInside { path: path.to_owned() })
    }
}

/// Says whether group or others have any right to a file of this mode.
pub(super) fn readable_by_others(mode: u32) -> bool {
    mode & OTHERS != 0
}

/// Says whether a text could be a token; they are opaque, but they go into headers.
pub(super) fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Makes a path absolute without asking whether it exists or following links.
fn absolute(path: &Utf8Path) -> Utf8PathBuf {
    camino::absolute_utf8(path).unwrap_or_else(|_no_current_dir| path.to_owned())
}
