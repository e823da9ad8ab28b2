//! `bridge doctor`: everything that could keep jobs from running, and whose move it is.
//!
//! It changes nothing and does not need the daemon. It asks GitLab and the backends the same
//! questions the daemon asks.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use camino::{Utf8Path, Utf8PathBuf};
use clap::Args;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use tokio_util::task::TaskTracker;

use super::backends::{Checked, check_one, describe};
use super::exit::{Exit, gitlab_exit};
use super::output::Table;
use super::serve::{KEY_LOST, key_file_hint};
use super::{Context, client, runners};
use crate::config::{self, Config, Runner};
use crate::gitlab::{self, VerifyReply};
use crate::http::WhoseMove;
use crate::logins;
use crate::store::{self, Keyring, Store, Wanted};
use crate::telemetry::Chain;

/// Below this, the next few jobs with long logs fill the disk.
const LITTLE_DISK: u64 = 512 << 20;
/// Below this, somebody should look.
const SOME_DISK: u64 = 5 << 30;
/// More than this and log lines of GitLab and ours can no longer be laid side by side.
const SOME_SKEW: SignedDuration = SignedDuration::from_secs(30);
/// More than this and tokens with a date, ours and GitLab's, stop working.
const MUCH_SKEW: SignedDuration = SignedDuration::from_mins(5);
/// A token that dies sooner than this should be renewed now.
const SOON: SignedDuration = SignedDuration::from_hours(14 * 24);

/// `bridge doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Write one JSON object per line
    #[arg(long)]
    json: bool,
}

/// How one check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Ok,
    Warn,
    Fail,
}

/// One line.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    subject: String,
    result: Outcome,
    whose_move: WhoseMove,
    detail: String,
    #[serde(skip)]
    exit: Exit,
}

impl Finding {
    fn ok(check: &'static str, subject: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            check,
            subject: subject.into(),
            result: Outcome::Ok,
            whose_move: WhoseMove::Nobody,
            detail: detail.into(),
            exit: Exit::Done,
        }
    }

    fn warn(self, whose_move: WhoseMove, detail: impl Into<String>) -> Self {
        Self { result: Outcome::Warn, whose_move, detail: detail.into(), ..self }
    }

    fn fail(self, exit: Exit, whose_move: WhoseMove, detail: impl Into<String>) -> Self {
        Self { result: Outcome::Fail, whose_move, detail: detail.into(), exit, ..self }
    }
}

impl DoctorArgs {
    /// Looks at everything; the exit code is that of the worst finding.
    ///
    /// # Errors
    ///
    /// When the findings cannot be written.
    pub async fn run(self, context: &Context) -> anyhow::Result<Exit> {
        let findings = examine(context).await;
        context.output.list(self.json, &findings, |findings| {
            let mut table = Table::new(["CHECK", "SUBJECT", "RESULT", "WHOSE MOVE", "DETAIL"]);
            for finding in findings {
                let result = match finding.result {
                    Outcome::Ok => "ok",
                    Outcome::Warn => "warn",
                    Outcome::Fail => "FAIL",
                };
                table.row([
                    finding.check.to_owned(),
                    finding.subject.clone(),
                    result.to_owned(),
                    finding.whose_move.as_str().to_owned(),
                    finding.detail.clone(),
                ]);
            }
            table
        })?;
        // The first failure is the one to mend first; those below it may be its consequences.
        let failed = findings.iter().find(|finding| finding.result == Outcome::Fail);
        Ok(failed.map_or(Exit::Done, |finding| finding.exit))
    }
}

