//! The file in which the token lies, in one of three forms.
//!
//! | form | who makes it | who renews it |
//! | --- | --- | --- |
//! | a proxy with a `DIRACX` block | `dirac-proxy-init`, for a robot's certificate | a cron job; bridge only reads |
//! | credentials, JSON | a login | bridge, and DIRAC's own programs if they share it |
//! | one line, the token | anybody | whoever wrote it |
//!
//! A renewal is written in place, because other programs wait for the lock on that very file. A new
//! login comes as a new file under the old name: whoever had opened the old one reads nothing of it.

use std::fs;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bridge_backend::Remedy;
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::FlockOperation;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

/// A proxy with a long chain has some ten kilobytes.
const LARGEST: u64 = 1 << 20;

/// How often a lock is taken again on a file that was replaced meanwhile.
const REPLACED_MOST: usize = 8;

/// Which form the file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Proxy,
    Credentials,
    Plain,
}

impl Form {
    /// Says what mends such a file.
    pub(crate) fn remedy(self) -> Remedy {
        match self {
            Self::Credentials => Remedy::Login,
            // Whoever made it makes it anew; a login would put itself in its place.
            Self::Proxy | Self::Plain => Remedy::Other,
        }
    }
}

/// What the file holds.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) form: Form,
    pub(crate) access: SecretString,
    pub(crate) refresh: Option<SecretString>,
    pub(crate) claims: Claims,
}

impl Held {
    /// Reads what the refresh token says of itself.
    pub(crate) fn refresh_claims(&self) -> Option<RefreshClaims> {
        payload(self.refresh.as_ref()?.expose_secret())
    }
}

/// What an access token says of itself. It is not verified: the server does that.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Claims {
    pub(crate) exp: i64,
    pub(crate) iss: String,
    pub(crate) vo: String,
    pub(crate) dirac_group: String,
    pub(crate) preferred_username: String,
    /// What it may do.
    #[serde(default)]
    pub(crate) dirac_properties: Vec<String>,
}

/// What a refresh token says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct RefreshClaims {
    /// Its name at the server.
    pub(crate) jti: String,
    /// When the login ends: a renewal does not put that off.
    pub(crate) exp: i64,
    /// It comes with a proxy, and is good for any number of uses.
    #[serde(default)]
    pub(crate) legacy_exchange: bool,
}

