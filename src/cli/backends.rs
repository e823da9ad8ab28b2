//! `bridge backends`: what is configured, whether it would take a job now, and logging in.

use std::time::Duration;

use bridge_backend::{BackendError, ErrorKind, Fault, Login};
use clap::{Args, Subcommand};
use serde::Serialize;

use super::Context;
use super::exit::{Exit, Failure};
use super::output::{Table, or_dash};
use crate::config::{BackendEntry, Config};
use crate::domain::id::BackendName;
use crate::http::WhoseMove;
use crate::logins;
use crate::registry::Registry;
use crate::telemetry::Chain;

/// Longer than any scheduler that is well takes to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// `bridge backends`.
#[derive(Clone, Debug, Args)]
pub struct BackendsArgs {
    #[command(subcommand)]
    command: BackendsCommand,
}

#[derive(Clone, Debug, Subcommand)]
enum BackendsCommand {
    /// List the backends of the configuration
    List {
        /// Write one JSON object per line
        #[arg(long)]
        json: bool,
    },
    /// Ask backends whether they would take a job now
    Check {
        /// The backends to ask; default: all
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// Write one JSON object per line
        #[arg(long)]
        json: bool,
    },
    /// Log in to a backend that wants a person to agree
    Login {
        /// The backend
        #[arg(value_name = "NAME")]
        name: String,
    },
}

/// One line of `backends list`.
#[derive(Debug, Serialize)]
struct ListRow {
    name: String,
    kind: String,
    max_queued: Option<usize>,
    runners: Vec<String>,
}

/// One line of `backends check`.
#[derive(Debug, Serialize)]
struct CheckRow {
    name: String,
    kind: String,
    result: &'static str,
    whose_move: WhoseMove,
    detail: String,
}

/// What a check found.
#[derive(Debug)]
pub(super) enum Checked {
    /// It would take a job; this is the login it does that with, if it has one.
    Well(Option<Login>),
    /// It would not, and this is why.
    Unwell { exit: Exit, whose_move: WhoseMove, detail: String },
}

impl BackendsArgs {
    /// Does what the subcommand says.
    ///
    /// # Errors
    ///
    /// With exit code 3 for a name that is not there.
    pub async fn run(self, context: &Context) -> anyhow::Result<Exit> {
        let config = context.incomplete_config()?;
        match self.command {
            BackendsCommand::List { json } => list(context, &config, json),
            BackendsCommand::Check { names, json } => check(context, &config, &names, json).await,
            BackendsCommand::Login { name } => {
                super::backends_login::run(context, &config, &name).await
            }
        }
    }
}

fn list(context: &Context, config: &Config, json: bool) -> anyhow::Result<Exit> {
    let runners = |name: &BackendName| {
        let of_it = config.runners.iter().filter(|runner| runner.backend == *name);
        of_it.map(|runner| runner.name.0.clone()).collect()
    };
    let rows: Vec<ListRow> = config
        .backends
        .iter()
        .map(|(name, entry)| ListRow {
            name: name.0.clone(),
            kind: entry.kind.clone(),
            max_queued: entry.max_queued,
            runners: runners(name),
        })
        .collect();
    context.output.list(json, &rows, |rows| {
        let mut table = Table::new(["NAME", "KIND", "MAX_QUEUED", "RUNNERS"]);
        for row in rows {
            let runners = Some(row.runners.join(", ")).filter(|names| !names.is_empty());
            table.row([
                row.name.clone(),
                row.kind.clone(),
                or_dash(row.max_queued),
                or_dash(runners),
            ]);
        }
        table
    })?;
    Ok(Exit::Done)
}

async fn check(
    context: &Context,
    config: &Config,
    names: &[String],
    json: bool,
) -> anyhow::Result<Exit> {
    for name in names {
        find(config, name)?;
    }
    let (mut rows, mut worst) = (Vec::new(), Exit::Done);
    let wanted = |name: &BackendName| names.is_empty() || names.contains(&name.0);
    for (name, entry) in config.backends.iter().filter(|(name, _entry)| wanted(name)) {
        let (result, whose_move, detail) = match check_one(&context.registry, name, entry).await {
            Checked::Well(Some(login)) if login.ends_soon => {
                ("warn", WhoseMove::Operator, logins::ends_soon(name, &login))
            }
            Checked::Well(Some(login)) => ("ok", WhoseMove::Nobody, describe(&login)),
            Checked::Well(None) => ("ok", WhoseMove::Nobody, String::new()),
            Checked::Unwell { exit, whose_move, detail } => {
                worst = worst.max(exit);
                ("fail", whose_move, detail)
            }
        };
        let (name, kind) = (name.0.clone(), entry.kind.clone());
        rows.push(CheckRow { name, kind, result, whose_move, detail });
    }
    context.output.list(json, &rows, |rows| {
        let mut table = Table::new(["NAME", "KIND", "RESULT", "WHOSE MOVE", "DETAIL"]);
        for row in rows {
            table.row([
                row.name.clone(),
                row.kind.clone(),
                row.result.to_owned(),
                row.whose_move.as_str().to_owned(),
                row.detail.clone(),
            ]);
        }
        table
    })?;
    Ok(worst)
}

/// Finds a backend by its name.
pub(super) fn find<'a>(
    config: &'a Config,
    wanted: &str,
) -> Result<(&'a BackendName, &'a BackendEntry), Failure> {
    if let Some(found) = config.backends.iter().find(|(name, _entry)| name.0 == wanted) {
        return Ok(found);
    }
    let there: Vec<&str> = config.backends.keys().map(|name| name.0.as_str()).collect();
    let hint = match there.as_slice() {
        [] => "there are no backends; add [backends.NAME]".to_owned(),
        there => format!("there are: {}", there.join(", ")),
    };
    Err(Failure::new(Exit::NotFound, format!("find the backend {wanted:?}")).hint(hint))
}

/// Says whose login it is and how long it lasts.
pub(super) fn describe(login: &Login) -> String {
    match login.left {
        Some(left) => format!("{}; the login ends in {}", login.who, logins::roughly(left)),
        None => login.who.clone(),
    }
}

/// Opens a backend and asks it.
pub(super) async fn check_one(
    registry: &Registry,
    name: &BackendName,
    entry: &BackendEntry,
) -> Checked {
    let backend = match registry.open(entry) {
        Ok(backend) => backend,
        Err(error) => {
            return Checked::Unwell {
                exit: Exit::Configuration,
                whose_move: WhoseMove::Operator,
                detail: Chain(&error).to_string(),
            };
        }
    };
    match tokio::time::timeout(PATIENCE, backend.check()).await {
        Ok(Ok(())) => Checked::Well(backend.login()),
        Ok(Err(error)) => Checked::Unwell {
            exit: Exit::Backend,
            whose_move: whose_move(&error),
            detail: format!("{}{}", Chain(&error), logins::cure(name, &error)),
        },
        Err(_elapsed) => Checked::Unwell {
            exit: Exit::Backend,
            whose_move: WhoseMove::Site,
            detail: format!("no answer within {} s", PATIENCE.as_secs()),
        },
    }
}

fn whose_move(error: &BackendError) -> WhoseMove {
    if error.remedy().is_some() {
        return WhoseMove::Operator;
    }
    match error.kind() {
        ErrorKind::Transient => WhoseMove::Site,
        ErrorKind::Rejected(Fault::Job) => WhoseMove::Author,
        ErrorKind::Rejected(Fault::Site) | ErrorKind::Ambiguous | ErrorKind::Lost => {
            WhoseMove::Operator
        }
    }
}