async fn examine(context: &Context) -> Vec<Finding> {
    let path = &context.config_path;
    let mut findings = Vec::new();
    let config = match config::load_incomplete(path) {
        Ok(config) => config,
        Err(error) => {
            let hint = error.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
            let detail = format!("{}{hint}", Chain(&error));
            findings.push(Finding::ok("configuration", path.as_str(), "").fail(
                Exit::Configuration,
                WhoseMove::Operator,
                detail,
            ));
            return findings;
        }
    };
    findings.push(configuration(&config));
    findings.extend(modes(&config));
    findings.extend(state_dir(&config.state_dir));
    findings.push(key_file(&config).await);
    let mut instances = BTreeSet::new();
    for runner in &config.runners {
        if instances.insert(runner.url.clone()) {
            findings.push(clock(runner).await);
        }
        findings.push(token(context, runner).await);
    }
    for (name, entry) in &config.backends {
        let finding = Finding::ok("backend", &name.0, format!("kind {}", entry.kind));
        findings.push(match check_one(&context.registry, name, entry).await {
            Checked::Well(Some(login)) if login.ends_soon => {
                finding.warn(WhoseMove::Operator, logins::ends_soon(name, &login))
            }
            Checked::Well(Some(login)) => {
                Finding { detail: format!("{}; {}", finding.detail, describe(&login)), ..finding }
            }
            Checked::Well(None) => finding,
            Checked::Unwell { exit, whose_move, detail } => finding.fail(exit, whose_move, detail),
        });
    }
    findings
}

fn configuration(config: &Config) -> Finding {
    let (runners, backends) = (config.runners.len(), config.backends.len());
    let detail = format!("{runners} runners, {backends} backends");
    let finding = Finding::ok("configuration", config.path.as_str(), detail);
    if runners == 0 {
        let what = "no [[runners]] (add one with `bridge register`)";
        return finding.fail(Exit::Configuration, WhoseMove::Operator, what);
    }
    finding
}

/// Looks who else can change or read what only we should.
fn modes(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut look = |subject: &Utf8Path, forbidden: u32, right: &str, cure: &str| {
        let finding = Finding::ok("file modes", subject.as_str(), "");
        match fs::metadata(subject) {
            Ok(meta) => {
                let mode = meta.permissions().mode() & 0o7777;
                let mine = [0, rustix::process::geteuid().as_raw()].contains(&meta.uid());
                findings.push(if mode & forbidden & !sticky(mode) != 0 {
                    let detail =
                        format!("others can {right} it (mode {mode:04o}); run {cure} {subject}");
                    finding.fail(Exit::Configuration, WhoseMove::Operator, detail)
                } else if mine {
                    Finding { detail: format!("mode {mode:04o}"), ..finding }
                } else {
                    let detail = format!("belongs to user {}, neither root nor us", meta.uid());
                    finding.warn(WhoseMove::Operator, detail)
                });
            }
            // The state directory is made at the first start.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => findings.push(finding.fail(
                Exit::Configuration,
                WhoseMove::Operator,
                error.to_string(),
            )),
        }
    };
    // Whoever can write here can have any program run as us.
    look(&config.path, 0o022, "write", "chmod go-w");
    look(config.dir(), 0o022, "write", "chmod go-w");
    let token_files: BTreeSet<&Utf8PathBuf> =
        config.runners.iter().filter_map(|runner| runner.token_file.as_ref()).collect();
    for path in token_files {
        look(path, 0o077, "read", "chmod 600");
    }
    look(&config.state_dir, 0o077, "enter", "chmod 700");
    findings
}

/// In a sticky directory (`/tmp`) others can write, but not replace what is ours.
fn sticky(mode: u32) -> u32 {
    if mode & 0o1000 != 0 { 0o022 } else { 0 }
}

fn state_dir(dir: &Utf8Path) -> Vec<Finding> {
    // Before the first start it is the nearest directory above that tells.
    let there = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Utf8Path::new("/"));
    let finding = Finding::ok("file system", dir.as_str(), "");
    let disk = Finding::ok("free disk", dir.as_str(), "");
    let failed = |finding: Finding, error: io::Error| {
        let detail = format!("{there}: {error}");
        finding.fail(Exit::Configuration, WhoseMove::Operator, detail)
    };
    let kind = match store::network_file_system_of(there) {
        Ok(network) => file_system(finding, network),
        Err(error) => failed(finding, error),
    };
    let free = match rustix::fs::statvfs(there.as_std_path()) {
        Ok(stat) => free_disk(disk, stat.f_bavail.saturating_mul(stat.f_frsize)),
        Err(error) => failed(disk, error.into()),
    };
    vec![kind, free]
}

