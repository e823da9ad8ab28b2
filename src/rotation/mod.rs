//! Runner tokens that expire are changed in time, and none is lost that need not be.
//!
//! GitLab may let runner tokens expire. After three quarters of a token's life, as with gitlab-runner,
//! it is exchanged for a new one; the old one is dead from the moment that GitLab answers, for every
//! machine that shares it. Running jobs do not notice: they have tokens of their own.
//!
//! There is no recovery code here either: [`Change::settle`] looks at the files beside the token (see
//! [`files`]) and goes on from wherever the last process, this one or a dead one, stopped.
//!
//! | point | dies after | what the next sweep finds and does |
//! | --- | --- | --- |
//! | R1 | the note | a note, and the old token verifies: nothing had happened; asks again |
//! | R2 | GitLab's answer | a note, and GitLab refuses the old token: the new one is lost |
//! | R3 | the new token is on disk | the new token: verifies it, and puts it in force |
//! | R4 | it is in force | a note, and the token verifies: nothing is open |
//!
//! R2, and an answer that the network loses, is the hole: GitLab gives a token once and has no call to
//! take a change back. Nothing but one write stands there. Whoever holds the runner's token alone can
//! do nothing then, so it is said where it is seen (`/health`, the log), and a person with a personal
//! access token heals it: `bridge runners rotate NAME --pat-file PATH` asks by the runner's number.
//!
//! Only tokens in files of their own are changed. One that is written into the configuration is the
//! operator's text, which the daemon does not edit; that it expires is logged.

pub mod files;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::files::{FileError, TokenFiles};
use crate::agent::Conditions;
use crate::config::{Config, Runner};
use crate::daemon;
use crate::domain::clock::Clock;
use crate::domain::id::RunnerName;
use crate::domain::policy;
use crate::gitlab::api::{Api, ApiReply, Refusal};
use crate::gitlab::{self, Client, Credentials, Info, ResetReply, Secret, VerifyReply};
use crate::telemetry::Chain;

/// gitlab-runner's switch for the same.
const SWITCH: &str = "FF_DISABLE_AUTOMATIC_TOKEN_ROTATION";

/// No token is changed twice within this time, whatever the clocks say.
const BETWEEN: SignedDuration = SignedDuration::from_secs(60);

/// How long a new token that GitLab does not know is kept beside an old one that it knows: a server
/// may have read replicas that lag.
const REPLICA_LAG: SignedDuration = SignedDuration::from_hours(1);

/// How often a token without an end is asked about again.
const ASK_AGAIN: SignedDuration = SignedDuration::from_hours(24);

/// A token whose change is under way or at hand.
#[derive(Debug)]
pub struct Change<'a> {
    /// Where it lies.
    pub files: &'a TokenFiles,
    /// Its GitLab.
    pub client: &'a Client,
    /// This machine's name there.
    pub system_id: &'a str,
    /// What is said of us in the same breath.
    pub info: &'a Info,
    /// For tests: the point of the table above at which to die.
    pub crash_at: Option<&'a str>,
}

/// By which right a new token is asked for.
#[derive(Clone, Copy, Debug)]
pub enum By<'a> {
    /// By the token in force.
    Token,
    /// By the runner's number and a personal access token; also heals a token that was lost.
    Number(&'a Api, i64),
}

/// How a token stands.
#[derive(Clone, Debug)]
pub enum Standing {
    /// The token in the file is good, and nothing is open.
    Good {
        /// When it expires, if ever.
        expires_at: Option<Timestamp>,
    },
    /// GitLab changed it, and the new one has verified: it is in force.
    Changed {
        /// The new token.
        token: Secret,
        /// When it expires, if ever.
        expires_at: Option<Timestamp>,
    },
    /// GitLab was asked for a change, its answer never came here, and it refuses the old token.
    Lost {
        /// When it was asked.
        asked_at: String,
    },
    /// GitLab refuses the token, and we have no other.
    Refused,
    /// The runner's owner is gone.
    Orphaned,
    /// GitLab does not say; all is kept as it is.
    Unclear {
        /// Why.
        why: String,
    },
    /// GitLab will not make a new token; the old one is still good, as far as is known.
    Declined(Refusal),
}

