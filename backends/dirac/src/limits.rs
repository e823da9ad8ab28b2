//! What an installation's configuration says of jobs like ours: what it would refuse without a reason,
//! and what it would change without a word.
//!
//! Sites are not in it: a job for a site that is none is taken, and waits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use bridge_backend::{Remedy, Result};
use reqwest::Method;
use reqwest::header::IF_NONE_MATCH;
use serde::Deserialize;

use crate::config::Config;
use crate::dirac::Dirac;
use crate::failure::{nonsense, refused, remedied, site, transient};

/// What was found in the configuration of this name, which the server gives to each of its versions.
pub(crate) type Judged = Mutex<Option<(String, std::result::Result<(), String>)>>;

/// `/api/config/`, as far as it is about us.
#[derive(Deserialize)]
struct Whole {
    #[serde(rename = "Operations")]
    operations: BTreeMap<String, Operations>,
    #[serde(rename = "Resources", default)]
    resources: Resources,
}

#[derive(Deserialize)]
struct Operations {
    #[serde(rename = "JobDescription")]
    jobs: Option<Jobs>,
}

#[derive(Deserialize)]
struct Jobs {
    #[serde(rename = "MinCPUTime")]
    least_cpu: Option<u64>,
    #[serde(rename = "MaxCPUTime")]
    most_cpu: Option<u64>,
    #[serde(rename = "MaxPriority")]
    most_priority: Option<u64>,
    #[serde(rename = "AllowedJobTypes")]
    types: Option<BTreeSet<String>>,
}

#[derive(Default, Deserialize)]
struct Resources {
    #[serde(rename = "Computing", default)]
    computing: Computing,
}

#[derive(Default, Deserialize)]
struct Computing {
    #[serde(rename = "OSCompatibility", default)]
    platforms: BTreeMap<String, BTreeSet<String>>,
}

impl Dirac {
    /// Compares the settings with the limits of a VO.
    pub(crate) async fn check_limits(&self, vo: &str) -> Result<()> {
        let context = "read the limits for jobs";
        let known = self.judged();
        let answer = self
            .ask("its configuration", || {
                let ask = self.client.ask(Method::GET, "api/config/");
                match &known {
                    Some((name, _)) => ask.header(IF_NONE_MATCH, name),
                    None => ask,
                }
            })
            .await
            .map_err(|error| {
                let remedy = error.remedy();
                remedied(transient(context).with_source(error), remedy)
            })?;
        let judged = match (answer.status, known) {
            (304, Some((_, judged))) => judged,
            (200..=299, _) => {
                let whole: Whole = answer.json().map_err(nonsense(context))?;
                let judged = judge(&whole, vo, &self.config);
                if let Some(name) = &answer.etag {
                    self.remember((name.clone(), judged.clone()));
                }
                judged
            }
            _ => return Err(refused(context, &answer)),
        };
        judged.map_err(|why| {
            site("use the backend's settings").with_source(why).with_remedy(Remedy::Other)
        })
    }
}

/// Says what would be refused, and warns of what would be changed.
fn judge(whole: &Whole, vo: &str, config: &Config) -> std::result::Result<(), String> {
    let platforms = &whole.resources.computing.platforms;
    let known = |name: &String| {
        platforms.contains_key(name) || platforms.values().any(|names| names.contains(name))
    };
    // Installations may compare them in a way of their own, so this is no more than a hint.
    for name in config.wishes.platform.iter().filter(|name| !platforms.is_empty() && !known(name)) {
        tracing::warn!(platform = name, "this DiracX has no platform of this name");
    }
    let Some(jobs) = whole.operations.get(vo).and_then(|of_vo| of_vo.jobs.as_ref()) else {
        return Ok(());
    };
    if let Some(types) = &jobs.types
        && !types.contains(&config.job_type)
    {
        let all: Vec<&str> = types.iter().map(String::as_str).collect();
        let (got, all) = (&config.job_type, all.join(", "));
        return Err(format!(
            "`job_type`: this DiracX does not take {got:?} from {vo}; it takes: {all}"
        ));
    }
    for (key, value, least, most) in [
        ("cpu_time", config.wishes.cpu_time, jobs.least_cpu, jobs.most_cpu),
        ("priority", config.wishes.priority, None, jobs.most_priority),
    ] {
        let Some(value) = value else { continue };
        let taken = value.max(least.unwrap_or(0)).min(most.unwrap_or(u64::MAX));
        if taken != value {
            tracing::warn!(key, value, taken, "this DiracX takes another value than the setting's");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_refused_is_said_by_its_name() {
        let whole: Whole = serde_json::from_str(
            "{\"DIRAC\":{},\"Operations\":{\"v\":{\"X\":null,\"JobDescription\":{\"MinCPUTime\":100,
              \"MaxCPUTime\":500000,\"MaxPriority\":10,\"AllowedJobTypes\":[\"User\",\"Test\"]}},
              \"w\":{}},\"Resources\":{\"Computing\":{\"OSCompatibility\":{\"el9\":[\"el9\",\"el8\"]}}}}",
        )
        .unwrap();
        let of = |vo: &str, more: &str| {
            let text = format!("url = 'http://x'\ntoken_file = '/t'\n{more}");
            judge(&whole, vo, &Config::read(text.parse().unwrap()).unwrap())
        };
        of("v", "platform = ['el8', 'el9']").unwrap();
        of("w", "job_type = 'Odd'").unwrap();
        of("v", "cpu_time = 900000").unwrap();
        assert!(of("v", "job_type = 'Odd'").unwrap_err().contains("it takes: Test, User"));
        of("v", "platform = 'vax'").unwrap();
    }
}
