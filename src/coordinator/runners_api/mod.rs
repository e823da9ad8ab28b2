//! The Runners API: what users do to runners with a personal access token.
//!
//! As `lib/api/ci/runners.rb` and `lib/api/user_runners.rb` of GitLab: first who calls (401), then
//! the token's scopes (403 with the scopes that would do), then the runner (404), then the user's
//! rights (403), then the values (400).

mod lists;
mod params;
mod shapes;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use axum::http::Method;
use serde_json::json;

use self::params::Params;
use super::Coordinator;
use super::api::Call;
use super::fault::Endpoint;
use super::options::RunnerOptions;
use super::random;
use super::reply::Reply;
use super::runner::Runner;
use super::state::{Shared, State};

/// After so long without a call a runner is offline.
const ONLINE: Duration = Duration::from_secs(2 * 3600);
/// And after so long stale.
const STALE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Who may do what with a personal access token.
#[derive(Clone, Debug)]
pub struct AccessToken {
    /// `api`, `read_api`, `create_runner`, `manage_runner`.
    pub scopes: Vec<String>,
    /// Whether its user administrates the instance. Everybody else owns all projects and groups.
    pub admin: bool,
}

impl AccessToken {
    /// A token of somebody who is no administrator.
    pub fn with(scopes: &[&str]) -> Self {
        Self { scopes: scopes.iter().map(|scope| (*scope).to_owned()).collect(), admin: false }
    }

    /// The same of an administrator.
    #[must_use]
    pub fn admin(mut self) -> Self {
        self.admin = true;
        self
    }
}

/// Whose runner it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Owner {
    /// The instance's.
    #[default]
    Instance,
    /// A group's.
    Group(i64),
    /// Of these projects, the first of which owns it.
    Projects(Vec<i64>),
}

impl Owner {
    fn kind(&self) -> &'static str {
        match self {
            Self::Instance => "instance_type",
            Self::Group(_) => "group_type",
            Self::Projects(_) => "project_type",
        }
    }
}

/// What users may set of a runner, besides its options.
#[derive(Clone, Debug)]
pub(super) struct Card {
    owner: Owner,
    locked: bool,
    access_level: String,
    maintenance_note: String,
    created_at: Duration,
}

impl Card {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            owner: Owner::Instance,
            locked: false,
            access_level: "not_protected".to_owned(),
            maintenance_note: String::new(),
            created_at: now,
        }
    }
}

/// The users' side of the state.
#[derive(Debug, Default)]
pub(super) struct Users {
    tokens: HashMap<String, AccessToken>,
    projects: BTreeMap<i64, String>,
    groups: BTreeMap<i64, String>,
}

impl Users {
    pub(super) fn note_project(&mut self, id: i64, path: &str) {
        self.projects.entry(id).or_insert_with(|| path.to_owned());
    }
}

impl Coordinator {
    /// Makes a personal access token.
    pub fn add_access_token(&self, access: AccessToken) -> String {
        let token = format!("glpat-{}", random::letters(20));
        self.shared().change(|state, _| state.users.tokens.insert(token.clone(), access));
        token
    }

    /// Takes a personal access token back.
    pub fn revoke_access_token(&self, token: &str) {
        self.shared().change(|state, _| state.users.tokens.remove(token));
    }

    /// Makes a project known; those of jobs are known already.
    pub fn add_project(&self, id: i64, path: &str) {
        self.shared().change(|state, _| state.users.note_project(id, path));
    }

    /// Makes a group known.
    pub fn add_group(&self, id: i64, path: &str) {
        self.shared().change(|state, _| state.users.groups.insert(id, path.to_owned()));
    }

    /// Gives a runner to a group or to projects.
    pub fn own_runner(&self, token: &str, owner: Owner) {
        self.with_runner(token, |runner, _| runner.card.owner = owner);
    }

    /// Gives the tokens of the runners that are there, by number.
    pub fn runner_tokens(&self) -> BTreeMap<i64, String> {
        let state = self.shared().lock();
        let there = state.runners.iter().filter(|runner| !runner.deleted);
        there.map(|runner| (runner.id, runner.token.clone())).collect()
    }
}

