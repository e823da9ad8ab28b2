//! `bridge db`: looking after the database.

use anyhow::Context as _;
use camino::Utf8PathBuf;
use clap::{Args, Subcommand};
use jiff::Timestamp;

use crate::cli::Context;
use crate::cli::exit::{Exit, Failure};
use crate::cli::serve::{KEY_LOST, key_file_hint};
use crate::daemon;
use crate::domain::clock::{Clock as _, SystemClock};
use crate::store::{self, Lock, LockError, LostRows, OpenError, RekeyError};

/// Check, back up, prune and re-key the database
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
    /// Exchange the key that seals what is stored of jobs; the daemon must be stopped
    Rekey(RekeyArgs),
}

#[derive(Debug, Args)]
struct RekeyArgs {
    /// Go on without what was sealed with a key that is lost; nobody can report those jobs then
    #[arg(long)]
    give_up: bool,
}

#[derive(Debug, Args)]
struct BackupArgs {
    /// The file to write; it must not exist. It holds the secrets of jobs that are not over, sealed:
    /// the key file is needed to use it, and is not in it
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
        if let Command::Rekey(args) = &self.command {
            return rekey(args, context).await;
        }
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
                if !store.wanted_keys().await?.keys.is_empty() {
                    output.note(&format!(
                        "it is of use only with {}, which is not in it: keep a copy elsewhere",
                        config.key_file
                    ))?;
                }
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
            // Done above: it must be alone with the database.
            Command::Rekey(_) => Ok(Exit::Done),
        }
    }
}

async fn rekey(args: &RekeyArgs, context: &Context) -> anyhow::Result<Exit> {
    let config = context.incomplete_config()?;
    let lock = Lock::acquire(&config.state_dir).map_err(|error| match error {
        LockError::Held { .. } => Failure::new(Exit::Running, "exchange the key")
            .hint("stop the daemon first: it would go on using the old key")
            .source(error),
        LockError::Network { .. } | LockError::Io { .. } => {
            Failure::new(Exit::Unexpected, "exchange the key").source(error)
        }
    })?;
    let lost = if args.give_up { LostRows::GiveUp } else { LostRows::Refuse };
    let done = store::rekey(&config.state_dir, &config.key_file, &lock, lost, &|name| {
        daemon::crash_point(name);
    });
    let done = done.await.map_err(|error| {
        let (exit, hint) = match &error {
            RekeyError::File(error) => (Exit::Configuration, key_file_hint(error)),
            RekeyError::Open(OpenError::KeyMissing { .. } | OpenError::KeyWrong { .. }) => {
                (Exit::Configuration, Some(KEY_LOST))
            }
            RekeyError::Open(_) | RekeyError::Store(_) => (Exit::Unexpected, None),
        };
        let failure = Failure::new(exit, "exchange the key");
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
        .source(error)
    })?;
    let output = &context.output;
    if done.resumed {
        output.note("an exchange that had been cut short is finished")?;
    }
    if done.lost > 0 {
        output.note(&format!("{} payloads were given up; GitLab fails their jobs", done.lost))?;
    }
    output.note(&format!(
        "{} payloads sealed anew with key {}, the only one in {} now",
        done.rows, done.key, config.key_file
    ))?;
    output.note("backups of the database made before need a copy of the old key file")?;
    Ok(Exit::Done)
}
