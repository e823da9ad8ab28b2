//! The description of a job that DIRAC reads.
//!
//! A fixed template with values from the configuration and checked options. Nothing of a job's script,
//! variables or names comes in here.

use std::fmt::Write as _;

use bridge_backend::SubmitToken;

use crate::config::Config;
use crate::fallback::{LOG_FILE, WORD_FILE};
use crate::options::{Wishes, harmless};

/// The program that DIRAC's wrapper starts.
pub(crate) const PROGRAM: &str = "bridge-job.sh";

/// A text that must not stand in a JDL.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} must not stand in a JDL")]
pub(crate) struct Harmful(String);

/// Writes the description of one job.
pub(crate) fn render(
    config: &Config,
    token: &SubmitToken,
    wishes: &Wishes,
    cpu_time: u64,
    sandboxes: &[String],
) -> Result<String, Harmful> {
    let mut jdl = String::new();
    let mut line = |key: &str, value: String| {
        writeln!(jdl, "{key}={value};").expect("writing to a string does not fail");
    };
    line("Executable", text(PROGRAM)?);
    line("JobName", text(token.as_str())?);
    line("JobGroup", text(&config.job_group)?);
    line("JobType", text(&config.job_type)?);
    line("StdOutput", text("std.out")?);
    line("StdError", text("std.err")?);
    line("OutputSandbox", list(&["std.out", "std.err", WORD_FILE, LOG_FILE])?);
    // The prefix of a sandbox's name has the one character that is harmless here and not elsewhere.
    let mut names = Vec::new();
    for name in sandboxes {
        let (kind, path) = name.split_once('|').ok_or_else(|| Harmful(name.clone()))?;
        names.push(format!("\"{}|{}\"", checked(kind)?, checked(path)?));
    }
    line("InputSandbox", format!("{{{}}}", names.join(",")));
    line("CPUTime", cpu_time.to_string());
    for (key, values) in [
        ("Site", &wishes.site),
        ("BannedSites", &wishes.banned_sites),
        ("Platform", &wishes.platform),
        ("Tags", &wishes.tags),
    ] {
        match values.as_slice() {
            [] => {}
            [one] if key != "Tags" => line(key, text(one)?),
            many => line(key, list(many)?),
        }
    }
    if let Some(processors) = wishes.processors {
        line("NumberOfProcessors", processors.to_string());
    }
    if let Some(priority) = wishes.priority {
        line("Priority", priority.to_string());
    }
    Ok(jdl)
}

fn checked(value: &str) -> Result<&str, Harmful> {
    if harmless(value) { Ok(value) } else { Err(Harmful(value.to_owned())) }
}

fn text(value: &str) -> Result<String, Harmful> {
    Ok(format!("\"{}\"", checked(value)?))
}

fn list(values: &[impl AsRef<str>]) -> Result<String, Harmful> {
    let texts: Result<Vec<_>, _> = values.iter().map(|value| text(value.as_ref())).collect();
    Ok(format!("{{{}}}", texts?.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_holds_the_token_and_the_wishes() {
        let table = "url = 'http://x'\ntoken_file = '/t'\ntags = ['a', 'b']\nsite = 'LCG.X.y'";
        let config = Config::read(table.parse().unwrap()).unwrap();
        let token = SubmitToken::parse("br-1").unwrap();
        let pfn = "SB:SandboxSE|/S3/b/vo/group/user/sha256:ab.tar.zst".to_owned();
        let jdl = render(&config, &token, &config.wishes, 600, &[pfn]).unwrap();
        for part in [
            "JobName=\"br-1\";",
            "Tags={\"a\",\"b\"};",
            "Site=\"LCG.X.y\";",
            "CPUTime=600;",
            "InputSandbox={\"SB:SandboxSE|/S3/b/vo/group/user/sha256:ab.tar.zst\"};",
        ] {
            assert!(jdl.contains(part), "{part} in {jdl}");
        }
        assert!(!jdl.contains(['[', ']', '%']));
    }

    #[test]
    fn a_servers_strange_answer_does_not_get_in() {
        let config = Config::read("url = 'http://x'\ntoken_file = '/t'".parse().unwrap()).unwrap();
        let token = SubmitToken::parse("br-1").unwrap();
        for pfn in ["SB:x|/a[b", "no prefix", "SB:x|/a|b", "SB:x|/a\"b"] {
            let jdl = render(&config, &token, &config.wishes, 600, &[pfn.to_owned()]);
            assert!(jdl.is_err(), "{pfn}");
        }
    }
}
