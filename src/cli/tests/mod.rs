//! Whole commands against a small GitLab: what it is asked, what lands on disk, how they exit.

mod backends;
mod configured;
mod doctor;
mod register;
mod runners;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use camino::Utf8Path;
use serde_json::{Value, json};
use wiremock::matchers::{method, path};
use wiremock::{Mock, MockServer, Request, ResponseTemplate};

use super::exit::Failure;
use super::*;
use crate::domain::clock::ManualClock;
use crate::registry::RegistryError;

const TOKEN: &str = "glrt-t3_abcdefghijklmnopqrst";

fn refusing(
    _table: toml::Table,
) -> Result<Arc<dyn bridge_backend::Backend>, bridge_backend::OpenError> {
    Err(bridge_backend::OpenError::Config("`partition` is missing".into()))
}

fn registry() -> Registry {
    Registry::default()
        .with(bridge_backend::Driver { kind: "local", open: refusing, login: None })
        .with(bridge_backend::Driver { kind: "slurm", open: refusing, login: None })
}

/// A directory for a configuration and a GitLab to talk to.
struct Bench {
    dir: tempfile::TempDir,
    gitlab: MockServer,
    context: Context,
}

impl Bench {
    async fn new() -> Self {
        // Other tests of this process may have been first.
        drop(rustls::crypto::ring::default_provider().install_default());
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(dir.path()).unwrap().to_owned();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).unwrap();
        let context = Context {
            config_named: true,
            registry: registry(),
            config_path: root.join("config.toml"),
            log_level: None,
            clock: Arc::new(ManualClock::new("2026-01-01T00:00:00Z".parse().unwrap())),
            output: Output::memory(),
        };
        Self { dir, gitlab: MockServer::start().await, context }
    }

    async fn answer(&self, verb: &str, at: &str, status: u16, body: Value) {
        let answer = ResponseTemplate::new(status).set_body_json(body);
        let mock = Mock::given(method(verb)).and(path(format!("/api/v4{at}")));
        mock.respond_with(answer).mount(&self.gitlab).await;
    }

    /// Runs a command line, with URL for the GitLab's.
    async fn run(&self, line: &str) -> anyhow::Result<Exit> {
        let words = line.split(' ').filter(|word| !word.is_empty());
        let words = words.map(|word| word.replace("URL", &self.gitlab.uri()));
        let cli = Cli::try_parse_from(std::iter::once("bridge".to_owned()).chain(words)).unwrap();
        match cli.command {
            Command::Register(args) => args.run(&self.context).await,
            Command::Runners(args) => args.run(&self.context).await,
            Command::Backends(args) => args.run(&self.context).await,
            Command::Doctor(args) => args.run(&self.context).await,
            Command::Serve(args) => args.run(&self.context).await,
            Command::Exec(args) => args.run(&self.context).await,
            Command::Jobs(args) => args.run(&self.context).await,
            Command::Db(args) => args.run(&self.context).await,
        }
    }

    /// Runs a command line that must fail; gives the exit code and what is printed.
    async fn fails(&self, line: &str) -> (Exit, String) {
        let error = self.run(line).await.unwrap_err();
        let output = Output::memory();
        let exit = report(&error, &output);
        (exit, self.plain(&output.kept_notes()))
    }

    /// Replaces what differs from run to run.
    fn plain(&self, text: &str) -> String {
        text.replace(self.dir.path().to_str().unwrap(), "DIR").replace(&self.gitlab.uri(), "URL")
    }

    fn out(&self) -> String {
        self.plain(&self.context.output.kept())
    }

    fn path(&self, name: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.dir.path()).unwrap().join(name)
    }

    fn read(&self, name: &str) -> String {
        self.plain(&fs::read_to_string(self.path(name)).unwrap())
    }

    fn write(&self, name: &str, text: &str) {
        let text = text.replace("URL", &self.gitlab.uri());
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn mode(&self, name: &str) -> u32 {
        fs::metadata(self.path(name)).unwrap().permissions().mode() & 0o777
    }

    async fn requests(&self) -> Vec<Request> {
        self.gitlab.received_requests().await.unwrap()
    }

    async fn body(&self, index: usize) -> Value {
        serde_json::from_slice(&self.requests().await[index].body).unwrap()
    }

    /// A configuration with one backend and these runners, whose tokens are `TOKEN`.
    fn with_runners(&self, names: &[&str]) {
        let mut text = "# ours\n[backends.here]\nkind = \"local\"\n".to_owned();
        for name in names {
            text.extend(
                [
                    &format!("\n[[runners]] # {name}\nname = \"{name}\"\nurl = \"URL\"\n"),
                    &format!("token_file = \"{name}.token\"\nbackend = \"here\"\n"),
                ]
                .map(String::as_str),
            );
            self.write(&format!("{name}.token"), TOKEN);
        }
        self.write("config.toml", &text);
    }
}

fn parse(args: &[&str]) -> (anyhow::Result<Exit>, Output) {
    let output = Output::memory();
    let args = std::iter::once("bridge").chain(args.iter().copied());
    let result = run_with(Registry::default(), args.map(std::ffi::OsString::from), &output);
    (result, output)
}

#[test]
fn help_and_version_are_data_and_done() {
    let (result, output) = parse(&["--version"]);
    assert_eq!(result.unwrap(), Exit::Done);
    assert_eq!(output.kept(), format!("bridge {}\n", env!("CARGO_PKG_VERSION")));
    let (result, output) = parse(&["--help"]);
    assert_eq!(result.unwrap(), Exit::Done);
    assert!(output.kept().starts_with("Run GitLab CI jobs on batch systems\n"));
}

#[test]
fn the_help_of_register_is_reviewed() {
    let (result, output) = parse(&["register", "-h"]);
    assert_eq!(result.unwrap(), Exit::Done);
    insta::assert_snapshot!(output.kept());
}

#[test]
fn the_help_of_exec_is_reviewed() {
    let (result, output) = parse(&["exec", "-h"]);
    assert_eq!(result.unwrap(), Exit::Done);
    insta::assert_snapshot!(output.kept());
}

#[test]
fn a_command_line_that_makes_no_sense_is_2() {
    let (result, output) = parse(&["registr"]);
    assert_eq!(result.unwrap(), Exit::Usage);
    assert_eq!(output.kept(), "");
    assert!(output.kept_notes().contains("'register'"), "{}", output.kept_notes());
}

#[test]
fn the_command_line_is_consistent() {
    use clap::CommandFactory as _;
    Cli::command().debug_assert();
}

#[test]
fn an_error_is_a_chain_with_a_hint() {
    let output = Output::memory();
    let failure = Failure::new(Exit::NotFound, "find the job 7").hint("try `bridge jobs list`");
    let exit = report(&anyhow::Error::new(failure).context("cancel"), &output);
    assert_eq!(exit, Exit::NotFound);
    assert_eq!(
        output.kept_notes(),
        "error: cannot cancel: find the job 7\nhint: try `bridge jobs list`\n"
    );
    let unknown = RegistryError::UnknownKind {
        kind: "x".into(),
        guess: String::new(),
        known: "local".into(),
    };
    assert_eq!(report(&anyhow::Error::new(unknown), &output), Exit::Configuration);
}

#[test]
fn a_reader_that_went_away_is_not_reported() {
    let output = Output::memory();
    let pipe = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
    assert_eq!(report(&anyhow::Error::new(pipe), &output), Exit::Done);
    assert_eq!(output.kept_notes(), "");
}
