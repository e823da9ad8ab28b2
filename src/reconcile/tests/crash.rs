//! The crash sweep, which this project lives by: the process ends before and after every single thing
//! that is durable or seen from outside, another one is started, and nobody can tell from the result.

use std::io::Read as _;

use bridge_backend::fake::{Trouble, Verb};
use bridge_backend::{Lookup, Outcome};
use serde_json::json;

use super::cut::{Counted, Cut, Door, Side};
use super::*;
use crate::coordinator::{EndedBy, Status};

/// What happens to the job over there, one after the other.
///
/// The next act waits until this one was noted: what nobody saw is no part of the trace, and a process
/// that ends would leave it to chance.
#[derive(Clone, Debug)]
enum Act {
    Wait(&'static str),
    Start,
    Write(&'static str),
    Finish(Outcome),
    /// A user cancels it in GitLab.
    Cancel,
}

/// One kind of job, and what must come of it.
#[derive(Clone)]
struct Story {
    name: &'static str,
    acts: Vec<Act>,
    lookup: Lookup,
    trouble: Option<Trouble>,
    status: Status,
    reason: Option<&'static str>,
    /// How often the backend was given the job.
    submissions: std::ops::RangeInclusive<usize>,
    /// What it wants kept: an archive and a cache.
    keeps: bool,
    /// Whether the job ran on another machine, from which that is brought home.
    away: bool,
}

impl Story {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            acts: vec![
                Act::Wait("Resources"),
                Act::Start,
                Act::Write("alpha\nbeta\n"),
                Act::Finish(Outcome::Exited { code: 0 }),
            ],
            lookup: Lookup::ByToken { settle: secs(5) },
            trouble: None,
            status: Status::Success,
            reason: None,
            submissions: 1..=1,
            keeps: false,
            away: false,
        }
    }

    fn job(&self) -> NewJob {
        let job = job(self.name);
        if !self.keeps {
            return job;
        }
        job.artifact(json!({
            "paths": ["out/"], "artifact_type": "archive", "artifact_format": "zip",
        }))
        .cache(json!({ "key": "deps", "paths": ["out/"], "policy": "push" }))
    }

    /// What the job writes over its whole life, its secret hidden.
    fn log(&self) -> String {
        let pieces = self.acts.iter().filter_map(|act| match act {
            Act::Write(piece) => Some(*piece),
            Act::Wait(_) | Act::Start | Act::Finish(_) | Act::Cancel => None,
        });
        pieces.collect::<String>().replace(SECRET, "[MASKED]")
    }
}

/// Where the job stands over there; outlives the process.
#[derive(Debug, Default)]
struct Played {
    acts: usize,
    waited: usize,
}

impl Played {
    /// Plays the next act if the one before has been noted.
    fn next(&mut self, scene: &Scene, story: &Story, ci_job: i64, row: &Job) {
        let token = token_of(row.id);
        if row.external_id.is_none() {
            return;
        }
        let there = scene.world.job(&token).unwrap();
        self.waited += 1;
        let noted = match self.acts.checked_sub(1).map(|last| &story.acts[last]) {
            None | Some(Act::Finish(_) | Act::Cancel) => true,
            Some(Act::Wait(reason)) => row.waits_for.as_deref() == Some(*reason),
            Some(Act::Start) => row.state == JobState::Running,
            // Of half a line not everything can be used.
            Some(Act::Write(_)) => {
                row.log_offset == u64::try_from(there.log.len()).unwrap() || self.waited > 4
            }
        };
        let Some(act) = story.acts.get(self.acts).filter(|_| noted) else { return };
        self.acts += 1;
        self.waited = 0;
        match act {
            Act::Wait(reason) => scene.world.wait_in_queue(&token, reason, None),
            Act::Start => scene.world.start_on(&token, "node"),
            Act::Write(piece) => {
                scene.world.append_log(&token, piece);
                if story.keeps && story.away {
                    scene.world.leave(&token, "out/piece", piece);
                    scene.world.leave(&token, "other", "nobody asked for it");
                } else if story.keeps {
                    let out = there.spec.workspace.join("out");
                    std::fs::create_dir_all(&out).unwrap();
                    std::fs::write(out.join("piece"), piece).unwrap();
                }
            }
            Act::Finish(outcome) => scene.world.finish(&token, outcome.clone()),
            Act::Cancel => scene.gitlab.cancel(ci_job),
        }
    }
}

/// How a run came out.
struct Run {
    /// What happened in the first life, in order.
    effects: Vec<String>,
    died: bool,
    text: String,
}

