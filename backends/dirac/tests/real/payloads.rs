//! Jobs that do what jobs must not do.

use bridge_backend::{EnvVar, Outcome, Pattern};

use crate::bed::{Bed, Site, until, unwanted};

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_job_does_to_its_surroundings_its_end_is_known() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let mut jobs = Vec::new();
    for (script, code, log) in [
        ("echo x; exit 222\n", 222, "x\n"),
        ("echo x; exec >/dev/null 2>&1; sleep 1; exit 4\n", 4, "x\n"),
        ("cat; echo x; exit 5\n", 5, "x\n"),
        // A child that holds the log, and one that belongs to nobody.
        ("sleep 3000 & setsid sleep 3001 & echo x; exit 6\n", 6, "x\n"),
        // The whole process group.
        ("echo x; trap '' TERM; kill -TERM 0; exit 7\n", 7, "x\n"),
        ("unset X509_USER_PROXY; export TMPDIR=/nowhere; echo x; exit 8\n", 8, "x\n"),
        ("echo broken >\"$X509_USER_PROXY\"; echo x; sleep 2; exit 9\n", 9, "x\n"),
        ("printf 'no\\000end'; exit 10\n", 10, "no\0end"),
        ("cd /; echo x; rm -rf \"$BRIDGE_JOB_DIR/../t\"; exit 11\n", 11, "x\n"),
    ] {
        jobs.push((script, site.run(script).await, code, log));
    }
    for (script, job, code, log) in &jobs {
        assert_eq!(site.outcome(job).await, Outcome::Exited { code: *code }, "{script}");
        assert_eq!(String::from_utf8(site.log(job).await).unwrap(), *log, "{script}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_ends_who_watches_it_is_not_called_good() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    for (script, words) in [
        // Who waits for it.
        ("kill -KILL $PPID; echo x; sleep 1; exit 0\n", "wrapper failed"),
        // Itself and all around it.
        ("echo x; kill -KILL 0; exit 0\n", ""),
    ] {
        let job = site.run(script).await;
        let outcome = site.outcome(&job).await;
        if let Outcome::SystemFailed { detail } = &outcome {
            assert!(detail.contains(words), "{detail}");
        } else {
            assert_eq!(outcome, Outcome::Exited { code: 137 }, "{script}");
        }
        assert!(site.log(&job).await.starts_with(b"x\n"));
    }
}

