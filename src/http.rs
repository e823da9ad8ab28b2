//! `/metrics` and `/health` on a loopback address or a Unix socket.
//!
//! It knows nothing of jobs: what to show comes through [`HealthSource`]. Nobody is asked who he is,
//! which is why it listens on this machine alone.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use camino::{Utf8Path, Utf8PathBuf};
use futures_util::future::BoxFuture;
use serde::Serialize;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use crate::config::ListenAddress;
use crate::telemetry::{Metrics, Snapshot};

/// How long open connections may take to end; a scraper that hangs must not hold up a shutdown.
const DRAIN: Duration = Duration::from_secs(2);

/// Why the daemon cannot do its work, and who can help.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What is wrong, for people.
    pub what: String,
    /// Who can help.
    pub whose_move: WhoseMove,
}

/// Who can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WhoseMove {
    /// We try again by ourselves.
    Bridge,
    /// Who runs this bridge.
    Operator,
    /// Who wrote the job.
    Author,
    /// Who runs GitLab.
    Gitlab,
    /// Who runs the batch system.
    Site,
    /// There is nothing to do.
    Nobody,
}

impl WhoseMove {
    /// Gives the word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Operator => "operator",
            Self::Author => "author",
            Self::Gitlab => "gitlab",
            Self::Site => "site",
            Self::Nobody => "nobody",
        }
    }
}

/// Knows what is to be shown.
pub trait HealthSource: Send + Sync + 'static {
    /// Says why jobs cannot be taken now; nothing when they can.
    fn health(&self) -> BoxFuture<'_, Vec<Problem>>;

    /// Says what will keep jobs from being taken unless somebody acts in time.
    fn warnings(&self) -> BoxFuture<'_, Vec<Problem>> {
        Box::pin(async { Vec::new() })
    }

    /// Counts what the store knows now.
    fn snapshot(&self) -> BoxFuture<'_, Snapshot>;
}

/// What the pages are made from.
#[derive(Clone)]
pub struct Pages {
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// What changes from one scrape to the next.
    pub source: Arc<dyn HealthSource>,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pages").finish_non_exhaustive()
    }
}

/// Why the pages cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The address cannot be had.
    #[error("listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is something else under the socket's name.
    #[error("listen on {path}: it exists and is no socket")]
    NoSocket {
        /// The path.
        path: Utf8PathBuf,
    },
    /// Somebody answers on the socket.
    #[error("listen on {path}: another process listens there")]
    InUse {
        /// The path.
        path: Utf8PathBuf,
    },
    /// Serving ended early.
    #[error("serve {address}")]
    Serve {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A socket that listens; the pages are not served yet.
#[derive(Debug)]
pub struct Bound {
    socket: Socket,
    address: ListenAddress,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Opens the socket, so that a taken address is an error at start and not later.
///
/// # Errors
///
/// When the address is taken or not ours.
pub async fn bind(address: &ListenAddress) -> Result<Bound, HttpError> {
    let failed = |source| HttpError::Listen { address: address.to_string(), source };
    match address {
        ListenAddress::Tcp(wanted) => {
            let listener = TcpListener::bind(wanted).await.map_err(failed)?;
            let actual: SocketAddr = listener.local_addr().map_err(failed)?;
            Ok(Bound { socket: Socket::Tcp(listener), address: ListenAddress::Tcp(actual) })
        }
        ListenAddress::Unix(path) => {
            clear_stale(path).await?;
            let listener = bind_private(path).map_err(failed)?;
            Ok(Bound { socket: Socket::Unix(listener), address: address.clone() })
        }
    }
}

/// Binds and serves until `stop` is cancelled.
///
/// # Errors
///
/// As [`bind`] and [`Bound::serve`].
pub async fn serve(
    address: &ListenAddress,
    pages: Pages,
    stop: CancellationToken,
) -> Result<(), HttpError> {
    bind(address).await?.serve(pages, stop).await
}

impl Bound {
    /// Says where it listens; a port 0 has become a real one.
    pub fn address(&self) -> &ListenAddress {
        &self.address
    }

    /// Serves until `stop` is cancelled, then lets open requests end, but not for long.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub async fn serve(self, pages: Pages, stop: CancellationToken) -> Result<(), HttpError> {
        let app = router(pages);
        let address = self.address;
        let stopped = stop.clone().cancelled_owned();
        let late = async {
            stop.cancelled().await;
            tokio::time::sleep(DRAIN).await;
        };
        let serving = async {
            match self.socket {
                Socket::Tcp(socket) => {
                    axum::serve(socket, app).with_graceful_shutdown(stopped).await
                }
                Socket::Unix(socket) => {
                    axum::serve(socket, app).with_graceful_shutdown(stopped).await
                }
            }
        };
        // Both sides may be dropped: a page half sent is the scraper's loss.
        let result = tokio::select! {
            result = serving => result,
            () = late => Ok(()),
        };
        if let ListenAddress::Unix(path) = &address
            && let Err(error) = std::fs::remove_file(path)
        {
            // The next start clears it away as stale.
            tracing::debug!(%path, %error, "socket not removed");
        }
        result.map_err(|source| HttpError::Serve { address: address.to_string(), source })
    }
}

fn router(pages: Pages) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .route("/healthz", get(health))
        .route("/-/healthy", get(health))
        .route("/-/ready", get(health))
        .with_state(pages)
}

