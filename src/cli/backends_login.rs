//! `bridge backends login`: a person lets bridge use a backend.
//!
//! What the person is to do goes to standard output, so that it is there without a terminal as well; how
//! it went follows. A daemon that runs takes the new login up by itself.

use bridge_backend::{ErrorKind, Fault, Invitation, Login, LoginError};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::Context;
use super::backends::find;
use super::exit::{Exit, Failure};
use super::output::printable;
use crate::config::Config;
use crate::domain::policy;
use crate::logins;

/// Logs in to one backend.
pub(super) async fn run(context: &Context, config: &Config, name: &str) -> anyhow::Result<Exit> {
    let (name, entry) = find(config, name)?;
    let (invite, invited) = oneshot::channel::<Invitation>();
    let invite = Box::new(move |invitation| {
        if invite.send(invitation).is_err() {
            // Nobody is there any more who could follow it.
            tracing::debug!("the invitation came too late");
        }
    });
    let Some(logging_in) = context.registry.log_in(entry, invite)? else {
        let what = format!(
            "log in to the backend {:?}: a backend of kind {:?} has no logins",
            name.0, entry.kind
        );
        let hint = "whoever runs bridge may use it; `bridge backends check` says whether it works";
        return Err(Failure::new(Exit::Usage, what).hint(hint).into());
    };
    let show = async {
        match invited.await {
            Ok(invitation) => context.output.line(&text_of(&invitation, context.clock.now())),
            Err(_it_failed_before) => Ok(()),
        }
    };
    let both = async { tokio::join!(logging_in, show) };
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    // Dropped halfway, nobody is logged in, and the old login stays as it is.
    let (done, shown) = tokio::select! {
        both = both => both,
        _ = int.recv() => return Err(interrupted(&name.0).into()),
        _ = term.recv() => return Err(interrupted(&name.0).into()),
    };
    shown?;
    let login = done.map_err(|error| failure(&name.0, error))?;
    context.output.line(&printable(&success(&login, context.clock.now())))?;
    if login.ends_soon {
        let text = format!("warning: {}", logins::ends_soon(name, &login));
        context.output.note(&text)?;
    }
    Ok(Exit::Done)
}

fn text_of(invitation: &Invitation, now: Timestamp) -> String {
    format!(
        "Open {}\nand agree; the code there must be {}.\nWaiting for that until {} (for {}).",
        printable(&invitation.address),
        printable(&invitation.code),
        clock(policy::after(now, invitation.lives)),
        logins::roughly(invitation.lives),
    )
}

fn success(login: &Login, now: Timestamp) -> String {
    let until = match login.left {
        Some(left) => format!(
            " until {} (for {}); renewing does not prolong that",
            clock(policy::after(now, left)),
            logins::roughly(left)
        ),
        None => String::new(),
    };
    format!("Logged in as {}{until}.", login.who)
}

/// A time for people, to the minute, in their zone.
fn clock(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M %Z").to_string()
}

fn interrupted(name: &str) -> Failure {
    let what = format!("log in to the backend {name:?}: it was interrupted; nothing has changed");
    Failure::new(Exit::Unexpected, what)
}

fn failure(name: &str, error: LoginError) -> Failure {
    let what = format!("log in to the backend {name:?}");
    match error {
        LoginError::Settings(error) => Failure::new(Exit::Configuration, what)
            .hint("look at [backends.NAME] and its `token_file`")
            .source(error),
        LoginError::Failed(error) => {
            let hint = match error.kind() {
                ErrorKind::Transient => "try again; if it stays, look at `url`, proxy and firewall",
                ErrorKind::Rejected(Fault::Site | Fault::Job)
                | ErrorKind::Ambiguous
                | ErrorKind::Lost => "ask whoever runs the backend's system",
            };
            Failure::new(Exit::Backend, what).hint(hint).source(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bridge_backend::Remedy;

    use super::*;

    #[test]
    fn an_invitation_cannot_steer_the_terminal() {
        let invitation = Invitation {
            address: "https://dirac.example/device?user_code=A".into(),
            code: "AB\u{1b}[2J".into(),
            lives: Duration::from_secs(600),
        };
        let text = text_of(&invitation, Timestamp::UNIX_EPOCH);
        assert!(text.starts_with("Open https://dirac.example/device?user_code=A\n"), "{text}");
        assert!(text.contains("AB\u{fffd}[2J") && text.contains("(for 10 minutes)"), "{text}");
    }

    #[test]
    fn a_login_says_whose_it_is_and_when_it_ends() {
        let login = |left| Login {
            who: "robot, VO v, group g".into(),
            left,
            ends_soon: false,
            remedy: Remedy::Login,
        };
        let text = success(&login(Some(Duration::from_secs(3 * 86_400))), Timestamp::UNIX_EPOCH);
        assert!(text.contains("robot, VO v, group g until 1970-01-04"), "{text}");
        assert!(text.contains("(for 3 days)"), "{text}");
        assert_eq!(
            success(&login(None), Timestamp::UNIX_EPOCH),
            "Logged in as robot, VO v, group g."
        );
    }
}
