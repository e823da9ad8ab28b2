//! From what the file says to the jobs of this one pipeline: rules, instances, variables.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

use super::error::Findings;
use super::expand::Scope;
use super::glob::Pattern;
use super::parts::{CacheDraft, CacheKey, Parallel, combinations, instance_name, set_variable};
use super::project::slug;
use super::read::{Draft, Drafts, Wish, Workflow};
use super::rules::{Rule, RuleWhen};
use super::{AllowFailure, Cache, Job, LeftOut, LoadOptions, Need, Project, Variable, When};

/// Length of a key made from files; as long as GitLab's.
const KEY_LENGTH: usize = 40;

/// The jobs of the pipeline before they are compared with each other.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) stages: Vec<String>,
    pub(super) name: Option<String>,
    pub(super) jobs: Vec<Planned>,
    pub(super) left_out: Vec<LeftOut>,
}

/// A job with the lines that later messages point to.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) job: Job,
    pub(super) stage_line: usize,
    /// One for each of the job's needs.
    pub(super) need_lines: Vec<usize>,
}

/// One of the jobs that `parallel` makes of one.
struct Instance {
    name: String,
    variables: Vec<Variable>,
    /// Its place among the instances, and their number.
    node: Option<(usize, usize)>,
}

/// Decides which jobs there are.
pub(super) fn plan(drafts: Drafts, options: &LoadOptions, findings: &mut Findings) -> Plan {
    let Drafts { stages, variables, workflow, jobs } = drafts;
    let mut globals: Vec<Variable> = Vec::new();
    for global in variables {
        let name = &global.variable.name;
        let given = options.variables.iter().rfind(|variable| variable.name == *name);
        if let (Some(given), Some(known)) = (given, &global.options)
            && !known.contains(&given.value)
        {
            let message = format!(
                "variable `{name}` is given as `{}`, which is none of {}",
                given.value,
                known.join(", ")
            );
            findings.problem(1, None, message);
        }
        globals.push(global.variable);
    }
    let mut scope = Scope::default();
    scope.add(&options.project.variables);
    scope.add(&globals);
    scope.add(&options.variables);
    if !start(&workflow, &scope, &options.project, &mut globals, findings) {
        return Plan { stages, ..Plan::default() };
    }
    scope.add(&globals);
    scope.add(&options.variables);
    let name = workflow.name.as_ref().map(|name| scope.expand_nested(name));
    let families: BTreeMap<String, Vec<Instance>> =
        jobs.iter().filter_map(|draft| Some((draft.name.clone(), instances(draft)?))).collect();
    let triggers: Vec<String> =
        jobs.iter().filter(|draft| draft.trigger).map(|draft| draft.name.clone()).collect();
    let known: Vec<String> = jobs.iter().map(|draft| draft.name.clone()).collect();
    let mut planner = Planner { options, globals, families, triggers, known, findings };
    let mut plan = Plan { stages, name, ..Plan::default() };
    for draft in &jobs {
        planner.draft(draft, &mut plan);
    }
    plan
}

/// Asks the workflow's rules whether there is a pipeline at all, and takes over their variables.
fn start(
    workflow: &Workflow,
    scope: &Scope,
    project: &Project,
    globals: &mut Vec<Variable>,
    findings: &mut Findings,
) -> bool {
    let Some(rules) = &workflow.rules else { return true };
    match first(rules, scope, project) {
        Ok(Some(rule)) if rule.when != Some(RuleWhen::Never) => {
            for variable in &rule.variables {
                set_variable(globals, variable.clone());
            }
            return true;
        }
        Ok(Some(rule)) => {
            let message = "`workflow: rules` start no pipeline: this one says never";
            findings.problem(rule.line, None, message);
        }
        Ok(None) => {
            let source = scope.get("CI_PIPELINE_SOURCE").unwrap_or("push").to_owned();
            let message = format!(
                "`workflow: rules` start no pipeline: none fits `{}` with CI_PIPELINE_SOURCE={source}",
                project.ref_name
            );
            findings.problem(workflow.line, None, message);
        }
        Err((line, message)) => findings.problem(line, None, message),
    }
    false
}

fn first<'a>(
    rules: &'a [Rule],
    scope: &Scope,
    project: &Project,
) -> Result<Option<&'a Rule>, (usize, String)> {
    for rule in rules {
        if rule.matches(scope, project).map_err(|message| (rule.line, message))? {
            return Ok(Some(rule));
        }
    }
    Ok(None)
}

