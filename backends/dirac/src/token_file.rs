//! The file in which the token lies, in one of three forms.
//!
//! | form | who makes it | who renews it |
//! | --- | --- | --- |
//! | a proxy with a `DIRACX` block | `dirac-proxy-init`, for a robot's certificate | a cron job; bridge only reads |
//! | credentials, JSON | a login | bridge, and DIRAC's own programs if they share it |
//! | one line, the token | anybody | whoever wrote it |

use std::fs;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::FlockOperation;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

/// A proxy with a long chain has some ten kilobytes.
const LARGEST: u64 = 1 << 20;

/// Which form the file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Proxy,
    Credentials,
    Plain,
}

/// What the file holds.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) form: Form,
    pub(crate) access: SecretString,
    pub(crate) refresh: Option<SecretString>,
    pub(crate) claims: Claims,
}

/// What an access token says of itself. It is not verified: the server does that.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Claims {
    pub(crate) exp: i64,
    pub(crate) iss: String,
    pub(crate) vo: String,
    pub(crate) dirac_group: String,
    pub(crate) preferred_username: String,
}

/// Tells one state of the file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp(u64, u64, i64, i64);

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("{verb} the token file {path}")]
    Io {
        verb: &'static str,
        path: Utf8PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("use the token file {path}: other users can read it; chmod 600 it")]
    Readable { path: Utf8PathBuf },
    #[error("understand the token file {path}: {why}")]
    Malformed { path: Utf8PathBuf, why: &'static str },
}

/// The block in a proxy, and the file of a login.
#[derive(Deserialize)]
struct Tokens {
    access_token: SecretString,
    refresh_token: Option<SecretString>,
}

/// The token file, locked against other programs that would renew it.
#[derive(Debug)]
pub(crate) struct Locked {
    file: fs::File,
    path: Utf8PathBuf,
}

fn failed<'a>(verb: &'static str, path: &'a Utf8Path) -> impl Fn(io::Error) -> FileError + 'a {
    move |source| FileError::Io { verb, path: path.to_owned(), source }
}

/// Gives the file's stamp; `None` when it is not there.
pub(crate) fn stamp(path: &Utf8Path) -> Option<Stamp> {
    fs::metadata(path).ok().map(|meta| of_meta(&meta))
}

fn of_meta(meta: &fs::Metadata) -> Stamp {
    Stamp(meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec())
}

/// Reads the file.
pub(crate) fn read(path: &Utf8Path) -> Result<(Held, Stamp), FileError> {
    let mut file = fs::File::open(path).map_err(failed("open", path))?;
    let (text, stamp) = text_of(&mut file, path)?;
    match parse(&text, path) {
        Ok(held) => Ok((held, stamp)),
        Err(error) => {
            // A renewal that was cut off while it wrote has left the whole text beside.
            let side = side_of(path);
            let mut file = fs::File::open(&side).map_err(|_none| error)?;
            let (text, _) = text_of(&mut file, &side)?;
            Ok((parse(&text, &side)?, stamp))
        }
    }
}

fn side_of(path: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{path}.bridge-new"))
}

fn text_of(file: &mut fs::File, path: &Utf8Path) -> Result<(String, Stamp), FileError> {
    let meta = file.metadata().map_err(failed("look at", path))?;
    if meta.mode() & 0o077 != 0 {
        return Err(FileError::Readable { path: path.to_owned() });
    }
    let mut text = String::new();
    file.take(LARGEST).read_to_string(&mut text).map_err(failed("read", path))?;
    Ok((text, of_meta(&meta)))
}

/// Reads the text of a token file, whatever its form.
fn parse(text: &str, path: &Utf8Path) -> Result<Held, FileError> {
    let malformed = |why| FileError::Malformed { path: path.to_owned(), why };
    let (form, tokens) = if let Some((_, block)) = text.split_once("-----BEGIN DIRACX-----") {
        let (block, _) = block
            .split_once("-----END DIRACX-----")
            .ok_or_else(|| malformed("its DIRACX block has no end"))?;
        let block: String = block.split_whitespace().collect();
        let json =
            STANDARD.decode(block).map_err(|_cause| malformed("its DIRACX block is not base64"))?;
        (Form::Proxy, serde_json::from_slice::<Tokens>(&json))
    } else if text.contains("-----BEGIN") {
        return Err(malformed("it is a proxy without a DIRACX block"));
    } else if text.trim_start().starts_with('{') {
        (Form::Credentials, serde_json::from_str::<Tokens>(text))
    } else {
        let access_token = SecretString::from(text.trim());
        (Form::Plain, Ok(Tokens { access_token, refresh_token: None }))
    };
    // The causes would show parts of the secret.
    let tokens = tokens.map_err(|_cause| malformed("it holds no access_token"))?;
    let claims = claims(tokens.access_token.expose_secret())
        .ok_or_else(|| malformed("its access token is none of DiracX"))?;
    Ok(Held { form, access: tokens.access_token, refresh: tokens.refresh_token, claims })
}

/// Reads what an access token says of itself.
pub(crate) fn claims(token: &str) -> Option<Claims> {
    let mut parts = token.split('.');
    let (_, payload, _) = (parts.next()?, parts.next()?, parts.next()?);
    let json = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
    serde_json::from_slice(&json).ok()
}

impl Locked {
    /// Locks the file as DIRAC's own programs do; `None` while another one has it.
    pub(crate) fn open(path: &Utf8Path) -> Result<Option<Self>, FileError> {
        let file = fs::OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(failed("open", path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { file, path: path.to_owned() })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(failed("lock", path)(errno.into())),
        }
    }

