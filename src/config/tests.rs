//! A good file read whole, and every bad one with the exact message.

use std::os::unix::fs::PermissionsExt as _;

use tempfile::TempDir;

use super::*;
use crate::telemetry::Chain;

/// A directory with a configuration in it.
struct Place {
    dir: TempDir,
}

impl Place {
    /// Makes a place with this file; `FILE` is replaced by nothing, tokens lie beside it.
    fn new(text: &str) -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        place.write("config.toml", text, 0o600);
        place.write("good.token", "glrt-abcdefghijklmnopqrst\n", 0o600);
        place
    }

    fn path(&self, name: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.dir.path()).unwrap().join(name)
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        std::fs::write(self.path(name), text).unwrap();
        self.mode(name, mode);
    }

    fn mode(&self, name: &str, mode: u32) {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(self.path(name), mode).unwrap();
    }

    fn load(&self) -> Result<Config, ConfigError> {
        load(&self.path("config.toml"))
    }

    /// The message as an operator sees it, with DIR for the directory.
    fn message(&self) -> String {
        let error = self.load().unwrap_err();
        Chain(&error).to_string().replace(self.dir.path().to_str().unwrap(), "DIR")
    }
}

const RUNNER: &str = r#"
[[runners]]
name = "one"
url = "https://gitlab.example.org"
token_file = "good.token"
backend = "here"
"#;

const BACKEND: &str = "\n[backends.here]\nkind = \"local\"\n";

/// The message for a file with `top` above a good runner and a good backend.
fn top(top: &str) -> String {
    Place::new(&format!("{top}\n{RUNNER}{BACKEND}")).message()
}

/// The message for a file with `line` added to a good runner.
fn in_runner(line: &str) -> String {
    Place::new(&format!("{RUNNER}{line}\n{BACKEND}")).message()
}

#[test]
fn a_small_file_has_every_default() {
    let place = Place::new(&format!("{RUNNER}{BACKEND}"));
    let config = place.load().unwrap();
    assert_eq!(config.path, place.path("config.toml"));
    assert_eq!(config.state_dir, place.path("state"));
    assert_eq!(config.key_file, place.path("bridge.key"));
    assert_eq!((config.concurrent, config.check_interval), (100, Duration::from_secs(3)));
    assert_eq!(config.retention, Duration::from_secs(30 * 86_400));
    assert_eq!(config.lost_after, Duration::from_secs(1800));
    assert_eq!(config.shutdown_timeout, Duration::from_secs(30));
    assert_eq!((config.prepare_workers, config.finish_workers), (4, 4));
    assert_eq!((config.listen_address.clone(), config.log_level.clone()), (None, None));
    assert_eq!(config.log_format, LogFormat::Auto);
    let runner = config.runner(&RunnerName::from("one")).unwrap();
    assert_eq!(runner.token.expose(), "glrt-abcdefghijklmnopqrst");
    assert_eq!(runner.token_file.as_deref(), Some(&*place.path("good.token")));
    assert_eq!((runner.limit, runner.request_concurrency), (0, 1));
    assert_eq!(runner.output_limit, 4096 * 1024);
    assert_eq!(runner.unhealthy_requests_limit, 3);
    assert_eq!(runner.unhealthy_interval, Duration::from_secs(3600));
    assert_eq!(runner.job_status_final_update_retry_limit, 10);
    assert_eq!(runner.deadline_reserve, Duration::from_secs(60));
    assert_eq!(runner.minimum_run_time, Duration::from_secs(10));
    assert_eq!(config.builds_dir(runner), place.path("state/builds"));
    let backend = &config.backends[&BackendName::from("here")];
    assert_eq!(
        (backend.kind.as_str(), backend.max_queued, backend.poll_interval),
        ("local", None, None)
    );
    assert_eq!(backend.sources, SourcesPlace::SubmitNode);
    assert!(backend.table.is_empty());
}

