//! Uploads and downloads against the coordinator, and against single odd answers.

use camino::Utf8Path;
use sha2::Digest as _;
use wiremock::matchers::{any, header_exists, method, path};
use wiremock::{Mock, MockServer, ResponseTemplate};

use super::*;
use crate::coordinator::{Coordinator, Endpoint, Fault, NewJob, Options, RunnerOptions};

const JOB_TOKEN: &str = "glcbt-64_secret-of-the-job";

fn client_at(url: &str) -> Client {
    client_with(url, Timeouts::default())
}

fn client_with(url: &str, timeouts: Timeouts) -> Client {
    let _was_installed_before = rustls::crypto::ring::default_provider().install_default();
    let mut options = ClientOptions::new(url.parse().unwrap());
    options.timeouts = timeouts;
    Client::new(options).unwrap()
}

/// A directory with a file in it.
struct Dir {
    _dir: tempfile::TempDir,
    path: Utf8PathBuf,
}

impl Dir {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
        Self { _dir: dir, path }
    }

    fn file(&self, name: &str, content: &[u8]) -> Utf8PathBuf {
        let path = self.path.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

/// A zip with one stored file of so many bytes, which no packer makes smaller.
fn zip(bytes: usize) -> Vec<u8> {
    use std::io::Write as _;
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    zip.start_file("data.bin", options).unwrap();
    let content: Vec<u8> = (0..bytes).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect();
    zip.write_all(&content).unwrap();
    zip.finish().unwrap().into_inner()
}

fn upload<'a>(file: &'a Utf8Path) -> ArtifactUpload<'a> {
    ArtifactUpload {
        file,
        file_name: "artifacts.zip",
        format: "zip",
        artifact_type: "archive",
        expire_in: "1 week",
    }
}

/// A coordinator, a client of it, and a job that was handed out.
struct Bed {
    gitlab: Coordinator,
    client: Client,
    runner: Secret,
    job: CiJobId,
    token: Secret,
    dir: Dir,
}

impl Bed {
    async fn new() -> Self {
        Self::with(Options::default(), Timeouts::default()).await
    }

    async fn with(options: Options, timeouts: Timeouts) -> Self {
        let gitlab = Coordinator::start(options).await.unwrap();
        let runner = Secret::new(gitlab.add_runner(RunnerOptions::default()));
        let client = client_with(&gitlab.url(), timeouts);
        let (job, token) = take(&gitlab, &client, &runner, NewJob::new("build")).await;
        Self { gitlab, client, runner, job, token, dir: Dir::new() }
    }

    fn auth(&self) -> JobAuth<'_> {
        JobAuth { id: self.job, token: &self.token }
    }

    async fn up(&self, file: &Utf8Path) -> Result<UploadAnswer, Error> {
        self.client.upload_artifact(self.auth(), &upload(file)).await
    }

    async fn down(&self, direct: bool, into: &mut PartialFile) -> Result<DownloadAnswer, Error> {
        self.client.download_artifact(self.auth(), direct, 1 << 30, into).await
    }
}

async fn take(
    gitlab: &Coordinator,
    client: &Client,
    runner: &Secret,
    job: NewJob,
) -> (CiJobId, Secret) {
    gitlab.enqueue(job);
    let info = Info::new(InfoOptions { name: "bridge".into(), ..InfoOptions::default() });
    let reply = client.request_job(runner, "s_0123456789ab", &info, None).await.unwrap();
    let RequestReply::Job(job) = reply else { panic!("{reply:?}") };
    (CiJobId(job.payload.id), job.payload.token.clone())
}

