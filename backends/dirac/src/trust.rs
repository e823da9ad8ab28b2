//! Whose certificates are believed, and what to do about one that is not.

use std::error::Error;
use std::io;

use bridge_backend::OpenError;
use camino::{Utf8Path, Utf8PathBuf};
use reqwest::Certificate;
use rustls::CertificateError;

/// Authorities that are believed besides the system's.
#[derive(Clone, Debug)]
pub(crate) struct Authorities {
    path: Utf8PathBuf,
    pem: String,
    certificates: Vec<Certificate>,
}

impl Authorities {
    /// Reads `tls_ca_file`.
    pub(crate) fn read(path: &Utf8Path) -> Result<Self, OpenError> {
        let wrong = |why: String| OpenError::Config(format!("`tls_ca_file`: {path} {why}"));
        if !path.is_absolute() {
            return Err(wrong("is not an absolute path".to_owned()));
        }
        let pem = std::fs::read_to_string(path)
            .map_err(|error| wrong(format!("cannot be read: {error}")))?;
        let certificates = Certificate::from_pem_bundle(pem.as_bytes())
            .map_err(|error| wrong(format!("is damaged: {error}")))?;
        if certificates.is_empty() {
            return Err(wrong("holds no certificate".to_owned()));
        }
        Ok(Self { path: path.to_owned(), pem, certificates })
    }

    pub(crate) fn certificates(&self) -> Vec<Certificate> {
        self.certificates.clone()
    }

    /// Gives the file's text, for the workers.
    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    pub(crate) fn path(&self) -> &Utf8Path {
        &self.path
    }
}

/// Says why no connection was made, if the reason is the other side's certificate; `ours` are the
/// authorities that were named.
pub(crate) fn distrust(error: &reqwest::Error, ours: Option<&Authorities>) -> Option<String> {
    let mut cause: Option<&(dyn Error + 'static)> = error.source();
    while let Some(error) = cause {
        if let Some(rustls::Error::InvalidCertificate(why)) = error.downcast_ref::<rustls::Error>()
        {
            return Some(words(why, ours));
        }
        // What an `io::Error` was made of is not its source, and one may be in another.
        cause = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

fn words(why: &CertificateError, ours: Option<&Authorities>) -> String {
    use CertificateError as C;
    if matches!(why, C::Expired | C::ExpiredContext { .. }) {
        return "its certificate has expired: who runs it must renew it, unless the clock of this machine \
                is wrong"
            .to_owned();
    }
    if matches!(why, C::NotValidYet | C::NotValidYetContext { .. }) {
        return "its certificate is not valid yet: look at the clock of this machine".to_owned();
    }
    if matches!(why, C::NotValidForName | C::NotValidForNameContext { .. }) {
        return "its certificate is for another name: call it by the name that stands there (`url`)"
            .to_owned();
    }
    if matches!(why, C::UnknownIssuer) {
        return match ours {
            None => {
                "nobody here knows who signed its certificate: name a file with the certificate of \
                     that authority as `tls_ca_file`"
                    .to_owned()
            }
            Some(ours) => format!(
                "neither this machine nor the `tls_ca_file` {} knows who signed its certificate",
                ours.path()
            ),
        };
    }
    format!("its certificate cannot be accepted: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_authorities_is_read_whole_or_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(dir.path().join("ca.pem")).unwrap();
        let said = |path: &Utf8Path| match Authorities::read(path).unwrap_err() {
            OpenError::Config(text) => text,
            OpenError::Toml(error) => error.to_string(),
        };
        assert!(said(Utf8Path::new("ca.pem")).contains("not an absolute path"));
        assert!(said(&path).contains("cannot be read"), "{}", said(&path));
        std::fs::write(&path, "nothing of the kind").unwrap();
        assert!(said(&path).contains("holds no certificate"), "{}", said(&path));
    }

    #[test]
    fn every_reason_comes_with_what_to_do() {
        for (why, word) in [
            (CertificateError::Expired, "renew"),
            (CertificateError::NotValidYet, "clock"),
            (CertificateError::NotValidForName, "`url`"),
            (CertificateError::UnknownIssuer, "`tls_ca_file`"),
            (CertificateError::BadEncoding, "cannot be accepted"),
        ] {
            let text = words(&why, None);
            assert!(text.contains(word), "{why:?}: {text}");
        }
    }
}
