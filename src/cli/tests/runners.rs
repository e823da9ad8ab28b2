//! `bridge runners` with a personal access token: what is made, lost and found again at GitLab.

use super::*;
use crate::coordinator::{
    AccessToken, Coordinator, Endpoint, Fault, NewJob, Options, Owner, RunnerOptions, Status,
};
use crate::domain::id::{BackendName, CiJobId, JobId, RunnerName};
use crate::store::NewJob as NewRow;

const SCOPES: [&str; 1] = ["api"];

/// A bench with a GitLab that answers the Runners API, and a token for it.
struct Office {
    bench: Bench,
    gitlab: Coordinator,
}

impl Office {
    async fn new() -> Self {
        let bench = Bench::new().await;
        let gitlab = Coordinator::start(Options::default()).await.unwrap();
        gitlab.add_project(7, "hep/tracker");
        gitlab.add_project(8, "hep/other");
        gitlab.add_group(3, "hep");
        bench.write("config.toml", "[backends.here]\nkind = \"local\"\n");
        let office = Self { bench, gitlab };
        office.be(AccessToken::with(&SCOPES));
        office
    }

    /// Changes who we are to GitLab.
    fn be(&self, access: AccessToken) {
        let token = self.gitlab.add_access_token(access);
        self.bench.write("pat", &format!("{token}\n"));
    }

    fn line(&self, words: &str) -> String {
        let pat = self.bench.path("pat");
        format!("runners {words} --pat-file {pat} --url {}", self.gitlab.url())
    }

    async fn run(&self, words: &str) -> Exit {
        self.bench.run(&self.line(words)).await.unwrap()
    }

    async fn fails(&self, words: &str) -> (Exit, String) {
        let (exit, text) = self.bench.fails(&self.line(words)).await;
        (exit, text.replace(&self.gitlab.url(), "URL"))
    }

    async fn create(&self, name: &str) -> String {
        assert_eq!(self.run(&format!("create --project 7 --name {name}")).await, Exit::Done);
        self.bench.read(&format!("{name}.token")).trim().to_owned()
    }

