//! Looks after the logins at backends: a login that is lost or ends soon is said before a job needs it.
//!
//! It asks the backends the question that `backends check` asks, and only those that have a login. It
//! keeps nothing but the last answer, for `/health` and `/metrics`, and changes nothing: whether a job
//! can go on is found out by its own submission.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bridge_backend::{Backend, BackendError, Login, Remedy};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::domain::id::BackendName;
use crate::telemetry::{Chain, Metrics};

/// Between two looks while all is well.
const LOOK: Duration = Duration::from_secs(20);

/// And while it is not: whoever mends it waits for the light to turn green.
const LOOK_AGAIN: Duration = Duration::from_secs(3);

/// Longer than a server that is well takes to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// How the logins stand, by backend.
#[derive(Clone, Debug, Default)]
pub struct Logins(Arc<Mutex<BTreeMap<BackendName, Standing>>>);

#[derive(Clone, Debug)]
struct Standing {
    /// Why the operator must act, and how.
    trouble: Option<String>,
    login: Option<Login>,
}

impl Logins {
    /// Looks again and again until `stop`.
    pub async fn run(
        self,
        mut backends: watch::Receiver<BTreeMap<BackendName, Arc<dyn Backend>>>,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) {
        loop {
            let world = backends.borrow_and_update().clone();
            let unwell = tokio::select! {
                () = stop.cancelled() => return,
                // Dropping a check is harmless.
                unwell = self.look(&world) => unwell,
            };
            let wait = if unwell { LOOK_AGAIN } else { LOOK };
            metrics.set_logins(self.lock().iter().map(|(name, standing)| {
                let left = standing.login.as_ref().and_then(|login| login.left);
                (name.0.as_str(), standing.trouble.is_none(), left)
            }));
            // All three are cancel-safe.
            tokio::select! {
                () = stop.cancelled() => return,
                changed = backends.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Asks every backend that has a login; tells whether the operator must act for one.
    async fn look(&self, world: &BTreeMap<BackendName, Arc<dyn Backend>>) -> bool {
        self.lock().retain(|name, _| world.contains_key(name));
        for (name, backend) in world {
            let known = self.lock().contains_key(name);
            if !known && !backend.has_login() {
                continue;
            }
            let answer = match tokio::time::timeout(PATIENCE, backend.check()).await {
                Ok(answer) => answer,
                // Not the login's fault.
                Err(_elapsed) => continue,
            };
            let trouble = match &answer {
                Ok(()) => None,
                Err(error) => match error.remedy() {
                    Some(_) => Some(said(name, error)),
                    // A server that does not answer says nothing of the login.
                    None => self.lock().get(name).and_then(|before| before.trouble.clone()),
                },
            };
            let standing = Standing { trouble, login: backend.login() };
            let before = self.lock().insert(name.clone(), standing.clone());
            tell(name, before.as_ref(), &standing);
        }
        self.lock().values().any(|standing| standing.trouble.is_some())
    }

    /// Says why backends cannot be used until the operator acts.
    pub fn troubles(&self) -> Vec<String> {
        self.lock().values().filter_map(|standing| standing.trouble.clone()).collect()
    }

    /// Says which logins end soon.
    pub fn warnings(&self) -> Vec<String> {
        let of = |(name, standing): (&BackendName, &Standing)| {
            let login = standing.login.as_ref().filter(|_| standing.trouble.is_none())?;
            login.ends_soon.then(|| format!("backend {name}: {}", ends_soon(name, login)))
        };
        self.lock().iter().filter_map(of).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<BackendName, Standing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Logs what changed.
fn tell(name: &BackendName, before: Option<&Standing>, now: &Standing) {
    let was = before.and_then(|before| before.trouble.as_deref());
    match (was, now.trouble.as_deref()) {
        (was, Some(is)) if was != Some(is) => {
            tracing::error!(backend = %name, error = is, "the backend waits for its operator");
        }
        (Some(_), None) => tracing::info!(backend = %name, "the backend can be used again"),
        (_, Some(_)) | (None, None) => {}
    }
    let soon = |standing: &Standing| standing.login.as_ref().is_some_and(|login| login.ends_soon);
    if let Some(login) = &now.login
        && login.ends_soon
        && !before.is_some_and(soon)
    {
        let left_s = login.left.map(|left| left.as_secs());
        tracing::warn!(backend = %name, left_s, "the login at the backend ends soon");
    }
}

/// Says what is wrong with a backend, and the command that mends it.
pub fn said(name: &BackendName, error: &BackendError) -> String {
    format!("backend {name}: cannot {}{}", Chain(error), cure(name, error))
}

/// Gives the command that mends an error, as the end of a sentence; nothing if there is none.
pub fn cure(name: &BackendName, error: &BackendError) -> String {
    match error.remedy() {
        Some(Remedy::Login) => format!("; run `bridge backends login {name}`"),
        Some(Remedy::Other) | None => String::new(),
    }
}

/// Says that a login ends soon, and what to do.
pub fn ends_soon(name: &BackendName, login: &Login) -> String {
    let left = login.left.map_or_else(|| "soon".to_owned(), |left| format!("in {}", roughly(left)));
    match login.remedy {
        Remedy::Login => format!(
            "the login ends {left} and nothing prolongs it; run `bridge backends login {name}`"
        ),
        Remedy::Other => format!("the login ends {left} unless its token file is renewed"),
    }
}

/// Gives a time as people say it.
pub fn roughly(time: Duration) -> String {
    let (count, unit) = match time.as_secs() {
        seconds @ 0..120 => (seconds, "second"),
        seconds @ 120..7_200 => (seconds / 60, "minute"),
        seconds @ 7_200..172_800 => (seconds / 3_600, "hour"),
        seconds => (seconds / 86_400, "day"),
    };
    if count == 1 { format!("1 {unit}") } else { format!("{count} {unit}s") }
}

#[cfg(test)]
mod tests {
    use bridge_backend::ErrorKind;
    use bridge_backend::fake::{FakeOptions, FakeWorld, Verb};

    use super::*;

    #[tokio::test]
    async fn a_lost_login_is_said_until_it_is_mended_and_silence_changes_nothing() {
        let fake = FakeWorld::new(FakeOptions::default());
        let world = BTreeMap::from([(BackendName("grid".into()), fake.open())]);
        let logins = Logins::default();
        assert!(!logins.look(&world).await);
        assert_eq!(logins.troubles(), Vec::<String>::new());
        fake.lock_out(true);
        assert!(logins.look(&world).await);
        let said = ["backend grid: cannot log in: test; run `bridge backends login grid`"];
        assert_eq!(logins.troubles(), said);
        fake.lock_out(false);
        fake.outage(Verb::Check, Some(ErrorKind::Transient));
        assert!(logins.look(&world).await, "nobody knows better");
        assert_eq!(logins.troubles(), said);
        fake.outage(Verb::Check, None);
        assert!(!logins.look(&world).await);
        assert_eq!(logins.troubles(), Vec::<String>::new());
        fake.lock_out(true);
        logins.look(&world).await;
        logins.look(&BTreeMap::new()).await;
        assert_eq!(logins.troubles(), Vec::<String>::new(), "what is not configured is forgotten");
    }

    #[test]
    fn what_ends_soon_names_what_renews_it() {
        let name = BackendName("grid".into());
        let login = |remedy| Login {
            who: "robot".into(),
            left: Some(Duration::from_secs(3 * 3_600)),
            ends_soon: true,
            remedy,
        };
        assert_eq!(
            ends_soon(&name, &login(Remedy::Login)),
            "the login ends in 3 hours and nothing prolongs it; run `bridge backends login grid`"
        );
        assert_eq!(
            ends_soon(&name, &login(Remedy::Other)),
            "the login ends in 3 hours unless its token file is renewed"
        );
        let times = [1, 119, 120, 7_200, 172_800].map(|s| roughly(Duration::from_secs(s)));
        assert_eq!(times, ["1 second", "119 seconds", "2 minutes", "2 hours", "2 days"]);
    }
}
