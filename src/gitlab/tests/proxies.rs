//! Proxies from the environment.

use super::*;

/// Runs only as the child of the test below, which sets the environment that only a process can
/// have for itself.
const CHILD: &str = "BRIDGE_TEST_PROXIED_CHILD";

#[tokio::test]
async fn a_proxy_from_the_environment_is_used_for_others_than_this_machine() {
    if let Ok(here) = std::env::var(CHILD) {
        let reply = ask(&client("http://gitlab.invalid")).await.unwrap();
        assert!(matches!(reply, RequestReply::Conflict), "from the proxy: {reply:?}");
        let reply = ask(&client(&here)).await.unwrap();
        assert!(matches!(reply, RequestReply::NoJob { .. }), "not from the proxy: {reply:?}");
        return;
    }
    let here = answering(status(204)).await;
    let proxy = answering(status(409)).await;
    let (here_url, proxy_url) = (here.uri(), proxy.uri());
    let run = tokio::task::spawn_blocking(move || {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("gitlab::tests::proxies::a_proxy_from_the_environment_is_used_for_others_than_this_machine")
            .env(CHILD, here_url)
            .env("http_proxy", proxy_url)
            .env_remove("NO_PROXY")
            .env_remove("no_proxy")
            .output()
            .unwrap()
    });
    let output = run.await.unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(proxy.received_requests().await.unwrap().len(), 1);
    assert_eq!(here.received_requests().await.unwrap().len(), 1);
}
