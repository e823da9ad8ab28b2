//! What the daemon tells about itself: log lines, error chains, metrics.
//!
//! It knows nothing of ours: labels are texts, so that a metric cannot reach into a job. Variables,
//! scripts, tokens, payloads and headers are never logged at any level; their types see to that.

mod chain;
mod metrics;

use std::sync::Arc;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, fmt};

pub use self::chain::Chain;
pub use self::metrics::{
    BuildInfo, CallKind, CallLabels, JobCount, Metrics, RequestGuard, RunnerLabels, RunnerSettings,
    Snapshot,
};

/// The environment variable that holds a log filter; it wins over every level.
pub const FILTER_VAR: &str = "BRIDGE_LOG";

/// Crates below us that say more than an operator wants to read at the same level.
const QUIET: &str = "sqlx=warn,hyper=warn,hyper_util=warn,reqwest=warn,rustls=warn,h2=warn";

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON otherwise.
    #[default]
    Auto,
    /// One line of text each.
    Text,
    /// One JSON object each.
    Json,
}

/// What decides which log lines appear, and how.
#[derive(Clone, Debug, Default)]
pub struct LogOptions {
    /// The value of [`FILTER_VAR`].
    pub filter: Option<String>,
    /// The level from the command line, else from the configuration.
    pub level: Option<String>,
    /// The format from the configuration.
    pub format: LogFormat,
    /// Whether standard error is a terminal.
    pub terminal: bool,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The filter makes no sense.
    #[error("read the log filter {filter:?}")]
    Filter {
        /// As written.
        filter: String,
        /// Why.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// There already is a subscriber in this process.
    #[error("set up logging")]
    Twice(#[source] TryInitError),
}

/// Starts logging to standard error; warnings and errors are counted in `metrics`.
///
/// # Errors
///
/// When the filter cannot be read, or logging was set up before.
pub fn init(options: &LogOptions, metrics: Option<Arc<Metrics>>) -> Result<(), SetupError> {
    let filter = filter(options)?;
    let json = match options.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !options.terminal,
    };
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(options.terminal && !json);
    let lines = if json {
        lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed()
    } else {
        lines.boxed()
    };
    let count = metrics.map(CountEvents);
    tracing_subscriber::registry()
        .with(count)
        .with(lines.with_filter(filter))
        .try_init()
        .map_err(SetupError::Twice)
}

fn filter(options: &LogOptions) -> Result<EnvFilter, SetupError> {
    let text = match &options.filter {
        Some(filter) if !filter.is_empty() => filter.clone(),
        _ => {
            let level = options.level.as_deref().unwrap_or("info");
            format!("{level},{QUIET}")
        }
    };
    EnvFilter::try_new(&text).map_err(|source| SetupError::Filter { filter: text, source })
}

/// Counts what an operator should look at, whether or not a line appears.
struct CountEvents(Arc<Metrics>);

impl<S: Subscriber> Layer<S> for CountEvents {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let level = *event.metadata().level();
        if level == Level::ERROR {
            self.0.error_logged("error");
        } else if level == Level::WARN {
            self.0.error_logged("warning");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_of_the_environment_wins_over_a_level() {
        let options = LogOptions {
            filter: Some("bridge::store=trace".into()),
            level: Some("error".into()),
            ..LogOptions::default()
        };
        assert_eq!(filter(&options).unwrap().to_string(), "bridge::store=trace");
        let plain = filter(&LogOptions::default()).unwrap().to_string();
        assert!(plain.contains("info") && plain.contains("sqlx=warn"), "{plain}");
    }

    #[test]
    fn a_filter_that_makes_no_sense_is_an_error_that_shows_it() {
        let options = LogOptions { filter: Some("bridge=loud".into()), ..LogOptions::default() };
        let error = filter(&options).unwrap_err();
        insta::assert_snapshot!(
            Chain(&error),
            @r#"read the log filter "bridge=loud": error parsing level filter: expected one of "off", "error", "warn", "info", "debug", "trace", or a number 0-5"#
        );
    }

    #[test]
    fn warnings_and_errors_are_counted() {
        let metrics = Arc::new(Metrics::new(&BuildInfo::default()));
        let subscriber = tracing_subscriber::registry().with(CountEvents(Arc::clone(&metrics)));
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!("an error");
            tracing::warn!("a warning");
            tracing::warn!("another");
            tracing::info!("nothing");
        });
        let text = metrics.render(&Snapshot::default());
        assert!(text.contains("gitlab_runner_errors_total{level=\"error\"} 1\n"), "{text}");
        assert!(text.contains("gitlab_runner_errors_total{level=\"warning\"} 2\n"), "{text}");
    }
}
