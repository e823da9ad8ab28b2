//! What a DiracX says of itself without being told who asks: that it is one, its VOs, their groups.

use std::collections::BTreeMap;

use bridge_backend::{BackendError, ErrorKind};
use reqwest::Method;
use serde::Deserialize;

use crate::client::Client;
use crate::config::Config;
use crate::failure::{nonsense, refused, site, unreached};

/// `/.well-known/dirac-metadata`.
#[derive(Debug, Deserialize)]
pub(crate) struct Known {
    virtual_organizations: BTreeMap<String, Vo>,
}

#[derive(Debug, Deserialize)]
struct Vo {
    groups: BTreeMap<String, serde::de::IgnoredAny>,
    default_group: Option<String>,
}

/// Asks a server what it knows.
pub(crate) async fn ask(client: &Client, config: &Config) -> Result<Known, BackendError> {
    let request = client.ask(Method::GET, ".well-known/dirac-metadata");
    let answer = client.send("which VOs it knows", request, config.request_timeout).await;
    let answer = answer.map_err(unreached)?;
    match answer.status {
        200..=299 => {}
        404 | 300..=399 => {
            let context = "use the DiracX server: there is none under this `url`";
            return Err(site(context).with_source(answer.said()));
        }
        _ => return Err(refused("use the DiracX server", &answer)),
    }
    let context = "use the DiracX server: this `url` is something else";
    answer.json().map_err(nonsense(context))
}

impl Known {
    /// Gives the VO to log in for: the one that is wanted, or the only one.
    pub(crate) fn vo(&self, wanted: Option<&str>) -> Result<String, String> {
        if let Some(wanted) = wanted {
            return self.of(wanted).map(|_| wanted.to_owned());
        }
        let mut all = self.virtual_organizations.keys();
        match (all.next(), all.next()) {
            (Some(only), None) => Ok(only.clone()),
            _ => Err(format!(
                "`vo` is missing; this DiracX has: {}",
                names(&self.virtual_organizations)
            )),
        }
    }

    /// Says what is wrong with a VO or a group of it.
    pub(crate) fn check(&self, vo: &str, group: Option<&str>) -> Result<(), String> {
        let known = self.of(vo)?;
        match group {
            Some(group) if !known.groups.contains_key(group) => Err(format!(
                "`group`: the VO {vo} has no group {group:?}; it has: {}",
                names(&known.groups)
            )),
            Some(_) => Ok(()),
            None if known.default_group.is_none() => {
                Err(format!("`group` is missing; the VO {vo} has: {}", names(&known.groups)))
            }
            None => Ok(()),
        }
    }

    fn of(&self, vo: &str) -> Result<&Vo, String> {
        self.virtual_organizations.get(vo).ok_or_else(|| {
            let names = names(&self.virtual_organizations);
            format!("`vo`: this DiracX does not know the VO {vo:?}; it has: {names}")
        })
    }
}

fn names<T>(map: &BTreeMap<String, T>) -> String {
    let names: Vec<&str> = map.keys().map(String::as_str).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// Compares the settings with what a server knows.
pub(crate) fn compare(known: &Known, config: &Config) -> Result<(), BackendError> {
    let Some(vo) = &config.vo else { return Ok(()) };
    // Without a group it is the token that has one.
    let group = config.group.as_deref();
    let wrong = match group {
        Some(_) => known.check(vo, group),
        None => known.of(vo).map(drop),
    };
    wrong.map_err(|why| {
        let context = "use the backend's settings";
        BackendError::new(ErrorKind::Rejected(bridge_backend::Fault::Site), context)
            .with_remedy(bridge_backend::Remedy::Other)
            .with_source(why)
    })
}
