//! Who we are to GitLab: the runner manager's system id, and tokens short enough to be shown.

use std::fmt;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::DirBuilderExt as _;

use camino::{Utf8Path, Utf8PathBuf};
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

/// As gitlab-runner calls it.
const FILE: &str = ".runner_system_id";

const DIGITS: &[u8; 62] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// Tells apart the runner managers that share a token: `s_` or `r_` and 12 letters or digits.
///
/// GitLab keeps version, features and contact per system id. Two processes with the same one would
/// overwrite each other's, and jobs would be cancelled the wrong way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SystemId(String);

/// The system id cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file is there and cannot be read; to make up another id would double the runner manager.
    #[error("the system id cannot be read from {path}")]
    Unreadable {
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl SystemId {
    /// Gives the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let rest = text.strip_prefix("s_").or_else(|| text.strip_prefix("r_"))?;
        let valid = rest.len() == 12 && rest.bytes().all(|byte| byte.is_ascii_alphanumeric());
        valid.then(|| Self(text.to_owned()))
    }

    /// Derives the id from machine and directory: a lost file comes back with the same content, a
    /// second bridge or a gitlab-runner on the same machine gets another one.
    fn of_machine(machine_id: &str, dir: &Utf8Path) -> Self {
        let mut mac = Hmac::<Sha256>::new_from_slice(machine_id.as_bytes())
            .expect("HMAC takes keys of any length");
        mac.update(b"bridge\0");
        mac.update(dir.as_str().as_bytes());
        let digest = mac.finalize().into_bytes();
        let hex: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        Self(format!("s_{hex}"))
    }

    fn of_chance(mut random: u128) -> Self {
        let mut text = String::from("r_");
        for _ in 0..12 {
            let digit = usize::try_from(random % 62).expect("less than 62");
            text.push(char::from(DIGITS[digit]));
            random /= 62;
        }
        Self(text)
    }
}

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Reads the system id from its file in `dir`; makes it if there is none or it is malformed.
///
/// An id that cannot be written is used all the same: derived from the machine it will be the same
/// next time.
pub fn system_id(
    dir: &Utf8Path,
    machine_id: Option<&str>,
    random: u128,
) -> Result<SystemId, IdentityError> {
    let path = dir.join(FILE);
    match std::fs::read(&path) {
        Ok(bytes) => {
            if let Some(id) = SystemId::parse(&String::from_utf8_lossy(&bytes)) {
                return Ok(id);
            }
            tracing::warn!(%path, "the system id is malformed and is made anew");
        }
        Err(source) if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
        Err(source) => return Err(IdentityError::Unreadable { path, source }),
    }
    let id = match machine_id.map(str::trim).filter(|id| !id.is_empty()) {
        Some(machine_id) => {
            let place = dir.canonicalize_utf8().unwrap_or_else(|_missing| dir.to_owned());
            SystemId::of_machine(machine_id, &place)
        }
        None => SystemId::of_chance(random),
    };
    if let Err(error) = write(dir, &path, &id) {
        tracing::warn!(%path, %error, "the system id cannot be kept");
    }
    Ok(id)
}