/// A token could not be changed for reasons of this machine.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// GitLab gave a new token that cannot be written: it is here and nowhere else.
    #[error("keep the token that GitLab gave")]
    Unkept {
        /// The token.
        token: Secret,
        /// Why.
        source: FileError,
    },
    /// The GitLab cannot be spoken to as configured.
    #[error("set up the client")]
    Client(#[source] gitlab::Error),
}

impl Change<'_> {
    fn crash_point(&self, name: &str) {
        if self.crash_at == Some(name) {
            crate::reconcile::crash(name);
        }
    }

    async fn verify(&self, token: &Secret) -> Verified {
        match self.client.verify_runner(token, self.system_id, self.info).await {
            Ok(VerifyReply::Valid { expires_at, .. }) => Verified::Good(expires_at),
            Ok(VerifyReply::Refused) => Verified::Refused,
            Ok(VerifyReply::Orphaned) => Verified::Orphaned,
            Ok(VerifyReply::Unclear(unclear)) => Verified::Unclear(unclear.to_string()),
            Err(error) => Verified::Unclear(Chain(&error).to_string()),
        }
    }

    /// Finishes what was begun, by whomever, and says how the token stands.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or written.
    pub async fn settle(&self, now: Timestamp) -> Result<Standing, RotationError> {
        let files = self.files;
        if let Some(new) = files.waiting()? {
            match self.verify(&new).await {
                Verified::Good(expires_at) => {
                    files.promote()?;
                    self.crash_point("R4");
                    files.drop_note()?;
                    return Ok(Standing::Changed { token: new, expires_at });
                }
                Verified::Unclear(why) => return Ok(Standing::Unclear { why }),
                Verified::Orphaned => return Ok(Standing::Orphaned),
                // Not what GitLab's 201 says; whichever of the two it takes is the one. Neither is
                // thrown away before the other is known to be good.
                Verified::Refused => match self.verify(&files.current()?).await {
                    Verified::Good(expires_at) => {
                        if now.duration_since(files.waiting_since()?) < REPLICA_LAG {
                            let why = "GitLab knows the old token and not yet the new one";
                            return Ok(Standing::Unclear { why: why.to_owned() });
                        }
                        files.drop_waiting()?;
                        files.drop_note()?;
                        return Ok(Standing::Good { expires_at });
                    }
                    Verified::Refused => return Ok(Standing::Refused),
                    Verified::Orphaned => return Ok(Standing::Orphaned),
                    Verified::Unclear(why) => return Ok(Standing::Unclear { why }),
                },
            }
        }
        let noted = files.noted()?;
        Ok(match (self.verify(&files.current()?).await, noted) {
            (Verified::Good(expires_at), Some(_asked_in_vain)) => {
                files.drop_note()?;
                Standing::Good { expires_at }
            }
            (Verified::Good(expires_at), None) => Standing::Good { expires_at },
            (Verified::Refused, Some(asked_at)) => Standing::Lost { asked_at },
            (Verified::Refused, None) => Standing::Refused,
            (Verified::Orphaned, _) => Standing::Orphaned,
            (Verified::Unclear(why), _) => Standing::Unclear { why },
        })
    }

    /// Changes the token: a note, GitLab, the disk, a verification, in force.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or written. [`RotationError::Unkept`] holds the only copy of a token.
    pub async fn change(&self, by: By<'_>, now: Timestamp) -> Result<Standing, RotationError> {
        let files = self.files;
        let current = files.current()?;
        files.note(now)?;
        self.crash_point("R1");
        let asked = match by {
            By::Token => by_token(self.client.reset_token(&current).await),
            By::Number(api, id) => by_number(api.reset_token(id).await),
        };
        match asked {
            Asked::Done(credentials) => {
                self.crash_point("R2");
                let Credentials { token, .. } = credentials;
                self.keep(&token)?;
                self.crash_point("R3");
                self.settle(now).await
            }
            Asked::Refused => {
                files.drop_note()?;
                Ok(Standing::Refused)
            }
            Asked::Declined(refusal) => {
                files.drop_note()?;
                Ok(Standing::Declined(refusal))
            }
            Asked::Unsent(why) => {
                files.drop_note()?;
                Ok(Standing::Unclear { why })
            }
            // The note stays: whether the old token is still good is the next sweep's to find out.
            Asked::Unclear(why) => Ok(Standing::Unclear { why }),
        }
    }

    /// Writes a token down that GitLab gave.
    ///
    /// # Errors
    ///
    /// With the token, when it cannot be written.
    pub fn keep(&self, token: &Secret) -> Result<(), RotationError> {
        self.files
            .keep(token)
            .map_err(|source| RotationError::Unkept { token: token.clone(), source })
    }
}

