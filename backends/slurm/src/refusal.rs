//! Reads why `sbatch` did not submit: whether the job may exist all the same, and whose move it is.
//!
//! By text, since the exit status is 1 for everything. What is in no table counts as "may exist",
//! unless the controller itself refused.

use std::time::Duration;

use bridge_backend::{BackendError, ErrorKind, Fault};

use crate::client::{Answer, CallError};
use crate::options::Wishes;

/// How long to leave a site alone that says that we have enough jobs there.
const FULL: Duration = Duration::from_secs(60);

/// The controller refused; the keys are those by which the job's author can have caused it.
const REFUSED: &[(&str, &[&str])] = &[
    ("Invalid partition name specified", &["partition"]),
    ("Invalid account or account/partition combination", &["account", "partition"]),
    ("Invalid qos specification", &["qos"]),
    ("Invalid feature specification", &["constraint"]),
    ("Invalid license specification", &[]),
    ("Requested reservation is invalid", &["reservation"]),
    ("Reservation", &["reservation"]),
    ("Invalid node name specified", &[]),
    ("Node count specification invalid", &["nodes"]),
    ("Invalid generic resource", &["gres"]),
    ("Invalid Trackable RESource", &["gres"]),
    (
        "Requested node configuration is not available",
        &["mem", "cpus_per_task", "ntasks", "nodes", "gres", "constraint", "partition"],
    ),
    ("Memory required by task is not available", &["mem"]),
    ("Requested time limit is invalid", &["time", "partition", "qos"]),
    ("More processors requested than permitted", &["cpus_per_task", "ntasks", "nodes"]),
    ("Requested partition configuration not available", &["nodes", "partition", "time"]),
    ("User's group not permitted to use this partition", &["partition"]),
    (
        "Job violates accounting/QOS policy",
        &["time", "mem", "cpus_per_task", "ntasks", "nodes", "gres"],
    ),
    ("Access/permission denied", &["partition", "account", "reservation", "qos"]),
    ("Required partition not available", &["partition"]),
    ("Pathname of a file, directory or other parameter too long", &[]),
];

/// We have too many jobs there already: the site's brake, not a fault.
const BRAKES: &[&str] = &["MaxSubmitJob", "GrpSubmitJob", "MaxSubmitJobs"];

/// Words of a lost or broken conversation: the controller may have acted before it broke.
const CONVERSATION: &[&str] = &[
    "contact",
    "timed out",
    "time out",
    "connection",
    "communication",
    "message",
    "transmitted",
    "authentication",
    "credential",
    "protocol",
    "socket",
    "transport",
    "broken pipe",
    "unavailable",
    "no route",
    "incompatible versions",
];

/// Classifies an `sbatch` that gave no answer at all.
pub(crate) fn of_call(error: CallError) -> BackendError {
    let (kind, context) = match &error {
        CallError::Missing { .. } => {
            (ErrorKind::Rejected(Fault::Site), "submit the job: sbatch cannot be run")
        }
        CallError::Start { .. } => (ErrorKind::Transient, "submit the job: sbatch was not started"),
        CallError::TimedOut { .. } | CallError::Read { .. } | CallError::Endless { .. } => {
            (ErrorKind::Ambiguous, "submit the job for sure: sbatch gave no answer")
        }
    };
    BackendError::new(kind, context).with_source(error)
}

/// Classifies an `sbatch` that failed. `asked` is what the job itself, not the site, asked for.
pub(crate) fn of_answer(answer: &Answer, asked: &Wishes, limited: bool) -> BackendError {
    let kind = kind(answer, asked, limited);
    let context = match kind {
        ErrorKind::Transient => "submit the job now",
        ErrorKind::Ambiguous => "submit the job for sure",
        ErrorKind::Rejected(_) | ErrorKind::Lost => "submit the job",
    };
    let error = BackendError::new(kind, context).with_source(answer.said());
    let full = BRAKES.iter().any(|brake| answer.stderr.contains(brake))
        || answer.stderr.contains("temporarily unable to accept job");
    if kind == ErrorKind::Transient && full { error.with_retry_after(FULL) } else { error }
}

