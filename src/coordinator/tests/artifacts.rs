//! Artifacts go up and come down as they do at GitLab.

use std::io::Write as _;

use reqwest::multipart::{Form, Part};

use super::*;
use crate::coordinator::{Status, Version};

fn gzip(text: &str) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(text.as_bytes()).unwrap();
    writer.finish().unwrap()
}

fn zip(name: &str) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(b"content").unwrap();
    zip.finish().unwrap().into_inner()
}

impl Bed {
    async fn post(&self, job: &Job, query: &str, content: Vec<u8>) -> Response {
        let part = Part::bytes(content).file_name("file.bin");
        self.post_form(job, query, Form::new().part("file", part)).await
    }

    async fn post_form(&self, job: &Job, query: &str, form: Form) -> Response {
        self.call(Method::POST, &format!("/jobs/{}/artifacts{query}", job.id))
            .header("job-token", &job.token)
            .multipart(form)
            .send()
            .await
            .unwrap()
    }

    async fn fetch(&self, id: i64, token: &str) -> Response {
        let path = format!("/jobs/{id}/artifacts?direct_download=true");
        self.call(Method::GET, &path).header("job-token", token).send().await.unwrap()
    }
}

async fn message(answer: Response) -> String {
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap();
    let text = body.get("message").or_else(|| body.get("error")).unwrap();
    format!("{status} {}", text.as_str().unwrap())
}

