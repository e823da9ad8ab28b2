//! The token with which DiracX is asked: kept, renewed in time, and missed clearly.
//!
//! A refresh token of a login is good for one use. Used twice it costs all tokens of its user, and if
//! the answer to its use is lost, so is the login. So there is one renewal at a time, it runs to its end
//! even when nobody waits for it any more, and the new token is durable before it is used.

use std::sync::Arc;

use camino::Utf8PathBuf;
use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio_util::task::TaskTracker;

use crate::client::{CallError, Client};
use crate::config::Config;
use crate::token_file::{self, Claims, FileError, Form, Held, Locked, Stamp};

/// The id of every program that is not a web application.
pub(crate) const CLIENT_ID: &str = "myDIRACClientID";

/// Renewed when less than this is left, in seconds; DIRAC's own programs do the same.
const RENEW_BEFORE: i64 = 300;

/// Gives tokens.
#[derive(Debug)]
pub(crate) struct Tokens {
    path: Utf8PathBuf,
    vo: Option<String>,
    group: Option<String>,
    client: Arc<Client>,
    state: Arc<Mutex<State>>,
    /// Renewals, which nobody may drop.
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct State {
    held: Option<(Held, Stamp)>,
    /// The file whose refresh token is no good any more, and why.
    lost: Option<(Stamp, String)>,
}

/// A token, and what it says of itself.
#[derive(Clone, Debug)]
pub(crate) struct Token {
    pub(crate) access: SecretString,
    pub(crate) claims: Claims,
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("use the token in {path}: it is for the {what} {got:?}, not for {wanted:?}")]
    Foreign { path: Utf8PathBuf, what: &'static str, got: String, wanted: String },
    /// Nobody but a person can help.
    #[error("log in to DIRAC: {why}; renew {path}, by `bridge backends login` if it is a login")]
    Lost { path: Utf8PathBuf, why: String },
    #[error("renew the token in {path}")]
    Unanswered {
        path: Utf8PathBuf,
        #[source]
        source: CallError,
    },
    #[error("renew the token in {path}: {why}")]
    Refused { path: Utf8PathBuf, why: String },
    #[error("renew the token in {path}: another program is at it")]
    Busy { path: Utf8PathBuf },
}

impl TokenError {
    /// Says whether somebody must act.
    pub(crate) fn needs_a_person(&self) -> bool {
        match self {
            Self::File(_) | Self::Foreign { .. } | Self::Lost { .. } => true,
            Self::Unanswered { .. } | Self::Refused { .. } | Self::Busy { .. } => false,
        }
    }
}

/// The answer to a login and to a renewal.
#[derive(Debug, Deserialize)]
pub(crate) struct Granted {
    pub(crate) access_token: SecretString,
    pub(crate) refresh_token: Option<SecretString>,
}

impl Tokens {
    pub(crate) fn new(config: &Config, client: Arc<Client>) -> Self {
        Self {
            path: config.token_file.clone(),
            vo: config.vo.clone(),
            group: config.group.clone(),
            client,
            state: Arc::default(),
            tasks: TaskTracker::new(),
        }
    }

    /// Gives a token that is good for a while, as far as the server's clock is known.
    pub(crate) async fn token(&self) -> Result<Token, TokenError> {
        self.get(None).await
    }

    /// Gives another token than one that the server did not take.
    pub(crate) async fn other_than(&self, refused: &Token) -> Result<Token, TokenError> {
        self.get(Some(refused)).await
    }

    async fn get(&self, refused: Option<&Token>) -> Result<Token, TokenError> {
        let mut state = Arc::clone(&self.state).lock_owned().await;
        let good = |held: &Held| {
            let tired = match (self.client.server_time(), refused) {
                (_, Some(refused)) => held.access.expose_secret() == refused.access.expose_secret(),
                (Some(now), None) => held.claims.exp - now.as_second() < RENEW_BEFORE,
                (None, None) => false,
            };
            !tired
        };
        if let Some((held, _)) = &state.held
            && good(held)
        {
            return Ok(token_of(held));
        }
        // Somebody may have put another one there.
        let (held, stamp) = self.read().await?;
        let newer = state.held.as_ref().is_none_or(|(old, old_stamp)| {
            *old_stamp != stamp && (held.claims.exp >= old.claims.exp || held.form == Form::Plain)
        });
        if newer {
            state.held = Some((held, stamp));
        }
        let Some((held, stamp)) = state.held.clone() else {
            return Err(self.lost("there is no token".to_owned()));
        };
        if good(&held) {
            return Ok(token_of(&held));
        }
        // By the server's clock: whether it is good for now, although it should be renewed.
        let alive = refused.is_none()
            && self.client.server_time().is_none_or(|now| held.claims.exp > now.as_second());
        let renewed = self.renew(state, held.clone(), stamp).await;
        match renewed {
            Err(error) if alive => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(path = %self.path, error, "token not renewed, the old one still lives");
                Ok(token_of(&held))
            }
            renewed => renewed,
        }
    }

