//! The backend itself: which questions are asked, and what their answers mean.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bridge_backend::{
    Backend, BackendError, Capabilities, ErrorKind, ExternalId, Fault, Filesystem, JobRef, JobSpec,
    LogChunk, Login, Lookup, Observation, OpenError, Remedy, Result, SubmitToken,
};
use camino::{Utf8Path, Utf8PathBuf};
use reqwest::{Method, RequestBuilder};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::Semaphore;

use crate::client::{Answer, Client};
use crate::config::Config;
use crate::failure::{AskError, nonsense, refused, remedied, site, transient, unasked, unreached};
use crate::fallback::{self, Words};
use crate::known;
use crate::limits::Judged;
use crate::outbox::{AT_ONCE, Outbox};
use crate::pieces::{Kind, Shelf};
use crate::sandbox::{Fetched, Uploads};
use crate::token::{self, Tokens};
use crate::unpack::unpack;

/// Jobs in one search; the server gives 10000 rows at once.
const POLL_BATCH: usize = 2_000;

/// Named like the JDL's attributes, which DIRAC's users know, or like the keys of the table.
const JOB_VARIABLES: &[(&str, &str)] = &[
    ("DIRAC_BANNEDSITES", "banned_sites"),
    ("DIRAC_BANNED_SITES", "banned_sites"),
    ("DIRAC_CPUTIME", "cpu_time"),
    ("DIRAC_NUMBEROFPROCESSORS", "processors"),
    ("DIRAC_PLATFORM", "platform"),
    ("DIRAC_PRIORITY", "priority"),
    ("DIRAC_PROCESSORS", "processors"),
    ("DIRAC_SITE", "site"),
    ("DIRAC_TAGS", "tags"),
];

/// Submissions under way: as many as fill one request while another is under way.
const IN_LINE: NonZeroUsize = match NonZeroUsize::new(2 * AT_ONCE) {
    Some(count) => count,
    None => NonZeroUsize::MIN,
};

/// Names in one search.
const FIND_AT_ONCE: usize = 500;

/// A part of what is brought home is no larger than a sandbox.
const LARGEST_SANDBOX: u64 = 101 << 20;

/// Runs jobs on a grid through DiracX.
#[derive(Debug)]
pub struct Dirac {
    pub(crate) config: Config,
    pub(crate) client: Arc<Client>,
    pub(crate) tokens: Tokens,
    pub(crate) shelf: Shelf,
    /// Names that were looked for in vain. Whoever submits one of them may be the second to do so.
    missed: Mutex<HashSet<SubmitToken>>,
    pub(crate) outbox: Outbox,
    /// Submissions that pack and send files.
    pub(crate) room: Semaphore,
    pub(crate) uploads: Uploads,
    capabilities: Capabilities,
    judged: Judged,
}

/// What a server says of itself.
#[derive(Deserialize)]
struct Itself {
    issuer: String,
}

impl Dirac {
    /// Opens the backend from its configuration table.
    ///
    /// # Errors
    ///
    /// When a key is unknown, missing or has a value that cannot be used.
    pub fn open(table: toml::Table) -> std::result::Result<Self, OpenError> {
        let config = Config::read(table)?;
        let client = Client::new(&config).map_err(|error| {
            let mut text = format!("no connections can be made: {error}");
            if let Some(cause) = std::error::Error::source(&error) {
                text = format!("{text}: {cause}");
            }
            OpenError::Config(text)
        })?;
        let client = Arc::new(client);
        let capabilities = Capabilities {
            filesystem: Filesystem::Sandbox,
            lookup: Lookup::ByToken { settle: config.settle },
            live_log: true,
            collect: true,
            poll_batch: NonZeroUsize::new(POLL_BATCH).unwrap_or(NonZeroUsize::MIN),
            // Most of it is the way there and back, and a search is a small thing.
            poll_rest: 10,
            max_concurrency: config.max_concurrency.max(IN_LINE),
            job_variables: JOB_VARIABLES,
        };
        let tokens = Tokens::new(&config, Arc::clone(&client));
        let room = Semaphore::new(config.max_concurrency.get());
        Ok(Self {
            config,
            client,
            tokens,
            shelf: Shelf::default(),
            missed: Mutex::default(),
            outbox: Outbox::default(),
            room,
            uploads: Uploads::default(),
            capabilities,
            judged: Judged::default(),
        })
    }

