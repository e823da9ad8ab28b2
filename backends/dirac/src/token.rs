//! The token with which DiracX is asked: kept, renewed in time, and missed clearly.
//!
//! A refresh token of a login is good for one use. Used twice it costs all tokens of its user, and if
//! the answer to its use is lost, so is the login. So there is one renewal at a time, it runs to its end
//! even when nobody waits for it any more, and the new token is durable before it is used. A token whose
//! use is in doubt is looked up before it is used again.
//!
//! All times are compared with the server's clock, as it stands in its answers. Until the first of them
//! a token counts as good: the server says if it is not.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::{Duration, Instant};

use bridge_backend::{Login, Remedy};
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

/// Between two attempts to renew a token that still lives, or two looks at a file that did not help: a
/// server that is away must not keep everybody waiting in line.
const AGAIN: Duration = Duration::from_secs(10);

/// How old the last look at the file may be while its token is good.
const LOOK: Duration = Duration::from_secs(5);

/// A login that ends sooner than this should be renewed now, in seconds: it takes a person, and no
/// weekend may lie between. Renewing its tokens does not put its end off.
const LOGIN_SOON: i64 = 3 * 24 * 3600;

/// The same of a proxy: a job of cron renews it long before, and if it has not by now it never will.
const PROXY_SOON: i64 = 3600;

/// Gives tokens.
#[derive(Debug)]
pub(crate) struct Tokens {
    place: Arc<Place>,
    client: Arc<Client>,
    state: Arc<Mutex<State>>,
    /// Of the token that was last given or read.
    seen: Arc<StdMutex<Option<Seen>>>,
    /// Renewals, which nobody may drop.
    tasks: TaskTracker,
}

/// Where the token lies, and whose it must be.
#[derive(Debug)]
struct Place {
    path: Utf8PathBuf,
    vo: Option<String>,
    group: Option<String>,
    timeout: Duration,
}

#[derive(Debug, Default)]
struct State {
    held: Option<(Held, Stamp)>,
    /// When the file was last looked at.
    looked: Option<Instant>,
    /// The file whose refresh token is no good any more, and why.
    lost: Option<(Stamp, String)>,
    /// When a renewal last failed for reasons that pass, and what they were.
    failed: Option<(Instant, String)>,
    /// Refresh tokens that were used, by their names: whatever puts one of them back into the file, it
    /// must not be used again.
    spent: BTreeSet<String>,
    /// The refresh token that was used without an answer.
    doubt: Option<String>,
}

#[derive(Clone, Debug)]
struct Seen {
    who: String,
    ends: i64,
    form: Form,
}

impl Seen {
    fn login(self, client: &Client) -> Login {
        let left = client.server_time().map(|now| self.ends.saturating_sub(now.as_second()));
        let soon = match self.form {
            Form::Credentials => Some(LOGIN_SOON),
            Form::Proxy => Some(PROXY_SOON),
            // As short as its maker wants it; what matters is that he makes the next one in time.
            Form::Plain => None,
        };
        Login {
            who: self.who,
            left: left.map(|left| Duration::from_secs(u64::try_from(left).unwrap_or(0))),
            ends_soon: left.zip(soon).is_some_and(|(left, soon)| left < soon),
            remedy: self.form.remedy(),
        }
    }
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
    Foreign { path: Utf8PathBuf, form: Form, what: &'static str, got: String, wanted: String },
    /// Nobody but a person can help.
    #[error("log in to DIRAC with {path}: {why}")]
    Lost { path: Utf8PathBuf, form: Form, why: String },
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
    /// Says what somebody must do; `None` when it goes by itself.
    pub(crate) fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::File(error) => Some(error.remedy()),
            Self::Foreign { form, .. } | Self::Lost { form, .. } => Some(form.remedy()),
            Self::Unanswered { source, .. } => source.remedy(),
            Self::Refused { .. } | Self::Busy { .. } => None,
        }
    }
}

/// The answer to a login and to a renewal.
#[derive(Debug, Deserialize)]
pub(crate) struct Granted {
    pub(crate) access_token: SecretString,
    pub(crate) refresh_token: Option<SecretString>,
}

impl Place {
    /// Reads and checks the file.
    async fn read(self: &Arc<Self>) -> Result<(Held, Stamp), TokenError> {
        let place = Arc::clone(self);
        let read = tokio::task::spawn_blocking(move || token_file::read(&place.path)).await;
        let (held, stamp) = read.map_err(|error| self.refused(error.to_string()))??;
        self.fits(&held)?;
        Ok((held, stamp))
    }

