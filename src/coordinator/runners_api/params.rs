//! What a call of the Runners API sets: query and body, and what is no valid value of theirs.

use serde_json::{Map, Value, json};

use super::super::api::Call;
use super::super::reply::Reply;

/// Query and body as one, as grape sees them.
pub(super) struct Params(Map<String, Value>);

impl Params {
    pub(super) fn read(call: &Call) -> Result<Self, Reply> {
        let mut all = Map::new();
        let mut pairs = |text: &[u8]| {
            for (key, value) in url::form_urlencoded::parse(text) {
                all.insert(key.trim_end_matches("[]").to_owned(), json!(value));
            }
        };
        pairs(call.query.as_bytes());
        if call.content_type() == "application/x-www-form-urlencoded" {
            pairs(&call.body);
        } else if call.is_json() && !call.body.is_empty() {
            match serde_json::from_slice::<Value>(&call.body) {
                Ok(Value::Object(body)) => all.extend(body),
                Ok(_) | Err(_) => return Err(Reply::error(400, "the body is no JSON object")),
            }
        }
        Ok(Self(all))
    }

    pub(super) fn invalid(name: &str) -> Reply {
        Reply::error(400, &format!("{name} is invalid"))
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<String>, Reply> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(Self::invalid(name)),
        }
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<i64>, Reply> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Number(number)) => {
                number.as_i64().map(Some).ok_or_else(|| Self::invalid(name))
            }
            Some(Value::String(text)) => {
                text.parse().map(Some).map_err(|_not_a_number| Self::invalid(name))
            }
            Some(_) => Err(Self::invalid(name)),
        }
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, Reply> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(Value::String(text)) if text == "true" || text == "1" => Ok(Some(true)),
            Some(Value::String(text)) if text == "false" || text == "0" => Ok(Some(false)),
            Some(_) => Err(Self::invalid(name)),
        }
    }

    pub(super) fn word(&self, name: &str, known: &[&str]) -> Result<Option<String>, Reply> {
        let word = self.text(name)?;
        match word {
            Some(word) if !known.contains(&word.as_str()) => {
                Err(Reply::error(400, &format!("{name} does not have a valid value")))
            }
            word => Ok(word),
        }
    }

    pub(super) fn tags(&self) -> Result<Option<Vec<String>>, Reply> {
        let texts: Vec<String> = match self.0.get("tag_list") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(text)) => text.split(',').map(str::to_owned).collect(),
            Some(Value::Array(list)) => list
                .iter()
                .map(|tag| tag.as_str().map(str::to_owned))
                .collect::<Option<_>>()
                .ok_or_else(|| Self::invalid("tag_list"))?,
            Some(_) => return Err(Self::invalid("tag_list")),
        };
        let tags = texts.iter().map(|tag| tag.trim().to_owned()).filter(|tag| !tag.is_empty());
        Ok(Some(tags.collect()))
    }

    /// Says whether any of these is given.
    pub(super) fn has_any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.0.contains_key(*name))
    }

    /// Gives each as a query would.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (&str, String)> {
        self.0.iter().map(|(key, value)| {
            (key.as_str(), value.as_str().map_or_else(|| value.to_string(), str::to_owned))
        })
    }
}
