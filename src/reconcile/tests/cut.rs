//! Where a process ends: everything durable or outside passes here, is counted, and may be its last.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bridge_backend::{
    Backend, Capabilities, ExternalId, JobRef, JobSpec, LogChunk, Observation, Result, SubmitToken,
};
use camino::Utf8Path;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::store::{Around, Moment};

/// On which side of an effect the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// It was about to happen.
    Before,
    /// It has happened, and nobody has heard of it.
    After,
}

/// Counts effects, and ends the process at one of them: from then on nothing that is durable or
/// outside comes to pass any more.
#[derive(Clone, Debug, Default)]
pub(super) struct Cut(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    armed: bool,
    at: Option<(usize, Side)>,
    effects: Vec<String>,
    writes_under_way: usize,
    dead: CancellationToken,
}

impl Cut {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts from here on; the process ends at one of the effects, if so.
    pub(super) fn arm(&self, at: Option<(usize, Side)>) {
        let mut state = self.state();
        state.armed = true;
        state.at = at;
        state.effects.clear();
    }

    /// Begins the next life.
    pub(super) fn revive(&self) {
        *self.state() = State::default();
    }

    /// Gives the effects so far, in their order.
    pub(super) fn effects(&self) -> Vec<String> {
        self.state().effects.clone()
    }

    fn dead_token(&self) -> CancellationToken {
        self.state().dead.clone()
    }

    /// Waits for the end.
    pub(super) async fn dead(&self) {
        self.dead_token().cancelled_owned().await;
    }

    /// Says whether no write is with the database: the next life must not meet one of this one.
    pub(super) fn is_idle(&self) -> bool {
        self.state().writes_under_way == 0
    }

    /// Passes a call that changes nothing.
    async fn look(&self) {
        if self.dead_token().is_cancelled() {
            std::future::pending::<()>().await;
        }
    }

    /// Counts an effect that is about to happen; never returns in a process that has ended.
    async fn before(&self, what: &str) -> usize {
        let passes = {
            let mut state = self.state();
            if state.dead.is_cancelled() {
                None
            } else if state.armed {
                state.effects.push(what.to_owned());
                let number = state.effects.len();
                if state.at == Some((number, Side::Before)) {
                    state.dead.cancel();
                    None
                } else {
                    Some(number)
                }
            } else {
                Some(0)
            }
        };
        match passes {
            Some(number) => number,
            None => std::future::pending().await,
        }
    }

    /// Passes the answer on, unless the process has ended.
    async fn after(&self, number: usize) {
        let dead = {
            let state = self.state();
            if state.at == Some((number, Side::After)) {
                state.dead.cancel();
            }
            state.dead.clone()
        };
        if dead.is_cancelled() {
            std::future::pending::<()>().await;
        }
    }

    /// Gives what stands around the store's writes.
    pub(super) fn around(&self) -> Around {
        let cut = self.clone();
        let numbers: Arc<Mutex<BTreeMap<&'static str, Vec<usize>>>> = Arc::default();
        Around(Arc::new(move |moment, name| {
            let (cut, numbers) = (cut.clone(), Arc::clone(&numbers));
            Box::pin(async move {
                match moment {
                    Moment::Before => {
                        let number = cut.before(name).await;
                        cut.state().writes_under_way += 1;
                        numbers.lock().unwrap().entry(name).or_default().push(number);
                    }
                    Moment::After => {
                        cut.state().writes_under_way -= 1;
                        let number = numbers.lock().unwrap().get_mut(name).map(|of| of.remove(0));
                        cut.after(number.unwrap()).await;
                    }
                }
            })
        }))
    }
}

/// A backend whose effects are counted.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) inner: Arc<dyn Backend>,
    pub(super) cut: Cut,
}

#[async_trait]
impl Backend for Counted {
    fn capabilities(&self) -> &Capabilities {
        self.inner.capabilities()
    }

