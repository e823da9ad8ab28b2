//! `bridge exec --artifacts`: what jobs left, unpacked into a folder.

use std::fs::File;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};

use crate::archive::{self, Bounds};
use crate::coordinator::{ArtifactView, Coordinator};
use crate::pipeline::Pipeline;

/// Gives each job's folder: its name, without what would make it several folders.
pub(super) fn folders(pipeline: &Pipeline, dir: &Utf8Path) -> Vec<Utf8PathBuf> {
    let mut taken: Vec<String> = Vec::new();
    for job in &pipeline.jobs {
        let clean = |c: char| if c == '/' || c.is_control() { '_' } else { c };
        let plain: String = job.name.chars().map(clean).collect();
        let plain = if matches!(plain.as_str(), "." | "..") { "_".to_owned() } else { plain };
        let mut name = plain.clone();
        let mut count = 1;
        while taken.contains(&name) {
            count += 1;
            name = format!("{plain}-{count}");
        }
        taken.push(name);
    }
    taken.into_iter().map(|name| dir.join(name)).collect()
}

/// Writes what a job left: the archive's files as they were, each report as it was sent.
pub(super) async fn keep(
    coordinator: &Coordinator,
    ci_job: i64,
    folder: &Utf8Path,
) -> anyhow::Result<Vec<String>> {
    let artifacts = coordinator.artifacts(ci_job);
    if artifacts.is_empty() {
        return Ok(Vec::new());
    }
    let into = folder.to_owned();
    let kept = tokio::task::spawn_blocking(move || write(&artifacts, &into)).await?;
    kept.with_context(|| format!("write the artifacts below {folder}"))
}

fn write(artifacts: &[ArtifactView], folder: &Utf8Path) -> anyhow::Result<Vec<String>> {
    let mut warnings = Vec::new();
    std::fs::create_dir_all(folder)?;
    for artifact in artifacts {
        if artifact.artifact_type == "archive" {
            let file = File::open(artifact.file())?;
            let stop = AtomicBool::new(false);
            let done = archive::unpack(&file, folder, &Bounds::default(), &stop)?;
            warnings.extend(done.warnings);
        } else {
            // The name is what the runner sent.
            let name = Utf8Path::new(&artifact.file_name).file_name().unwrap_or("report");
            let reports = folder.join(".reports").join(&artifact.artifact_type);
            std::fs::create_dir_all(&reports)?;
            std::fs::copy(artifact.file(), reports.join(name))?;
        }
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::coordinator::{NewJob, Options};
    use crate::pipeline::Job;

    fn zip(name: &str, content: &[u8]) -> Vec<u8> {
        let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        writer.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
        writer.write_all(content).unwrap();
        writer.finish().unwrap().into_inner()
    }

    #[tokio::test]
    async fn an_archive_is_unpacked_and_a_report_kept_as_it_was_sent() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let coordinator = Coordinator::start(Options::default()).await.unwrap();
        let id = coordinator.enqueue(NewJob::new("build").script("true"));
        let packed = zip("out/a.txt", b"made");
        coordinator.put_artifact(id, "archive", "zip", "artifacts.zip", &packed).unwrap();
        coordinator.put_artifact(id, "junit", "gzip", "junit.xml.gz", b"sent").unwrap();
        let folder = dir.join("build");
        assert_eq!(keep(&coordinator, id, &folder).await.unwrap(), Vec::<String>::new());
        assert_eq!(std::fs::read_to_string(folder.join("out/a.txt")).unwrap(), "made");
        let report = folder.join(".reports/junit/junit.xml.gz");
        assert_eq!(std::fs::read_to_string(report).unwrap(), "sent");
        coordinator.stop().await;
    }

    #[test]
    fn every_job_has_a_folder_of_its_own() {
        let named = |name: &str| Job { name: name.to_owned(), ..Job::default() };
        let pipeline = Pipeline {
            jobs: vec![named("a/b"), named("a_b"), named(".."), named("t: [x, y]")],
            ..Pipeline::default()
        };
        let folders = folders(&pipeline, Utf8Path::new("out"));
        assert_eq!(folders, ["out/a_b", "out/a_b-2", "out/_", "out/t: [x, y]"]);
    }
}