    /// Writes new tokens, so that they are durable when this returns.
    ///
    /// In place, because another program may wait for the lock on this very file; and beside first,
    /// because a text that is half written loses the login.
    pub(crate) fn write(
        mut self,
        access: &SecretString,
        refresh: &SecretString,
        expires_on: i64,
    ) -> Result<(), FileError> {
        let text = serde_json::json!({
            "access_token": access.expose_secret(),
            "refresh_token": refresh.expose_secret(),
            "expires_on": expires_on,
        })
        .to_string();
        let side = side_of(&self.path);
        let beside = || -> io::Result<()> {
            match fs::remove_file(&side) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            let mut file =
                fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&side)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            // The name must be as durable as the text.
            match side.parent() {
                Some(parent) => fs::File::open(parent)?.sync_all(),
                None => Ok(()),
            }
        };
        let beside = beside();
        let mut inside = || -> io::Result<()> {
            self.file.rewind()?;
            self.file.write_all(text.as_bytes())?;
            self.file.set_len(u64::try_from(text.len()).unwrap_or(u64::MAX))?;
            self.file.sync_all()
        };
        match (beside, inside()) {
            (_, Ok(())) => {
                // That it could not be removed hurts nobody: it is read only when this file is broken.
                let removed = fs::remove_file(&side);
                if let Err(error) = removed
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!(path = %side, %error, "copy of the new token stays");
                }
                Ok(())
            }
            (Ok(()) | Err(_), Err(error)) => Err(failed("write", &self.path)(error)),
        }
    }
}

/// Creates the file of a new login, or replaces the old one's.
pub(crate) fn create(
    path: &Utf8Path,
    access: &SecretString,
    refresh: &SecretString,
    expires_on: i64,
) -> Result<(), FileError> {
    let made =
        fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = made.map_err(failed("make", path))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)
        .map_err(|errno| failed("lock", path)(errno.into()))?;
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o600))
        .map_err(|errno| failed("change", path)(errno.into()))?;
    Locked { file, path: path.to_owned() }.write(access, refresh, expires_on)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    pub(super) fn jwt(exp: i64) -> String {
        let body = serde_json::json!({
            "exp": exp, "iss": "http://x", "vo": "v", "dirac_group": "g", "preferred_username": "u"
        });
        let body = URL_SAFE_NO_PAD.encode(body.to_string());
        format!("eyJ0eXAiOiJKV1QifQ.{body}.c2ln")
    }

    fn file(text: &str, mode: u32) -> (tempfile::TempDir, Utf8PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("token");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    #[test]
    fn all_three_forms_are_read() {
        let json =
            format!("{{\"access_token\":\"{}\",\"refresh_token\":\"r\",\"expires_on\":1}}", jwt(5));
        let block = STANDARD.encode(&json);
        let (head, tail) = block.split_at(60);
        let proxy = format!(
            "-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n\
             -----BEGIN DIRACX-----\n{head}\n{tail}\n-----END DIRACX-----\n"
        );
        for (text, form) in [
            (proxy, Form::Proxy),
            (json, Form::Credentials),
            (format!("{}\n", jwt(5)), Form::Plain),
        ] {
            let (_dir, path) = file(&text, 0o600);
            let (held, _) = read(&path).unwrap();
            assert_eq!(held.form, form);
            assert_eq!((held.claims.exp, held.claims.vo.as_str()), (5, "v"));
            assert_eq!(held.refresh.is_some(), form != Form::Plain);
        }
    }

    #[test]
    fn what_cannot_be_used_is_said_without_the_secret() {
        let token = jwt(5);
        let half = format!("{{\"access_token\":\"{token}");
        for (text, mode, named) in [
            (token.as_str(), 0o644, "chmod 600"),
            (token.as_str(), 0o640, "chmod 600"),
            ("", 0o600, "none of DiracX"),
            ("secret-text", 0o600, "none of DiracX"),
            (half.as_str(), 0o600, "no access_token"),
            ("-----BEGIN CERTIFICATE-----\nAA\n", 0o600, "without a DIRACX block"),
            ("-----BEGIN DIRACX-----\nAA", 0o600, "no end"),
            ("-----BEGIN DIRACX-----\n!!\n-----END DIRACX-----", 0o600, "base64"),
        ] {
            let (_dir, path) = file(text, mode);
            let error = read(&path).unwrap_err();
            let told = format!("{error} {error:?}");
            assert!(told.contains(named), "{told}");
            assert!(!told.contains("secret-text") && !told.contains(&token), "{told}");
        }
    }

    #[test]
    fn a_renewal_that_was_cut_off_is_found_beside() {
        let (_dir, path) = file("{\"access_token\":\"eyJ", 0o600);
        let json = format!("{{\"access_token\":\"{}\",\"refresh_token\":\"r\"}}", jwt(7));
        let side = side_of(&path);
        fs::write(&side, json).unwrap();
        fs::set_permissions(&side, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(read(&path).unwrap().0.claims.exp, 7);
    }

    #[test]
    fn a_written_file_is_read_again_and_keeps_its_lock() {
        let (_dir, path) = file(
            &format!("{{\"access_token\":\"{}\",\"x\":\"{}\"}}", jwt(5), "long ".repeat(99)),
            0o600,
        );
        let locked = Locked::open(&path).unwrap().unwrap();
        assert!(Locked::open(&path).unwrap().is_none());
        locked.write(&jwt(9).into(), &"new".into(), 9).unwrap();
        let (held, _) = read(&path).unwrap();
        assert_eq!(held.claims.exp, 9);
        assert_eq!(held.refresh.unwrap().expose_secret(), "new");
        assert!(!side_of(&path).exists());
        assert!(Locked::open(&path).unwrap().is_some());
    }
}
