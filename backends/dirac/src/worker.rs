//! What travels with a job besides its workspace: the helper, its settings, script and variables.

use std::time::Duration;

use bridge_backend::{EnvVar, Expiry, JobSpec, Pattern, SubmitToken};
use camino::Utf8Path;
use jiff::Timestamp;
use secrecy::ExposeSecret as _;

use crate::config::Config;
use crate::jdl::PROGRAM;

/// Runs the job on the worker.
const HELPER: &str = include_str!("worker.sh");

/// Where the workspace's path stood; the helper puts the worker's there.
const PLACE: &str = "@bridge-workspace@";

/// Bytes in one piece of a log.
const LARGEST_PIECE: usize = 2 << 20;

/// Bytes in one part of what is brought home; the store takes 100 MiB.
const LARGEST_PART: usize = 90 << 20;

/// Variables that a bash called `sh` keeps read-only; assigning to one must not end the shell.
const READ_ONLY: &[&str] = &["BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"];

/// When a script ends at the latest, in seconds of the server's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ends {
    /// It is told to end, or does not begin any more.
    told: i64,
    /// It is killed. What is left of the reserve is for its way home.
    killed: i64,
}

impl Ends {
    /// Reads a job's expiry; `called` is when it was handed over, by the server's clock.
    pub(crate) fn of(expiry: Expiry, called: Timestamp) -> Self {
        let seconds = |reserve: Duration| {
            // A shell must be able to reckon with it; this is more than a century.
            let lasts = u32::try_from(expiry.within.saturating_sub(reserve).as_secs());
            called.as_second() + i64::from(lasts.unwrap_or(u32::MAX))
        };
        Self { told: seconds(expiry.reserve), killed: seconds(expiry.reserve / 2) }
    }
}

/// Quotes a text as one shell word.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Gives the files, by name, in the order of their names.
pub(crate) fn files(
    config: &Config,
    token: &SubmitToken,
    owner: &str,
    spec: &JobSpec,
    ends: Option<Ends>,
) -> Vec<(&'static str, Vec<u8>)> {
    let wall = spec.limits.wall_time.map_or(0, |limit| limit.as_secs().max(1));
    let (by, last) = ends.map_or((0, 0), |ends| (ends.told, ends.killed));
    let settings = format!(
        "url={}\nname={}\nowner={}\nwall={wall}\ntold_by={by}\nkilled_by={last}\ngrace={}\nevery={}\nlooks={}\nwaits={}\n\
         largest={LARGEST_PIECE}\npart={LARGEST_PART}\nrepository={}\n",
        quote(&config.worker_url),
        quote(token.as_str()),
        quote(owner),
        config.kill_grace.as_secs(),
        config.log_interval.as_secs(),
        config.cancel_interval.as_secs(),
        config.worker_patience.as_secs(),
        if asks_for_repository(&spec.outputs) { "yes" } else { "" },
    );
    let patterns: Vec<String> =
        spec.outputs.iter().filter_map(|pattern| case_pattern(&pattern.0)).collect();
    let mut files = Vec::new();
    if let Some(authorities) = &config.authorities {
        files.push(("bridge-job.ca", authorities.pem().as_bytes().to_vec()));
    }
    files.extend([
        ("bridge-job.conf", settings.into_bytes()),
        ("bridge-job.env", moved(&environment(&spec.env), &spec.workspace).into_bytes()),
        ("bridge-job.outputs", patterns.join("|").into_bytes()),
        ("bridge-job.script", moved(&spec.script, &spec.workspace).into_bytes()),
        (PROGRAM, HELPER.as_bytes().to_vec()),
    ]);
    files
}

/// Says whether a pattern names the workspace's repository; otherwise it does not come home.
fn asks_for_repository(outputs: &[Pattern]) -> bool {
    outputs.iter().any(|Pattern(glob)| glob.split('/').find(|part| *part != ".") == Some(".git"))
}

/// Writes the environment as shell; later entries win because they come later.
fn environment(env: &[EnvVar]) -> String {
    let mut text = String::new();
    for EnvVar { name, value } in env {
        if READ_ONLY.contains(&name.as_str()) {
            // `command` takes the deadly ending from a special built-in.
            text.push_str("command ");
        }
        text.push_str("export ");
        text.push_str(name);
        text.push('=');
        text.push_str(&quote(value.expose_secret()));
        if READ_ONLY.contains(&name.as_str()) {
            text.push_str(" 2>/dev/null || :");
        }
        text.push('\n');
    }
    text
}

/// Puts a mark in place of the workspace's path, which is another one on the worker.
///
/// What lies beside it under the same name with `.tmp` travels too. A longer name is another directory.
fn moved(text: &str, workspace: &Utf8Path) -> String {
    let path = workspace.as_str().trim_end_matches('/');
    let quoted = path.replace('\'', r"'\''");
    let text = replaced(text, path);
    if quoted == path { text } else { replaced(&text, &quoted) }
}

fn replaced(text: &str, path: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(path) {
        out.push_str(before);
        let whole = match after.chars().next() {
            None => true,
            Some('.') => {
                let tail = after.strip_prefix(".tmp");
                !after.chars().nth(1).is_some_and(in_name)
                    || tail.is_some_and(|tail| !tail.chars().next().is_some_and(in_name))
            }
            Some(c) => !in_name(c),
        };
        // The end of a longer path is another directory as well.
        let begins = !before.chars().next_back().is_some_and(|c| in_name(c) || c == '.');
        out.push_str(if whole && begins { PLACE } else { path });
        rest = after;
    }
    out.push_str(rest);
    out
}

fn in_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-')
}

