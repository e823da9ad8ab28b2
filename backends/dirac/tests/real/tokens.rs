//! Tokens that expire, rotate, get lost, and are somebody else's.

use std::sync::Arc;

use bridge_backend::{ErrorKind, Fault, Outcome};
use camino::Utf8PathBuf;
use tokio_util::task::TaskTracker;

use crate::bed::{Bed, QUICK, Site, open, private, token, unwanted};
use crate::proxy::{Mischief, Proxy};

fn file(site: &Site, text: &str) -> Utf8PathBuf {
    let path = Utf8PathBuf::from_path_buf(site.dir.path().join("token")).unwrap();
    private(&path, text);
    path
}

fn story(error: &bridge_backend::BackendError) -> String {
    let mut story = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        story = format!("{story}: {error}");
        cause = error.source();
    }
    story
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_is_renewed_once_however_many_need_it_and_kept() {
    if unwanted() {
        return;
    }
    // A minute is less than what a token must have left, so every question renews it.
    let bed = Bed::start(&["--access-minutes", "1"]);
    let proxy = Proxy::before(&bed.url).await;
    let site = Site::on(&bed);
    let path = file(&site, bed.tamper(&["login"]).trim());
    let before = std::fs::read_to_string(&path).unwrap();
    let more = format!("worker_url = '{}'\n{QUICK}", bed.url);
    let backend = open(&proxy.url, &path, &more);
    backend.check().await.unwrap();
    let tasks = TaskTracker::new();
    let many = (0..10).map(|_| {
        let backend = Arc::clone(&backend);
        tasks.spawn(async move { backend.find(&[token()]).await.map(drop) })
    });
    for one in many.collect::<Vec<_>>() {
        one.await.unwrap().unwrap();
    }
    assert!(proxy.asked_of("POST /api/auth/token") >= 1);
    assert_ne!(std::fs::read_to_string(&path).unwrap(), before);
    // What was kept is good for another process.
    let again = open(&proxy.url, &path, &more);
    again.check().await.unwrap();
    again.find(&[token()]).await.unwrap();
    let job = Site::of(&bed, again);
    let job_ref = job.run("exit 0\n").await;
    assert_eq!(job.outcome(&job_ref).await, Outcome::Exited { code: 0 });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_to_a_renewal_is_said_clearly_and_a_new_login_helps() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--no-site", "--access-minutes", "1"]);
    let proxy = Proxy::before(&bed.url).await;
    let site = Site::on(&bed);
    let path = file(&site, bed.tamper(&["login"]).trim());
    let backend = open(&proxy.url, &path, QUICK);
    backend.find(&[token()]).await.unwrap();
    proxy.next("POST /api/auth/token", Mischief::LoseAnswer);
    // The old access token lives on, and the next renewal finds that the login is lost.
    for _ in 0..3 {
        backend.find(&[token()]).await.unwrap();
    }
    let asked = proxy.asked_of("POST /api/auth/token");
    // Asked no more: that would cost other programs their tokens.
    backend.find(&[token()]).await.unwrap();
    assert_eq!(proxy.asked_of("POST /api/auth/token"), asked);
    // And once the token is not taken any more, jobs wait and the operator is told.
    proxy.next("POST /api/jobs/search", Mischief::Say(401, "{\"detail\":\"Invalid JWT\"}"));
    let error = backend.find(&[token()]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transient);
    assert!(story(&error).contains("log in to DIRAC"), "{}", story(&error));
    proxy.next("GET /api/auth/userinfo", Mischief::Say(401, "{\"detail\":\"Invalid JWT\"}"));
    let error = backend.check().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site), "{}", story(&error));
    private(&path, bed.tamper(&["login"]).trim());
    proxy.next("POST /api/jobs/search", Mischief::Say(401, "{\"detail\":\"Invalid JWT\"}"));
    backend.find(&[token()]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_token_that_expires_waits_for_the_next_one() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed);
    let path = file(&site, bed.tamper(&["token", "ci-robot", "0.02"]).trim());
    let backend = open(&bed.url, &path, QUICK);
    let expired =
        crate::bed::until("an expired token".into(), async || backend.find(&[token()]).await.err());
    let error = expired.await.unwrap();
    assert_eq!(error.kind(), ErrorKind::Transient);
    assert!(story(&error).contains("expired"), "{}", story(&error));
    let error = backend.check().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site));
    private(&path, &std::fs::read_to_string(bed.token_file()).unwrap());
    backend.check().await.unwrap();
    backend.find(&[token()]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_token_file_is_said_by_its_name() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed);
    let good = std::fs::read_to_string(bed.token_file()).unwrap();
    let path = file(&site, &good);
    let wrong = async |more: &str, named: &str| {
        let error = open(&bed.url, &path, more).check().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site), "{}", story(&error));
        assert!(story(&error).contains(named), "{}", story(&error));
        assert!(!story(&error).contains(good.trim()), "the token is shown");
    };
    wrong("vo = 'lhcb'", "lhcb").await;
    wrong("group = 'prod'", "prod").await;
    private(&path, good.split_at(good.len() / 2).0);
    wrong("", "log in to DIRAC").await;
    private(&path, "");
    wrong("", "token file").await;
    std::fs::remove_file(&path).unwrap();
    wrong("", "token file").await;
    // Signed by another server.
    let other = Bed::start(&["--no-site"]);
    private(&path, &std::fs::read_to_string(other.token_file()).unwrap());
    wrong("", "another server").await;
    private(&path, &good);
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    wrong("", "chmod 600").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_no_diracx_is_said() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let proxy = Proxy::before(&bed.url).await;
    let backend = open(&proxy.url, &bed.token_file(), QUICK);
    for (status, text, kind) in [
        (404, "<html>", ErrorKind::Rejected(Fault::Site)),
        (302, "", ErrorKind::Rejected(Fault::Site)),
        (200, "<html>Welcome", ErrorKind::Transient),
        (503, "{\"detail\":\"not ready\"}", ErrorKind::Transient),
    ] {
        proxy.next("GET /.well-known", Mischief::Say(status, text));
        let error = backend.check().await.unwrap_err();
        assert_eq!(error.kind(), kind, "{status}: {}", story(&error));
    }
    backend.check().await.unwrap();
    let nobody = open("http://127.0.0.1:9", &bed.token_file(), QUICK);
    assert_eq!(nobody.check().await.unwrap_err().kind(), ErrorKind::Transient);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_logs_the_robot_in() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed);
    let path = Utf8PathBuf::from_path_buf(site.dir.path().join("login")).unwrap();
    let table =
        format!("url = '{}'\ntoken_file = '{path}'\nvo = 'testvo'\ngroup = 'user'", bed.url);
    let tasks = TaskTracker::new();
    let agree = |invitation: bridge_backend_dirac::Invitation| {
        assert!(!invitation.code.is_empty());
        // The person.
        tasks.spawn(async move {
            let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
            let page = http.get(invitation.address).send().await.unwrap();
            assert!(page.status().is_success());
        });
    };
    bridge_backend_dirac::login(table.parse().unwrap(), agree).await.unwrap();
    open(&bed.url, &path, "vo = 'testvo'\ngroup = 'user'").check().await.unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let nobody = table.replace("testvo", "nobody");
    assert!(bridge_backend_dirac::login(nobody.parse().unwrap(), |_| ()).await.is_err());
}