#[tokio::test]
async fn the_same_bytes_are_taken_twice_and_others_are_not() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    for _ in 0..2 {
        let answer = bed.post(&job, "", zip("a")).await;
        assert_eq!(answer.status(), 201);
        assert_eq!(answer.text().await.unwrap(), "201");
    }
    let answer = bed.post(&job, "?artifact_type=archive", zip("b")).await;
    assert_eq!(message(answer).await, "400 another artifact of the same type already exists");
    let kept = bed.gitlab.artifacts(job.id);
    assert_eq!(kept.len(), 1);
    assert_eq!((kept[0].artifact_type.as_str(), kept[0].format.as_str()), ("archive", "zip"));
    assert_eq!(kept[0].content().unwrap(), zip("a"));
    assert_eq!(bed.gitlab.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_words() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    for (query, content, expected) in [
        (
            "?artifact_type=junit&artifact_format=zip",
            zip("a"),
            "400 Validation failed: File format Invalid file format with specified file type",
        ),
        ("?artifact_type=x", zip("a"), "400 artifact_type does not have a valid value"),
        ("?artifact_format=tarzstd", zip("a"), "400 artifact_format does not have a valid value"),
        ("?artifact_type=dotenv&artifact_format=gzip", gzip("A"), "400 Invalid Format"),
        (
            "?artifact_type=annotations&artifact_format=gzip",
            gzip("[]"),
            "400 Annotations files must be a JSON object",
        ),
        (
            "?expire_in=whenever",
            zip("a"),
            "400 An invalid word \"whenever\" was used in the string to be parsed.",
        ),
    ] {
        assert_eq!(message(bed.post(&job, query, content).await).await, expected, "{query}");
    }
    let big: String = (0..21).map(|n| format!("V{n}=1\n")).collect();
    let answer = bed.post(&job, "?artifact_type=dotenv&artifact_format=gzip", gzip(&big)).await;
    assert_eq!(message(answer).await, "400 Dotenv files cannot have more than 20 variables");
    bed.gitlab.adjust(|knobs| knobs.max_artifact_size = 3);
    let answer = bed.post(&job, "", zip("a")).await;
    assert_eq!(message(answer).await, "413 file size has reached maximum size limit");
    bed.gitlab.adjust(|knobs| knobs.artifacts_off = true);
    assert_eq!(bed.post(&job, "", zip("a")).await.status(), 405);
    assert!(bed.gitlab.artifacts(job.id).is_empty());
    assert_eq!(bed.gitlab.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn forms_that_workhorse_refuses_are_violations() {
    let bed = Bed::new().await;
    let job = bed.take(NewJob::new("build")).await;
    let part = || Part::bytes(zip("a"));
    for form in [
        Form::new().part("archive", part().file_name("a.zip")),
        Form::new().part("file", part()),
        Form::new().part("file", part().file_name("a")).part("more", part().file_name("b")),
        Form::new(),
    ] {
        assert_eq!(bed.post_form(&job, "", form).await.status(), 400);
    }
    assert_eq!(bed.gitlab.violations().len(), 4, "{:#?}", bed.gitlab.violations());
    assert!(bed.gitlab.artifacts(job.id).is_empty());
}

#[tokio::test]
async fn archives_that_cannot_be_read_or_lead_outside_are_violations() {
    let bed = Bed::new().await;
    let one = bed.take(NewJob::new("one")).await;
    let two = bed.take(NewJob::new("two")).await;
    assert_eq!(bed.post(&one, "", b"no zip".to_vec()).await.status(), 201);
    assert_eq!(bed.post(&two, "", zip("../up")).await.status(), 201);
    let found = bed.gitlab.violations().join("\n");
    assert!(found.contains("cannot be read") && found.contains("../up"), "{found}");
}

#[tokio::test]
async fn only_a_job_at_work_takes_artifacts() {
    let bed = Bed::new().await.feature("cancel_gracefully", true);
    bed.verify().await;
    let job = bed.take(NewJob::new("build")).await;
    let stranger = Job { id: job.id, token: "glcbt-64_x".into(), payload: Value::Null };
    assert_eq!(bed.post(&stranger, "", zip("a")).await.status(), 403);
    bed.gitlab.cancel(job.id);
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Canceling);
    assert_eq!(bed.post(&job, "", zip("a")).await.status(), 201);
    bed.gitlab.expire_job_token(job.id);
    let answer = bed.post(&job, "", zip("a")).await;
    assert_eq!((answer.status().as_u16(), header(&answer, "job-status")), (403, None));
    assert_eq!(bed.gitlab.job(job.id).unwrap().status, Status::Canceling, "no job dies of it");
    bed.gitlab.force_cancel(job.id);
    let answer = bed.post(&job, "", zip("a")).await;
    assert_eq!(answer.status(), 403);
    assert_eq!(header(&answer, "job-status").as_deref(), Some("canceled"));
}

#[tokio::test]
async fn a_later_job_gets_files_and_variables_of_an_earlier_one() {
    for version in [Version::V16_11, Version::V17_11, Version::Current] {
        let bed = Bed::with(Options { version, ..Options::default() }).await;
        let maker = bed.take(NewJob::new("build")).await;
        bed.post(&maker, "", zip("a")).await;
        let query = "?artifact_type=dotenv&artifact_format=gzip";
        assert_eq!(bed.post(&maker, query, gzip("V=1\nW=x y\n")).await.status(), 201);
        bed.succeed(&maker, "").await;
        let user = bed.take(NewJob::new("use").needs(maker.id)).await;
        let dependency = &user.payload["dependencies"][0];
        let token = dependency["token"].as_str().unwrap();
        let size = zip("a").len();
        assert_eq!(dependency["artifacts_file"], json!({"filename": "file.bin", "size": size}));
        assert_eq!(token == user.token, version == Version::Current);
        let variables = user.payload["variables"].as_array().unwrap();
        let last = &variables[variables.len() - 1];
        assert_eq!((last["key"].as_str(), last["value"].as_str()), (Some("W"), Some("x y")));

        let answer = bed.fetch(maker.id, token).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.bytes().await.unwrap(), zip("a"));
        let old = bed.fetch(maker.id, &maker.token).await.status();
        assert_eq!(old == 200, version != Version::Current, "{old}");
        assert_eq!(bed.gitlab.violations(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn what_has_expired_fails_the_later_job_or_is_not_found() {
    let bed = Bed::new().await;
    let maker = bed.take(NewJob::new("build")).await;
    bed.post(&maker, "?expire_in=10+mins", zip("a")).await;
    let user = bed.take(NewJob::new("use").needs(maker.id)).await;
    bed.gitlab.advance(Duration::from_secs(1200));
    assert_eq!(bed.fetch(maker.id, &user.token).await.status(), 404);
    let late = bed.gitlab.enqueue(NewJob::new("late").needs(maker.id));
    assert_eq!(bed.ask().await.status(), 204);
    let late = bed.gitlab.job(late).unwrap();
    assert_eq!(late.failure_reason.as_deref(), Some("missing_dependency_failure"));
    assert_eq!(bed.fetch(4, &user.token).await.status(), 404);
    assert_eq!(bed.fetch(maker.id, "nobody").await.status(), 401);
}

#[tokio::test]
async fn the_second_host_wants_no_token() {
    let bed = Bed::new().await;
    let storage = bed.gitlab.start_object_storage().unwrap();
    let job = bed.take(NewJob::new("build")).await;
    bed.post(&job, "", zip("a")).await;
    let answer = bed.fetch(job.id, &job.token).await;
    assert_eq!(answer.status(), 302);
    let location = header(&answer, "location").unwrap();
    assert!(location.starts_with(&storage), "{location}");
    let answer = bed.http.get(&location).header("range", "bytes=5-").send().await.unwrap();
    assert_eq!(answer.status(), 206);
    assert_eq!(answer.bytes().await.unwrap(), zip("a")[5..]);
    let unsigned = location.split('?').next().unwrap();
    assert_eq!(bed.http.get(unsigned).send().await.unwrap().status(), 403);
    assert_eq!(bed.gitlab.violations(), Vec::<String>::new());
    bed.http.get(&location).header("job-token", &job.token).send().await.unwrap();
    assert_eq!(bed.violation(), "job-token was sent to another host");
    bed.gitlab.stop().await;
}
