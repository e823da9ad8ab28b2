//! The keys that seal what is stored of jobs, and the file they are in.
//!
//! The file lies outside the state directory, so that whoever copies the database does not copy its keys.
//! It holds one key, two while they are being exchanged: the first seals, all open. Each has an id that
//! follows from it, so that a row says which key it wants and a damaged file is noticed.
//!
//! # Envelopes
//!
//! `'1'`, the key's id (8 bytes), a random nonce (24), and what XChaCha20-Poly1305 makes of the text and
//! where it belongs: an envelope that is moved to another row or column does not open. `'0'` and the
//! text is what an older bridge left; it is sealed when the store is opened.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use camino::{Utf8Path, Utf8PathBuf};
use chacha20poly1305::aead::{AeadInPlace as _, KeyInit as _};
use chacha20poly1305::{Key as CipherKey, XChaCha20Poly1305, XNonce};
use secrecy::zeroize::Zeroizing;
use sha2::{Digest as _, Sha256};

/// Begins an envelope that is closed.
pub(in crate::store) const SEALED: u8 = b'1';

/// Begins what an older bridge stored readable.
pub(in crate::store) const OPEN: u8 = b'0';

const ID: usize = 8;
const NONCE: usize = 24;
const KEY: usize = 32;
const HEADER: usize = 1 + ID + NONCE;

/// Begins a line with a key: the version of the file's format.
const LINE: &str = "bridge-key-1";

const HEADING: &str = "\
# The key with which bridge seals what its database holds of jobs, their secrets included.
# Without it the jobs that are not over are lost. Keep a copy, but not where the database's copies are.
";

/// A file that is longer than this is no key file.
const LONGEST_FILE: u64 = 64 * 1024;

/// Names a key; follows from it and does not give it away.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyId([u8; ID]);

impl KeyId {
    /// Reads an id from a row.
    pub(in crate::store) fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Gives the bytes that stand in a row.
    pub(in crate::store) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// Where a sealed value belongs.
#[derive(Clone, Copy, Debug)]
pub(in crate::store) struct Belongs<'a> {
    /// The table and column: `payloads.sealed`.
    pub(in crate::store) column: &'static str,
    /// The row's key.
    pub(in crate::store) row: &'a str,
}

/// Why a stored value cannot be read, or none can be stored.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// It was sealed with a key that is not there.
    #[error("open it without the key {0}")]
    NoKey(KeyId),
    /// There is no key at all.
    #[error("seal it without a key")]
    NoKeys,
    /// It was changed, or it belongs elsewhere.
    #[error("open it: it was changed since it was sealed")]
    Changed,
    /// It is no envelope of any version that is known.
    #[error("open it: its form is not known to this program")]
    Form,
    /// It is no text.
    #[error("read it: it is no text")]
    NoText,
    /// The system gives no random numbers.
    #[error("get random numbers")]
    Random(#[source] io::Error),
}

/// Why the key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read or written.
    #[error("use the key file {path}")]
    Io {
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others can read it.
    #[error("use the key file {path}: others can read it (mode {mode:04o})")]
    Mode {
        /// The file.
        path: Utf8PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It is somebody else's.
    #[error("use the key file {path}: it belongs to user {owner}, neither root nor us")]
    Owner {
        /// The file.
        path: Utf8PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// It is damaged.
    #[error("use the key file {path}: line {line} is no key")]
    Line {
        /// The file.
        path: Utf8PathBuf,
        /// Which line.
        line: usize,
    },
    /// It holds no key.
    #[error("use the key file {path}: it holds no key")]
    Empty {
        /// The file.
        path: Utf8PathBuf,
    },
    /// It is not there.
    #[error("use the key file {path}: it does not exist")]
    Missing {
        /// The file.
        path: Utf8PathBuf,
    },
}

struct Key {
    id: KeyId,
    bytes: Zeroizing<[u8; KEY]>,
}

impl Key {
    fn new(bytes: Zeroizing<[u8; KEY]>) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"bridge key id\0");
        hash.update(*bytes);
        let mut id = [0; ID];
        id.iter_mut().zip(hash.finalize()).for_each(|(to, from)| *to = from);
        Self { id: KeyId(id), bytes }
    }

    fn random() -> io::Result<Self> {
        let mut bytes = Zeroizing::new([0; KEY]);
        fill(bytes.as_mut())?;
        Ok(Self::new(bytes))
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(CipherKey::from_slice(self.bytes.as_slice()))
    }

    fn line(&self) -> Zeroizing<String> {
        let key = Zeroizing::new(BASE64_STANDARD.encode(self.bytes.as_slice()));
        Zeroizing::new(format!("{LINE} {} {}\n", self.id, key.as_str()))
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (version, id, key) = (words.next()?, words.next()?, words.next()?);
        let key = Zeroizing::new(BASE64_STANDARD.decode(key).ok()?);
        let key = Self::new(Zeroizing::new(key.as_slice().try_into().ok()?));
        (version == LINE && key.id.to_string() == id && words.next().is_none()).then_some(key)
    }
}

