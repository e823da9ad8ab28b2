//! Whom the client trusts, and by what it is trusted.

use super::*;

fn testdata(name: &str) -> Utf8PathBuf {
    Utf8PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src/gitlab/testdata")).join(name)
}

/// A server with a certificate of the test CA that answers 204 to so many connections, if the
/// client shows the certificate that is asked for.
struct TlsServer {
    port: u16,
    thread: JoinHandle<()>,
}

impl TlsServer {
    fn start(connections: usize, asks_for_certificate: bool) -> Self {
        let _was_installed_before = rustls::crypto::ring::default_provider().install_default();
        let builder = rustls::ServerConfig::builder();
        let builder = if asks_for_certificate {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(testdata("ca.pem")).unwrap()).unwrap();
            let verifier = rustls::server::WebPkiClientVerifier::builder(Arc::new(roots));
            builder.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let chain = vec![CertificateDer::from_pem_file(testdata("server.pem")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(testdata("server.key")).unwrap();
        let config = Arc::new(builder.with_single_cert(chain, key).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let thread = std::thread::spawn(move || {
            for _ in 0..connections {
                let (stream, _) = listener.accept().unwrap();
                serve_tls(&config, stream);
            }
        });
        Self { port, thread }
    }

    fn options(&self) -> ClientOptions {
        options(&format!("https://localhost:{}", self.port))
    }

    fn end(self) {
        self.thread.join().unwrap();
    }
}

fn serve_tls(config: &Arc<rustls::ServerConfig>, mut stream: TcpStream) {
    let mut tls = rustls::ServerConnection::new(Arc::clone(config)).unwrap();
    while tls.is_handshaking() {
        if tls.complete_io(&mut stream).is_err() {
            // The client does not trust us, or we do not trust it; its side of the test says which.
            return;
        }
    }
    let mut stream = rustls::StreamOwned::new(tls, stream);
    read_request(&mut stream);
    stream.write_all(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n").unwrap();
    stream.conn.send_close_notify();
    stream.flush().unwrap();
}

fn is_no_job(reply: &Result<RequestReply, Error>) -> bool {
    matches!(reply, Ok(RequestReply::NoJob { .. }))
}

#[tokio::test]
async fn a_server_is_trusted_only_with_its_ca_file() {
    let server = TlsServer::start(2, false);
    let with = ClientOptions { tls_ca_file: Some(testdata("ca.pem")), ..server.options() };
    let with = Client::new(with).unwrap();
    let reply = ask(&with).await;
    assert!(is_no_job(&reply), "{reply:?}");
    assert!(with.ca_pem().unwrap().starts_with("-----BEGIN CERTIFICATE-----"));
    let without = ClientOptions { tls_ca_file: Some(testdata("other-ca.pem")), ..server.options() };
    let error = ask(&Client::new(without).unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    assert!(shown(&error).contains("UnknownIssuer"), "{}", shown(&error));
    server.end();
}

#[tokio::test]
async fn a_client_certificate_is_shown_and_files_are_found_by_the_hosts_name() {
    let dir = tempfile::tempdir().unwrap();
    let certs = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
    for (from, to) in [
        ("ca.pem", "localhost.crt"),
        ("client.pem", "localhost.auth.crt"),
        ("client.key", "localhost.auth.key"),
    ] {
        std::fs::copy(testdata(from), certs.join(to)).unwrap();
    }
    let server = TlsServer::start(3, true);
    let found = ClientOptions { certs_dir: Some(certs), ..server.options() };
    let reply = ask(&Client::new(found).unwrap()).await;
    assert!(is_no_job(&reply), "{reply:?}");
    let named = ClientOptions {
        tls_ca_file: Some(testdata("ca.pem")),
        tls_cert_file: Some(testdata("client.pem")),
        tls_key_file: Some(testdata("client.key")),
        ..server.options()
    };
    let reply = ask(&Client::new(named.clone()).unwrap()).await;
    assert!(is_no_job(&reply), "{reply:?}");
    let without = ClientOptions { tls_cert_file: None, tls_key_file: None, ..named };
    let error = ask(&Client::new(without).unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    server.end();
}

#[tokio::test]
async fn changed_certificate_files_count_once_connections_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Utf8PathBuf::from_path_buf(dir.path().join("ca.pem")).unwrap();
    let server = TlsServer::start(3, false);
    std::fs::copy(testdata("other-ca.pem"), &ca).unwrap();
    let mut options = ClientOptions { tls_ca_file: Some(ca.clone()), ..server.options() };
    options.timeouts.connection_age = Duration::ZERO;
    let client = Client::new(options).unwrap();
    assert!(ask(&client).await.is_err());
    std::fs::copy(testdata("ca.pem"), &ca).unwrap();
    let reply = ask(&client).await;
    assert!(is_no_job(&reply), "{reply:?}");
    // A file that is being replaced must not end the talk about running jobs.
    std::fs::write(&ca, "-----BEGIN").unwrap();
    let reply = ask(&client).await;
    assert!(is_no_job(&reply), "{reply:?}");
    server.end();
}

#[test]
fn files_that_cannot_work_are_named_at_once() {
    let server = options("https://localhost");
    let named = |ca: &str, cert: Option<&str>, key: Option<&str>| {
        let error = Client::new(ClientOptions {
            tls_ca_file: Some(testdata(ca)),
            tls_cert_file: cert.map(testdata),
            tls_key_file: key.map(testdata),
            ..server.clone()
        })
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
        shown(&error)
    };
    assert!(named("missing.pem", None, None).contains("missing.pem cannot be read"));
    assert!(named("README.md", None, None).contains("README.md holds no certificate"));
    assert!(named("ca.pem", Some("client.pem"), None).contains("both"));
    assert!(named("ca.pem", Some("ca.pem"), Some("README.md")).contains("ca.pem cannot be used"));
}

#[test]
fn a_password_in_the_url_is_refused_and_not_shown() {
    let options = options("https://user:secret@localhost/");
    assert!(!format!("{options:?}").contains("secret"));
    let error = Client::new(options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    shown(&error);
}
