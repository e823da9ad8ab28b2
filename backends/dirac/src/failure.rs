//! What a failed call means for the job, and whose move it is.

use bridge_backend::{BackendError, ErrorKind, Fault, Remedy};

use crate::client::{Answer, CallError, Nonsense};
use crate::token::TokenError;

/// Why DiracX could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// There is no token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// There is no answer.
    #[error(transparent)]
    Call(#[from] CallError),
}

impl AskError {
    /// Says what the operator must do; `None` when it goes by itself.
    pub(crate) fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Token(error) => error.remedy(),
            Self::Call(error) => error.remedy(),
        }
    }
}

/// Reads a call to a server of which nothing is known yet.
pub(crate) fn unreached(error: CallError) -> BackendError {
    match error.remedy() {
        Some(remedy) => site("use the DiracX server").with_source(error).with_remedy(remedy),
        None => transient("reach the DiracX server").with_source(error),
    }
}

/// Makes an error that goes by itself.
pub(crate) fn transient(context: &'static str) -> BackendError {
    BackendError::new(ErrorKind::Transient, context)
}

/// Makes an error for the operator.
pub(crate) fn site(context: &'static str) -> BackendError {
    BackendError::new(ErrorKind::Rejected(Fault::Site), context)
}

/// Reads a missing answer to a question. Jobs wait while there is no token: it comes back, and then
/// they go on.
pub(crate) fn unasked(context: &'static str) -> impl Fn(AskError) -> BackendError {
    move |error| {
        let remedy = error.remedy();
        remedied(transient(context).with_source(error), remedy)
    }
}

/// Adds what the operator must do, if he must.
pub(crate) fn remedied(error: BackendError, remedy: Option<Remedy>) -> BackendError {
    match remedy {
        Some(remedy) => error.with_remedy(remedy),
        None => error,
    }
}

/// Reads an answer to a question that was not granted.
pub(crate) fn refused(context: &'static str, answer: &Answer) -> BackendError {
    let mut error = transient(context).with_source(answer.said());
    if answer.status == 401 {
        // Not even with a token that was renewed just now.
        error = error.with_remedy(Remedy::Login);
    }
    match answer.retry_after {
        Some(wait) => error.with_retry_after(wait),
        None => error,
    }
}

/// Reads an answer that makes no sense.
pub(crate) fn nonsense(context: &'static str) -> impl Fn(Nonsense) -> BackendError {
    move |error| transient(context).with_source(error)
}
