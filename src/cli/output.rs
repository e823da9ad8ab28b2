//! The only place that writes to standard output and standard error.
//!
//! Data goes to standard output, everything else to standard error. Tables need no colour to be
//! read and have no borders; `--json` is one object per line.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex, PoisonError};

use comfy_table::{Cell, ContentArrangement, presets};
use serde::Serialize;

/// Where a command writes.
#[derive(Clone, Debug)]
pub struct Output {
    sink: Sink,
}

#[derive(Clone, Debug)]
enum Sink {
    Process,
    Memory(Arc<Mutex<Captured>>),
}

#[derive(Debug, Default)]
struct Captured {
    out: String,
    err: String,
}

/// The output cannot be written; that its reader went away is told by the source.
#[derive(Debug, thiserror::Error)]
#[error("write the output")]
pub struct OutputError(#[from] io::Error);

/// A table that is about to be written.
#[derive(Clone, Debug)]
pub struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Output {
    /// Writes to the process's own outputs.
    pub fn process() -> Self {
        Self { sink: Sink::Process }
    }

    /// Keeps everything; for tests.
    pub fn memory() -> Self {
        Self { sink: Sink::Memory(Arc::default()) }
    }

    /// Gives what was written to standard output so far; nothing unless it is kept.
    pub fn kept(&self) -> String {
        match &self.sink {
            Sink::Process => String::new(),
            Sink::Memory(kept) => kept.lock().unwrap_or_else(PoisonError::into_inner).out.clone(),
        }
    }

    /// Gives what was written to standard error so far; nothing unless it is kept.
    pub fn kept_notes(&self) -> String {
        match &self.sink {
            Sink::Process => String::new(),
            Sink::Memory(kept) => kept.lock().unwrap_or_else(PoisonError::into_inner).err.clone(),
        }
    }

    /// Writes bytes of data as they are: a trace.
    pub fn bytes(&self, bytes: &[u8]) -> Result<(), OutputError> {
        match &self.sink {
            Sink::Process => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                Ok(out.flush()?)
            }
            Sink::Memory(kept) => {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.out.push_str(&String::from_utf8_lossy(bytes));
                Ok(())
            }
        }
    }

    /// Writes one line of data.
    pub fn line(&self, text: &str) -> Result<(), OutputError> {
        self.bytes(format!("{text}\n").as_bytes())
    }

    /// Writes one object as one line of JSON.
    pub fn json(&self, object: &impl Serialize) -> Result<(), OutputError> {
        self.line(&serde_json::to_string(object).map_err(io::Error::from)?)
    }

    /// Writes a table, or each row as JSON.
    pub fn list<R: Serialize>(
        &self,
        json: bool,
        rows: &[R],
        table: impl FnOnce(&[R]) -> Table,
    ) -> Result<(), OutputError> {
        if json {
            return rows.iter().try_for_each(|row| self.json(row));
        }
        self.table(&table(rows))
    }

    /// Writes a table; it is as wide as it needs to be, unless a terminal is narrower.
    pub fn table(&self, table: &Table) -> Result<(), OutputError> {
        let terminal = match &self.sink {
            Sink::Process => io::stdout().is_terminal(),
            Sink::Memory(_) => false,
        };
        self.line(&table.render(terminal))
    }

    /// Writes a line for people to standard error.
    pub fn note(&self, text: &str) -> Result<(), OutputError> {
        self.prompt(&format!("{text}\n"))
    }

    /// Writes to standard error without ending the line.
    pub fn prompt(&self, text: &str) -> Result<(), OutputError> {
        match &self.sink {
            Sink::Process => {
                let mut err = io::stderr().lock();
                err.write_all(text.as_bytes())?;
                Ok(err.flush()?)
            }
            Sink::Memory(kept) => {
                kept.lock().unwrap_or_else(PoisonError::into_inner).err.push_str(text);
                Ok(())
            }
        }
    }
}

impl Table {
    /// Makes a table with these column names, in capitals.
    pub fn new(header: impl IntoIterator<Item = &'static str>) -> Self {
        Self { header: header.into_iter().collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    fn render(&self, terminal: bool) -> String {
        let mut table = comfy_table::Table::new();
        table.load_preset(presets::NOTHING).set_content_arrangement(if terminal {
            ContentArrangement::Dynamic
        } else {
            ContentArrangement::Disabled
        });
        if !terminal {
            table.force_no_tty();
        }
        table.set_header(self.header.iter().map(Cell::new));
        for row in &self.rows {
            table.add_row(row);
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        table.trim_fmt()
    }
}

/// Replaces what a terminal would obey: names come from GitLab's users and from batch systems.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Shows what may be absent.
pub fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_left_aligned_with_two_spaces_and_no_borders() {
        let output = Output::memory();
        let mut table = Table::new(["NAME", "STATE"]);
        table.row(["a-long-name".to_owned(), "ok".to_owned()]);
        table.row(["日本".to_owned(), "bad".to_owned()]);
        output.table(&table).unwrap();
        assert_eq!(output.kept(), "NAME         STATE\na-long-name  ok\n日本         bad\n");
    }

    #[test]
    fn an_empty_table_still_names_its_columns() {
        let output = Output::memory();
        output.table(&Table::new(["NAME", "STATE"])).unwrap();
        assert_eq!(output.kept(), "NAME  STATE\n");
    }

    #[test]
    fn a_cell_cannot_steer_the_terminal() {
        let output = Output::memory();
        let mut table = Table::new(["NAME"]);
        table.row(["a\u{1b}[2Jb\nc".to_owned()]);
        output.table(&table).unwrap();
        assert_eq!(output.kept(), "NAME\na\u{fffd}[2Jb\u{fffd}c\n");
    }

    #[test]
    fn json_is_one_object_a_line() {
        let output = Output::memory();
        let rows = [serde_json::json!({"a": "x\ny"}), serde_json::json!({"a": 2})];
        output.list(true, &rows, |_rows| Table::new([])).unwrap();
        assert_eq!(output.kept(), "{\"a\":\"x\\ny\"}\n{\"a\":2}\n");
    }
}
