//! Where a job's sources come from, and what git is told about it.

use url::Url;

use crate::gitlab::wire::{JobPayload, Secret};
use crate::job::settings::Settings;
use crate::job::variables::{Variables, platform};
use crate::job::{RunnerContext, Unrunnable, paths};

/// Carry the credentials to git's helper, in the environment of git's processes.
const USERNAME_VAR: &str = "BRIDGE_GIT_USERNAME";
const PASSWORD_VAR: &str = "BRIDGE_GIT_PASSWORD";

/// Says what is in the environment when git asks, and forgets what git wants kept.
const HELPER: &str = "!f() { test \"$1\" = get && printf 'username=%s\\npassword=%s\\n' \
                      \"$BRIDGE_GIT_USERNAME\" \"$BRIDGE_GIT_PASSWORD\"; }; f";

/// Variables of the job that git itself understands and that cannot make it run anything.
const GIT_VARIABLES: [&str; 8] = [
    "GIT_SSL_NO_VERIFY",
    "GIT_HTTP_LOW_SPEED_LIMIT",
    "GIT_HTTP_LOW_SPEED_TIME",
    "GIT_HTTP_MAX_REQUESTS",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
];

/// Where the sources come from.
pub(in crate::job) struct Repository {
    /// Without credentials.
    pub(super) origin: String,
    /// The job's number at GitLab.
    pub(super) job: i64,
    /// Scheme, host and port: whom the credentials are for.
    site: Option<String>,
    pub(super) username: String,
    password: Secret,
    pub(super) refspecs: Vec<String>,
    pub(super) depth: i64,
    pub(super) sha: String,
    pub(super) reference: String,
    pub(super) sha256: bool,
    /// What the job's fetch leaves out, if it does.
    pub(super) filter: Option<String>,
    /// Settings that git gets on its command line; none is a secret.
    pub(super) config: Vec<String>,
    /// `GIT_…` variables of the job.
    variables: Vec<(String, Secret)>,
}

impl Repository {
    /// Reads the payload.
    pub(in crate::job) fn of(
        payload: &JobPayload,
        runner: &RunnerContext,
        settings: &Settings,
        variables: &Variables,
    ) -> Result<Self, Unrunnable> {
        let git = &payload.git_info;
        let mut url = remote_url(payload, runner, variables)?;
        let username = paths::percent_decoded(url.username()).unwrap_or_default();
        let password =
            url.password().and_then(paths::percent_decoded).map(Secret::new).unwrap_or_default();
        // A URL that cannot have credentials has none.
        let cleaned = url
            .set_password(None)
            .and_then(|()| if url.scheme() == "ssh" { Ok(()) } else { url.set_username("") });
        if cleaned.is_err() && (!url.username().is_empty() || url.password().is_some()) {
            return Err(Unrunnable::Repository { reason: "its credentials cannot be taken out" });
        }
        let hexadecimal =
            matches!(git.sha.len(), 40 | 64) && git.sha.bytes().all(|b| b.is_ascii_hexdigit());
        if settings.git_checkout && !hexadecimal {
            return Err(Unrunnable::Commit { sha: git.sha.clone() });
        }
        // A refspec that looks like an option would be one.
        let odd = |refspec: &&String| {
            refspec.is_empty() || refspec.starts_with('-') || refspec.contains(['\0', '\n'])
        };
        if let Some(refspec) = git.refspecs.iter().find(odd) {
            return Err(Unrunnable::Refspec { refspec: refspec.clone() });
        }
        let refspecs = if git.refspecs.is_empty() && hexadecimal {
            vec![git.sha.clone()]
        } else {
            git.refspecs.clone()
        };
        let site = site(&url);
        let given = GIT_VARIABLES
            .iter()
            .map(|name| (*name, variables.content(name)))
            .filter(|(_, value)| !value.is_empty() && !value.contains('\0'))
            .map(|(name, value)| (name.to_owned(), Secret::new(value)))
            .collect();
        let mut config = config(site.as_deref(), runner);
        config.extend(rewrites(&url, payload, runner, settings, variables));
        Ok(Self {
            origin: url.into(),
            job: payload.id,
            config,
            site,
            username,
            password,
            refspecs,
            depth: git.depth,
            sha: git.sha.clone(),
            reference: git.reference.clone(),
            sha256: git.repo_object_format == "sha256",
            filter: settings
                .git_fetch_flags
                .iter()
                .rev()
                .find_map(|flag| flag.strip_prefix("--filter="))
                .map(str::to_owned),
            variables: given,
        })
    }

