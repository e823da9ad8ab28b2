//! The Runners API: who may call what, what is listed, what changes.

use super::*;
use crate::coordinator::{AccessToken, Endpoint, Fault, Owner};

impl Bed {
    async fn as_user(&self, token: &str, method: Method, path: &str, body: Value) -> Response {
        let call = self.call(method, path).header("private-token", token);
        let call = if body.is_null() { call } else { call.json(&body) };
        call.send().await.unwrap()
    }

    async fn get(&self, token: &str, path: &str) -> Value {
        let answer = self.as_user(token, Method::GET, path, Value::Null).await;
        assert_eq!(answer.status(), 200, "{path}");
        answer.json().await.unwrap()
    }

    fn user(&self, scopes: &[&str]) -> String {
        self.gitlab.add_access_token(AccessToken::with(scopes))
    }

    fn admin(&self) -> String {
        self.gitlab.add_access_token(AccessToken::with(&["api"]).admin())
    }
}

fn ids(list: &Value) -> Vec<i64> {
    list.as_array().unwrap().iter().map(|item| item["id"].as_i64().unwrap()).collect()
}

#[tokio::test]
async fn nobody_gets_in_without_a_token_and_each_scope_opens_its_own_calls() {
    let bed = Bed::new().await;
    bed.gitlab.add_project(7, "hep/tracker");
    let answer = bed.call(Method::GET, "/runners").send().await.unwrap();
    assert_eq!(answer.status(), 401);
    let token = bed.gitlab.add_runner(RunnerOptions::default());
    bed.gitlab.own_runner(&token, Owner::Projects(vec![7]));
    let new = json!({"runner_type": "project_type", "project_id": 7});
    let calls = [
        (Method::GET, "/runners", Value::Null),
        (Method::GET, "/runners/2", Value::Null),
        (Method::PUT, "/runners/2", json!({"paused": true})),
        (Method::POST, "/user/runners", new),
    ];
    for (scopes, expected) in [
        (&["api"][..], [200, 200, 200, 201]),
        (&["read_api"], [200, 200, 403, 403]),
        (&["manage_runner"], [403, 200, 200, 403]),
        (&["create_runner"], [403, 403, 403, 201]),
        (&[], [403, 403, 403, 403]),
    ] {
        let user = bed.user(scopes);
        let mut statuses = Vec::new();
        for (method, path, body) in &calls {
            let answer = bed.as_user(&user, method.clone(), path, body.clone()).await;
            let status = answer.status().as_u16();
            statuses.push(status);
            if status == 403 {
                let body: Value = answer.json().await.unwrap();
                assert_eq!(body["error"], "insufficient_scope");
                assert!(body["scope"].as_str().unwrap().starts_with("api"), "{body}");
            }
        }
        assert_eq!(statuses, expected, "{scopes:?}");
    }
    let user = bed.user(&["api"]);
    bed.gitlab.revoke_access_token(&user);
    let answer = bed.as_user(&user, Method::GET, "/runners", Value::Null).await;
    assert_eq!(answer.status(), 401);
    bed.assert_well_behaved();
}

