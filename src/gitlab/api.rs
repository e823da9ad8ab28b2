//! The Runners API: what an operator does with a personal access token.
//!
//! Another door than the runner's own: it is opened by a user's token, and it refuses by the user's
//! rights. Every call gives an [`ApiReply`]: what was asked for, or a [`Refusal`] that says whose
//! move it is. Lists are followed page by page up to a number that the caller names, so that no
//! server can keep us reading.

use std::fmt;

use reqwest::Method;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::answer::Answer;
use super::error::Error;
use super::runners::Credentials;
use super::transport::{Ask, Credential};
use super::unclear::Unclear;
use super::wire::{Secret, nullable};
use super::{CiStatus, Client};

/// As many as GitLab gives at once.
const PER_PAGE: usize = 100;

/// A hundred jobs with their commits are a few hundred KiB.
const LIST_ANSWER: usize = 8 * 1024 * 1024;

/// What a call may be answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiReply<T> {
    /// What was asked for.
    Done(T),
    /// Not that.
    Refused(Refusal),
}

/// Why not, and so whose move it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 400, 409, 412, 422: what was asked for makes no sense to GitLab. The caller's to change.
    Invalid {
        /// GitLab's words.
        message: String,
    },
    /// 401: GitLab does not know the access token, or it has expired. Whoever made it makes another.
    Unknown,
    /// 403: the access token lacks a scope. Whoever made it makes one that has it.
    LacksScope {
        /// The scopes of which one would do, as GitLab names them; empty if it does not.
        scopes: String,
    },
    /// 403: the token's user lacks the role, or the runner's state forbids it.
    Forbidden {
        /// GitLab's words.
        message: String,
    },
    /// 404: there is none, or the user may not know of it.
    NotFound {
        /// GitLab's words.
        message: String,
    },
    /// Any other status. What was asked for may have been done all the same.
    Unclear(Unclear),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid { message } => write!(f, "GitLab refused: {message}"),
            Self::Unknown => f.write_str("GitLab does not know the access token"),
            Self::LacksScope { scopes } if scopes.is_empty() => {
                f.write_str("the access token lacks a scope")
            }
            Self::LacksScope { scopes } => {
                write!(f, "the access token lacks a scope (one of: {scopes})")
            }
            Self::Forbidden { message } => write!(f, "GitLab forbids it: {message}"),
            Self::NotFound { message } => write!(f, "GitLab has none: {message}"),
            Self::Unclear(unclear) => unclear.fmt(f),
        }
    }
}

/// Which runners are listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Whose {
    /// Those that the token's user may manage.
    #[default]
    Owned,
    /// All of the instance; for administrators.
    All,
    /// Those a project can use: by number or full path.
    Project(String),
    /// Those a group can use: by number or full path.
    Group(String),
}

/// Which of them; everything that is `None` or empty does not narrow.
#[derive(Clone, Debug, Default)]
pub struct RunnerFilter {
    /// The old word for `type` or `status`.
    pub scope: Option<String>,
    /// `instance_type`, `group_type` or `project_type`.
    pub runner_type: Option<String>,
    /// `online`, `offline`, `stale`, `never_contacted`.
    pub status: Option<String>,
    /// Whether they take no jobs.
    pub paused: Option<bool>,
    /// They have all of these tags.
    pub tags: Vec<String>,
    /// Their version starts like this.
    pub version_prefix: Option<String>,
}

/// Which jobs of a runner are listed, and how.
#[derive(Clone, Debug, Default)]
pub struct JobFilter {
    /// GitLab's word: `running`, `success`, `failed`, `canceled`, …
    pub status: Option<String>,
    /// Only those that this machine was given.
    pub system_id: Option<String>,
    /// `id`.
    pub order_by: Option<String>,
    /// `asc` or `desc`.
    pub sort: Option<String>,
}

/// A list as far as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed<T> {
    /// What there is, in GitLab's order.
    pub items: Vec<T>,
    /// Whether there is more than was asked for.
    pub more: bool,
}

/// A runner as lists show it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct RunnerSummary {
    /// GitLab's number.
    pub id: i64,
    /// What it is called.
    #[serde(deserialize_with = "nullable")]
    pub description: String,
    /// `instance_type`, `group_type` or `project_type`.
    #[serde(deserialize_with = "nullable")]
    pub runner_type: String,
    /// `online`, `offline`, `stale`, `never_contacted`; old servers also say `paused`.
    #[serde(deserialize_with = "nullable")]
    pub status: String,
    /// Whether it gets no jobs.
    #[serde(deserialize_with = "nullable")]
    pub paused: bool,
    /// The last address it called from.
    pub ip_address: Option<String>,
    /// When it was made.
    pub created_at: Option<String>,
}

