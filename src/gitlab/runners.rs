//! Registering, verifying and removing runners; changing their tokens.

use jiff::Timestamp;
use reqwest::Method;
use serde::Serialize;
use serde_json::value::RawValue;

use super::Client;
use super::answer::Answer;
use super::error::{Cause, Error};
use super::info::Info;
use super::transport::{Ask, Credential};
use super::unclear::Unclear;
use super::wire::{RunnerAnswer, Secret};

/// A runner's number and token as GitLab gave them.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// GitLab's number for the runner.
    pub id: Option<i64>,
    /// Its authentication token.
    pub token: Secret,
    /// When the token expires, if ever.
    pub expires_at: Option<Timestamp>,
    /// When it was obtained, whole seconds: the token is due for a change after three quarters of
    /// the time between.
    pub obtained_at: Timestamp,
}

/// What `runners/verify` may answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VerifyReply {
    /// 200: the token is good, and GitLab knows this runner manager now.
    Valid {
        /// The runner's number; old servers do not tell.
        id: Option<i64>,
        /// When the token expires, if ever.
        expires_at: Option<Timestamp>,
    },
    /// 403: wrong token, or the runner was deleted.
    Refused,
    /// 422: the runner's owner is gone.
    Orphaned,
    /// Any other status; says nothing about the token.
    Unclear(Unclear),
}

/// The runner that a registration token makes; GitLab's defaults where empty or zero.
#[derive(Clone, Debug)]
pub struct Registration {
    /// What it is called.
    pub description: String,
    /// A note for administrators.
    pub maintenance_note: String,
    /// Its tags.
    pub tags: Vec<String>,
    /// Whether it takes jobs without tags.
    pub run_untagged: bool,
    /// Whether it is kept to its project.
    pub locked: bool,
    /// `not_protected` or `ref_protected`.
    pub access_level: String,
    /// The longest timeout of its jobs, seconds.
    pub maximum_timeout: u64,
    /// Whether it gets no jobs for now.
    pub paused: bool,
}

impl Default for Registration {
    fn default() -> Self {
        Self {
            description: String::new(),
            maintenance_note: String::new(),
            tags: Vec::new(),
            run_untagged: false,
            // As gitlab-runner.
            locked: true,
            access_level: String::new(),
            maximum_timeout: 0,
            paused: false,
        }
    }
}

/// What `POST /runners` may answer.
#[derive(Clone, Debug)]
pub enum RegisterReply {
    /// 201: there is a runner.
    Registered(Credentials),
    /// 400: a value is wrong.
    Invalid {
        /// GitLab's words.
        message: String,
    },
    /// 403: wrong registration token.
    Refused {
        /// GitLab's words.
        message: String,
    },
    /// 410: registration tokens are switched off; the runner must be created in GitLab.
    Disallowed,
    /// Any other status; there may be a runner all the same.
    Unclear(Unclear),
}

/// What removing a runner or a runner manager may be answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnregisterReply {
    /// 204: it is gone.
    Done,
    /// 403: wrong token, or the runner was gone before.
    Refused,
    /// 404: the runner manager was not there.
    Unknown,
    /// Any other status.
    Unclear(Unclear),
}

/// What `runners/reset_authentication_token` may answer.
#[derive(Clone, Debug)]
pub enum ResetReply {
    /// 201: the old token is dead, this is the new one.
    Done(Credentials),
    /// 403: wrong token.
    Refused,
    /// Any other status; the old token may be dead all the same.
    Unclear(Unclear),
}

#[derive(Serialize)]
struct VerifyBody<'a> {
    token: &'a str,
    system_id: &'a str,
    info: &'a RawValue,
}

#[derive(Serialize)]
struct RegisterBody<'a> {
    token: &'a str,
    info: &'a RawValue,
    #[serde(skip_serializing_if = "str::is_empty")]
    description: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    maintenance_note: &'a str,
    #[serde(skip_serializing_if = "String::is_empty")]
    tag_list: String,
    run_untagged: bool,
    locked: bool,
    #[serde(skip_serializing_if = "str::is_empty")]
    access_level: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    maximum_timeout: Option<u64>,
    paused: bool,
}

#[derive(Serialize)]
struct TokenBody<'a> {
    token: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_id: Option<&'a str>,
}