    pub(crate) fn judged(&self) -> Option<(String, std::result::Result<(), String>)> {
        self.judged.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn remember(&self, judged: (String, std::result::Result<(), String>)) {
        *self.judged.lock().unwrap_or_else(PoisonError::into_inner) = Some(judged);
    }

    /// Asks DiracX; a token that is not taken is renewed, and the question asked once more.
    pub(crate) async fn ask(
        &self,
        what: &'static str,
        make: impl Fn() -> RequestBuilder + Send + Sync,
    ) -> std::result::Result<Answer, AskError> {
        let token = self.tokens.token().await?;
        let answer = self.client.send_as(what, make(), &token.access).await?;
        if answer.status != 401 {
            return Ok(answer);
        }
        let token = self.tokens.other_than(&token).await?;
        Ok(self.client.send_as(what, make(), &token.access).await?)
    }

    fn missed(&self) -> MutexGuard<'_, HashSet<SubmitToken>> {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn check_server(&self) -> Result<Itself> {
        let context = "use the DiracX server";
        let request = self.client.ask(Method::GET, ".well-known/openid-configuration");
        let answer = self.client.send("who it is", request, self.config.request_timeout).await;
        let answer = answer.map_err(unreached)?;
        match answer.status {
            200..=299 => {}
            404 | 300..=399 => {
                return Err(site("use the DiracX server: there is none under this `url`")
                    .with_source(answer.said()));
            }
            _ => return Err(refused(context, &answer)),
        }
        answer.json().map_err(nonsense("use the DiracX server: this `url` is something else"))
    }

    async fn check_login(&self, server: &Itself) -> Result<()> {
        let context = "log in to DIRAC";
        let read = |error: AskError| {
            let remedy = error.remedy();
            let kind = if remedy.is_some() { site(context) } else { transient(context) };
            remedied(kind.with_source(error), remedy)
        };
        // Even where the last token is still good, so that a broken file is known before it is missed.
        self.tokens.look().await.map_err(|error| read(error.into()))?;
        let token = self.tokens.token().await.map_err(|error| read(error.into()))?;
        let issuer = token.claims.iss.trim_end_matches('/');
        if issuer != server.issuer.trim_end_matches('/') {
            let text = format!("the token is of {issuer}, the server is {}", server.issuer);
            let error = site("use the token: it is for another server").with_source(text);
            return Err(error.with_remedy(Remedy::Login));
        }
        let may = &token.claims.dirac_properties;
        if !may.iter().any(|property| property == "NormalUser") {
            let context = "run jobs with this token: its group may not (it lacks NormalUser)";
            let error = site(context).with_remedy(Remedy::Other);
            return Err(error.with_source(format!("it is of {}", token::who(&token.claims))));
        }
        let answer = self
            .ask("who we are", || self.client.ask(Method::GET, "api/auth/userinfo"))
            .await
            .map_err(read)?;
        match answer.status {
            200..=299 => self.check_limits(&token.claims.vo).await,
            401 | 403 => Err(site(context).with_source(answer.said()).with_remedy(Remedy::Login)),
            _ => Err(refused(context, &answer)),
        }
    }

