//! `bridge runners create`: a runner is made at GitLab, and its token is kept, in one go.
//!
//! GitLab shows the token once. So everything that can fail without GitLab is tried before; a note
//! (`.NAME.creating`, with a mark that the new runner bears in its maintenance note) is on the disk
//! before GitLab is asked; and the token is on the disk before anything else is done. A run that finds
//! the note of one that died finishes it: with the token if it was written, else by deleting the runner
//! that bears the mark, which nobody can use.

use std::fs;
use std::io::{self, Write as _};

use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};
use clap::Args;
use serde::Serialize;

use super::remote::{AccessArgs, load, refused};
use crate::cli::exit::{Exit, Failure};
use crate::cli::register::{Known, LocalArgs, Place, ServerArgs, shown_id, verified};
use crate::cli::{Context, client, info};
use crate::config;
use crate::gitlab::api::{Api, ApiReply, NewRunner, Refusal, RunnerFilter, Whose};
use crate::gitlab::{Credentials, Error, Secret, UnregisterReply};
use crate::telemetry::Chain;

/// So many runners are looked at for a mark; they are those that were never heard of.
const MOST_LOOKED_AT: usize = 100;

/// `runners create`.
#[derive(Clone, Debug, Args)]
#[command(group = clap::ArgGroup::new("owner").required(true))]
pub(super) struct CreateArgs {
    /// Make a runner of the whole instance, as an administrator
    #[arg(long, group = "owner")]
    instance: bool,
    /// Make a runner of this group: GitLab's number
    #[arg(long, value_name = "ID", group = "owner")]
    group: Option<i64>,
    /// Make a runner of this project: GitLab's number
    #[arg(long, value_name = "ID", group = "owner")]
    project: Option<i64>,
    /// Write one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    local: LocalArgs,
    #[command(flatten, next_help_heading = "The runner at GitLab")]
    server: ServerArgs,
    #[command(flatten)]
    access: AccessArgs,
}

/// What `runners create` made.
#[derive(Debug, Serialize)]
struct Created {
    name: String,
    id: Option<i64>,
    url: String,
    backend: String,
    token_file: String,
    token_expires_at: Option<String>,
}

impl CreateArgs {
    pub(super) async fn run(self, context: &Context) -> anyhow::Result<Exit> {
        let name = self.local.name()?;
        let config = load(context)?;
        let url = self.access.instance(config.as_ref())?;
        let api = self.access.api(&url, config.as_ref())?;
        let place = self.local.place(context, url.as_str(), &name)?;
        place.file.make_dir()?;
        let note = Note::beside(&place.token_file, &name);
        if let Some(mark) = note.read()? {
            if let Some(known) = finished(context, &place, &name).await? {
                return self.write_down(context, place, &name, &known, &note);
            }
            clear(context, &api, &mark).await?;
        }
        let mark = mark()?;
        // Written as the token will be: what keeps the one away keeps the other away.
        place.file.write_secret(&note.path, &mark)?;
        let runner = self.new_runner(&name, &mark);
        let known = match api.create(&runner).await {
            Ok(ApiReply::Done(credentials)) => known(credentials),
            Ok(ApiReply::Refused(refusal)) => {
                if matches!(refusal, Refusal::Unclear(_)) {
                    clear(context, &api, &mark).await?;
                }
                note.remove()?;
                return Err(refused(&format!("create {name:?}"), &refusal).into());
            }
            Err(error) => return Err(self.unanswered(context, &api, &note, &mark, error).await),
        };
        if let Err(error) = place.file.write_secret(&place.token_file, known.token.expose()) {
            return Err(self.unwritten(&place, &known, &note, error).await);
        }
        self.write_down(context, place, &name, &known, &note)
    }

    fn new_runner(&self, name: &str, mark: &str) -> NewRunner {
        let mut runner = self.server.new_runner(name);
        runner.runner_type = match (self.group, self.project) {
            (Some(_), _) => "group_type",
            (None, Some(_)) => "project_type",
            (None, None) => "instance_type",
        }
        .to_owned();
        (runner.group_id, runner.project_id) = (self.group, self.project);
        let words = runner.maintenance_note.trim_end();
        runner.maintenance_note =
            if words.is_empty() { marked(mark) } else { format!("{words}\n{}", marked(mark)) };
        runner
    }