/// Runs a story through, with the end of the first process at one of its effects.
fn run(story: &Story, at: Option<(usize, Side)>) -> Run {
    // GitLab and the batch system have a runtime of their own: they do not end with the process.
    let outside =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let cut = Cut::default();
    let mut options = FakeOptions::default();
    options.capabilities.lookup = story.lookup;
    if story.away {
        options.capabilities.filesystem = Filesystem::Sandbox;
        options.capabilities.collect = true;
    }
    let (mut scene, door) = outside.block_on(async {
        let scene = Scene::new(options, Options::default(), Tuning::default()).await;
        let door = Door::open(&scene.url, cut.clone()).await;
        (scene, door)
    });
    scene.url = door.url();
    if let Lookup::ByToken { .. } = story.lookup {
        // Shorter than `settle`: who looks too early sees nothing.
        scene.world.hide_new_jobs_for(secs(3));
    }
    if let Some(trouble) = story.trouble {
        scene.world.trouble(Verb::Submit, trouble);
    }
    let mut known = None;
    let mut played = Played::default();
    let died = live(&scene, &cut, story, (&mut known, &mut played), at);
    let effects = cut.effects();
    if died {
        cut.revive();
        outside.block_on(async {
            // The connections of a process end with it.
            scene.gitlab.go_away().await;
            scene.gitlab.come_back().await.unwrap();
        });
        assert!(!live(&scene, &cut, story, (&mut known, &mut played), None));
    }
    let (ci_job, id) = known.unwrap();
    let text = without_ids(&scene.text(ci_job));
    check(&scene, story, ci_job, id);
    drop(door);
    Run { effects, died, text }
}

/// Hides what GitLab calls a request: it is another one each time.
fn without_ids(text: &str) -> String {
    let mut pieces = text.split("correlation_id=");
    let first = pieces.next().unwrap().to_owned();
    pieces.fold(first, |text, piece| text + piece.split_once(' ').unwrap().1)
}

/// One process, from its start until nothing is owed or its end; tells whether it met that.
fn live(
    scene: &Scene,
    cut: &Cut,
    story: &Story,
    (known, played): (&mut Option<(i64, JobId)>, &mut Played),
    at: Option<(usize, Side)>,
) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // What is left of the process when this returns goes with its runtime, wherever it stands.
    runtime.block_on(async {
        let backend = Counted { inner: scene.world.open(), cut: cut.clone() };
        let life = scene.open(|store| store.with_around(cut.around()), Arc::new(backend)).await;
        let (ci_job, id) = match *known {
            Some(known) => known,
            None => {
                let new = scene.receive(&life, story.job()).await;
                cut.arm(at);
                *known.insert(new)
            }
        };
        let died = tokio::select! {
            biased;
            () = cut.dead() => true,
            () = home(scene, &life, story, played, (ci_job, id)) => false,
        };
        if died {
            // A write that is with the database is committed or not; it is no matter of later.
            while !cut.is_idle() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        } else {
            assert_eq!(life.illegal.illegal.load(Ordering::SeqCst), 0);
            assert_home(&life, story, id).await;
            life.stop().await;
        }
        died
    })
}

/// Sweeps until nothing is owed.
async fn home(
    scene: &Scene,
    life: &Life,
    story: &Story,
    played: &mut Played,
    (ci_job, id): (i64, JobId),
) {
    for _ in 0..MOST_TURNS {
        scene.turn(life).await;
        played.next(scene, story, ci_job, &life.job(id).await);
        if life.owed().await == 0 {
            return;
        }
    }
    let job = life.job(id).await;
    panic!("never came home: {job:#?}\n{:#?}\n{:#?}", life.events(id).await, scene.world.calls());
}

async fn assert_home(life: &Life, story: &Story, id: JobId) {
    let job = life.job(id).await;
    assert_eq!(job.state, JobState::Finished, "{:#?}", life.events(id).await);
    assert!(job.released_at.is_some());
    assert!(life.store.payload(id).await.unwrap().is_none(), "the payload went with the job");
    let events = life.events(id).await;
    let count = |name: &str| events.iter().filter(|event| event.event == name).count();
    for once in ["received", "attempted", "accepted", "concluded", "reported", "released"] {
        assert_eq!(count(once), 1, "{}: {once} in {events:#?}", story.name);
    }
    assert!(count("started") <= 1, "{events:#?}");
}