/// Says whether a path is one of this API, and which kind of call it is.
pub(super) fn route(method: &Method, parts: &[&str]) -> Option<Endpoint> {
    match (method, parts) {
        (&Method::POST, ["user", "runners"]) => Some(Endpoint::CreateRunner),
        (&Method::GET, ["runners"] | ["runners", "all"]) => Some(Endpoint::RunnersApi),
        (_, ["runners", id, ..]) if id.parse::<i64>().is_ok() => Some(Endpoint::RunnersApi),
        (_, ["projects", _, "runners"] | ["projects", _, "runners", _])
        | (&Method::GET, ["groups", _, "runners"]) => Some(Endpoint::RunnersApi),
        _ => None,
    }
}

/// Does what a call asks, if its token may.
pub(super) fn answer(shared: &Shared, call: &Call) -> Reply {
    let parts: Vec<String> =
        call.path.split('/').filter(|part| !part.is_empty()).map(decoded).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let result = shared.change(|state, now| {
        let access = who(state, call, &parts)?;
        let params = Params::read(call)?;
        Scene { shared, state, now, access, params }.act(&call.method, &parts)
    });
    result.unwrap_or_else(|refusal| refusal)
}

fn decoded(part: &str) -> String {
    let pair = format!("x={}", part.replace('+', "%2B").replace('&', "%26"));
    let mut pairs = url::form_urlencoded::parse(pair.as_bytes());
    pairs.next().map(|(_, value)| value.into_owned()).unwrap_or_default()
}

/// Finds the token's rights, or says what they lack.
fn who(state: &State, call: &Call, parts: &[&str]) -> Result<AccessToken, Reply> {
    let bearer = call.header("authorization").and_then(|text| text.strip_prefix("Bearer "));
    let token = call.header("private-token").or(bearer).unwrap_or_default();
    let Some(access) = state.users.tokens.get(token) else {
        return Err(Reply::message(401, "401 Unauthorized"));
    };
    let mut wanted = vec!["api"];
    if call.method == Method::GET {
        wanted.push("read_api");
    }
    match parts {
        ["user", "runners"] => wanted.push("create_runner"),
        ["runners", id, ..] if *id != "all" => wanted.push("manage_runner"),
        _ => {}
    }
    if wanted.iter().any(|scope| access.scopes.iter().any(|have| have == scope)) {
        return Ok(access.clone());
    }
    let body = json!({
        "error": "insufficient_scope",
        "error_description": "The request requires higher privileges than provided by the access \
                              token.",
        "scope": wanted.join(" "),
    });
    Err(Reply::json(403, body.to_string()))
}

fn forbidden(why: &str) -> Reply {
    Reply::message(403, &format!("403 Forbidden - {why}"))
}

/// One call with all it needs.
struct Scene<'a> {
    shared: &'a Shared,
    state: &'a mut State,
    now: Duration,
    access: AccessToken,
    params: Params,
}

type Answered = Result<Reply, Reply>;

