//! Tokens against a coordinator whose tokens expire; the answer lost at every place.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use camino::{Utf8Path, Utf8PathBuf};

use super::*;
use crate::coordinator::{
    AccessToken, Coordinator, Endpoint, Fault, Knobs, Options, Owner, RunnerOptions,
};
use crate::domain::clock::ManualClock;

const LIFE: Duration = Duration::from_secs(1000);

struct Bed {
    _dir: tempfile::TempDir,
    dir: Utf8PathBuf,
    gitlab: Coordinator,
    first: String,
    clock: Arc<ManualClock>,
    rotation: Rotation,
    conditions: Conditions,
}

impl Bed {
    async fn new() -> Self {
        drop(rustls::crypto::ring::default_provider().install_default());
        let knobs = Knobs { runner_token_life: Some(LIFE), ..Knobs::default() };
        let gitlab = Coordinator::start(Options { knobs, ..Options::default() }).await.unwrap();
        let first = gitlab.add_runner(RunnerOptions::default());
        let temporary = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(temporary.path()).unwrap().canonicalize_utf8().unwrap();
        let text = format!(
            "[backends.b]\nkind = \"local\"\n[[runners]]\nname = \"one\"\nurl = \"{}\"\n\
             backend = \"b\"\ntoken_file = \"one.token\"\n",
            gitlab.url()
        );
        fs::write(dir.join("config.toml"), text).unwrap();
        fs::write(dir.join("one.token"), format!("{first}\n")).unwrap();
        fs::set_permissions(dir.join("one.token"), fs::Permissions::from_mode(0o600)).unwrap();
        let since = fs::metadata(dir.join("one.token")).unwrap().modified().unwrap();
        let clock = Arc::new(ManualClock::new(Timestamp::try_from(since).unwrap()));
        let conditions = Conditions::default();
        let rotation = Rotation::new(
            Arc::clone(&clock) as Arc<dyn Clock>,
            conditions.clone(),
            "s_0123456789ab".to_owned(),
        );
        Self { _dir: temporary, dir, gitlab, first, clock, rotation, conditions }
    }

    fn runner(&self) -> Runner {
        crate::config::load(&self.dir.join("config.toml")).unwrap().runners.remove(0)
    }

    /// The runner as the daemon has it in memory, with its first token.
    fn remembered(&self) -> Runner {
        Runner { token: Secret::new(self.first.clone()), ..self.runner() }
    }

    async fn look(&mut self) -> Option<String> {
        let runner = self.remembered();
        let token = self.rotation.look_after(&runner).await;
        token.map(|token| token.expose().to_owned())
    }

    fn pass(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }

    fn in_force(&self) -> String {
        fs::read_to_string(self.dir.join("one.token")).unwrap().trim().to_owned()
    }

    fn files(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with("one."))
            .collect();
        names.sort();
        names
    }

    fn at_gitlab(&self) -> String {
        self.gitlab.runner_tokens()[&1].clone()
    }

    fn problem(&self) -> String {
        self.conditions.list().into_iter().map(|(who, what)| format!("{who}: {what}")).collect()
    }
}

#[test]
fn a_token_is_due_after_three_quarters_of_its_life() {
    let at = |text: &str| text.parse::<Timestamp>().unwrap();
    let (from, to) = (at("2026-01-01T00:00:00Z"), at("2026-01-05T00:00:00Z"));
    assert_eq!(due(from, to), Some(at("2026-01-04T00:00:00Z")));
    assert_eq!(due(to, from), None, "two clocks that disagree make no life");
    assert_eq!(due(from, from), None);
}

