//! What is done to runners at GitLab, with a personal access token.

use anyhow::Context as _;
use camino::Utf8PathBuf;
use clap::Args;
use serde::Serialize;
use url::Url;

use crate::cli::Context;
use crate::cli::exit::{Exit, Failure};
use crate::cli::output::{Table, or_dash};
use crate::cli::register::ServerArgs;
use crate::config::{self, Config, Runner};
use crate::domain::id::RunnerName;
use crate::gitlab::api::{
    Api, ApiReply, ManagerSummary, Refusal, RunnerChange, RunnerDetails, RunnerFilter,
    RunnerSummary, Whose,
};
use crate::gitlab::{Client, ClientOptions, Secret, Unclear, UnregisterReply, VerifyReply};

/// The environment variable that may hold a personal access token; glab's, too.
pub(super) const PAT_VAR: &str = "GITLAB_TOKEN";

/// How GitLab is reached, and as whom.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "GitLab")]
pub(super) struct AccessArgs {
    /// Read the personal access token from this file, which nobody else may read
    ///
    /// Without it, $GITLAB_TOKEN. Everybody on this machine can see a command line, so it is never
    /// an argument.
    #[arg(long, value_name = "PATH")]
    pub(super) pat_file: Option<Utf8PathBuf>,
    /// The GitLab instance; default: that of the configured runners, if it is one
    #[arg(long, value_name = "URL")]
    pub(super) url: Option<String>,
}

/// A runner at GitLab, and ours if it is one of ours.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) api: Api,
    pub(super) id: i64,
    pub(super) runner: Option<Runner>,
    pub(super) url: Url,
}

impl AccessArgs {
    /// Finds the personal access token.
    fn token(&self) -> anyhow::Result<Secret> {
        if let Some(path) = &self.pat_file {
            return config::read_token_file(path).context("read the personal access token");
        }
        let variable = std::env::var(PAT_VAR).unwrap_or_default();
        let token = variable.trim();
        if !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Ok(Secret::new(token));
        }
        let failure = Failure::new(Exit::Usage, "find a personal access token");
        Err(failure.hint(format!("use --pat-file, or ${PAT_VAR}")).into())
    }

    /// Finds the instance.
    pub(super) fn instance(&self, config: Option<&Config>) -> anyhow::Result<Url> {
        if let Some(text) = &self.url {
            let url = Url::parse(text).map_err(|error| {
                Failure::new(Exit::Usage, format!("use the URL {text:?}")).source(error)
            })?;
            return Ok(url);
        }
        let mut urls: Vec<&Url> =
            config.into_iter().flat_map(|config| &config.runners).map(|r| &r.url).collect();
        urls.dedup();
        match urls.as_slice() {
            [url] => Ok(Url::clone(url)),
            [] | [_, _, ..] => {
                let failure = Failure::new(Exit::Usage, "tell which GitLab is meant");
                Err(failure.hint("use --url https://gitlab.example.org").into())
            }
        }
    }

    /// Prepares to speak to an instance as the token's user; certificates are those of a runner there.
    pub(super) fn api(&self, url: &Url, config: Option<&Config>) -> anyhow::Result<Api> {
        let there = config.and_then(|config| config.runners.iter().find(|r| same(&r.url, url)));
        let client = match there {
            Some(runner) => crate::cli::client(runner)?,
            None => Client::new(ClientOptions::new(url.clone()))?,
        };
        Ok(Api::new(client, self.token()?))
    }

    /// Finds a runner by its name in the configuration, or by GitLab's number.
    pub(super) async fn target(&self, context: &Context, named: &str) -> anyhow::Result<Target> {
        let config = load(context)?;
        let ours = config.as_ref().and_then(|config| config.runner(&RunnerName(named.to_owned())));
        if let Some(runner) = ours {
            return self.target_of(context, runner).await;
        }
        let Ok(id) = named.trim_start_matches('#').parse::<i64>() else {
            let what = format!("find the runner {named:?}");
            let hint = "give its name in the configuration, or GitLab's number";
            return Err(Failure::new(Exit::NotFound, what).hint(hint).into());
        };
        let url = self.instance(config.as_ref())?;
        let api = self.api(&url, config.as_ref())?;
        let runner = config.as_ref().and_then(|config| ours_of(config, &url, id)).cloned();
        Ok(Target { api, id, runner, url })
    }

    /// Gives one of our runners at GitLab.
    pub(super) async fn target_of(
        &self,
        context: &Context,
        runner: &Runner,
    ) -> anyhow::Result<Target> {
        let config = load(context)?;
        let api = self.api(&runner.url, config.as_ref())?;
        let id = match runner.id.and_then(|id| i64::try_from(id).ok()) {
            Some(id) => id,
            None => ask_number(context, runner).await?,
        };
        Ok(Target { api, id, url: runner.url.clone(), runner: Some(runner.clone()) })
    }
}

