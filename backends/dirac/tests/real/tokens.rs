//! Tokens that expire, rotate, get lost, and are somebody else's.

use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use bridge_backend::{
    Backend, ErrorKind, Fault, Invitation, Login, LoginError, OpenError, Outcome, Remedy,
};
use bridge_backend_dirac::DRIVER;
use camino::Utf8PathBuf;
use tokio_util::task::TaskTracker;

use crate::bed::{Bed, QUICK, Site, open, private, token, unwanted};
use crate::proxy::{Mischief, Proxy};

fn file(site: &Site, text: &str) -> Utf8PathBuf {
    let path = Utf8PathBuf::from_path_buf(site.dir.path().join("token")).unwrap();
    private(&path, text);
    path
}

/// A login of its own on a bed of its own, with a proxy before the server.
///
/// Its access token lives for a minute. That is less than what a token must have left, so every question
/// renews it.
struct Scene {
    bed: Arc<Bed>,
    proxy: Proxy,
    path: Utf8PathBuf,
    /// Where the token file lies.
    _site: Site,
}

impl Scene {
    fn open(&self) -> Arc<dyn Backend> {
        open(&self.proxy.url, &self.path, &format!("worker_url = '{}'\n{QUICK}", self.bed.url))
    }

    fn token_file(&self) -> String {
        std::fs::read_to_string(&self.path).unwrap()
    }
}

async fn logged_in(options: &[&str]) -> Scene {
    let bed = Bed::start(&[options, &["--access-minutes", "1"]].concat());
    let proxy = Proxy::before(&bed.url).await;
    let site = Site::on(&bed);
    let path = file(&site, bed.tamper(&["login"]).trim());
    Scene { bed, proxy, path, _site: site }
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
    let scene = logged_in(&[]).await;
    let before = scene.token_file();
    let backend = scene.open();
    backend.check().await.unwrap();
    let tasks = TaskTracker::new();
    let many = (0..10).map(|_| {
        let backend = Arc::clone(&backend);
        tasks.spawn(async move { backend.find(&[token()]).await.map(drop) })
    });
    for one in many.collect::<Vec<_>>() {
        one.await.unwrap().unwrap();
    }
    assert!(scene.proxy.asked_of("POST /api/auth/token") >= 1);
    assert_ne!(scene.token_file(), before);
    // What was kept is good for another process.
    let again = scene.open();
    again.check().await.unwrap();
    again.find(&[token()]).await.unwrap();
    let job = Site::of(&scene.bed, again);
    let job_ref = job.run("exit 0\n").await;
    assert_eq!(job.outcome(&job_ref).await, Outcome::Exited { code: 0 });
}

