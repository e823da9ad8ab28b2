//! Faults on demand: which call meets them, how often, and what happens to it.

use std::time::Duration;

use axum::http::StatusCode;
use tokio_util::sync::CancellationToken;

/// A kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// `POST /runners`.
    Register,
    /// `POST /runners/verify`.
    Verify,
    /// `DELETE /runners`.
    Unregister,
    /// `DELETE /runners/managers`.
    UnregisterManager,
    /// `POST /runners/reset_authentication_token`.
    ResetToken,
    /// `POST /jobs/request`.
    Request,
    /// `PUT /jobs/:id` with any state that is not final.
    Update,
    /// `PUT /jobs/:id` with `success` or `failed`.
    FinalUpdate,
    /// `PATCH /jobs/:id/trace`.
    Patch,
    /// `GET /job`.
    JobInfo,
    /// `POST /jobs/:id/artifacts`.
    UploadArtifact,
    /// `GET /jobs/:id/artifacts`.
    DownloadArtifact,
    /// Any call to the second host, where files are kept.
    ObjectStorage,
    /// `POST /user/runners`.
    CreateRunner,
    /// Everything else of the Runners API, with a personal access token.
    RunnersApi,
    /// git over HTTP.
    Git,
    /// Anything else.
    Unknown,
}

impl Endpoint {
    /// Every kind, in the order of the counters.
    pub const ALL: [Self; 17] = [
        Self::Register,
        Self::Verify,
        Self::Unregister,
        Self::UnregisterManager,
        Self::ResetToken,
        Self::Request,
        Self::Update,
        Self::FinalUpdate,
        Self::Patch,
        Self::JobInfo,
        Self::UploadArtifact,
        Self::DownloadArtifact,
        Self::ObjectStorage,
        Self::CreateRunner,
        Self::RunnersApi,
        Self::Git,
        Self::Unknown,
    ];

    pub(super) fn index(self) -> usize {
        Self::ALL.iter().position(|other| *other == self).unwrap_or_default()
    }
}

/// How many calls of each kind came in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests(pub(super) [u64; Endpoint::ALL.len()]);

impl Requests {
    /// Gives the number of one kind.
    pub fn of(&self, endpoint: Endpoint) -> u64 {
        self.0.get(endpoint.index()).copied().unwrap_or_default()
    }

    /// Gives the number of all calls.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    pub(super) fn count(&mut self, endpoint: Endpoint) {
        if let Some(count) = self.0.get_mut(endpoint.index()) {
            *count += 1;
        }
    }
}

/// Holds calls back until it is opened.
#[derive(Clone, Debug, Default)]
pub struct Gate(CancellationToken);

impl Gate {
    /// Makes a closed gate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets everybody through, now and later.
    pub fn open(&self) {
        self.0.cancel();
    }

    pub(super) async fn pass(&self) {
        self.0.cancelled().await;
    }
}

/// An answer made up by the test.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: String,
    pub(super) content_type: String,
}

/// What happens to the call.
#[derive(Clone, Debug)]
pub(super) enum What {
    /// Nothing but delay or gate.
    Nothing,
    /// The answer, and no effect.
    Instead(Answer),
    /// The effect, and another answer.
    After(Answer),
    /// No effect, and no answer.
    ResetBefore,
    /// The effect, and no answer.
    LostAnswer,
    /// The effect; the answer's body breaks off in the middle.
    Truncated,
    /// The effect; the answer claims to be HTML.
    Html,
}

/// A fault: what happens, to which calls, how often.
#[derive(Clone, Debug)]
pub struct Fault {
    pub(super) what: What,
    pub(super) delay: Option<Duration>,
    pub(super) gate: Option<Gate>,
    pub(super) job: Option<i64>,
    pub(super) skip: u32,
    pub(super) left: Option<u32>,
}

impl Fault {
    fn new(what: What) -> Self {
        Self { what, delay: None, gate: None, job: None, skip: 0, left: Some(1) }
    }

    /// Answers with a status and does nothing.
    pub fn status(status: u16) -> Self {
        Self::new(What::Instead(Answer::of(status)))
    }

    /// Does what was asked and answers with another status.
    pub fn status_after_effect(status: u16) -> Self {
        Self::new(What::After(Answer::of(status)))
    }