    /// Adds the runner, whose token is on the disk, to the configuration.
    fn write_down(
        &self,
        context: &Context,
        place: Place,
        name: &str,
        known: &Known,
        note: &Note,
    ) -> anyhow::Result<Exit> {
        let Place { mut file, backend, token_file, probe } = place;
        file.add_runner(self.local.table(&probe.url, name, &backend, known))?;
        let mut written = file.check().and_then(|_config| file.write());
        if written.is_err() {
            // Somebody may have written it meanwhile; it is read anew, once.
            written = self.local.place(context, probe.url.as_str(), name).and_then(|place| {
                let mut file = place.file;
                file.add_runner(self.local.table(&probe.url, name, &backend, known))?;
                file.check()?;
                file.write()
            });
        }
        written.with_context(|| {
            format!(
                "add {name:?}, which is runner {} (its token is in {token_file}; the same command \
                 again goes on from there)",
                shown_id(known.id)
            )
        })?;
        note.remove()?;
        let created = Created {
            name: name.to_owned(),
            id: known.id,
            url: probe.url.as_str().trim_end_matches('/').to_owned(),
            backend: backend.0.clone(),
            token_file: token_file.to_string(),
            token_expires_at: known.expires_at.map(|time| time.to_string()),
        };
        if self.json {
            context.output.json(&created)?;
            return Ok(Exit::Done);
        }
        context.output.note(&format!(
            "created {name:?} (runner {} at {}) on the backend {:?}",
            shown_id(known.id),
            probe.url,
            backend.0
        ))?;
        context.output.note(&format!("configuration: {}", context.config_path))?;
        context.output.note(&format!("token: {token_file}"))?;
        Ok(Exit::Done)
    }

    /// GitLab did not answer: the runner it may have made is looked for and deleted again.
    async fn unanswered(
        &self,
        context: &Context,
        api: &Api,
        note: &Note,
        mark: &str,
        error: Error,
    ) -> anyhow::Error {
        let arrived = error.may_have_arrived();
        let failure = anyhow::Error::new(error).context("create the runner");
        if arrived && let Err(why) = clear(context, api, mark).await {
            let hint = "run the command again: it looks for that runner first";
            let what = format!("{}; {}", Chain(failure.as_ref()), Chain(why.as_ref()));
            return Failure::new(Exit::Gitlab, what).hint(hint).into();
        }
        match note.remove() {
            Ok(()) => failure,
            Err(error) => error,
        }
    }

    /// The token cannot be kept: the runner is deleted again, or the token put somewhere else.
    async fn unwritten(
        &self,
        place: &Place,
        known: &Known,
        note: &Note,
        error: anyhow::Error,
    ) -> anyhow::Error {
        let gone = match client(&place.probe) {
            Ok(client) => client.unregister_runner(&known.token).await,
            Err(error) => Err(error),
        };
        let number = shown_id(known.id);
        let what = format!("keep the token of the runner {number}: {}", Chain(error.as_ref()));
        let hint = match gone {
            Ok(UnregisterReply::Done | UnregisterReply::Refused | UnregisterReply::Unknown) => {
                match note.remove() {
                    Ok(()) => "the runner was deleted again; mend this and run the command again"
                        .to_owned(),
                    Err(error) => {
                        format!("the runner was deleted again; {}", Chain(error.as_ref()))
                    }
                }
            }
            Ok(UnregisterReply::Unclear(_)) | Err(_) => match rescue(&known.token) {
                Ok(path) => format!(
                    "the runner could not be deleted again; its token is in {path}: use it with \
                         `bridge register --token-file`, or delete the runner in GitLab"
                ),
                Err(_nowhere) => format!(
                    "the runner {number} could not be deleted again and its token is lost: delete \
                         it in GitLab"
                ),
            },
        };
        Failure::new(Exit::Unexpected, what).hint(hint).into()
    }
}

fn known(credentials: Credentials) -> Known {
    let Credentials { id, token, expires_at, obtained_at } = credentials;
    Known { id, token, expires_at, obtained_at: Some(obtained_at) }
}

