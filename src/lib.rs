//! bridge: a GitLab runner for batch systems.
//!
//! `bridge serve` asks GitLab for CI jobs, writes each one down before anything else happens, hands it to
//! a batch system, carries its log back while it runs, and tells GitLab how it ended and why. A job
//! survives whatever happens to the bridge. This page is the architecture: what holds, and above all
//! what is absent. A change of an invariant changes this page in the same commit.
//!
//! # What holds
//!
//! 1. **Note, act, note.** Before any effect outside this process there is a durable row from which the
//!    effect can be found again: the job ([`agent`]), the submission's token ([`reconcile`]), the
//!    trace's bytes ([`trace`]), the verdict.
//! 2. **There is no recovery code.** A restart runs the ordinary sweep over the ordinary rows. What a
//!    restart needs and the sweep does not do is a bug of the sweep.
//! 3. **State has one writer.** [`domain::job::JobState::after`] is the only function that makes a state
//!    from a state; the store's `transition` is the only statement that writes one. Operators and other
//!    processes write facts, and the next sweep acts on them.
//! 4. **It is never run twice to be safe.** A submission whose answer was lost is looked up by its token.
//!    Where it is surely absent, the *same* token is submitted again; where nobody can look, the job
//!    fails and says why.
//! 5. **Silence proves nothing.** A job that a backend leaves out of a good answer is missing, not gone,
//!    and counts as lost only after `lost_after` of our own uptime. A question that was not answered
//!    counts for nothing at all.
//! 6. **Many at once.** The number of questions to a backend does not grow with the number of jobs:
//!    one round per backend cancels, finds and polls for all of them.
//! 7. **Secrets have types and a death date.** They are in the payload's row, sealed with a key that is
//!    not in the database, until the job is over, in private files until it has ended, and nowhere else:
//!    no argument list, no log line, no `Debug`. Where nothing is shared with the machines that run jobs,
//!    they travel in the job's sandbox, which the backend's own account alone can read over there.
//!
//! # What is absent
//!
//! No thread or task per job that lives as long as the job. No retry loop with a sleep: a retry is the
//! next sweep, and its back-off a column. No boolean that should be a state, no state that should be a
//! time. No hint passed to a sweep. No GitLab in a backend, no SQL outside [`store`], no printing
//! outside `cli::output`. A test reads the sources and keeps these edges.
//!
//! # How a job goes
//!
//! ```text
//!  GitLab ──201──▶ agent ──▶ row: received
//!                              │  PUT running, sources, caches, earlier artifacts  (dispatch)
//!                              ▼
//!                            submitting  ── submit(token) ──▶ backend
//!                              │  the answer, or find(token)
//!                              ▼
//!                            submitted ─▶ running      one poll per backend        (observe)
//!                              │            │  log ─▶ spool ─▶ PATCH trace
//!                              ▼            ▼
//!                            reporting   ── caches kept, artifacts uploaded      (finish)
//!                              │             rest of the trace, PUT verdict ──▶ GitLab (report)
//!                              ▼
//!                            finished / abandoned ── nothing left behind ──▶ released (release)
//! ```
//!
//! # Where nothing is shared
//!
//! A backend with [`bridge_backend::Filesystem::Sandbox`] runs a job in a copy of its workspace. The seam
//! stays the same: `submit` takes the workspace along, `read_log` gives what the job has sent so far, and
//! in `reporting` `collect` brings home the names that the plan asked for before the job ran, since
//! afterwards nobody can ask. What has such a name here is removed first: a file that the script removed
//! must not be packed from here. Collecting can be begun again at any time, as all of `reporting` can.
//!
//! # Where the crash points are
//!
//! `kill -9` may come between any two lines. The letters are used in comments and tests.
//!
//! | | between | what the next sweep does |
//! | --- | --- | --- |
//! | A | GitLab's 201 and the insert | nothing can: GitLab ends the job. Nothing stands between those two |
//! | B | insert and attempt | makes the job ready again |
//! | C | attempt and `submit` | `find`: absent; once `settle` has passed since the process that attempted it ended, submits with the same token |
//! | D | `submit` and its answer's note | `find`: there; takes the id |
//! | E | spool and offsets | cuts the spool to its noted length, reads the log again |
//! | F | end seen and end noted | polls again |
//! | G | PATCH accepted and noted | sends again, hears 416, takes the offset from it |
//! | H | artifact uploaded and noted | uploads the same packed file again: it is kept until then, and GitLab takes the same bytes twice |
//! | I | verdict accepted and noted | sends again, hears 403 with our own verdict: a yes |
//! | J | cancel sent and noted | cancels again |
//! | K | released and noted | releases again |
//!
//! R1 to R4, around a runner's new token, stand in [`rotation`].
//!
//! # Where this differs from the design it grew from
//!
//! * What a job leaves behind is brought home in `reporting`, after its verdict is noted: a restart then
//!   goes on with the uploads and never runs anything again. An artifact that GitLab refuses turns a green
//!   verdict red, which is why the trace's last line is written last.
//! * Files of a workspace are touched by `job::hands` and by [`archive`], which packs and unpacks them;
//!   where nothing is shared, by the backend, too, which carries them away and brings outputs home.
//! * Payloads lie in a table of their own: writing a job's facts must not copy a payload of megabytes.
//! * Writes that wait together are committed together, each in a savepoint: fifty jobs a second would
//!   otherwise wait for several hundred `fsync`s. None is acknowledged before the commit it is in.
//! * `missing_since` replaces "time of last news": polling ten thousand quiet jobs writes nothing.
//! * What a round saw is handed to the job's step as data. It is no hint about what to do: a step that
//!   never gets it does the same a round later.

pub mod agent;
pub mod archive;
pub mod cache;
pub mod cli;
pub mod config;
pub mod coordinator;
pub mod daemon;
pub mod domain;
pub mod gitlab;
pub mod http;
pub mod job;
pub mod logins;
pub mod pipeline;
pub mod reconcile;
pub mod registry;
pub mod rotation;
pub mod store;
pub mod telemetry;
pub mod trace;

use std::process::ExitCode;

pub use crate::registry::Registry;

/// Runs the program with these kinds of backend; a third party's binary is this call with
/// `Registry::builtin().with(its_crate::DRIVER)`.
pub fn main(registry: Registry) -> ExitCode {
    // One provider for the whole process; a second `main` in it may have been here before.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider is installed already");
    }
    cli::run(registry)
}