    /// Gives the password, to be masked.
    pub(in crate::job) fn password(&self) -> &str {
        self.password.expose()
    }

    /// Says whether the repository lies on this machine.
    pub(super) fn is_local(&self) -> bool {
        self.origin.starts_with("file:")
    }

    /// Gives what git is told in the environment: who we are, and what the job may say.
    pub(super) fn environment(&self) -> Vec<(String, Secret)> {
        let mut env = self.variables.clone();
        if self.site.is_some() && !self.password.expose().is_empty() {
            env.push((USERNAME_VAR.to_owned(), Secret::new(self.username.as_str())));
            env.push((PASSWORD_VAR.to_owned(), self.password.clone()));
        }
        env
    }

    /// Writes `.git/config` anew: nothing of an earlier job's survives, and no secret is in it.
    pub(super) fn config_file(&self) -> String {
        let mut remote = format!("\turl = {}\n", in_config(&self.origin));
        let mut extensions = String::new();
        // Without this, what an earlier job left out would count as lost.
        if let Some(filter) = &self.filter {
            extensions.push_str("\tpartialClone = origin\n");
            remote.push_str("\tpromisor = true\n\tpartialclonefilter = ");
            remote.push_str(&in_config(filter));
            remote.push('\n');
        }
        config_text(self.sha256, "\tbare = false\n", &extensions, &remote)
    }

    /// Writes the configuration of a submodule's repository.
    pub(super) fn submodule_config(sha256: bool, origin: Option<&str>) -> String {
        let mut remote = "\tfetch = +refs/heads/*:refs/remotes/origin/*\n".to_owned();
        if let Some(origin) = origin {
            remote.push_str("\turl = ");
            remote.push_str(&in_config(origin));
            remote.push('\n');
        }
        config_text(sha256, "\tbare = false\n", "", &remote)
    }

    /// Writes the configuration of a mirror.
    pub(super) fn mirror_config(&self) -> String {
        let remote = format!("\turl = {}\n", in_config(&self.origin));
        let text = config_text(self.sha256, "\tbare = true\n", "", &remote);
        // Packed, the refs of a job could not be removed with their folder.
        format!("{text}[gc]\n\tpackRefs = false\n[uploadpack]\n\tallowAnySHA1InWant = true\n")
    }
}

fn config_text(sha256: bool, core: &str, extensions: &str, remote: &str) -> String {
    let format = if sha256 { "\tobjectFormat = sha256\n" } else { "" };
    let version = u8::from(sha256 || !extensions.is_empty());
    format!(
        "[core]\n\trepositoryformatversion = {version}\n\tfilemode = true\n{core}\
         \tlogallrefupdates = true\n[extensions]\n{format}{extensions}[remote \"origin\"]\n{remote}\
         [fetch]\n\trecurseSubmodules = false\n[credential]\n\tinteractive = never\n\
         [gc]\n\tautoDetach = false\n[maintenance]\n\tautoDetach = false\n"
    )
}

/// Quotes a value for a configuration file.
pub(super) fn in_config(value: &str) -> String {
    let escaped = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("\"{escaped}\"")
}

/// Gives the URL to fetch from, with the operator's `clone_url` in the place of the server's.
fn remote_url(
    payload: &JobPayload,
    runner: &RunnerContext,
    variables: &Variables,
) -> Result<Url, Unrunnable> {
    let bad = |reason| Unrunnable::Repository { reason };
    let Some(base) = &runner.clone_url else {
        let text = payload.git_info.repo_url.expose();
        return Url::parse(text).map_err(|_unshown| bad("it cannot be parsed"));
    };
    let mut url = base.clone();
    let project = variables.content("CI_PROJECT_PATH");
    let project = if project.is_empty() { &payload.job_info.project_full_path } else { project };
    if project.is_empty() || project.split('/').any(|part| part == "..") {
        return Err(bad("clone_url needs the project's path, which is missing or odd"));
    }
    let path = format!("{}/{project}.git", url.path().trim_end_matches('/'));
    url.set_path(&path);
    let (user, password) = if url.scheme() == "ssh" {
        ("git", None)
    } else {
        ("gitlab-ci-token", Some(payload.token.expose()))
    };
    let set = url.set_username(user).and_then(|()| url.set_password(password));
    // `file:` has no place for credentials and needs none.
    if set.is_err() && url.scheme() != "file" {
        return Err(bad("clone_url cannot carry credentials"));
    }
    Ok(url)
}