enum Verified {
    Good(Option<Timestamp>),
    Refused,
    Orphaned,
    Unclear(String),
}

enum Asked {
    Done(Credentials),
    /// The token that asked is not known.
    Refused,
    /// Whoever asked may not.
    Declined(Refusal),
    /// The question never left.
    Unsent(String),
    /// It may have been done.
    Unclear(String),
}

fn by_token(reply: Result<ResetReply, gitlab::Error>) -> Asked {
    match reply {
        Ok(ResetReply::Done(credentials)) => Asked::Done(credentials),
        Ok(ResetReply::Refused) => Asked::Refused,
        Ok(ResetReply::Unclear(unclear)) => Asked::Unclear(unclear.to_string()),
        Err(error) => unanswered(&error),
    }
}

fn by_number(reply: Result<ApiReply<Credentials>, gitlab::Error>) -> Asked {
    match reply {
        Ok(ApiReply::Done(credentials)) => Asked::Done(credentials),
        Ok(ApiReply::Refused(Refusal::Unclear(unclear))) => Asked::Unclear(unclear.to_string()),
        Ok(ApiReply::Refused(
            refusal @ (Refusal::Invalid { .. }
            | Refusal::Unknown
            | Refusal::LacksScope { .. }
            | Refusal::Forbidden { .. }
            | Refusal::NotFound { .. }),
        )) => Asked::Declined(refusal),
        Err(error) => unanswered(&error),
    }
}

fn unanswered(error: &gitlab::Error) -> Asked {
    let why = Chain(error).to_string();
    if error.may_have_arrived() { Asked::Unclear(why) } else { Asked::Unsent(why) }
}

/// Says when a token is due for a change; never, if the two times make no life.
pub fn due(obtained_at: Timestamp, expires_at: Timestamp) -> Option<Timestamp> {
    let life = expires_at.duration_since(obtained_at);
    (life > SignedDuration::ZERO).then(|| {
        let three_quarters = life.checked_mul(3).map_or(SignedDuration::ZERO, |life| life / 4);
        obtained_at.checked_add(three_quarters).unwrap_or(expires_at)
    })
}

/// What the sweeps know of one runner's token; all of it can be found out again.
#[derive(Debug, Default)]
struct Known {
    /// The token that the rest is about.
    token: Option<Secret>,
    /// When it expires, if ever, once GitLab has said.
    expires_at: Option<Option<Timestamp>>,
    /// When GitLab said so.
    asked_at: Option<Timestamp>,
    /// Questions in a row that were not answered.
    attempts: u32,
    /// Not to be asked before.
    not_before: Option<Timestamp>,
    /// When it was last changed.
    changed_at: Option<Timestamp>,
    /// A token that GitLab gave and the disk did not take.
    unkept: Option<Secret>,
    /// What was said already of this token.
    said: bool,
}

impl Known {
    fn later(&mut self, now: Timestamp) {
        self.attempts = self.attempts.saturating_add(1);
        self.not_before = Some(policy::after(now, policy::back_off(self.attempts)));
    }

    fn learn(&mut self, expires_at: Option<Timestamp>, now: Timestamp) {
        (self.expires_at, self.asked_at) = (Some(expires_at), Some(now));
        (self.attempts, self.not_before) = (0, None);
    }
}

/// Sees to the tokens of all runners, one at a time.
#[derive(Debug)]
pub struct Rotation {
    clock: Arc<dyn Clock>,
    conditions: Conditions,
    system_id: String,
    crash_at: Option<String>,
    known: BTreeMap<RunnerName, Known>,
}

impl Rotation {
    /// Prepares; nothing is read or asked yet.
    pub fn new(clock: Arc<dyn Clock>, conditions: Conditions, system_id: String) -> Self {
        let crash_at = std::env::var("BRIDGE_CRASH_AT").ok().filter(|name| name.starts_with('R'));
        Self { clock, conditions, system_id, crash_at, known: BTreeMap::new() }
    }