fn instances(draft: &Draft) -> Option<Vec<Instance>> {
    let base = &draft.name;
    Some(match draft.parallel.as_ref()? {
        Parallel::Count(count) => {
            let total = usize::try_from(*count).unwrap_or(usize::MAX);
            let instance = |place: usize| Instance {
                name: format!("{base} {place}/{total}"),
                variables: Vec::new(),
                node: Some((place, total)),
            };
            (1..=total).map(instance).collect()
        }
        Parallel::Matrix(matrix) => {
            let rows = combinations(matrix);
            let total = rows.len();
            let instance = |(place, variables): (usize, Vec<Variable>)| Instance {
                name: instance_name(base, &variables),
                variables,
                node: Some((place + 1, total)),
            };
            rows.into_iter().enumerate().map(instance).collect()
        }
    })
}

/// What a job's rules made of it.
struct Ruled<'a> {
    when: When,
    allow_failure: AllowFailure,
    variables: &'a [Variable],
    needs: Option<&'a Vec<Wish>>,
}

struct Planner<'a> {
    options: &'a LoadOptions,
    globals: Vec<Variable>,
    families: BTreeMap<String, Vec<Instance>>,
    triggers: Vec<String>,
    known: Vec<String>,
    findings: &'a mut Findings,
}

impl Planner<'_> {
    fn draft(&mut self, draft: &Draft, plan: &mut Plan) {
        let single = || Instance { name: draft.name.clone(), variables: Vec::new(), node: None };
        let instances = instances(draft).unwrap_or_else(|| vec![single()]);
        for instance in instances {
            let left = |why: String| LeftOut {
                name: instance.name.clone(),
                stage: draft.stage.clone(),
                why,
            };
            if draft.trigger {
                let what = "`trigger`, which starts another pipeline, is not supported; the job is left out";
                self.findings.note(draft.line, Some(&instance.name), what);
                plan.left_out.push(left("a `trigger` job".to_owned()));
                continue;
            }
            if draft.incomplete {
                plan.left_out.push(left("the rest of it is in an ignored include".to_owned()));
                continue;
            }
            let variables = self.variables(draft, &instance);
            let scope = self.scope(draft, &instance, &variables);
            match self.ruled(draft, &scope) {
                Ok(Ok(ruled)) => {
                    let planned = self.job(draft, &instance, &ruled, variables);
                    plan.jobs.push(planned);
                }
                Ok(Err(why)) => plan.left_out.push(left(why)),
                Err((line, message)) => {
                    self.findings.problem(line, Some(&instance.name), message);
                }
            }
        }
    }

    /// Gives the job's variables without those of a rule.
    fn variables(&self, draft: &Draft, instance: &Instance) -> Vec<Variable> {
        let mut variables = Vec::new();
        if let Some((place, total)) = instance.node {
            variables.push(Variable::new("CI_NODE_INDEX", place.to_string()));
            variables.push(Variable::new("CI_NODE_TOTAL", total.to_string()));
        }
        let inherited =
            self.globals.iter().filter(|variable| draft.inherit_variables.takes(&variable.name));
        for variable in inherited.chain(&draft.variables).chain(&instance.variables) {
            set_variable(&mut variables, variable.clone());
        }
        variables
    }

    fn scope(&self, draft: &Draft, instance: &Instance, variables: &[Variable]) -> Scope {
        let mut scope = Scope::default();
        scope.add(&self.options.project.variables);
        scope.add(&[
            Variable::new("CI_JOB_NAME", &instance.name),
            Variable::new("CI_JOB_NAME_SLUG", slug(&instance.name)),
            Variable::new("CI_JOB_STAGE", &draft.stage),
        ]);
        scope.add(variables);
        scope.add(&self.options.variables);
        scope
    }

    /// Asks rules or policies; the inner error says why the job is not in the pipeline.
    fn ruled<'d>(
        &self,
        draft: &'d Draft,
        scope: &Scope,
    ) -> Result<Result<Ruled<'d>, String>, (usize, String)> {
        let project = &self.options.project;
        // A manual job that says nothing else must not hold up those after it.
        let unsaid =
            if draft.when == When::Manual { AllowFailure::Always } else { AllowFailure::Never };
        let own = draft.allow_failure.clone().unwrap_or(unsaid);
        let plain =
            Ruled { when: draft.when, allow_failure: own.clone(), variables: &[], needs: None };
        let Some(rules) = &draft.rules else {
            if let Some(only) = &draft.only
                && let Some(lacks) =
                    only.lacks(scope, project).map_err(|error| (only.line, error))?
            {
                return Ok(Err(format!("`only: {lacks}` does not fit")));
            }
            if let Some(except) = &draft.except
                && let Some(has) =
                    except.has(scope, project).map_err(|error| (except.line, error))?
            {
                return Ok(Err(format!("`except: {has}` fits")));
            }
            return Ok(Ok(plain));
        };
        let Some(rule) = first(rules, scope, project)? else {
            return Ok(Err("no rule fits".to_owned()));
        };
        let when = match rule.when {
            Some(RuleWhen::Never) => {
                let (file, line) = self.findings.place(rule.line);
                return Ok(Err(format!("the rule at {file}:{line} says never")));
            }
            Some(RuleWhen::Job(when)) => when,
            None => draft.when,
        };
        let allow_failure = match rule.allow_failure {
            Some(true) => AllowFailure::Always,
            Some(false) => AllowFailure::Never,
            None => own,
        };
        let needs = rule.needs.as_ref();
        Ok(Ok(Ruled { when, allow_failure, variables: &rule.variables, needs }))
    }

    fn job(
        &mut self,
        draft: &Draft,
        instance: &Instance,
        ruled: &Ruled<'_>,
        mut variables: Vec<Variable>,
    ) -> Planned {
        for variable in ruled.variables {
            set_variable(&mut variables, variable.clone());
        }
        let scope = self.scope(draft, instance, &variables);
        if let Some(environment) = &draft.environment {
            let name = scope.expand_nested(&environment.name);
            let mut told = vec![
                Variable::new("CI_ENVIRONMENT_NAME", name.clone()),
                Variable::new("CI_ENVIRONMENT_SLUG", slug(&name)),
            ];
            let action = environment.action.as_deref().unwrap_or("start");
            told.push(Variable::new("CI_ENVIRONMENT_ACTION", action));
            if let Some(url) = &environment.url {
                told.push(Variable::new("CI_ENVIRONMENT_URL", url.clone()));
            }
            if let Some(tier) = &environment.tier {
                told.push(Variable::new("CI_ENVIRONMENT_TIER", tier.clone()));
            }
            told.append(&mut variables);
            variables = told;
        }
        for given in &self.options.variables {
            set_variable(&mut variables, given.clone());
        }
        let wishes = ruled.needs.or(draft.needs.as_ref());
        let (needs, need_lines) = match wishes {
            None => (None, Vec::new()),
            Some(wishes) => {
                let (needs, lines) = self.needs(&instance.name, wishes, &instance.variables);
                (Some(needs), lines)
            }
        };
        let dependencies = draft.dependencies.as_ref().map(|(names, line)| {
            names.iter().flat_map(|name| self.dependency(&instance.name, name, *line)).collect()
        });
        let (file, line) = self.findings.place(draft.line);
        let job = Job {
            name: instance.name.clone(),
            family: draft.name.clone(),
            stage: draft.stage.clone(),
            file: file.to_owned(),
            line,
            script: draft.script.clone(),
            after_script: draft.after_script.clone(),
            variables,
            needs,
            dependencies,
            allow_failure: ruled.allow_failure.clone(),
            timeout: draft.timeout,
            when: ruled.when,
            artifacts: draft.artifacts.clone(),
            caches: draft.caches.iter().map(|cache| self.cache(cache)).collect(),
            retry: draft.retry.clone(),
            image: draft.image.clone(),
            services: draft.services.clone(),
            hooks: draft.hooks.clone(),
        };
        Planned { job, stage_line: draft.stage_line, need_lines }
    }

    /// Writes needs of a family out to its members.
    fn needs(&mut self, job: &str, wishes: &[Wish], own: &[Variable]) -> (Vec<Need>, Vec<usize>) {
        let mut needs = Vec::new();
        for wish in wishes {
            if self.triggers.contains(&wish.job) {
                let message = format!("does not wait for `{}`, which is a `trigger` job", wish.job);
                self.findings.note(wish.line, Some(job), message);
                continue;
            }
            let names = match (&wish.matrix, self.families.get(&wish.job)) {
                (Some(matrix), Some(family)) => {
                    let mut wanted = Vec::new();
                    for row in combinations(matrix) {
                        let row: Vec<Variable> = row
                            .into_iter()
                            .map(|v| Variable { value: from_matrix(&v.value, own), ..v })
                            .collect();
                        let name = instance_name(&wish.job, &row);
                        if !family.iter().any(|instance| instance.name == name) {
                            let message = format!("needs `{name}`, which `{}` has not", wish.job);
                            self.findings.problem(wish.line, Some(job), message);
                            continue;
                        }
                        wanted.push(name);
                    }
                    wanted
                }
                (None, Some(family)) => family.iter().map(|one| one.name.clone()).collect(),
                (_, None) => vec![wish.job.clone()],
            };
            let need =
                |name| Need { job: name, optional: wish.optional, artifacts: wish.artifacts };
            needs.extend(names.into_iter().map(|name| (need(name), wish.line)));
        }
        needs.into_iter().unzip()
    }

    fn dependency(&mut self, job: &str, name: &str, line: usize) -> Vec<String> {
        if let Some(family) = self.families.get(name) {
            return family.iter().map(|one| one.name.clone()).collect();
        }
        let member = self.families.values().flatten().any(|one| one.name == name);
        if !member && !self.known.iter().any(|known| known == name) {
            let message = format!("depends on `{name}`, which is no job of this pipeline");
            self.findings.missing(line, Some(job), &message);
            return Vec::new();
        }
        vec![name.to_owned()]
    }

    fn cache(&self, draft: &CacheDraft) -> Cache {
        let mut cache = draft.cache.clone();
        let key = match &draft.key {
            CacheKey::Text(key) => key.clone(),
            CacheKey::Files { files, prefix } => {
                let digest = digest(files, &self.options.project);
                if prefix.is_empty() { digest } else { format!("{prefix}-{digest}") }
            }
        };
        // As GitLab keeps the caches of protected branches apart from others.
        let suffix = if draft.unprotect { "" } else { "-protected" };
        cache.key = format!("{key}{suffix}");
        for key in &mut cache.fallback_keys {
            key.push_str(suffix);
        }
        cache
    }
}