    fn fits(&self, held: &Held) -> Result<(), TokenError> {
        for (what, wanted, got) in
            [("VO", &self.vo, &held.claims.vo), ("group", &self.group, &held.claims.dirac_group)]
        {
            if let Some(wanted) = wanted
                && wanted != got
            {
                let (path, got, wanted) = (self.path.clone(), got.clone(), wanted.clone());
                return Err(TokenError::Foreign { path, form: held.form, what, got, wanted });
            }
        }
        Ok(())
    }

    fn lost(&self, form: Form, why: String) -> TokenError {
        TokenError::Lost { path: self.path.clone(), form, why }
    }

    fn refused(&self, why: String) -> TokenError {
        TokenError::Refused { path: self.path.clone(), why }
    }
}

impl Tokens {
    pub(crate) fn new(config: &Config, client: Arc<Client>) -> Self {
        let place = Place {
            path: config.token_file.clone(),
            vo: config.vo.clone(),
            group: config.group.clone(),
            timeout: config.request_timeout,
        };
        Self {
            place: Arc::new(place),
            client,
            state: Arc::default(),
            seen: Arc::default(),
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

    /// Reads the file, whether or not what it held before is still good.
    pub(crate) async fn look(&self) -> Result<(), TokenError> {
        let (held, stamp) = self.place.read().await?;
        let mut state = self.state.lock().await;
        self.adopt(&mut state, held, stamp);
        Ok(())
    }

    /// Says how the login stands whose token was last given.
    pub(crate) fn login(&self) -> Option<Login> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        Some(seen.login(&self.client))
    }

    /// Takes what is in the file if it is not what was there before.
    fn adopt(&self, state: &mut State, held: Held, stamp: Stamp) {
        state.looked = Some(Instant::now());
        if state.held.as_ref().is_some_and(|(_, before)| *before == stamp) {
            return;
        }
        note(&self.seen, &held);
        state.failed = None;
        state.held = Some((held, stamp));
    }

    async fn get(&self, refused: Option<&Token>) -> Result<Token, TokenError> {
        let mut state = Arc::clone(&self.state).lock_owned().await;
        let good = |held: &Held| match (self.client.server_time(), refused) {
            (_, Some(refused)) => held.access.expose_secret() != refused.access.expose_secret(),
            (Some(now), None) => held.claims.exp - now.as_second() >= RENEW_BEFORE,
            (None, None) => true,
        };
        // By the server's clock: whether it is good for now, although it should be renewed.
        let alive = |held: &Held| {
            refused.is_none()
                && self.client.server_time().is_none_or(|now| held.claims.exp > now.as_second())
        };
        if let Some((held, _)) = &state.held
            && good(held)
            && state.looked.is_some_and(|at| at.elapsed() < LOOK)
        {
            return Ok(token_of(held));
        }
        // Somebody may have put another one there.
        match self.place.read().await {
            Ok((held, stamp)) => self.adopt(&mut state, held, stamp),
            Err(error) => {
                let living = state.held.as_ref().map(|(held, _)| held).filter(|held| alive(held));
                let Some(token) = living.map(token_of) else { return Err(error) };
                // `check` says what is wrong with the file; the jobs go on meanwhile.
                state.looked = Some(Instant::now());
                return Ok(token);
            }
        }
        let Some((held, stamp)) = state.held.clone() else {
            return Err(self.place.refused("there is no token".to_owned()));
        };
        if good(&held) {
            return Ok(token_of(&held));
        }
        let alive = alive(&held);
        match self.renew(state, held.clone(), stamp).await {
            Err(error) if alive => {
                let error: &dyn std::error::Error = &error;
                tracing::debug!(path = %self.place.path, error, "token not renewed, the old one lives");
                Ok(token_of(&held))
            }
            renewed => renewed,
        }
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
            return Err(self.place.lost(held.form, why.clone()));
        }
        if let Some((at, why)) = &state.failed
            && at.elapsed() < AGAIN
        {
            return Err(self.place.refused(why.clone()));
        }
        let renewable = held.refresh.clone().filter(|_| {
            // One that changes with each use would have to be written there.
            held.form != Form::Proxy
                || held.refresh_claims().is_some_and(|claims| claims.legacy_exchange)
        });
        let Some(refresh) = renewable else {
            let why = match held.form {
                Form::Proxy => "its proxy has ended; renew the proxy",
                Form::Plain => "the token has expired or is not taken; put a new one there",
                Form::Credentials => "the token has expired or is not taken",
            };
            return Err(self.place.lost(held.form, why.to_owned()));
        };
        let renewal = Renewal {
            place: Arc::clone(&self.place),
            client: Arc::clone(&self.client),
            seen: Arc::clone(&self.seen),
        };
        // Its end is awaited here, but not ended with this: half a renewal is a lost login.
        let task = self.tasks.spawn(renewal.run(state, held, stamp, refresh));
        task.await.map_err(|error| self.place.refused(error.to_string()))?
    }
}