fn fill(bytes: &mut [u8]) -> io::Result<()> {
    getrandom::fill(bytes).map_err(io::Error::from)
}

/// Keys in memory: the first seals, all open.
#[derive(Clone)]
pub struct Keyring {
    /// Where they are kept; nowhere for those of a test.
    path: Option<Utf8PathBuf>,
    keys: Arc<Vec<Key>>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring").field("path", &self.path).field("ids", &self.ids()).finish()
    }
}

impl Keyring {
    /// Reads a key file. One that does not exist gives an empty ring: the store makes it when nothing
    /// was sealed yet, and refuses to go on otherwise.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be trusted: damaged, or not ours alone.
    pub fn read(path: &Utf8Path) -> Result<Self, KeyFileError> {
        let mut ring = Self { path: Some(path.to_owned()), keys: Arc::default() };
        match read_lines(path)? {
            None => Ok(ring),
            Some(text) => {
                let mut keys = Vec::new();
                for (number, line) in text.lines().enumerate() {
                    let line = line.trim();
                    if line.is_empty() || line.starts_with('#') {
                        continue;
                    }
                    let damaged = || KeyFileError::Line { path: path.to_owned(), line: number + 1 };
                    keys.push(Key::parse(line).ok_or_else(damaged)?);
                }
                if keys.is_empty() {
                    return Err(KeyFileError::Empty { path: path.to_owned() });
                }
                ring.keys = Arc::new(keys);
                Ok(ring)
            }
        }
    }

    /// Makes a ring with one key that is in no file.
    ///
    /// # Errors
    ///
    /// When the system gives no random numbers.
    pub fn in_memory() -> Result<Self, SealError> {
        let key = Key::random().map_err(SealError::Random)?;
        Ok(Self { path: None, keys: Arc::new(vec![key]) })
    }

    /// Makes a ring without keys, for those who need not read what is sealed.
    pub fn none() -> Self {
        Self { path: None, keys: Arc::default() }
    }

