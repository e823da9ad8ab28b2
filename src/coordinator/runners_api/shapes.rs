//! What runners, projects and jobs look like in the answers of the Runners API.

use std::time::Duration;

use serde_json::{Value, json};

use super::super::job::Job;
use super::super::new_job::merge;
use super::super::runner::Runner;
use super::{ONLINE, Owner, STALE, Scene};

impl Scene<'_> {
    pub(super) fn status(&self, runner: &Runner) -> &'static str {
        let last = runner.managers.values().map(|manager| manager.contacted_at).max();
        match last.map(|at| self.now.saturating_sub(at)) {
            None if self.now.saturating_sub(runner.card.created_at) >= STALE => "stale",
            None => "never_contacted",
            Some(silent) if silent >= STALE => "stale",
            Some(silent) if silent >= ONLINE => "offline",
            Some(_) => "online",
        }
    }

    pub(super) fn time(&self, at: Duration) -> String {
        format!("{:.3}", self.shared.clock.calendar(at))
    }

    pub(super) fn expiry(&self, runner: &Runner) -> Option<String> {
        runner.token_expires.map(|end| self.time(end))
    }

    pub(super) fn summary(&self, runner: &Runner) -> Value {
        let status = self.status(runner);
        json!({
            "id": runner.id,
            "description": runner.options.description,
            "ip_address": "127.0.0.1",
            "active": !runner.options.paused,
            "paused": runner.options.paused,
            "is_shared": runner.card.owner == Owner::Instance,
            "runner_type": runner.card.owner.kind(),
            "name": null,
            "online": status == "online",
            "created_at": self.time(runner.card.created_at),
            "status": status,
            "job_execution_status": "idle",
        })
    }

    pub(super) fn details(&self, runner: &Runner) -> Value {
        let mut body = self.summary(runner);
        let last = runner.managers.values().max_by_key(|manager| manager.contacted_at);
        let (projects, groups) = match &runner.card.owner {
            Owner::Instance => (json!([]), json!([])),
            Owner::Group(id) => {
                let name = self.state.users.groups.get(id).cloned().unwrap_or_default();
                (json!([]), json!([{ "id": id, "name": name, "web_url": null }]))
            }
            Owner::Projects(ids) => {
                (ids.iter().map(|id| self.project_json(*id)).collect(), json!([]))
            }
        };
        merge(
            &mut body,
            json!({
                "tag_list": runner.options.tags,
                "run_untagged": runner.options.run_untagged,
                "locked": runner.card.locked,
                "maximum_timeout": runner.options.maximum_timeout.map(|time| time.as_secs()),
                "access_level": runner.card.access_level,
                "maintenance_note": runner.card.maintenance_note,
                "version": last.and_then(|manager| manager.info.version.clone()),
                "platform": last.and_then(|manager| manager.info.platform.clone()),
                "revision": null,
                "architecture": null,
                "contacted_at": last.map(|manager| self.time(manager.contacted_at)),
                "projects": projects,
                "groups": groups,
            }),
        );
        body
    }

    fn project_json(&self, id: i64) -> Value {
        let path = self.state.users.projects.get(&id).cloned().unwrap_or_default();
        let name = path.rsplit('/').next().unwrap_or_default();
        json!({
            "id": id, "name": name, "path": name, "path_with_namespace": path,
            "name_with_namespace": path.replace('/', " / "),
        })
    }

    pub(super) fn job(&self, job: &Job) -> Value {
        let project = self.state.users.projects.iter().find(|(_, path)| ***path == *job.project);
        let project = project.map(|(id, _)| self.project_json(*id));
        let duration = job
            .assigned_at
            .map(|from| job.finished_at.unwrap_or(self.now).saturating_sub(from).as_secs_f64());
        json!({
            "id": job.id,
            "status": job.status.name(),
            "stage": &*job.stage,
            "name": &*job.name,
            "ref": "main",
            "tag": false,
            "coverage": null,
            "allow_failure": job.allow_failure,
            "created_at": self.time(job.pending_at),
            "started_at": job.assigned_at.map(|at| self.time(at)),
            "finished_at": job.finished_at.map(|at| self.time(at)),
            "duration": duration,
            "failure_reason": job.failure_reason,
            "user": { "id": 1, "username": "user" },
            "web_url": format!("{}/{}/-/jobs/{}", self.shared.url(), job.project, job.id),
            "project": project,
        })
    }
}
