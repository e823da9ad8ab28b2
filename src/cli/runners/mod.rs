//! `bridge runners`: what is registered, whether GitLab agrees, and the way out; and, with a personal
//! access token, everything that can be done to runners at GitLab.

mod create;
mod jobs;
mod remote;
mod rotate;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde::Serialize;

use super::config_file::ConfigFile;
use super::exit::{Exit, Failure};
use super::output::{Table, or_dash};
use super::{Context, client, info};
use crate::config::{Config, Runner};
use crate::domain::id::RunnerName;
use crate::gitlab::identity::short_token;
use crate::gitlab::{Unclear, UnregisterReply, VerifyReply};
use crate::telemetry::Chain;

/// `bridge runners`.
#[derive(Clone, Debug, Args)]
pub struct RunnersArgs {
    #[command(subcommand)]
    command: RunnersCommand,
}

#[derive(Clone, Debug, Subcommand)]
enum RunnersCommand {
    /// Create a runner at GitLab and add it to the configuration
    Create(Box<create::CreateArgs>),
    /// List the runners of the configuration, or those at GitLab
    List(Box<ListArgs>),
    /// Show a runner as it is at GitLab
    Show(remote::ShowArgs),
    /// Change a runner's settings at GitLab
    Edit(Box<remote::EditArgs>),
    /// Have GitLab give a runner no more jobs
    Pause(remote::OneArgs),
    /// Have GitLab give a runner jobs again
    Resume(remote::OneArgs),
    /// Let a project use a project runner
    Enable(remote::ProjectArgs),
    /// Take a project runner away from a project
    Disable(remote::ProjectArgs),
    /// List a runner's jobs as GitLab has them, beside what the database knows
    Jobs(jobs::RunnerJobsArgs),
    /// Exchange a runner's token for a new one, now
    ///
    /// The daemon does so by itself after three quarters of a token's life. With a personal access
    /// token it also works when the old token was lost.
    Rotate(rotate::RotateArgs),
    /// Delete a whole runner at GitLab, for every machine that uses it
    Delete(remote::DeleteArgs),
    /// Ask GitLab whether it knows the runners' tokens
    Verify(VerifyArgs),
    /// Remove runners from GitLab and from the configuration
    ///
    /// Of a runner created in GitLab (glrt-…) only this machine's manager is removed there: other
    /// machines may use the same runner. A runner made with a registration token is removed whole.
    Unregister(UnregisterArgs),
}

#[derive(Clone, Debug, Args)]
struct ListArgs {
    /// Write one JSON object per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    remote: remote::RemoteListArgs,
}

#[derive(Clone, Debug, Args)]
struct VerifyArgs {
    /// The runners to verify; default: all
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Write one JSON object per line
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, Args)]
struct UnregisterArgs {
    /// The runners to remove
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
    /// Remove from the configuration even if GitLab does not answer or refuses
    #[arg(long)]
    force: bool,
}

/// One line of `runners list`.
#[derive(Debug, Serialize)]
struct ListRow {
    name: String,
    url: String,
    backend: String,
    limit: usize,
    id: Option<u64>,
    /// The part of the token that may be shown.
    token: String,
    token_expires_at: Option<String>,
}

/// One line of `runners verify`.
#[derive(Debug, Serialize)]
struct VerifyRow {
    name: String,
    url: String,
    result: &'static str,
    id: Option<i64>,
    detail: String,
}