    /// A ring that is the same every time, for tests that open a store again.
    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        Self { path: None, keys: Arc::new(vec![Key::new(Zeroizing::new([7; KEY]))]) }
    }

    /// Gives the file the keys are in.
    pub fn path(&self) -> Option<&Utf8Path> {
        self.path.as_deref()
    }

    /// Names the keys, the one that seals first.
    pub fn ids(&self) -> Vec<KeyId> {
        self.keys.iter().map(|key| key.id).collect()
    }

    /// Tells whether there is a key.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Writes a file with a first key, where there is none yet.
    ///
    /// # Errors
    ///
    /// When it cannot be written, or somebody else has just made one.
    pub(in crate::store) fn create(&self) -> Result<Self, KeyFileError> {
        let Some(path) = &self.path else { return Ok(self.clone()) };
        let io = |source| KeyFileError::Io { path: path.clone(), source };
        let keys = Arc::new(vec![Key::random().map_err(io)?]);
        let ring = Self { path: Some(path.clone()), keys };
        ring.write(true)?;
        Ok(ring)
    }

    /// Puts a new key first and writes the file.
    pub(in crate::store) fn with_new_key(&self) -> Result<Self, KeyFileError> {
        let io = |source| self.io(source);
        let mut keys = vec![Key::random().map_err(io)?];
        keys.extend(self.keys.iter().map(|key| Key::new(key.bytes.clone())));
        let ring = Self { path: self.path.clone(), keys: Arc::new(keys) };
        ring.write(false)?;
        Ok(ring)
    }

    /// Forgets all keys but the first and writes the file.
    pub(in crate::store) fn with_first_alone(&self) -> Result<Self, KeyFileError> {
        let first = self.keys.iter().take(1).map(|key| Key::new(key.bytes.clone())).collect();
        let ring = Self { path: self.path.clone(), keys: Arc::new(first) };
        ring.write(false)?;
        Ok(ring)
    }

    fn io(&self, source: io::Error) -> KeyFileError {
        KeyFileError::Io { path: self.path.clone().unwrap_or_default(), source }
    }

    /// Writes the file aside and moves it into its place, so that it is whole at all times.
    fn write(&self, new: bool) -> Result<(), KeyFileError> {
        let Some(path) = &self.path else { return Ok(()) };
        self.write_at(path, new).map_err(|source| self.io(source))
    }

    fn write_at(&self, path: &Utf8Path, new: bool) -> io::Result<()> {
        let dir = match path.parent() {
            Some(dir) if !dir.as_str().is_empty() => dir,
            _ => Utf8Path::new("."),
        };
        let aside = Utf8PathBuf::from(format!("{path}.{}.new", std::process::id()));
        // Left by a bridge that died here and had our number.
        match std::fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let written = (|| {
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&aside)?;
            file.write_all(HEADING.as_bytes())?;
            for key in self.keys.iter() {
                file.write_all(key.line().as_bytes())?;
            }
            file.sync_all()?;
            if new {
                // Unlike a rename this fails where another bridge was faster; its key may be in use.
                std::fs::hard_link(&aside, path)?;
                std::fs::remove_file(&aside)
            } else {
                std::fs::rename(&aside, path)
            }
        })();
        if let Err(error) = written {
            if let Err(left) = std::fs::remove_file(&aside)
                && left.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %aside, error = %left, "a file with keys remains");
            }
            return Err(error);
        }
        std::fs::File::open(dir)?.sync_all()
    }

    /// Seals a text with the first key.
    pub(in crate::store) fn seal(
        &self,
        belongs: Belongs<'_>,
        text: &[u8],
    ) -> Result<Vec<u8>, SealError> {
        let key = self.keys.first().ok_or(SealError::NoKeys)?;
        let mut nonce = [0; NONCE];
        fill(&mut nonce).map_err(SealError::Random)?;
        let mut envelope = Vec::with_capacity(HEADER + text.len() + 16);
        envelope.push(SEALED);
        envelope.extend_from_slice(&key.id.0);
        envelope.extend_from_slice(&nonce);
        envelope.extend_from_slice(text);
        let tag = key
            .cipher()
            .encrypt_in_place_detached(
                XNonce::from_slice(&nonce),
                &associated(key.id, belongs),
                &mut envelope[HEADER..],
            )
            // Only for texts of 256 GiB.
            .map_err(|_too_long| SealError::Form)?;
        envelope.extend_from_slice(&tag);
        Ok(envelope)
    }

    /// Opens an envelope.
    ///
    /// What is not sealed is refused: the store has sealed everything before it was read, so whoever put
    /// it there was not us.
    pub(in crate::store) fn open(
        &self,
        belongs: Belongs<'_>,
        mut envelope: Vec<u8>,
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        if envelope.first() != Some(&SEALED) {
            return Err(SealError::Form);
        }
        let (Some(id), Some(nonce), Some(end)) = (
            key_id(&envelope),
            envelope.get(1 + ID..HEADER).map(XNonce::clone_from_slice),
            envelope.len().checked_sub(16).filter(|end| *end >= HEADER),
        ) else {
            return Err(SealError::Form);
        };
        let key = self.keys.iter().find(|key| key.id == id).ok_or(SealError::NoKey(id))?;
        let tag = chacha20poly1305::Tag::clone_from_slice(&envelope[end..]);
        envelope.truncate(end);
        let mut text = Zeroizing::new(envelope.split_off(HEADER));
        key.cipher()
            .decrypt_in_place_detached(&nonce, &associated(id, belongs), &mut text, &tag)
            .map_err(|_changed| SealError::Changed)?;
        Ok(text)
    }
}

/// Gives the id of the key that an envelope wants.
pub(in crate::store) fn key_id(envelope: &[u8]) -> Option<KeyId> {
    envelope.get(1..=ID).and_then(KeyId::from_slice)
}

/// What an envelope is bound to.
fn associated(id: KeyId, belongs: Belongs<'_>) -> Vec<u8> {
    [b"bridge\0", belongs.column.as_bytes(), b"\0", belongs.row.as_bytes(), b"\0", &id.0].concat()
}

