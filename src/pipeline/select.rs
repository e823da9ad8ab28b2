//! Part of a pipeline: some jobs with all that they need.

use super::{JobIndex, Pipeline, When};

impl Pipeline {
    /// Gives the jobs of a name; the name of a `parallel` job means all its instances.
    pub fn named(&self, name: &str) -> Vec<JobIndex> {
        if let Some(place) = self.position(name) {
            return vec![place];
        }
        let jobs = self.jobs.iter().enumerate();
        jobs.filter(|(_, job)| job.family == name).map(|(place, _)| place).collect()
    }

    /// Gives the jobs whose artifacts a job gets.
    pub fn artifacts_for(&self, place: JobIndex) -> Vec<JobIndex> {
        let Some(job) = self.jobs.get(place) else { return Vec::new() };
        let listed =
            |name: &String| job.dependencies.as_ref().is_none_or(|names| names.contains(name));
        match &job.needs {
            Some(needs) => needs
                .iter()
                .filter(|need| need.artifacts && listed(&need.job))
                .filter_map(|need| self.position(&need.job))
                .collect(),
            None => self.earlier(place).filter(|place| self.named_in(*place, &listed)).collect(),
        }
    }

    fn named_in(&self, place: JobIndex, listed: &dyn Fn(&String) -> bool) -> bool {
        self.jobs.get(place).is_some_and(|job| listed(&job.name))
    }

    /// The jobs of the stages before a job's own.
    fn earlier(&self, place: JobIndex) -> impl Iterator<Item = JobIndex> + '_ {
        let rank = |stage: &str| self.stages.iter().position(|known| known == stage);
        let own = self.jobs.get(place).and_then(|job| rank(&job.stage));
        (0..self.jobs.len())
            .filter(move |other| self.jobs.get(*other).and_then(|job| rank(&job.stage)) < own)
    }

    /// Gives the pipeline that is left of this one for some jobs and what they need.
    ///
    /// A job without `needs` needs those of its `dependencies`, or else all of earlier stages that
    /// run by themselves when all goes well.
    #[must_use]
    pub fn only(&self, wanted: &[JobIndex]) -> Self {
        let mut kept = vec![false; self.jobs.len()];
        let mut open = wanted.to_vec();
        while let Some(place) = open.pop() {
            let Some(job) = self.jobs.get(place) else { continue };
            if std::mem::replace(&mut kept[place], true) {
                continue;
            }
            match (&job.needs, &job.dependencies) {
                (Some(needs), _) => {
                    open.extend(needs.iter().filter_map(|need| self.position(&need.job)));
                }
                (None, Some(names)) => {
                    open.extend(names.iter().filter_map(|name| self.position(name)));
                }
                (None, None) => open.extend(self.earlier(place).filter(|place| {
                    let when = self.jobs.get(*place).map(|job| job.when);
                    matches!(when, Some(When::OnSuccess | When::Always))
                })),
            }
        }
        let jobs = self.jobs.iter().zip(&kept).filter(|(_, kept)| **kept);
        Self { jobs: jobs.map(|(job, _)| job.clone()).collect(), ..self.clone() }
    }
}