    /// Breaks the connection before anything is done.
    pub fn reset_before() -> Self {
        Self::new(What::ResetBefore)
    }

    /// Does what was asked and breaks the connection before the status line.
    pub fn lost_answer() -> Self {
        Self::new(What::LostAnswer)
    }

    /// Does what was asked and breaks the connection in the middle of the body.
    pub fn truncated() -> Self {
        Self::new(What::Truncated)
    }

    /// Does what was asked and answers with the right body, called HTML.
    pub fn html() -> Self {
        Self::new(What::Html)
    }

    /// Waits before the call is looked at.
    pub fn delay(by: Duration) -> Self {
        Self::new(What::Nothing).with_delay(by)
    }

    /// Holds the call back until the gate opens.
    pub fn hold(gate: &Gate) -> Self {
        Self::new(What::Nothing).with_gate(gate)
    }

    /// Waits before the fault happens.
    #[must_use]
    pub fn with_delay(mut self, by: Duration) -> Self {
        self.delay = Some(by);
        self
    }

    /// Holds the call until the gate opens; then the fault happens.
    #[must_use]
    pub fn with_gate(mut self, gate: &Gate) -> Self {
        self.gate = Some(gate.clone());
        self
    }

    /// Adds a header to the made-up answer.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        if let Some(answer) = self.answer() {
            answer.headers.push((name.into(), value.into()));
        }
        self
    }

    /// Replaces the body of the made-up answer.
    #[must_use]
    pub fn body(mut self, content_type: impl Into<String>, body: impl Into<String>) -> Self {
        if let Some(answer) = self.answer() {
            answer.content_type = content_type.into();
            answer.body = body.into();
        }
        self
    }

    /// Happens so many times instead of once.
    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.left = Some(times);
        self
    }

    /// Happens until the faults are cleared.
    #[must_use]
    pub fn always(mut self) -> Self {
        self.left = None;
        self
    }

    /// Lets so many calls pass first.
    #[must_use]
    pub fn after(mut self, calls: u32) -> Self {
        self.skip = calls;
        self
    }

    /// Happens to calls for one job only.
    #[must_use]
    pub fn for_job(mut self, job: i64) -> Self {
        self.job = Some(job);
        self
    }

    fn answer(&mut self) -> Option<&mut Answer> {
        match &mut self.what {
            What::Instead(answer) | What::After(answer) => Some(answer),
            What::Nothing | What::ResetBefore | What::LostAnswer | What::Truncated | What::Html => {
                None
            }
        }
    }
}

impl Answer {
    fn of(status: u16) -> Self {
        let body = match status {
            204 => String::new(),
            429 => super::reply::TOO_MANY.to_owned(),
            _ => {
                let reason = StatusCode::from_u16(status).ok();
                let reason = reason.and_then(|status| status.canonical_reason());
                let reason = reason.unwrap_or("Made Up");
                format!("{{\"message\":\"{status} {reason}\"}}")
            }
        };
        Self { status, headers: Vec::new(), body, content_type: "application/json".to_owned() }
    }
}

/// The faults in force.
#[derive(Debug, Default)]
pub(super) struct Faults {
    list: Vec<(Option<Endpoint>, Fault)>,
    pub(super) hits: u64,
}

impl Faults {
    pub(super) fn add(&mut self, endpoint: Option<Endpoint>, fault: Fault) {
        self.list.push((endpoint, fault));
    }

    pub(super) fn clear(&mut self) {
        self.list.clear();
    }

    /// Gives the number of faults that may still happen.
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Takes the first fault that is meant for this call; the oldest wins.
    pub(super) fn take(&mut self, endpoint: Endpoint, job: Option<i64>) -> Option<Fault> {
        let mut found = None;
        for (at, (kind, fault)) in self.list.iter_mut().enumerate() {
            let meant = kind.is_none_or(|kind| kind == endpoint)
                && fault.job.is_none_or(|wanted| job == Some(wanted));
            if !meant {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            if let Some(left) = &mut fault.left {
                *left = left.saturating_sub(1);
            }
            found = Some(at);
            break;
        }
        let at = found?;
        self.hits += 1;
        let spent = self.list.get(at).is_some_and(|(_, fault)| fault.left == Some(0));
        if spent {
            return Some(self.list.remove(at).1);
        }
        self.list.get(at).map(|(_, fault)| fault.clone())
    }
}