#[tokio::test]
async fn runners_are_listed_by_owner_filter_and_page() {
    let bed = Bed::new().await;
    bed.gitlab.add_project(7, "hep/tracker");
    bed.gitlab.add_group(3, "hep");
    bed.verify().await;
    let mut tokens = Vec::new();
    for n in 0..5 {
        let options = RunnerOptions {
            description: format!("runner {n}"),
            tags: if n % 2 == 0 { vec!["gpu".into(), format!("t{n}")] } else { Vec::new() },
            paused: n == 4,
            ..RunnerOptions::default()
        };
        tokens.push(bed.gitlab.add_runner(options));
        let owner = if n == 0 { Owner::Group(3) } else { Owner::Projects(vec![7]) };
        bed.gitlab.own_runner(&tokens[n], owner);
    }
    let (user, admin) = (bed.user(&["read_api"]), bed.admin());
    assert_eq!(ids(&bed.get(&user, "/runners").await), [6, 5, 4, 3, 2]);
    assert_eq!(ids(&bed.get(&admin, "/runners/all").await), [6, 5, 4, 3, 2, 1]);
    let denied = bed.as_user(&user, Method::GET, "/runners/all", Value::Null).await;
    assert_eq!(denied.status(), 403);
    for (query, expected) in [
        ("type=group_type", &[2][..]),
        ("status=online", &[1]),
        ("status=never_contacted&type=project_type", &[6, 5, 4, 3]),
        ("paused=true", &[6]),
        ("paused=false&tag_list=gpu", &[4, 2]),
        ("tag_list=gpu,t2", &[4]),
        ("scope=paused", &[6]),
        ("version_prefix=0.", &[1]),
        ("version_prefix=17.", &[]),
    ] {
        assert_eq!(ids(&bed.get(&admin, &format!("/runners/all?{query}")).await), expected);
    }
    for bad in ["status=dead", "type=x", "scope=y", "paused=maybe"] {
        let path = format!("/runners?{bad}");
        let answer = bed.as_user(&user, Method::GET, &path, Value::Null).await;
        assert_eq!(answer.status(), 400, "{bad}");
    }
    assert_eq!(ids(&bed.get(&user, "/projects/7/runners").await), [6, 5, 4, 3, 2, 1]);
    assert_eq!(
        ids(&bed.get(&user, "/projects/hep%2Ftracker/runners?type=project_type").await),
        [6, 5, 4, 3]
    );
    assert_eq!(ids(&bed.get(&user, "/groups/3/runners?type=group_type").await), [2]);
    let answer = bed.as_user(&user, Method::GET, "/projects/8/runners", Value::Null).await;
    assert_eq!(answer.status(), 404);

    let path = "/runners?per_page=2&page=2";
    let page = bed.as_user(&user, Method::GET, path, Value::Null).await;
    assert_eq!(header(&page, "x-next-page").as_deref(), Some("3"));
    assert_eq!(header(&page, "x-total").as_deref(), Some("5"));
    assert!(header(&page, "link").unwrap().contains("page=3"), "{page:?}");
    assert_eq!(ids(&page.json().await.unwrap()), [4, 3]);
    let path = "/runners?per_page=2&page=3";
    let last = bed.as_user(&user, Method::GET, path, Value::Null).await;
    assert_eq!(header(&last, "x-next-page").as_deref(), Some(""));
    assert_eq!(header(&last, "link"), None);
}

