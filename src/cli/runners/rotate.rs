//! `bridge runners rotate`: another token for a runner, now.

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;

use super::remote::{AccessArgs, PAT_VAR, refused};
use crate::cli::exit::{Exit, Failure};
use crate::cli::output::Output;
use crate::cli::{Context, client};
use crate::config::Runner;
use crate::gitlab::identity::short_token;
use crate::rotation::files::TokenFiles;
use crate::rotation::{By, Change, RotationError, Standing};

/// `runners rotate`.
#[derive(Clone, Debug, Args)]
pub(super) struct RotateArgs {
    /// The runner's name in the configuration
    #[arg(value_name = "NAME")]
    name: String,
    /// GitLab's number for the runner, where the configuration does not tell it
    #[arg(long, value_name = "ID")]
    id: Option<i64>,
    /// Write one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    access: AccessArgs,
}

/// What `runners rotate` did.
#[derive(Debug, Serialize)]
struct Rotated {
    name: String,
    /// The part of the new token that may be shown.
    token: String,
    token_file: String,
    token_expires_at: Option<String>,
}

impl RotateArgs {
    pub(super) async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let config = context.incomplete_config()?;
        let runner = super::named(&config, std::slice::from_ref(&self.name))?.remove(0);
        let Some(path) = &runner.token_file else {
            let what =
                format!("rotate {:?}: its token is written into the configuration", { &self.name });
            let hint = "move it to a file of mode 0600 and name that with token_file";
            return Err(Failure::new(Exit::Configuration, what).hint(hint).into());
        };
        let files = TokenFiles::of(path);
        let _writer = files.lock()?.ok_or_else(|| {
            let what = format!("rotate {:?}: somebody else is at it", self.name);
            Failure::new(Exit::Running, what).hint("the daemon may be; try again in a minute")
        })?;
        let client = client(runner)?;
        let system_id = context.system_id()?;
        let info = crate::daemon::info(&runner.backend_kind);
        let change = Change {
            files: &files,
            client: &client,
            system_id: system_id.as_str(),
            info: &info,
            crash_at: None,
        };
        let now = context.clock.now();
        let with_pat = self.access.pat_file.is_some()
            || std::env::var_os(PAT_VAR).is_some_and(|v| !v.is_empty());
        // What another process began is finished first: its token may be on the disk already.
        let begun = files.waiting()?.is_some() || files.noted()?.is_some();
        let standing = if begun { Some(change.settle(now).await?) } else { None };
        let standing = match standing {
            Some(changed @ Standing::Changed { .. }) => changed,
            Some(
                Standing::Good { .. }
                | Standing::Lost { .. }
                | Standing::Refused
                | Standing::Orphaned
                | Standing::Unclear { .. }
                | Standing::Declined(_),
            )
            | None => {
                if with_pat {
                    // A token that was lost cannot tell the number any more.
                    let (api, id) = match self.id {
                        Some(id) => (self.access.api(&runner.url, Some(&config))?, id),
                        None => {
                            let target = self.access.target_of(context, runner).await?;
                            (target.api, target.id)
                        }
                    };
                    self.kept(change.change(By::Number(&api, id), now).await)?
                } else {
                    self.kept(change.change(By::Token, now).await)?
                }
            }
        };
        self.tell(&context.output, runner, &files, standing)
    }

    /// Saves a token that the disk beside the configuration did not take.
    fn kept(&self, result: Result<Standing, RotationError>) -> anyhow::Result<Standing> {
        match result {
            Err(RotationError::Unkept { token, source }) => {
                let place = super::create::rescue(&token);
                let what = format!("write the new token of {:?}", self.name);
                let hint = match place {
                    Ok(path) => format!("it is in {path}; copy it into the runner's token_file"),
                    Err(_no_place) => format!(
                        "it is lost; make another with `bridge runners rotate {} --pat-file PATH`",
                        self.name
                    ),
                };
                Err(Failure::new(Exit::Unexpected, what).hint(hint).source(source).into())
            }
            result => result.with_context(|| format!("rotate {:?}", self.name)),
        }
    }

    fn tell(
        &self,
        output: &Output,
        runner: &Runner,
        files: &TokenFiles,
        standing: Standing,
    ) -> anyhow::Result<Exit> {
        let (why, hint) = match standing {
            Standing::Changed { token, expires_at } => {
                // Shortened to what may be shown.
                let short = short_token(token.expose());
                let rotated = Rotated {
                    name: runner.name.0.clone(),
                    token: short,
                    token_file: files.path().to_string(),
                    token_expires_at: expires_at.map(|time| time.to_string()),
                };
                if self.json {
                    output.json(&rotated)?;
                } else {
                    let until = rotated.token_expires_at.as_ref();
                    let until =
                        until.map(|time| format!(", it expires {time}")).unwrap_or_default();
                    output.note(&format!("{:?} has a new token{until}", self.name))?;
                    output.note(&format!("token: {}", files.path()))?;
                    output.note("a running daemon takes it by itself")?;
                }
                return Ok(Exit::Done);
            }
            Standing::Declined(refusal) => {
                return Err(refused(&format!("rotate {:?}", self.name), &refusal).into());
            }
            Standing::Good { .. } => ("GitLab knows the old token still".to_owned(), "try again"),
            Standing::Lost { .. } | Standing::Refused => (
                "GitLab does not know the token".to_owned(),
                "with --pat-file a new one is asked for by the runner's number",
            ),
            Standing::Orphaned => (
                "the runner's owner in GitLab is gone".to_owned(),
                "create a new runner in an existing project or group",
            ),
            Standing::Unclear { why } => (
                why,
                "run the command again: it finds out whether GitLab has changed the token; if a new \
                 one was given it is kept",
            ),
        };
        let what = format!("rotate {:?}: {why}", self.name);
        Err(Failure::new(Exit::Gitlab, what).hint(hint).into())
    }
}