fn kind(answer: &Answer, asked: &Wishes, limited: bool) -> ErrorKind {
    let text = answer.stderr.as_str();
    if answer.code.is_none() {
        return ErrorKind::Ambiguous;
    }
    if BRAKES.iter().any(|brake| text.contains(brake)) {
        return ErrorKind::Transient;
    }
    let fault = |own: bool| ErrorKind::Rejected(if own { Fault::Job } else { Fault::Site });
    let own = |keys: &[&str]| keys.iter().any(|key| asked.has(key));
    if let Some((_, keys)) = REFUSED.iter().find(|(words, _)| text.contains(words)) {
        // A limit that is too long is the job's own even if it did not ask in Slurm's words.
        return fault(own(keys) || (limited && keys.contains(&"time")));
    }
    let lower = text.to_lowercase();
    // `connect failure` means that nothing was sent. The only word of trouble it may contain are its
    // own; with any other, an earlier attempt of the same sbatch may have got through.
    if lower.contains("connect failure") {
        let rest = lower.replace("unable to contact slurm controller (connect failure)", "");
        return if has_any(&rest) { ErrorKind::Ambiguous } else { ErrorKind::Transient };
    }
    // sbatch says this after having been refused sixteen times in two minutes.
    if lower.contains("temporarily unable to accept job") && !lower.contains("timed out") {
        return ErrorKind::Transient;
    }
    if has_any(&lower) {
        return ErrorKind::Ambiguous;
    }
    // 255 is sbatch's own refusal of its words, before it talks to anybody.
    if answer.code == Some(255) {
        return fault(own(&[
            "nodes",
            "ntasks",
            "cpus_per_task",
            "mem",
            "gres",
            "time",
            "constraint",
        ]));
    }
    if lower.contains("batch job submission failed")
        || lower.contains("could not establish a configuration source")
        || lower.contains("this does not look like a batch script")
    {
        return ErrorKind::Rejected(Fault::Site);
    }
    ErrorKind::Ambiguous
}

fn has_any(text: &str) -> bool {
    CONVERSATION.iter().any(|words| text.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(code: i32, stderr: &str, asked: &str) -> BackendError {
        let answer = Answer {
            program: "sbatch",
            code: Some(code),
            stdout: String::new(),
            stderr: stderr.into(),
        };
        of_answer(&answer, &Wishes::of_job(&asked.parse().unwrap()).unwrap(), false)
    }

    const JOB: ErrorKind = ErrorKind::Rejected(Fault::Job);
    const SITE: ErrorKind = ErrorKind::Rejected(Fault::Site);

    #[test]
    fn recorded_failures_have_their_kind() {
        let failed = "sbatch: error: Batch job submission failed: ";
        for (code, words, asked, kind) in [
            (1, "Invalid partition name specified", "partition = 'x'", JOB),
            (1, "Invalid partition name specified", "", SITE),
            (1, "Invalid account or account/partition combination specified", "account = 'x'", JOB),
            (1, "Invalid qos specification", "", SITE),
            (1, "Invalid feature specification", "constraint = 'x'", JOB),
            (1, "Requested node configuration is not available", "mem = '9T'", JOB),
            (1, "Requested node configuration is not available", "", SITE),
            (1, "Requested time limit is invalid (missing or exceeds some limit)", "time = 9", JOB),
            (1, "User's group not permitted to use this partition", "", SITE),
            (1, "Unspecified error", "", SITE),
            (1, "Unable to contact slurm controller (connect failure)", "", ErrorKind::Transient),
            (1, "Unable to contact slurm controller (send failure)", "", ErrorKind::Ambiguous),
            (1, "Socket timed out on send/recv operation", "", ErrorKind::Ambiguous),
            (1, "Zero Bytes were transmitted or received", "", ErrorKind::Ambiguous),
            (1, "Protocol authentication error", "", ErrorKind::Ambiguous),
            (1, "Message receive failure", "", ErrorKind::Ambiguous),
        ] {
            let error = of(code, &format!("{failed}{words}\n"), asked);
            assert_eq!(error.kind(), kind, "{words}");
        }
        for (code, stderr, asked, kind) in [
            (255, "sbatch: error: Invalid --time specification", "time = 9", JOB),
            (255, "sbatch: unrecognized option '--foo'", "", SITE),
            (1, "sbatch: error: Unknown words", "", ErrorKind::Ambiguous),
            (1, "", "", ErrorKind::Ambiguous),
            (1, "slurm_load: fatal: Could not establish a configuration source", "", SITE),
        ] {
            assert_eq!(of(code, stderr, asked).kind(), kind, "{stderr}");
        }
    }

    #[test]
    fn a_failed_connection_after_a_doubtful_attempt_stays_doubtful() {
        let error = of(
            1,
            "sbatch: error: Socket timed out on send/recv operation\nsbatch: error: Batch job \
             submission failed: Unable to contact slurm controller (connect failure)\n",
            "",
        );
        assert_eq!(error.kind(), ErrorKind::Ambiguous);
    }

    #[test]
    fn a_full_site_is_left_alone_for_a_while() {
        let policy =
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)";
        for brake in ["AssocMaxSubmitJobLimit", "QOSMaxSubmitJobPerUserLimit"] {
            let error = of(1, &format!("sbatch: error: {brake}\nsbatch: error: {policy}\n"), "");
            assert_eq!(error.kind(), ErrorKind::Transient);
            assert_eq!(error.retry_after(), Some(FULL));
        }
        let error = of(1, &format!("sbatch: error: {policy}\n"), "time = 99");
        assert_eq!(error.kind(), JOB);
        let error = of(
            1,
            "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n\
             sbatch: error: Batch job submission failed: Resource temporarily unavailable\n",
            "",
        );
        assert_eq!((error.kind(), error.retry_after()), (ErrorKind::Transient, Some(FULL)));
    }
}