fn same(one: &Url, other: &Url) -> bool {
    one.as_str().trim_end_matches('/') == other.as_str().trim_end_matches('/')
}

fn ours_of<'a>(config: &'a Config, url: &Url, id: i64) -> Option<&'a Runner> {
    let id = u64::try_from(id).ok();
    config.runners.iter().find(|runner| same(&runner.url, url) && runner.id == id && id.is_some())
}

/// Reads the configuration, if there is one.
pub(super) fn load(context: &Context) -> anyhow::Result<Option<Config>> {
    match config::load_incomplete(&context.config_path) {
        Ok(config) => Ok(Some(config)),
        Err(error) if matches!(error.problem(), config::Problem::NoFile) => Ok(None),
        Err(error) => Err(error).context("use the configuration"),
    }
}

/// Asks GitLab for the number of one of our runners, which the configuration does not tell.
async fn ask_number(context: &Context, runner: &Runner) -> anyhow::Result<i64> {
    let what = format!("find out the number of {:?}", runner.name.0);
    match super::verify(context, runner).await?.context(what.clone())? {
        VerifyReply::Valid { id: Some(id), .. } => Ok(id),
        VerifyReply::Valid { id: None, .. }
        | VerifyReply::Refused
        | VerifyReply::Orphaned
        | VerifyReply::Unclear(_) => {
            let hint = "say GitLab's number (its page of the runner shows it): in place of the name, or \
                        to `rotate` with --id";
            Err(Failure::new(Exit::Gitlab, what).hint(hint).into())
        }
    }
}

/// Turns a refusal into an error that says whose move it is.
pub(super) fn refused(what: &str, refusal: &Refusal) -> Failure {
    let exit = match refusal {
        Refusal::NotFound { .. } => Exit::NotFound,
        Refusal::Invalid { .. }
        | Refusal::Unknown
        | Refusal::LacksScope { .. }
        | Refusal::Forbidden { .. }
        | Refusal::Unclear(_) => Exit::Gitlab,
    };
    let failure = Failure::new(exit, format!("{what}: {refusal}"));
    match refusal {
        Refusal::Unknown => failure.hint(
            "it may have expired or been revoked: make one in GitLab (user settings, access tokens)",
        ),
        Refusal::LacksScope { .. } => {
            failure.hint("make an access token in GitLab that has one of these scopes")
        }
        Refusal::Forbidden { .. } => failure.hint(
            "the token's user needs the Maintainer or Owner role there; instance runners and \
             --all need an administrator",
        ),
        Refusal::NotFound { .. } => {
            failure.hint("`bridge runners list --owned` shows the runners of the token's user")
        }
        Refusal::Unclear(Unclear::Busy { .. }) => failure.hint("try again later"),
        Refusal::Invalid { .. } | Refusal::Unclear(Unclear::Unexpected { .. }) => failure,
    }
}

/// Takes what was asked for out of a reply.
pub(super) fn done<T>(what: &str, reply: ApiReply<T>) -> Result<T, Failure> {
    match reply {
        ApiReply::Done(done) => Ok(done),
        ApiReply::Refused(refusal) => Err(refused(what, &refusal)),
    }
}