/// Turns a glob into patterns of the shell's `case` that fit at least the same names.
///
/// They go into a program of the helper's as they are, so only harmless characters are left: what might
/// mean something to a shell becomes a star. The helper's names begin with `./`, and are bytes to it.
fn case_pattern(glob: &str) -> Option<String> {
    // Steps back are taken first; what leads out of the workspace is nobody's.
    let mut parts: Vec<&str> = Vec::new();
    for part in glob.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                let last = parts.pop()?;
                if last.contains("**") {
                    // Any number of directories, and one less: anything.
                    return Some("./*".to_owned());
                }
            }
            part => parts.push(part),
        }
    }
    if glob.is_empty() || glob.starts_with('/') {
        return None;
    }
    let glob = parts.join("/");
    let mut out = String::from("./");
    let star = |out: &mut String| {
        if !out.ends_with('*') {
            out.push('*');
        }
    };
    let mut chars = glob.chars().peekable();
    let mut braces = 0_usize;
    while let Some(c) = chars.next() {
        match c {
            '{' => {
                braces += 1;
                star(&mut out);
            }
            '}' if braces > 0 => braces -= 1,
            _ if braces > 0 => {}
            '*' => {
                star(&mut out);
                // `a/**/b` is also `a/b`.
                if chars.peek() == Some(&'/') && glob.contains("**") {
                    chars.next();
                }
            }
            '[' => {
                if chars.peek().is_some_and(|c| matches!(c, '!' | '^')) {
                    chars.next();
                }
                // A bracket that comes first is one of the class.
                chars.next();
                while chars.next().is_some_and(|c| c != ']') {}
                star(&mut out);
            }
            c if c.is_ascii_alphanumeric() || "._/-+=,@%:".contains(c) => out.push(c),
            // One character may be several bytes.
            _ => star(&mut out),
        }
    }
    // What lies below comes too.
    Some(match out.trim_end_matches('/') {
        "." => "./*".to_owned(),
        // A star crosses slashes.
        open if open.ends_with('*') => open.to_owned(),
        closed => format!("{closed}|{closed}/*"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_told_to_end_before_the_reserve_and_killed_in_the_middle_of_it() {
        let called = Timestamp::from_second(1_000_000).unwrap();
        let of = |within, reserve| {
            let (within, reserve) = (Duration::from_secs(within), Duration::from_secs(reserve));
            let Ends { told, killed } = Ends::of(Expiry { within, reserve }, called);
            (told - 1_000_000, killed - 1_000_000)
        };
        assert_eq!(of(3600, 60), (3540, 3570));
        assert_eq!(of(8, 1), (7, 7));
        // What makes no sense does not begin.
        assert_eq!(of(5, 60), (0, 0));
        assert_eq!(of(u64::MAX, 0).0, i64::from(u32::MAX));
    }

    #[test]
    fn the_workspaces_path_is_replaced_and_no_other() {
        let ws = Utf8Path::new("/b/br-1/p");
        for (text, expected) in [
            (
                "cd '/b/br-1/p' && ls /b/br-1/p/x",
                "cd '@bridge-workspace@' && ls @bridge-workspace@/x",
            ),
            ("A=/b/br-1/p.tmp/F", "A=@bridge-workspace@.tmp/F"),
            ("/b/br-1/p.", "@bridge-workspace@."),
            ("/b/br-1/p.tmpx /b/br-1/p2 /b/br-1/p-x", "/b/br-1/p.tmpx /b/br-1/p2 /b/br-1/p-x"),
            ("/a/b/br-1/p:/b/br-1/p", "/a/b/br-1/p:@bridge-workspace@"),
            ("/a.b/br-1/p", "/a.b/br-1/p"),
        ] {
            assert_eq!(moved(text, ws), expected, "{text}");
        }
        assert_eq!(moved("cd '/it'\\''s'", Utf8Path::new("/it's")), format!("cd '{PLACE}'"));
    }

    #[test]
    fn patterns_fit_at_least_what_the_globs_fit() {
        for (glob, expected) in [
            ("build/", Some("./build|./build/*")),
            ("**/*.xml", Some("./*.xml|./*.xml/*")),
            ("a/**/b.txt", Some("./a/*b.txt|./a/*b.txt/*")),
            ("a.{o,so}", Some("./a.*")),
            ("x[ab].o", Some("./x*.o|./x*.o/*")),
            ("x[]a]y", Some("./x*y|./x*y/*")),
            ("x[!]]y", Some("./x*y|./x*y/*")),
            ("x y;$(id)", Some("./x*y*id*")),
            ("ä?.txt", Some("./*.txt|./*.txt/*")),
            ("esac)", Some("./esac*")),
            ("a|b", Some("./a*b|./a*b/*")),
            ("./a", Some("./a|./a/*")),
            ("a//b/./c/../d", Some("./a/b/d|./a/b/d/*")),
            (".", Some("./*")),
            ("./", Some("./*")),
            ("**", Some("./*")),
            ("x/**/../y", Some("./*")),
            ("a\nb", Some("./a*b|./a*b/*")),
            ("", None),
            ("/etc/passwd", None),
            ("../a", None),
            ("a/../../b", None),
        ] {
            assert_eq!(case_pattern(glob).as_deref(), expected, "{glob}");
        }
    }

    #[test]
    fn patterns_hold_nothing_that_means_something_to_a_shell() {
        for glob in ["`id`", "$(id)", "a;b", "a)b", "'", "\"", "\\*", "a&b", "#x", "~", "!x", "<x>"]
        {
            let pattern = case_pattern(glob).unwrap();
            let harmless = |c: char| c.is_ascii_alphanumeric() || "._/-+=,@%:*|".contains(c);
            assert!(pattern.chars().all(harmless), "{glob}: {pattern}");
        }
    }
}