/// A runner with everything that can be set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct RunnerDetails {
    /// As in lists.
    #[serde(flatten)]
    pub summary: RunnerSummary,
    /// Its tags.
    #[serde(deserialize_with = "nullable")]
    pub tag_list: Vec<String>,
    /// Whether it takes jobs without tags.
    #[serde(deserialize_with = "nullable")]
    pub run_untagged: bool,
    /// Whether it is kept to its projects.
    #[serde(deserialize_with = "nullable")]
    pub locked: bool,
    /// `not_protected` or `ref_protected`.
    #[serde(deserialize_with = "nullable")]
    pub access_level: String,
    /// The longest timeout of its jobs, seconds.
    pub maximum_timeout: Option<u64>,
    /// A note for administrators.
    #[serde(deserialize_with = "nullable")]
    pub maintenance_note: String,
    /// When it was last heard of.
    pub contacted_at: Option<String>,
    /// What it said of its version.
    pub version: Option<String>,
    /// The projects that a project runner serves.
    #[serde(deserialize_with = "nullable")]
    pub projects: Vec<ProjectSummary>,
    /// The group of a group runner.
    #[serde(deserialize_with = "nullable")]
    pub groups: Vec<GroupSummary>,
}

/// A project as runners and jobs name it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct ProjectSummary {
    /// GitLab's number.
    pub id: i64,
    /// Its full path.
    #[serde(deserialize_with = "nullable")]
    pub path_with_namespace: String,
}

/// A group as runners name it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct GroupSummary {
    /// GitLab's number.
    pub id: i64,
    /// Its name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
}

/// A process that uses a runner's token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct ManagerSummary {
    /// GitLab's number.
    pub id: i64,
    /// What it calls itself.
    #[serde(deserialize_with = "nullable")]
    pub system_id: String,
    /// As of a runner.
    #[serde(deserialize_with = "nullable")]
    pub status: String,
    /// What it said.
    pub version: Option<String>,
    /// What it said.
    pub platform: Option<String>,
    /// What it said.
    pub architecture: Option<String>,
    /// When it was last heard of.
    pub contacted_at: Option<String>,
    /// From where.
    pub ip_address: Option<String>,
}

/// A job as GitLab lists it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct JobSummary {
    /// GitLab's number.
    pub id: i64,
    /// GitLab's word.
    #[serde(deserialize_with = "nullable")]
    pub status: String,
    /// Its stage.
    #[serde(deserialize_with = "nullable")]
    pub stage: String,
    /// Its name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Its branch or tag.
    #[serde(rename = "ref", deserialize_with = "nullable")]
    pub reference: String,
    /// When it was made.
    pub created_at: Option<String>,
    /// When it was given to a runner.
    pub started_at: Option<String>,
    /// When it ended.
    pub finished_at: Option<String>,
    /// Its page.
    pub web_url: Option<String>,
    /// Its project.
    pub project: Option<ProjectSummary>,
}

impl JobSummary {
    /// Gives what GitLab says of it.
    pub fn ci_status(&self) -> CiStatus {
        CiStatus::from(self.status.as_str())
    }
}

/// The runner that a personal access token makes; what is `None` or empty is left to GitLab.
#[derive(Clone, Debug, Default, Serialize)]
pub struct NewRunner {
    /// `instance_type`, `group_type` or `project_type`.
    pub runner_type: String,
    /// The group, for its runners.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_id: Option<i64>,
    /// The project, for its runners.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project_id: Option<i64>,
    /// What it is called.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// A note for administrators.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub maintenance_note: String,
    /// Its tags, separated by commas.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub tag_list: String,
    /// Whether it takes jobs without tags.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_untagged: Option<bool>,
    /// Whether it is kept to its project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locked: Option<bool>,
    /// `not_protected` or `ref_protected`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub access_level: String,
    /// The longest timeout of its jobs, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maximum_timeout: Option<u64>,
    /// Whether it gets no jobs for now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
}

/// What of a runner is changed; the rest stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RunnerChange {
    /// What it is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Whether it gets no jobs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
    /// All of its tags, in place of those it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag_list: Option<Vec<String>>,
    /// Whether it takes jobs without tags.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_untagged: Option<bool>,
    /// Whether it is kept to its projects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locked: Option<bool>,
    /// `not_protected` or `ref_protected`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_level: Option<String>,
    /// The longest timeout of its jobs, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maximum_timeout: Option<u64>,
    /// A note for administrators.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maintenance_note: Option<String>,
}

/// The Runners API of one GitLab, as one user.
#[derive(Clone, Debug)]
pub struct Api {
    client: Client,
    access: Secret,
}

