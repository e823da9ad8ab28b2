//! Kinds of backend and the drivers that open them: the only file that names backend crates.

use std::collections::BTreeMap;
use std::sync::Arc;

use bridge_backend::{Backend, Driver, Invite, LoggingIn, OpenError};

use crate::config::{BackendEntry, Config};
use crate::domain::id::BackendName;

/// All backends of a configuration, opened.
pub type Backends = BTreeMap<BackendName, Arc<dyn Backend>>;

/// The drivers this program was built with.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    drivers: BTreeMap<&'static str, Driver>,
}

/// Why a backend could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No driver has this kind.
    #[error("find the kind of backend {kind:?}{guess} (known: {known})")]
    UnknownKind {
        /// The kind in the configuration.
        kind: String,
        /// A kind that looks alike, as "; did you mean …?".
        guess: String,
        /// All kinds.
        known: String,
    },
    /// The driver refused its table.
    #[error("open a backend of kind {kind:?}")]
    Open {
        /// The kind.
        kind: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// One of several backends could not be opened.
    #[error("open the backend {name:?}")]
    Backend {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: Box<Self>,
    },
}

impl Registry {
    /// Gives the drivers that come with bridge.
    pub fn builtin() -> Self {
        Self::default()
            .with(bridge_backend_local::DRIVER)
            .with(bridge_backend_slurm::DRIVER)
            .with(bridge_backend_dirac::DRIVER)
    }

    /// Adds a driver; one of the same kind is replaced.
    #[must_use]
    pub fn with(mut self, driver: Driver) -> Self {
        self.drivers.insert(driver.kind, driver);
        self
    }

    /// Lists the kinds.
    pub fn kinds(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.drivers.keys().copied()
    }

    /// Opens a backend from its table.
    ///
    /// # Errors
    ///
    /// When its kind is not known or its driver refuses the table.
    pub fn open(&self, entry: &BackendEntry) -> Result<Arc<dyn Backend>, RegistryError> {
        let kind = &entry.kind;
        (self.driver(kind)?.open)(entry.table.clone())
            .map_err(|source| RegistryError::Open { kind: kind.clone(), source })
    }

    /// Has a person log in for a backend; `None` when its kind has no logins.
    ///
    /// # Errors
    ///
    /// When its kind is not known.
    pub fn log_in(
        &self,
        entry: &BackendEntry,
        invite: Invite,
    ) -> Result<Option<LoggingIn>, RegistryError> {
        let driver = self.driver(&entry.kind)?;
        Ok(driver.login.map(|login| login(entry.table.clone(), invite)))
    }

    fn driver(&self, kind: &str) -> Result<&Driver, RegistryError> {
        self.drivers.get(kind).ok_or_else(|| {
            let guess = match crate::config::nearest(kind, self.kinds()) {
                Some(guess) => format!("; did you mean {guess:?}?"),
                None => String::new(),
            };
            let known = self.kinds().collect::<Vec<_>>().join(", ");
            RegistryError::UnknownKind { kind: kind.to_owned(), guess, known }
        })
    }

    /// Opens all backends of a configuration.
    ///
    /// # Errors
    ///
    /// The first one that cannot be opened, by name.
    pub fn open_all(&self, config: &Config) -> Result<Backends, RegistryError> {
        let mut backends = BTreeMap::new();
        for (name, entry) in &config.backends {
            let backend = self.open(entry).map_err(|source| RegistryError::Backend {
                name: name.0.clone(),
                source: Box::new(source),
            })?;
            backends.insert(name.clone(), backend);
        }
        Ok(backends)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Chain;

    fn refusing(_table: toml::Table) -> Result<Arc<dyn Backend>, OpenError> {
        Err(OpenError::Config("`partition` is missing".into()))
    }

    fn registry() -> Registry {
        Registry::default()
            .with(Driver { kind: "slurm", open: refusing, login: None })
            .with(Driver { kind: "local", open: refusing, login: None })
    }

    fn entry(kind: &str) -> BackendEntry {
        BackendEntry {
            kind: kind.into(),
            max_queued: None,
            poll_interval: None,
            job_options: None,
            sources: crate::config::SourcesPlace::SubmitNode,
            table: toml::Table::new(),
        }
    }

    #[test]
    fn an_unknown_kind_names_the_known_ones_and_the_nearest() {
        let error = registry().open(&entry("slrum")).unwrap_err();
        insta::assert_snapshot!(
            Chain(&error),
            @r#"find the kind of backend "slrum"; did you mean "slurm"? (known: local, slurm)"#
        );
        let error = registry().open(&entry("kubernetes")).unwrap_err();
        insta::assert_snapshot!(
            Chain(&error),
            @r#"find the kind of backend "kubernetes" (known: local, slurm)"#
        );
    }

    #[test]
    fn a_table_its_driver_refuses_names_the_backend() {
        let dir = tempfile::tempdir().unwrap();
        let path = camino::Utf8Path::from_path(dir.path()).unwrap().join("config.toml");
        std::fs::write(&path, "[backends.cluster]\nkind = \"slurm\"\n").unwrap();
        let config = crate::config::load_incomplete(&path).unwrap();
        let error = registry().open_all(&config).unwrap_err();
        insta::assert_snapshot!(
            Chain(&error),
            @r#"open the backend "cluster": open a backend of kind "slurm": `partition` is missing"#
        );
    }

    #[test]
    fn the_builtin_kinds_are_there() {
        assert_eq!(Registry::builtin().kinds().collect::<Vec<_>>(), ["dirac", "local", "slurm"]);
    }
}