/// Which of GitLab's runners are listed.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct RemoteListArgs {
    /// Those at GitLab that the access token's user may manage
    #[arg(long, help_heading = "At GitLab", group = "whose")]
    owned: bool,
    /// All of the instance, for administrators
    #[arg(long, help_heading = "At GitLab", group = "whose")]
    all: bool,
    /// Those that a project can use: its number or full path
    #[arg(long, value_name = "PROJECT", help_heading = "At GitLab", group = "whose")]
    project: Option<String>,
    /// Those that a group can use: its number or full path
    #[arg(long, value_name = "GROUP", help_heading = "At GitLab", group = "whose")]
    group: Option<String>,
    /// Only runners of this type
    #[arg(long = "type", value_name = "TYPE", help_heading = "At GitLab", requires = "whose", value_parser = ["instance_type", "group_type", "project_type"])]
    kind: Option<String>,
    /// Only runners of this status
    #[arg(long, value_name = "STATUS", help_heading = "At GitLab", requires = "whose", value_parser = ["online", "offline", "stale", "never_contacted"])]
    status: Option<String>,
    /// Only those that are paused; with =false, only those that are not
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true, help_heading = "At GitLab", requires = "whose")]
    paused: Option<bool>,
    /// Only those with all of these tags, separated by commas
    #[arg(
        long,
        value_name = "TAGS",
        value_delimiter = ',',
        help_heading = "At GitLab",
        requires = "whose"
    )]
    tag_list: Vec<String>,
    /// Only those whose version starts like this
    #[arg(long, value_name = "TEXT", help_heading = "At GitLab", requires = "whose")]
    version_prefix: Option<String>,
    /// The old word for --type and --status, as python-gitlab has it
    #[arg(long, value_name = "SCOPE", help_heading = "At GitLab", requires = "whose")]
    scope: Option<String>,
    /// At most this many
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1000,
        help_heading = "At GitLab",
        requires = "whose"
    )]
    limit: usize,
    #[command(flatten)]
    access: AccessArgs,
}

/// One line of `runners list` of GitLab's runners.
#[derive(Debug, Serialize)]
struct RemoteRow {
    id: i64,
    description: String,
    runner_type: String,
    status: String,
    paused: bool,
    created_at: Option<String>,
    /// Its name in the configuration.
    name: Option<String>,
}

impl RemoteListArgs {
    fn whose(&self) -> Option<Whose> {
        match (&self.project, &self.group) {
            (Some(project), _) => Some(Whose::Project(project.clone())),
            (None, Some(group)) => Some(Whose::Group(group.clone())),
            (None, None) if self.all => Some(Whose::All),
            (None, None) => (self.owned || self.access.pat_file.is_some()).then_some(Whose::Owned),
        }
    }

    /// Lists GitLab's runners; tells nothing if those of the configuration are meant.
    pub(super) async fn run(&self, context: &Context, json: bool) -> anyhow::Result<Option<Exit>> {
        let Some(whose) = self.whose() else { return Ok(None) };
        let config = load(context)?;
        let url = self.access.instance(config.as_ref())?;
        let api = self.access.api(&url, config.as_ref())?;
        let filter = RunnerFilter {
            scope: self.scope.clone(),
            runner_type: self.kind.clone(),
            status: self.status.clone(),
            paused: self.paused,
            tags: self.tag_list.clone(),
            version_prefix: self.version_prefix.clone(),
        };
        let reply = api.runners(&whose, &filter, self.limit).await.context("list the runners")?;
        let listed = done("list the runners", reply)?;
        let name = |id| {
            let ours = config.as_ref().and_then(|config| ours_of(config, &url, id));
            ours.map(|runner| runner.name.0.clone())
        };
        let rows: Vec<RemoteRow> =
            listed.items.into_iter().map(|runner| remote_row(name(runner.id), runner)).collect();
        context.output.list(json, &rows, |rows| {
            let mut table =
                Table::new(["ID", "DESCRIPTION", "TYPE", "STATUS", "PAUSED", "CONFIGURED AS"]);
            for row in rows {
                table.row([
                    row.id.to_string(),
                    row.description.clone(),
                    row.runner_type.trim_end_matches("_type").to_owned(),
                    row.status.clone(),
                    yes(row.paused),
                    or_dash(row.name.as_ref()),
                ]);
            }
            table
        })?;
        if listed.more {
            context.output.note("there are more; use --limit, or narrow the list")?;
        }
        Ok(Some(Exit::Done))
    }
}

fn remote_row(name: Option<String>, runner: RunnerSummary) -> RemoteRow {
    let RunnerSummary { id, description, runner_type, status, paused, created_at, ip_address: _ } =
        runner;
    RemoteRow { id, description, runner_type, status, paused, created_at, name }
}

fn yes(flag: bool) -> String {
    if flag { "yes" } else { "no" }.to_owned()
}

/// `runners show`.
#[derive(Clone, Debug, Args)]
pub(super) struct ShowArgs {
    /// The runner: its name in the configuration, or GitLab's number
    #[arg(value_name = "RUNNER")]
    runner: String,
    /// Show the machines that use it as well
    #[arg(long)]
    managers: bool,
    /// Write one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    access: AccessArgs,
}