#[tokio::test]
async fn a_token_is_left_alone_until_it_is_due_and_changed_then() {
    let mut bed = Bed::new().await;
    assert_eq!(bed.look().await, None);
    bed.pass(700);
    assert_eq!(bed.look().await, None);
    assert_eq!(bed.gitlab.requests().of(Endpoint::ResetToken), 0);
    assert_eq!(bed.gitlab.requests().of(Endpoint::Verify), 1, "once a process");
    bed.pass(100);
    let new = bed.look().await.unwrap();
    assert_ne!(new, bed.first);
    assert_eq!((bed.in_force(), bed.at_gitlab()), (new.clone(), new.clone()));
    assert_eq!(bed.files(), ["one.token"]);
    let mode = fs::metadata(bed.dir.join("one.token")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(bed.gitlab.requests().of(Endpoint::Verify), 2, "the new one was verified");
    // Until the daemon has taken it, it is told again; nothing is changed again.
    assert_eq!(bed.look().await, Some(new));
    bed.pass(30);
    bed.look().await;
    assert_eq!(bed.gitlab.requests().of(Endpoint::ResetToken), 1);
    assert_eq!(bed.problem(), "");
    assert_eq!(bed.gitlab.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn an_answer_that_is_lost_is_said_and_healed_by_number() {
    let mut bed = Bed::new().await;
    bed.look().await;
    bed.pass(800);
    bed.gitlab.inject(Endpoint::ResetToken, Fault::lost_answer());
    assert_eq!(bed.look().await, None);
    assert_eq!(bed.in_force(), bed.first, "there is no other");
    assert_eq!(bed.files(), ["one.token", "one.token.rotating"]);
    bed.pass(5);
    assert_eq!(bed.look().await, None);
    let problem = bed.problem();
    assert!(problem.starts_with("one token: GitLab was asked for a new token at "), "{problem}");
    assert!(problem.contains("bridge runners rotate one --pat-file PATH"), "{problem}");
    bed.pass(100);
    assert_eq!(bed.look().await, None);
    assert_eq!(bed.gitlab.requests().of(Endpoint::ResetToken), 1, "asking again is in vain");

    // Whoever has an access token asks by the runner's number.
    bed.gitlab.own_runner(&bed.at_gitlab(), Owner::Projects(vec![77]));
    let access = bed.gitlab.add_access_token(AccessToken::with(&["manage_runner"]));
    let (client, info) = connect(&bed.runner()).unwrap();
    let api = Api::new(client.clone(), Secret::new(access));
    let files = TokenFiles::of(&bed.dir.join("one.token"));
    let change = Change {
        files: &files,
        client: &client,
        system_id: "s_0123456789ab",
        info: &info,
        crash_at: None,
    };
    let standing = change.change(By::Number(&api, 1), bed.clock.now()).await.unwrap();
    assert!(matches!(standing, Standing::Changed { .. }), "{standing:?}");
    assert_eq!(bed.files(), ["one.token"]);
    bed.pass(100);
    assert_eq!(bed.look().await, Some(bed.at_gitlab()), "the daemon finds it in the file");
    assert_eq!(bed.problem(), "");
}

#[tokio::test]
async fn a_question_that_never_took_effect_is_asked_again() {
    let mut bed = Bed::new().await;
    bed.look().await;
    bed.pass(800);
    for fault in [Fault::reset_before(), Fault::status(502), Fault::status(418)] {
        bed.gitlab.inject(Endpoint::ResetToken, fault);
        assert_eq!(bed.look().await, None);
        assert_eq!(bed.in_force(), bed.first);
        assert_eq!(bed.files(), ["one.token", "one.token.rotating"]);
        bed.pass(61);
        // The old token verifies: nothing had happened.
        assert_eq!(bed.look().await, None);
        assert_eq!(bed.files(), ["one.token"]);
    }
    let new = bed.look().await.unwrap();
    assert_eq!((bed.in_force(), bed.at_gitlab()), (new.clone(), new));
    assert_eq!(bed.problem(), "");
}

#[tokio::test]
async fn a_new_token_that_was_not_verified_yet_is_gone_on_with() {
    let mut bed = Bed::new().await;
    bed.look().await;
    bed.pass(800);
    bed.gitlab.inject(Endpoint::Verify, Fault::status(503).times(2));
    assert_eq!(bed.look().await, None);
    assert_eq!(bed.in_force(), bed.first, "the old one is kept until the new one has verified");
    assert_eq!(bed.files(), ["one.token", "one.token.new", "one.token.rotating"]);
    let waiting = fs::read_to_string(bed.dir.join("one.token.new")).unwrap();
    assert_eq!(waiting.trim(), bed.at_gitlab());
    let mode = fs::metadata(bed.dir.join("one.token.new")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    bed.pass(61);
    assert_eq!(bed.look().await, None);
    bed.pass(61);
    assert_eq!(bed.look().await, Some(bed.at_gitlab()));
    assert_eq!(bed.files(), ["one.token"]);
}

#[tokio::test]
async fn a_new_token_that_gitlab_does_not_know_yet_is_kept_beside_the_old_one() {
    let mut bed = Bed::new().await;
    fs::write(bed.dir.join("one.token.new"), "glrt-unknown\n").unwrap();
    assert_eq!(bed.look().await, None);
    assert_eq!(bed.files(), ["one.token", "one.token.new"]);
    bed.pass(3700);
    assert_eq!(bed.look().await, None);
    assert_eq!(bed.files(), ["one.token"], "an hour is enough for any replica");
    assert_eq!(bed.in_force(), bed.first);
}

#[tokio::test]
async fn a_token_somebody_else_changed_is_taken_up() {
    let mut bed = Bed::new().await;
    bed.look().await;
    let other = bed.gitlab.add_runner(RunnerOptions::default());
    fs::write(bed.dir.join("one.token"), format!("{other}\n")).unwrap();
    assert_eq!(bed.look().await, Some(other));
}

#[tokio::test]
async fn there_is_one_writer() {
    let mut bed = Bed::new().await;
    bed.look().await;
    bed.pass(800);
    let files = TokenFiles::of(&bed.dir.join("one.token"));
    let writer = files.lock().unwrap().unwrap();
    assert!(files.lock().unwrap().is_none());
    assert_eq!(bed.look().await, None);
    assert_eq!(bed.gitlab.requests().of(Endpoint::ResetToken), 0);
    drop(writer);
    assert!(bed.look().await.is_some());
}

#[tokio::test]
async fn the_change_can_be_switched_off_by_our_key_and_by_gitlab_runners() {
    for switch in [
        "token_rotation = false\n",
        "[runners.feature_flags]\nFF_DISABLE_AUTOMATIC_TOKEN_ROTATION = true\n",
    ] {
        let mut bed = Bed::new().await;
        let path = bed.dir.join("config.toml");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{text}{switch}")).unwrap();
        bed.look().await;
        bed.pass(990);
        assert_eq!(bed.look().await, None, "{switch}");
        assert_eq!(bed.gitlab.requests().of(Endpoint::ResetToken), 0, "{switch}");
    }
}

#[tokio::test]
async fn a_token_without_an_end_and_one_in_the_configuration_are_left_alone() {
    let mut bed = Bed::new().await;
    bed.gitlab.adjust(|knobs| knobs.runner_token_life = None);
    let endless = bed.gitlab.add_runner(RunnerOptions::default());
    fs::write(bed.dir.join("one.token"), &endless).unwrap();
    bed.first = endless;
    for _ in 0..3 {
        assert_eq!(bed.look().await, None);
        bed.pass(100_000);
    }
    assert_eq!(bed.gitlab.requests().of(Endpoint::ResetToken), 0);
    let inline = Runner { token_file: None, ..bed.remembered() };
    assert!(bed.rotation.look_after(&inline).await.is_none());
    assert_eq!(bed.gitlab.requests().of(Endpoint::ResetToken), 0);
}

#[tokio::test]
async fn a_disk_that_does_not_take_the_token_does_not_lose_it() {
    let mut bed = Bed::new().await;
    bed.look().await;
    bed.pass(800);
    // The note can be written, the token cannot.
    fs::create_dir(bed.dir.join("one.token.new")).unwrap();
    fs::write(bed.dir.join("one.token.new/x"), "").unwrap();
    let runner = bed.remembered();
    let (client, info) = connect(&runner).unwrap();
    let files = TokenFiles::of(&bed.dir.join("one.token"));
    let change = Change {
        files: &files,
        client: &client,
        system_id: "s_0123456789ab",
        info: &info,
        crash_at: None,
    };
    let error = change.change(By::Token, bed.clock.now()).await.unwrap_err();
    assert!(!format!("{error} {error:?}").contains(&bed.at_gitlab()), "{error:?}");
    let RotationError::Unkept { token, .. } = error else { panic!("{error:?}") };
    assert_eq!(token.expose(), bed.at_gitlab());
}

#[tokio::test]
async fn a_link_stays_a_link() {
    let mut bed = Bed::new().await;
    fs::create_dir(bed.dir.join("real")).unwrap();
    fs::rename(bed.dir.join("one.token"), bed.dir.join("real/token")).unwrap();
    std::os::unix::fs::symlink("real/token", bed.dir.join("one.token")).unwrap();
    bed.look().await;
    bed.pass(800);
    let new = bed.look().await.unwrap();
    assert!(fs::symlink_metadata(bed.dir.join("one.token")).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(bed.dir.join("real/token")).unwrap().trim(), new);
}
