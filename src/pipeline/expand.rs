//! Variables in texts: `$NAME`, `${NAME}`, `%NAME%`.

use std::collections::BTreeMap;

use super::Variable;

/// Longest chain of variables in variables that is followed.
const MAX_DEPTH: usize = 20;

/// Variables by name, the value of the strongest for each.
#[derive(Clone, Debug, Default)]
pub(super) struct Scope {
    values: BTreeMap<String, (String, bool)>,
}

impl Scope {
    /// Adds variables that win over those that are there.
    pub(super) fn add(&mut self, variables: &[Variable]) {
        for Variable { name, value, raw } in variables {
            self.values.insert(name.clone(), (value.clone(), *raw));
        }
    }

    /// Gives a value as it was written.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(|(value, _)| value.as_str())
    }

    /// Replaces variables that are known, their own values as they were written.
    pub(super) fn expand(&self, text: &str) -> String {
        replace(text, &|name| self.get(name).map(str::to_owned))
    }

    /// Replaces variables that are known, and those in their values.
    pub(super) fn expand_nested(&self, text: &str) -> String {
        self.nested(text, 0)
    }

    fn nested(&self, text: &str, depth: usize) -> String {
        replace(text, &|name| {
            let (value, raw) = self.values.get(name)?;
            // A circle ends here; GitLab refuses the pipeline instead.
            Some(if *raw || depth >= MAX_DEPTH {
                value.clone()
            } else {
                self.nested(value, depth + 1)
            })
        })
    }
}

fn replace(text: &str, value: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['$', '%']) {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        // An escaped dollar stays escaped: the shell or the runner takes the escape away.
        if let Some(after) = from.strip_prefix("$$") {
            out.push_str("$$");
            rest = after;
            continue;
        }
        match reference(from) {
            Some((name, length)) => {
                let (whole, after) = from.split_at(length);
                match value(name) {
                    Some(value) => out.push_str(&value),
                    None => out.push_str(whole),
                }
                rest = after;
            }
            None => {
                let mut chars = from.chars();
                out.extend(chars.next());
                rest = chars.as_str();
            }
        }
    }
    out.push_str(rest);
    out
}

/// Gives the name of a reference that begins the text, and how many bytes the reference has.
fn reference(text: &str) -> Option<(&str, usize)> {
    let name_of = |text: &'_ str| -> usize {
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let end = end.unwrap_or(text.len());
        if text.starts_with(|c: char| c.is_ascii_digit()) { 0 } else { end }
    };
    let (inner, open, close) = if let Some(inner) = text.strip_prefix("${") {
        (inner, 2, "}")
    } else if let Some(inner) = text.strip_prefix('$') {
        (inner, 1, "")
    } else {
        (text.strip_prefix('%')?, 1, "%")
    };
    let length = name_of(inner);
    let name = inner.get(..length).filter(|name| !name.is_empty())?;
    inner.get(length..)?.starts_with(close).then_some((name, open + length + close.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(values: &[(&str, &str)]) -> Scope {
        let mut scope = Scope::default();
        let variables: Vec<_> =
            values.iter().map(|(name, value)| Variable::new(*name, *value)).collect();
        scope.add(&variables);
        scope
    }

    #[test]
    fn known_variables_are_replaced_and_others_stay() {
        let scope = scope(&[("A", "1"), ("B_2", "two"), ("N", "<$A>")]);
        for (text, expanded) in [
            ("$A", "1"),
            ("x${A}y", "x1y"),
            ("%A%", "1"),
            ("$A_", "$A_"),
            ("${A", "${A"),
            ("100% sure", "100% sure"),
            ("$$A", "$$A"),
            ("$B_2-$C", "two-$C"),
            ("$1 $", "$1 $"),
            ("$N", "<$A>"),
            ("ä$Aö", "ä1ö"),
        ] {
            assert_eq!(scope.expand(text), expanded, "{text}");
        }
        assert_eq!(scope.expand_nested("$N"), "<1>");
    }

    #[test]
    fn circles_end_and_raw_values_are_left_alone() {
        let mut scope = scope(&[("A", "$B"), ("B", "$A")]);
        assert!(scope.expand_nested("$A").starts_with('$'));
        scope.add(&[Variable { raw: true, ..Variable::new("A", "$B") }]);
        assert_eq!(scope.expand_nested("$A"), "$B");
    }
}
