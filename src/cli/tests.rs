//! Whole commands against a small GitLab: what it is asked, what lands on disk, how they exit.

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

#[path = "runners_tests.rs"]
mod runners;

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

#[tokio::test]
async fn an_authentication_token_is_verified_with_all_we_are_and_kept_private() {
    let bench = Bench::new().await;
    let reply = json!({"id": 12, "token": TOKEN, "token_expires_at": null});
    bench.answer("POST", "/runners/verify", 200, reply).await;
    let line = format!("register --url URL/ --token {TOKEN} --name one --backend local --limit 3");
    assert_eq!(bench.run(&line).await.unwrap(), Exit::Done);

    let body = bench.body(0).await;
    assert_eq!(body["token"], TOKEN);
    let system_id = body["system_id"].as_str().unwrap();
    assert_eq!(system_id, bench.read(".runner_system_id"));
    assert_eq!(body["info"]["name"], "bridge");
    assert!(body["info"]["features"].as_object().unwrap().len() > 20, "{body}");

    assert_eq!(bench.read("one.token"), format!("{TOKEN}\n"));
    assert_eq!((bench.mode("one.token"), bench.mode("config.toml")), (0o600, 0o600));
    insta::assert_snapshot!(bench.read("config.toml"));
    let notes = bench.plain(&bench.context.output.kept_notes());
    insta::assert_snapshot!(notes, @r#"
    registered "one" (runner #12 at URL/) on the backend "local"
    configuration: DIR/config.toml
    token: DIR/one.token
    "#);
    assert!(!notes.contains("abcdefghij"), "{notes}");
    let config = config::load(&bench.context.config_path).unwrap();
    assert_eq!((config.runners[0].id, config.runners[0].limit), (Some(12), 3));
}

#[tokio::test]
async fn a_registration_token_registers_with_everything_at_the_top_level() {
    let bench = Bench::new().await;
    let reply =
        json!({"id": 13, "token": "glrtr-new", "token_expires_at": "2026-09-27T21:05:03.203Z"});
    bench.answer("POST", "/runners", 201, reply).await;
    let line = "register --url URL --token GR1348941abc --name two --backend local \
        --description d --tag-list=a,b --run-untagged=false --locked=false --access-level \
        ref_protected --maximum-timeout 1h --paused --maintenance-note m --env A=1 --env B=2 \
        --request-concurrency 2";
    assert_eq!(bench.run(line).await.unwrap(), Exit::Done);
    let mut body = bench.body(0).await;
    body["info"] = json!("…");
    assert_eq!(
        body,
        json!({
            "token": "GR1348941abc", "info": "…", "description": "d", "maintenance_note": "m",
            "tag_list": "a,b", "run_untagged": false, "locked": false,
            "access_level": "ref_protected", "maximum_timeout": 3600, "paused": true
        })
    );
    assert_eq!(bench.read("two.token"), "glrtr-new\n");
    let text = bench.read("config.toml");
    assert!(text.contains("token_expires_at = 2026-09-27T21:05:03.203Z\n"), "{text}");
    assert!(text.contains("environment = [\"A=1\", \"B=2\"]\n"), "{text}");
    config::load(&bench.context.config_path).unwrap();
}

#[tokio::test]
async fn a_plain_registration_has_gitlab_runners_defaults() {
    let bench = Bench::new().await;
    bench.answer("POST", "/runners", 201, json!({"id": 13, "token": "glrtr-new"})).await;
    bench.run("register --url URL --token GR1 --name two --backend local").await.unwrap();
    let mut body = bench.body(0).await;
    body["info"] = json!("…");
    assert_eq!(
        body,
        json!({"token": "GR1", "info": "…", "description": "two", "run_untagged": true,
               "locked": true, "paused": false})
    );
}

#[tokio::test]
async fn settings_of_gitlab_are_refused_with_an_authentication_token() {
    let bench = Bench::new().await;
    let line = format!(
        "register --url URL --token {TOKEN} --name one --backend local --tag-list a --locked"
    );
    let (exit, text) = bench.fails(&line).await;
    assert_eq!(exit, Exit::Usage);
    insta::assert_snapshot!(text, @"
    error: cannot set --tag-list, --locked with a runner's authentication token
    hint: these are settings of the runner in GitLab; change them there, or use --registration-token if this is one
    ");
    assert!(bench.requests().await.is_empty());
}

#[tokio::test]
async fn the_kind_of_token_can_be_said() {
    let bench = Bench::new().await;
    bench.answer("POST", "/runners/verify", 200, json!({"id": 1})).await;
    bench.answer("POST", "/runners", 201, json!({"id": 2, "token": "t"})).await;
    let line = |rest: &str| format!("register --url URL --backend local {rest}");
    bench.run(&line("--token acme-glrt-x --name a")).await.unwrap();
    bench.run(&line("--token whatever --authentication-token --name b")).await.unwrap();
    bench.run(&line("--token glrt-x --registration-token --name c")).await.unwrap();
    let paths: Vec<_> =
        bench.requests().await.iter().map(|request| request.url.path().to_owned()).collect();
    assert_eq!(paths, ["/api/v4/runners/verify", "/api/v4/runners/verify", "/api/v4/runners"]);
}

#[tokio::test]
async fn a_token_from_a_file_never_stands_on_the_command_line() {
    let bench = Bench::new().await;
    bench.answer("POST", "/runners/verify", 200, json!({"id": 1})).await;
    bench.write("from-gitlab", &format!("  {TOKEN}\n"));
    let line = format!(
        "register --url URL --backend local --name a --token-file {}",
        bench.path("from-gitlab")
    );
    bench.run(&line).await.unwrap();
    assert_eq!(bench.body(0).await["token"], TOKEN);
}

#[tokio::test]
async fn a_second_runner_is_appended_and_nothing_else_changes() {
    let bench = Bench::new().await;
    bench.answer("POST", "/runners/verify", 200, json!({"id": 5})).await;
    bench.with_runners(&["old"]);
    let before = bench.read("config.toml");
    bench.run(&format!("register --url URL --token {TOKEN} --name new")).await.unwrap();
    let after = bench.read("config.toml");
    let added = after.strip_prefix(&before).unwrap();
    insta::assert_snapshot!(added, @r#"

    [[runners]]
    name = "new"
    url = "URL"
    backend = "here"
    token_file = "new.token"
    id = 5
    "#);
}

#[tokio::test]
async fn the_same_name_twice_is_refused_before_gitlab_is_asked() {
    let bench = Bench::new().await;
    bench.with_runners(&["old"]);
    let (exit, text) = bench.fails(&format!("register --url URL --token {TOKEN} --name old")).await;
    assert_eq!(exit, Exit::Usage);
    insta::assert_snapshot!(text, @r#"
    error: cannot register "old": a runner of this name is in the configuration
    hint: choose another --name, or remove it first with `bridge runners unregister old`
    "#);
    assert!(bench.requests().await.is_empty());
}

#[tokio::test]
async fn a_refused_token_leaves_no_trace() {
    let bench = Bench::new().await;
    bench.answer("POST", "/runners/verify", 403, json!({"message": "403 Forbidden"})).await;
    let line = format!("register --url URL --token {TOKEN} --name one --backend local");
    let (exit, text) = bench.fails(&line).await;
    assert_eq!(exit, Exit::Gitlab);
    insta::assert_snapshot!(text, @r#"
    error: cannot verify "one": GitLab does not know the token
    hint: look whether the runner was deleted or its token reset, and whether --url is right
    "#);
    assert!(!bench.path("config.toml").exists() && !bench.path("one.token").exists());
}

#[tokio::test]
async fn registration_tokens_switched_off_point_to_the_new_way() {
    let bench = Bench::new().await;
    let reply = json!({"message": "410 Gone", "reason": "runner_registration_disallowed"});
    bench.answer("POST", "/runners", 410, reply).await;
    let (exit, text) =
        bench.fails("register --url URL --token GR1 --name one --backend local").await;
    assert_eq!(exit, Exit::Gitlab);
    insta::assert_snapshot!(text, @r#"
    error: cannot register "one": GitLab has registration tokens switched off
    hint: create the runner in GitLab and use the glrt- token it shows
    "#);
}

#[tokio::test]
async fn what_contradicts_the_configuration_is_found_first() {
    let bench = Bench::new().await;
    let line = |rest: &str| format!("register --token {TOKEN} --name one {rest}");
    let (exit, text) = bench.fails(&line("--url URL")).await;
    assert_eq!(exit, Exit::Configuration);
    insta::assert_snapshot!(text, @"
    error: cannot choose a backend: the configuration has none
    hint: add [backends.NAME] with one of these kinds: local, slurm; or use --backend local
    ");
    bench.with_runners(&["old"]);
    let (exit, text) = bench.fails(&line("--url URL --backend there")).await;
    assert_eq!(exit, Exit::Configuration);
    insta::assert_snapshot!(text, @r#"
    error: cannot find the backend "there"
    hint: there are: here
    "#);
    let (exit, text) = bench.fails(&line("--url gitlab.example.org")).await;
    assert_eq!(exit, Exit::Usage);
    insta::assert_snapshot!(text, @r#"error: cannot register "one": `url` is no URL: relative URL without a base"#);
    let (exit, text) = bench.fails(&line("--url URL --env oops")).await;
    assert_eq!(exit, Exit::Usage);
    insta::assert_snapshot!(text, @r#"error: cannot register "one": `environment` entry 1 is not "NAME=value""#);
    bench.write("config.toml", "concurent = 5\n");
    let (exit, text) = bench.fails(&line("--url URL")).await;
    assert_eq!(exit, Exit::Configuration);
    insta::assert_snapshot!(text, @"error: cannot use the configuration: DIR/config.toml:1: unknown key `concurent` at the top of the file; did you mean `concurrent`?");
    assert!(bench.requests().await.is_empty());
}

#[tokio::test]
async fn a_gitlab_that_is_away_is_no_verdict() {
    let bench = Bench::new().await;
    // Bound and closed again: nobody listens there.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let line = format!(
        "register --url http://127.0.0.1:{port} --token {TOKEN} --name one --backend local"
    );
    let (exit, text) = bench.fails(&line).await;
    assert_eq!(exit, Exit::Gitlab);
    assert!(text.starts_with("error: cannot verify \"one\": POST http://127.0.0.1:"), "{text}");
    assert!(!text.contains(TOKEN) && !bench.path("config.toml").exists());
}

#[tokio::test]
async fn runners_are_listed_without_asking_gitlab_and_without_their_tokens() {
    let bench = Bench::new().await;
    bench.with_runners(&["one", "second one"]);
    assert_eq!(bench.run("runners list").await.unwrap(), Exit::Done);
    assert_eq!(bench.run("runners list --json").await.unwrap(), Exit::Done);
    let out = bench.out().replace(&format!("{:width$}", "URL", width = 0), "URL");
    let json: Vec<Value> = out
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        json[0],
        json!({"name": "one", "url": "URL", "backend": "here", "limit": 0, "id": null,
               "token": "abcdefghi", "token_expires_at": null})
    );
    let words: Vec<Vec<&str>> = out
        .lines()
        .take(3)
        .map(|l| l.split("  ").map(str::trim).filter(|w| !w.is_empty()).collect())
        .collect();
    assert_eq!(words[0], ["NAME", "URL", "BACKEND", "LIMIT", "ID", "TOKEN"]);
    assert_eq!(words[2], ["second one", "URL", "here", "-", "-", "abcdefghi"]);
    assert!(bench.requests().await.is_empty());
    assert!(!out.contains("jklmnop"), "{out}");
}

#[tokio::test]
async fn verifying_says_of_each_runner_how_it_stands() {
    let bench = Bench::new().await;
    bench.with_runners(&["good", "gone"]);
    bench.write("gone.token", "glrt-gone");
    let gone = ResponseTemplate::new(403).set_body_json(json!({"message": "403 Forbidden"}));
    Mock::given(method("POST"))
        .and(path("/api/v4/runners/verify"))
        .and(wiremock::matchers::body_partial_json(json!({"token": "glrt-gone"})))
        .respond_with(gone)
        .mount(&bench.gitlab)
        .await;
    bench.answer("POST", "/runners/verify", 200, json!({"id": 3})).await;
    assert_eq!(bench.run("runners verify good --json").await.unwrap(), Exit::Done);
    assert_eq!(bench.run("runners verify --json").await.unwrap(), Exit::Gitlab);
    insta::assert_snapshot!(bench.out(), @r#"
    {"name":"good","url":"URL","result":"valid","id":3,"detail":""}
    {"name":"good","url":"URL","result":"valid","id":3,"detail":""}
    {"name":"gone","url":"URL","result":"refused","id":null,"detail":"deleted, or the token was reset"}
    "#);
    let (exit, text) = bench.fails("runners verify nobody").await;
    assert_eq!(exit, Exit::NotFound);
    insta::assert_snapshot!(text, @r#"
    error: cannot find the runner "nobody"
    hint: there are: good, gone
    "#);
}

#[tokio::test]
async fn of_a_runner_made_in_gitlab_only_the_manager_is_removed() {
    let bench = Bench::new().await;
    bench.with_runners(&["one", "two"]);
    bench.answer("DELETE", "/runners/managers", 204, json!(null)).await;
    assert_eq!(bench.run("runners unregister one").await.unwrap(), Exit::Done);
    let body = bench.body(0).await;
    assert_eq!(body["token"], TOKEN);
    assert_eq!(body["system_id"].as_str().unwrap(), bench.read(".runner_system_id"));
    assert!(!bench.path("one.token").exists() && bench.path("two.token").exists());
    let text = bench.read("config.toml");
    assert!(!text.contains("one") && text.contains("name = \"two\""), "{text}");
    assert!(text.starts_with("# ours\n[backends.here]\n"), "{text}");
}

#[tokio::test]
async fn a_runner_of_a_registration_token_is_removed_whole() {
    let bench = Bench::new().await;
    bench.with_runners(&["one"]);
    bench.write("one.token", "glrtr-abc");
    bench.answer("DELETE", "/runners", 204, json!(null)).await;
    bench.run("runners unregister one").await.unwrap();
    assert_eq!(bench.body(0).await, json!({"token": "glrtr-abc"}));
    assert_eq!(config::load_incomplete(&bench.context.config_path).unwrap().runners.len(), 0);
}

#[tokio::test]
async fn a_runner_gitlab_would_not_remove_stays_unless_forced() {
    let bench = Bench::new().await;
    bench.with_runners(&["one"]);
    bench.answer("DELETE", "/runners/managers", 403, json!({"message": "403"})).await;
    let (exit, text) = bench.fails("runners unregister one").await;
    assert_eq!(exit, Exit::Gitlab);
    assert!(text.starts_with("error: cannot unregister \"one\": GitLab does not know"), "{text}");
    assert!(bench.path("one.token").exists());
    assert_eq!(bench.run("runners unregister one --force").await.unwrap(), Exit::Done);
    assert!(!bench.path("one.token").exists());
}

#[tokio::test]
async fn backends_are_listed_and_checked() {
    let bench = Bench::new().await;
    bench.with_runners(&["one"]);
    let text = fs::read_to_string(bench.path("config.toml")).unwrap();
    bench.write(
        "config.toml",
        &format!("{text}\n[backends.far]\nkind = \"slrum\"\nmax_queued = 5\n"),
    );
    assert_eq!(bench.run("backends list").await.unwrap(), Exit::Done);
    insta::assert_snapshot!(bench.out(), @"
    NAME  KIND   MAX_QUEUED  RUNNERS
    far   slrum  5           -
    here  local  -           one
    ");
    assert_eq!(bench.run("backends check far --json").await.unwrap(), Exit::Configuration);
    let out = bench.out();
    let last: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!((&last["result"], &last["whose_move"]), (&json!("fail"), &json!("operator")));
    assert!(last["detail"].as_str().unwrap().contains("did you mean \"slurm\""), "{last}");
    let (exit, text) = bench.fails("backends check nowhere").await;
    assert_eq!(exit, Exit::NotFound);
    insta::assert_snapshot!(text, @r#"
    error: cannot find the backend "nowhere"
    hint: there are: far, here
    "#);
}

fn agreeing(table: toml::Table, invite: bridge_backend::Invite) -> bridge_backend::LoggingIn {
    use bridge_backend::{BackendError, Fault, Invitation, Login, LoginError, OpenError, Remedy};
    Box::pin(async move {
        match table.get("mood").and_then(toml::Value::as_str) {
            Some("wrong") => return Err(LoginError::Settings(OpenError::Config("no `vo`".into()))),
            Some("away") => {
                let error = BackendError::new(bridge_backend::ErrorKind::Transient, "reach it");
                return Err(error.with_source("connection refused").into());
            }
            Some("stern") => {
                let kind = bridge_backend::ErrorKind::Rejected(Fault::Site);
                return Err(BackendError::new(kind, "let you in").into());
            }
            Some(_) | None => {}
        }
        let lives = std::time::Duration::from_secs(600);
        invite(Invitation { address: "https://grid/x?c=AB".into(), code: "AB".into(), lives });
        Ok(Login {
            who: "robot, VO v".into(),
            left: Some(std::time::Duration::from_secs(5 * 3_600)),
            ends_soon: true,
            remedy: Remedy::Login,
        })
    })
}

#[tokio::test]
async fn a_login_invites_and_says_until_when_and_fails_with_its_own_code() {
    let mut bench = Bench::new().await;
    bench.context.registry = Registry::default()
        .with(bridge_backend::Driver { kind: "local", open: refusing, login: None })
        .with(bridge_backend::Driver { kind: "grid", open: refusing, login: Some(agreeing) });
    let mut text =
        "[backends.here]\nkind = \"local\"\n[backends.grid]\nkind = \"grid\"\n".to_owned();
    for mood in ["wrong", "away", "stern"] {
        text.extend(["[backends.", mood, "]\nkind = \"grid\"\nmood = \"", mood, "\"\n"]);
    }
    bench.write("config.toml", &text);
    assert_eq!(bench.run("backends login grid").await.unwrap(), Exit::Done);
    let out = bench.out();
    assert!(
        out.starts_with("Open https://grid/x?c=AB\nand agree; the code there must be AB.\n"),
        "{out}"
    );
    assert!(
        out.contains("\nLogged in as robot, VO v until ") && out.contains("(for 5 hours)"),
        "{out}"
    );
    let notes = bench.context.output.kept_notes();
    assert!(
        notes.contains("warning: the login ends in 5 hours and nothing prolongs it"),
        "{notes}"
    );
    for (line, code) in [
        ("backends login here", Exit::Usage),
        ("backends login nowhere", Exit::NotFound),
        ("backends login wrong", Exit::Configuration),
        ("backends login away", Exit::Backend),
        ("backends login stern", Exit::Backend),
    ] {
        let (exit, text) = bench.fails(line).await;
        assert_eq!(exit, code, "{text}");
        insta::allow_duplicates! { insta::with_settings!({snapshot_suffix => line.replace(' ', "_")}, {
            insta::assert_snapshot!(text);
        }); }
    }
}

/// The findings of `doctor --json`, by check and subject.
async fn doctor(bench: &Bench) -> (Exit, Vec<Value>) {
    let before = bench.context.output.kept().len();
    let exit = bench.run("doctor --json").await.unwrap();
    let out = bench.context.output.kept();
    let lines = out.get(before..).unwrap().lines();
    (exit, lines.map(|line| serde_json::from_str(&bench.plain(line)).unwrap()).collect())
}

fn find<'a>(findings: &'a [Value], check: &str) -> &'a Value {
    findings.iter().find(|finding| finding["check"] == check).unwrap()
}

#[tokio::test]
async fn the_doctor_looks_at_everything_once() {
    let bench = Bench::new().await;
    bench.with_runners(&["one", "two"]);
    bench.answer("POST", "/runners/verify", 200, json!({"id": 3})).await;
    bench.answer("GET", "/version", 401, json!({"message": "401 Unauthorized"})).await;
    let (exit, findings) = doctor(&bench).await;
    // The backend of this test cannot be opened; everything above it is well.
    assert_eq!(exit, Exit::Configuration);
    let checks: Vec<&str> = findings.iter().map(|f| f["check"].as_str().unwrap()).collect();
    assert_eq!(
        checks,
        [
            "configuration",
            "file modes",
            "file modes",
            "file modes",
            "file modes",
            "file system",
            "free disk",
            "key file",
            "clock",
            "token",
            "token",
            "backend"
        ]
    );
    for finding in &findings[..11] {
        assert_ne!(finding["result"], "fail", "{finding}");
    }
    assert_eq!(find(&findings, "token")["detail"], "runner #3");
    assert_eq!(find(&findings, "key file")["detail"], "made at the first start");
    assert_eq!(find(&findings, "clock")["result"], "ok");
    let backend = find(&findings, "backend");
    assert_eq!((&backend["result"], &backend["whose_move"]), (&json!("fail"), &json!("operator")));
}

#[tokio::test]
async fn the_doctor_finds_a_token_gitlab_does_not_know() {
    let bench = Bench::new().await;
    bench.with_runners(&["one"]);
    bench.answer("POST", "/runners/verify", 403, json!({"message": "403"})).await;
    bench.answer("GET", "/version", 401, json!({})).await;
    let (exit, findings) = doctor(&bench).await;
    assert_eq!(exit, Exit::Gitlab);
    let token = find(&findings, "token");
    assert_eq!((&token["result"], &token["whose_move"]), (&json!("fail"), &json!("operator")));
}

#[tokio::test]
async fn the_doctor_finds_a_clock_that_is_wrong() {
    let bench = Bench::new().await;
    bench.with_runners(&["one"]);
    bench.answer("POST", "/runners/verify", 200, json!({"id": 3})).await;
    let late = ResponseTemplate::new(401)
        .insert_header("date", "Sun, 06 Nov 1994 08:49:37 GMT")
        .set_body_json(json!({}));
    Mock::given(method("GET")).respond_with(late).mount(&bench.gitlab).await;
    let (exit, findings) = doctor(&bench).await;
    assert_eq!(exit, Exit::Unexpected);
    let clock = find(&findings, "clock");
    assert!(clock["detail"].as_str().unwrap().ends_with("s ahead of GitLab's"), "{clock}");
}

#[tokio::test]
async fn the_doctor_finds_files_that_others_can_change() {
    let bench = Bench::new().await;
    bench.with_runners(&[]);
    fs::set_permissions(bench.path("config.toml"), fs::Permissions::from_mode(0o666)).unwrap();
    let (exit, findings) = doctor(&bench).await;
    assert_eq!(exit, Exit::Configuration);
    assert_eq!(find(&findings, "configuration")["result"], "fail", "there are no runners");
    assert_eq!(
        find(&findings, "file modes")["detail"],
        "others can write it (mode 0666); run chmod go-w DIR/config.toml"
    );
}

#[tokio::test]
async fn the_doctor_shows_what_is_wrong_with_the_file() {
    let bench = Bench::new().await;
    let (exit, findings) = doctor(&bench).await;
    assert_eq!((exit, findings.len()), (Exit::Configuration, 1));
    assert_eq!(
        findings[0]["detail"],
        "DIR/config.toml: no such file (name the file with --config or $BRIDGE_CONFIG, or make \
         one with `bridge register`)"
    );
}

#[tokio::test]
async fn a_runner_made_in_gitlab_comes_and_goes_and_stays_in_gitlab() {
    use crate::coordinator::{Coordinator, Options, RunnerOptions};
    let bench = Bench::new().await;
    let options = Options { root: "/gitlab".into(), ..Options::default() };
    let gitlab = Coordinator::start(options).await.unwrap();
    let token = gitlab.add_runner(RunnerOptions::default());
    let line =
        format!("register --url {} --token {token} --name one --backend local", gitlab.url());
    assert_eq!(bench.run(&line).await.unwrap(), Exit::Done);
    let managers = gitlab.runner(&token).unwrap().managers;
    assert_eq!(managers.len(), 1);
    assert_eq!(&*managers[0].system_id, bench.read(".runner_system_id"));
    let features = &managers[0].features;
    assert!(features.contains(&"cancel_gracefully".to_owned()), "told at once: {features:?}");

    assert_eq!(bench.run("runners verify").await.unwrap(), Exit::Done);
    let (_exit, findings) = doctor(&bench).await;
    assert_eq!(find(&findings, "token")["result"], "ok");
    assert_eq!(find(&findings, "clock")["result"], "ok");
    assert_eq!(gitlab.runner(&token).unwrap().managers.len(), 1, "one machine, one manager");

    assert_eq!(bench.run("runners unregister one").await.unwrap(), Exit::Done);
    assert_eq!(gitlab.runner(&token).unwrap().managers.len(), 0);
    let (exit, text) = bench.fails("runners verify one").await;
    assert_eq!(exit, Exit::NotFound);
    assert!(text.contains("there are no runners"), "{text}");
    // The doctor's question for the date is none of the runner API, which is all that is played.
    let mut violations = gitlab.violations();
    violations.retain(|violation| !violation.ends_with("GET /version"));
    assert_eq!(violations, Vec::<String>::new());
}

#[tokio::test]
async fn the_local_backend_that_register_adds_would_take_a_job() {
    let mut bench = Bench::new().await;
    bench.context.registry = Registry::builtin();
    bench.answer("POST", "/runners/verify", 200, json!({"id": 5})).await;
    bench
        .run(&format!("register --url URL --token {TOKEN} --name a --backend local"))
        .await
        .unwrap();
    assert_eq!(bench.run("backends check --json").await.unwrap(), Exit::Done, "{}", bench.out());
    let row: Value = serde_json::from_str(bench.out().trim()).unwrap();
    assert_eq!((&row["result"], &row["whose_move"]), (&json!("ok"), &json!("nobody")));
}

#[tokio::test]
async fn a_runner_of_a_registration_token_comes_and_goes_whole() {
    use crate::coordinator::{Coordinator, Options, Registration};
    let bench = Bench::new().await;
    let registration = Registration::Allowed("GR1348941secret".into());
    let gitlab = Coordinator::start(Options { registration, ..Options::default() }).await.unwrap();
    let line = |token: &str| {
        format!(
            "register --url {} --token {token} --name one --backend local --paused",
            gitlab.url()
        )
    };
    let (exit, text) = bench.fails(&line("GR1348941wrong")).await;
    assert_eq!(exit, Exit::Gitlab);
    assert!(text.contains("GitLab refused the registration token"), "{text}");
    assert_eq!(bench.run(&line("GR1348941secret")).await.unwrap(), Exit::Done);
    let token = bench.read("one.token").trim().to_owned();
    let runner = gitlab.runner(&token).unwrap();
    assert_eq!((runner.description.as_str(), runner.paused), ("one", true));
    assert_eq!(bench.run("runners unregister one").await.unwrap(), Exit::Done);
    assert_eq!(gitlab.violations(), Vec::<String>::new());
    let again = format!(
        "register --url {} --token {token} --authentication-token --name one --backend local",
        gitlab.url()
    );
    let (exit, text) = bench.fails(&again).await;
    assert_eq!(exit, Exit::Gitlab);
    assert!(text.contains("GitLab does not know the token"), "{text}");
}

#[tokio::test]
async fn a_token_that_was_deleted_meanwhile_is_found_out() {
    use crate::coordinator::{Coordinator, Options, RunnerOptions};
    let bench = Bench::new().await;
    let gitlab = Coordinator::start(Options::default()).await.unwrap();
    let token = gitlab.add_runner(RunnerOptions::default());
    let line =
        format!("register --url {} --token {token} --name one --backend local", gitlab.url());
    bench.run(&line).await.unwrap();
    gitlab.delete_runner(&token);
    assert_eq!(bench.run("runners verify --json").await.unwrap(), Exit::Gitlab);
    let row: Value = serde_json::from_str(bench.out().trim()).unwrap();
    assert_eq!(row["result"], "refused");
}