impl Api {
    /// Speaks for whoever made the access token.
    pub fn new(client: Client, access: Secret) -> Self {
        Self { client, access }
    }

    /// Lists runners, at most `most`.
    pub async fn runners(
        &self,
        whose: &Whose,
        filter: &RunnerFilter,
        most: usize,
    ) -> Result<ApiReply<Listed<RunnerSummary>>, Error> {
        let path = match whose {
            Whose::Owned => "runners".to_owned(),
            Whose::All => "runners/all".to_owned(),
            Whose::Project(project) => format!("projects/{}/runners", segment(project)),
            Whose::Group(group) => format!("groups/{}/runners", segment(group)),
        };
        let tags = (!filter.tags.is_empty()).then(|| filter.tags.join(","));
        let query = query(&[
            ("scope", filter.scope.as_deref()),
            ("type", filter.runner_type.as_deref()),
            ("status", filter.status.as_deref()),
            ("paused", filter.paused.map(|paused| if paused { "true" } else { "false" })),
            ("tag_list", tags.as_deref()),
            ("version_prefix", filter.version_prefix.as_deref()),
        ]);
        self.list(&path, query, most).await
    }

    /// Gives a runner's details.
    pub async fn runner(&self, id: i64) -> Result<ApiReply<RunnerDetails>, Error> {
        self.decoded(self.bare(Method::GET, &format!("runners/{id}"))).await
    }

    /// Lists the processes that use a runner's token.
    pub async fn managers(&self, id: i64) -> Result<ApiReply<Vec<ManagerSummary>>, Error> {
        let path = format!("runners/{id}/managers");
        self.decoded(self.bare(Method::GET, &path).limit(LIST_ANSWER)).await
    }

    /// Lists a runner's jobs, at most `most`; GitLab's default order is the newest first.
    pub async fn jobs(
        &self,
        id: i64,
        filter: &JobFilter,
        most: usize,
    ) -> Result<ApiReply<Listed<JobSummary>>, Error> {
        // By key, not by number of page: the list grows at its top while it is read.
        let query = query(&[
            ("status", filter.status.as_deref()),
            ("system_id", filter.system_id.as_deref()),
            ("order_by", Some(filter.order_by.as_deref().unwrap_or("id"))),
            ("sort", Some(filter.sort.as_deref().unwrap_or("desc"))),
            ("pagination", Some("keyset")),
        ]);
        self.list(&format!("runners/{id}/jobs"), query, most).await
    }

    /// Makes a runner; its token is shown this once. Needs the scope `create_runner` or `api`.
    pub async fn create(&self, runner: &NewRunner) -> Result<ApiReply<Credentials>, Error> {
        let ask = self.body(Method::POST, "user/runners", runner)?;
        self.credentials(ask).await
    }

    /// Changes a runner; gives it as it is then.
    pub async fn change(
        &self,
        id: i64,
        change: &RunnerChange,
    ) -> Result<ApiReply<RunnerDetails>, Error> {
        let path = format!("runners/{id}");
        let ask = self.body(Method::PUT, &path, change)?;
        self.decoded(ask).await
    }

    /// Deletes a runner with all its managers.
    pub async fn delete(&self, id: i64) -> Result<ApiReply<()>, Error> {
        self.empty(self.bare(Method::DELETE, &format!("runners/{id}"))).await
    }

    /// Gives a runner another token. The old one dies at once; whoever lost it gets one this way.
    pub async fn reset_token(&self, id: i64) -> Result<ApiReply<Credentials>, Error> {
        let path = format!("runners/{id}/reset_authentication_token");
        self.credentials(self.bare(Method::POST, &path)).await
    }

    /// Lets a project use a project runner.
    pub async fn enable(&self, project: &str, id: i64) -> Result<ApiReply<RunnerSummary>, Error> {
        let path = format!("projects/{}/runners", segment(project));
        let ask = self.body(Method::POST, &path, &serde_json::json!({ "runner_id": id }))?;
        self.decoded(ask).await
    }

    /// Takes a project runner away from a project.
    pub async fn disable(&self, project: &str, id: i64) -> Result<ApiReply<()>, Error> {
        let path = format!("projects/{}/runners/{id}", segment(project));
        self.empty(self.bare(Method::DELETE, &path)).await
    }

    fn bare<'a>(&'a self, method: Method, path: &'a str) -> Ask<'a> {
        let ask = Ask::bare(method, path, self.client.timeouts());
        ask.credential(Credential::Private(&self.access)).accept_json()
    }