/// Gives scheme, host and port of an HTTP URL.
pub(super) fn site(url: &Url) -> Option<String> {
    if !matches!(url.scheme(), "http" | "https") {
        return None;
    }
    let host = url.host_str()?;
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    Some(format!("{}://{host}{port}", url.scheme()))
}

/// Gives the settings that hold wherever git runs in a workspace.
pub(super) fn basic_config() -> Vec<String> {
    let settings = [
        "core.hooksPath=/dev/null",
        "core.fsmonitor=false",
        "core.splitIndex=false",
        "submodule.recurse=false",
        "advice.detachedHead=false",
        // Whatever helpers the machine has, they must neither answer nor remember.
        "credential.helper=",
    ];
    settings.map(str::to_owned).into()
}

/// Gives git's settings for one job.
fn config(site: Option<&str>, runner: &RunnerContext) -> Vec<String> {
    let mut config = basic_config();
    config.push(format!("http.userAgent=bridge {} {}", runner.version, platform()));
    if let Some(site) = site {
        // For this server only: a redirection elsewhere gets nothing.
        config.push(format!("credential.{site}.helper={HELPER}"));
        let files = [
            ("sslCAInfo", &runner.tls_ca_file),
            ("sslCert", &runner.tls_cert_file),
            ("sslKey", &runner.tls_key_file),
        ];
        config.extend(files.into_iter().filter_map(|(key, path)| {
            path.as_ref().map(|path| format!("http.{site}/.{key}={path}"))
        }));
    }
    config
}

/// Lets submodules be reached the way the project is: at the operator's `clone_url`, and over HTTP
/// where the author prefers it to SSH (gitlab-runner, `common/build.go` `GetInsteadOfs`).
///
/// Unlike there, the address that is put in has no credentials: git asks the helper for them.
fn rewrites(
    origin: &Url,
    payload: &JobPayload,
    runner: &RunnerContext,
    settings: &Settings,
    variables: &Variables,
) -> Vec<String> {
    let project = variables.content("CI_PROJECT_PATH");
    let project = if project.is_empty() { &payload.job_info.project_full_path } else { project };
    let base = |url: &Url| {
        let site = site(url)?;
        let path = url.path().strip_suffix(".git").unwrap_or(url.path());
        let root = path.strip_suffix(project).filter(|_| !project.is_empty()).unwrap_or("/");
        Some(format!("{site}{}/", root.trim_end_matches('/')))
    };
    let Some(target) = base(origin) else { return Vec::new() };
    let instance =
        site(&runner.url).map(|site| format!("{site}{}/", runner.url.path().trim_end_matches('/')));
    let delivered = Url::parse(payload.git_info.repo_url.expose()).ok().as_ref().and_then(base);
    let mut from: Vec<String> = Vec::new();
    for other in [instance, delivered].into_iter().flatten() {
        // One inside the other would be rewritten twice.
        if !other.starts_with(&target) && !target.starts_with(&other) {
            from.push(other);
        }
    }
    let ssh = match variables.content("CI_SERVER_SHELL_SSH_HOST") {
        "" => variables.content("CI_SERVER_HOST"),
        host => host,
    };
    let plain =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '[' | ']');
    if settings.git_submodule_force_https && !ssh.is_empty() && ssh.chars().all(plain) {
        from.push(format!("git@{ssh}:"));
        from.push(format!("ssh://git@{ssh}/"));
        let port = variables.content("CI_SERVER_SHELL_SSH_PORT");
        if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) {
            from.push(format!("ssh://git@{ssh}:{port}/"));
        }
    }
    from.dedup();
    from.retain(|one| !one.contains(['\n', '=']));
    if target.contains(['\n', '=']) {
        return Vec::new();
    }
    from.into_iter().map(|one| format!("url.{target}.insteadOf={one}")).collect()
}