    /// Gives the last lines that were written, as JSON.
    fn said(&self, lines: usize) -> Vec<Value> {
        let out = self.bench.out();
        let all: Vec<&str> = out.lines().collect();
        let from = all.len() - lines;
        all[from..].iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn out(&self) -> String {
        self.bench.out().replace(&self.gitlab.url(), "URL")
    }

    fn ids(&self) -> Vec<i64> {
        self.gitlab.runner_tokens().into_keys().collect()
    }
}

#[test]
fn the_help_of_runners_is_reviewed() {
    let mut all = String::new();
    for command in ["", "create", "list", "show", "edit", "jobs", "rotate", "delete", "enable"] {
        let args: Vec<&str> =
            ["runners", command, "-h"].into_iter().filter(|w| !w.is_empty()).collect();
        let (result, output) = parse(&args);
        assert_eq!(result.unwrap(), Exit::Done);
        all.extend([&format!("$ bridge {}\n", args.join(" ")), &*output.kept(), "\n"]);
    }
    insta::assert_snapshot!(all);
}

#[tokio::test]
async fn a_runner_is_created_and_its_token_kept_in_one_go() {
    let office = Office::new().await;
    let words = "create --project 7 --name one --description d --tag-list a,b --locked \
                 --access-level ref_protected --maximum-timeout 1h --paused --maintenance-note m \
                 --limit 3 --json";
    assert_eq!(office.run(words).await, Exit::Done);
    let token = office.bench.read("one.token").trim().to_owned();
    assert_eq!(office.gitlab.runner_tokens()[&1], token);
    assert_eq!(office.bench.mode("one.token"), 0o600);
    let said = office.said(1).remove(0);
    assert_eq!((&said["name"], &said["id"]), (&json!("one"), &json!(1)));
    assert!(
        !office.out().contains(&token)
            && !office.bench.context.output.kept_notes().contains(&token)
    );
    let config = config::load(&office.bench.context.config_path).unwrap();
    let runner = &config.runners[0];
    assert_eq!((runner.id, runner.limit, runner.token.expose()), (Some(1), 3, token.as_str()));
    assert!(!office.bench.path(".one.creating").exists(), "nothing is open");

    office.run("show one --json").await;
    let mut shown = office.said(1).remove(0);
    let note = shown["maintenance_note"].take();
    assert!(note.as_str().unwrap().starts_with("m\nmade by `bridge runners create` ("), "{note}");
    for (key, value) in [
        ("description", json!("d")),
        ("tag_list", json!(["a", "b"])),
        ("run_untagged", json!(false)),
        ("locked", json!(true)),
        ("access_level", json!("ref_protected")),
        ("maximum_timeout", json!(3600)),
        ("paused", json!(true)),
        ("runner_type", json!("project_type")),
        ("name", json!("one")),
    ] {
        assert_eq!(shown[key], value, "{key}");
    }
    let (exit, text) = office.fails("create --project 7 --name one").await;
    assert_eq!(exit, Exit::Usage);
    assert!(text.contains("a runner of this name is in the configuration"), "{text}");
    assert_eq!(office.ids(), [1]);
    assert_eq!(office.gitlab.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_creation_whose_answer_was_lost_leaves_no_runner_behind() {
    let office = Office::new().await;
    office.gitlab.inject(Endpoint::CreateRunner, Fault::lost_answer());
    let (exit, _text) = office.fails("create --project 7 --name one").await;
    assert_eq!(exit, Exit::Gitlab);
    assert_eq!(office.ids(), [0_i64; 0], "it was made, found by its mark, and deleted again");
    assert!(!office.bench.path(".one.creating").exists());
    // A busy server may have made it, too.
    office.gitlab.inject(Endpoint::CreateRunner, Fault::status_after_effect(502));
    let (_exit, text) = office.fails("create --project 7 --name one").await;
    assert!(text.contains("GitLab is busy (502)"), "{text}");
    assert_eq!(office.ids(), [0_i64; 0]);
    office.create("one").await;
    assert_eq!(office.ids().len(), 1);
}

#[tokio::test]
async fn a_creation_that_was_killed_is_finished_or_undone_by_the_next() {
    let office = Office::new().await;
    // Killed after GitLab's answer and before the token was on the disk.
    office.gitlab.inject(Endpoint::CreateRunner, Fault::lost_answer());
    office.gitlab.inject(Endpoint::RunnersApi, Fault::status(502).always());
    let (_exit, text) = office.fails("create --project 7 --name one").await;
    assert!(text.contains("look for a runner whose token was lost"), "{text}");
    assert_eq!((office.ids().len(), office.bench.path(".one.creating").exists()), (1, true));
    office.gitlab.clear_faults();
    let first = office.ids()[0];
    let token = office.create("one").await;
    assert_eq!(office.gitlab.runner_tokens().values().collect::<Vec<_>>(), [&token]);
    assert_ne!(office.ids()[0], first, "the one whose token was lost is gone");

    // Killed after the token was on the disk and before the configuration was.
    let config = office.bench.read("config.toml");
    let without = config.split("\n[[runners]]").next().unwrap();
    office.bench.write("config.toml", &format!("{without}\n"));
    office.bench.write(".one.creating", "0123456789abcdef\n");
    assert_eq!(office.create("one").await, token, "the same token");
    assert_eq!(office.ids().len(), 1, "and no second runner");
    assert!(!office.bench.path(".one.creating").exists());
}

#[tokio::test]
async fn a_token_that_cannot_be_written_costs_no_runner() {
    let office = Office::new().await;
    // A directory stands where the token file belongs: the note can be written, the token cannot.
    fs::create_dir(office.bench.path("one.token")).unwrap();
    let (exit, text) = office.fails("create --project 7 --name one").await;
    assert_eq!(exit, Exit::Unexpected);
    assert!(text.contains("the runner was deleted again"), "{text}");
    assert_eq!(office.ids(), [0_i64; 0]);
    assert!(!text.contains("glrt-"), "{text}");
    // And if it cannot be deleted either, the token is not lost.
    office.gitlab.inject(Endpoint::Unregister, Fault::status(502));
    let (_exit, text) = office.fails("create --project 7 --name one").await;
    let path = text.split("its token is in ").nth(1).unwrap().split(':').next().unwrap();
    let kept = fs::read_to_string(path).unwrap();
    assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(office.gitlab.runner_tokens().values().next().unwrap(), kept.trim());
    fs::remove_file(path).unwrap();
}

#[tokio::test]
async fn refusals_say_whose_move_it_is() {
    let office = Office::new().await;
    office.be(AccessToken::with(&["read_api"]));
    insta::assert_snapshot!(office.fails("create --group 3 --name one").await.1, @r#"
    error: cannot create "one": the access token lacks a scope (one of: api, create_runner)
    hint: make an access token in GitLab that has one of these scopes
    "#);
    office.be(AccessToken::with(&["create_runner"]));
    insta::assert_snapshot!(office.fails("create --instance --name one").await.1, @r#"
    error: cannot create "one": GitLab forbids it: 403 Forbidden
    hint: the token's user needs the Maintainer or Owner role there; instance runners and --all need an administrator
    "#);
    insta::assert_snapshot!(office.fails("show 12").await.1, @"
    error: cannot show the runner 12: the access token lacks a scope (one of: api, read_api, manage_runner)
    hint: make an access token in GitLab that has one of these scopes
    ");
    office.bench.write("pat", "glpat-unknown");
    insta::assert_snapshot!(office.fails("list --owned").await.1, @"
    error: cannot list the runners: GitLab does not know the access token
    hint: it may have expired or been revoked: make one in GitLab (user settings, access tokens)
    ");
    office.be(AccessToken::with(&SCOPES));
    let (exit, text) = office.fails("delete 12").await;
    assert_eq!(exit, Exit::NotFound);
    insta::assert_snapshot!(text, @"
    error: cannot delete the runner 12: GitLab has none: 404 Runner Not Found
    hint: `bridge runners list --owned` shows the runners of the token's user
    ");
    fs::set_permissions(office.bench.path("pat"), fs::Permissions::from_mode(0o644)).unwrap();
    let (exit, text) = office.fails("list --owned").await;
    assert_eq!(exit, Exit::Configuration);
    assert!(text.contains("0644"), "{text}");
    let (exit, _text) = office.bench.fails("runners show nobody").await;
    assert_eq!(exit, Exit::NotFound);
}

#[tokio::test]
async fn gitlabs_runners_are_listed_by_owner_and_filter() {
    let office = Office::new().await;
    office.create("one").await;
    let group = office.gitlab.add_runner(RunnerOptions {
        description: "the group's".into(),
        tags: vec!["gpu".into()],
        ..RunnerOptions::default()
    });
    office.gitlab.own_runner(&group, Owner::Group(3));
    office.gitlab.add_runner(RunnerOptions::default());
    office.run("list").await;
    office.run("list --group 3 --type group_type").await;
    insta::assert_snapshot!(office.out(), @"
    ID  DESCRIPTION  TYPE     STATUS           PAUSED  CONFIGURED AS
    2   the group's  group    never_contacted  no      -
    1   one          project  never_contacted  no      one
    ID  DESCRIPTION  TYPE   STATUS           PAUSED  CONFIGURED AS
    2   the group's  group  never_contacted  no      -
    ");
    let count = |lines: usize| -> Vec<i64> {
        office.said(lines).iter().map(|row| row["id"].as_i64().unwrap()).collect()
    };
    office.run("list --owned --tag-list gpu --json").await;
    assert_eq!(count(1), [2]);
    office.run("list --project hep/tracker --json").await;
    assert_eq!(count(3), [3, 2, 1]);
    office.be(AccessToken::with(&SCOPES).admin());
    office.run("list --all --status never_contacted --paused=false --limit 2 --json").await;
    assert_eq!(count(2), [3, 2]);
    assert!(office.bench.context.output.kept_notes().ends_with("narrow the list\n"));
    // Without a word of GitLab's it is the configuration's list, and nobody is asked.
    let before = office.gitlab.requests().total();
    office.bench.run("runners list --json").await.unwrap();
    assert_eq!(office.said(1)[0]["backend"], "here");
    assert_eq!(office.gitlab.requests().total(), before);
}

#[tokio::test]
async fn a_runner_is_edited_paused_enabled_and_deleted() {
    let office = Office::new().await;
    let token = office.create("one").await;
    office.run("edit one --description new --tag-list x,y --run-untagged=false --json").await;
    let said = office.said(1).remove(0);
    assert_eq!((&said["description"], &said["tag_list"]), (&json!("new"), &json!(["x", "y"])));
    office.run("edit 1 --tag-list= --run-untagged --active=false --json").await;
    let said = office.said(1).remove(0);
    assert_eq!((&said["tag_list"], &said["paused"]), (&json!([]), &json!(true)));
    office.run("resume #1 --json").await;
    assert!(!office.gitlab.runner(&token).unwrap().paused);
    office.run("pause one --json").await;
    assert!(office.gitlab.runner(&token).unwrap().paused);
    let (exit, text) = office.fails("edit one").await;
    assert_eq!(exit, Exit::Usage);
    assert!(text.contains("nothing is named"), "{text}");

    assert_eq!(office.run("enable one --project hep/other").await, Exit::Done);
    let (_exit, text) = office.fails("delete one").await;
    assert!(text.contains("more than one project"), "{text}");
    assert_eq!(office.run("disable one --project 8").await, Exit::Done);
    let (_exit, text) = office.fails("disable one --project 7").await;
    assert!(text.contains("Only one project"), "{text}");
    let verify = "runners verify";
    office.bench.run(verify).await.unwrap();
    let before = office.bench.out().len();
    office.run("show one --managers").await;
    let out = office.out();
    let shown = office.bench.out().split_off(before);
    assert!(!out.contains(&token));
    insta::with_settings!({ filters => vec![
        (r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "[time]"), (r"[0-9a-f]{16}", "[mark]"),
        (r"s_\w{12}", "[system]"), (r"r_\w{12}", "[system]"), (r" +\n", "\n"),
        (r"0\.1\.\d+", "[version]"),
    ] }, {
        insta::assert_snapshot!(shown);
    });
    assert_eq!(office.run("delete one").await, Exit::Done);
    assert_eq!(office.ids(), [0_i64; 0]);
    assert!(office.bench.context.output.kept_notes().contains("still in the configuration"));

    let token = office.gitlab.add_runner(RunnerOptions::default());
    office.bench.write("other", &token);
    let line = format!("runners delete --token-file {} --url {}", office.bench.path("other"), {
        office.gitlab.url()
    });
    assert_eq!(office.bench.run(&line).await.unwrap(), Exit::Done);
    assert_eq!(office.ids(), [0_i64; 0]);
    let (exit, _text) = office.bench.fails(&line).await;
    assert_eq!(exit, Exit::Gitlab);
    assert_eq!(office.gitlab.violations(), Vec::<String>::new());
}

/// Asks for a job as this machine's daemon would.
async fn take(office: &Office, token: &str, system_id: &str, job: NewJob) -> i64 {
    let id = office.gitlab.enqueue(job);
    let client =
        gitlab::Client::new(gitlab::ClientOptions::new(office.gitlab.url().parse().unwrap()));
    let token = gitlab::Secret::new(token);
    let reply = client.unwrap().request_job(&token, system_id, &info(None), None).await.unwrap();
    assert!(matches!(reply, gitlab::RequestReply::Job(_)), "{reply:?}");
    id
}

#[tokio::test]
async fn orphans_show_on_either_side() {
    let office = Office::new().await;
    let token = office.create("one").await;
    let system_id = office.bench.context.system_id().unwrap();
    let mut ids = Vec::new();
    for name in ["both", "unknown here", "ended there", "over here"] {
        ids.push(take(&office, &token, system_id.as_str(), NewJob::new(name)).await);
    }
    let elsewhere = take(&office, &token, "s_elsewhere000", NewJob::new("another machine's")).await;
    office.gitlab.force_cancel(ids[2]);

    let config = config::load(&office.bench.context.config_path).unwrap();
    fs::create_dir(&config.state_dir).unwrap();
    let tracker = TaskTracker::new();
    let store =
        Store::open(&config.state_dir, crate::store::Keyring::for_tests(), &tracker).await.unwrap();
    let now = office.bench.context.clock.now();
    let row = |ci_job: i64, name: &str| NewRow {
        id: JobId::mint(now, u128::from(ci_job.unsigned_abs())),
        runner: RunnerName("one".into()),
        ci_url: office.gitlab.url(),
        ci_job: CiJobId(ci_job),
        ci_pipeline: 1,
        project_id: 77,
        project: "hep/tracker".into(),
        name: name.into(),
        backend: BackendName("here".into()),
        received_at: now,
        deadline_at: now,
        payload: gitlab::Secret::new("{}"),
    };
    for (ci_job, name) in [(ids[0], "both"), (ids[2], "ended there"), (4711, "never there")] {
        store.receive(row(ci_job, name)).await.unwrap();
    }
    assert_eq!(office.run("jobs one --json").await, Exit::Done);
    let rows = office.said(5);
    let of = |id: i64| rows.iter().find(|row| row["ci_job"] == id).unwrap().clone();
    assert_eq!(of(ids[0])["orphan"], Value::Null);
    assert_eq!(
        (&of(ids[0])["ci_status"], &of(ids[0])["state"]),
        (&json!("running"), &json!("received"))
    );
    assert_eq!(of(ids[1])["orphan"], "unknown_here");
    assert_eq!(of(ids[2])["orphan"], "ended_at_gitlab");
    assert_eq!(of(4711)["orphan"], "not_running_at_gitlab");
    assert!(rows.iter().all(|row| row["ci_job"] != elsewhere), "{rows:?}");

    let before = office.bench.out().len();
    office.run("jobs one --orphans").await;
    let out = office.bench.out().split_off(before);
    insta::with_settings!({ filters => vec![(r"[0-9A-HJKMNP-TV-Z]{26}", "[id]"), (r" {2,}", "  ")] }, {
        insta::assert_snapshot!(out, @"
        CI JOB  PROJECT  NAME  AT GITLAB  ID  STATE  ORPHAN
        1003  hep/tracker  over here  running  -  -  unknown here
        1002  hep/tracker  ended there  canceled  [id]  received  ended at GitLab
        1001  hep/tracker  unknown here  running  -  -  unknown here
        4711  hep/tracker  never there  -  [id]  received  not running at GitLab
        ");
    });
    office.run("jobs one --status canceled --json").await;
    assert_eq!(office.said(1)[0]["ci_job"], ids[2]);
    office.run("jobs one --any-machine --order-by id --sort asc --limit 5 --json").await;
    assert_eq!(office.said(6)[4]["ci_job"], elsewhere, "the newest of GitLab's, then ours");
    assert_eq!(office.gitlab.job(ids[2]).unwrap().status, Status::Canceled);
    store.close().await;
    tracker.close();
}

#[tokio::test]
async fn without_a_database_gitlabs_view_is_shown() {
    let office = Office::new().await;
    let token = office.create("one").await;
    let system_id = office.bench.context.system_id().unwrap();
    let id = take(&office, &token, system_id.as_str(), NewJob::new("a")).await;
    assert_eq!(office.run("jobs one --json").await, Exit::Done);
    let row = office.said(1).remove(0);
    assert_eq!((&row["ci_job"], &row["orphan"]), (&json!(id), &Value::Null));
    assert!(office.bench.context.output.kept_notes().contains("GitLab's view only"));
}

#[tokio::test]
async fn a_token_is_rotated_by_itself_and_by_number_when_it_was_lost() {
    let office = Office::new().await;
    let first = office.create("one").await;
    let line = "runners rotate one --json";
    if std::env::var_os("GITLAB_TOKEN").is_none() {
        assert_eq!(office.bench.run(line).await.unwrap(), Exit::Done);
    } else {
        assert_eq!(office.run("rotate one --json").await, Exit::Done);
    }
    let second = office.bench.read("one.token").trim().to_owned();
    assert_ne!(first, second);
    assert_eq!(office.gitlab.runner_tokens()[&1], second);
    assert_eq!(office.said(1)[0]["name"], "one");
    assert_eq!(office.bench.mode("one.token"), 0o600);

    // The answer is lost: the token is dead, and nobody has the new one.
    office.gitlab.inject(Endpoint::RunnersApi, Fault::lost_answer());
    let (exit, _text) = office.fails("rotate one").await;
    assert_eq!(exit, Exit::Gitlab);
    assert_eq!(
        office.bench.read("one.token").trim(),
        second,
        "the old one stays until there is another"
    );
    assert!(office.bench.path("one.token.rotating").exists());
    assert_eq!(office.bench.run("runners verify").await.unwrap(), Exit::Gitlab);
    assert_eq!(office.run("rotate one").await, Exit::Done);
    let third = office.bench.read("one.token").trim().to_owned();
    assert_eq!(office.gitlab.runner_tokens()[&1], third);
    assert!(!office.bench.path("one.token.rotating").exists());
    assert!(!office.bench.path("one.token.new").exists());
    assert_eq!(office.bench.run("runners verify").await.unwrap(), Exit::Done);
    let printed = format!("{}{}", office.out(), office.bench.context.output.kept_notes());
    for token in [first, second, third] {
        assert!(!printed.contains(&token), "a token was printed");
    }
    assert_eq!(office.gitlab.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn values_of_the_wrong_kind_are_refused_before_gitlab_is_asked() {
    for flag in [
        "--active=maybe",
        "--paused=2",
        "--locked=x",
        "--run-untagged=7",
        "--maximum-timeout long",
        "--maximum-timeout 599",
        "--access-level all",
    ] {
        let mut args = vec!["runners", "edit", "1"];
        args.extend(flag.split(' '));
        let (result, output) = parse(&args);
        assert_eq!(result.unwrap(), Exit::Usage, "{flag}");
        let named = flag.split([' ', '=']).next().unwrap();
        assert!(output.kept_notes().contains(named), "{flag}: {}", output.kept_notes());
    }
    // Neither does a name that could not be a file's get there.
    let bench = Bench::new().await;
    bench.with_runners(&[]);
    let (exit, text) = bench.fails("register --url URL --token glrt-x --name a/b").await;
    assert_eq!(exit, Exit::Usage);
    assert!(text.contains("register \"a/b\": `name` must be"), "{text}");
    assert!(bench.requests().await.is_empty());
}