/// Reads the file, if it is there and ours alone.
fn read_lines(path: &Utf8Path) -> Result<Option<Zeroizing<String>>, KeyFileError> {
    let io = |source| KeyFileError::Io { path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    // Of the open file: the name may lead elsewhere by now.
    let meta = file.metadata().map_err(io)?;
    let mode = meta.mode() & 0o7777;
    if !meta.is_file() {
        return Err(io(io::Error::other("it is no regular file")));
    }
    if ![0, rustix::process::geteuid().as_raw()].contains(&meta.uid()) {
        return Err(KeyFileError::Owner { path: path.to_owned(), owner: meta.uid() });
    }
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Mode { path: path.to_owned(), mode });
    }
    let mut text = Zeroizing::new(String::with_capacity(4096));
    file.take(LONGEST_FILE).read_to_string(&mut text).map_err(io)?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const HERE: Belongs<'_> = Belongs { column: "payloads.sealed", row: "01J" };

    fn file() -> (tempfile::TempDir, Utf8PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(dir.path().join("bridge.key")).unwrap();
        (dir, path)
    }

    #[test]
    fn what_was_sealed_opens_and_shows_nothing_before() {
        let ring = Keyring::in_memory().unwrap();
        let sealed = ring.seal(HERE, b"hunter2 and more").unwrap();
        assert!(!sealed.windows(7).any(|w| w == b"hunter2"));
        assert_eq!(ring.open(HERE, sealed.clone()).unwrap().as_slice(), b"hunter2 and more");
        assert_ne!(ring.seal(HERE, b"hunter2 and more").unwrap(), sealed, "nonces differ");
        assert_eq!(ring.open(HERE, ring.seal(HERE, b"").unwrap()).unwrap().as_slice(), b"");
        let error = ring.open(HERE, b"0{\"never\":\"sealed\"}".to_vec()).unwrap_err();
        assert!(matches!(error, SealError::Form), "{error}");
    }

    #[test]
    fn an_envelope_opens_only_where_it_belongs_and_as_it_was() {
        let ring = Keyring::in_memory().unwrap();
        let sealed = ring.seal(HERE, b"text").unwrap();
        for elsewhere in [
            Belongs { row: "01K", ..HERE },
            Belongs { column: "jobs.outcome", ..HERE },
            Belongs { column: "payloads", row: "sealed" },
        ] {
            let error = ring.open(elsewhere, sealed.clone()).unwrap_err();
            assert!(matches!(error, SealError::Changed), "{elsewhere:?}: {error}");
        }
        for at in 0..sealed.len() {
            let mut bent = sealed.clone();
            bent[at] ^= 1;
            assert!(ring.open(HERE, bent).is_err(), "byte {at}");
            assert!(ring.open(HERE, sealed[..at].to_vec()).is_err(), "cut at {at}");
        }
        let other = Keyring::in_memory().unwrap();
        assert!(
            matches!(other.open(HERE, sealed), Err(SealError::NoKey(id)) if id == ring.ids()[0])
        );
    }

    #[test]
    fn a_key_file_is_private_whole_and_read_back() {
        let (_dir, path) = file();
        let absent = Keyring::read(&path).unwrap();
        assert!(absent.is_empty() && !path.exists());
        let ring = absent.create().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Keyring::read(&path).unwrap().ids(), ring.ids());
        let sealed = ring.seal(HERE, b"text").unwrap();

        let error = absent.create().unwrap_err();
        assert!(matches!(error, KeyFileError::Io { .. }), "nothing is overwritten: {error}");

        let both = ring.with_new_key().unwrap();
        let read = Keyring::read(&path).unwrap();
        assert_eq!(read.ids(), both.ids());
        assert_eq!(read.ids()[1], ring.ids()[0]);
        assert_eq!(read.open(HERE, sealed.clone()).unwrap().as_slice(), b"text");
        let last = both.with_first_alone().unwrap();
        assert_eq!(Keyring::read(&path).unwrap().ids(), last.ids());
        assert!(matches!(last.open(HERE, sealed), Err(SealError::NoKey(_))));
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing aside");
    }

    #[test]
    fn a_key_file_that_cannot_be_trusted_is_refused_and_shows_nothing() {
        let (_dir, path) = file();
        let ring = Keyring::read(&path).unwrap().create().unwrap();
        let good = std::fs::read_to_string(&path).unwrap();
        let key = good.split_whitespace().last().unwrap().to_owned();
        assert!(!format!("{ring:?}").contains(&key));

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = Keyring::read(&path).unwrap_err();
        assert!(matches!(error, KeyFileError::Mode { mode: 0o640, .. }), "{error}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();

        let mut other = key.clone();
        other.replace_range(..1, if key.starts_with('A') { "B" } else { "A" });
        for bad in [
            good.replace(&key, &other),
            good.replace(&key, key.split_at(20).0),
            good.replace(LINE, "bridge-key-9"),
            format!("{good}more"),
        ] {
            std::fs::write(&path, bad).unwrap();
            let error = Keyring::read(&path).unwrap_err();
            assert!(matches!(error, KeyFileError::Line { .. }), "{error}");
            assert!(!format!("{error} {error:?}").contains(key.split_at(20).0));
        }
        std::fs::write(&path, "# nothing\n").unwrap();
        assert!(matches!(Keyring::read(&path), Err(KeyFileError::Empty { .. })));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(Keyring::read(&path).is_err());
    }
}
