//! Flags of the author's that git would take, and we do not.
//!
//! What git runs here, it runs on the submit node with the service account's rights: a flag may decide
//! how much is fetched, not what is run, nor what else of this machine is read.

use super::{Stage, StageError};
use crate::job::Plan;
use crate::job::settings::{Settings, SubmoduleStrategy, shown};

/// Long options that are refused, by every beginning that git would take for them.
struct Refused(&'static [&'static str]);

/// Submodules have a variable of their own, and are made safe before git goes near them.
const OF_FETCH: Refused =
    Refused(&["--upload-pack", "--recurse-submodules", "--recurse-submodules-default"]);

const OF_UPDATE: Refused = Refused(&["--reference", "--reference-if-able"]);

/// Of clone's flags there are too many that run, read or write elsewhere; these do not.
const OF_CLONE: [&str; 21] = [
    "--single-branch",
    "--no-single-branch",
    "--tags",
    "--no-tags",
    "--filter",
    "--depth",
    "--shallow-since",
    "--shallow-exclude",
    "--reject-shallow",
    "--no-reject-shallow",
    "--server-option",
    "--quiet",
    "-q",
    "--verbose",
    "-v",
    "--progress",
    "--no-progress",
    "--ipv4",
    "-4",
    "--ipv6",
    "-6",
];

impl Refused {
    fn refuses(&self, flag: &str) -> bool {
        let name = flag.split_once('=').map_or(flag, |(name, _)| name);
        // Git takes any unambiguous beginning of a long option.
        name.len() > 3 && self.0.iter().any(|long| long.starts_with(name))
    }
}

impl Plan {
    /// Refuses what the author may not ask for, before anything is done.
    pub(super) fn check_flags(&self) -> Stage {
        check(&self.settings)
    }
}

fn check(settings: &Settings) -> Stage {
    let refuse = |detail: String| Err(StageError::Misconfigured { detail });
    let found = |refused: &Refused, flags: &[String]| {
        flags.iter().find(|flag| refused.refuses(flag)).cloned()
    };
    if let Some(flag) = found(&OF_FETCH, &settings.git_fetch_flags) {
        return refuse(format!("GIT_FETCH_EXTRA_FLAGS: {flag:?} is not allowed"));
    }
    let clone = settings.git_clone_flags.iter();
    let mut unknown = clone.filter(|flag| {
        let name = flag.split_once('=').map_or(flag.as_str(), |(name, _)| name);
        !OF_CLONE.contains(&name)
    });
    if settings.flag("FF_USE_GIT_NATIVE_CLONE")
        && let Some(flag) = unknown.next()
    {
        return refuse(format!("GIT_CLONE_EXTRA_FLAGS: {flag:?} is not allowed"));
    }
    match &settings.git_submodule_strategy {
        SubmoduleStrategy::None => return Ok(()),
        SubmoduleStrategy::Unknown(raw) => {
            return refuse(format!(
                "unknown GIT_SUBMODULE_STRATEGY: expected none, normal or recursive, got {}",
                shown(raw)
            ));
        }
        SubmoduleStrategy::Normal | SubmoduleStrategy::Recursive => {}
    }
    if let Some(flag) = found(&OF_UPDATE, &settings.git_submodule_update_flags) {
        return refuse(format!("GIT_SUBMODULE_UPDATE_FLAGS: {flag:?} is not allowed"));
    }
    if settings.git_submodule_paths.iter().any(|path| path == ":(exclude)") {
        return refuse(format!(
            "GIT_SUBMODULE_PATHS: \":(exclude)\" needs a path right behind it: {:?}",
            settings.git_submodule_paths.join(" ")
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_beginning_of_a_refused_option_is_refused() {
        for flag in
            ["--upload-pack=touch", "--upload-p=x", "--upl", "--recurse-submodules", "--recu"]
        {
            assert!(OF_FETCH.refuses(flag), "{flag}");
        }
        for flag in
            ["--prune", "--quiet", "-j4", "--no-tags", "--filter=blob:none", "--update-shallow"]
        {
            assert!(!OF_FETCH.refuses(flag), "{flag}");
        }
        for flag in ["--reference", "--reference=/x", "--refer", "--reference-if-able=x"] {
            assert!(OF_UPDATE.refuses(flag), "{flag}");
        }
        for flag in ["--remote", "--jobs", "--recommend-shallow", "--rebase"] {
            assert!(!OF_UPDATE.refuses(flag), "{flag}");
        }
    }
}