#[tokio::test]
async fn an_upload_arrives_as_it_was_and_may_be_repeated() {
    let bed = Bed::new().await;
    let content = zip(3_000_000);
    let file = bed.dir.file("a.zip", &content);
    for _ in 0..2 {
        let answer = bed.up(&file).await.unwrap();
        assert_eq!((answer.reply, answer.status), (UploadArtifactReply::Stored, 201));
        assert_eq!(answer.request_id.len(), 32);
    }
    let kept = bed.gitlab.artifacts(bed.job.0);
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(kept[0].content().unwrap(), content);
    assert_eq!(kept[0].file_name, "artifacts.zip");
    assert_eq!(kept[0].expire_in.as_deref(), Some("1 week"));
    let digest = sha2::Sha256::digest(&content);
    assert_eq!(kept[0].sha256, digest.iter().map(|b| format!("{b:02x}")).collect::<String>());

    let other = bed.dir.file("b.zip", &zip(10));
    let answer = bed.up(&other).await.unwrap();
    let UploadArtifactReply::Refused { message } = answer.reply else { panic!("{answer:?}") };
    assert_eq!(message, "another artifact of the same type already exists");
    assert_eq!(bed.gitlab.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn an_upload_cut_at_any_tenth_is_an_error_and_the_next_one_arrives() {
    let bed = Bed::new().await;
    let content = zip(2_000_000);
    let file = bed.dir.file("a.zip", &content);
    let len = u64::try_from(content.len()).unwrap();
    for tenth in 0..10 {
        bed.gitlab.cut_upload(len * tenth / 10);
        let error = bed.up(&file).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient, "{error}");
        assert!(error.may_have_arrived(), "{error}");
        assert!(bed.gitlab.artifacts(bed.job.0).is_empty());
    }
    // Whole, but nobody heard that it was.
    bed.gitlab.inject(Endpoint::UploadArtifact, Fault::lost_answer());
    bed.up(&file).await.unwrap_err();
    assert_eq!(bed.up(&file).await.unwrap().reply, UploadArtifactReply::Stored);
    let kept = bed.gitlab.artifacts(bed.job.0);
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].content().unwrap(), content);
    assert_eq!(bed.gitlab.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_token_that_expires_during_an_upload_is_a_403_and_the_job_lives() {
    let bed = Bed::new().await;
    let file = bed.dir.file("a.zip", &zip(100_000));
    let gate = crate::coordinator::Gate::new();
    bed.gitlab.inject(Endpoint::UploadArtifact, Fault::hold(&gate));
    let expire = async {
        let there = |gitlab: &Coordinator| gitlab.requests().of(Endpoint::UploadArtifact) == 1;
        bed.gitlab.wait_until(there, Duration::from_secs(20)).await.unwrap();
        bed.gitlab.expire_job_token(bed.job.0);
        gate.open();
    };
    let (answer, ()) = tokio::join!(bed.up(&file), expire);
    let answer = answer.unwrap();
    assert!(matches!(answer.reply, UploadArtifactReply::Forbidden { .. }), "{answer:?}");
    assert_eq!(bed.gitlab.job(bed.job.0).unwrap().status, crate::coordinator::Status::Running);
}

#[tokio::test]
async fn every_status_of_an_upload_is_a_reply() {
    let bed = Bed::new().await;
    let file = bed.dir.file("a.zip", &zip(10));
    let asked = |fault: Fault| {
        bed.gitlab.inject(Endpoint::UploadArtifact, fault);
        bed.up(&file)
    };
    let soon = Some(Duration::from_secs(7));
    let fault = Fault::status(503).header("Retry-After", "7");
    assert_eq!(
        asked(fault).await.unwrap().reply,
        UploadArtifactReply::Unavailable { retry_after: soon }
    );
    let fault = Fault::status(429).header("Retry-After", "7");
    assert_eq!(asked(fault).await.unwrap().reply, UploadArtifactReply::Busy { retry_after: soon });
    for status in [500, 502, 504, 408] {
        let answer = asked(Fault::status(status)).await.unwrap();
        assert_eq!(answer.reply, UploadArtifactReply::Busy { retry_after: None }, "{status}");
    }
    let refused = Fault::status(403).header("Job-Status", "canceled");
    let UploadArtifactReply::Forbidden { job_status, .. } = asked(refused).await.unwrap().reply
    else {
        panic!()
    };
    assert_eq!(job_status, Some(CiStatus::Canceled));
    let reply = |answer: UploadAnswer| answer.reply;
    assert!(matches!(
        reply(asked(Fault::status(401)).await.unwrap()),
        UploadArtifactReply::Forbidden { .. }
    ));
    assert!(matches!(
        reply(asked(Fault::status(418)).await.unwrap()),
        UploadArtifactReply::Unexpected { .. }
    ));
    let html = Fault::status(403).body("text/html", "<html>login</html>");
    assert_eq!(asked(html).await.unwrap_err().kind(), ErrorKind::Transient);

    bed.gitlab.adjust(|knobs| knobs.max_artifact_size = 10);
    assert_eq!(bed.up(&file).await.unwrap().reply, UploadArtifactReply::TooLarge);
    bed.gitlab.adjust(|knobs| knobs.artifacts_off = true);
    assert_eq!(bed.up(&file).await.unwrap().reply, UploadArtifactReply::SwitchedOff);
    bed.gitlab.force_cancel(bed.job.0);
    let answer = bed.up(&file).await.unwrap();
    assert!(matches!(answer.reply, UploadArtifactReply::Forbidden { .. }), "{answer:?}");
}

#[tokio::test]
async fn an_upload_that_moves_outlives_every_timeout_and_one_that_does_not_ends() {
    // Less than the whole takes, and far more than there is between two pieces.
    let (short, long) = (Duration::from_millis(50), Duration::from_secs(60));
    let timeouts = Timeouts { call: short, idle: long, ..Timeouts::default() };
    let bed = Bed::with(Options::default(), Timeouts::default()).await;
    let file = bed.dir.file("a.zip", &zip(12_000_000));
    bed.gitlab.adjust(|knobs| knobs.slow_reader = Some(Duration::from_millis(3)));
    let patient = client_with(&bed.gitlab.url(), timeouts);
    let answer = patient.upload_artifact(bed.auth(), &upload(&file)).await.unwrap();
    assert_eq!(answer.reply, UploadArtifactReply::Stored);

    bed.gitlab.adjust(|knobs| knobs.slow_reader = Some(Duration::from_secs(3600)));
    let idle = Duration::from_millis(300);
    let timeouts = Timeouts { idle, request_head: idle, ..Timeouts::default() };
    let hasty = client_with(&bed.gitlab.url(), timeouts);
    let error = hasty.upload_artifact(bed.auth(), &upload(&file)).await.unwrap_err();
    assert!(error.to_string().contains("no answer within"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Transient);
}

#[tokio::test]
async fn a_redirected_upload_goes_on_without_the_token_elsewhere() {
    let bed = Bed::new().await;
    let content = zip(700_000);
    let file = bed.dir.file("a.zip", &content);
    let storage = bed.gitlab.start_object_storage().unwrap();
    let away = Fault::status(307).header("Location", format!("{storage}/upload?X-Signature=a"));
    bed.gitlab.inject(Endpoint::UploadArtifact, away);
    assert_eq!(bed.up(&file).await.unwrap().reply, UploadArtifactReply::Stored);
    assert_eq!(bed.gitlab.requests().of(Endpoint::ObjectStorage), 1);

    // On the same server it goes along: the second one would be a 403 otherwise.
    let path = format!("/api/v4/jobs/{}/artifacts?artifact_type=archive", bed.job);
    bed.gitlab.inject(Endpoint::UploadArtifact, Fault::status(308).header("Location", path));
    assert_eq!(bed.up(&file).await.unwrap().reply, UploadArtifactReply::Stored);
    assert_eq!(bed.gitlab.artifacts(bed.job.0)[0].content().unwrap(), content);

    for (status, target) in [(302, "/elsewhere"), (307, "ftp://h/x"), (307, "http://u:p@h/x")] {
        let fault = Fault::status(status).header("Location", target);
        bed.gitlab.inject(Endpoint::UploadArtifact, fault);
        let error = bed.up(&file).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
        assert!(!error.to_string().contains("u:p"), "{error}");
    }
    let around = Fault::status(307).header("Location", format!("{storage}/loop")).always();
    bed.gitlab.inject(Endpoint::ObjectStorage, around);
    let fault = Fault::status(307).header("Location", format!("{storage}/loop"));
    bed.gitlab.inject(Endpoint::UploadArtifact, fault);
    let error = bed.up(&file).await.unwrap_err();
    assert!(error.to_string().contains("redirects"), "{error}");
    assert_eq!(bed.gitlab.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_token_that_went_away_once_does_not_come_back() {
    let (home, stranger) = (MockServer::start().await, MockServer::start().await);
    let trap = format!("{}/api/v4/trap", home.uri());
    let location = |to: String| ResponseTemplate::new(307).insert_header("location", to);
    Mock::given(path("/api/v4/trap")).respond_with(ResponseTemplate::new(201)).mount(&home).await;
    Mock::given(any())
        .respond_with(location(format!("{}/there", stranger.uri())))
        .mount(&home)
        .await;
    Mock::given(any()).respond_with(location(trap)).mount(&stranger).await;
    let dir = Dir::new();
    let file = dir.file("a.zip", b"content");
    let token = Secret::new(JOB_TOKEN);
    let auth = JobAuth { id: CiJobId(42), token: &token };
    let client = client_at(&home.uri());
    client.upload_artifact(auth, &upload(&file)).await.unwrap();
    let mut into = PartialFile::new(dir.path.join("down"));
    client.download_artifact(auth, true, 100, &mut into).await.unwrap();
    for request in stranger.received_requests().await.unwrap() {
        assert!(!format!("{request:?}").contains("secret-of"), "{request:?}");
    }
    let requests = home.received_requests().await.unwrap();
    let with_token = |r: &&wiremock::Request| r.headers.contains_key("job-token");
    let paths: Vec<_> = requests.iter().filter(with_token).map(|r| r.url.path()).collect();
    assert_eq!(paths, ["/api/v4/jobs/42/artifacts"; 2]);
}

#[tokio::test]
async fn what_is_sent_is_one_part_named_file_of_known_length() {
    let server = MockServer::start().await;
    Mock::given(method("POST"))
        .and(header_exists("content-length"))
        .respond_with(ResponseTemplate::new(201).insert_header("x-request-id", "its own"))
        .mount(&server)
        .await;
    let dir = Dir::new();
    let file = dir.file("x", b"the content");
    let token = Secret::new(JOB_TOKEN);
    let auth = JobAuth { id: CiJobId(42), token: &token };
    let artifact = ArtifactUpload {
        file: &file,
        file_name: "r\"é.gz",
        format: "",
        artifact_type: "ju nit&",
        expire_in: "",
    };
    let answer = client_at(&server.uri()).upload_artifact(auth, &artifact).await.unwrap();
    assert_eq!(answer.request_id, "its own");
    let request = server.received_requests().await.unwrap().remove(0);
    assert_eq!(request.url.query(), Some("artifact_type=ju+nit%26"));
    assert_eq!(request.headers["job-token"], JOB_TOKEN);
    let kind = request.headers["content-type"].to_str().unwrap();
    let boundary = kind.strip_prefix("multipart/form-data; boundary=").unwrap();
    let body = String::from_utf8(request.body).unwrap();
    assert_eq!(
        body,
        format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; \
             filename=\"r%22é.gz\"\r\nContent-Type: application/octet-stream\r\n\r\n\
             the content\r\n--{boundary}--\r\n"
        )
    );
}

#[tokio::test]
async fn a_file_that_is_not_there_is_our_own_fault() {
    let dir = Dir::new();
    let token = Secret::new(JOB_TOKEN);
    let auth = JobAuth { id: CiJobId(42), token: &token };
    let file = dir.path.join("nothing");
    let error =
        client_at("http://127.0.0.1:1").upload_artifact(auth, &upload(&file)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    assert!(error.to_string().contains("nothing"), "{error}");
}

#[tokio::test]
async fn a_download_is_followed_without_the_token_and_goes_on_where_it_broke_off() {
    use std::os::unix::fs::PermissionsExt as _;
    let bed = Bed::new().await;
    let content = zip(2_000_000);
    bed.gitlab.put_artifact(bed.job.0, "archive", "zip", "artifacts.zip", &content).unwrap();
    let path = bed.dir.path.join("down.zip");

    let mut here = PartialFile::new(&path);
    let answer = bed.down(false, &mut here).await.unwrap();
    let bytes = u64::try_from(content.len()).unwrap();
    assert_eq!(answer.reply, DownloadArtifactReply::Whole { bytes });
    assert_eq!(std::fs::read(&path).unwrap(), content);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

    bed.gitlab.start_object_storage().unwrap();
    let mut there = PartialFile::new(&path);
    for (cut, expected) in [(900_000, 900_000), (500_000, 1_400_000)] {
        bed.gitlab.cut_download(cut);
        let error = bed.down(true, &mut there).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient, "{error}");
        // What was on its way may be gone; what came is kept.
        assert!(there.can_go_on() && there.len() <= expected, "{there:?}");
    }
    let before = there.len();
    assert!(before > 0);
    let answer = bed.down(true, &mut there).await.unwrap();
    assert_eq!((answer.status, answer.reply), (206, DownloadArtifactReply::Whole { bytes }));
    assert_eq!(std::fs::read(&path).unwrap(), content);

    // Without a version there is nothing to go on with.
    let mut again = PartialFile::new(&path);
    bed.gitlab.cut_download(1_000_000);
    bed.down(false, &mut again).await.unwrap_err();
    assert!(!again.can_go_on());
    bed.down(false, &mut again).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), content);
    assert_eq!(bed.gitlab.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_download_that_is_refused_says_how() {
    let bed = Bed::new().await;
    let mut into = PartialFile::new(bed.dir.path.join("down.zip"));
    assert_eq!(bed.down(true, &mut into).await.unwrap().reply, DownloadArtifactReply::Missing);
    bed.gitlab.put_artifact(bed.job.0, "archive", "zip", "artifacts.zip", &zip(9)).unwrap();
    let (_, other) = {
        let job = NewJob::new("other").project("hep/other", 78);
        take(&bed.gitlab, &bed.client, &bed.runner, job).await
    };
    let auth = JobAuth { id: bed.job, token: &other };
    let answer = bed.client.download_artifact(auth, false, 1 << 20, &mut into).await.unwrap();
    assert!(matches!(answer.reply, DownloadArtifactReply::Forbidden { .. }), "{answer:?}");
    let nobody = Secret::new("glcbt-64_nobody");
    let auth = JobAuth { id: bed.job, token: &nobody };
    let answer = bed.client.download_artifact(auth, false, 1 << 20, &mut into).await.unwrap();
    assert_eq!(answer.status, 401);
    assert!(matches!(answer.reply, DownloadArtifactReply::Forbidden { .. }));
    // What the store says is not GitLab's word.
    bed.gitlab.start_object_storage().unwrap();
    for status in [401, 403, 404] {
        bed.gitlab.inject(Endpoint::ObjectStorage, Fault::status(status));
        let answer = bed.down(true, &mut into).await.unwrap();
        let reply = answer.reply;
        assert!(matches!(reply, DownloadArtifactReply::Unexpected { .. }), "{reply:?}");
    }
    bed.gitlab.inject(Endpoint::DownloadArtifact, Fault::status(502));
    let reply = bed.down(true, &mut into).await.unwrap().reply;
    assert_eq!(reply, DownloadArtifactReply::Busy { retry_after: None });
    assert!(into.is_empty());
    // More than may come.
    let answer = bed.client.download_artifact(bed.auth(), false, 20, &mut into).await;
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::Refused);
}

#[tokio::test]
async fn ranges_that_were_not_asked_for_are_no_file() {
    let server = MockServer::start().await;
    let answer = ResponseTemplate::new(206)
        .insert_header("content-range", "bytes 5-9/10")
        .set_body_bytes(b"56789".to_vec());
    Mock::given(any()).respond_with(answer).mount(&server).await;
    let dir = Dir::new();
    let token = Secret::new(JOB_TOKEN);
    let auth = JobAuth { id: CiJobId(42), token: &token };
    let mut into = PartialFile::new(dir.path.join("down"));
    let client = client_at(&server.uri());
    let error = client.download_artifact(auth, false, 100, &mut into).await.unwrap_err();
    assert!(error.to_string().contains("not asked for"), "{error}");
}

#[tokio::test]
async fn a_login_page_is_no_archive() {
    let server = MockServer::start().await;
    let page = ResponseTemplate::new(200).set_body_raw("<html>log in</html>", "text/html");
    Mock::given(any()).respond_with(page).mount(&server).await;
    let dir = Dir::new();
    let token = Secret::new(JOB_TOKEN);
    let auth = JobAuth { id: CiJobId(42), token: &token };
    let mut into = PartialFile::new(dir.path.join("down"));
    let client = client_at(&server.uri());
    let error = client.download_artifact(auth, false, 100, &mut into).await.unwrap_err();
    assert!(error.to_string().contains("HTML"), "{error}");
    assert!(!format!("{error:?}").contains(JOB_TOKEN));
}
