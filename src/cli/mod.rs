//! The command line: the only code that prints.
//!
//! One file per noun; each has its `Args` and a `run` that takes the [`Context`]. Errors are printed
//! here, as a chain and a hint, and become the exit codes of [`exit::Exit`].

pub mod backends;
mod backends_login;
mod config_file;
pub mod db;
pub mod doctor;
pub mod exec;
mod exec_artifacts;
mod exec_given;
mod exec_list;
mod exec_payload;
pub mod exec_view;
pub mod exit;
pub mod jobs;
pub mod output;
pub mod register;
pub mod runners;
pub mod serve;
#[cfg(test)]
mod tests;

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use camino::Utf8PathBuf;
use clap::{Args, Parser, Subcommand};
use tokio_util::task::TaskTracker;

use self::exit::{Exit, classify};
use self::output::Output;
use crate::config::{self, Config, Runner};
use crate::domain::clock::{Clock, SystemClock};
use crate::gitlab::{self, Info, InfoOptions, identity};
use crate::registry::Registry;
use crate::store::Store;
use crate::telemetry::{self, Chain, LogFormat, LogOptions};

/// Run GitLab CI jobs on batch systems
#[derive(Debug, Parser)]
#[command(name = "bridge", version, disable_help_subcommand = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What may stand before every command.
#[derive(Clone, Debug, Default, Args)]
pub struct Global {
    /// Use this configuration
    ///
    /// Default: $BRIDGE_CONFIG, else ~/.config/bridge/config.toml (for root:
    /// /etc/bridge/config.toml).
    #[arg(long, global = true, value_name = "PATH", help_heading = "Global options")]
    pub config: Option<Utf8PathBuf>,
    /// Log at this level
    ///
    /// Default: log_level of the configuration, else info for `serve` and warn for everything else.
    /// $BRIDGE_LOG holds a filter per module and wins.
    #[arg(long, global = true, value_name = "LEVEL", help_heading = "Global options", value_parser = ["trace", "debug", "info", "warn", "error"])]
    pub log_level: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Register a runner and add it to the configuration
    Register(Box<register::RegisterArgs>),
    /// Create, list, verify, change and remove runners
    Runners(runners::RunnersArgs),
    /// List, check and log in to backends
    Backends(backends::BackendsArgs),
    /// Look for everything that could keep jobs from running
    Doctor(doctor::DoctorArgs),
    /// Take jobs from GitLab and see them through, until told to stop
    Serve(serve::ServeArgs),
    /// Run a folder's pipeline here, without GitLab
    Exec(exec::ExecArgs),
    /// List, show, follow and cancel jobs
    Jobs(jobs::JobsArgs),
    /// Check, back up and prune the database
    Db(db::DbArgs),
}

/// What every command can use.
#[derive(Clone, Debug)]
pub struct Context {
    /// The drivers of this program.
    pub registry: Registry,
    /// The configuration file.
    pub config_path: Utf8PathBuf,
    /// Whether it was named, on the command line or in the environment.
    pub config_named: bool,
    /// `--log-level`.
    pub log_level: Option<String>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Where to write.
    pub output: Output,
}

impl Context {
    /// Reads the configuration as the daemon would.
    ///
    /// # Errors
    ///
    /// As [`config::load`].
    pub fn config(&self) -> anyhow::Result<Config> {
        config::load(&self.config_path).context("use the configuration")
    }

    /// Reads the configuration, content without runners.
    ///
    /// # Errors
    ///
    /// As [`config::load_incomplete`].
    pub fn incomplete_config(&self) -> anyhow::Result<Config> {
        config::load_incomplete(&self.config_path).context("use the configuration")
    }

    /// Opens the daemon's database, which may be in use.
    ///
    /// # Errors
    ///
    /// When the configuration cannot be used, or there is no database yet.
    pub async fn attach(&self) -> anyhow::Result<(Store, Config)> {
        let config = self.incomplete_config()?;
        let store = Store::attach(&config.state_dir, &TaskTracker::new()).await?;
        Ok((store, config))
    }

    /// Says how to log: the command line, else the configuration, else `level`.
    pub fn log_options(&self, config: Option<&Config>, level: &str) -> LogOptions {
        let configured = config.and_then(|config| config.log_level.clone());
        LogOptions {
            filter: std::env::var(telemetry::FILTER_VAR).ok(),
            level: self.log_level.clone().or(configured).or_else(|| Some(level.to_owned())),
            format: config.map_or(LogFormat::Auto, |config| config.log_format),
            terminal: std::io::stderr().is_terminal(),
        }
    }

