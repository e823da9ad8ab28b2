//! How connections are opened: certificates, proxies, pools.

use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use reqwest::{Certificate, Identity};
use url::{Host, Url};

use super::ClientOptions;
use super::error::{Cause, Error};

/// Shorter than the 60 to 75 s after which common proxies close an idle connection: whoever closes
/// first decides whether a call is lost.
const IDLE_CONNECTION: Duration = Duration::from_secs(50);

/// Builds the connections' owner; gives the extra CA certificates beside it.
///
/// Without certificate files the roots are the system's (`SSL_CERT_FILE` and `SSL_CERT_DIR` move
/// them). A CA file adds to them. It must hold a CA: a server certificate that signed itself and
/// says `CA:TRUE` is refused by the verifier even if it stands there.
pub(super) fn build(
    base: &Url,
    options: &ClientOptions,
) -> Result<(reqwest::Client, Option<Arc<str>>), Error> {
    let mut builder = reqwest::Client::builder()
        .user_agent(&options.user_agent)
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .connect_timeout(options.timeouts.connect)
        .pool_idle_timeout(IDLE_CONNECTION)
        .pool_max_idle_per_host(100)
        .tcp_keepalive(Duration::from_secs(30))
        .tcp_nodelay(true);
    if is_loopback(base) {
        builder = builder.no_proxy();
    }
    let files = Files::find(base, options)?;
    let mut ca_pem = None;
    if let Some(path) = &files.ca {
        let pem = read(path)?;
        let unfit = |source| Error::new(Cause::UnfitFile { path: path.clone(), source });
        let certificates = Certificate::from_pem_bundle(pem.as_bytes()).map_err(unfit)?;
        if certificates.is_empty() {
            return Err(Error::new(Cause::NoCertificate { path: path.clone() }));
        }
        builder = builder.tls_certs_merge(certificates);
        ca_pem = Some(Arc::from(pem));
    } else if base.scheme() == "http" {
        // Nothing to verify: a machine without any CA certificates must do, and 150 of them need
        // not be read.
        builder = builder.tls_certs_only([]);
    }
    if let Some((certificate, key)) = &files.identity {
        let pem = format!("{}\n{}", read(certificate)?, read(key)?);
        let identity = Identity::from_pem(pem.as_bytes())
            .map_err(|source| Cause::UnfitFile { path: certificate.clone(), source })
            .map_err(Error::new)?;
        builder = builder.identity(identity);
    }
    let http = builder.build().map_err(|source| {
        Error::new(match files.ca {
            Some(path) => Cause::UnfitFile { path, source },
            None => Cause::Setup(source),
        })
    })?;
    Ok((http, ca_pem))
}

/// The certificate files that count.
struct Files {
    ca: Option<Utf8PathBuf>,
    identity: Option<(Utf8PathBuf, Utf8PathBuf)>,
}

impl Files {
    /// Takes the configured files; for those that are not, `<host>.crt`, `<host>.auth.crt` and
    /// `<host>.auth.key` in the certificates' directory if they exist.
    fn find(base: &Url, options: &ClientOptions) -> Result<Self, Error> {
        let host = base.host_str().unwrap_or_default();
        let beside = |suffix: &str| {
            let path = options.certs_dir.as_ref()?.join(format!("{host}.{suffix}"));
            path.is_file().then_some(path)
        };
        let identity = match (&options.tls_cert_file, &options.tls_key_file) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            (None, None) => beside("auth.crt").zip(beside("auth.key")),
            (Some(_), None) | (None, Some(_)) => return Err(Error::new(Cause::HalfIdentity)),
        };
        Ok(Self { ca: options.tls_ca_file.clone().or_else(|| beside("crt")), identity })
    }
}

fn read(path: &Utf8Path) -> Result<String, Error> {
    std::fs::read_to_string(path)
        .map_err(|source| Error::new(Cause::File { path: path.to_owned(), source }))
}

/// Says whether the host is this machine, which no proxy can reach for us.
fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}