fn token_of(held: &Held) -> Token {
    Token { access: held.access.clone(), claims: held.claims.clone() }
}

/// Says whose login it is, for people.
pub(crate) fn who(claims: &Claims) -> String {
    format!("{}, VO {}, group {}", claims.preferred_username, claims.vo, claims.dirac_group)
}

/// Says how a new login stands.
pub(crate) fn standing(held: &Held, client: &Client) -> Login {
    seen_of(held).login(client)
}

fn seen_of(held: &Held) -> Seen {
    let ends = held.refresh_claims().map_or(held.claims.exp, |claims| claims.exp);
    Seen { who: who(&held.claims), ends, form: held.form }
}

fn note(seen: &StdMutex<Option<Seen>>, held: &Held) {
    *seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen_of(held));
}

/// One use of a refresh token.
struct Renewal {
    place: Arc<Place>,
    client: Arc<Client>,
    seen: Arc<StdMutex<Option<Seen>>>,
}

impl Renewal {
    async fn run(
        self,
        mut state: OwnedMutexGuard<State>,
        held: Held,
        stamp: Stamp,
        refresh: SecretString,
    ) -> Result<Token, TokenError> {
        let doubted = state.doubt.is_some();
        let done = self.once(&mut state, held, stamp, refresh).await;
        match &done {
            Ok(_) => state.failed = None,
            Err(TokenError::Lost { path, why, .. }) => {
                tracing::error!(%path, why, "the login is lost");
            }
            // The other program is done in a moment.
            Err(TokenError::Busy { .. }) => {}
            Err(error) if error.remedy().is_none() => {
                let mut text = error.to_string();
                let mut cause = std::error::Error::source(error);
                while let Some(error) = cause {
                    text = format!("{text}: {error}");
                    cause = error.source();
                }
                tracing::warn!(error = text, "a token was not renewed, and is tried again");
                // A doubt that is new is cleared up at once.
                if doubted || state.doubt.is_none() {
                    state.failed = Some((Instant::now(), text));
                }
            }
            Err(_for_a_person) => {}
        }
        done
    }

    async fn once(
        &self,
        state: &mut State,
        mut held: Held,
        mut stamp: Stamp,
        mut refresh: SecretString,
    ) -> Result<Token, TokenError> {
        let mut locked = None;
        if held.form == Form::Credentials {
            let place = Arc::clone(&self.place);
            let opened = tokio::task::spawn_blocking(move || -> Result<_, FileError> {
                let Some(locked) = Locked::open(&place.path)? else { return Ok(None) };
                // Another program may have renewed it just before.
                Ok(Some((locked, token_file::read(&place.path)?)))
            });
            let opened = opened.await.map_err(|error| self.place.refused(error.to_string()))??;
            let Some((lock, (now, seen))) = opened else {
                return Err(TokenError::Busy { path: self.place.path.clone() });
            };
            self.place.fits(&now)?;
            if now.access.expose_secret() != held.access.expose_secret()
                && now.claims.exp > held.claims.exp
            {
                note(&self.seen, &now);
                state.held = Some((now.clone(), seen));
                return Ok(token_of(&now));
            }
            if let Some(theirs) = &now.refresh {
                refresh = theirs.clone();
                held.refresh = Some(theirs.clone());
            }
            stamp = seen;
            locked = Some(lock);
        }
        let granted = self.use_up(state, &held, stamp, &refresh).await?;
        let claims = token_file::claims(granted.access_token.expose_secret())
            .ok_or_else(|| self.place.refused("the answer holds no token of DiracX".to_owned()))?;
        // The old one stays good where the answer has no new one.
        let refresh = granted.refresh_token.unwrap_or(refresh);
        if let Some(locked) = locked {
            let (access, refresh, expires) =
                (granted.access_token.clone(), refresh.clone(), claims.exp - 15);
            let written =
                tokio::task::spawn_blocking(move || locked.write(&access, &refresh, expires));
            let written = written.await.map_err(|error| self.place.refused(error.to_string()))?;
            stamp = match written {
                Ok(stamp) => stamp,
                Err(error) => {
                    // It works until this process ends; then the login is lost. Better than losing it
                    // now.
                    let error: &dyn std::error::Error = &error;
                    let path = &self.place.path;
                    tracing::error!(%path, error, "the new token could not be kept");
                    token_file::stamp(path)
                }
            };
        }
        held.access = granted.access_token;
        held.refresh = Some(refresh);
        held.claims = claims;
        note(&self.seen, &held);
        state.held = Some((held.clone(), stamp));
        state.lost = None;
        Ok(token_of(&held))
    }

