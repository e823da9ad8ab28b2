//! What a job may ask of the grid.

use std::fmt;

use serde::Deserialize;
use serde::de::{Error as _, SeqAccess, Visitor};

/// Longer values are mistakes.
const LONGEST_VALUE: usize = 128;

/// More names in one list are mistakes.
const LONGEST_LIST: usize = 64;

/// What a job asks for; a table of a job's options has the same keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Wishes {
    #[serde(deserialize_with = "words")]
    pub(crate) site: Vec<String>,
    #[serde(deserialize_with = "words")]
    pub(crate) banned_sites: Vec<String>,
    #[serde(deserialize_with = "words")]
    pub(crate) platform: Vec<String>,
    #[serde(deserialize_with = "words")]
    pub(crate) tags: Vec<String>,
    #[serde(deserialize_with = "number")]
    pub(crate) cpu_time: Option<u64>,
    #[serde(deserialize_with = "number")]
    pub(crate) processors: Option<u64>,
    #[serde(deserialize_with = "number")]
    pub(crate) priority: Option<u64>,
}

impl Wishes {
    /// Reads and checks a job's options; the error is for the job's author.
    pub(crate) fn of_job(options: &toml::Table) -> Result<Self, String> {
        // One by one, so that what is wrong has a name.
        for (key, value) in options {
            let one = toml::Table::from_iter([(key.clone(), value.clone())]);
            let read: Result<Self, toml::de::Error> = toml::Value::Table(one).try_into();
            read.map_err(|error| match error.message() {
                text if text.contains(key) => text.to_owned(),
                text => format!("`{key}`: {text}"),
            })?;
        }
        let wishes: Self = toml::Value::Table(options.clone())
            .try_into()
            .map_err(|error: toml::de::Error| error.message().to_owned())?;
        wishes.check()?;
        Ok(wishes)
    }

    /// Checks every value against what DIRAC takes.
    pub(crate) fn check(&self) -> Result<(), String> {
        for (key, values) in [
            ("site", &self.site),
            ("banned_sites", &self.banned_sites),
            ("platform", &self.platform),
            ("tags", &self.tags),
        ] {
            if values.len() > LONGEST_LIST {
                return Err(format!("`{key}` has more than {LONGEST_LIST} names"));
            }
            for value in values {
                check_value(key, value)?;
            }
        }
        // The server takes others, and such jobs fail or wait for ever, later.
        for (key, value, least, most) in [
            ("cpu_time", self.cpu_time, 100, 31_536_000),
            ("processors", self.processors, 1, 1024),
            ("priority", self.priority, 0, 10),
        ] {
            if let Some(value) = value
                && !(least..=most).contains(&value)
            {
                return Err(format!("`{key}` must be from {least} to {most}, not {value}"));
            }
        }
        Ok(())
    }

    /// Puts these wishes on top of the site's.
    pub(crate) fn over(self, site: &Self) -> Self {
        let site = site.clone();
        let list = |own: Vec<String>, site| if own.is_empty() { site } else { own };
        Self {
            site: list(self.site, site.site),
            banned_sites: list(self.banned_sites, site.banned_sites),
            platform: list(self.platform, site.platform),
            tags: list(self.tags, site.tags),
            cpu_time: self.cpu_time.or(site.cpu_time),
            processors: self.processors.or(site.processors),
            priority: self.priority.or(site.priority),
        }
    }
}

/// Says whether a text may stand in a JDL.
///
/// The server's parser does not know quotes: a `[` in a text makes it run for ever, `;` garbles the rest,
/// `%j` is replaced. So this is a list of what is harmless.
pub(crate) fn harmless(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/:+=,@- ".contains(&b))
}

/// Checks one value of a key.
pub(crate) fn check_value(key: &str, value: &str) -> Result<(), String> {
    if value.trim().is_empty() {
        return Err(format!("`{key}` is empty"));
    }
    if value.len() > LONGEST_VALUE {
        return Err(format!("`{key}` is longer than {LONGEST_VALUE} characters"));
    }
    if !harmless(value) {
        return Err(format!(
            "`{key}` may have letters, digits, blanks and any of ._/:+=,@- only, not {value:?}"
        ));
    }
    Ok(())
}

/// Reads a list, or names with commas between them, as a variable of a job gives them.
pub(crate) fn words<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<String>, D::Error> {
    struct Words;
    impl<'de> Visitor<'de> for Words {
        type Value = Vec<String>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a name, names with commas between them, or a list of names")
        }
        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Vec<String>, E> {
            Ok(text.split(',').map(|word| word.trim().to_owned()).collect())
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<String>, A::Error> {
            let mut words = Vec::new();
            while let Some(word) = list.next_element::<String>()? {
                words.push(word);
            }
            if words.is_empty() { Err(A::Error::custom("the list is empty")) } else { Ok(words) }
        }
    }
    deserializer.deserialize_any(Words)
}

/// Reads a number, also one in quotes.
pub(crate) fn number<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u64>, D::Error> {
    struct Number;
    impl Visitor<'_> for Number {
        type Value = Option<u64>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number")
        }
        fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Option<u64>, E> {
            u64::try_from(number).map(Some).map_err(|_negative| E::custom("a number below 0"))
        }
        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Option<u64>, E> {
            let number = text.trim().parse();
            number.map(Some).map_err(|_error| E::custom(format!("{text:?} is not a number")))
        }
    }
    deserializer.deserialize_any(Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Wishes, String> {
        Wishes::of_job(&text.parse().unwrap())
    }

    #[test]
    fn words_come_as_text_or_list_and_numbers_in_quotes_too() {
        let wishes =
            read("site = 'A, B.c'\ntags = ['x']\ncpu_time = '3600'\nprocessors = 2").unwrap();
        assert_eq!(wishes.site, ["A", "B.c"]);
        assert_eq!(wishes.cpu_time, Some(3600));
        let all = wishes.over(&read("site = 'Z'\nplatform = 'p'").unwrap());
        assert_eq!((all.site.len(), all.platform.len()), (2, 1));
    }

    #[test]
    fn what_would_hurt_a_jdl_is_refused_by_name() {
        for (text, named) in [
            ("site = 'a[b'", "site"),
            ("site = 'a;b'", "site"),
            ("tags = 'a\"b'", "tags"),
            ("tags = 'a%j'", "tags"),
            ("platform = \"a\\nb\"", "platform"),
            ("platform = ''", "platform"),
            ("tags = []", "empty"),
            ("banned_sites = ['a{b}']", "banned_sites"),
            ("cpu_time = 5", "cpu_time"),
            ("cpu_time = -5", "below"),
            ("cpu_time = '-5'", "cpu_time"),
            ("cpu_time = 'soon'", "soon"),
            ("processors = 0", "processors"),
            ("priority = 99", "priority"),
            ("sit = 'a'", "sit"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