#[tokio::test(flavor = "multi_thread")]
async fn two_programs_share_a_login_and_neither_loses_it() {
    if unwanted() {
        return;
    }
    let scene = logged_in(&["--no-site"]).await;
    // Each has a memory of its own, as two processes have.
    let both = [scene.open(), scene.open()];
    let tasks = TaskTracker::new();
    for _ in 0..4 {
        let many = both.iter().cycle().take(8).map(|backend| {
            let backend = Arc::clone(backend);
            tasks.spawn(async move { backend.find(&[token()]).await.map(drop) })
        });
        for one in many.collect::<Vec<_>>() {
            one.await.unwrap().unwrap();
        }
    }
    for backend in both {
        backend.check().await.unwrap();
    }
    scene.open().check().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_to_a_renewal_is_said_clearly_and_a_new_login_helps() {
    if unwanted() {
        return;
    }
    let scene = logged_in(&["--no-site"]).await;
    let (bed, proxy) = (&scene.bed, &scene.proxy);
    let elsewhere = Site::on(bed);
    let of_others = open(&bed.url, &file(&elsewhere, bed.tamper(&["login"]).trim()), QUICK);
    let backend = scene.open();
    backend.find(&[token()]).await.unwrap();
    proxy.next("POST /api/auth/token", Mischief::LoseAnswer);
    // The old access token lives on, and a look finds that the login is lost.
    for _ in 0..3 {
        backend.find(&[token()]).await.unwrap();
    }
    assert!(proxy.is_honest());
    let asked = proxy.asked_of("POST /api/auth/token");
    backend.find(&[token()]).await.unwrap();
    // The token was not used a second time: that would cost other programs theirs.
    assert_eq!(proxy.asked_of("POST /api/auth/token"), asked);
    of_others.find(&[token()]).await.unwrap();
    of_others.check().await.unwrap();
    // And once the token is not taken any more, jobs wait and the operator is told.
    proxy.next("POST /api/jobs/search", Mischief::Say(401, "{\"detail\":\"Invalid JWT\"}"));
    let error = backend.find(&[token()]).await.unwrap_err();
    assert_eq!((error.kind(), error.remedy()), (ErrorKind::Transient, Some(Remedy::Login)));
    assert!(story(&error).contains("the answer to its last renewal was lost"), "{}", story(&error));
    proxy.next("GET /api/auth/userinfo", Mischief::Say(401, "{\"detail\":\"Invalid JWT\"}"));
    let error = backend.check().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site), "{}", story(&error));
    assert_eq!(error.remedy(), Some(Remedy::Login));
    private(&scene.path, bed.tamper(&["login"]).trim());
    proxy.next("POST /api/jobs/search", Mischief::Say(401, "{\"detail\":\"Invalid JWT\"}"));
    backend.find(&[token()]).await.unwrap();
    backend.check().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_never_arrived_is_looked_up_and_done_again() {
    if unwanted() {
        return;
    }
    let scene = logged_in(&["--no-site"]).await;
    let begun = scene.token_file();
    let backend = scene.open();
    // Knows no time of the server's yet, and so takes the token for good.
    backend.find(&[token()]).await.unwrap();
    let (looks, uses) = ("GET /api/auth/refresh-tokens", "POST /api/auth/token");
    assert_eq!((scene.proxy.asked_of(looks), scene.proxy.asked_of(uses)), (0, 0));
    scene.proxy.next(uses, Mischief::LoseQuestion);
    for finds in 1..=3 {
        backend.find(&[token()]).await.unwrap();
        // A search needs a token twice, to say whose jobs and to ask; and before each use it is looked up
        // whether an earlier one was heard. So the second renewal makes good for the first, lost one.
        let asked = (scene.proxy.asked_of(looks), scene.proxy.asked_of(uses));
        assert_eq!(asked, (2 * finds, 2 * finds));
        assert_ne!(scene.token_file(), begun, "it was renewed after all");
    }
    assert!(scene.proxy.is_honest());
    backend.check().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_ended_or_was_used_up_elsewhere_is_lost() {
    if unwanted() {
        return;
    }
    let bed = Bed::start(&["--no-site"]);
    let site = Site::on(&bed);
    let login = bed.tamper(&["login"]);
    let mut login: serde_json::Value = serde_json::from_str(&login).unwrap();
    // An access token that is over, so that the refresh token is needed.
    login["access_token"] = bed.tamper(&["token", "ci-robot", "0"]).trim().into();
    let path = file(&site, &login.to_string());
    let spent = open(&bed.url, &path, QUICK);
    spent.check().await.unwrap();
    // Somebody puts the old file back; the running backend knows better than to use it.
    private(&path, &login.to_string());
    for backend in [spent, open(&bed.url, &path, QUICK)] {
        let error = backend.check().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site), "{}", story(&error));
        assert_eq!(error.remedy(), Some(Remedy::Login), "{}", story(&error));
        let error = backend.find(&[token()]).await.unwrap_err();
        assert_eq!((error.kind(), error.remedy()), (ErrorKind::Transient, Some(Remedy::Login)));
    }
}

/// Gives the time that a server says it has, in seconds.
async fn server_time(bed: &Bed) -> u64 {
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let page = format!("{}/.well-known/openid-configuration", bed.url);
    let answer = http.get(page).send().await.unwrap();
    let date = answer.headers().get("date").unwrap().to_str().unwrap();
    let time = jiff::fmt::rfc2822::parse(date).unwrap().timestamp();
    time.as_second().try_into().unwrap()
}