    /// Reads and checks the file.
    async fn read(&self) -> Result<(Held, Stamp), TokenError> {
        let path = self.path.clone();
        let read = tokio::task::spawn_blocking(move || token_file::read(&path)).await;
        let (held, stamp) = read.map_err(|error| self.refused(error.to_string()))??;
        for (what, wanted, got) in
            [("VO", &self.vo, &held.claims.vo), ("group", &self.group, &held.claims.dirac_group)]
        {
            if let Some(wanted) = wanted
                && wanted != got
            {
                let (path, got, wanted) = (self.path.clone(), got.clone(), wanted.clone());
                return Err(TokenError::Foreign { path, what, got, wanted });
            }
        }
        Ok((held, stamp))
    }

    fn lost(&self, why: String) -> TokenError {
        TokenError::Lost { path: self.path.clone(), why }
    }

    fn refused(&self, why: String) -> TokenError {
        TokenError::Refused { path: self.path.clone(), why }
    }

    async fn renew(
        &self,
        state: OwnedMutexGuard<State>,
        held: Held,
        stamp: Stamp,
    ) -> Result<Token, TokenError> {
        if let Some((lost, why)) = &state.lost
            && *lost == stamp
        {
            return Err(self.lost(why.clone()));
        }
        let Some(refresh) = held.refresh.clone() else {
            return Err(self.lost("the token has expired or is not taken".to_owned()));
        };
        let renewal = Renewal { path: self.path.clone(), client: Arc::clone(&self.client) };
        // Its end is awaited here, but not ended with this: half a renewal is a lost login.
        let task = self.tasks.spawn(renewal.run(state, held, refresh));
        task.await.map_err(|error| self.refused(error.to_string()))?
    }
}

fn token_of(held: &Held) -> Token {
    Token { access: held.access.clone(), claims: held.claims.clone() }
}

/// One use of a refresh token.
struct Renewal {
    path: Utf8PathBuf,
    client: Arc<Client>,
}

impl Renewal {
    async fn run(
        self,
        mut state: OwnedMutexGuard<State>,
        mut held: Held,
        mut refresh: SecretString,
    ) -> Result<Token, TokenError> {
        let mut locked = None;
        if held.form == Form::Credentials {
            let path = self.path.clone();
            let opened = tokio::task::spawn_blocking(move || -> Result<_, FileError> {
                let Some(locked) = Locked::open(&path)? else { return Ok(None) };
                // Another program may have renewed it just before.
                Ok(Some((locked, token_file::read(&path)?)))
            });
            let opened = opened.await.map_err(|error| self.refused(error.to_string()))??;
            let Some((lock, (now, stamp))) = opened else {
                return Err(TokenError::Busy { path: self.path });
            };
            if now.claims.exp > held.claims.exp {
                state.held = Some((now.clone(), stamp));
                return Ok(token_of(&now));
            }
            if let Some(theirs) = now.refresh {
                refresh = theirs;
            }
            locked = Some(lock);
        }
        let granted = self.ask(&mut state, &refresh).await?;
        let claims = token_file::claims(granted.access_token.expose_secret())
            .ok_or_else(|| self.refused("the answer holds no token of DiracX".to_owned()))?;
        // The old one stays good where the answer has no new one.
        let refresh = granted.refresh_token.unwrap_or(refresh);
        if let Some(locked) = locked {
            let (access, refresh, expires) =
                (granted.access_token.clone(), refresh.clone(), claims.exp - 15);
            let written =
                tokio::task::spawn_blocking(move || locked.write(&access, &refresh, expires));
            let written = written.await.map_err(|error| self.refused(error.to_string()))?;
            if let Err(error) = written {
                // It works until this process ends; then the login is lost. Better than losing it now.
                let error: &dyn std::error::Error = &error;
                tracing::error!(path = %self.path, error, "the new token could not be kept");
            }
        }
        held.access = granted.access_token;
        held.refresh = Some(refresh);
        held.claims = claims;
        if let Some(stamp) = token_file::stamp(&self.path) {
            state.held = Some((held.clone(), stamp));
        }
        state.lost = None;
        Ok(token_of(&held))
    }

    fn refused(&self, why: String) -> TokenError {
        TokenError::Refused { path: self.path.clone(), why }
    }

    async fn ask(&self, state: &mut State, refresh: &SecretString) -> Result<Granted, TokenError> {
        let form = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "refresh_token")
            .append_pair("client_id", CLIENT_ID)
            .append_pair("refresh_token", refresh.expose_secret())
            .finish();
        let request = self
            .client
            .ask(Method::POST, "api/auth/token")
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(form);
        let answer = self.client.send("a new token", request, std::time::Duration::from_secs(60));
        let answer = answer
            .await
            .map_err(|source| TokenError::Unanswered { path: self.path.clone(), source })?;
        if answer.ok() {
            // Its cause would show a part of the token.
            return answer
                .json()
                .map_err(|_cause| self.refused("the answer holds no token".to_owned()));
        }
        let why = answer.said().to_string();
        if matches!(answer.status, 400..=403) {
            // Asked again, it costs the tokens of everybody who shares the user.
            if let Some(stamp) = token_file::stamp(&self.path) {
                state.lost = Some((stamp, why.clone()));
            }
            return Err(TokenError::Lost { path: self.path.clone(), why });
        }
        Err(self.refused(why))
    }
}
