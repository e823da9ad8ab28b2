//! `bridge db`: looking after the database.

use anyhow::Context as _;
use camino::Utf8PathBuf;
use clap::{Args, Subcommand};
use jiff::Timestamp;

use crate::cli::Context;
use crate::cli::exit::Exit;
use crate::daemon;
use crate::domain::clock::{Clock as _, SystemClock};

/// Check, back up and prune the database
#[derive(Debug, Args)]
pub struct DbArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Have SQLite check every page, and every row its references
    Check,
    /// Copy the database into a new file, also while the daemon runs
    Backup(BackupArgs),
    /// Remove jobs that are over and owed nothing, with their traces
    Prune(PruneArgs),
}

#[derive(Debug, Args)]
struct BackupArgs {
    /// The file to write; it must not exist. It holds the secrets of jobs that are not over
    to: Utf8PathBuf,
}

#[derive(Debug, Args)]
struct PruneArgs {
    /// Only jobs received longer ago than this ("30 days"); the configuration's retention if not given
    #[arg(long, value_name = "SPAN")]
    older_than: Option<String>,
}

impl DbArgs {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the configuration or the database cannot be read.
    pub async fn run(self, context: &Context) -> anyhow::Result<Exit> {
        let (store, config) = context.attach().await?;
        let output = &context.output;
        match self.command {
            Command::Check => {
                let findings = store.check().await?;
                if findings.is_empty() {
                    output.note(&format!(
                        "{}: schema {}, no damage found",
                        store.path(),
                        store.schema().await?
                    ))?;
                    return Ok(Exit::Done);
                }
                for finding in findings {
                    output.line(&finding)?;
                }
                Ok(Exit::Unexpected)
            }
            Command::Backup(args) => {
                anyhow::ensure!(!args.to.exists(), "write {}: it exists already", args.to);
                store.backup(&args.to).await?;
                output.note(&format!("{} copied to {}", store.path(), args.to))?;
                Ok(Exit::Done)
            }
            Command::Prune(args) => {
                let span = match &args.older_than {
                    Some(text) => {
                        let span: jiff::Span = text
                            .parse()
                            .with_context(|| format!("read {text:?} as a time span"))?;
                        std::time::Duration::try_from(
                            span.to_duration(jiff::SpanRelativeTo::days_are_24_hours())?,
                        )?
                    }
                    None => config.retention,
                };
                let before = SystemClock.now().checked_sub(span).unwrap_or(Timestamp::MIN);
                let removed = daemon::prune(&store, &config.state_dir, before).await?;
                output.note(&format!("{removed} jobs removed"))?;
                Ok(Exit::Done)
            }
        }
    }
}
