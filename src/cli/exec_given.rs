//! What is given to a pipeline on the command line: variables and inputs.

use camino::Utf8Path;

use crate::cli::exit::{Exit, Failure};
use crate::pipeline::Variable;

/// Reads `KEY=VALUE` arguments after the lines of a file; later ones win.
pub(super) fn variables(
    file: Option<&Utf8Path>,
    arguments: &[String],
) -> Result<Vec<Variable>, Failure> {
    let mut variables = Vec::new();
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::new(Exit::Usage, format!("read the variables in {path}")).source(error)
        })?;
        for (place, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let at = || format!("{path}:{}", place + 1);
            let line = line.strip_prefix("export ").unwrap_or(line);
            let (name, value) = pair(line, &at())?;
            variables.push(Variable::new(name, unquoted(value)));
        }
    }
    for argument in arguments {
        let (name, value) = pair(argument, "--var")?;
        variables.push(Variable::new(name, value));
    }
    Ok(variables)
}

/// Reads `KEY=VALUE` arguments for `spec: inputs`.
pub(super) fn inputs(arguments: &[String]) -> Result<Vec<(String, String)>, Failure> {
    arguments
        .iter()
        .map(|argument| {
            let (name, value) = argument
                .split_once('=')
                .filter(|(name, _)| !name.is_empty())
                .ok_or_else(|| wrong(argument, "--input"))?;
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect()
}

fn pair<'a>(text: &'a str, at: &str) -> Result<(&'a str, &'a str), Failure> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split_once('=')
        .filter(|(name, _)| !name.is_empty() && name.chars().all(plain))
        .ok_or_else(|| wrong(text, at))
}

/// Names where it is, not what it says: values may be secrets.
fn wrong(text: &str, at: &str) -> Failure {
    let name = text.split('=').next().unwrap_or_default();
    let name = if text.contains('=') { format!(" ({name:?} is no name)") } else { String::new() };
    Failure::new(Exit::Usage, format!("use {at}: it is not KEY=VALUE{name}"))
}

fn unquoted(value: &str) -> &str {
    let inside = |quote| value.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    inside('"').or_else(|| inside('\'')).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_win_over_the_file_and_quotes_fall() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("vars");
        std::fs::write(&path, "# note\n\nA=1\nexport B=\"two words\"\nC='x=y'\n").unwrap();
        let read = variables(Some(&path), &["A=2".to_owned(), "D=".to_owned()]).unwrap();
        let pairs: Vec<_> =
            read.iter().map(|variable| (variable.name.as_str(), variable.value.as_str())).collect();
        assert_eq!(pairs, [("A", "1"), ("B", "two words"), ("C", "x=y"), ("A", "2"), ("D", "")]);
    }

    #[test]
    fn what_is_no_pair_is_refused_without_its_value() {
        let error = variables(None, &["no name=secret".to_owned()]).unwrap_err().to_string();
        assert_eq!(error, "use --var: it is not KEY=VALUE (\"no name\" is no name)");
        assert!(variables(None, &["alone".to_owned()]).is_err());
        assert!(inputs(&["=x".to_owned()]).is_err());
        let dotted = inputs(&["a-b.c=x".to_owned()]).unwrap();
        assert_eq!(dotted, [("a-b.c".to_owned(), "x".to_owned())]);
    }
}
