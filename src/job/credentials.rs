//! Logins for image registries: which ones a job has, and which one an image is fetched with.
//!
//! The job's variable `DOCKER_AUTH_CONFIG` comes before what GitLab sends along, and the login for the
//! longest part of an image's path counts (gitlab-runner, `helpers/docker/auth`). Unlike there, neither
//! the home directory's configuration, which is the operator's, nor credential helpers, which are
//! programs, are asked.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::gitlab::wire::{Credential, Secret, nullable};

/// The registry of images that name none.
const DEFAULT_REGISTRY: &str = "docker.io";

/// Below this length a password is no secret, and masking it would make the trace unreadable.
const SHORTEST_SECRET: usize = 6;

/// A user and a password for a registry, or for a part of one.
#[derive(Clone)]
pub struct Login {
    /// The registry's host, and the path that the login is good for.
    pub registry: String,
    /// The user.
    pub username: String,
    /// The password.
    pub password: Secret,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("registry", &self.registry).finish_non_exhaustive()
    }
}

/// All logins of a job, no registry twice.
#[derive(Clone, Debug, Default)]
pub struct Registries {
    logins: Vec<Login>,
    /// Other forms of the passwords.
    encoded: Vec<Secret>,
}

/// `DOCKER_AUTH_CONFIG`, as far as it is used.
#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct AuthConfig {
    #[serde(deserialize_with = "nullable")]
    auths: BTreeMap<String, Auth>,
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Auth {
    #[serde(deserialize_with = "nullable")]
    auth: Secret,
    #[serde(deserialize_with = "nullable")]
    username: String,
    #[serde(deserialize_with = "nullable")]
    password: Secret,
}

impl Registries {
    /// Collects the logins; a complaint if the variable cannot be read.
    pub fn of(docker_auth_config: &str, credentials: &[Credential]) -> (Self, Option<String>) {
        let mut registries = Self::default();
        let complaint = registries.read(docker_auth_config).err();
        for credential in credentials.iter().filter(|credential| credential.kind == "registry") {
            registries.add(&credential.url, &credential.username, &credential.password);
        }
        (registries, complaint)
    }

    fn read(&mut self, config: &str) -> Result<(), String> {
        if config.trim().is_empty() {
            return Ok(());
        }
        // What the parser says of it could show a part of it.
        let config: AuthConfig = serde_json::from_str(config).map_err(|_hidden| {
            "DOCKER_AUTH_CONFIG is no JSON as Docker writes it; ignored".to_owned()
        })?;
        let mut unread = Vec::new();
        for (server, auth) in config.auths {
            let encoded = auth.auth.expose();
            if encoded.is_empty() {
                self.add(&server, &auth.username, &auth.password);
                continue;
            }
            let decoded = STANDARD.decode(encoded).ok().and_then(|raw| String::from_utf8(raw).ok());
            match decoded.as_deref().and_then(|pair| pair.split_once(':')) {
                Some((username, password)) => {
                    // Docker pads it with these.
                    let password = Secret::new(password.trim_matches('\0'));
                    self.add(&server, username, &password);
                    self.encoded.push(auth.auth);
                }
                None => unread.push(server.escape_debug().take(80).collect::<String>()),
            }
        }
        if unread.is_empty() {
            Ok(())
        } else {
            Err(format!("DOCKER_AUTH_CONFIG: the login for {} cannot be read", unread.join(", ")))
        }
    }

    fn add(&mut self, server: &str, username: &str, password: &Secret) {
        let registry = registry_path(server);
        let known = self.logins.iter().any(|login| login.registry == registry);
        if !known && !registry.is_empty() {
            let (username, password) = (username.to_owned(), password.clone());
            self.logins.push(Login { registry, username, password });
        }
    }

    /// Finds the login that an image is fetched with: the one for the longest part of its path.
    pub fn login_for(&self, image: &str) -> Option<&Login> {
        let image = image_path(image);
        let mut path = image.as_str();
        loop {
            if let Some(login) = self.logins.iter().find(|login| login.registry == path) {
                return Some(login);
            }
            path = path.rsplit_once('/')?.0;
        }
    }