#[test]
fn a_full_file_is_read_whole() {
    let place = Place::new(
        r#"
state_dir = "/var/lib/bridge"
concurrent = 500
check_interval = 5                     # a bare number of seconds, as gitlab-runner has it
log_level = "warning"
log_format = "json"
listen_address = "localhost"
shutdown_timeout = "1m 30s"
prepare_workers = 8
finish_workers = 2
retention = "2 weeks"
lost_after = "1 hour"

[[runners]]
name = "cluster ci"
id = 12345
token_obtained_at = 2026-01-01T00:00:00Z
token_expires_at = 0001-01-01T00:00:00Z
url = "https://gitlab.example.org/root/"
token = "glrt-inline"
backend = "cluster"
limit = 20
request_concurrency = 0
strict_check_interval = true
builds_dir = "/scratch/ci/./builds/"
cache_dir = "../cache"
environment = ["A=1", "B=x=y", "C="]
output_limit = 1
tls-ca-file = "ca.pem"
tls_cert_file = "/etc/cert.pem"
shell = "bash"
login_shell = false
image = "refuse"
clone_url = "http://inside:8080"
pre_get_sources_script = "echo a"
pre_clone_script_not = false
prepare_timeout = "10m"
get_sources_timeout = 300
unhealthy_interval = "1h"
unhealthy_requests_limit = 7
debug_trace_disabled = true
deadline_reserve = "2m"
minimum_run_time = "45s"
mirrors_dir = "/var/cache/mirrors"
mirrors_keep = "10 days"
[runners.custom_build_dir]
enabled = true
[runners.feature_flags]
FF_TIMESTAMPS = false

[backends.cluster]
kind = "slurm"
max_queued = 200
job_options = ["time"]
poll_interval = "5s"
sources = "allocation"
partition = "ci"
extra = ["--exclusive"]
"#
        .replace("pre_clone_script_not = false\n", "")
        .as_str(),
    );
    let config = place.load().unwrap();
    assert_eq!(config.concurrent, 500);
    assert_eq!(config.check_interval, Duration::from_secs(5));
    assert_eq!(config.log_level.as_deref(), Some("warn"));
    assert_eq!(config.log_format, LogFormat::Json);
    assert_eq!(config.listen_address, Some(ListenAddress::Tcp("127.0.0.1:9252".parse().unwrap())));
    assert_eq!(config.shutdown_timeout, Duration::from_secs(90));
    assert_eq!(config.retention, Duration::from_secs(14 * 86_400));
    let runner = &config.runners[0];
    assert_eq!((runner.id, runner.limit, runner.request_concurrency), (Some(12345), 20, 1));
    assert_eq!(runner.builds_dir.as_deref(), Some(Utf8Path::new("/scratch/ci/builds")));
    assert_eq!(runner.cache_dir, Some(place.path("../cache")));
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(runner.environment, [pair("A", "1"), pair("B", "x=y"), pair("C", "")]);
    assert_eq!(runner.output_limit, 1024);
    assert_eq!(runner.tls_ca_file, Some(place.path("ca.pem")));
    assert_eq!(runner.get_sources_timeout, Some(Duration::from_secs(300)));
    assert_eq!(runner.prepare_timeout, Some(Duration::from_secs(600)));
    assert!(!runner.feature_flags["FF_TIMESTAMPS"]);
    assert!(!runner.login_shell);
    assert_eq!(runner.image, ImagePolicy::Refuse);
    assert!(runner.custom_build_dir);
    assert_eq!(runner.mirrors_dir.as_deref(), Some(Utf8Path::new("/var/cache/mirrors")));
    assert_eq!(runner.mirrors_keep, Duration::from_secs(10 * 86_400));
    let backend = &config.backends[&BackendName::from("cluster")];
    assert_eq!(backend.max_queued, Some(200));
    assert_eq!(backend.job_options.as_deref(), Some(["time".to_owned()].as_slice()));
    assert_eq!(backend.poll_interval, Some(Duration::from_secs(5)));
    assert_eq!(backend.sources, SourcesPlace::Allocation);
    assert_eq!(backend.table.keys().collect::<Vec<_>>(), ["extra", "partition"]);
}

