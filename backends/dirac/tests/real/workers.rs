//! Workers as sites have them.

use bridge_backend::{Outcome, Pattern};

use crate::bed::{Bed, QUICK, Site, open, unwanted};

/// A directory whose programs shadow those of the system; gives a PATH with it in front.
pub(crate) fn shadowed(site: &Site, name: &str, program: &str, text: &str) -> String {
    let bin = site.dir.path().join(name);
    std::fs::create_dir(&bin).unwrap();
    let path = bin.join(program);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    format!("{}:/usr/local/bin:/usr/bin:/bin", bin.to_str().unwrap())
}

/// A `date` whose clock is off.
pub(crate) fn wrong_date(site: &Site, name: &str, hours: i64) -> String {
    let text = format!(
        "#!/bin/sh\ncase $* in '+%s') echo $(($(/bin/date +%s) + {hours} * 3600)) ;;\n\
         *) exec /bin/date -d '{hours} hours' \"$@\" ;; esac\n"
    );
    shadowed(site, name, "date", &text)
}

/// A PATH with the programs of busybox, and no others but those that it may lack.
fn small(site: &Site) -> String {
    let bin = site.dir.path().join("small");
    std::fs::create_dir(&bin).unwrap();
    let list = std::process::Command::new("/bin/busybox").arg("--list").output().unwrap();
    for name in String::from_utf8(list.stdout).unwrap().lines() {
        std::os::unix::fs::symlink("/bin/busybox", bin.join(name)).unwrap();
    }
    for name in ["curl", "busybox"] {
        let path = ["/usr/bin", "/bin"].map(|dir| std::path::Path::new(dir).join(name));
        let path = path.iter().find(|path| path.exists()).unwrap();
        std::os::unix::fs::symlink(path, bin.join(name)).unwrap_or_default();
    }
    bin.to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_workers_run_jobs_like_others() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let ahead = wrong_date(&site, "ahead", 7);
    let behind = wrong_date(&site, "behind", -7);
    let odd = [
        r#"{"shell": "bash"}"#.to_owned(),
        r#"{"shell": "bash --posix"}"#.to_owned(),
        r#"{"shell": "dash"}"#.to_owned(),
        r#"{"folder": "a folder's \"name\" with blanks; and more"}"#.to_owned(),
        r#"{"folder": "ü b", "env": {"TMPDIR": "/nowhere/at all"}}"#.to_owned(),
        r#"{"env": {"TMPDIR": "/nowhere", "HOME": null, "LANG": "xx_YY.UTF-8", "LC_ALL": "tr_TR.UTF-8"}}"#.to_owned(),
        format!(r#"{{"env": {{"PATH": "{ahead}"}}, "token_seconds": 600}}"#),
        format!(r#"{{"env": {{"PATH": "{behind}"}}, "token_seconds": 600}}"#),
    ];
    let mut odd = odd.to_vec();
    if std::path::Path::new("/bin/busybox").exists() {
        odd.push(format!(r#"{{"shell": "busybox sh", "env": {{"PATH": "{}"}}}}"#, small(&site)));
    }
    std::fs::write(site.work().join("in put"), "in\n").unwrap();
    let mut jobs = Vec::new();
    for odd in &odd {
        let mut spec =
            site.spec("cat 'in put'; sleep 2; echo 'two words'; echo out >'out put'; exit 3\n");
        spec.outputs = vec![Pattern("out*".into())];
        jobs.push((odd, site.submit_to(odd, &spec).await));
    }
    for (odd, job) in &jobs {
        assert_eq!(site.outcome(job).await, Outcome::Exited { code: 3 }, "{odd}");
        assert_eq!(site.log(job).await, b"in\ntwo words\n", "{odd}");
        site.backend.collect(job, &site.work()).await.unwrap();
        assert_eq!(std::fs::read(site.work().join("out put")).unwrap(), b"out\n");
        std::fs::remove_file(site.work().join("out put")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_outlives_its_tokens() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let behind = wrong_date(&site, "behind", -7);
    let mut jobs = Vec::new();
    for odd in [
        // Its own refresh token gives it others, whatever its clock says.
        r#"{"token_seconds": 3}"#.to_owned(),
        format!(r#"{{"token_seconds": 3, "env": {{"PATH": "{behind}"}}}}"#),
        // The pilot renews the file.
        r#"{"token_seconds": 4, "refresh": false, "renew_every": 5}"#.to_owned(),
    ] {
        let spec = site.spec("for n in 1 2 3 4 5; do echo $n; sleep 2; done; exit 3\n");
        let job = site.submit_to(&odd, &spec).await;
        jobs.push((odd, job));
    }
    for (odd, job) in &jobs {
        assert_eq!(site.outcome(job).await, Outcome::Exited { code: 3 }, "{odd}");
        assert_eq!(site.log(job).await, b"1\n2\n3\n4\n5\n", "{odd}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_any_token_left_comes_home_with_diracs_own_sandbox() {
    if unwanted() {
        return;
    }
    let bed = Bed::shared();
    let more = format!("{QUICK}worker_patience = '3s'");
    let site = Site::of(&bed, open(&bed.url, &bed.token_file(), &more));
    // It must last until the job has begun, which on a slow machine takes its time, and no longer.
    for seconds in [6, 18, 54] {
        let odd = format!(r#"{{"token_seconds": {seconds}, "refresh": false}}"#);
        let script = format!(": >@/begun{seconds}; echo one; sleep {seconds}; echo two; exit 3\n");
        let job = site.submit_to(&odd, &site.spec(&script)).await;
        let outcome = site.outcome(&job).await;
        if site.dir.path().join(format!("begun{seconds}")).exists() {
            assert_eq!(outcome, Outcome::Exited { code: 3 }, "{}", site.history(&job).await);
            assert_eq!(site.log(&job).await, b"one\ntwo\n");
            return;
        }
        assert!(matches!(outcome, Outcome::SystemFailed { .. }), "{outcome:?}");
    }
    panic!("no job begins here within a minute");
}