#[tokio::test]
async fn a_runner_is_created_shown_changed_and_deleted() {
    let bed = Bed::new().await;
    bed.gitlab.add_project(7, "hep/tracker");
    let user = bed.user(&["api"]);
    let new = json!({
        "runner_type": "project_type", "project_id": 7, "description": "d", "tag_list": "a, b",
        "run_untagged": false, "locked": true, "access_level": "ref_protected",
        "maximum_timeout": 3600, "maintenance_note": "n", "paused": true,
    });
    let answer = bed.as_user(&user, Method::POST, "/user/runners", new).await;
    assert_eq!(answer.status(), 201);
    let made: Value = answer.json().await.unwrap();
    assert_eq!((&made["id"], &made["token_expires_at"]), (&json!(2), &Value::Null));
    let token = made["token"].as_str().unwrap();
    assert!(token.starts_with("glrt-"));
    assert_eq!(bed.gitlab.runner_tokens()[&2], token);
    let shown = bed.get(&user, "/runners/2").await;
    for (key, value) in [
        ("description", json!("d")),
        ("tag_list", json!(["a", "b"])),
        ("run_untagged", json!(false)),
        ("locked", json!(true)),
        ("access_level", json!("ref_protected")),
        ("maximum_timeout", json!(3600)),
        ("maintenance_note", json!("n")),
        ("paused", json!(true)),
        ("active", json!(false)),
        ("status", json!("never_contacted")),
    ] {
        assert_eq!(shown[key], value, "{key}");
    }
    assert_eq!(shown["projects"][0]["path_with_namespace"], "hep/tracker");
    assert!(!shown.to_string().contains(token), "the token is shown once");

    let change = json!({"active": true, "tag_list": ["c"], "description": "e"});
    let answer = bed.as_user(&user, Method::PUT, "/runners/2", change).await;
    assert_eq!(answer.status(), 200);
    let changed: Value = answer.json().await.unwrap();
    assert_eq!((&changed["paused"], &changed["tag_list"]), (&json!(false), &json!(["c"])));
    assert_eq!(changed["locked"], true, "what is not named stays");
    for bad in [
        json!({}),
        json!({"active": true, "paused": false}),
        json!({"maximum_timeout": 599}),
        json!({"access_level": "all"}),
        json!({"tag_list": [], "run_untagged": false}),
        json!({"maintenance_note": "x".repeat(1025)}),
        json!({"locked": "maybe"}),
    ] {
        let answer = bed.as_user(&user, Method::PUT, "/runners/2", bad.clone()).await;
        assert_eq!(answer.status(), 400, "{bad}");
    }
    let answer = bed.as_user(&user, Method::DELETE, "/runners/2", Value::Null).await;
    assert_eq!(answer.status(), 204);
    for method in [Method::GET, Method::DELETE] {
        let answer = bed.as_user(&user, method, "/runners/2", Value::Null).await;
        assert_eq!(answer.status(), 404);
    }
    bed.assert_well_behaved();
}

#[tokio::test]
async fn what_a_creation_lacks_is_named() {
    let bed = Bed::new().await;
    let (user, admin) = (bed.user(&["create_runner"]), bed.admin());
    for (body, status) in [
        (json!({}), 400),
        (json!({"runner_type": "shared"}), 400),
        (json!({"runner_type": "project_type"}), 400),
        (json!({"runner_type": "group_type"}), 400),
        (json!({"runner_type": "project_type", "project_id": 99}), 404),
        (json!({"runner_type": "instance_type"}), 403),
    ] {
        let answer = bed.as_user(&user, Method::POST, "/user/runners", body.clone()).await;
        assert_eq!(answer.status(), status, "{body}");
    }
    let body = json!({"runner_type": "instance_type"});
    let answer = bed.as_user(&admin, Method::POST, "/user/runners", body).await;
    assert_eq!(answer.status(), 201);
}

#[tokio::test]
async fn an_instance_runner_is_seen_by_all_and_changed_by_administrators() {
    let bed = Bed::new().await;
    bed.verify().await;
    let (user, admin) = (bed.user(&["api"]), bed.admin());
    assert_eq!(bed.get(&user, "/runners/1").await["runner_type"], "instance_type");
    let managers = bed.get(&user, "/runners/1/managers").await;
    assert_eq!(managers[0]["system_id"], "s_0123456789ab");
    assert_eq!(managers[0]["status"], "online");
    for path in ["/runners/1", "/runners/1/jobs", "/runners/1/reset_authentication_token"] {
        let method = match path {
            "/runners/1" => Method::DELETE,
            "/runners/1/jobs" => Method::GET,
            _ => Method::POST,
        };
        assert_eq!(bed.as_user(&user, method, path, Value::Null).await.status(), 403, "{path}");
    }
    let path = "/runners/1/reset_authentication_token";
    let answer = bed.as_user(&admin, Method::POST, path, Value::Null).await;
    assert_eq!(answer.status(), 201);
    let new: Value = answer.json().await.unwrap();
    assert_ne!(new["token"], json!(bed.token));
    assert_eq!(bed.verify().await.status(), 403, "the old token is dead");
}