    /// Gives what must not be seen.
    pub(super) fn secrets(&self) -> impl Iterator<Item = &str> {
        self.logins
            .iter()
            .map(|login| &login.password)
            .chain(&self.encoded)
            .map(Secret::expose)
            .filter(|text| text.len() >= SHORTEST_SECRET)
    }
}

/// Gives an image's path without its tag and digest, with its registry's host in lower case.
fn image_path(image: &str) -> String {
    let image = image.split_once('@').map_or(image, |(name, _digest)| name);
    let (dir, name) = image.rsplit_once('/').map_or(("", image), |(dir, name)| (dir, name));
    let name = name.split_once(':').map_or(name, |(name, _tag)| name);
    let parts = dir.split('/').chain([name]).filter(|part| !part.is_empty());
    let path = parts.collect::<Vec<_>>().join("/");
    let first = path.split_once('/').map(|(first, _)| first);
    let host =
        first.filter(|first| first.contains(['.', ':']) || first.eq_ignore_ascii_case("localhost"));
    match host {
        None => format!("{DEFAULT_REGISTRY}/{path}"),
        Some(host) if is_default_index(host) => {
            path.split_once('.').map_or(DEFAULT_REGISTRY.to_owned(), |(_, rest)| lower_host(rest))
        }
        Some(_) => lower_host(&path),
    }
}

/// Gives the path of a registry as a login names it: a URL counts by its host alone.
fn registry_path(server: &str) -> String {
    let url = ["https://", "http://"].into_iter().find_map(|scheme| {
        let (head, rest) = server.split_at_checked(scheme.len())?;
        head.eq_ignore_ascii_case(scheme).then_some(rest)
    });
    if let Some(rest) = url {
        let host = rest.split_once('/').map_or(rest, |(host, _)| host);
        if is_default_index(host) {
            return DEFAULT_REGISTRY.to_owned();
        }
        return host.to_lowercase();
    }
    let path = server.strip_suffix('/').unwrap_or(server);
    let untagged = match (path.rfind('/'), path.rfind(':')) {
        (Some(slash), Some(colon)) if colon > slash => path.get(..colon).unwrap_or(path),
        _ => path,
    };
    lower_host(untagged)
}

fn is_default_index(host: &str) -> bool {
    host.eq_ignore_ascii_case("index.docker.io")
}

