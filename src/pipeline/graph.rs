//! What only the whole file can tell: stages that exist, needs that can be met, an order at all.

use std::collections::{HashMap, HashSet};

use super::error::Findings;
use super::plan::{Plan, Planned};
use super::yaml::Entry;
use super::{Job, LeftOut, Need};

/// Checks the jobs against each other and puts them in the order of their stages.
///
/// `written` is the file as it stands, so that a job which could not be read is not also missed.
pub(super) fn check(plan: &mut Plan, written: &[Entry], findings: &mut Findings) -> Vec<Job> {
    let mut jobs = std::mem::take(&mut plan.jobs);
    let (stages, left_out) = (&plan.stages, &plan.left_out);
    if jobs.is_empty() {
        // When jobs are there but none could be read, the reasons have been given.
        if findings.is_clean() && left_out.is_empty() {
            findings.missing(1, None, "has no jobs");
        }
        return Vec::new();
    }
    check_stages(stages, &jobs, findings);
    let place = |draft: &Planned| stages.iter().position(|stage| *stage == draft.job.stage);
    jobs.sort_by_key(place);
    check_needs(stages, &mut jobs, written, left_out, findings);
    jobs.into_iter().map(|draft| draft.job).collect()
}

fn check_stages(stages: &[String], jobs: &[Planned], findings: &mut Findings) {
    for Planned { job, stage_line, .. } in jobs {
        if !stages.contains(&job.stage) {
            let message =
                format!("stage `{}` does not exist; there are {}", job.stage, stages.join(", "));
            findings.problem(*stage_line, Some(&job.name), message);
        }
    }
    if let Some(first) = jobs.first()
        && jobs.iter().all(|draft| matches!(draft.job.stage.as_str(), ".pre" | ".post"))
    {
        let message = "has jobs in `.pre` and `.post` only, for which GitLab starts no pipeline";
        findings.problem(first.job.line, None, message);
    }
}

fn check_needs(
    stages: &[String],
    jobs: &mut [Planned],
    written: &[Entry],
    left_out: &[LeftOut],
    findings: &mut Findings,
) {
    let places: HashMap<String, usize> = jobs
        .iter()
        .map(|draft| {
            let place = stages.iter().position(|stage| *stage == draft.job.stage);
            (draft.job.name.clone(), place.unwrap_or(0))
        })
        .collect();
    let unread: HashSet<&str> = written.iter().map(|entry| entry.key.as_str()).collect();
    for Planned { job, need_lines, .. } in jobs.iter_mut() {
        let Some(needs) = job.needs.take() else { continue };
        let own = places.get(&job.name).copied().unwrap_or(0);
        let mut kept: Vec<Need> = Vec::new();
        for (need, line) in needs.into_iter().zip(need_lines.iter().copied()) {
            let wanted = &need.job;
            match places.get(wanted) {
                None if left_out.iter().any(|left| left.name == *wanted) => {
                    if !need.optional {
                        let why = left_out.iter().find(|left| left.name == *wanted);
                        let why = why.map_or("", |left| left.why.as_str());
                        let message = format!(
                            "needs `{wanted}`, which is not in the pipeline ({why}); `optional: true` would do"
                        );
                        findings.problem(line, Some(&job.name), message);
                    }
                    continue;
                }
                None => {
                    let unreadable = unread.contains(wanted.as_str()) && !wanted.starts_with('.');
                    if !need.optional && (!unreadable || findings.is_clean()) {
                        let message = format!("needs `{wanted}`, which is no job of this pipeline");
                        findings.missing(line, Some(&job.name), &message);
                    }
                    continue;
                }
                Some(_) if *wanted == job.name => {
                    findings.problem(line, Some(&job.name), "needs itself");
                    continue;
                }
                Some(place) if *place > own => {
                    let message = format!("needs `{wanted}`, which is in a later stage");
                    findings.problem(line, Some(&job.name), message);
                    continue;
                }
                Some(_) => {}
            }
            if kept.iter().any(|known| known.job == *wanted) {
                let message = format!("needs `{wanted}` twice");
                findings.problem(line, Some(&job.name), message);
                continue;
            }
            kept.push(need);
        }
        job.needs = Some(kept);
    }
    check_circles(jobs, findings);
}

/// Reports every circle of needs once.
fn check_circles(jobs: &[Planned], findings: &mut Findings) {
    let places: HashMap<&str, usize> =
        jobs.iter().enumerate().map(|(place, draft)| (draft.job.name.as_str(), place)).collect();
    let needs: Vec<Vec<usize>> = jobs
        .iter()
        .map(|draft| {
            let needs = draft.job.needs.as_deref().unwrap_or_default();
            needs.iter().filter_map(|need| places.get(need.job.as_str()).copied()).collect()
        })
        .collect();
    let mut free = vec![false; jobs.len()];
    loop {
        // Takes away whatever could run; what remains waits for a circle or is in one.
        loop {
            let next: Vec<usize> = (0..jobs.len())
                .filter(|place| !free[*place] && needs[*place].iter().all(|need| free[*need]))
                .collect();
            if next.is_empty() {
                break;
            }
            for place in next {
                free[place] = true;
            }
        }
        let Some(mut place) = free.iter().position(|free| !free) else { return };
        let mut walk: Vec<usize> = Vec::new();
        let circle = loop {
            if let Some(start) = walk.iter().position(|seen| *seen == place) {
                break walk.split_off(start);
            }
            walk.push(place);
            match needs[place].iter().find(|need| !free[**need]) {
                Some(need) => place = *need,
                None => return,
            }
        };
        let mut names: Vec<&str> =
            circle.iter().map(|place| jobs[*place].job.name.as_str()).collect();
        if let (Some(first), Some(name)) = (circle.first(), names.first().copied()) {
            names.push(name);
            let message = format!("`needs` goes round in a circle: {}", names.join(" → "));
            let draft = &jobs[*first];
            let line = draft.need_lines.first().copied().unwrap_or(draft.job.line);
            findings.problem(line, Some(name), message);
        }
        for place in circle {
            free[place] = true;
        }
    }
}