    fn body<'a>(
        &'a self,
        method: Method,
        path: &'a str,
        body: &impl Serialize,
    ) -> Result<Ask<'a>, Error> {
        let ask = Ask::json(method, path, body, self.client.timeouts())?;
        Ok(ask.credential(Credential::Private(&self.access)).accept_json())
    }

    async fn ask(&self, ask: Ask<'_>) -> Result<Result<Answer, Refusal>, Error> {
        let answer = self.client.0.exchange(ask).await?.unless_html()?;
        Ok(match answer.status {
            200..=204 => Ok(answer),
            _ => Err(self.refusal(&answer)),
        })
    }

    fn refusal(&self, answer: &Answer) -> Refusal {
        let message = answer.message();
        match answer.status {
            400 | 409 | 412 | 422 => Refusal::Invalid { message },
            401 => Refusal::Unknown,
            403 => match lacking_scope(&answer.body) {
                Some(scopes) => Refusal::LacksScope { scopes },
                None => Refusal::Forbidden { message },
            },
            404 => Refusal::NotFound { message },
            _ => Refusal::Unclear(Unclear::of(answer, self.client.now())),
        }
    }

    async fn decoded<T: DeserializeOwned>(&self, ask: Ask<'_>) -> Result<ApiReply<T>, Error> {
        Ok(match self.ask(ask).await? {
            Ok(answer) => ApiReply::Done(answer.json()?),
            Err(refusal) => ApiReply::Refused(refusal),
        })
    }

    async fn empty(&self, ask: Ask<'_>) -> Result<ApiReply<()>, Error> {
        Ok(match self.ask(ask).await? {
            Ok(_nothing) => ApiReply::Done(()),
            Err(refusal) => ApiReply::Refused(refusal),
        })
    }

    async fn credentials(&self, ask: Ask<'_>) -> Result<ApiReply<Credentials>, Error> {
        Ok(match self.ask(ask).await? {
            Ok(answer) => ApiReply::Done(self.client.credentials(answer)?),
            Err(refusal) => ApiReply::Refused(refusal),
        })
    }

    /// Reads a list page by page. A server that names the page just read as the next one is not
    /// followed in circles.
    async fn list<T: DeserializeOwned>(
        &self,
        path: &str,
        query: String,
        most: usize,
    ) -> Result<ApiReply<Listed<T>>, Error> {
        let mut items: Vec<T> = Vec::new();
        let mut query = query;
        for _page in 0..most.div_ceil(PER_PAGE).max(1) {
            let ask = self.bare(Method::GET, path).query(query.clone()).limit(LIST_ANSWER);
            let answer = match self.ask(ask).await? {
                Ok(answer) => answer,
                Err(refusal) => return Ok(ApiReply::Refused(refusal)),
            };
            let next = answer.next_page(&query).filter(|next| *next != query);
            let page: Vec<T> = answer.json()?;
            let empty = page.is_empty();
            items.extend(page);
            match next {
                Some(_) if items.len() >= most || empty => {
                    let more = !empty;
                    items.truncate(most);
                    return Ok(ApiReply::Done(Listed { items, more }));
                }
                Some(next) => query = next,
                None => {
                    let more = items.len() > most;
                    items.truncate(most);
                    return Ok(ApiReply::Done(Listed { items, more }));
                }
            }
        }
        // Pages were shorter than asked for; what is missing is said.
        Ok(ApiReply::Done(Listed { items, more: true }))
    }
}

/// Writes a number or a path as one segment of a URL's path.
fn segment(text: &str) -> String {
    let mut written = String::with_capacity(text.len() + 8);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'~') {
            written.push(char::from(byte));
        } else if byte == b'.' {
            // A segment of dots alone would climb, encoded or not; no project is called that.
            written.push_str(if text.trim_matches('.').is_empty() { "%252E" } else { "." });
        } else {
            written.extend(['%', hex(byte >> 4), hex(byte & 0x0f)]);
        }
    }
    written
}

fn hex(nibble: u8) -> char {
    char::from_digit(u32::from(nibble), 16).unwrap_or('0').to_ascii_uppercase()
}

fn query(pairs: &[(&str, Option<&str>)]) -> String {
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    for (key, value) in pairs {
        if let Some(value) = value {
            query.append_pair(key, value);
        }
    }
    query.append_pair("per_page", &PER_PAGE.to_string());
    query.finish()
}

/// Tells a token without the scope from a user without the right: GitLab words them differently.
fn lacking_scope(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Body {
        error: String,
        scope: Option<String>,
    }
    let body: Body = serde_json::from_slice(body).ok()?;
    (body.error == "insufficient_scope").then(|| {
        let words = body.scope.unwrap_or_default();
        words.split_whitespace().map(printable).collect::<Vec<_>>().join(", ")
    })
}

fn printable(word: &str) -> String {
    word.chars().filter(|c| c.is_ascii_graphic()).take(40).collect()
}

#[cfg(test)]
#[path = "api_tests.rs"]
mod tests;