/// What `runners show` and `runners edit` give.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    details: RunnerDetails,
    /// Its name in the configuration.
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    managers: Option<Vec<ManagerSummary>>,
}

impl Shown {
    fn write(&self, context: &Context, json: bool) -> anyhow::Result<()> {
        if json {
            return Ok(context.output.json(self)?);
        }
        let details = &self.details;
        let summary = &details.summary;
        let list = |names: Vec<&str>| or_dash((!names.is_empty()).then(|| names.join(", ")));
        let text = |text: &str| or_dash(Some(text).filter(|text| !text.is_empty()));
        let mut table = Table::new(["FIELD", "VALUE"]);
        let mut field = |name: &str, value: String| table.row([name.to_owned(), value]);
        field("id", summary.id.to_string());
        field("configured as", or_dash(self.name.as_ref()));
        field("description", text(&summary.description));
        field("type", summary.runner_type.trim_end_matches("_type").to_owned());
        field("status", summary.status.clone());
        field("paused", yes(summary.paused));
        field("tags", list(details.tag_list.iter().map(String::as_str).collect()));
        field("runs untagged", yes(details.run_untagged));
        field("locked", yes(details.locked));
        field("access level", text(&details.access_level));
        let seconds = details.maximum_timeout.map(|seconds| format!("{seconds} s"));
        field("maximum timeout", or_dash(seconds));
        field("maintenance note", text(&details.maintenance_note));
        field("version", or_dash(details.version.as_ref()));
        field("contacted at", or_dash(details.contacted_at.as_ref()));
        let projects = details.projects.iter().map(|p| p.path_with_namespace.as_str());
        field("projects", list(projects.collect()));
        field("groups", list(details.groups.iter().map(|group| group.name.as_str()).collect()));
        context.output.table(&table)?;
        if let Some(managers) = &self.managers {
            let mut table =
                Table::new(["SYSTEM ID", "STATUS", "VERSION", "PLATFORM", "CONTACTED AT"]);
            for manager in managers {
                table.row([
                    manager.system_id.clone(),
                    manager.status.clone(),
                    or_dash(manager.version.as_ref()),
                    or_dash(manager.platform.as_ref()),
                    or_dash(manager.contacted_at.as_ref()),
                ]);
            }
            context.output.line("")?;
            context.output.table(&table)?;
        }
        Ok(())
    }
}

impl ShowArgs {
    pub(super) async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let target = self.access.target(context, &self.runner).await?;
        let what = format!("show the runner {}", self.runner);
        let details =
            done(&what, target.api.runner(target.id).await.with_context(|| what.clone())?)?;
        let managers = if self.managers {
            let reply = target.api.managers(target.id).await.with_context(|| what.clone())?;
            Some(done(&what, reply)?)
        } else {
            None
        };
        let name = target.runner.map(|runner| runner.name.0);
        Shown { details, name, managers }.write(context, self.json)?;
        Ok(Exit::Done)
    }
}

/// `runners edit`.
#[derive(Clone, Debug, Args)]
pub(super) struct EditArgs {
    /// The runner: its name in the configuration, or GitLab's number
    #[arg(value_name = "RUNNER")]
    runner: String,
    /// Write the runner as one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten, next_help_heading = "Settings; what is not named stays")]
    settings: ServerArgs,
    /// Take jobs: the old word for --paused=false
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true, conflicts_with = "paused")]
    active: Option<bool>,
    #[command(flatten)]
    access: AccessArgs,
}

impl EditArgs {
    pub(super) async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let mut change = self.settings.change();
        change.paused = change.paused.or(self.active.map(|active| !active));
        if change == RunnerChange::default() {
            let failure =
                Failure::new(Exit::Usage, format!("edit {}: nothing is named", { &self.runner }));
            return Err(failure.hint("name a setting, such as --description TEXT").into());
        }
        let what = format!("edit the runner {}", self.runner);
        changed(context, &self.access, &self.runner, &what, &change, self.json).await
    }
}

/// `runners pause` and `runners resume`.
#[derive(Clone, Debug, Args)]
pub(super) struct OneArgs {
    /// The runner: its name in the configuration, or GitLab's number
    #[arg(value_name = "RUNNER")]
    runner: String,
    /// Write the runner as one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    access: AccessArgs,
}