async fn metrics(State(pages): State<Pages>) -> Response {
    let snapshot = pages.source.snapshot().await;
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (content_type, pages.metrics.render(&snapshot)).into_response()
}

async fn health(State(pages): State<Pages>) -> Response {
    let problems = pages.source.health().await;
    let warnings = pages.source.warnings().await;
    if problems.is_empty() {
        if warnings.is_empty() {
            return (StatusCode::OK, "ok\n").into_response();
        }
        // Whoever only looks at the status has time.
        let body = serde_json::json!({ "status": "ok", "warnings": warnings });
        return (StatusCode::OK, axum::Json(body)).into_response();
    }
    let mut body = serde_json::json!({ "status": "unhealthy", "problems": problems });
    if !warnings.is_empty() {
        body["warnings"] = serde_json::json!(warnings);
    }
    (StatusCode::SERVICE_UNAVAILABLE, axum::Json(body)).into_response()
}

/// Removes a socket that a process left behind when it was killed, and nothing else.
async fn clear_stale(path: &Utf8Path) -> Result<(), HttpError> {
    let failed = |source| HttpError::Listen { address: path.to_string(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            Err(HttpError::NoSocket { path: path.to_owned() })
        }
        Ok(_socket) => match UnixStream::connect(path).await {
            Ok(_answered) => Err(HttpError::InUse { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)
            }
            Err(error) => Err(failed(error)),
        },
    }
}