    /// Sweeps until `stop`; tells `changed` of every token that is not the configuration's any more.
    pub async fn run(
        mut self,
        configs: watch::Receiver<Arc<Config>>,
        changed: mpsc::Sender<(RunnerName, Secret)>,
        stop: CancellationToken,
    ) {
        while !stop.is_cancelled() {
            let config = Arc::clone(&configs.borrow());
            let pause =
                config.check_interval.clamp(Duration::from_secs(1), Duration::from_secs(60));
            for runner in &config.runners {
                // To its end also in a shutdown: between GitLab's answer and the disk nothing helps.
                if let Some(token) = self.look_after(runner).await
                    && changed.send((runner.name.clone(), token)).await.is_err()
                {
                    return;
                }
                if stop.is_cancelled() {
                    return;
                }
            }
            // Both are cancel-safe.
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Does for one runner what is to be done now; gives the token in force if it is another one than
    /// the configuration's.
    pub async fn look_after(&mut self, runner: &Runner) -> Option<Secret> {
        let now = self.clock.now();
        let who = format!("{} token", runner.name);
        let mut known = self.known.remove(&runner.name).unwrap_or_default();
        let turn = self.turn(runner, &mut known, now).await;
        self.known.insert(runner.name.clone(), known);
        match turn {
            Ok(Turn::Rest) => None,
            Ok(Turn::Fine(token)) => {
                self.conditions.set(&who, None);
                token
            }
            Ok(Turn::Trouble(problem)) => {
                self.conditions.set(&who, Some(problem));
                None
            }
            Err(error) => {
                let problem = format!("cannot {}", Chain(&error));
                self.conditions.set(&who, Some(problem));
                let known = self.known.entry(runner.name.clone()).or_default();
                known.later(now);
                if let RotationError::Unkept { token, .. } = error {
                    known.unkept = Some(token.clone());
                    // Better in force from memory than not at all.
                    return Some(token);
                }
                None
            }
        }
    }

    async fn turn(
        &self,
        runner: &Runner,
        known: &mut Known,
        now: Timestamp,
    ) -> Result<Turn, RotationError> {
        if known.not_before.is_some_and(|time| now < time) {
            return Ok(Turn::Rest);
        }
        let Some(path) = &runner.token_file else {
            return self.inline(runner, known, now).await;
        };
        let files = TokenFiles::of(path);
        let Some(_writer) = files.lock()? else { return Ok(Turn::Rest) };
        if let Some(token) = known.unkept.take() {
            files.keep(&token).map_err(|source| RotationError::Unkept { token, source })?;
        }
        let current = files.current()?;
        let open = files.waiting()?.is_some() || files.noted()?.is_some();
        if known.token.as_ref().is_none_or(|token| token.expose() != current.expose()) {
            let changed_at = known.changed_at;
            *known = Known { token: Some(current.clone()), changed_at, ..Known::default() };
        }
        // Somebody else may have changed the file: an operator, or `bridge runners rotate`.
        let other = (current.expose() != runner.token.expose()).then(|| current.clone());
        let fresh = known.asked_at.is_some_and(|at| now.duration_since(at) < ASK_AGAIN);
        let settled = known.expires_at.filter(|expiry| fresh || expiry.is_some());
        if let (Some(expires_at), false) = (settled, open) {
            let Some(due_at) = self.due(runner, &files, expires_at, known, now)? else {
                return Ok(if other.is_some() { Turn::Fine(other) } else { Turn::Rest });
            };
            tracing::info!(
                runner = %runner.name, due_at = %due_at,
                "the runner's token is changed: three quarters of its life are over"
            );
        }
        let (client, info) = connect(runner)?;
        let change = Change {
            files: &files,
            client: &client,
            system_id: &self.system_id,
            info: &info,
            crash_at: self.crash_at.as_deref(),
        };
        let standing = if settled.is_some() && !open {
            change.change(By::Token, now).await?
        } else {
            change.settle(now).await?
        };
        Ok(match standing {
            Standing::Good { expires_at } => {
                known.learn(expires_at, now);
                Turn::Fine(other)
            }
            Standing::Changed { token, expires_at } => {
                tracing::info!(
                    runner = %runner.name, path = %files.path(), expires_at = expires_at.map(tracing::field::display),
                    "the runner has a new token"
                );
                let token_too = token.clone();
                *known = Known { token: Some(token), changed_at: Some(now), ..Known::default() };
                known.learn(expires_at, now);
                Turn::Fine(Some(token_too))
            }
            Standing::Lost { asked_at } => {
                known.later(now);
                Turn::Trouble(format!(
                    "GitLab was asked for a new token at {asked_at}, its answer never came here, and \
                     the old token is dead: run `bridge runners rotate {} --pat-file PATH`",
                    runner.name
                ))
            }
            Standing::Refused => {
                known.later(now);
                Turn::Trouble(format!(
                    "GitLab does not know the token in {}: if the runner is still there, run `bridge \
                     runners rotate {} --pat-file PATH`",
                    files.path(),
                    runner.name
                ))
            }
            Standing::Orphaned => {
                known.later(now);
                Turn::Trouble("the runner's group or project is gone".to_owned())
            }
            Standing::Declined(refusal) => {
                known.later(now);
                tracing::warn!(runner = %runner.name, %refusal, "the token was not changed");
                Turn::Rest
            }
            Standing::Unclear { why } => {
                known.later(now);
                tracing::warn!(
                    runner = %runner.name, why, "how the runner's token stands could not be learnt"
                );
                Turn::Rest
            }
        })
    }

    /// Says since when a token should have been changed, if that is now.
    fn due(
        &self,
        runner: &Runner,
        files: &TokenFiles,
        expires_at: Option<Timestamp>,
        known: &mut Known,
        now: Timestamp,
    ) -> Result<Option<Timestamp>, RotationError> {
        let Some(expires_at) = expires_at else { return Ok(None) };
        let obtained_at = files.obtained_at()?;
        let Some(due_at) = due(obtained_at, expires_at) else {
            if !std::mem::replace(&mut known.said, true) {
                tracing::warn!(
                    runner = %runner.name, %obtained_at, %expires_at,
                    "the token expires before it was obtained: this machine's clock is not GitLab's, \
                     and the token is not changed"
                );
            }
            return Ok(None);
        };
        if now < due_at || known.changed_at.is_some_and(|at| now.duration_since(at) < BETWEEN) {
            return Ok(None);
        }
        if !automatic(runner) {
            if !std::mem::replace(&mut known.said, true) {
                tracing::warn!(
                    runner = %runner.name, %expires_at,
                    "the runner's token expires soon, and its automatic change is switched off: run \
                     `bridge runners rotate`"
                );
            }
            return Ok(None);
        }
        Ok(Some(due_at))
    }

    /// Asks about a token that is written into the configuration, and warns when it will die.
    async fn inline(
        &self,
        runner: &Runner,
        known: &mut Known,
        now: Timestamp,
    ) -> Result<Turn, RotationError> {
        let same = known.token.as_ref().is_some_and(|t| t.expose() == runner.token.expose());
        if same && known.expires_at.is_some() {
            return Ok(Turn::Rest);
        }
        if !same {
            *known = Known { token: Some(runner.token.clone()), ..Known::default() };
        }
        let (client, info) = connect(runner)?;
        match client.verify_runner(&runner.token, &self.system_id, &info).await {
            Ok(VerifyReply::Valid { expires_at, .. }) => {
                if let Some(expires_at) = expires_at {
                    tracing::warn!(
                        runner = %runner.name, %expires_at,
                        "the runner's token expires and is written into the configuration, which is \
                         not changed: move it to a token_file"
                    );
                }
                known.learn(expires_at, now);
            }
            // The agent says what is wrong with the token, or that GitLab is away.
            Ok(_) | Err(_) => known.later(now),
        }
        Ok(Turn::Rest)
    }
}

/// What came of one look.
enum Turn {
    /// Nothing new.
    Rest,
    /// All is well; the token, if it is another one than the configuration's.
    Fine(Option<Secret>),
    /// The operator's move.
    Trouble(String),
}

/// Says whether a runner's token is changed without being asked.
fn automatic(runner: &Runner) -> bool {
    let variable = std::env::var(SWITCH).ok();
    let off = |text: &str| matches!(text, "true" | "1" | "t" | "True" | "TRUE");
    runner.token_rotation
        && !runner.feature_flags.get(SWITCH).copied().unwrap_or(false)
        && !variable.is_some_and(|text| off(&text))
}

fn connect(runner: &Runner) -> Result<(Client, Info), RotationError> {
    let client = Client::new(daemon::client_options(runner)).map_err(RotationError::Client)?;
    // As the agent tells it: GitLab remembers what it hears first.
    Ok((client, daemon::info(&runner.backend_kind)))
}