    /// Exchanges a refresh token for new tokens.
    async fn use_up(
        &self,
        state: &mut State,
        held: &Held,
        stamp: Stamp,
        refresh: &SecretString,
    ) -> Result<Granted, TokenError> {
        let lost = |state: &mut State, why: String| {
            // Asked again, it costs the tokens of everybody who shares the user.
            state.lost = Some((stamp, why.clone()));
            state.doubt = None;
            Err(self.place.lost(held.form, why))
        };
        let names = held.refresh_claims();
        // What a proxy gave is good for any number of uses.
        let name = names.as_ref().filter(|claims| !claims.legacy_exchange).map(|c| c.jti.clone());
        if let (Some(claims), Some(now)) = (&names, self.client.server_time())
            && claims.exp <= now.as_second()
        {
            let at = jiff::Timestamp::from_second(claims.exp).unwrap_or_default();
            let what = if held.form == Form::Proxy { "proxy" } else { "login" };
            return lost(state, format!("the {what} ended {at}"));
        }
        if let Some(name) = &name {
            if state.spent.contains(name) {
                return lost(state, "its refresh token was used before".to_owned());
            }
            // An earlier process may have sent it and died before the answer came. Nothing here would
            // know of it, so the server is asked every time.
            match self.is_good(&held.access, name).await? {
                Some(true) => state.doubt = None,
                Some(false) => {
                    let why = "the answer to its last renewal was lost, and the new token with it";
                    return lost(state, why.to_owned());
                }
                // Nobody can look any more, and there is nothing left to lose.
                None => {}
            }
        }
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
        let answer = self.client.send("a new token", request, self.place.timeout).await;
        let answer = answer.map_err(|source| {
            if !matches!(source, CallError::Unsent { .. } | CallError::Untrusted { .. }) {
                state.doubt.clone_from(&name);
            }
            TokenError::Unanswered { path: self.place.path.clone(), source }
        })?;
        if answer.ok() {
            // Its cause would show a part of the token.
            let granted: Granted = answer.json().map_err(|_cause| {
                state.doubt.clone_from(&name);
                self.place.refused("the answer holds no token".to_owned())
            })?;
            if granted.refresh_token.is_some() {
                state.spent.extend(name);
            }
            state.doubt = None;
            return Ok(granted);
        }
        let why = answer.said().to_string();
        if matches!(answer.status, 400..=403) {
            return lost(state, why);
        }
        // Whether it took effect before it failed, nobody says.
        state.doubt.clone_from(&name);
        Err(self.place.refused(why))
    }

    /// Looks whether a refresh token is still good, without using it; `None` when nobody says.
    async fn is_good(&self, access: &SecretString, name: &str) -> Result<Option<bool>, TokenError> {
        let request = self.client.ask(Method::GET, "api/auth/refresh-tokens");
        let request = request.bearer_auth(access.expose_secret());
        let answer = self.client.send("which logins there are", request, self.place.timeout).await;
        let answer = answer
            .map_err(|source| TokenError::Unanswered { path: self.place.path.clone(), source })?;
        if matches!(answer.status, 500..=599) {
            return Err(self.place.refused(answer.said().to_string()));
        }
        if !answer.ok() {
            return Ok(None);
        }
        // Those that were used are not listed.
        let Ok(rows) = answer.json::<Vec<serde_json::Map<String, serde_json::Value>>>() else {
            return Ok(None);
        };
        Ok(Some(rows.iter().flat_map(|row| row.values()).any(|value| value.as_str() == Some(name))))
    }
}