/// Binds under another name first, so that the socket never has its name without its mode.
fn bind_private(path: &Utf8Path) -> io::Result<UnixListener> {
    let name = path.file_name().unwrap_or("socket");
    let aside = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let listener = UnixListener::bind(&aside)?;
    let placed = std::fs::set_permissions(&aside, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| std::fs::rename(&aside, path));
    match placed {
        Ok(()) => Ok(listener),
        Err(error) => {
            if let Err(left) = std::fs::remove_file(&aside) {
                tracing::debug!(path = %aside, error = %left, "socket not removed");
            }
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;
    use crate::telemetry::{BuildInfo, JobCount};

    struct Switch(AtomicBool);

    impl HealthSource for Switch {
        fn health(&self) -> BoxFuture<'_, Vec<Problem>> {
            let bad = self.0.load(Ordering::SeqCst);
            let problem =
                Problem { what: "the disk is full".into(), whose_move: WhoseMove::Operator };
            Box::pin(async move { if bad { vec![problem] } else { Vec::new() } })
        }

        fn snapshot(&self) -> BoxFuture<'_, Snapshot> {
            Box::pin(async {
                Snapshot {
                    jobs: vec![JobCount {
                        runner: crate::telemetry::RunnerLabels::default(),
                        backend: "c".into(),
                        state: "running",
                        count: 5,
                    }],
                    unsent_bytes: 0,
                }
            })
        }
    }

    fn pages(bad: bool) -> Pages {
        Pages {
            metrics: Arc::new(Metrics::new(&BuildInfo::default())),
            source: Arc::new(Switch(AtomicBool::new(bad))),
        }
    }

    async fn get(mut stream: impl AsyncRead + AsyncWrite + Unpin, path: &str) -> String {
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn tcp(bound: &Bound) -> SocketAddr {
        match bound.address() {
            ListenAddress::Tcp(address) => *address,
            ListenAddress::Unix(path) => panic!("{path}"),
        }
    }

    #[tokio::test]
    async fn healthy_is_ok_and_metrics_show_what_the_store_knows() {
        let bound = bind(&ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())).await.unwrap();
        let (address, stop) = (tcp(&bound), CancellationToken::new());
        let ask = async {
            let health = get(TcpStream::connect(address).await.unwrap(), "/health").await;
            assert!(health.starts_with("HTTP/1.1 200") && health.ends_with("ok\n"), "{health}");
            let metrics = get(TcpStream::connect(address).await.unwrap(), "/metrics").await;
            assert!(metrics.contains("text/plain; version=0.0.4"), "{metrics}");
            assert!(
                metrics.contains("bridge_jobs{backend=\"c\",state=\"running\"} 5"),
                "{metrics}"
            );
            stop.cancel();
        };
        let (served, ()) = tokio::join!(bound.serve(pages(false), stop.clone()), ask);
        served.unwrap();
    }

    #[tokio::test]
    async fn unhealthy_says_why_and_whose_move_it_is() {
        let bound = bind(&ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())).await.unwrap();
        let (address, stop) = (tcp(&bound), CancellationToken::new());
        let ask = async {
            for path in ["/health", "/healthz", "/-/ready"] {
                let health = get(TcpStream::connect(address).await.unwrap(), path).await;
                assert!(health.starts_with("HTTP/1.1 503"), "{health}");
                let body = health.split("\r\n\r\n").nth(1).unwrap();
                let body: serde_json::Value = serde_json::from_str(body).unwrap();
                assert_eq!(
                    body["problems"][0],
                    serde_json::json!({"what": "the disk is full", "whose_move": "operator"})
                );
            }
            stop.cancel();
        };
        let (served, ()) = tokio::join!(bound.serve(pages(true), stop.clone()), ask);
        served.unwrap();
    }

    struct Warns;

    impl HealthSource for Warns {
        fn health(&self) -> BoxFuture<'_, Vec<Problem>> {
            Box::pin(async { Vec::new() })
        }

        fn warnings(&self) -> BoxFuture<'_, Vec<Problem>> {
            let soon = Problem { what: "it ends".into(), whose_move: WhoseMove::Operator };
            Box::pin(async { vec![soon] })
        }

        fn snapshot(&self) -> BoxFuture<'_, Snapshot> {
            Box::pin(async { Snapshot::default() })
        }
    }

    #[tokio::test]
    async fn a_warning_is_shown_and_is_no_failure() {
        let bound = bind(&ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())).await.unwrap();
        let (address, stop) = (tcp(&bound), CancellationToken::new());
        let ask = async {
            let health = get(TcpStream::connect(address).await.unwrap(), "/health").await;
            assert!(health.starts_with("HTTP/1.1 200"), "{health}");
            let body = health.split("\r\n\r\n").nth(1).unwrap();
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            let warning = serde_json::json!({"what": "it ends", "whose_move": "operator"});
            assert_eq!(body, serde_json::json!({"status": "ok", "warnings": [warning]}));
            stop.cancel();
        };
        let warns = Pages { source: Arc::new(Warns), ..pages(false) };
        let (served, ()) = tokio::join!(bound.serve(warns, stop.clone()), ask);
        served.unwrap();
    }

    fn socket_in(dir: &tempfile::TempDir) -> Utf8PathBuf {
        Utf8Path::from_path(dir.path()).unwrap().join("http.sock")
    }

    #[tokio::test]
    async fn a_unix_socket_is_private_and_goes_when_we_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket_in(&dir);
        let bound = bind(&ListenAddress::Unix(path.clone())).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
        let stop = CancellationToken::new();
        let ask = async {
            let health = get(UnixStream::connect(&path).await.unwrap(), "/health").await;
            assert!(health.ends_with("ok\n"), "{health}");
            stop.cancel();
        };
        let (served, ()) = tokio::join!(bound.serve(pages(false), stop.clone()), ask);
        served.unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket_in(&dir);
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a socket outlives its listener");
        let live = bind(&ListenAddress::Unix(path.clone())).await.unwrap();
        let error = bind(&ListenAddress::Unix(path.clone())).await.unwrap_err();
        assert!(matches!(error, HttpError::InUse { .. }), "{error:?}");
        drop(live);
    }

    #[tokio::test]
    async fn a_file_under_the_sockets_name_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket_in(&dir);
        std::fs::write(&path, "precious").unwrap();
        let error = bind(&ListenAddress::Unix(path.clone())).await.unwrap_err();
        assert!(matches!(error, HttpError::NoSocket { .. }), "{error:?}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_does_not_hold_up_the_end() {
        let bound = bind(&ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())).await.unwrap();
        let (address, stop) = (tcp(&bound), CancellationToken::new());
        let ask = async {
            let silent = TcpStream::connect(address).await.unwrap();
            let health = get(TcpStream::connect(address).await.unwrap(), "/health").await;
            assert!(health.ends_with("ok\n"), "{health}");
            stop.cancel();
            silent
        };
        let both = async { tokio::join!(bound.serve(pages(false), stop.clone()), ask) };
        let (served, _silent) = tokio::time::timeout(DRAIN * 5, both).await.unwrap();
        served.unwrap();
    }
}