    /// Gives this machine's name at GitLab; made and kept beside the configuration at first use.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be read, or the system has no random bytes.
    pub fn system_id(&self) -> anyhow::Result<identity::SystemId> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).context("get random bytes")?;
        let machine_id = identity::machine_id();
        let dir = self.config_path.parent().unwrap_or(camino::Utf8Path::new("."));
        Ok(identity::system_id(dir, machine_id.as_deref(), u128::from_ne_bytes(random))?)
    }
}

/// Prepares to talk to a runner's GitLab.
///
/// # Errors
///
/// When the URL or the certificate files cannot be used.
pub fn client(runner: &Runner) -> Result<gitlab::Client, gitlab::Error> {
    let mut options = gitlab::ClientOptions::new(runner.url.clone());
    options.tls_ca_file.clone_from(&runner.tls_ca_file);
    options.tls_cert_file.clone_from(&runner.tls_cert_file);
    options.tls_key_file.clone_from(&runner.tls_key_file);
    gitlab::Client::new(options)
}

/// Gives what we tell GitLab of ourselves, from the first call on: GitLab keeps what it hears first
/// for the better part of an hour.
pub fn info(shell: Option<&str>) -> Info {
    Info::new(InfoOptions {
        name: "bridge".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        // Of the words GitLab knows, the one for "anything else".
        executor: "custom".to_owned(),
        shell: shell.unwrap_or("bash").to_owned(),
        ..InfoOptions::default()
    })
}

/// Reads the command line and does what it says.
pub fn run(registry: Registry) -> ExitCode {
    let output = Output::process();
    match run_with(registry, std::env::args_os(), &output) {
        Ok(exit) => exit.into(),
        Err(error) => report(&error, &output).into(),
    }
}

/// Does what `args` say; errors are the caller's to print.
fn run_with(
    registry: Registry,
    args: impl IntoIterator<Item = std::ffi::OsString>,
    output: &Output,
) -> anyhow::Result<Exit> {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            output.prompt(&error.render().to_string())?;
            return Ok(Exit::Usage);
        }
        Err(help) => {
            output.bytes(help.render().to_string().as_bytes())?;
            return Ok(Exit::Done);
        }
    };
    let config_named =
        cli.global.config.is_some() || std::env::var_os(config::CONFIG_VAR).is_some();
    let context = Context {
        registry,
        config_named,
        config_path: config_path(cli.global.config),
        log_level: cli.global.log_level,
        clock: Arc::new(SystemClock),
        output: output.clone(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(dispatch(cli.command, &context))
}

async fn dispatch(command: Command, context: &Context) -> anyhow::Result<Exit> {
    if let Command::Serve(args) = command {
        // It logs as its configuration says.
        return args.run(context).await;
    }
    telemetry::init(&context.log_options(None, "warn"), None)?;
    match command {
        Command::Register(args) => args.run(context).await,
        Command::Runners(args) => args.run(context).await,
        Command::Backends(args) => args.run(context).await,
        Command::Doctor(args) => args.run(context).await,
        Command::Serve(args) => args.run(context).await,
        Command::Exec(args) => args.run(context).await,
        Command::Jobs(args) => args.run(context).await,
        Command::Db(args) => args.run(context).await,
    }
}

fn config_path(named: Option<Utf8PathBuf>) -> Utf8PathBuf {
    let path = named.unwrap_or_else(|| {
        let var = |name| std::env::var(name).ok();
        let root = rustix::process::geteuid().is_root();
        config::default_path(var(config::CONFIG_VAR), root, var("HOME"))
    });
    // Relative to where the command was started; a daemon may be elsewhere later.
    camino::absolute_utf8(&path).unwrap_or(path)
}

/// Prints an error with its hint and gives the exit code.
fn report(error: &anyhow::Error, output: &Output) -> Exit {
    let (exit, hint) = classify(error);
    if exit == Exit::Done {
        return exit;
    }
    let hint = hint.map_or_else(String::new, |hint| format!("hint: {hint}\n"));
    let text = format!("error: cannot {}\n{hint}", Chain(error.as_ref()));
    // Standard error may be gone as well; the exit code still says it.
    match output.prompt(&text) {
        Ok(()) | Err(_) => exit,
    }
}
