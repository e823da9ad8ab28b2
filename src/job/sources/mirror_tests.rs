//! Mirrors: what they save, whom they serve, and what happens when they are of no use.

use std::fs;

use super::super::served_tests::{PROJECT, Served};
use super::super::tests::{content, git};
use super::*;
use crate::coordinator::{Git as Source, NewJob};

const FETCH: (&str, &str) = ("GIT_STRATEGY", "fetch");

fn ageing(path: &Utf8Path, days: u64) {
    let file = fs::File::open(path).unwrap();
    let then = file.metadata().unwrap().modified().unwrap() - DAY * u32::try_from(days).unwrap();
    file.set_times(fs::FileTimes::new().set_modified(then)).unwrap();
}

#[tokio::test]
async fn many_jobs_cost_one_fetch_per_new_commit() {
    let served = Served::new().await.with_mirrors();
    for text in ["one", "two"] {
        served.commit(text).await;
        let before = served.traffic();
        let (a, b, c, d) = (
            served.job(&[FETCH]).await,
            served.job(&[FETCH]).await,
            served.job(&[FETCH]).await,
            served.job(&[FETCH]).await,
        );
        let (a, b, c, d) = tokio::join!(
            served.got_in(&a, 0),
            served.got_in(&b, 1),
            served.got_in(&c, 2),
            served.got_in(&d, 3),
        );
        for (plan, said) in [a, b, c, d] {
            assert_eq!(content(&plan), text, "{}", said.all());
            git(&plan.project_dir, &["fsck"]);
            assert!(!plan.project_dir.join(".git/objects/info/alternates").exists());
            assert!(!plan.project_dir.join(".git/FETCH_HEAD").exists());
            let refs = git(&plan.project_dir, &["for-each-ref", "--format=%(refname)"]);
            assert!(refs.contains("refs/pipelines/903") && !refs.contains("jobs"), "{refs}");
        }
        assert_eq!(served.traffic().packs - before.packs, 1, "{text}");
    }
    let left = served.mirror().join("refs/jobs");
    assert_eq!(fs::read_dir(left).unwrap().count(), 0);
    // Checkouts do without it.
    fs::remove_dir_all(served.root.join("mirrors")).unwrap();
    let plan = served.plan_in(&served.job(&[]).await, 0);
    git(&plan.project_dir, &["fsck"]);
}

#[tokio::test]
async fn a_clone_through_the_mirror_costs_a_listing_of_refs() {
    let served = Served::new().await.with_mirrors();
    let noise: String =
        (0..200_000_u32).map(|n| format!("{}\n", n.wrapping_mul(2_654_435_761))).collect();
    served.commit(&noise).await;
    served.got(&served.job(&[]).await).await;
    let first = served.traffic();
    assert!(first.sent > 500_000, "{first:?}");
    for depth in [1, 0] {
        let before = served.traffic();
        let (plan, _) = served.got(&served.job_of_depth(depth, &[]).await).await;
        assert_eq!(content(&plan).len(), noise.len());
        let after = served.traffic();
        assert_eq!(after.packs, before.packs);
        assert!(after.sent - before.sent < 2000, "{before:?} {after:?}");
    }
}

#[tokio::test]
async fn depth_branches_and_tags_are_as_from_the_server() {
    let all = ["for-each-ref", "--format=%(refname) %(objectname)"];
    let mut seen = Vec::new();
    for mirrors in [false, true] {
        let mut served = Served::new().await;
        if mirrors {
            served = served.with_mirrors();
        }
        served.commit("one").await;
        let dir = served.repository("tracker");
        git(&dir, &["tag", "v1"]);
        git(&dir, &["branch", "gone"]);
        served.commit("two").await;
        served.commit("three").await;
        git(&dir, &["tag", "v3"]);
        served.publish(PROJECT, &dir).await;

        let mut refs = Vec::new();
        for depth in [2, 0, 1] {
            let (plan, said) = served.got(&served.job_of_depth(depth, &[FETCH]).await).await;
            let count = git(&plan.project_dir, &["rev-list", "--count", "HEAD"]);
            let expected = if depth == 0 { 4 } else { depth };
            assert_eq!(count, expected.to_string(), "{mirrors}: {}", said.all());
            let text = git(&plan.project_dir, &all);
            // Hashes hold times, which differ from world to world.
            let names = text.lines().filter_map(|line| line.split(' ').next());
            refs.push(names.map(str::to_owned).collect::<Vec<_>>());
        }
        // What is gone at the server goes here, and what stands in its way too.
        git(&dir, &["branch", "-D", "gone"]);
        git(&dir, &["branch", "gone/not"]);
        served.publish(PROJECT, &dir).await;
        let (plan, said) = served.got(&served.job_of_depth(0, &[FETCH]).await).await;
        assert!(!said.all().contains("instead"), "{}", said.all());
        let text = git(&plan.project_dir, &all);
        assert!(text.contains("origin/gone/not ") && !text.contains("origin/gone "), "{text}");
        seen.push(refs);
    }
    assert_eq!(seen[0], seen[1]);
}

