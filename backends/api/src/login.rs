//! Logging in to a system that wants a person to agree now and then.
//!
//! Most backends have no logins: who may use them is whoever runs bridge. One that has some offers
//! [`Driver::login`](crate::Driver::login) and says with [`Backend::login`](crate::Backend::login) how
//! the one that it uses stands.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use crate::error::{BackendError, OpenError, Remedy};

/// What a person is to do so that bridge may act for him.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invitation {
    /// The address to open in a browser.
    pub address: String,
    /// The code that is shown or asked for there.
    pub code: String,
    /// How long it is good.
    pub lives: Duration,
}

/// Passes the invitation on to the person; called once, unless the login fails before.
pub type Invite = Box<dyn FnOnce(Invitation) + Send>;

/// How a login stands. What time is left is by the other side's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// Who we are over there, for people.
    pub who: String,
    /// Until it ends, unless somebody renews it; `None` when nothing says so.
    pub left: Option<Duration>,
    /// Whether somebody should renew it now.
    pub ends_soon: bool,
    /// What renews it.
    pub remedy: Remedy,
}

/// Why nobody was logged in.
#[derive(Debug)]
pub enum LoginError {
    /// The backend's settings cannot be used for it.
    Settings(OpenError),
    /// It was tried, or could not be.
    Failed(BackendError),
}

/// A login under way.
pub type LoggingIn = Pin<Box<dyn Future<Output = Result<Login, LoginError>> + Send>>;

impl fmt::Display for LoginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Settings(error) => error.fmt(f),
            Self::Failed(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for LoginError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Settings(error) => error.source(),
            Self::Failed(error) => error.source(),
        }
    }
}

impl From<OpenError> for LoginError {
    fn from(error: OpenError) -> Self {
        Self::Settings(error)
    }
}

impl From<BackendError> for LoginError {
    fn from(error: BackendError) -> Self {
        Self::Failed(error)
    }
}