/// Tells one state of the file from another; the default is that of no file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    #[error("use the token file {path}: it is no file")]
    NotAFile { path: Utf8PathBuf },
    #[error("use the token file {path}: it belongs to user {owner}, neither root nor us")]
    Owner { path: Utf8PathBuf, owner: u32 },
    #[error("understand the token file {path}: {why}")]
    Malformed { path: Utf8PathBuf, form: Form, why: &'static str },
    #[error("write a login to the token file {path}: {why}")]
    NotForLogins { path: Utf8PathBuf, why: &'static str },
}

impl FileError {
    /// Says what the operator must do.
    pub(crate) fn remedy(&self) -> Remedy {
        match self {
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => Remedy::Login,
            Self::Malformed { form: Form::Credentials, .. } => Remedy::Login,
            Self::Io { .. }
            | Self::Readable { .. }
            | Self::NotAFile { .. }
            | Self::Owner { .. }
            | Self::Malformed { .. }
            | Self::NotForLogins { .. } => Remedy::Other,
        }
    }
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

/// Gives the file's stamp; that of no file when it is not there.
pub(crate) fn stamp(path: &Utf8Path) -> Stamp {
    fs::metadata(path).map_or_else(|_none| Stamp::default(), |meta| of_meta(&meta))
}

fn of_meta(meta: &fs::Metadata) -> Stamp {
    Stamp(meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec())
}

/// Opens a file without waiting for anybody, as a pipe would have it.
fn open(path: &Utf8Path) -> io::Result<fs::File> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    fs::OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Reads the file.
pub(crate) fn read(path: &Utf8Path) -> Result<(Held, Stamp), FileError> {
    let mut file = open(path).map_err(failed("open", path))?;
    let (text, stamp) = text_of(&mut file, path)?;
    match parse(&text, path) {
        Ok(held) => Ok((held, stamp)),
        Err(error) => {
            // A renewal that was cut off while it wrote has left the whole text beside.
            let side = side_of(path);
            let mut file = open(&side).map_err(|_none| error)?;
            let (text, _) = text_of(&mut file, &side)?;
            Ok((parse(&text, &side)?, stamp))
        }
    }
}

fn side_of(path: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{path}.bridge-new"))
}

fn us() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn text_of(file: &mut fs::File, path: &Utf8Path) -> Result<(String, Stamp), FileError> {
    let meta = file.metadata().map_err(failed("look at", path))?;
    if !meta.is_file() {
        return Err(FileError::NotAFile { path: path.to_owned() });
    }
    if meta.mode() & 0o077 != 0 {
        return Err(FileError::Readable { path: path.to_owned() });
    }
    // Whoever owns it decides whose jobs these are.
    if ![0, us()].contains(&meta.uid()) {
        return Err(FileError::Owner { path: path.to_owned(), owner: meta.uid() });
    }
    let mut bytes = Vec::new();
    file.take(LARGEST).read_to_end(&mut bytes).map_err(failed("read", path))?;
    // What is no text is no token either, and is said to be none.
    Ok((String::from_utf8_lossy(&bytes).into_owned(), of_meta(&meta)))
}

/// Tells by its first words which form a text has, or was to have.
fn form_of(text: &str) -> Form {
    if text.contains("-----BEGIN") {
        Form::Proxy
    } else if text.trim_start().starts_with('{') {
        Form::Credentials
    } else {
        Form::Plain
    }
}

/// Reads the text of a token file, whatever its form.
fn parse(text: &str, path: &Utf8Path) -> Result<Held, FileError> {
    let form = form_of(text);
    let malformed = |why| FileError::Malformed { path: path.to_owned(), form, why };
    if text.trim().is_empty() {
        return Err(FileError::Malformed {
            path: path.to_owned(),
            form: Form::Credentials,
            why: "it is empty",
        });
    }
    let tokens = match form {
        Form::Proxy => {
            let (_, block) = text
                .split_once("-----BEGIN DIRACX-----")
                .ok_or_else(|| malformed("it is a proxy without a DIRACX block"))?;
            let (block, _) = block
                .split_once("-----END DIRACX-----")
                .ok_or_else(|| malformed("its DIRACX block has no end"))?;
            let block: String = block.split_whitespace().collect();
            let json = STANDARD
                .decode(block)
                .map_err(|_cause| malformed("its DIRACX block is not base64"))?;
            serde_json::from_slice::<Tokens>(&json)
        }
        Form::Credentials => serde_json::from_str::<Tokens>(text),
        Form::Plain => {
            let access_token = SecretString::from(text.trim());
            Ok(Tokens { access_token, refresh_token: None })
        }
    };
    // The causes would show parts of the secret.
    let tokens = tokens.map_err(|_cause| malformed("it holds no access_token, or was cut off"))?;
    let claims = claims(tokens.access_token.expose_secret())
        .ok_or_else(|| malformed("its access token is none of DiracX, or was cut off"))?;
    Ok(Held { form, access: tokens.access_token, refresh: tokens.refresh_token, claims })
}

/// Reads what an access token says of itself.
pub(crate) fn claims(token: &str) -> Option<Claims> {
    payload(token)
}

fn payload<T: serde::de::DeserializeOwned>(token: &str) -> Option<T> {
    let mut parts = token.split('.');
    let (_, payload, _) = (parts.next()?, parts.next()?, parts.next()?);
    let json = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
    serde_json::from_slice(&json).ok()
}

fn text_for(access: &SecretString, refresh: Option<&SecretString>, expires_on: i64) -> String {
    let mut text = serde_json::json!({
        "access_token": access.expose_secret(),
        "expires_on": expires_on,
    });
    if let Some(refresh) = refresh {
        text["refresh_token"] = refresh.expose_secret().into();
    }
    text.to_string()
}

/// Makes a name as durable as what it names.
fn sync_parent(path: &Utf8Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

fn remove(path: &Utf8Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

impl Locked {
    /// Locks the file as DIRAC's own programs do; `None` while another one has it.
    pub(crate) fn open(path: &Utf8Path) -> Result<Option<Self>, FileError> {
        for _ in 0..REPLACED_MOST {
            let file = fs::OpenOptions::new().read(true).write(true).open(path);
            let file = file.map_err(failed("open", path))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(errno) => return Err(failed("lock", path)(errno.into())),
            }
            // A file that lost its name to a new login would take the new token with it.
            let ours = file.metadata().map_err(failed("look at", path))?;
            if fs::metadata(path)
                .is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()))
            {
                return Ok(Some(Self { file, path: path.to_owned() }));
            }
        }
        Ok(None)
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
    ) -> Result<Stamp, FileError> {
        let text = text_for(access, Some(refresh), expires_on);
        let side = side_of(&self.path);
        let beside = || -> io::Result<()> {
            remove(&side)?;
            let mut file =
                fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&side)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            sync_parent(&side)
        };
        // Without it there is a moment in which a crash loses the login, but no longer than that.
        if let Err(error) = beside() {
            tracing::warn!(path = %side, %error, "no copy of the new token could be made first");
        }
        let mut inside = || -> io::Result<()> {
            self.file.rewind()?;
            self.file.write_all(text.as_bytes())?;
            self.file.set_len(u64::try_from(text.len()).unwrap_or(u64::MAX))?;
            self.file.sync_all()
        };
        inside().map_err(failed("write", &self.path))?;
        // Of this file, which may have lost its name to a new login meanwhile.
        let meta = self.file.metadata().map_err(failed("look at", &self.path))?;
        // That it could not be removed hurts nobody: it is read only when this file is broken.
        if let Err(error) = remove(&side) {
            tracing::warn!(path = %side, %error, "copy of the new token stays");
        }
        Ok(of_meta(&meta))
    }
}