/// The note that a runner is being made.
struct Note {
    path: Utf8PathBuf,
}

impl Note {
    fn beside(token_file: &Utf8Path, name: &str) -> Self {
        Self { path: token_file.with_file_name(format!(".{name}.creating")) }
    }

    fn read(&self) -> anyhow::Result<Option<String>> {
        match fs::read_to_string(&self.path) {
            Ok(text) => Ok(Some(text.trim().to_owned()).filter(|mark| !mark.is_empty())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", self.path)),
        }
    }

    fn remove(&self) -> anyhow::Result<()> {
        match fs::remove_file(&self.path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).with_context(|| format!("remove {}", self.path)),
        }
    }
}

/// Makes a mark that no other runner bears.
fn mark() -> anyhow::Result<String> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).context("get random bytes")?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// How a runner bears its mark.
fn marked(mark: &str) -> String {
    format!("made by `bridge runners create` ({mark})")
}

/// Looks whether the run that left the note had the token already; its runner is as good as ours.
async fn finished(context: &Context, place: &Place, name: &str) -> anyhow::Result<Option<Known>> {
    if !place.token_file.exists() {
        return Ok(None);
    }
    let token = config::read_token_file(&place.token_file).context("go on with the token")?;
    let system_id = context.system_id()?;
    let client = client(&place.probe)?;
    let reply = client.verify_runner(&token, system_id.as_str(), &info(None)).await;
    let reply = reply.with_context(|| format!("verify {name:?}"))?;
    if matches!(reply, crate::gitlab::VerifyReply::Refused) {
        return Ok(None);
    }
    let (id, expires_at) = verified(name, reply)?;
    context.output.note(&format!("going on with the token in {}", place.token_file))?;
    Ok(Some(Known { id, token, expires_at, obtained_at: None }))
}

/// Deletes the runner that bears a mark, if there is one: its token was never kept.
async fn clear(context: &Context, api: &Api, mark: &str) -> anyhow::Result<()> {
    let look =
        || format!("look for a runner whose token was lost (its maintenance note holds {mark})");
    let filter =
        RunnerFilter { status: Some("never_contacted".to_owned()), ..RunnerFilter::default() };
    let mut listed =
        match api.runners(&Whose::Owned, &filter, MOST_LOOKED_AT).await.with_context(look)? {
            ApiReply::Done(listed) => listed.items,
            ApiReply::Refused(refusal) => return Err(refused(&look(), &refusal).into()),
        };
    // An administrator's instance runners are in no list but the whole one.
    if let ApiReply::Done(all) =
        api.runners(&Whose::All, &filter, MOST_LOOKED_AT).await.with_context(look)?
    {
        listed.extend(all.items);
    }
    listed.sort_by_key(|runner| std::cmp::Reverse(runner.id));
    listed.dedup_by_key(|runner| runner.id);
    for runner in listed.iter().take(MOST_LOOKED_AT) {
        let ApiReply::Done(details) = api.runner(runner.id).await.with_context(look)? else {
            continue;
        };
        if !details.maintenance_note.contains(mark) {
            continue;
        }
        return match api.delete(runner.id).await.with_context(look)? {
            ApiReply::Done(()) => {
                let id = runner.id;
                let note = format!("deleted the runner #{id}, whose token had been lost");
                Ok(context.output.note(&note)?)
            }
            ApiReply::Refused(refusal) => {
                let what = format!("delete the runner #{}, whose token was lost", runner.id);
                Err(refused(&what, &refusal).into())
            }
        };
    }
    Ok(())
}

/// Puts a token where this account's temporary files are, for its owner alone.
pub(super) fn rescue(token: &Secret) -> io::Result<Utf8PathBuf> {
    // Files of this kind have mode 0600.
    let mut file = tempfile::Builder::new().prefix("bridge-token-").tempfile()?;
    file.write_all(format!("{}\n", token.expose()).as_bytes())?;
    file.as_file().sync_all()?;
    let (_file, path) = file.keep().map_err(|error| error.error)?;
    Utf8PathBuf::from_path_buf(path)
        .map_err(|path| io::Error::other(format!("{} is no text", path.display())))
}
