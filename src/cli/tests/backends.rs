//! `bridge backends`: listed, checked, logged in to.

use super::*;

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