/// Gives when the refresh token of a login ends, in seconds.
fn end_of(login: &str) -> u64 {
    let login: serde_json::Value = serde_json::from_str(login).unwrap();
    let claims = login["refresh_token"].as_str().unwrap().split('.').nth(1).unwrap();
    let claims = base64::prelude::BASE64_URL_SAFE_NO_PAD.decode(claims).unwrap();
    let claims: serde_json::Value = serde_json::from_slice(&claims).unwrap();
    claims["exp"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_breaks_is_said_at_once_and_jobs_go_on() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed);
    let path = file(&site, bed.tamper(&["login"]).trim());
    let good = std::fs::read_to_string(&path).unwrap();
    let backend = open(&bed.url, &path, QUICK);
    // What is left is left by the server's clock, which tells whole seconds and is read at some time
    // between these two.
    let (begun, before) = (Instant::now(), server_time(&bed).await);
    backend.check().await.unwrap();
    let login = backend.login().unwrap();
    let (after, took) = (server_time(&bed).await, begun.elapsed().as_secs() + 1);
    assert_eq!(login.who, "ci-robot, VO testvo, group user");
    let left = login.left.unwrap().as_secs();
    let ends = end_of(&good);
    assert!((ends - after - took..=ends - before).contains(&left), "{left}: {before}, {ends}");
    // An hour is less than a weekend.
    assert!(login.ends_soon);
    for (break_it, named) in
        [("truncate", "cut off"), ("open", "chmod 600"), ("remove", "open the token file")]
    {
        match break_it {
            "truncate" => private(&path, good.split_at(good.len() / 2).0),
            "open" => {
                let all = std::os::unix::fs::PermissionsExt::from_mode(0o644);
                std::fs::set_permissions(&path, all).unwrap();
            }
            _ => std::fs::remove_file(&path).unwrap(),
        }
        let error = backend.check().await.unwrap_err();
        assert!(story(&error).contains(named), "{}", story(&error));
        assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site));
        assert!(error.remedy().is_some());
        backend.find(&[token()]).await.unwrap();
    }
    private(&path, &good);
    backend.check().await.unwrap();
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
    wrong("vo = 'lhcb'", "does not know the VO \"lhcb\"; it has: testvo").await;
    wrong("group = 'prod'", "prod").await;
    wrong("vo = 'testvo'\ngroup = 'prod'", "no group \"prod\"; it has: admin, pilot, user").await;
    wrong("vo = 'testvo'\ngroup = 'admin'", "it is for the group \"user\"").await;
    wrong("job_type = 'Odd'", "it takes: Hospital, Test, User").await;
    // The same configuration is not sent twice.
    let twice = open(&bed.url, &path, "job_type = 'Test'");
    twice.check().await.unwrap();
    twice.check().await.unwrap();
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

/// Logs in with this table; the person does what `agree` says to the address.
async fn log_in(
    table: &str,
    agree: impl FnOnce(String) + Send + 'static,
) -> Result<Login, LoginError> {
    let invite = Box::new(move |invitation: Invitation| {
        assert!(!invitation.code.is_empty() && invitation.lives.as_secs() > 0);
        agree(invitation.address);
    });
    DRIVER.login.unwrap()(table.parse().unwrap(), invite).await
}

/// Opens the address, as a person who agrees.
fn visit(tasks: &TaskTracker, address: String) {
    tasks.spawn(async move {
        let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
        let page = http.get(address).send().await.unwrap();
        assert!(page.status().is_success());
    });
}