#[test]
fn no_debug_shows_a_token_or_a_variable() {
    let text =
        format!("{RUNNER}environment = [\"KEY=hunter2\"]\n{BACKEND}password = \"hunter2\"\n");
    let shown = format!("{:?}", Place::new(&text).load().unwrap());
    assert!(!shown.contains("hunter2") && !shown.contains("glrt-"), "{shown}");
}

#[test]
fn an_unknown_key_names_the_nearest_one() {
    insta::assert_snapshot!(top("concurent = 5"), @"DIR/config.toml:1: unknown key `concurent` at the top of the file; did you mean `concurrent`?");
    insta::assert_snapshot!(in_runner("build_dir = \"/x\""), @"DIR/config.toml:7: unknown key `build_dir` in [[runners]]; did you mean `builds_dir`?");
    insta::assert_snapshot!(in_runner("tls-caa-file = \"x\""), @"DIR/config.toml:7: unknown key `tls-caa-file` in [[runners]]; did you mean `tls_ca_file`?");
    insta::assert_snapshot!(top("frobnicate = 5"), @"DIR/config.toml:1: unknown key `frobnicate` at the top of the file");
}

#[test]
fn a_key_in_the_wrong_table_is_sent_to_the_right_one() {
    insta::assert_snapshot!(top("limit = 5"), @"DIR/config.toml:1: unknown key `limit` at the top of the file; it belongs in [[runners]]");
    insta::assert_snapshot!(in_runner("concurrent = 5"), @"DIR/config.toml:7: unknown key `concurrent` in [[runners]]; it belongs at the top of the file");
}

#[test]
fn a_key_that_only_gitlab_runner_has_says_what_to_do() {
    insta::assert_snapshot!(in_runner("executor = \"shell\""), @"DIR/config.toml:7: unknown key `executor` in [[runners]] (name one of the [backends] with `backend` instead)");
    insta::assert_snapshot!(in_runner("[runners.docker]\nimage = \"x\""), @"DIR/config.toml:7: unknown key `docker` in [[runners]] (jobs run on a backend; remove it)");
}

