//! Logging in: a person agrees in a browser, and the tokens go into the token file.

use std::time::Duration;

use bridge_backend::{BackendError, Invitation, Invite, Login, LoginError, OpenError};
use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use tokio::time::Instant;

use crate::client::{Answer, Client};
use crate::config::Config;
use crate::failure::{site, transient};
use crate::known;
use crate::token::{CLIENT_ID, Granted, standing};
use crate::token_file::{self, FileError, Form, Held, New};

/// Between two questions whether the person has agreed.
const PAUSE: Duration = Duration::from_secs(2);

/// So many failures of the server in a row are its last word.
const FAILURES: u32 = 5;

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

/// A login for which somebody was asked to agree.
struct Asked {
    form: String,
    until: Instant,
    lives: Duration,
}

/// Logs in with a backend's table, and writes its `token_file`.
pub(crate) async fn login(table: toml::Table, invite: Invite) -> Result<Login, LoginError> {
    let config = Config::read(table)?;
    // Before anybody is asked to agree: what cannot be kept is not worth his time.
    let new = blocking(&config, |path| New::beside(&path)).await?;
    let client =
        Client::new(&config).map_err(|error| transient("make connections").with_source(error))?;
    let known = known::ask(&client, &config).await?;
    let wrong = |why| LoginError::Settings(OpenError::Config(why));
    let vo = known.vo(config.vo.as_deref()).map_err(wrong)?;
    known.check(&vo, config.group.as_deref()).map_err(wrong)?;
    let asked = begin(&client, &config, &vo, invite).await?;
    let granted = agreed(&client, &config, &asked).await?;
    let claims = token_file::claims(granted.access_token.expose_secret())
        .ok_or_else(|| site("log in to DIRAC: the answer holds no token of DiracX"))?;
    for (what, wanted, got) in
        [("VO", Some(&vo), &claims.vo), ("group", config.group.as_ref(), &claims.dirac_group)]
    {
        if let Some(wanted) = wanted
            && wanted != got
        {
            let text = format!("log in to DIRAC: the {what} is {got:?} instead of {wanted:?}");
            return Err(BackendError::new(
                bridge_backend::ErrorKind::Rejected(bridge_backend::Fault::Site),
                text,
            )
            .into());
        }
    }
    let (access, refresh) = (granted.access_token.clone(), granted.refresh_token.clone());
    let expires_on = claims.exp - 15;
    let kept = tokio::task::spawn_blocking(move || new.keep(&access, refresh.as_ref(), expires_on));
    kept.await
        .map_err(|error| site("keep the login").with_source(error))?
        .map_err(|error| settings(&error))?;
    let held = Held {
        form: Form::Credentials,
        access: granted.access_token,
        refresh: granted.refresh_token,
        claims,
    };
    Ok(standing(&held, &client))
}

async fn blocking<T: Send + 'static>(
    config: &Config,
    work: impl FnOnce(camino::Utf8PathBuf) -> Result<T, FileError> + Send + 'static,
) -> Result<T, LoginError> {
    let path = config.token_file.clone();
    let done = tokio::task::spawn_blocking(move || work(path)).await;
    done.map_err(|error| site("use the token file").with_source(error))?
        .map_err(|error| settings(&error))
}

/// What is wrong with the file is wrong with the setting that names it.
fn settings(error: &FileError) -> LoginError {
    let error: &dyn std::error::Error = error;
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    LoginError::Settings(OpenError::Config(text))
}

/// Asks for a code, and passes it on.
async fn begin(
    client: &Client,
    config: &Config,
    vo: &str,
    invite: Invite,
) -> Result<Asked, LoginError> {
    let scope = match &config.group {
        Some(group) => format!("vo:{vo} group:{group}"),
        None => format!("vo:{vo}"),
    };
    let query = url::form_urlencoded::Serializer::new(String::new())
        .append_pair("client_id", CLIENT_ID)
        .append_pair("scope", &scope)
        .finish();
    let request = client.ask(Method::POST, &format!("api/auth/device?{query}"));
    let answer = client.send("a login", request, config.request_timeout).await;
    let answer = answer.map_err(|error| transient("reach the DiracX server").with_source(error))?;
    if !answer.ok() {
        return Err(refused(&answer).into());
    }
    let begun: Begun = answer.json().map_err(|error| site("log in to DIRAC").with_source(error))?;
    let lives = Duration::from_secs(begun.expires_in);
    let until = Instant::now() + lives;
    let address = begun.verification_uri_complete.unwrap_or(begun.verification_uri);
    // It is shown on a terminal and opened in a browser.
    let address = url::Url::parse(&address)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| site("log in to DIRAC: the address to open is none"))?;
    invite(Invitation { address: address.into(), code: begun.user_code, lives });
    let form = url::form_urlencoded::Serializer::new(String::new())
        .append_pair("grant_type", "urn:ietf:params:oauth:grant-type:device_code")
        .append_pair("client_id", CLIENT_ID)
        .append_pair("device_code", begun.device_code.expose_secret())
        .finish();
    Ok(Asked { form, until, lives })
}

/// Waits until somebody has agreed.
async fn agreed(client: &Client, config: &Config, asked: &Asked) -> Result<Granted, LoginError> {
    let mut failures = 0;
    while Instant::now() < asked.until {
        let request = client
            .ask(Method::POST, "api/auth/token")
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(asked.form.clone());
        let answer = client.send("a login", request, config.request_timeout).await;
        let failed = match answer {
            Ok(answer) if answer.ok() => {
                // Its cause would show a part of the token.
                return answer
                    .json()
                    .map_err(|_cause| site("log in to DIRAC: the answer holds no token").into());
            }
            Ok(answer) if is_waiting(&answer) => {
                failures = 0;
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            Ok(answer) if answer.status >= 500 || answer.status == 429 => refused(&answer),
            Ok(answer) => return Err(refused(&answer).into()),
            Err(error) => transient("hear whether somebody agreed").with_source(error),
        };
        // A server that is restarted is no reason to ask the person again.
        failures += 1;
        if failures >= FAILURES {
            return Err(failed.into());
        }
        tokio::time::sleep(failed.retry_after().unwrap_or(PAUSE).clamp(PAUSE, PAUSE * 10)).await;
    }
    let minutes = asked.lives.as_secs().div_ceil(60);
    let text =
        format!("log in to DIRAC: nobody agreed within {minutes} minutes, or it was declined");
    Err(BackendError::new(bridge_backend::ErrorKind::Transient, text).into())
}

fn is_waiting(answer: &Answer) -> bool {
    answer.status == 400
        && answer.json::<Waiting>().is_ok_and(|waiting| {
            matches!(waiting.error.as_str(), "authorization_pending" | "slow_down")
        })
}

fn refused(answer: &Answer) -> BackendError {
    let context = "log in to DIRAC";
    match answer.status {
        500 => {
            site("log in to DIRAC: the server failed; whoever agreed may not be a user of this VO")
                .with_source(answer.said())
        }
        429 | 501..=599 => crate::failure::refused(context, answer),
        _ => site(context).with_source(answer.said()),
    }
}
