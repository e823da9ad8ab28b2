//! Answers as GitLab words them.

use std::io;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};

pub(super) const TOO_MANY: &str = "{\"message\":{\"error\":\"This endpoint has been requested \
     too many times. Try again later.\"}}";

/// An answer before it becomes HTTP, so that a fault can still bend it.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) content_type: &'static str,
    pub(super) body: Bytes,
}

impl Reply {
    pub(super) fn json(status: u16, body: impl Into<Bytes>) -> Self {
        let body = body.into();
        Self { status, headers: Vec::new(), content_type: "application/json", body }
    }

    /// Answers with the status code as text, as PUT does.
    pub(super) fn plain(status: u16) -> Self {
        let body = Bytes::from(status.to_string());
        Self { status, headers: Vec::new(), content_type: "text/plain", body }
    }

    pub(super) fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), content_type: "", body: Bytes::new() }
    }

    /// `{"message": …}`.
    pub(super) fn message(status: u16, message: &str) -> Self {
        Self::json(status, serde_json::json!({ "message": message }).to_string())
    }

    /// `{"error": …}`.
    pub(super) fn error(status: u16, error: &str) -> Self {
        Self::json(status, serde_json::json!({ "error": error }).to_string())
    }

    pub(super) fn forbidden() -> Self {
        Self::message(403, "403 Forbidden")
    }

    pub(super) fn too_many(seconds: u64) -> Self {
        Self::json(429, TOO_MANY).with("Retry-After", seconds.to_string())
    }

    #[must_use]
    pub(super) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(super) fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.body));
        *response.status_mut() =
            StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        if !self.content_type.is_empty() {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        }
        for (name, value) in self.headers {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name, value);
            }
        }
        response
    }

    /// Announces the whole body, sends half of it and breaks the connection.
    pub(super) fn into_truncated(self) -> Response {
        let whole = self.body.len();
        let half = self.body.slice(..whole / 2);
        let broken = stream::once(async {
            // The first half is flushed only when the body has nothing to give for a moment.
            tokio::task::yield_now().await;
            Err(io::Error::from(io::ErrorKind::ConnectionReset))
        });
        let body = Body::from_stream(stream::once(async { Ok(half) }).chain(broken));
        let (mut parts, _) = self.into_response().into_parts();
        parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(whole.max(1)));
        Response::from_parts(parts, body)
    }
}
