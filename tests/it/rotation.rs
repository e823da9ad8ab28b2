//! Runner tokens that expire, under the real daemon: changed in time, and `kill -9` around it.

use std::os::unix::process::ExitStatusExt as _;
use std::time::{Duration, SystemTime};

use bridge::coordinator::{AccessToken, Endpoint, Knobs, Options, Status};

use crate::support::{Bed, Where, ask_http, until, write_private};

const LIFE: Duration = Duration::from_secs(1000);

/// A bed whose runner's token is in a file, and due for a change.
async fn due() -> Bed {
    let knobs = Knobs { runner_token_life: Some(LIFE), ..Knobs::default() };
    let bed = Bed::new(Where::Local, Options { knobs, ..Options::default() }, "", "").await;
    let listen = format!("listen_address = \"{}\"", bed.path("http.sock").display());
    bed.write_config(&listen, "", "");
    bed.edit_config(&format!("token = \"{}\"", bed.token), "token_file = \"main.token\"");
    write_private(&bed.path("main.token"), &format!("{}\n", bed.token));
    #[expect(clippy::disallowed_methods, reason = "the daemon under test has the machine's clock")]
    let long_ago = SystemTime::now() - LIFE * 4;
    let file = std::fs::File::options().write(true).open(bed.path("main.token")).unwrap();
    file.set_modified(long_ago).unwrap();
    bed
}

fn in_force(bed: &Bed) -> String {
    std::fs::read_to_string(bed.path("main.token")).unwrap().trim().to_owned()
}

fn at_gitlab(bed: &Bed) -> String {
    bed.gitlab.runner_tokens()[&1].clone()
}

fn is_settled(bed: &Bed) -> bool {
    let open = ["main.token.new", "main.token.rotating"].iter().any(|name| bed.path(name).exists());
    !open && in_force(bed) == at_gitlab(bed) && in_force(bed) != bed.token
}

async fn settled(bed: &Bed) {
    until("the new token to be in force", || is_settled(bed).then_some(())).await;
}

fn assert_no_token_in_the_log(bed: &Bed) {
    let log = std::fs::read_to_string(bed.path("daemon.log")).unwrap();
    for token in [bed.token.clone(), at_gitlab(bed)] {
        assert!(!log.contains(&token), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_changed_in_time_while_jobs_run_and_without_a_restart() {
    let bed = due().await;
    // The first change waits until a job was taken with the old token.
    let gate = bridge::coordinator::Gate::new();
    bed.gitlab.inject(Endpoint::ResetToken, bridge::coordinator::Fault::hold(&gate));
    let daemon = bed.serve();
    let before = bed.gitlab.enqueue(bed.counting("before").script(bed.wait_for("gate")));
    until("the job to run", || (bed.runs(before) == 1).then_some(())).await;
    gate.open();
    settled(&bed).await;
    let after = bed.gitlab.enqueue(bed.counting("after"));
    assert_eq!(bed.finished(after).await.status, Status::Success, "taken with the new token");
    bed.open("gate");
    assert_eq!(bed.finished(before).await.status, Status::Success, "it noticed nothing");
    bed.nothing_owed().await;
    let socket = bed.path("http.sock");
    until("health to be green", || (ask_http(&socket, "/health").0 == 200).then_some(())).await;
    assert_eq!(bed.gitlab.requests().of(Endpoint::ResetToken), 1);
    assert!(daemon.term().await.success());
    assert_no_token_in_the_log(&bed);
    bed.assert_once(before);
    bed.assert_no_violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_survives_kill_9_wherever_the_new_token_is_not_lost() {
    for point in ["R1", "R3", "R4"] {
        let bed = due().await;
        let daemon = bed.serve_with(&[("BRIDGE_CRASH_AT", point)]);
        assert_eq!(daemon.ended().await.signal(), Some(9), "{point}\n{}", bed.log());
        assert!(!is_settled(&bed), "{point}: it died in the middle");
        let daemon = bed.serve();
        settled(&bed).await;
        let job = bed.gitlab.enqueue(bed.counting(point));
        assert_eq!(bed.finished(job).await.status, Status::Success, "{point}\n{}", bed.log());
        assert_eq!(bed.gitlab.requests().of(Endpoint::ResetToken), 1, "{point}: one change");
        assert!(daemon.term().await.success());
        assert_no_token_in_the_log(&bed);
        bed.assert_no_violations();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_lost_to_kill_9_is_said_and_healed_with_an_access_token() {
    let bed = due().await;
    let daemon = bed.serve_with(&[("BRIDGE_CRASH_AT", "R2")]);
    assert_eq!(daemon.ended().await.signal(), Some(9), "{}", bed.log());
    assert_eq!(in_force(&bed), bed.token, "the dead one: nobody has another");
    let daemon = bed.serve();
    let socket = bed.path("http.sock");
    let said = until("health to say it", || {
        let (status, body) = ask_http(&socket, "/health");
        (status == 503 && body.contains("its answer never came here")).then_some(body)
    })
    .await;
    assert!(said.contains("bridge runners rotate main --pat-file PATH"), "{said}");
    let access = bed.gitlab.add_access_token(AccessToken::with(&["manage_runner"]).admin());
    write_private(&bed.path("pat"), &access);
    let pat = bed.path("pat");
    let args = ["runners", "rotate", "main", "--id", "1", "--pat-file", pat.to_str().unwrap()];
    // The daemon may be asking GitLab about the old token just then.
    until("the token to be rotated", || bed.run(&args).status.success().then_some(())).await;
    settled(&bed).await;
    let job = bed.gitlab.enqueue(bed.counting("after"));
    assert_eq!(bed.finished(job).await.status, Status::Success, "{}", bed.log());
    bed.nothing_owed().await;
    assert!(daemon.term().await.success());
    assert_no_token_in_the_log(&bed);
    bed.assert_no_violations();
}
