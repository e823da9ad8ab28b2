//! The one way errors are written out.

use std::error::Error;
use std::fmt;

/// Shows an error and its causes as `x: y: z`; a cause that its parent already said is left out.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'a));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(said.trim_end())?;
        let mut next = self.0.source();
        while let Some(error) = next {
            let text = error.to_string();
            let text = text.trim_end();
            // Foreign errors often repeat their source; ours do not.
            if !text.is_empty() && !said.contains(text) {
                write!(f, ": {text}")?;
                text.clone_into(&mut said);
            }
            next = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Layer(&'static str, Option<Box<Self>>);

    impl fmt::Display for Layer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Layer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|error| -> &(dyn Error + 'static) { error })
        }
    }

    fn layers(texts: &[&'static str]) -> Layer {
        match texts {
            [last] => Layer(last, None),
            [first, rest @ ..] => Layer(first, Some(Box::new(layers(rest)))),
            [] => panic!("no layers"),
        }
    }

    #[test]
    fn every_layer_is_said_once() {
        let error = layers(&["read the file", "open /x", "permission denied"]);
        assert_eq!(Chain(&error).to_string(), "read the file: open /x: permission denied");
    }

    #[test]
    fn a_layer_that_repeats_its_cause_swallows_it() {
        let error =
            layers(&["ask GitLab: connection refused", "connection refused", "os error 111"]);
        assert_eq!(Chain(&error).to_string(), "ask GitLab: connection refused: os error 111");
    }
}
