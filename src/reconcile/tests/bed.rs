//! A scene with one process in it, for tests of what the reconciler does.

use std::ops::Deref;

use super::*;

/// A process and all that is around it.
pub(super) struct Bed {
    scene: Scene,
    pub(super) life: Life,
}

impl Deref for Bed {
    type Target = Scene;
    fn deref(&self) -> &Scene {
        &self.scene
    }
}

impl Bed {
    pub(super) async fn new() -> Self {
        Self::with(FakeOptions::default(), Tuning::default()).await
    }

    pub(super) async fn with(world: FakeOptions, tuning: Tuning) -> Self {
        Self::of(world, Options { record: true, ..Options::default() }, tuning).await
    }

    pub(super) async fn of(world: FakeOptions, gitlab: Options, tuning: Tuning) -> Self {
        let scene = Scene::new(world, gitlab, tuning).await;
        let life = scene.open(|store| store, scene.world.open()).await;
        Self { scene, life }
    }

    /// Ends the process and starts another one.
    pub(super) async fn restart(self) -> Self {
        let Self { scene, life } = self;
        life.stop().await;
        let life = scene.open(|store| store, scene.world.open()).await;
        Self { scene, life }
    }

    /// Ends the process and starts another one, whose runner has another token.
    pub(super) async fn restart_with_token(mut self, short_token: &'static str) -> Self {
        self.scene.tuning.short_token = short_token;
        self.restart().await
    }

    /// Takes a job in.
    pub(super) async fn take(&self, job: NewJob) -> Case {
        let (ci_job, id) = self.receive(&self.life, job).await;
        Case { ci_job, id, token: token_of(id) }
    }

    /// Takes a job in and has it submitted.
    pub(super) async fn submitted(&self, job: NewJob) -> Case {
        let case = self.take(job).await;
        self.until("it is submitted", &case, |job| job.state == JobState::Submitted).await;
        case
    }

    /// Takes a job in and has it run.
    pub(super) async fn running(&self, job: NewJob) -> Case {
        let case = self.submitted(job).await;
        self.world.start_on(&case.token, "node1");
        self.until("it runs", &case, |job| job.state == JobState::Running).await;
        case
    }

    /// One turn, a second later.
    pub(super) async fn sweep(&self) {
        self.turn(&self.life).await;
    }

    pub(super) async fn sweeps(&self, turns: usize) {
        for _ in 0..turns {
            self.sweep().await;
        }
    }

    /// Turns until a row is as wanted; gives it.
    pub(super) async fn until(&self, what: &str, case: &Case, holds: impl Fn(&Job) -> bool) -> Job {
        for _ in 0..MOST_TURNS {
            self.sweep().await;
            let job = self.row(case).await;
            if holds(&job) {
                return job;
            }
        }
        let events = self.life.events(case.id).await;
        panic!("in vain: {what}: {:#?}\n{events:#?}", self.row(case).await);
    }

    /// Turns until nothing is owed to the job.
    pub(super) async fn home(&self, case: &Case) -> Job {
        self.until("nothing is owed", case, |job| job.released_at.is_some()).await
    }

    pub(super) async fn row(&self, case: &Case) -> Job {
        self.life.job(case.id).await
    }

    pub(super) async fn count(&self, case: &Case, event: &str) -> usize {
        self.life.events(case.id).await.iter().filter(|row| row.event == event).count()
    }

    /// What must hold at the end of a test in which nothing was lost.
    pub(super) fn assert_well(&self) {
        self.assert_no_violations();
        assert_eq!(self.life.illegal.illegal.load(Ordering::SeqCst), 0);
    }
}

/// A job's names.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) ci_job: i64,
    pub(super) id: JobId,
    pub(super) token: SubmitToken,
}