    /// Brings the parts home, in order, and unpacks what they are parts of.
    async fn bring_home(&self, id: u64, job: &JobRef, into: &Utf8Path) -> Result<()> {
        let context = "bring the job's outputs home";
        // What was said before the end does not count.
        if self.hear(id, job, std::time::Duration::ZERO).await?.outs == Some(0) {
            return Ok(());
        }
        let known = self.shelf.of(id);
        let mut known = known.lock().await;
        known.coming = false;
        let not_yet = || transient("bring the job's outputs home: a part is not in the store yet");
        if !known.complete {
            let Some(list) = self.handed_in(id).await? else { return Err(lost(context)) };
            known.renew(list);
        }
        // The mark of the end is near the end of the list, before what DIRAC's wrapper adds.
        let mut outs = None;
        for at in (0..known.slots.len()).rev() {
            self.learn(id, &mut known, at).await?;
            if let Some(Kind::End { outs: count, .. }) =
                known.slots.get(at).and_then(|s| s.kind.as_ref())
            {
                outs = Some((*count, at));
                break;
            }
        }
        let (count, end) = match outs {
            Some(known) => known,
            // Its end may have come by DIRAC's own means, with the parts handed in before.
            None if known.coming => return Err(not_yet()),
            None => {
                let count = match self.last_words(id).await? {
                    Words::Coming => return Err(not_yet()),
                    Words::Said(words) => fallback::outs(&words),
                    Words::None => None,
                };
                let context = "bring the job's outputs home: it did not hand in its end";
                (count.ok_or_else(|| lost(context))?, known.slots.len())
            }
        };
        let mut parts: BTreeMap<u64, String> = BTreeMap::new();
        for at in (0..end).rev() {
            if u64::try_from(parts.len()).unwrap_or(u64::MAX) >= count {
                break;
            }
            self.learn(id, &mut known, at).await?;
            if let Some(slot) = known.slots.get(at)
                && let Some(Kind::Out { number }) = slot.kind
            {
                parts.insert(number, slot.pfn.clone());
            }
        }
        if !(0..count).eq(parts.keys().copied()) {
            if known.coming {
                return Err(not_yet());
            }
            return Err(lost("bring the job's outputs home: a part is missing"));
        }
        drop(known);
        let mut files = Vec::new();
        for pfn in parts.into_values() {
            let open = match self.open_sandbox(id, &pfn).await? {
                Fetched::Open(open) => open,
                Fetched::Coming => return Err(not_yet()),
                Fetched::Gone => {
                    return Err(lost("bring the job's outputs home: a part is missing"));
                }
            };
            let file =
                tempfile::tempfile().map_err(|error| transient(context).with_source(error))?;
            let kept = file.try_clone().map_err(|error| transient(context).with_source(error))?;
            open.save(file, LARGEST_SANDBOX).await?;
            files.push(kept);
        }
        if files.is_empty() {
            return Ok(());
        }
        let (into, most) = (into.to_owned(), self.config.max_workspace);
        let unpacked = tokio::task::spawn_blocking(move || unpack(files, &into, most)).await;
        let unpacked = unpacked.map_err(|error| transient(context).with_source(error))?;
        unpacked.map_err(|error| {
            if error.kind() == io::ErrorKind::FileTooLarge {
                return BackendError::new(
                    ErrorKind::Rejected(Fault::Job),
                    format!("{context}: they are larger than {most} bytes (`max_workspace`)"),
                );
            }
            if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) {
                return lost("bring the job's outputs home: they are damaged").with_source(error);
            }
            transient(context).with_source(error)
        })
    }
}

/// Gives DIRAC's number of a job.
pub(crate) fn number(id: &ExternalId) -> Option<u64> {
    id.0.parse().ok().filter(|id| *id > 0)
}

pub(crate) fn lost(context: &'static str) -> BackendError {
    BackendError::new(ErrorKind::Lost, context)
}

#[async_trait]
impl Backend for Dirac {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn check(&self) -> Result<()> {
        let server = self.check_server().await?;
        known::compare(&known::ask(&self.client, &self.config).await?, &self.config)?;
        self.check_login(&server).await
    }

    async fn submit(&self, token: &SubmitToken, spec: &JobSpec) -> Result<ExternalId> {
        // Boxed: a submission's state is large, and few run at a time.
        let id = Box::pin(self.submit_one(token, spec)).await?;
        if !self.missed().remove(token) {
            return Ok(id);
        }
        // A server that was frozen may have taken up the first question after all, and only then. From
        // here on no older job can appear, and the older one runs: it is the one to follow.
        let found = self.find(std::slice::from_ref(token)).await.map_err(|error| {
            let context = "make sure that the job was submitted only once";
            BackendError::new(ErrorKind::Ambiguous, context).with_source(error)
        })?;
        Ok(found.into_values().next().unwrap_or(id))
    }