impl Scene<'_> {
    fn act(&mut self, method: &Method, parts: &[&str]) -> Answered {
        match (method, parts) {
            (&Method::POST, ["user", "runners"]) => self.create(),
            (&Method::GET, ["runners"]) => {
                let admin = self.access.admin;
                self.list(|runner| admin || runner.card.owner != Owner::Instance)
            }
            (&Method::GET, ["runners", "all"]) if self.access.admin => self.list(|_| true),
            (&Method::GET, ["runners", "all"]) => Err(Reply::forbidden()),
            (&Method::GET, ["projects", project, "runners"]) => {
                let id = self.project(project)?;
                self.list(|runner| match &runner.card.owner {
                    Owner::Instance | Owner::Group(_) => true,
                    Owner::Projects(projects) => projects.contains(&id),
                })
            }
            (&Method::GET, ["groups", group, "runners"]) => {
                let id = self.group(group)?;
                self.list(|runner| match &runner.card.owner {
                    Owner::Instance => true,
                    Owner::Group(group) => *group == id,
                    Owner::Projects(_) => false,
                })
            }
            (&Method::POST, ["projects", project, "runners"]) => self.enable(project),
            (&Method::DELETE, ["projects", project, "runners", id]) => self.disable(project, id),
            (method, ["runners", id, rest @ ..]) => {
                let at = self.runner_at(id)?;
                self.one(method, at, rest)
            }
            _ => Err(Reply::error(404, "404 Not Found")),
        }
    }

    fn one(&mut self, method: &Method, at: usize, rest: &[&str]) -> Answered {
        let instance = self.runner(at)?.card.owner == Owner::Instance;
        let may = self.access.admin || !instance;
        match (method, rest) {
            // Everybody may see an instance runner.
            (&Method::GET, []) => Ok(Reply::json(200, self.details(self.runner(at)?).to_string())),
            (&Method::GET, ["managers"]) => self.managers(at),
            _ if !may => Err(forbidden("No access granted")),
            (&Method::GET, ["jobs"]) => self.jobs(at),
            (&Method::PUT, []) => self.change(at),
            (&Method::DELETE, []) => {
                let shared = match &self.runner(at)?.card.owner {
                    Owner::Projects(projects) => projects.len() > 1,
                    Owner::Instance | Owner::Group(_) => false,
                };
                if shared && !self.access.admin {
                    return Err(forbidden("Runner associated with more than one project"));
                }
                self.state.delete_runner(at, self.now);
                Ok(Reply::empty(204))
            }
            (&Method::POST, ["reset_authentication_token"]) => {
                self.state.new_runner_token(at, self.now);
                let runner = self.runner(at)?;
                let body = json!({
                    "token": runner.token, "token_expires_at": self.expiry(runner),
                });
                Ok(Reply::json(201, body.to_string()))
            }
            _ => Err(Reply::error(404, "404 Not Found")),
        }
    }

    fn runner(&self, at: usize) -> Result<&Runner, Reply> {
        let runner = self.state.runners.get(at).filter(|runner| !runner.deleted);
        runner.ok_or_else(|| Reply::message(404, "404 Runner Not Found"))
    }

    fn runner_at(&self, id: &str) -> Result<usize, Reply> {
        let id: i64 = id.parse().map_err(|_not_a_number| Params::invalid("id"))?;
        let at = self.state.runners.iter().position(|runner| runner.id == id && !runner.deleted);
        at.ok_or_else(|| Reply::message(404, "404 Runner Not Found"))
    }

    fn project(&self, named: &str) -> Result<i64, Reply> {
        place(&self.state.users.projects, named)
            .ok_or_else(|| Reply::message(404, "404 Project Not Found"))
    }

    fn group(&self, named: &str) -> Result<i64, Reply> {
        place(&self.state.users.groups, named)
            .ok_or_else(|| Reply::message(404, "404 Group Not Found"))
    }

    fn create(&mut self) -> Answered {
        let params = &self.params;
        let missing = |name: &str| Reply::error(400, &format!("{name} is missing"));
        let kinds = ["instance_type", "group_type", "project_type"];
        let kind = params.word("runner_type", &kinds)?.ok_or_else(|| missing("runner_type"))?;
        let owner = match kind.as_str() {
            "group_type" => {
                let id = params.number("group_id")?.ok_or_else(|| missing("group_id"))?;
                if !self.state.users.groups.contains_key(&id) {
                    return Err(Reply::message(404, "404 Group Not Found"));
                }
                Owner::Group(id)
            }
            "project_type" => {
                let id = params.number("project_id")?.ok_or_else(|| missing("project_id"))?;
                if !self.state.users.projects.contains_key(&id) {
                    return Err(Reply::message(404, "404 Project Not Found"));
                }
                Owner::Projects(vec![id])
            }
            _instance if self.access.admin => Owner::Instance,
            _instance => return Err(Reply::forbidden()),
        };
        let mut options = RunnerOptions { description: String::new(), ..RunnerOptions::default() };
        let mut card = Card { owner, ..Card::new(self.now) };
        self.set(&mut options, &mut card)?;
        let at = self.state.add_runner(options, "glrt-", self.now);
        let runner = self.state.runners.get_mut(at);
        let runner = runner.ok_or_else(|| Reply::message(500, "500 Internal Server Error"))?;
        runner.card = card;
        let runner = self.runner(at)?;
        let body = json!({
            "id": runner.id, "token": runner.token, "token_expires_at": self.expiry(runner),
        });
        Ok(Reply::json(201, body.to_string()))
    }

    /// Takes over what the call sets, if it is valid as a whole.
    fn set(&self, options: &mut RunnerOptions, card: &mut Card) -> Result<(), Reply> {
        let params = &self.params;
        let invalid = |field: &str, text: &str| {
            Reply::json(400, json!({ "message": { field: [text] } }).to_string())
        };
        if let Some(text) = params.text("description")? {
            options.description = text;
        }
        let (active, paused) = (params.flag("active")?, params.flag("paused")?);
        if active.is_some() && paused.is_some() {
            return Err(Reply::error(400, "active, paused are mutually exclusive"));
        }
        if let Some(paused) = paused.or(active.map(|active| !active)) {
            options.paused = paused;
        }
        if let Some(tags) = params.tags()? {
            options.tags = tags;
        }
        if let Some(flag) = params.flag("run_untagged")? {
            options.run_untagged = flag;
        }
        if let Some(flag) = params.flag("locked")? {
            card.locked = flag;
        }
        if let Some(level) = params.word("access_level", &["not_protected", "ref_protected"])? {
            card.access_level = level;
        }
        if let Some(seconds) = params.number("maximum_timeout")? {
            if seconds < 600 {
                return Err(invalid("maximum_timeout", "needs to be at least 10 minutes"));
            }
            options.maximum_timeout = u64::try_from(seconds).ok().map(Duration::from_secs);
        }
        if let Some(note) = params.text("maintenance_note")? {
            if note.chars().count() > 1024 {
                return Err(invalid(
                    "maintenance_note",
                    "is too long (maximum is 1024 characters)",
                ));
            }
            card.maintenance_note = note;
        }
        if options.tags.is_empty() && !options.run_untagged {
            let text = "can not be empty when runner is not allowed to pick untagged jobs";
            return Err(invalid("tags_list", text));
        }
        Ok(())
    }

    fn change(&mut self, at: usize) -> Answered {
        let known = [
            "description",
            "active",
            "paused",
            "tag_list",
            "run_untagged",
            "locked",
            "access_level",
            "maximum_timeout",
            "maintenance_note",
        ];
        if !self.params.has_any(&known) {
            let text = format!("{} are missing, at least one parameter must be provided", {
                known.join(", ")
            });
            return Err(Reply::error(400, &text));
        }
        let runner = self.runner(at)?;
        let (mut options, mut card) = (runner.options.clone(), runner.card.clone());
        self.set(&mut options, &mut card)?;
        let now = self.now;
        if let Some(runner) = self.state.runners.get_mut(at) {
            (runner.options, runner.card) = (options, card);
            runner.ring(now);
        }
        Ok(Reply::json(200, self.details(self.runner(at)?).to_string()))
    }

    fn enable(&mut self, project: &str) -> Answered {
        let project = self.project(project)?;
        let id = self.params.number("runner_id")?;
        let id = id.ok_or_else(|| Reply::error(400, "runner_id is missing"))?;
        let at = self.runner_at(&id.to_string())?;
        let admin = self.access.admin;
        let runner = self.state.runners.get_mut(at);
        let runner = runner.ok_or_else(|| Reply::message(404, "404 Runner Not Found"))?;
        match &mut runner.card.owner {
            Owner::Group(_) => return Err(forbidden("Runner is a group runner")),
            Owner::Instance => return Err(forbidden("No access granted")),
            Owner::Projects(_) if runner.card.locked && !admin => {
                return Err(forbidden("Runner is locked"));
            }
            Owner::Projects(projects) if projects.contains(&project) => {
                let text = "Validation failed: Runner has already been taken";
                return Err(Reply::message(400, text));
            }
            Owner::Projects(projects) => projects.push(project),
        }
        Ok(Reply::json(201, self.summary(self.runner(at)?).to_string()))
    }

    fn disable(&mut self, project: &str, id: &str) -> Answered {
        let project = self.project(project)?;
        let at = self.runner_at(id)?;
        let runner = self.state.runners.get_mut(at);
        let projects = match runner.map(|runner| &mut runner.card.owner) {
            Some(Owner::Projects(projects)) if projects.contains(&project) => projects,
            Some(Owner::Instance | Owner::Group(_) | Owner::Projects(_)) | None => {
                return Err(Reply::message(404, "404 Runner Not Found"));
            }
        };
        if projects.len() == 1 {
            let why = "Only one project associated with the runner. Please remove the runner \
                       instead";
            return Err(forbidden(why));
        }
        projects.retain(|other| *other != project);
        Ok(Reply::empty(204))
    }
}

/// Finds a project or group by number or path.
fn place(places: &BTreeMap<i64, String>, named: &str) -> Option<i64> {
    let by_number = named.parse().ok().filter(|id| places.contains_key(id));
    by_number.or_else(|| places.iter().find(|(_, path)| *path == named).map(|(id, _)| *id))
}