#[tokio::test]
async fn a_runner_is_enabled_for_projects_and_taken_away_again() {
    let bed = Bed::new().await;
    bed.gitlab.add_project(7, "hep/tracker");
    bed.gitlab.add_project(8, "hep/other");
    let token = bed.gitlab.add_runner(RunnerOptions::default());
    bed.gitlab.own_runner(&token, Owner::Projects(vec![7]));
    let user = bed.user(&["api"]);
    let enable = json!({"runner_id": 2});
    let post =
        |body: Value| bed.as_user(&user, Method::POST, "/projects/hep%2Fother/runners", body);
    assert_eq!(post(enable.clone()).await.status(), 201);
    assert_eq!(post(enable.clone()).await.status(), 400, "it is enabled");
    assert_eq!(post(json!({"runner_id": 1})).await.status(), 403, "an instance runner");
    assert_eq!(post(json!({"runner_id": 77})).await.status(), 404);
    let refused = bed.as_user(&user, Method::DELETE, "/runners/2", Value::Null).await;
    assert_eq!(refused.status(), 403, "two projects use it");
    let disable = |path: &'static str| bed.as_user(&user, Method::DELETE, path, Value::Null);
    assert_eq!(disable("/projects/8/runners/2").await.status(), 204);
    assert_eq!(disable("/projects/8/runners/2").await.status(), 404);
    let last = disable("/projects/7/runners/2").await;
    assert_eq!(last.status(), 403);
    assert!(last.text().await.unwrap().contains("Only one project"), "it would belong to nobody");
    let lock = json!({"locked": true});
    assert_eq!(bed.as_user(&user, Method::PUT, "/runners/2", lock).await.status(), 200);
    assert_eq!(post(enable).await.status(), 403, "it is locked");
}

#[tokio::test]
async fn a_runners_jobs_are_listed_by_status_and_key() {
    let bed = Bed::new().await;
    let mut jobs = Vec::new();
    for n in 0..5 {
        jobs.push(bed.take(NewJob::new(format!("job {n}"))).await);
    }
    bed.putting(&jobs[1], "running", json!({})).send().await.unwrap();
    bed.gitlab.force_cancel(jobs[1].id);
    let admin = bed.admin();
    let all = bed.get(&admin, "/runners/1/jobs").await;
    assert_eq!(ids(&all), [1004, 1003, 1002, 1001, 1000]);
    assert_eq!(all[0]["project"]["path_with_namespace"], "hep/tracker");
    let canceled = bed.get(&admin, "/runners/1/jobs?status=canceled").await;
    assert_eq!(ids(&canceled), [1001]);
    let system = "/runners/1/jobs?system_id=s_elsewhere0000";
    assert_eq!(ids(&bed.get(&admin, system).await), [0_i64; 0]);
    let path = "/runners/1/jobs?order_by=id&sort=asc&pagination=keyset&per_page=2";
    let page = bed.as_user(&admin, Method::GET, path, Value::Null).await;
    let link = header(&page, "link").unwrap();
    assert_eq!(header(&page, "x-next-page"), None);
    assert_eq!(ids(&page.json().await.unwrap()), [1000, 1001]);
    let query = link.split_once('?').unwrap().1.split_once('>').unwrap().0;
    let next = bed.get(&admin, &format!("/runners/1/jobs?{query}")).await;
    assert_eq!(ids(&next), [1002, 1003]);
    let bad = bed.as_user(&admin, Method::GET, "/runners/1/jobs?order_by=name", Value::Null).await;
    assert_eq!(bad.status(), 400);
}

#[tokio::test]
async fn a_creation_can_lose_its_answer() {
    let bed = Bed::new().await;
    let admin = bed.admin();
    bed.gitlab.inject(Endpoint::CreateRunner, Fault::lost_answer());
    let body = json!({"runner_type": "instance_type"});
    let call = bed.call(Method::POST, "/user/runners").header("private-token", &admin);
    assert!(call.json(&body).send().await.is_err());
    assert_eq!(bed.gitlab.runner_tokens().len(), 2, "the runner is there all the same");
}