/// The file of a login that is under way: all that can be wrong with it is found before a person is
/// asked to agree.
#[derive(Debug)]
pub(crate) struct New {
    file: tempfile::NamedTempFile,
    path: Utf8PathBuf,
}

impl New {
    /// Makes an empty file beside `path`; it goes with this value.
    pub(crate) fn beside(path: &Utf8Path) -> Result<Self, FileError> {
        // What the name leads to is replaced, not the link.
        let path = match path.canonicalize_utf8() {
            Ok(path) => path,
            Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
            Err(error) => return Err(failed("find", path)(error)),
        };
        let owner = overwritten(&path)?;
        let (dir, name) = (path.parent().unwrap_or(Utf8Path::new("/")), path.file_name());
        // Made with mode 600, and under a name that nobody guesses.
        let file = tempfile::Builder::new()
            .prefix(&format!(".{}.", name.unwrap_or_default()))
            .tempfile_in(dir)
            .map_err(failed("make", &path))?;
        let new = Self { file, path };
        // Root logs in for the account that will read it.
        if let Some(owner) = owner
            && us() == 0
        {
            let (owner, group) =
                (rustix::fs::Uid::from_raw(owner.0), rustix::fs::Gid::from_raw(owner.1));
            rustix::fs::fchown(new.file.as_file(), Some(owner), Some(group))
                .map_err(|errno| failed("give away", &new.path)(errno.into()))?;
        }
        Ok(new)
    }

