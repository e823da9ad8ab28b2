//! The suite that every backend runs, against the real thing.
//!
//! A backend's test implements [`Harness`] and calls [`run`]. The suite submits small shell scripts,
//! watches them through the backend alone, and asserts the contract of [`crate`]. It waits for the
//! other side patiently, so that a batch system may queue for seconds, and holds jobs by files in
//! their workspaces, so that nothing depends on how long a moment is.
//!
//! What a harness cannot do (lose an answer, invent a status) it says so, and the checks that need it
//! are reported as skipped; [`Report::assert_ran`] names those that a backend must not skip.

mod ending;
mod logs;
mod lookup;
mod running;
mod travel;
mod trial;

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use camino::Utf8PathBuf;

use self::trial::{Done, Trial};
use crate::{Backend, ExternalId, JobRef, SubmitToken};

/// What the suite needs of a test to exercise a backend.
#[async_trait]
pub trait Harness: Send {
    /// Opens the backend, always with the same configuration; every time is a restart.
    fn open(&mut self) -> Arc<dyn Backend>;

    /// Makes a new empty directory that submit node and jobs see under the same path.
    fn workspace(&mut self) -> Utf8PathBuf;

    /// Says how long the other side may take for one step of one job.
    fn patience(&self) -> Duration {
        Duration::from_secs(60)
    }

    /// Is called whenever the suite waits; for harnesses that play the other side themselves.
    async fn tick(&mut self) {}

    /// Lets the backend's settling time pass.
    async fn settle(&mut self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// Says where the backend keeps a job, if that can be seen here.
    fn job_dir(&self, _token: &SubmitToken) -> Option<Utf8PathBuf> {
        None
    }

    /// Counts the questions that reached the other side so far, if they can be counted.
    fn queries(&self) -> Option<usize> {
        None
    }

    /// Gives a wall time limit that the other side enforces, if one is short enough to wait for.
    fn wall_time(&self) -> Option<Duration> {
        None
    }

    /// Gives an id as the other side writes them, of no job.
    fn unknown_id(&self) -> ExternalId {
        ExternalId("987654321".to_owned())
    }

    /// Has the next submission fail as [`crate::ErrorKind::Ambiguous`]; says whether it can.
    async fn lose_next_submit(&mut self, _loss: Loss) -> bool {
        false
    }

    /// Keeps jobs submitted from now on from starting, or lets them go; says whether it can.
    async fn hold_jobs(&mut self, _held: bool) -> bool {
        false
    }

    /// Has the other side call a job's status by a word that nobody knows; says whether it can.
    async fn say_unknown_status(&mut self, _job: &JobRef, _word: &str) -> bool {
        false
    }

    /// Says whether the jobs' processes are in this machine's `/proc`.
    fn sees_processes(&self) -> bool {
        true
    }

    /// Says whether the other side finds processes of a job that left its process tree.
    fn finds_strays(&self) -> bool {
        true
    }
}

/// What is lost of a submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The question: nothing happens.
    Question,
    /// The answer: the job exists.
    Answer,
}

/// What became of every check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The contract was kept.
    pub passed: Vec<&'static str>,
    /// The harness cannot do what it takes; with the reason.
    pub skipped: Vec<(&'static str, String)>,
    /// The contract was broken; with the story.
    pub failed: Vec<(&'static str, String)>,
}

impl Report {
    /// Checks that these were not skipped.
    ///
    /// # Panics
    ///
    /// When one was not run.
    pub fn assert_ran(&self, names: &[&str]) {
        for name in names {
            assert!(self.passed.contains(name), "{name} was not run:\n{self}");
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for name in &self.passed {
            writeln!(f, "passed   {name}")?;
        }
        for (name, why) in &self.skipped {
            writeln!(f, "skipped  {name}: {why}")?;
        }
        for (name, why) in &self.failed {
            writeln!(f, "FAILED   {name}: {why}")?;
        }
        Ok(())
    }
}

/// Lists the checks, and calls one by its name.
macro_rules! checks {
    ($($module:ident::$name:ident,)*) => {
        /// The names of all checks, in the order in which they run.
        pub const CHECKS: &[&str] = &[$(stringify!($name)),*];

        async fn check(name: &str, trial: &mut Trial<'_>) -> Result<Done, String> {
            match name {
                $(stringify!($name) => Box::pin($module::$name(trial)).await,)*
                _ => Err("there is no such check".to_owned()),
            }
        }
    };
}

checks! {
    running::check_accepts_a_healthy_system,
    running::the_exit_status_is_the_outcome,
    running::the_environment_arrives_as_it_was_sent,
    running::the_script_runs_in_its_workspace_with_empty_input,
    running::the_job_directory_is_private,
    running::the_result_file_outranks_the_other_sides_word,
    running::secrets_are_in_no_argument_list,
    running::an_unknown_option_is_the_authors_fault,
    logs::a_log_holds_both_outputs,
    logs::a_log_is_readable_while_the_job_runs,
    logs::a_log_reads_the_same_from_every_offset,
    lookup::a_submitted_job_is_found_by_its_token,
    lookup::a_lost_answer_is_found_again,
    lookup::a_lost_question_is_absent_and_may_be_asked_again,
    lookup::a_dropped_submission_is_resolved_and_runs_once,
    lookup::dropped_questions_leave_nothing_behind,
    lookup::a_restart_in_any_phase_changes_nothing,
    lookup::one_poll_asks_for_many,
    lookup::an_unknown_job_is_gone_or_absent_and_no_error,
    lookup::both_names_must_match,
    lookup::an_unknown_status_is_unclear_and_no_error,
    ending::a_cancelled_job_ends_with_all_its_processes,
    ending::a_cancelled_script_hears_term_and_finds_the_mark,
    ending::a_job_that_waits_can_be_cancelled,
    ending::a_cancel_after_the_end_changes_nothing,
    ending::the_wall_time_is_a_limit,
    ending::a_release_may_be_repeated,
    travel::a_workspace_travels_and_its_outputs_come_home,
}

/// Runs all checks.
///
/// # Panics
///
/// When the contract was broken, with all breaches.
pub async fn run(harness: &mut dyn Harness) -> Report {
    let report = examine(harness, CHECKS).await;
    assert!(report.failed.is_empty(), "the contract was broken:\n{report}");
    report
}

/// Runs the checks of these names and tells what became of them.
pub async fn examine(harness: &mut dyn Harness, names: &[&'static str]) -> Report {
    let mut report = Report::default();
    for name in names {
        let mut trial = Trial::new(harness);
        let limit = trial.patience().saturating_mul(10);
        let done = match tokio::time::timeout(limit, check(name, &mut trial)).await {
            Ok(done) => done,
            Err(_elapsed) => Err(format!("took longer than {limit:?}")),
        };
        // Also after a failure: what it left running would disturb the next.
        let cleaned = trial.clean_up().await;
        match done.and_then(|done| cleaned.map(|()| done)) {
            Ok(Done::Checked) => report.passed.push(name),
            Ok(Done::Skipped(why)) => report.skipped.push((name, why)),
            Err(why) => report.failed.push((name, why)),
        }
    }
    report
}

/// Gives a number that no other run of any suite gives.
fn unique() -> u64 {
    RandomState::new().build_hasher().finish()
}