/// What a login that cannot be kept or makes no sense says, before anybody is asked.
async fn settings_refused(table: &str, named: &str) {
    let refused = log_in(table, |_| panic!("nobody is asked")).await.unwrap_err();
    let LoginError::Settings(OpenError::Config(text)) = refused else { panic!("{refused:?}") };
    assert!(text.contains(named), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_logs_the_robot_in() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let proxy = Proxy::before(&bed.url).await;
    let site = Site::on(&bed);
    let path = Utf8PathBuf::from_path_buf(site.dir.path().join("login")).unwrap();
    let all =
        format!("url = '{}'\ntoken_file = '{path}'\nvo = 'testvo'\ngroup = 'user'", proxy.url);
    let tasks = TaskTracker::new();
    let agrees = || {
        let tasks = tasks.clone();
        move |address: String| visit(&tasks, address)
    };
    // A server that stumbles while it is waited for is asked again.
    proxy.next("POST /api/auth/token", Mischief::LoseQuestion);
    proxy.next("POST /api/auth/token", Mischief::Say(503, "{\"detail\":\"not ready\"}"));
    let login = log_in(&all, agrees()).await.unwrap();
    assert_eq!(login.who, "ci-robot, VO testvo, group user");
    assert!(login.left.unwrap().as_secs() > 3_500 && login.ends_soon, "{login:?}");
    open(&bed.url, &path, "vo = 'testvo'\ngroup = 'user'").check().await.unwrap();
    let mode = |path: &Utf8PathBuf| {
        std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions()) & 0o777
    };
    assert_eq!(mode(&path), 0o600);
    // One that others could read goes, and with it what they had opened; the only VO needs no name.
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let mut theirs = std::fs::File::open(&path).unwrap();
    let old = std::fs::read_to_string(&path).unwrap();
    let short = format!("url = '{}'\ntoken_file = '{path}'", bed.url);
    log_in(&short, agrees()).await.unwrap();
    assert_eq!(mode(&path), 0o600);
    let mut read = String::new();
    std::io::Read::read_to_string(&mut theirs, &mut read).unwrap();
    assert_eq!(read, old);
    assert_ne!(std::fs::read_to_string(&path).unwrap(), old);
    // Whoever gives up, or is too late, leaves all as it was.
    let kept = std::fs::read_to_string(&path).unwrap();
    let (asked, was_asked) = tokio::sync::oneshot::channel();
    tokio::select! {
        _ = log_in(&all, move |address| asked.send(address).unwrap()) => panic!("nobody agreed"),
        _ = was_asked => {}
    }
    proxy.next(
        "POST /api/auth/device",
        Mischief::Say(
            200,
            "{\"user_code\":\"A\",\"device_code\":\"B\",\"verification_uri\":\"http://127.0.0.1/\",\"expires_in\":1}",
        ),
    );
    proxy.next("POST /api/auth/token", Mischief::Say(400, "{\"error\":\"authorization_pending\"}"));
    let late = log_in(&all, drop).await.unwrap_err();
    assert!(late.to_string().contains("nobody agreed within 1 minutes"), "{late}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), kept);
    let files = std::fs::read_dir(site.dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let files: Vec<_> = files.filter(|name| name.to_string_lossy().contains("login")).collect();
    assert_eq!(files, ["login"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_makes_no_sense_is_refused_before_anybody_is_asked() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let proxy = Proxy::before(&bed.url).await;
    let site = Site::on(&bed);
    let path = Utf8PathBuf::from_path_buf(site.dir.path().join("login")).unwrap();
    let table = |url: &str, more: &str| format!("url = '{url}'\ntoken_file = '{path}'\n{more}");
    settings_refused(
        &table(&bed.url, "vo = 'nobody'"),
        "does not know the VO \"nobody\"; it has: testvo",
    )
    .await;
    settings_refused(&table(&bed.url, "vo = 'testvo'\ngroup = 'x'"), "it has: admin, pilot, user")
        .await;
    // Nothing is overwritten that is no login.
    for (text, named) in [
        ("-----BEGIN CERTIFICATE-----\nAA\n", "a proxy is there"),
        ("#!/bin/sh\n", "does not look like a token"),
    ] {
        private(&path, text);
        settings_refused(&table(&bed.url, ""), named).await;
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
    std::fs::remove_file(&path).unwrap();
    let missing = format!("url = '{}'\ntoken_file = '/nonexistent/x/login'", bed.url);
    settings_refused(&missing, "find the directory of the token file /nonexistent/x/login").await;
    // Only people of a group may act for it.
    let admin = table(&bed.url, "vo = 'testvo'\ngroup = 'admin'");
    let refused = log_in(&admin, {
        let tasks = TaskTracker::new();
        move |address| visit(&tasks, address)
    });
    let LoginError::Failed(error) = refused.await.unwrap_err() else { panic!("no such answer") };
    assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Site));
    assert!(story(&error).contains("not a member of the requested group"), "{}", story(&error));
    // And servers that are none, or not there yet.
    for (status, text, kind) in [
        (404, "<html>", ErrorKind::Rejected(Fault::Site)),
        (200, "<html>Welcome", ErrorKind::Transient),
        (503, "{\"detail\":\"not ready\"}", ErrorKind::Transient),
    ] {
        proxy.next("GET /.well-known/dirac-metadata", Mischief::Say(status, text));
        let failed = log_in(&table(&proxy.url, ""), |_| panic!("nobody is asked")).await;
        let LoginError::Failed(error) = failed.unwrap_err() else { panic!("{status}") };
        assert_eq!(error.kind(), kind, "{status}: {}", story(&error));
    }
    assert!(!path.exists());
    // A server that speaks no TLS, where TLS was asked for.
    let tls = bed.url.replace("http://", "https://");
    let failed = log_in(&table(&tls, ""), |_| panic!("nobody is asked")).await;
    let LoginError::Failed(error) = failed.unwrap_err() else { panic!("TLS") };
    assert_eq!(error.kind(), ErrorKind::Transient, "{}", story(&error));
    let error = open(&tls, &bed.token_file(), QUICK).check().await.unwrap_err();
    assert!(story(&error).contains("reach"), "{}", story(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_may_not_run_jobs_is_said() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let site = Site::on(&bed);
    let path = file(&site, bed.tamper(&["token", "pilot", "60"]).trim());
    let error = open(&bed.url, &path, QUICK).check().await.unwrap_err();
    assert!(story(&error).contains("lacks NormalUser"), "{}", story(&error));
    assert_eq!(error.remedy(), Some(Remedy::Other));
}
