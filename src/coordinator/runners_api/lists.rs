//! The lists of the Runners API: which runners, managers and jobs are in one, and its pages.

use serde_json::{Value, json};

use super::super::reply::Reply;
use super::super::runner::{Manager, Runner};
use super::params::Params;
use super::{Answered, ONLINE, Scene};

impl Scene<'_> {
    pub(super) fn list(&self, wanted: impl Fn(&Runner) -> bool) -> Answered {
        let params = &self.params;
        let kinds = ["instance_type", "group_type", "project_type"];
        let kind = params.word("type", &kinds)?;
        let statuses =
            ["online", "offline", "stale", "never_contacted", "active", "paused"].as_slice();
        let status = params.word("status", statuses)?;
        let scope = params.word("scope", &[statuses, &kinds].concat())?;
        let paused = params.flag("paused")?;
        let tags = params.tags()?.unwrap_or_default();
        let version = params.text("version_prefix")?;
        let is = |runner: &Runner, word: &str| match word {
            "active" => !runner.options.paused,
            "paused" => runner.options.paused,
            word => runner.card.owner.kind() == word || self.status(runner) == word,
        };
        let mut runners: Vec<&Runner> = self
            .state
            .runners
            .iter()
            .filter(|runner| !runner.deleted && wanted(runner))
            .filter(|runner| [&kind, &status, &scope].into_iter().flatten().all(|w| is(runner, w)))
            .filter(|runner| paused.is_none_or(|paused| runner.options.paused == paused))
            .filter(|runner| tags.iter().all(|tag| runner.options.tags.contains(tag)))
            .filter(|runner| {
                version.as_ref().is_none_or(|prefix| {
                    let said = |manager: &Manager| manager.info.version.clone().unwrap_or_default();
                    runner.managers.values().any(|manager| said(manager).starts_with(prefix))
                })
            })
            .collect();
        runners.reverse();
        let list: Vec<Value> = runners.into_iter().map(|runner| self.summary(runner)).collect();
        self.page(&list)
    }

    pub(super) fn managers(&self, at: usize) -> Answered {
        let runner = self.runner(at)?;
        let mut managers: Vec<_> = runner.managers.iter().collect();
        managers.sort_by(|a, b| a.0.cmp(b.0));
        let list: Vec<Value> = managers
            .into_iter()
            .zip(1..)
            .map(|((system_id, manager), id)| {
                let silent = self.now.saturating_sub(manager.contacted_at);
                json!({
                    "id": id,
                    "system_id": &**system_id,
                    "version": manager.info.version,
                    "revision": null,
                    "platform": manager.info.platform,
                    "architecture": null,
                    "created_at": self.time(manager.stored_at),
                    "contacted_at": self.time(manager.contacted_at),
                    "ip_address": "127.0.0.1",
                    "status": if silent >= ONLINE { "offline" } else { "online" },
                    "job_execution_status": "idle",
                })
            })
            .collect();
        Ok(Reply::json(200, Value::from(list).to_string()))
    }

    pub(super) fn jobs(&self, at: usize) -> Answered {
        let params = &self.params;
        let known = [
            "created",
            "pending",
            "running",
            "canceling",
            "failed",
            "success",
            "canceled",
            "skipped",
            "manual",
        ];
        let status = params.word("status", &known)?;
        let system_id = params.text("system_id")?;
        params.word("order_by", &["id"])?;
        let sort = params.word("sort", &["asc", "desc"])?;
        let by_key = params.text("pagination")?.as_deref() == Some("keyset");
        let mut list: Vec<Value> = self
            .state
            .jobs
            .iter()
            .filter(|job| job.runner == Some(at))
            .filter(|job| status.as_ref().is_none_or(|status| job.status.name() == status))
            .filter(|job| {
                system_id.as_ref().is_none_or(|id| job.system_id.as_deref() == Some(id.as_str()))
            })
            .map(|job| self.job(job))
            .collect();
        if sort.as_deref() != Some("asc") {
            list.reverse();
        }
        if by_key { self.page_by_key(&list) } else { self.page(&list) }
    }

    /// Cuts one page out of a list, with the headers that name the next.
    fn page(&self, list: &[Value]) -> Answered {
        let number = |name: &str, default: i64| -> Result<usize, Reply> {
            let number = self.params.number(name)?.unwrap_or(default).max(1);
            usize::try_from(number).map_err(|_negative| Params::invalid(name))
        };
        let (page, per_page) = (number("page", 1)?, number("per_page", 20)?.min(100));
        let from = (page - 1).saturating_mul(per_page).min(list.len());
        let to = (from + per_page).min(list.len());
        let next = (to < list.len()).then(|| page + 1);
        let body = Value::from(list.get(from..to).unwrap_or_default()).to_string();
        let reply = Reply::json(200, body)
            .with("X-Page", page.to_string())
            .with("X-Per-Page", per_page.to_string())
            .with("X-Next-Page", next.map(|next| next.to_string()).unwrap_or_default())
            .with("X-Total", list.len().to_string())
            .with("X-Total-Pages", list.len().div_ceil(per_page).to_string());
        Ok(match next {
            Some(next) => self.link(reply, &[("page", next.to_string())]),
            None => reply,
        })
    }

    /// Cuts one page out of the jobs, which are ordered by number, after the cursor.
    fn page_by_key(&self, list: &[Value]) -> Answered {
        let per_page = self.params.number("per_page")?.unwrap_or(20).clamp(1, 100);
        let per_page = usize::try_from(per_page).unwrap_or(1);
        let after = match self.params.text("cursor")? {
            None => 0,
            Some(cursor) => {
                let at = list.iter().position(|job| job["id"] == json!(cursor.parse::<i64>().ok()));
                at.ok_or_else(|| Params::invalid("cursor"))? + 1
            }
        };
        let to = (after + per_page).min(list.len());
        let page = list.get(after..to).unwrap_or_default();
        let reply = Reply::json(200, Value::from(page).to_string());
        Ok(match page.last() {
            Some(last) if to < list.len() => {
                self.link(reply, &[("cursor", last["id"].to_string())])
            }
            Some(_) | None => reply,
        })
    }

    fn link(&self, reply: Reply, with: &[(&str, String)]) -> Reply {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        for (key, text) in self.params.pairs() {
            if !with.iter().any(|(name, _)| *name == key) {
                query.append_pair(key, &text);
            }
        }
        query.extend_pairs(with);
        // By the name that the instance believes to have, which need not be ours.
        let url = format!("https://gitlab.invalid/api/v4/list?{}", query.finish());
        reply.with("Link", format!("<{url}>; rel=\"next\", <{url}>; rel=\"first\""))
    }
}