impl Client {
    /// Checks a runner's token and makes this runner manager known.
    ///
    /// To be the first call of a process: from it GitLab remembers for most of an hour whether the
    /// runner can cancel gracefully.
    pub async fn verify_runner(
        &self,
        token: &Secret,
        system_id: &str,
        info: &Info,
    ) -> Result<VerifyReply, Error> {
        let body = VerifyBody { token: token.expose(), system_id, info: info.raw() };
        let ask = Ask::json(Method::POST, "runners/verify", &body, self.timeouts())?
            .credential(Credential::Runner(token))
            .accept_json();
        let answer = self.0.exchange(ask).await?.unless_html()?;
        Ok(match answer.status {
            200 | 201 => {
                // Old servers answer with the status as text: good news all the same.
                let said = serde_json::from_slice::<RunnerAnswer>(&answer.body).unwrap_or_default();
                VerifyReply::Valid { id: said.id, expires_at: expiry(&said) }
            }
            403 => VerifyReply::Refused,
            422 => VerifyReply::Orphaned,
            _ => VerifyReply::Unclear(Unclear::of(&answer, self.now())),
        })
    }

    /// Makes a runner with a registration token, which GitLab has deprecated.
    pub async fn register_runner(
        &self,
        token: &Secret,
        info: &Info,
        registration: &Registration,
    ) -> Result<RegisterReply, Error> {
        let body = RegisterBody {
            token: token.expose(),
            info: info.raw(),
            description: &registration.description,
            maintenance_note: &registration.maintenance_note,
            tag_list: registration.tags.join(","),
            run_untagged: registration.run_untagged,
            locked: registration.locked,
            access_level: &registration.access_level,
            maximum_timeout: Some(registration.maximum_timeout).filter(|secs| *secs > 0),
            paused: registration.paused,
        };
        let ask = Ask::json(Method::POST, "runners", &body, self.timeouts())?
            .credential(Credential::Runner(token))
            .accept_json();
        let answer = self.0.exchange(ask).await?.unless_html()?;
        Ok(match answer.status {
            201 => RegisterReply::Registered(self.credentials(answer)?),
            400 => RegisterReply::Invalid { message: answer.message() },
            403 => RegisterReply::Refused { message: answer.message() },
            410 => RegisterReply::Disallowed,
            _ => RegisterReply::Unclear(Unclear::of(&answer, self.now())),
        })
    }

    /// Deletes a whole runner. Only for those that a registration token made: others may have more
    /// runner managers than this one.
    pub async fn unregister_runner(&self, token: &Secret) -> Result<UnregisterReply, Error> {
        self.unregister("runners", token, None).await
    }

    /// Removes this runner manager; the runner stays.
    pub async fn unregister_manager(
        &self,
        token: &Secret,
        system_id: &str,
    ) -> Result<UnregisterReply, Error> {
        self.unregister("runners/managers", token, Some(system_id)).await
    }

    async fn unregister(
        &self,
        path: &str,
        token: &Secret,
        system_id: Option<&str>,
    ) -> Result<UnregisterReply, Error> {
        let body = TokenBody { token: token.expose(), system_id };
        let ask = Ask::json(Method::DELETE, path, &body, self.timeouts())?
            .credential(Credential::Runner(token));
        let answer = self.0.exchange(ask).await?.unless_html()?;
        Ok(match answer.status {
            204 => UnregisterReply::Done,
            403 => UnregisterReply::Refused,
            404 => UnregisterReply::Unknown,
            _ => UnregisterReply::Unclear(Unclear::of(&answer, self.now())),
        })
    }

    /// Exchanges the runner's token for a new one. The old one dies at once, for every runner
    /// manager; running jobs do not notice.
    pub async fn reset_token(&self, token: &Secret) -> Result<ResetReply, Error> {
        let body = TokenBody { token: token.expose(), system_id: None };
        let path = "runners/reset_authentication_token";
        let ask = Ask::json(Method::POST, path, &body, self.timeouts())?.accept_json();
        let answer = self.0.exchange(ask).await?.unless_html()?;
        Ok(match answer.status {
            201 => ResetReply::Done(self.credentials(answer)?),
            403 => ResetReply::Refused,
            _ => ResetReply::Unclear(Unclear::of(&answer, self.now())),
        })
    }

    pub(super) fn credentials(&self, answer: Answer) -> Result<Credentials, Error> {
        let (call, status) = (answer.call.clone(), answer.status);
        let said: RunnerAnswer = answer.json()?;
        if said.token.expose().is_empty() {
            let fault = "names no token".to_owned();
            return Err(Error::of(call, Cause::Unreadable { status, fault }));
        }
        let now = self.now();
        Ok(Credentials {
            id: said.id,
            expires_at: expiry(&said),
            obtained_at: Timestamp::from_second(now.as_second()).unwrap_or(now),
            token: said.token,
        })
    }
}

/// Reads when the token expires. A date that cannot be read must not cost the token.
fn expiry(said: &RunnerAnswer) -> Option<Timestamp> {
    let text = said.token_expires_at.as_deref().filter(|text| !text.is_empty())?;
    match text.parse() {
        Ok(time) => Some(time),
        Err(error) => {
            tracing::warn!(%error, "GitLab's expiry date of the runner token cannot be read");
            None
        }
    }
}