/// Finds processes that have a word of their own in their command line.
fn running(word: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).split('\0').any(|part| part == word) {
            found.push(String::from_utf8_lossy(&line).into_owned());
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_and_after_an_end_nothing_is_left_on_the_site() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    // Sleeps of a length that nobody else has tell whose they are.
    let mark = format!("7{:05}.5", std::process::id() % 100_000);
    let script = format!(
        "trap '' TERM\nsleep {mark} &\nsetsid sleep {mark} &\n(sleep {mark} &) &\n\
         env -i setsid sleep {mark} &\nenv -i sh -c 'cd / && sleep {mark} &'\n: >@/NAME\nLAST\n"
    );
    let killed =
        site.run(&script.replace("NAME", "a").replace("LAST", &format!("sleep {mark}"))).await;
    site.file("a").await;
    let all = until("sleeps".to_owned(), async || (running(&mark).len() >= 6).then_some(())).await;
    all.unwrap();
    assert!(matches!(site.killed(&killed).await, Outcome::Cancelled { .. }));
    let ended = site.run(&script.replace("NAME", "b").replace("LAST", "exit 2")).await;
    assert_eq!(site.outcome(&ended).await, Outcome::Exited { code: 2 });
    let none = until("an end".to_owned(), async || running(&mark).is_empty().then_some(())).await;
    assert!(none.is_ok(), "{:?}", running(&mark));
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_of_any_name_and_kind_come_home() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let mut spec = site.spec(
        "mkdir -p out/deep/er out/empty other\n\
         cd out\n: >'a b' && : >'-rf' && : >'*' && : >'[q]' && : >'back\\slash' && : >'x\\t\\101' && : >'--help'\n\
         : >\"$(printf 'new\\nline')\" && : >\"$(printf 'bad\\377byte')\" && : >'ä.txt'\n\
         : >deep/er/file.txt && : >top.txt && : >../other/not && : >../other/also.txt\n\
         echo 1 >first && ln first second && ln -s first link && ln -s /etc dir-link && ln -s gone broken\n\
         mkfifo pipe && chmod 444 first && chmod 755 top.txt\nexit 1\n",
    );
    spec.outputs = vec![Pattern("out/".into()), Pattern("**/*.txt".into())];
    let job = site.submit(&spec).await;
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 1 });
    let home = site.work();
    // What was there before is replaced, also where it is read-only.
    std::fs::create_dir_all(home.join("out/top.txt")).unwrap();
    std::fs::write(home.join("out/first"), "old").unwrap();
    let closed = std::os::unix::fs::PermissionsExt::from_mode(0o444);
    std::fs::set_permissions(home.join("out/first"), closed).unwrap();
    site.backend.collect(&job, &home).await.unwrap();
    // Called again, it does the same again.
    site.backend.collect(&job, &home).await.unwrap();
    let out = home.join("out");
    for name in [
        "a b",
        "-rf",
        "*",
        "[q]",
        "back\\slash",
        "x\\t\\101",
        "--help",
        "new\nline",
        "ä.txt",
        "top.txt",
        "deep/er/file.txt",
        "first",
        "second",
    ] {
        assert!(out.join(name).symlink_metadata().unwrap().is_file(), "{name:?}");
    }
    let bad: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"bad\xffbyte");
    assert!(out.as_std_path().join(bad).exists());
    assert!(out.join("empty").is_dir());
    assert_eq!(std::fs::read(out.join("second")).unwrap(), b"1\n");
    for (name, target) in [("link", "first"), ("dir-link", "/etc"), ("broken", "gone")] {
        assert_eq!(std::fs::read_link(out.join(name)).unwrap().to_str(), Some(target));
    }
    assert!(out.join("pipe").symlink_metadata().is_err());
    assert!(home.join("other/also.txt").exists());
    assert!(!home.join("other/not").exists(), "nobody asked for it");
    let mode = std::fs::metadata(out.join("top.txt")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o755);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_job_reaches_the_description_that_dirac_reads() {
    if unwanted() {
        return;
    }
    let site = Site::on(&Bed::shared());
    let evil = "[;\"'\n%j %n %s $(id) `id` \\ { } ]\u{7}é";
    let mut spec = site.spec("printf %s \"$EVIL\"; printf '[;\"%%j'; exit 0\n");
    spec.label = evil.into();
    spec.env = vec![EnvVar { name: "EVIL".into(), value: evil.to_owned().into() }];
    spec.outputs = vec![Pattern(evil.into()), Pattern("*.txt".into())];
    std::fs::write(site.work().join("[;\"%j\n$(id)"), evil).unwrap();
    let job = site.submit(&spec).await;
    assert_eq!(site.outcome(&job).await, Outcome::Exited { code: 0 });
    let log = String::from_utf8(site.log(&job).await).unwrap();
    assert_eq!(log, format!("{evil}[;\"%j"));
    // The server is alive: a bracket in a description would have ended it.
    site.backend.check().await.unwrap();
    for key in ["site", "platform", "tags", "banned_sites"] {
        let mut spec = site.spec("exit 0\n");
        spec.options = toml::Table::from_iter([(key.to_owned(), evil.into())]);
        let error = site.backend.submit(&crate::bed::token(), &spec).await.unwrap_err();
        assert_eq!(error.kind(), bridge_backend::ErrorKind::Rejected(bridge_backend::Fault::Job));
    }
}