fn lower_host(path: &str) -> String {
    match path.split_once('/') {
        Some((host, rest)) => format!("{}/{rest}", host.to_lowercase()),
        None => path.to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credential(kind: &str, url: &str, password: &str) -> Credential {
        Credential {
            kind: kind.into(),
            url: url.into(),
            username: "gitlab-ci-token".into(),
            password: Secret::new(password),
        }
    }

    #[test]
    fn an_image_is_fetched_with_the_login_for_the_longest_part_of_its_path() {
        let logins = [
            ("registry.example.org", "host"),
            ("Registry.Example.org/group", "group"),
            ("registry.example.org/group/project/", "project"),
            ("registry.example.org:5050", "port"),
            ("https://old.example.org/v1/", "old"),
            ("HTTPS://index.docker.io/v1/", "hub"),
            ("localhost", "here"),
            ("tagged.example.org/image:latest", "tagged"),
        ];
        let credentials: Vec<Credential> =
            logins.iter().map(|(url, password)| credential("registry", url, password)).collect();
        let (registries, complaint) = Registries::of("", &credentials);
        assert_eq!(complaint, None);
        for (image, password) in [
            ("registry.example.org/a", Some("host")),
            ("REGISTRY.example.org/a/b:1", Some("host")),
            ("registry.example.org/group/a:1", Some("group")),
            ("registry.example.org/group", Some("group")),
            ("registry.example.org/groups/a", Some("host")),
            ("registry.example.org/Group/a", Some("host")),
            ("registry.example.org/group/project", Some("project")),
            ("registry.example.org/group/project/a/b@sha256:0123", Some("project")),
            ("registry.example.org/group/project/a:1@sha256:0123", Some("project")),
            ("registry.example.org:5050/group/a", Some("port")),
            ("old.example.org/v1/a", Some("old")),
            ("debian", Some("hub")),
            ("debian:12", Some("hub")),
            ("library/debian", Some("hub")),
            ("docker.io/debian", Some("hub")),
            ("index.docker.io/debian", Some("hub")),
            ("localhost/a", Some("here")),
            ("tagged.example.org/image:2", Some("tagged")),
            ("tagged.example.org/other", None),
            ("elsewhere.example.org/a", None),
            ("example.org/a", None),
            ("", Some("hub")),
        ] {
            let found = registries.login_for(image).map(|login| login.password.expose());
            assert_eq!(found, password, "{image}");
        }
    }

    #[test]
    fn the_jobs_variable_comes_first_and_other_kinds_do_not_count() {
        let config = format!(
            r#"{{"auths": {{"a.example.org": {{"auth": "{}"}}, "b.example.org": {{"username": "u",
                "password": "plain-one"}}, "c.example.org": null_}}, "credsStore": "no-program"}}"#,
            STANDARD.encode("me:with:colon")
        )
        .replace("null_", "{}");
        let (registries, complaint) = Registries::of(
            &config,
            &[
                credential("registry", "A.example.org", "job-token"),
                credential("registry", "d.example.org", "job-token"),
                credential("other", "e.example.org", "job-token"),
                credential("registry", "", "job-token"),
            ],
        );
        assert_eq!(complaint, None);
        let login = |image: &str| {
            registries
                .login_for(image)
                .map(|login| (login.username.as_str(), login.password.expose()))
        };
        assert_eq!(login("a.example.org/x"), Some(("me", "with:colon")));
        assert_eq!(login("b.example.org/x"), Some(("u", "plain-one")));
        assert_eq!(login("d.example.org/x"), Some(("gitlab-ci-token", "job-token")));
        assert_eq!(login("e.example.org/x"), None);
        let mut secrets: Vec<&str> = registries.secrets().collect();
        secrets.sort_unstable();
        let encoded = STANDARD.encode("me:with:colon");
        assert_eq!(secrets, [encoded.as_str(), "job-token", "plain-one", "with:colon"]);
        assert!(!format!("{registries:?}").contains("with:colon"));
    }

    #[test]
    fn what_cannot_be_read_is_said_without_showing_it() {
        let token = [credential("registry", "d.example.org", "job-token")];
        for config in ["{", "7", "hunter2", r#"{"auths": "hunter2"}"#, r#"{"auths": {"a": 1}}"#] {
            let (registries, complaint) = Registries::of(config, &token);
            let complaint = complaint.unwrap();
            assert!(complaint.contains("DOCKER_AUTH_CONFIG is no JSON"), "{complaint}");
            assert!(!complaint.contains("hunter2"));
            assert!(registries.login_for("d.example.org/x").is_some());
        }
        let good = STANDARD.encode("u:password");
        let config = format!(
            r#"{{"auths": {{"a.org": {{"auth": "hunter2!"}}, "b.org": {{"auth": "{}"}},
                "c.org": {{"auth": "{good}"}}}}}}"#,
            STANDARD.encode("no colon")
        );
        let (registries, complaint) = Registries::of(&config, &[]);
        assert_eq!(
            complaint.as_deref(),
            Some("DOCKER_AUTH_CONFIG: the login for a.org, b.org cannot be read")
        );
        assert!(registries.login_for("c.org/x").is_some());
        assert_eq!(Registries::of(" \n", &[]).1, None);
        assert_eq!(Registries::of("{}", &[]).1, None);
        assert_eq!(Registries::of(r#"{"auths": null}"#, &[]).1, None);
    }
}