#[tokio::test]
async fn who_may_not_read_the_project_gets_nothing_from_its_mirror() {
    let served = Served::new().await.with_mirrors();
    let sha = served.commit("one").await;
    served.got(&served.job(&[]).await).await;
    // Its token is dead.
    let over = served.job(&[]).await;
    served.gitlab.force_cancel(over.id);
    // Its token is another project's, and its payload claims otherwise.
    let other = NewJob::new("build").project("hep/other", 78);
    let mut other =
        served.take(other.git(Source { sha: Some(sha.clone()), ..Source::default() })).await;
    let url = other.git_info.repo_url.expose().replace("hep/other", PROJECT);
    other.git_info.repo_url = Secret::new(url);
    for payload in [over, other] {
        let (plan, result, said) = served.get_in(&payload, 5).await;
        assert!(matches!(result, Err(StageError::Failed { exit_code: 128, .. })), "{result:?}");
        assert!(said.text().contains("403"), "{}", said.all());
        let objects = git(&plan.project_dir, &["count-objects", "-v"]);
        assert!(objects.contains("count: 0") && objects.contains("in-pack: 0"), "{objects}");
    }
    // It is no sign of a broken mirror.
    assert!(!Utf8PathBuf::from(format!("{}.suspect", served.mirror())).exists());
}

#[tokio::test]
async fn a_broken_mirror_is_gone_around_and_made_anew() {
    let served = Served::new().await.with_mirrors();
    served.commit("one").await;
    served.got(&served.job(&[]).await).await;
    for breaking in ["objects", "config", "HEAD"] {
        let mirror = served.mirror();
        match breaking {
            "objects" => {
                for dir in mirror.join("objects").read_dir_utf8().unwrap() {
                    for file in dir.unwrap().path().read_dir_utf8().unwrap() {
                        let path = file.unwrap().into_path();
                        fs::remove_file(&path).unwrap();
                        fs::write(&path, "rubbish").unwrap();
                    }
                }
            }
            "config" => fs::write(mirror.join("config"), "[core\n").unwrap(),
            _ => fs::write(mirror.join("HEAD"), "rubbish").unwrap(),
        }
        let (plan, said) = served.got(&served.job(&[("GIT_STRATEGY", "clone")]).await).await;
        assert_eq!(content(&plan), "one");
        let text = said.remarks.join("\n");
        assert!(text.contains("the mirror of this project cannot be used"), "{breaking}: {text}");
        assert!(text.contains("fetching from the server instead"), "{text}");

        let (plan, said) = served.got(&served.job(&[("GIT_STRATEGY", "clone")]).await).await;
        assert_eq!(content(&plan), "one");
        let text = said.remarks.join("\n");
        assert!(text.contains("was broken; making it anew"), "{breaking}: {text}");
        assert!(!text.contains("instead"), "{text}");
        ageing(&Utf8PathBuf::from(format!("{}.tried", served.mirror())), 1);

        let before = served.traffic().packs;
        let (_, said) = served.got(&served.job(&[]).await).await;
        assert!(!said.all().contains("mirror"), "{}", said.all());
        assert_eq!(served.traffic().packs, before);
    }
}

#[tokio::test]
async fn a_mirror_that_has_lost_objects_fetches_them_again() {
    let served = Served::new().await.with_mirrors();
    served.commit("one").await;
    served.got(&served.job(&[]).await).await;
    let objects = served.mirror().join("objects");
    fs::remove_dir_all(&objects).unwrap();
    fs::create_dir(&objects).unwrap();
    let (plan, _) = served.got(&served.job(&[("GIT_STRATEGY", "clone")]).await).await;
    assert_eq!(content(&plan), "one");
    let before = served.traffic().packs;
    served.got(&served.job(&[("GIT_STRATEGY", "clone")]).await).await;
    assert_eq!(served.traffic().packs, before);
}