impl OneArgs {
    pub(super) async fn pause(&self, context: &Context, paused: bool) -> anyhow::Result<Exit> {
        let change = RunnerChange { paused: Some(paused), ..RunnerChange::default() };
        let verb = if paused { "pause" } else { "resume" };
        let what = format!("{verb} the runner {}", self.runner);
        changed(context, &self.access, &self.runner, &what, &change, self.json).await
    }
}

async fn changed(
    context: &Context,
    access: &AccessArgs,
    named: &str,
    what: &str,
    change: &RunnerChange,
    json: bool,
) -> anyhow::Result<Exit> {
    let target = access.target(context, named).await?;
    let reply = target.api.change(target.id, change).await.with_context(|| what.to_owned())?;
    let details = done(what, reply)?;
    let name = target.runner.map(|runner| runner.name.0);
    Shown { details, name, managers: None }.write(context, json)?;
    Ok(Exit::Done)
}

/// `runners delete`.
#[derive(Clone, Debug, Args)]
pub(super) struct DeleteArgs {
    /// The runner: its name in the configuration, or GitLab's number
    #[arg(value_name = "RUNNER", required_unless_present = "token_file")]
    runner: Option<String>,
    /// Delete the runner whose authentication token is in this file; needs no access token
    #[arg(long, value_name = "PATH", conflicts_with_all = ["runner", "pat_file"], requires = "url")]
    token_file: Option<Utf8PathBuf>,
    #[command(flatten)]
    access: AccessArgs,
}

impl DeleteArgs {
    pub(super) async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        if let Some(path) = &self.token_file {
            return self.by_token(context, path).await;
        }
        let named = self.runner.as_deref().unwrap_or_default();
        let target = self.access.target(context, named).await?;
        let what = format!("delete the runner {named}");
        done(&what, target.api.delete(target.id).await.with_context(|| what.clone())?)?;
        context.output.note(&format!("deleted the runner #{} at {}", target.id, target.url))?;
        if let Some(runner) = &target.runner {
            let name = &runner.name.0;
            context.output.note(&format!(
                "it is still in the configuration; `bridge runners unregister --force {name}` takes \
                 it out"
            ))?;
        }
        Ok(Exit::Done)
    }

    async fn by_token(&self, context: &Context, path: &Utf8PathBuf) -> anyhow::Result<Exit> {
        let config = load(context)?;
        let url = self.access.instance(config.as_ref())?;
        let token = config::read_token_file(path).context("read the runner's token")?;
        let client = Client::new(ClientOptions::new(url.clone()))?;
        let what = "delete the runner";
        let why = match client.unregister_runner(&token).await.context(what)? {
            UnregisterReply::Done => {
                context.output.note(&format!("deleted the runner at {url}"))?;
                return Ok(Exit::Done);
            }
            UnregisterReply::Refused | UnregisterReply::Unknown => {
                "GitLab does not know its token".to_owned()
            }
            UnregisterReply::Unclear(unclear) => unclear.to_string(),
        };
        Err(Failure::new(Exit::Gitlab, format!("{what}: {why}")).into())
    }
}

/// `runners enable` and `runners disable`.
#[derive(Clone, Debug, Args)]
pub(super) struct ProjectArgs {
    /// The runner: its name in the configuration, or GitLab's number
    #[arg(value_name = "RUNNER")]
    runner: String,
    /// The project: its number or full path
    #[arg(long, value_name = "PROJECT", required = true)]
    project: String,
    #[command(flatten)]
    access: AccessArgs,
}

impl ProjectArgs {
    pub(super) async fn enable(&self, context: &Context) -> anyhow::Result<Exit> {
        let target = self.access.target(context, &self.runner).await?;
        let what = format!("enable the runner {} for {}", self.runner, self.project);
        let reply = target.api.enable(&self.project, target.id).await;
        done(&what, reply.with_context(|| what.clone())?)?;
        let note = format!("the runner #{} takes jobs of {}", target.id, self.project);
        context.output.note(&note)?;
        Ok(Exit::Done)
    }

    pub(super) async fn disable(&self, context: &Context) -> anyhow::Result<Exit> {
        let target = self.access.target(context, &self.runner).await?;
        let what = format!("disable the runner {} for {}", self.runner, self.project);
        let reply = target.api.disable(&self.project, target.id).await;
        done(&what, reply.with_context(|| what.clone())?)?;
        let note = format!("the runner #{} takes no more jobs of {}", target.id, self.project);
        context.output.note(&note)?;
        Ok(Exit::Done)
    }
}
