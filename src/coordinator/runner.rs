//! Runners, their managers, and the value that long polling waits for.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::sync::Notify;

use super::job::Window;
use super::new_job::NewJob;
use super::options::RunnerOptions;
use super::runners_api::Card;
use super::view::{ManagerView, RunnerView};

/// What a manager said about itself is stored again only after this time. GitLab draws between 40
/// and 55 minutes; the longest is the hardest for a client.
pub(super) const STORED_FOR: Duration = Duration::from_secs(55 * 60);

/// How long the queue's value lives in Redis.
const QUEUE_VALUE_LIFE: Duration = Duration::from_secs(60 * 60);

/// `info`, as far as it is stored.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Info {
    pub(super) version: Option<String>,
    pub(super) platform: Option<String>,
    pub(super) executor: Option<String>,
    pub(super) features: Option<HashMap<String, Value>>,
    /// Read for its kind alone, as the next two are.
    #[serde(rename = "name")]
    _name: Option<String>,
    #[serde(rename = "revision")]
    _revision: Option<String>,
    #[serde(rename = "architecture")]
    _architecture: Option<String>,
}

impl Info {
    pub(super) fn has(&self, feature: &str) -> bool {
        self.features
            .as_ref()
            .and_then(|features| features.get(feature))
            .is_some_and(|value| value == &Value::Bool(true))
    }
}

/// A process that uses the runner's token.
#[derive(Debug)]
pub(super) struct Manager {
    pub(super) info: Info,
    pub(super) stored_at: Duration,
    pub(super) contacted_at: Duration,
}

/// A runner.
pub(super) struct Runner {
    pub(super) id: i64,
    pub(super) token: String,
    pub(super) token_expires: Option<Duration>,
    pub(super) options: RunnerOptions,
    pub(super) card: Card,
    pub(super) deleted: bool,
    pub(super) orphaned: bool,
    pub(super) managers: HashMap<Arc<str>, Manager>,
    pub(super) window: Window,
    queue_value: String,
    queue_value_at: Duration,
    /// Rings when the queue's value changes.
    pub(super) news: Arc<Notify>,
}

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runner")
            .field("id", &self.id)
            .field("options.description", &self.options.description)
            .finish_non_exhaustive()
    }
}

impl Runner {
    pub(super) fn new(id: i64, token: String, options: RunnerOptions, now: Duration) -> Self {
        Self {
            id,
            token,
            token_expires: None,
            options,
            card: Card::new(now),
            deleted: false,
            orphaned: false,
            managers: HashMap::new(),
            window: Window::default(),
            queue_value: super::random::hex(),
            queue_value_at: now,
            news: Arc::default(),
        }
    }

    /// Whether the runner may take the job.
    pub(super) fn suits(&self, job: &NewJob) -> bool {
        if job.runner.as_ref().is_some_and(|token| *token != self.token) {
            return false;
        }
        if job.tags.is_empty() {
            return self.options.run_untagged;
        }
        job.tags.iter().all(|tag| self.options.tags.contains(tag))
    }

    /// Makes the value new, so that clients ask.
    pub(super) fn ring(&mut self, now: Duration) {
        self.queue_value = super::random::hex();
        self.queue_value_at = now;
        self.news.notify_waiters();
    }

    /// Gives the value; one that nobody renewed for an hour is gone and made anew.
    pub(super) fn queue_value(&mut self, now: Duration) -> &str {
        if now.saturating_sub(self.queue_value_at) > QUEUE_VALUE_LIFE {
            self.queue_value = super::random::hex();
            self.queue_value_at = now;
        }
        &self.queue_value
    }

    /// Notes a call of a manager; stores what it says if the stored row is new or old enough.
    /// Gives whether the row is new.
    pub(super) fn heartbeat(
        &mut self,
        system_id: Option<&str>,
        info: Option<&Info>,
        now: Duration,
    ) -> (Arc<str>, bool) {
        let name: &str = system_id.filter(|id| !id.is_empty()).unwrap_or("<legacy>");
        let known = self.managers.get_key_value(name).map(|(name, _)| Arc::clone(name));
        let name = known.clone().unwrap_or_else(|| name.into());
        let fresh = || Manager {
            info: info.cloned().unwrap_or_default(),
            stored_at: now,
            contacted_at: now,
        };
        let manager = self.managers.entry(Arc::clone(&name)).or_insert_with(fresh);
        manager.contacted_at = now;
        if now.saturating_sub(manager.stored_at) >= STORED_FOR {
            manager.stored_at = now;
            if let Some(info) = info {
                manager.info = info.clone();
            }
        }
        (name, known.is_none())
    }

    pub(super) fn view(&self) -> RunnerView {
        let mut managers: Vec<_> = self
            .managers
            .iter()
            .map(|(system_id, manager)| ManagerView {
                system_id: Arc::clone(system_id),
                version: manager.info.version.clone(),
                platform: manager.info.platform.clone(),
                executor: manager.info.executor.clone(),
                features: manager.features(),
                stored_at: manager.stored_at,
                contacted_at: manager.contacted_at,
            })
            .collect();
        managers.sort_by(|a, b| a.system_id.cmp(&b.system_id));
        RunnerView {
            id: self.id,
            description: self.options.description.clone(),
            paused: self.options.paused,
            managers,
        }
    }
}

impl Manager {
    fn features(&self) -> Vec<String> {
        let features = self.info.features.iter().flatten();
        let mut on: Vec<String> = features
            .filter(|(_, value)| **value == Value::Bool(true))
            .map(|(name, _)| name.clone())
            .collect();
        on.sort();
        on
    }
}
