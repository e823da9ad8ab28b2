//! The environment a job starts with, and whether the kernel would pass it on.
//!
//! It travels in the supervisor's own environment, from program to program and never through a file
//! or an argument. Only the same user can read it there, and it is gone with the processes.

use std::collections::BTreeMap;

use bridge_backend::result::JOB_DIR_VAR;
use bridge_backend::{BackendError, ErrorKind, Fault, JobSpec, Result};
use rustix::process::{Resource, getrlimit};
use secrecy::ExposeSecret as _;

use crate::dir::JobDir;

/// What a job inherits from the service: how to find programs and people, and no more.
const INHERITED: [&str; 9] =
    ["HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ", "USER"];

/// For a service that was itself started without a `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The most bytes of one `NAME=value` with its NUL: the kernel's `MAX_ARG_STRLEN`, 32 pages.
const ONE: usize = 32 * 4096;

/// The least that the kernel gives environment and arguments together.
const LEAST: u64 = 128 * 1024;

/// The most it gives, whatever the limit on the stack (since Linux 4.13).
const MOST: u64 = 6 * 1024 * 1024;

/// Kept free for the arguments of the programs that the job itself starts.
const RESERVE: u64 = 64 * 1024;

/// Builds the environment, later entries winning.
///
/// A job whose environment would fit for us and for none of its own programs is refused here, in
/// words; the shell would only say "Argument list too long" for every command.
pub(crate) fn build(spec: &JobSpec, dir: &JobDir) -> Result<BTreeMap<String, String>> {
    let mut env: BTreeMap<String, String> = INHERITED
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)))
        .collect();
    env.entry("PATH".to_owned()).or_insert_with(|| DEFAULT_PATH.to_owned());
    for variable in &spec.env {
        let (name, value) = (&variable.name, variable.value.expose_secret());
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(refused(format!(
                "pass on the variable {name:?}: its name or value holds what no environment can"
            )));
        }
        env.insert(name.clone(), value.to_owned());
    }
    env.insert(JOB_DIR_VAR.to_owned(), dir.path().to_string());
    fits(&env, allowance())?;
    Ok(env)
}

/// Gives the bytes that environment and arguments may have together.
fn allowance() -> u64 {
    let stack = getrlimit(Resource::Stack).current;
    stack.map_or(MOST, |stack| (stack / 4).clamp(LEAST, MOST))
}

/// Says whether programs can be started with this environment.
fn fits(env: &BTreeMap<String, String>, allowance: u64) -> Result<()> {
    let mut total = 0;
    for (name, value) in env {
        let size = name.len() + value.len() + 2;
        if size > ONE {
            return Err(refused(format!(
                "pass on the variable {name:?}: it has {size} bytes, and a program can be given \
                 at most {ONE} in one variable; use a file variable"
            )));
        }
        // With the pointer to it.
        total += u64::try_from(size).unwrap_or(u64::MAX) + 8;
    }
    let most = allowance.saturating_sub(RESERVE);
    if total > most {
        return Err(refused(format!(
            "pass on {} variables of {total} bytes in all: a program can be given at most {most} \
             here; use file variables",
            env.len()
        )));
    }
    Ok(())
}

fn refused(context: String) -> BackendError {
    BackendError::new(ErrorKind::Rejected(Fault::Job), context)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(entries: &[(&str, usize)]) -> BTreeMap<String, String> {
        entries.iter().map(|(name, size)| ((*name).to_owned(), "x".repeat(*size))).collect()
    }

    #[test]
    fn one_variable_has_a_limit_of_its_own() {
        fits(&env(&[("A", ONE - 3)]), MOST).unwrap();
        let error = fits(&env(&[("A", ONE - 2)]), MOST).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected(Fault::Job));
        assert!(error.to_string().contains("\"A\": it has 131073 bytes"), "{error}");
    }

    #[test]
    fn all_variables_have_one_together() {
        let many: Vec<String> = (0..50).map(|n| format!("V{n:02}")).collect();
        let many: Vec<(&str, usize)> = many.iter().map(|n| (n.as_str(), 100_000)).collect();
        let error = fits(&env(&many), 2 * 1024 * 1024).unwrap_err();
        assert!(error.to_string().contains("50 variables of 5000650 bytes"), "{error}");
    }
}