    /// Writes the tokens and gives the file its name; durable when this returns.
    pub(crate) fn keep(
        mut self,
        access: &SecretString,
        refresh: Option<&SecretString>,
        expires_on: i64,
    ) -> Result<(), FileError> {
        let text = text_for(access, refresh, expires_on);
        let path = self.path;
        let done = (|| {
            self.file.write_all(text.as_bytes())?;
            self.file.as_file().sync_all()?;
            self.file.persist(&path).map_err(|error| error.error)?;
            sync_parent(&path)?;
            // Of an earlier login; should the file ever break, this must not be found in its place.
            remove(&side_of(&path))
        })();
        done.map_err(failed("write", &path))
    }
}

/// Looks whether a login may take the place of what is there, and gives whom the new file is for.
fn overwritten(path: &Utf8Path) -> Result<Option<(u32, u32)>, FileError> {
    let refused = |why| Err(FileError::NotForLogins { path: path.to_owned(), why });
    let mut file = match open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let Some(parent) = path.parent() else { return Ok(None) };
            let meta = fs::metadata(parent).map_err(failed("find the directory of", path))?;
            return Ok(Some((meta.uid(), meta.gid())));
        }
        Err(error) => return Err(failed("open", path)(error)),
    };
    let meta = file.metadata().map_err(failed("look at", path))?;
    if !meta.is_file() {
        return refused("it is no file");
    }
    if us() != 0 && meta.uid() != us() {
        return Err(FileError::Owner { path: path.to_owned(), owner: meta.uid() });
    }
    let mut head = Vec::new();
    (&mut file).take(LARGEST).read_to_end(&mut head).map_err(failed("read", path))?;
    let head = String::from_utf8_lossy(&head);
    match form_of(&head) {
        Form::Credentials => {}
        Form::Plain if head.trim().is_empty() || head.starts_with("eyJ") => {}
        Form::Plain => return refused("what is there does not look like a token"),
        Form::Proxy => {
            return refused(
                "a proxy is there, which is renewed by whoever made it; name another \
                            `token_file` for a login",
            );
        }
    }
    Ok(Some((meta.uid(), meta.gid())))
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
            ("", 0o600, "it is empty"),
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
    #[test]
    fn a_new_login_takes_the_place_of_an_old_one_and_of_nothing_else() {
        let (dir, path) = file("{\"access_token\":\"ey", 0o644);
        fs::write(side_of(&path), "left behind").unwrap();
        let link = path.with_file_name("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let mut theirs = fs::File::open(&path).unwrap();
        New::beside(&link).unwrap().keep(&jwt(9).into(), Some(&"new".into()), 9).unwrap();
        assert_eq!(read(&path).unwrap().0.claims.exp, 9);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        let mut old = String::new();
        theirs.read_to_string(&mut old).unwrap();
        assert_eq!(old, "{\"access_token\":\"ey");
        drop(New::beside(&path).unwrap());
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["link", "token"]);
        for text in ["precious", "-----BEGIN CERTIFICATE-----\n"] {
            fs::write(&path, text).unwrap();
            let error = New::beside(&path).unwrap_err();
            assert!(matches!(error, FileError::NotForLogins { .. }), "{error:?}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert!(matches!(New::beside(&path.join("x")).unwrap_err(), FileError::Io { .. }));
    }

    #[test]
    fn a_file_that_was_replaced_is_not_locked_in_its_place() {
        let (_dir, path) = file(&format!("{{\"access_token\":\"{}\"}}", jwt(5)), 0o600);
        let before = Locked::open(&path).unwrap().unwrap();
        New::beside(&path).unwrap().keep(&jwt(9).into(), None, 9).unwrap();
        let now = Locked::open(&path).unwrap().unwrap();
        before.write(&jwt(6).into(), &"late".into(), 6).unwrap();
        assert_eq!(read(&path).unwrap().0.claims.exp, 9);
        now.write(&jwt(10).into(), &"new".into(), 10).unwrap();
        assert_eq!(read(&path).unwrap().0.claims.exp, 10);
    }
}