/// Looks at the keys, and whether they are those that the rows want.
async fn key_file(config: &Config) -> Finding {
    let finding = Finding::ok("key file", config.key_file.as_str(), "");
    let failed = |finding: Finding, detail: String, hint: Option<&str>| {
        let hint = hint.map(|hint| format!("; {hint}")).unwrap_or_default();
        finding.fail(Exit::Configuration, WhoseMove::Operator, format!("{detail}{hint}"))
    };
    let ring = match Keyring::read(&config.key_file) {
        Ok(ring) => ring,
        Err(error) => {
            return failed(finding, Chain(&error).to_string(), key_file_hint(&error));
        }
    };
    let wanted = match Store::attach(&config.state_dir, &TaskTracker::new()).await {
        Ok(store) => store.wanted_keys().await.unwrap_or_default(),
        // Before the first start, or another check says what is wrong with it.
        Err(_unusable) => Wanted::default(),
    };
    let lost = wanted.lost_without(&ring);
    if lost > 0 {
        let what = if ring.is_empty() { "is not there" } else { "holds another key" };
        let detail = format!("it {what}, and what is stored of {lost} jobs was sealed with it");
        return failed(finding, detail, Some(KEY_LOST));
    }
    if config.key_file.starts_with(&config.state_dir) {
        let detail = "it is within state_dir: whoever copies that has the key too; set key_file";
        return finding.warn(WhoseMove::Operator, detail);
    }
    match ring.ids().as_slice() {
        [] => Finding { detail: "made at the first start".to_owned(), ..finding },
        [id] => Finding { detail: format!("key {id}"), ..finding },
        [_, ..] => {
            let detail = "an exchange of keys was cut short; finish it with `bridge db rekey`";
            finding.warn(WhoseMove::Operator, detail)
        }
    }
}

fn file_system(finding: Finding, network: Option<&str>) -> Finding {
    match network {
        Some(name) => {
            let detail = format!("{name}: set state_dir to a directory on a local disk");
            finding.fail(Exit::Configuration, WhoseMove::Operator, detail)
        }
        None => Finding { detail: "local".to_owned(), ..finding },
    }
}

fn free_disk(finding: Finding, bytes: u64) -> Finding {
    let detail = format!("{} MiB free", bytes >> 20);
    if bytes < LITTLE_DISK {
        finding.fail(Exit::Unexpected, WhoseMove::Operator, detail)
    } else if bytes < SOME_DISK {
        finding.warn(WhoseMove::Operator, detail)
    } else {
        Finding { detail, ..finding }
    }
}

async fn clock(runner: &Runner) -> Finding {
    let url = runner.url.as_str().trim_end_matches('/');
    let finding = Finding::ok("clock", url, "");
    let client = match client(runner) {
        Ok(client) => client,
        Err(error) => return silent(finding, &error),
    };
    match client.clock_skew().await {
        Ok(Some(skew)) => judge_skew(finding, skew),
        Ok(None) => finding.warn(WhoseMove::Gitlab, "the answer bears no date"),
        Err(error) => silent(finding, &error),
    }
}

/// Says whose move it is when GitLab did not answer, or not like a GitLab.
fn silent(finding: Finding, error: &gitlab::Error) -> Finding {
    let whose_move = match error.kind() {
        gitlab::ErrorKind::Transient => WhoseMove::Gitlab,
        gitlab::ErrorKind::Refused | gitlab::ErrorKind::Configuration => WhoseMove::Operator,
    };
    finding.fail(gitlab_exit(error), whose_move, Chain(error).to_string())
}

