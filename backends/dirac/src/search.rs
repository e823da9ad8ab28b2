//! Searching for jobs: any number of them with one question.

use jiff::Timestamp;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use bridge_backend::Result;

use crate::client::with_json;
use crate::dirac::Dirac;
use crate::failure::{nonsense, refused, unasked};

/// What the server gives at once.
const PAGE: usize = 10_000;

/// More pages than this are a server that does not count.
const PAGES: usize = 100;

/// What DIRAC knows of a job.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Row {
    #[serde(rename = "JobID")]
    pub(crate) id: u64,
    #[serde(default, rename = "JobName")]
    pub(crate) name: Option<String>,
    #[serde(default)]
    pub(crate) owner: Option<String>,
    #[serde(default)]
    pub(crate) site: Option<String>,
    #[serde(default)]
    pub(crate) status: Option<String>,
    #[serde(default)]
    pub(crate) minor_status: Option<String>,
    #[serde(default)]
    pub(crate) application_status: Option<String>,
    /// The server's own time of the last change, whatever times were sent with it.
    #[serde(default)]
    pub(crate) last_update_time: Option<String>,
    #[serde(default)]
    pub(crate) reschedule_counter: Option<u64>,
    #[serde(default)]
    pub(crate) logging_info: Option<Vec<Logged>>,
}

/// One line of a job's history.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Logged {
    #[serde(default)]
    pub(crate) status: Option<String>,
    #[serde(default)]
    pub(crate) minor_status: Option<String>,
    #[serde(default)]
    pub(crate) application_status: Option<String>,
    #[serde(default)]
    pub(crate) status_time: Option<String>,
    #[serde(default)]
    pub(crate) source: Option<String>,
}

impl Row {
    pub(crate) fn status(&self) -> &str {
        self.status.as_deref().unwrap_or_default()
    }

    /// Gives the server's time of the last change.
    pub(crate) fn changed(&self) -> Option<Timestamp> {
        time(self.last_update_time.as_deref()?)
    }

    pub(crate) fn history(&self) -> &[Logged] {
        self.logging_info.as_deref().unwrap_or_default()
    }

    /// Adds what the job said by other means, as if it stood in the history.
    pub(crate) fn add_word(&mut self, word: Option<String>) {
        if let Some(word) = word
            && let Some(lines) = &mut self.logging_info
        {
            lines.push(Logged { application_status: Some(word), ..Logged::default() });
        }
    }
}

impl Logged {
    /// Gives the time; it comes with and without a zone, which is always UTC.
    pub(crate) fn time(&self) -> Option<Timestamp> {
        time(self.status_time.as_deref()?)
    }
}

fn time(text: &str) -> Option<Timestamp> {
    text.parse().or_else(|_no_zone| format!("{text}Z").parse()).ok()
}

/// Columns that say what a job is doing.
pub(crate) const STATE: &[&str] = &[
    "JobID",
    "JobName",
    "Owner",
    "Site",
    "Status",
    "MinorStatus",
    "ApplicationStatus",
    "RescheduleCounter",
    "LastUpdateTime",
];

/// The same, with all that was ever said of it.
pub(crate) const HISTORY: &[&str] = &[
    "JobID",
    "JobName",
    "Owner",
    "Site",
    "Status",
    "MinorStatus",
    "ApplicationStatus",
    "RescheduleCounter",
    "LastUpdateTime",
    "LoggingInfo",
];

impl Dirac {
    /// Asks for columns of the jobs of these ids.
    pub(crate) async fn jobs_of_ids(&self, ids: &[u64], columns: &[&str]) -> Result<Vec<Row>> {
        let these = json!({"parameter": "JobID", "operator": "in", "values": ids});
        self.search(&[these], columns).await
    }

    /// Asks for jobs that fulfil all conditions, in the order of their ids.
    ///
    /// A job that is not in the answer is not in DIRAC: the answer is complete, or an error.
    pub(crate) async fn search(&self, conditions: &[Value], columns: &[&str]) -> Result<Vec<Row>> {
        let body = json!({
            "parameters": columns,
            "search": conditions,
            "sort": [{"parameter": "JobID", "direction": "asc"}],
        });
        let mut rows: Vec<Row> = Vec::new();
        for page in 1..=PAGES {
            let path = format!("api/jobs/search?page={page}&per_page={PAGE}");
            let answer = self
                .ask("a search", || with_json(self.client.ask(Method::POST, &path), &body))
                .await
                .map_err(unasked("search for jobs"))?;
            match answer.status {
                200 => {
                    rows.extend(answer.json::<Vec<Row>>().map_err(nonsense("search for jobs"))?);
                    return Ok(rows);
                }
                206 => {
                    let part: Vec<Row> = answer.json().map_err(nonsense("search for jobs"))?;
                    let empty = part.is_empty();
                    rows.extend(part);
                    let total = answer.total.and_then(|total| usize::try_from(total).ok());
                    if empty || total.is_some_and(|total| rows.len() >= total) {
                        return Ok(rows);
                    }
                }
                // Past the end.
                416 => return Ok(rows),
                _ => return Err(refused("search for jobs", &answer)),
            }
        }
        Ok(rows)
    }
}