impl RunnersArgs {
    /// Does what the subcommand says.
    ///
    /// # Errors
    ///
    /// With exit code 3 for a name that is not there, 5 when GitLab refuses.
    pub async fn run(self, context: &Context) -> anyhow::Result<Exit> {
        match self.command {
            RunnersCommand::Create(args) => args.run(context).await,
            RunnersCommand::List(args) => match args.remote.run(context, args.json).await? {
                Some(exit) => Ok(exit),
                None => args.run(context),
            },
            RunnersCommand::Show(args) => args.run(context).await,
            RunnersCommand::Edit(args) => args.run(context).await,
            RunnersCommand::Pause(args) => args.pause(context, true).await,
            RunnersCommand::Resume(args) => args.pause(context, false).await,
            RunnersCommand::Enable(args) => args.enable(context).await,
            RunnersCommand::Disable(args) => args.disable(context).await,
            RunnersCommand::Jobs(args) => args.run(context).await,
            RunnersCommand::Rotate(args) => args.run(context).await,
            RunnersCommand::Delete(args) => args.run(context).await,
            RunnersCommand::Verify(args) => args.run(context).await,
            RunnersCommand::Unregister(args) => args.run(context).await,
        }
    }
}

impl ListArgs {
    fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let config = context.incomplete_config()?;
        let rows: Vec<ListRow> = config.runners.iter().map(list_row).collect();
        context.output.list(self.json, &rows, |rows| {
            let mut table = Table::new(["NAME", "URL", "BACKEND", "LIMIT", "ID", "TOKEN"]);
            for row in rows {
                table.row([
                    row.name.clone(),
                    row.url.clone(),
                    row.backend.clone(),
                    or_dash(Some(row.limit).filter(|limit| *limit > 0)),
                    or_dash(row.id),
                    row.token.clone(),
                ]);
            }
            table
        })?;
        Ok(Exit::Done)
    }
}

fn list_row(runner: &Runner) -> ListRow {
    ListRow {
        name: runner.name.0.clone(),
        url: runner.url.as_str().trim_end_matches('/').to_owned(),
        backend: runner.backend.0.clone(),
        limit: runner.limit,
        id: runner.id,
        // Shortened to what gitlab-runner shows too.
        token: short_token(runner.token.expose()),
        token_expires_at: runner.token_expires_at.clone(),
    }
}

/// Finds the runners of these names; all of them for no names.
fn named<'a>(config: &'a Config, names: &[String]) -> Result<Vec<&'a Runner>, Failure> {
    if names.is_empty() {
        return Ok(config.runners.iter().collect());
    }
    let find = |name: &String| {
        config.runner(&RunnerName(name.clone())).ok_or_else(|| {
            let there: Vec<&str> =
                config.runners.iter().map(|runner| runner.name.0.as_str()).collect();
            let hint = match there.as_slice() {
                [] => "there are no runners; add one with `bridge register`".to_owned(),
                there => format!("there are: {}", there.join(", ")),
            };
            Failure::new(Exit::NotFound, format!("find the runner {name:?}")).hint(hint)
        })
    };
    names.iter().map(find).collect()
}

impl VerifyArgs {
    async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let config = context.incomplete_config()?;
        let runners = named(&config, &self.names)?;
        let mut rows = Vec::new();
        for runner in runners {
            rows.push(verify_row(context, runner).await?);
        }
        context.output.list(self.json, &rows, |rows| {
            let mut table = Table::new(["NAME", "URL", "RESULT", "ID", "DETAIL"]);
            for row in rows {
                table.row([
                    row.name.clone(),
                    row.url.clone(),
                    row.result.to_owned(),
                    or_dash(row.id),
                    row.detail.clone(),
                ]);
            }
            table
        })?;
        let good = rows.iter().all(|row| row.result == VALID);
        Ok(if good { Exit::Done } else { Exit::Gitlab })
    }
}

const VALID: &str = "valid";

async fn verify_row(context: &Context, runner: &Runner) -> anyhow::Result<VerifyRow> {
    let (result, id, detail) = match verify(context, runner).await? {
        Ok(VerifyReply::Valid { id, expires_at }) => {
            let until = expires_at.map(|time| format!("expires {time}")).unwrap_or_default();
            (VALID, id, until)
        }
        Ok(VerifyReply::Refused) => ("refused", None, "deleted, or the token was reset".to_owned()),
        Ok(VerifyReply::Orphaned) => ("orphaned", None, "its owner is gone".to_owned()),
        Ok(VerifyReply::Unclear(Unclear::Busy { status, .. })) => {
            ("unclear", None, format!("busy ({status})"))
        }
        Ok(VerifyReply::Unclear(Unclear::Unexpected { status, message })) => {
            ("unclear", None, format!("answered {status}: {message}"))
        }
        Err(error) => ("unclear", None, Chain(&error).to_string()),
    };
    let url = runner.url.as_str().trim_end_matches('/').to_owned();
    Ok(VerifyRow { name: runner.name.0.clone(), url, result, id, detail })
}