fn judge_skew(finding: Finding, skew: SignedDuration) -> Finding {
    let way = if skew.is_negative() { "behind" } else { "ahead of" };
    let detail = format!("{} s {way} GitLab's", skew.abs().as_secs());
    if skew.abs() > MUCH_SKEW {
        finding.fail(Exit::Unexpected, WhoseMove::Operator, detail)
    } else if skew.abs() > SOME_SKEW {
        finding.warn(WhoseMove::Operator, detail)
    } else {
        Finding { detail, ..finding }
    }
}

async fn token(context: &Context, runner: &Runner) -> Finding {
    let finding = Finding::ok("token", &runner.name.0, "");
    let fail = |whose_move, detail: String| (Exit::Gitlab, whose_move, detail);
    let reply = match runners::verify(context, runner).await {
        Ok(reply) => reply,
        Err(error) => {
            let detail = Chain(error.as_ref()).to_string();
            return finding.fail(Exit::Unexpected, WhoseMove::Operator, detail);
        }
    };
    let (exit, whose_move, detail) = match reply {
        Ok(VerifyReply::Valid { id, expires_at }) => {
            return judge_expiry(finding, id, expires_at, context.clock.now());
        }
        Ok(VerifyReply::Refused) => {
            fail(WhoseMove::Operator, "GitLab does not know it; register again".to_owned())
        }
        Ok(VerifyReply::Orphaned) => {
            fail(WhoseMove::Operator, "the runner's owner is gone; create a new runner".to_owned())
        }
        Ok(VerifyReply::Unclear(unclear)) => fail(WhoseMove::Gitlab, unclear.to_string()),
        Err(error) => return silent(finding, &error),
    };
    finding.fail(exit, whose_move, detail)
}

fn judge_expiry(
    finding: Finding,
    id: Option<i64>,
    expires_at: Option<Timestamp>,
    now: Timestamp,
) -> Finding {
    let runner = id.map(|id| format!("runner #{id}")).unwrap_or_default();
    match expires_at {
        Some(time) if time.duration_since(now) < SOON => {
            let detail = format!("{runner} expires {time}; renew the token");
            finding.warn(WhoseMove::Operator, detail)
        }
        Some(time) => Finding { detail: format!("{runner} expires {time}"), ..finding },
        None => Finding { detail: runner, ..finding },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blank() -> Finding {
        Finding::ok("x", "y", "")
    }

    #[test]
    fn a_network_file_system_is_named_and_refused() {
        let finding = file_system(blank(), Some("NFS"));
        assert_eq!(finding.result, Outcome::Fail);
        assert!(finding.detail.starts_with("NFS"), "{}", finding.detail);
        assert_eq!((finding.exit, finding.whose_move), (Exit::Configuration, WhoseMove::Operator));
        assert_eq!(file_system(blank(), None).result, Outcome::Ok);
    }

    #[test]
    fn little_disk_warns_before_it_fails() {
        let of = |bytes| free_disk(blank(), bytes).result;
        assert_eq!(
            [of(LITTLE_DISK - 1), of(LITTLE_DISK), of(SOME_DISK)],
            [Outcome::Fail, Outcome::Warn, Outcome::Ok]
        );
    }

    #[test]
    fn a_clock_may_be_wrong_in_both_directions() {
        let of = |seconds| judge_skew(blank(), SignedDuration::from_secs(seconds));
        assert_eq!([of(2), of(-29)].map(|f| f.result), [Outcome::Ok, Outcome::Ok]);
        assert_eq!([of(31), of(-31)].map(|f| f.result), [Outcome::Warn, Outcome::Warn]);
        assert_eq!([of(301), of(-301)].map(|f| f.result), [Outcome::Fail, Outcome::Fail]);
        assert_eq!(of(-301).detail, "301 s behind GitLab's");
    }

    #[test]
    fn a_token_that_dies_soon_is_a_warning() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let of = |time: &str| judge_expiry(blank(), Some(7), Some(time.parse().unwrap()), now);
        assert_eq!(of("2026-01-10T00:00:00Z").result, Outcome::Warn);
        assert_eq!(of("2026-02-10T00:00:00Z").result, Outcome::Ok);
        assert_eq!(judge_expiry(blank(), Some(7), None, now).detail, "runner #7");
    }
}