#[test]
fn a_backend_that_is_not_there_lists_those_that_are() {
    let text = RUNNER.replace("\"here\"", "\"hear\"");
    insta::assert_snapshot!(Place::new(&format!("{text}{BACKEND}[backends.a]\nkind = \"x\"")).message(), @r#"DIR/config.toml:6: runner "one" names the backend "hear", which is not there (there are: a, here)"#);
    insta::assert_snapshot!(Place::new(&text).message(), @r#"DIR/config.toml:6: runner "one" names the backend "hear", which is not there (there are no backends)"#);
}

#[test]
fn a_backend_needs_a_kind_and_sane_common_keys() {
    let backend =
        |lines: &str| Place::new(&format!("{RUNNER}\n[backends.here]\n{lines}")).message();
    insta::assert_snapshot!(backend("partition = \"ci\""), @r#"DIR/config.toml:8: [backends.here] needs a `kind` (a text, as in kind = "slurm")"#);
    insta::assert_snapshot!(backend("kind = \"slurm\"\nmax_queued = 0"), @"DIR/config.toml:8: `max_queued` must be a number above 0");
    insta::assert_snapshot!(backend("kind = \"slurm\"\njob_options = \"time\""), @r#"DIR/config.toml:8: `job_options` must be a list of texts as in ["time", "mem"]"#);
    insta::assert_snapshot!(backend("kind = \"slurm\"\npoll_interval = 5"), @r#"DIR/config.toml:8: `poll_interval` must be a text as in "5s""#);
    insta::assert_snapshot!(backend("kind = \"slurm\"\nsources = \"worker\""), @r#"DIR/config.toml:8: `sources` must be "submit-node" or "allocation""#);
    insta::assert_snapshot!(backend("kind = \"slurm\"\nsources = true"), @r#"DIR/config.toml:8: `sources` must be "submit-node" or "allocation""#);
}

#[test]
fn a_token_that_others_can_read_is_refused_and_the_cure_is_named() {
    let place = Place::new(&format!("{RUNNER}{BACKEND}"));
    place.mode("good.token", 0o644);
    insta::assert_snapshot!(place.message(), @"DIR/config.toml:5: token file DIR/good.token can be read by others (mode 0644); run chmod 600 DIR/good.token");
    place.mode("good.token", 0o640);
    assert!(place.message().contains("mode 0640"), "the group counts too");
    place.mode("good.token", 0o400);
    place.load().unwrap();
}

#[test]
fn a_token_in_a_file_that_others_can_read_is_refused() {
    let text = RUNNER.replace("token_file = \"good.token\"", "token = \"glrt-x\"");
    let place = Place::new(&format!("{text}{BACKEND}"));
    place.load().unwrap();
    place.mode("config.toml", 0o644);
    insta::assert_snapshot!(place.message(), @"DIR/config.toml:5: `token` stands in a file that others can read (mode 0644); run chmod 600 DIR/config.toml");
}

#[test]
fn a_runner_needs_exactly_one_token() {
    let none = RUNNER.replace("token_file = \"good.token\"\n", "");
    insta::assert_snapshot!(Place::new(&format!("{none}{BACKEND}")).message(), @r#"DIR/config.toml:2: runner "one" has no token; write `token_file`"#);
    insta::assert_snapshot!(in_runner("token = \"glrt-x\""), @r#"DIR/config.toml:5: runner "one" has both `token` and `token_file`"#);
    let gone = RUNNER.replace("good.token", "gone.token");
    insta::assert_snapshot!(Place::new(&format!("{gone}{BACKEND}")).message(), @"DIR/config.toml:5: token file DIR/gone.token is not readable: No such file or directory (os error 2)");
    let place = Place::new(&format!("{RUNNER}{BACKEND}"));
    place.write("good.token", "two words\n", 0o600);
    insta::assert_snapshot!(place.message(), @"DIR/config.toml:5: token file DIR/good.token holds no token, which is one word on one line");
}

#[test]
fn no_runners_and_no_file_are_said_with_a_hint() {
    let place = Place::new(BACKEND);
    insta::assert_snapshot!(place.message(), @"DIR/config.toml: no [[runners]]");
    assert_eq!(place.load().unwrap_err().hint(), Some("add one with `bridge register`"));
    assert!(load_incomplete(&place.path("config.toml")).unwrap().runners.is_empty());
    let error = load(&place.path("none.toml")).unwrap_err();
    assert!(Chain(&error).to_string().ends_with("/none.toml: no such file"), "{error}");
    assert!(error.hint().unwrap().contains("bridge register"));
}

#[test]
fn two_runners_of_one_name_are_refused() {
    insta::assert_snapshot!(Place::new(&format!("{RUNNER}{RUNNER}{BACKEND}")).message(), @r#"DIR/config.toml:8: a second runner called "one"; the first is on line 2"#);
}

#[test]
fn mirrors_lie_where_no_job_writes() {
    insta::assert_snapshot!(in_runner("builds_dir = \"/b\"\nmirrors_dir = \"/b/mirrors\""), @"DIR/config.toml:2: `mirrors_dir` must not share a tree with /b, where jobs write");
    assert!(in_runner("builds_dir = \"/b/builds\"\nmirrors_dir = \"/b\"").contains("mirrors_dir"));
    assert!(in_runner("mirrors_dir = \"state/builds/x\"").contains("mirrors_dir"));
}

#[test]
fn a_name_must_do_as_a_file_name() {
    for bad in ["", "a/b", "../x", "-x", " x", "a\\nb", "a\\u0000"] {
        let text = RUNNER.replace("\"one\"", &format!("\"{bad}\""));
        let message = Place::new(&format!("{text}{BACKEND}")).message();
        assert!(message.contains("config.toml:3: `name` must be 1 to 64"), "{bad}: {message}");
    }
}

#[test]
fn odd_paths_are_refused() {
    insta::assert_snapshot!(in_runner("builds_dir = \"~/builds\""), @"DIR/config.toml:7: `builds_dir` starts with ~, which is not expanded; write the whole path");
    insta::assert_snapshot!(in_runner("cache_dir = \"/x/$USER\""), @"DIR/config.toml:7: `cache_dir` holds a $, which is not expanded; write the whole path");
    insta::assert_snapshot!(top("state_dir = \"\""), @"DIR/config.toml:1: `state_dir` is empty");
}

#[test]
fn a_bad_url_says_why() {
    let url = |url: &str| {
        let text = RUNNER.replace("https://gitlab.example.org", url);
        Place::new(&format!("{text}{BACKEND}")).message()
    };
    insta::assert_snapshot!(url("gitlab.example.org"), @"DIR/config.toml:4: `url` is no URL: relative URL without a base");
    insta::assert_snapshot!(url("ftp://gitlab.example.org"), @"DIR/config.toml:4: `url` must start with http:// or https://, not ftp:");
    insta::assert_snapshot!(url("https://me:hunter2@gitlab.example.org"), @"DIR/config.toml:4: `url` must not hold a user name or password");
    insta::assert_snapshot!(url("https://gitlab.example.org/?a=1"), @"DIR/config.toml:4: `url` must not hold a query or fragment");
}

#[test]
fn a_bad_duration_shows_a_good_one() {
    insta::assert_snapshot!(top("retention = 30"), @r#"DIR/config.toml:1: `retention` needs a unit, as in "30 days" or "30m""#);
    insta::assert_snapshot!(top("check_interval = -1"), @"DIR/config.toml:1: `check_interval` must not be negative");
    insta::assert_snapshot!(top("lost_after = \"0s\""), @"DIR/config.toml:1: `lost_after` must be longer than nothing");
    insta::assert_snapshot!(top("shutdown_timeout = true"), @r#"DIR/config.toml:1: invalid type: boolean `true`, expected a duration as in "1m 30s""#);
    for bad in ["soon", "-3s", "1 month", "5"] {
        let message = top(&format!("check_interval = {bad:?}"));
        let start = format!("DIR/config.toml:1: `check_interval` is no duration: {bad:?} (write ");
        assert!(message.starts_with(&start), "{message}");
    }
}

#[test]
fn durations_are_read_in_words() {
    for (text, seconds) in
        [("1m 30s", 90), ("2 hours", 7200), ("30 days", 2_592_000), ("PT5M", 300)]
    {
        assert_eq!(duration_in_words(text).unwrap(), Duration::from_secs(seconds), "{text}");
    }
}

#[test]
fn listening_beyond_this_machine_is_refused() {
    insta::assert_snapshot!(top("listen_address = \":9252\""), @r#"DIR/config.toml:1: `listen_address` must be a loopback address or the path of a Unix socket, since anybody could read 0.0.0.0:9252 (write "127.0.0.1:9252")"#);
    insta::assert_snapshot!(top("listen_address = \"192.0.2.1:80\""), @r#"DIR/config.toml:1: `listen_address` must be a loopback address or the path of a Unix socket, since anybody could read 192.0.2.1:80 (write "127.0.0.1:80")"#);
    insta::assert_snapshot!(top("listen_address = \"gitlab.example.org:80\""), @r#"DIR/config.toml:1: `listen_address` is neither HOST:PORT nor the path of a socket: "gitlab.example.org:80""#);
}

#[test]
fn loopback_and_sockets_are_listened_on() {
    let place = |address: &str| {
        let place = Place::new(&format!("listen_address = {address:?}\n{RUNNER}{BACKEND}"));
        let shown = place.load().unwrap().listen_address.unwrap().to_string();
        shown.replace(place.dir.path().to_str().unwrap(), "DIR")
    };
    assert_eq!(place("127.0.0.1:1234"), "127.0.0.1:1234");
    assert_eq!(place("[::1]:1234"), "[::1]:1234");
    assert_eq!(place("::1"), "[::1]:9252");
    assert_eq!(place("localhost:0"), "127.0.0.1:0");
    assert_eq!(place("unix:/run/bridge.sock"), "unix:/run/bridge.sock");
    assert_eq!(place("unix://run.sock"), "unix:DIR/run.sock");
    assert_eq!(place("./run.sock"), "unix:DIR/run.sock");
}

#[test]
fn numbers_words_and_types_are_checked() {
    insta::assert_snapshot!(top("concurrent = 0"), @"DIR/config.toml:1: `concurrent` must be at least 1");
    insta::assert_snapshot!(top("concurrent = \"many\""), @r#"DIR/config.toml:1: invalid type: string "many", expected usize"#);
    insta::assert_snapshot!(top("log_level = \"inof\""), @r#"DIR/config.toml:1: `log_level` must be one of trace, debug, info, warn, error, not "inof"; did you mean "info"?"#);
    insta::assert_snapshot!(top("log_format = \"xml\""), @r#"DIR/config.toml:1: `log_format` must be "text" or "json", not "xml""#);
    insta::assert_snapshot!(in_runner("image = \"pull\""), @r#"DIR/config.toml:7: `image` must be "ignore" or "refuse""#);
    insta::assert_snapshot!(in_runner("shell = \"fish\""), @r#"DIR/config.toml:7: `shell` must be "bash" or "sh""#);
    let nameless = RUNNER.replace("name = \"one\"\n", "");
    insta::assert_snapshot!(Place::new(&format!("{nameless}{BACKEND}")).message(), @"DIR/config.toml:2: missing field `name`");
}

#[test]
fn what_is_no_toml_names_the_line_and_does_not_show_it() {
    insta::assert_snapshot!(in_runner("token = glrt-secret"), @"DIR/config.toml:7: string values must be quoted, expected literal string");
    assert!(!in_runner("token = \"glrt-secret").contains("secret"));
}

#[test]
fn a_bad_environment_is_not_quoted() {
    insta::assert_snapshot!(in_runner("environment = \"KEY=hunter2\""), @r#"DIR/config.toml:7: `environment` must be a list of "NAME=value""#);
    insta::assert_snapshot!(in_runner("environment = [\"A=1\", \"hunter2\"]"), @r#"DIR/config.toml:7: `environment` entry 2 is not "NAME=value""#);
    insta::assert_snapshot!(in_runner("environment = [\"2A=hunter2\"]"), @"DIR/config.toml:7: `environment` entry 1 has no valid name (letters, digits, _)");
}

#[test]
fn the_default_path_is_the_environments_roots_or_ones_own() {
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(default_path(some("/x/c.toml"), true, some("/root")), "/x/c.toml");
    assert_eq!(default_path(None, true, some("/root")), "/etc/bridge/config.toml");
    assert_eq!(
        default_path(some(""), false, some("/home/u")),
        "/home/u/.config/bridge/config.toml"
    );
    assert_eq!(default_path(None, false, None), "/etc/bridge/config.toml");
}

#[test]
fn a_text_is_checked_before_it_is_written() {
    let place = Place::new("");
    let text = format!("{RUNNER}{BACKEND}");
    assert_eq!(check_text(&place.path("config.toml"), text, 0o644).unwrap().runners.len(), 1);
}