fn check(scene: &Scene, story: &Story, ci_job: i64, id: JobId) {
    scene.assert_no_violations();
    let jobs = scene.world.jobs();
    assert_eq!(jobs.len(), 1, "one job over there");
    assert_eq!(jobs[0].job.token, token_of(id));
    assert!(story.submissions.contains(&jobs[0].submissions), "{}", jobs[0].submissions);
    assert!(jobs[0].released);
    let view = scene.view(ci_job);
    assert_eq!((view.status, view.ended_by), (story.status, Some(EndedBy::Runner)), "{view:?}");
    assert_eq!(view.failure_reason.as_deref(), story.reason, "{view:?}");
    assert!(scene.spool(id) == *view.trace, "spool and trace differ: {view:?}");
    let final_update = view.final_update.clone().unwrap();
    assert_eq!(final_update.bytesize, Some(view.trace_len));
    assert_eq!(final_update.checksum, Some(format!("crc32:{:08x}", view.trace_crc)));
    let workspace = jobs[0].spec.workspace.clone();
    assert!(!Utf8PathBuf::from(format!("{workspace}.tmp")).exists(), "file variables are gone");
    let artifacts = scene.gitlab.artifacts(ci_job);
    assert_eq!(artifacts.len(), usize::from(story.keeps), "{artifacts:?}");
    if let Some(kept) = artifacts.first() {
        let mut zip = zip::ZipArchive::new(std::fs::File::open(kept.file()).unwrap()).unwrap();
        let mut piece = String::new();
        zip.by_name("out/piece").unwrap().read_to_string(&mut piece).unwrap();
        assert_eq!(piece, story.log());
    }
    assert!(!workspace.join("other").exists(), "what nobody asked for stays where it is");
    assert!(!scene.path("artifacts").join(id.to_string()).exists(), "packed files are gone");
    let text = scene.text(ci_job);
    let log = story.log();
    assert_eq!(text.matches(&log).count(), 1, "the log is in {text}");
}

/// Ends the first process at every effect of the story, on both sides of it.
fn sweep(story: &Story) {
    sweep_on(&[Side::Before, Side::After], story);
}

/// Ends the first process at every effect of the story.
fn sweep_on(sides: &[Side], story: &Story) {
    let whole = run(story, None);
    assert!(!whole.died && whole.effects.len() > 8, "{:?}", whole.effects);
    // Two at once: most of the time is waited for the disk.
    std::thread::scope(|scope| {
        for side in sides.iter().copied() {
            let whole = &whole;
            scope.spawn(move || {
                for k in 1.. {
                    let at = || whole.effects.get(k - 1).map_or("the end", String::as_str);
                    let point = format!("{}: {side:?} effect {k}, about {}", story.name, at());
                    let run = std::panic::catch_unwind(|| run(story, Some((k, side))));
                    let run = run.unwrap_or_else(|_| panic!("{point}"));
                    assert_eq!(run.text, whole.text, "{point}");
                    if !run.died {
                        // It came home before; how many effects there are depends on the pace.
                        assert!(k + 4 > whole.effects.len(), "{point}: it did not come to that");
                        return;
                    }
                }
            });
        }
    });
}

#[test]
fn a_job_that_succeeds_survives_an_end_anywhere() {
    sweep(&Story::new("success"));
}

#[test]
fn a_job_that_fails_survives_an_end_anywhere() {
    let mut story = Story::new("failure");
    story.acts.pop();
    story.acts.push(Act::Finish(Outcome::Exited { code: 3 }));
    story.status = Status::Failed;
    story.reason = Some("script_failure");
    sweep_on(&[Side::After], &story);
}

#[test]
fn artifacts_and_caches_survive_an_end_anywhere() {
    let mut story = Story::new("kept");
    story.keeps = true;
    sweep(&story);
}

#[test]
fn outputs_that_are_brought_home_survive_an_end_anywhere() {
    let mut story = Story::new("away");
    story.keeps = true;
    story.away = true;
    sweep(&story);
}

#[test]
fn a_log_in_pieces_survives_an_end_anywhere() {
    let mut story = Story::new("pieces");
    let (front, back) = SECRET.split_at(9);
    let pieces = [
        "alpha be",
        "ta\ngamma\nthe secret is ",
        front,
        back,
        " and no more\nprogress \r",
        "done\n\nlast line without an end",
    ];
    story.acts = [Act::Start].into_iter().chain(pieces.map(Act::Write)).collect();
    story.acts.push(Act::Finish(Outcome::Exited { code: 0 }));
    sweep(&story);
}

#[test]
fn a_lost_answer_to_submit_survives_an_end_anywhere() {
    let mut story = Story::new("lost answer");
    story.trouble = Some(Trouble::LostAnswer);
    sweep(&story);
}

#[test]
fn a_lost_question_to_submit_survives_an_end_anywhere() {
    let mut story = Story::new("lost question");
    story.trouble = Some(Trouble::LostQuestion);
    sweep_on(&[Side::After], &story);
}

#[test]
fn a_backend_that_knows_its_tokens_survives_an_end_anywhere() {
    let mut story = Story::new("resubmit");
    story.lookup = Lookup::Resubmit;
    story.submissions = 1..=2;
    sweep_on(&[Side::After], &story);
}

#[test]
fn a_cancellation_survives_an_end_anywhere() {
    let mut story = Story::new("cancelled");
    story.acts.pop();
    story.acts.push(Act::Cancel);
    story.status = Status::Canceled;
    sweep(&story);
}
