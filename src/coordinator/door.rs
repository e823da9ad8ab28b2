//! The listening socket and its connections, both of which can be broken on purpose.
//!
//! An outage refuses connections on the same port and breaks the open ones; a single connection
//! can be cut by the request that came over it, so that its answer never leaves.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Enough for ten thousand clients that connect at once after an outage.
const BACKLOG: u32 = 4096;

/// How long the end of the connections is waited for; they are broken, so this is never needed
/// unless a task hangs.
const CLOSING: Duration = Duration::from_secs(5);

/// One connection, as the requests on it see it.
#[derive(Debug)]
pub(super) struct Line {
    cut: AtomicBool,
}

impl Line {
    /// Breaks the connection: nothing more is written to it.
    pub(super) fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
    }

    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }
}

/// The connection a request came over.
#[derive(Clone, Debug)]
pub(super) struct Caller(pub(super) Arc<Line>);

impl Connected<IncomingStream<'_, Door>> for Caller {
    fn connect_info(stream: IncomingStream<'_, Door>) -> Self {
        Self(Arc::clone(stream.remote_addr()))
    }
}

/// A period of being reachable.
#[derive(Debug)]
pub(super) struct Period {
    gone: CancellationToken,
    tracker: TaskTracker,
}

impl Period {
    /// Listens and serves until [`Period::end`] or until `shutdown`.
    pub(super) fn begin(
        address: SocketAddr,
        app: Router,
        shutdown: &CancellationToken,
    ) -> io::Result<Self> {
        let listener = reserve(address)?.listen(BACKLOG)?;
        let gone = shutdown.child_token();
        let tracker = TaskTracker::new();
        let door = Door { listener, gone: gone.clone(), tracker: tracker.clone() };
        let until = gone.clone();
        tracker.spawn(async move {
            let app = app.into_make_service_with_connect_info::<Caller>();
            // Serving has no end and no error of its own; only the cancellation ends it.
            until.run_until_cancelled(async { axum::serve(door, app).await }).await;
        });
        Ok(Self { gone, tracker })
    }

    /// Stops listening, breaks every connection and waits until all are gone.
    pub(super) async fn end(self) {
        self.gone.cancel();
        self.tracker.close();
        if tokio::time::timeout(CLOSING, self.tracker.wait()).await.is_err() {
            tracing::warn!("connections of the coordinator did not end");
        }
    }
}

/// Binds without listening: connections are refused. Several sockets of ours may be bound to the
/// same port, so that one can keep it while another listens now and then.
pub(super) fn reserve(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// The listener that hands out breakable connections.
#[derive(Debug)]
pub(super) struct Door {
    listener: TcpListener,
    gone: CancellationToken,
    tracker: TaskTracker,
}

impl Listener for Door {
    type Io = Wire;
    type Addr = Arc<Line>;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, most likely: give others the time to close some.
                    tracing::warn!(%error, "coordinator cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "connection was gone before it was served");
                continue;
            }
            let line = Arc::new(Line { cut: AtomicBool::new(false) });
            let wire = Wire {
                stream,
                line: Arc::clone(&line),
                gone: Box::pin(self.gone.clone().cancelled_owned()),
                broken: false,
                _open: self.tracker.token(),
            };
            return (wire, line);
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(Arc::new(Line { cut: AtomicBool::new(false) }))
    }
}

/// A TCP stream that can be broken from within.
#[derive(Debug)]
pub(super) struct Wire {
    stream: TcpStream,
    line: Arc<Line>,
    gone: Pin<Box<WaitForCancellationFutureOwned>>,
    broken: bool,
    _open: TaskTrackerToken,
}

impl Wire {
    /// Fails if the connection was cut or the outage has begun; the peer then sees a reset.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if !self.broken {
            self.broken = self.line.is_cut() || self.gone.as_mut().poll(cx).is_ready();
            if self.broken {
                self.stream.set_zero_linger()?;
            }
        }
        if self.broken { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