    async fn find(&self, tokens: &[SubmitToken]) -> Result<BTreeMap<SubmitToken, ExternalId>> {
        let mut found = BTreeMap::new();
        for some in tokens.chunks(FIND_AT_ONCE) {
            let login = self.tokens.token().await;
            let login = login.map_err(|error| unasked("search for jobs")(error.into()))?;
            let names: Vec<&str> = some.iter().map(SubmitToken::as_str).collect();
            let conditions = [
                json!({"parameter": "JobName", "operator": "in", "values": names}),
                json!({"parameter": "Owner", "operator": "eq", "value": login.claims.preferred_username}),
                json!({"parameter": "VO", "operator": "eq", "value": login.claims.vo}),
            ];
            // In the order of their ids: of two with one name the older one runs, see the helper.
            for row in self.search(&conditions, &["JobID", "JobName"]).await? {
                let token = row.name.as_deref().and_then(|name| SubmitToken::parse(name).ok());
                if let Some(token) = token.filter(|token| some.contains(token)) {
                    found.entry(token).or_insert_with(|| ExternalId(row.id.to_string()));
                }
            }
        }
        let missed = tokens.iter().filter(|token| !found.contains_key(token)).cloned();
        self.missed().extend(missed);
        Ok(found)
    }

    async fn poll(&self, jobs: &[JobRef]) -> Result<BTreeMap<ExternalId, Observation>> {
        Box::pin(self.observe(jobs)).await
    }

    async fn read_log(&self, job: &JobRef, from: u64, limit: usize) -> Result<LogChunk> {
        let Some(id) = number(&job.id) else { return Err(lost("read the log")) };
        Box::pin(self.log(id, job, from, limit)).await
    }

    async fn collect(&self, job: &JobRef, into: &Utf8Path) -> Result<()> {
        let into: Utf8PathBuf = into.to_owned();
        let Some(id) = number(&job.id) else {
            return Err(lost("bring the job's outputs home"));
        };
        Box::pin(self.bring_home(id, job, &into)).await
    }

    async fn cancel(&self, jobs: &[JobRef]) -> Result<()> {
        Box::pin(self.kill(jobs)).await
    }

    async fn release(&self, job: &JobRef) -> Result<()> {
        let Some(id) = number(&job.id) else { return Ok(()) };
        // A sandbox of a job of another name is not ours to give up.
        let ours = self.shelf.is_ours(id, &job.token) || {
            let rows = self.jobs_of_ids(&[id], &["JobID", "JobName"]).await?;
            rows.iter().any(|row| row.name.as_deref() == Some(job.token.as_str()))
        };
        if ours {
            self.unlink(id).await?;
        }
        self.shelf.forget(id);
        Ok(())
    }
    fn has_login(&self) -> bool {
        true
    }

    fn login(&self) -> Option<Login> {
        self.tokens.login()
    }
}

#[cfg(test)]
mod tests {
    use super::JOB_VARIABLES;

    #[test]
    fn the_readme_names_all_variables_of_jobs_and_no_others() {
        let readme = include_str!("../../../README.md");
        let rows = readme.lines().filter(|line| line.starts_with("| `BRIDGE_"));
        let mut told: Vec<(String, String)> = Vec::new();
        for row in rows.filter(|row| row.contains("`DIRAC_")) {
            let mut words = row.split('`').skip(1).step_by(2);
            let key = words.next().unwrap().strip_prefix("BRIDGE_").unwrap().to_lowercase();
            let theirs = words.filter(|word| word.starts_with("DIRAC_"));
            told.extend(theirs.map(|name| (name.to_owned(), key.clone())));
        }
        told.sort_unstable();
        let known = JOB_VARIABLES.iter().map(|(name, key)| ((*name).to_owned(), (*key).to_owned()));
        assert_eq!(told, known.collect::<Vec<_>>());
    }
}