/// Replaces `$[[ matrix.NAME ]]` by the job's own value.
fn from_matrix(text: &str, own: &[Variable]) -> String {
    let hole = text.trim().strip_prefix("$[[").and_then(|rest| rest.strip_suffix("]]"));
    let name = hole.and_then(|hole| hole.trim().strip_prefix("matrix."));
    let value = name.and_then(|name| own.iter().find(|variable| variable.name == name));
    value.map_or_else(|| text.to_owned(), |variable| variable.value.clone())
}

/// Makes a key from the contents of files; `default` when there are none.
fn digest(files: &[String], project: &Project) -> String {
    let patterns: Vec<Pattern> = files.iter().map(|file| Pattern::new(file)).collect();
    let mut blobs: Vec<&str> = project
        .files
        .iter()
        .filter(|file| patterns.iter().any(|pattern| pattern.matches(&file.path)))
        .map(|file| file.blob.as_str())
        .collect();
    blobs.sort_unstable();
    blobs.dedup();
    if blobs.is_empty() {
        return "default".to_owned();
    }
    let mut digest = String::with_capacity(2 * 32);
    for byte in Sha256::digest(blobs.join("-").as_bytes()) {
        use std::fmt::Write as _;
        // Writing to a string cannot fail.
        if write!(digest, "{byte:02x}").is_err() {
            break;
        }
    }
    digest.truncate(KEY_LENGTH);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_matrix_are_gitlab_s() {
        let matrix = vec![
            vec![
                ("OS".to_owned(), vec!["linux".to_owned(), "mac".to_owned()]),
                ("ARCH".to_owned(), vec!["x86".to_owned()]),
            ],
            vec![("OS".to_owned(), vec!["bsd".to_owned()])],
        ];
        let names: Vec<String> =
            combinations(&matrix).iter().map(|row| instance_name("b", row)).collect();
        assert_eq!(names, ["b: [linux, x86]", "b: [mac, x86]", "b: [bsd]"]);
    }
}