    async fn check(&self) -> Result<()> {
        self.cut.look().await;
        self.inner.check().await
    }

    async fn submit(&self, token: &SubmitToken, spec: &JobSpec) -> Result<ExternalId> {
        let number = self.cut.before("submit").await;
        let answer = self.inner.submit(token, spec).await;
        self.cut.after(number).await;
        answer
    }

    async fn find(&self, tokens: &[SubmitToken]) -> Result<BTreeMap<SubmitToken, ExternalId>> {
        self.cut.look().await;
        self.inner.find(tokens).await
    }

    async fn poll(&self, jobs: &[JobRef]) -> Result<BTreeMap<ExternalId, Observation>> {
        self.cut.look().await;
        self.inner.poll(jobs).await
    }

    async fn read_log(&self, job: &JobRef, from: u64, limit: usize) -> Result<LogChunk> {
        self.cut.look().await;
        self.inner.read_log(job, from, limit).await
    }

    async fn collect(&self, job: &JobRef, into: &Utf8Path) -> Result<()> {
        let number = self.cut.before("collect").await;
        let answer = self.inner.collect(job, into).await;
        self.cut.after(number).await;
        answer
    }

    async fn cancel(&self, jobs: &[JobRef]) -> Result<()> {
        let number = self.cut.before("cancel").await;
        let answer = self.inner.cancel(jobs).await;
        self.cut.after(number).await;
        answer
    }

    async fn release(&self, job: &JobRef) -> Result<()> {
        let number = self.cut.before("release").await;
        let answer = self.inner.release(job).await;
        self.cut.after(number).await;
        answer
    }
}

/// A door before GitLab, through which every call passes and is counted.
#[derive(Debug)]
pub(super) struct Door {
    address: SocketAddr,
    tasks: TaskTracker,
    closed: CancellationToken,
}

impl Door {
    /// Opens a door to `gitlab`, `http://<address>`.
    pub(super) async fn open(gitlab: &str, cut: Cut) -> Self {
        let target = gitlab.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tasks, closed) = (TaskTracker::new(), CancellationToken::new());
        let (spawner, until) = (tasks.clone(), closed.clone());
        tasks.spawn(async move {
            until
                .run_until_cancelled(async {
                    loop {
                        let (client, _) = listener.accept().await.unwrap();
                        let (cut, target) = (cut.clone(), target.clone());
                        spawner.spawn(async move {
                            let dead = cut.dead_token();
                            // A connection ends with its process.
                            dead.run_until_cancelled(serve(client, &target, &cut)).await;
                        });
                    }
                })
                .await;
        });
        Self { address, tasks, closed }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.closed.cancel();
        self.tasks.close();
    }
}

/// Carries calls of one connection, one after the other, until either side hangs up.
async fn serve(mut client: TcpStream, target: &str, cut: &Cut) {
    let Ok(mut gitlab) = TcpStream::connect(target).await else { return };
    while let Some(request) = message(&mut client).await {
        let end = request.windows(9).position(|w| w == b" HTTP/1.1").unwrap_or(0);
        let what = String::from_utf8_lossy(request.get(..end).unwrap_or_default()).into_owned();
        let number = cut.before(&what).await;
        if gitlab.write_all(&request).await.is_err() {
            return;
        }
        let Some(response) = message(&mut gitlab).await else { return };
        cut.after(number).await;
        if client.write_all(&response).await.is_err() {
            return;
        }
    }
}

/// Reads one HTTP message whose length is told.
async fn message(from: &mut TcpStream) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if from.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
    if text.contains("transfer-encoding: chunked") {
        while !bytes.ends_with(b"\r\n0\r\n\r\n") {
            if from.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        }
        return Some(bytes);
    }
    assert!(!text.contains("transfer-encoding"), "a message of unknown length: {text}");
    let length = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .map_or(0, |length| length.trim().parse::<usize>().unwrap());
    while bytes.len() < head + length {
        if from.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
    Some(bytes)
}