#[tokio::test]
async fn a_place_for_mirrors_that_cannot_be_written_to_costs_a_warning() {
    let served = Served::new().await.with_mirrors();
    served.commit("one").await;
    fs::write(served.root.join("mirrors"), "in the way").unwrap();
    let (plan, said) = served.got(&served.job(&[]).await).await;
    assert_eq!(content(&plan), "one");
    assert!(said.remarks.join("\n").contains("fetching from the server instead"), "{}", said.all());
}

#[tokio::test]
async fn what_a_killed_fetch_left_is_no_hindrance() {
    let served = Served::new().await.with_mirrors();
    served.commit("one").await;
    git(&served.repository("tracker"), &["tag", "v1"]);
    served.commit("two").await;
    served.got(&served.job(&[]).await).await;
    let mirror = served.mirror();
    git(&served.repository("tracker"), &["tag", "--force", "v1"]);
    served.commit("three").await;
    fs::write(mirror.join("refs/tags/v1.lock"), "").unwrap();
    fs::write(mirror.join("packed-refs.lock"), "").unwrap();
    // The same job again, after its first get_sources was dropped.
    let payload = served.job(&[]).await;
    let left = mirror.join("refs/jobs").join(payload.id.to_string());
    fs::create_dir_all(left.join("pipelines")).unwrap();
    fs::write(left.join("pipelines/903.lock"), "").unwrap();
    let (plan, said) = served.got(&payload).await;
    assert_eq!(content(&plan), "three");
    assert!(!said.all().contains("instead"), "{}", said.all());
}

#[tokio::test]
async fn who_drops_the_stage_lets_go_of_the_mirror() {
    let served = Served::new().await.with_mirrors();
    served.commit("one").await;
    let payload = served.job(&[]).await;
    let lock = Utf8PathBuf::from(format!("{}.lock", served.mirror()));
    let plan = served.plan_in(&payload, 0);
    {
        let mut said = super::super::tests::Said::default();
        let work = plan.get_sources(&mut said);
        let held = async {
            loop {
                let there =
                    lock.exists() && hands::try_hold(&lock, Hold::Alone).await.unwrap().is_none();
                if there {
                    break;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            () = held => {}
            result = work => result.unwrap(),
        }
    }
    let (plan, said) = served.got(&payload).await;
    assert_eq!(content(&plan), "one");
    assert!(!said.all().contains("instead"), "{}", said.all());
}

#[tokio::test]
async fn mirrors_that_nobody_uses_are_removed_but_never_while_in_use() {
    let served = Served::new().await.with_mirrors();
    served.commit("one").await;
    served.got(&served.job(&[]).await).await;
    let mirrors = served.runner.mirrors.clone().unwrap();
    let unused = mirrors.dir.join("elsewhere/a/b/c.git");
    let beside = |ending: &str| Utf8PathBuf::from(format!("{unused}.{ending}"));
    fs::create_dir_all(unused.join("refs")).unwrap();
    fs::write(beside("use"), "").unwrap();
    ageing(&beside("use"), 2);
    let stale = served.mirror().join("refs/jobs/1");
    fs::create_dir_all(&stale).unwrap();
    ageing(&stale, 2);
    let stamp = mirrors.dir.join(".pruned");
    // Today it has been done already.
    prune(&mirrors).await.unwrap();
    assert!(unused.exists() && stale.exists());

    ageing(&stamp, 2);
    let using = hands::try_hold(&beside("use"), Hold::Together).await.unwrap().unwrap();
    prune(&mirrors).await.unwrap();
    assert!(unused.exists() && !stale.exists());
    drop(using);
    let removed = async {
        // A process that another test is just starting may hold our files for a moment longer.
        while unused.exists() {
            ageing(&stamp, 2);
            prune(&mirrors).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(20), removed).await.unwrap();
    assert!(served.mirror().join("objects").exists());
}

#[test]
fn refspecs_get_a_place_of_the_jobs_own() {
    let one = |spec| one_ref(spec, 7).map(|one| (one.from, one.here, one.to, one.forced));
    assert_eq!(
        one("+refs/heads/*:refs/remotes/origin/*"),
        Some((
            "refs/heads/*".into(),
            "refs/jobs/7/heads/*".into(),
            Some("refs/remotes/origin/*".into()),
            true
        ))
    );
    let sha = "a".repeat(40);
    assert_eq!(one(&sha), Some((sha.clone(), format!("refs/jobs/7/commit/{sha}"), None, false)));
    for odd in ["main", "^refs/heads/x", "HEAD:refs/heads/x", "tag v1"] {
        assert!(one(odd).is_none(), "{odd}");
    }
}