/// Writes the file whole or not at all, for the owner only.
fn write(dir: &Utf8Path, path: &Utf8Path, id: &SystemId) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // Temporary files have mode 0600.
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(id.as_str().as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

/// Reads the machine's id from where D-Bus or systemd keeps it.
pub fn machine_id() -> Option<String> {
    ["/var/lib/dbus/machine-id", "/etc/machine-id"].iter().find_map(|path| {
        match std::fs::read_to_string(path) {
            Ok(text) => Some(text.trim().to_owned()).filter(|text| !text.is_empty()),
            Err(error) => {
                tracing::debug!(path, %error, "no machine id here");
                None
            }
        }
    })
}

/// Shortens a token to what may be shown: 9 characters after its well-known prefix.
///
/// An instance may put a prefix of its own before `glrt-`.
pub fn short_token(token: &str) -> String {
    let kind = |text: &str| {
        let rest = text.strip_prefix('t')?;
        let rest = rest.strip_prefix(['1', '2', '3'])?;
        rest.strip_prefix('_').map(str::to_owned)
    };
    let rest = if let Some((_, rest)) = token.split_once("glrt-") {
        kind(rest).unwrap_or_else(|| rest.to_owned())
    } else if let Some((_, rest)) = token.split_once("glrtr-") {
        rest.to_owned()
    } else if let Some(rest) = token.strip_prefix("glcbt-") {
        rest.to_owned()
    } else if let Some(rest) = kind(token) {
        rest
    } else if let Some(rest) = token.strip_prefix("GR").and_then(after_date) {
        rest.to_owned()
    } else {
        token.to_owned()
    };
    rest.chars().take(9).collect()
}

/// Strips the seven hexadecimal digits of a registration token's date.
fn after_date(text: &str) -> Option<&str> {
    let (date, rest) = text.split_at_checked(7)?;
    date.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(rest)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    struct Place {
        _dir: tempfile::TempDir,
        path: Utf8PathBuf,
    }

    fn place() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(dir.path().canonicalize().unwrap()).unwrap();
        Place { _dir: dir, path }
    }

    #[test]
    fn the_id_is_kept_for_the_owner_only() {
        let place = place();
        let dir = place.path.join("new");
        let id = system_id(&dir, None, u128::MAX).unwrap();
        assert!(id.as_str().starts_with("r_") && id.as_str().len() == 14, "{id}");
        assert_eq!(system_id(&dir, Some("machine"), 7).unwrap(), id, "the file wins");
        let mode = |path: &Utf8Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir.join(FILE)), 0o600);
        assert_eq!(mode(&dir), 0o700);
    }

    #[test]
    fn a_lost_file_comes_back_and_another_place_has_another_id() {
        let (one, two) = (place(), place());
        let first = system_id(&one.path, Some("0123\n"), 1).unwrap();
        std::fs::remove_file(one.path.join(FILE)).unwrap();
        assert_eq!(system_id(&one.path, Some("0123"), 2).unwrap(), first);
        assert!(first.as_str().starts_with("s_"), "{first}");
        assert_ne!(system_id(&two.path, Some("0123"), 1).unwrap(), first);
        assert_ne!(SystemId::of_machine("4567", &one.path), first);
    }

    #[test]
    fn a_malformed_id_is_made_anew() {
        let place = place();
        for bad in ["", "s_short", "x_0123456789ab", "s_0123456789ab0", "s_0123456789a-", "\u{0}"] {
            std::fs::write(place.path.join(FILE), bad).unwrap();
            let id = system_id(&place.path, None, 42).unwrap();
            assert_ne!(id.as_str(), bad);
            assert_eq!(std::fs::read_to_string(place.path.join(FILE)).unwrap(), id.as_str());
        }
        std::fs::write(place.path.join(FILE), " r_abcDEF012345 \n").unwrap();
        assert_eq!(system_id(&place.path, None, 42).unwrap().as_str(), "r_abcDEF012345");
    }

    #[test]
    fn an_unreadable_file_is_an_error_and_an_unwritable_place_is_not() {
        let place = place();
        std::fs::create_dir(place.path.join(FILE)).unwrap();
        assert!(matches!(
            system_id(&place.path, None, 1),
            Err(IdentityError::Unreadable { path, .. }) if path.ends_with(FILE)
        ));
        std::fs::write(place.path.join("file"), "").unwrap();
        let id = system_id(&place.path.join("file/below"), Some("m"), 1).unwrap();
        assert!(id.as_str().starts_with("s_"));
    }

    #[test]
    fn chance_decides_every_digit() {
        assert_eq!(SystemId::of_chance(0).as_str(), "r_000000000000");
        assert_eq!(SystemId::of_chance(61).as_str(), "r_Z00000000000");
        assert_ne!(SystemId::of_chance(u128::MAX), SystemId::of_chance(u128::MAX - 1));
    }

    #[test]
    fn tokens_are_shortened_after_their_prefix() {
        for (token, short) in [
            ("glrt-abcdefghijklmnop", "abcdefghi"),
            ("glrt-t1_abcdefghijklmnop", "abcdefghi"),
            ("glrt-t4_abcdefghijklmnop", "t4_abcdef"),
            ("ours-glrt-t2_abcdefghijklmnop", "abcdefghi"),
            ("t3_abcdefghijklmnop", "abcdefghi"),
            ("glrtr-abcdefghijklmnop", "abcdefghi"),
            ("glcbt-64_abcdefghijkl", "64_abcdef"),
            ("GR1348941abcdefghijklmnop", "abcdefghi"),
            ("GRxyz8941abcdefghijklmnop", "GRxyz8941"),
            ("abcdefghijklmnopqrst", "abcdefghi"),
            ("short", "short"),
            ("", ""),
        ] {
            assert_eq!(short_token(token), short, "{token}");
        }
    }
}