/// Asks GitLab about a runner's token; the outer error is ours, the inner one GitLab's.
pub(super) async fn verify(
    context: &Context,
    runner: &Runner,
) -> anyhow::Result<Result<VerifyReply, crate::gitlab::Error>> {
    let system_id = context.system_id()?;
    let info = info(runner.shell.as_deref());
    Ok(match client(runner) {
        Ok(client) => client.verify_runner(&runner.token, system_id.as_str(), &info).await,
        Err(error) => Err(error),
    })
}

impl UnregisterArgs {
    async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let config = context.incomplete_config()?;
        // All names are looked up before the first runner is removed.
        for runner in named(&config, &self.names)? {
            self.unregister(context, &config, runner).await?;
        }
        Ok(Exit::Done)
    }

    async fn unregister(
        &self,
        context: &Context,
        config: &Config,
        runner: &Runner,
    ) -> anyhow::Result<()> {
        let name = &runner.name.0;
        let note = match self.at_gitlab(context, runner).await {
            Ok(note) => note,
            Err(error) if self.force => {
                format!("not removed at GitLab: {}", Chain(error.as_ref()))
            }
            Err(error) => return Err(error),
        };
        let mut file = ConfigFile::open(&context.config_path)?;
        if !file.remove_runner(name) {
            let what = format!("remove {name:?} from {}", context.config_path);
            let hint = "its [[runners]] table is written in an unusual way; remove it by hand";
            return Err(Failure::new(Exit::Configuration, what).hint(hint).into());
        }
        file.write()?;
        let path = runner.token_file.as_ref().filter(|path| {
            // Somebody may let two runners share one file.
            !config
                .runners
                .iter()
                .any(|other| other.name != runner.name && other.token_file.as_ref() == Some(*path))
        });
        if let Some(path) = path {
            std::fs::remove_file(path).with_context(|| format!("remove {path}"))?;
        }
        context.output.note(&format!("removed {name:?} from {}", context.config_path))?;
        context.output.note(&note)?;
        Ok(())
    }

    /// Removes the runner, or this machine's part in it, at GitLab; says what was done.
    async fn at_gitlab(&self, context: &Context, runner: &Runner) -> anyhow::Result<String> {
        let name = &runner.name.0;
        let client = client(runner)?;
        // Looked at because GitLab has a call for each kind. With an instance's own prefix before
        // `glrt-` in doubt: a manager too few removed is better than a runner too many.
        let shared = runner.token.expose().contains("glrt-");
        let (what, reply) = if shared {
            let system_id = context.system_id()?;
            let reply = client.unregister_manager(&runner.token, system_id.as_str()).await;
            ("this machine's manager", reply)
        } else {
            ("the runner", client.unregister_runner(&runner.token).await)
        };
        let reply = reply.with_context(|| format!("unregister {name:?}"))?;
        let failure = |why: String| {
            Failure::new(Exit::Gitlab, format!("unregister {name:?}: {why}")).hint(
                "with --force the runner is removed from the configuration all the same; \
                 remove it in GitLab by hand",
            )
        };
        match reply {
            UnregisterReply::Done => Ok(format!("removed {what} at {}", runner.url)),
            UnregisterReply::Unknown => Ok(format!("{what} was not at {} any more", runner.url)),
            UnregisterReply::Refused => {
                Err(failure("GitLab does not know its token".to_owned()).into())
            }
            UnregisterReply::Unclear(unclear) => Err(failure(unclear.to_string()).into()),
        }
    }
}
