//! Logging in: a person agrees in a browser, and the tokens go into the token file.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bridge_backend::OpenError;
use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use tokio::time::Instant;

use crate::client::{Answer, CallError, Client, Nonsense, Said};
use crate::config::Config;
use crate::token::{CLIENT_ID, Granted};
use crate::token_file::{self, FileError};

/// Between two questions whether the person has agreed.
const PAUSE: Duration = Duration::from_secs(2);

/// What a person is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invitation {
    /// The address to open.
    pub address: String,
    /// The code that is shown there.
    pub code: String,
    /// How long it is good.
    pub lives: Duration,
}

/// Why nobody was logged in.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// The backend's table cannot be used.
    #[error(transparent)]
    Config(#[from] OpenError),
    /// The table does not say for which VO.
    #[error("log in without a `vo` in the backend's settings")]
    NoVo,
    /// The server cannot be asked.
    #[error("ask DiracX")]
    Call(#[source] Problem),
    /// The server refused.
    #[error("log in to DIRAC")]
    Refused(#[source] Problem),
    /// Nobody agreed in time.
    #[error("log in to DIRAC: nobody agreed in time")]
    TooLate,
    /// The file cannot be written.
    #[error("keep the login")]
    File(#[source] Problem),
}

/// A cause, for people.
#[derive(Debug)]
pub struct Problem(Box<dyn std::error::Error + Send + Sync>);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Problem {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

impl From<CallError> for LoginError {
    fn from(error: CallError) -> Self {
        Self::Call(Problem(error.into()))
    }
}

impl From<Nonsense> for LoginError {
    fn from(error: Nonsense) -> Self {
        Self::Refused(Problem(error.into()))
    }
}

impl From<Said> for LoginError {
    fn from(error: Said) -> Self {
        Self::Refused(Problem(error.into()))
    }
}

impl From<FileError> for LoginError {
    fn from(error: FileError) -> Self {
        Self::File(Problem(error.into()))
    }
}

/// The beginning of a login.
#[derive(Deserialize)]
struct Begun {
    user_code: String,
    device_code: SecretString,
    verification_uri: String,
    verification_uri_complete: Option<String>,
    expires_in: u64,
}

/// What is said while nobody has agreed yet.
#[derive(Deserialize)]
struct Waiting {
    error: String,
}

/// Logs in with a backend's table, and writes its `token_file`.
///
/// `invite` is told what the person is to do; the call returns when that was done.
///
/// # Errors
///
/// When the server cannot be asked, refuses, or nobody agrees in time.
pub async fn login(
    table: toml::Table,
    invite: impl FnOnce(Invitation) + Send,
) -> Result<(), LoginError> {
    let config = Config::read(table)?;
    let vo = config.vo.clone().ok_or(LoginError::NoVo)?;
    let scope = match &config.group {
        Some(group) => format!("vo:{vo} group:{group}"),
        None => format!("vo:{vo}"),
    };
    let client = Client::new(&config).map_err(|e| LoginError::Call(Problem(e.into())))?;
    let client = Arc::new(client);
    let query = url::form_urlencoded::Serializer::new(String::new())
        .append_pair("client_id", CLIENT_ID)
        .append_pair("scope", &scope)
        .finish();
    let request = client.ask(Method::POST, &format!("api/auth/device?{query}"));
    let begun: Begun = granted(&client.send("a login", request, config.request_timeout).await?)?;
    let lives = Duration::from_secs(begun.expires_in);
    invite(Invitation {
        address: begun.verification_uri_complete.unwrap_or(begun.verification_uri),
        code: begun.user_code,
        lives,
    });
    let form = url::form_urlencoded::Serializer::new(String::new())
        .append_pair("grant_type", "urn:ietf:params:oauth:grant-type:device_code")
        .append_pair("client_id", CLIENT_ID)
        .append_pair("device_code", begun.device_code.expose_secret())
        .finish();
    let until = Instant::now() + lives;
    while Instant::now() < until {
        let request = client
            .ask(Method::POST, "api/auth/token")
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(form.clone());
        let answer = client.send("a login", request, config.request_timeout).await?;
        let waiting = answer.status == 400
            && answer.json::<Waiting>().is_ok_and(|waiting| {
                matches!(waiting.error.as_str(), "authorization_pending" | "slow_down")
            });
        if waiting {
            tokio::time::sleep(PAUSE).await;
            continue;
        }
        let tokens: Granted = granted(&answer)?;
        let refresh = tokens.refresh_token.unwrap_or_default();
        let access = tokens.access_token;
        let expires_on =
            token_file::claims(access.expose_secret()).map_or(0, |claims| claims.exp - 15);
        let path = config.token_file.clone();
        let written = tokio::task::spawn_blocking(move || {
            token_file::create(&path, &access, &refresh, expires_on)
        });
        written.await.map_err(|error| LoginError::File(Problem(error.into())))??;
        return Ok(());
    }
    Err(LoginError::TooLate)
}

fn granted<T: serde::de::DeserializeOwned>(answer: &Answer) -> Result<T, LoginError> {
    if answer.ok() { Ok(answer.json()?) } else { Err(answer.said().into()) }
}
