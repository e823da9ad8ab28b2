//! What `bridge exec` shows: a live line per job on a terminal, plain lines elsewhere, a table at
//! the end, and traces.
//!
//! Plain data comes in; nothing here knows of pipelines, stores or backends. It writes to what it
//! is given, and to the terminal through indicatif.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, IsTerminal as _, Read, Write};
use std::time::Duration;

use comfy_table::{Table, presets};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Longest name that lines are aligned to; a longer one pushes its own line out.
const MAX_NAME_WIDTH: usize = 40;

/// Width of the state, so that what follows does not jump when it changes.
const STATE_WIDTH: usize = 16;

/// Time between two pictures of a spinner.
const TICK: Duration = Duration::from_millis(120);

/// Longest time that is counted on; indicatif subtracts it from a clock that may not go back so far.
const MAX_ELAPSED: Duration = Duration::from_secs(365 * 24 * 3600);

/// What to show of one job now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobLine {
    /// The job's name.
    pub name: String,
    /// The stage it belongs to.
    pub stage: String,
    /// Its state in a few words.
    pub state: String,
    /// What the state means for the line.
    pub mood: Mood,
    /// The backend's name for it, once it has one.
    pub external_id: Option<String>,
    /// How long it has been, or was, under way.
    pub elapsed: Duration,
}

/// What a job's state means for a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mood {
    /// Not begun.
    Waiting,
    /// Under way.
    Active,
    /// Over, and well.
    Good,
    /// Over, not well, and that is all right.
    Warning,
    /// Over, and not well.
    Bad,
    /// Over without having begun.
    Skipped,
}

impl Mood {
    /// Whether the job will not change any more.
    pub fn is_over(self) -> bool {
        match self {
            Self::Waiting | Self::Active => false,
            Self::Good | Self::Warning | Self::Bad | Self::Skipped => true,
        }
    }

    /// Whether the job failed, allowed or not, so that its trace is wanted.
    pub fn is_failure(self) -> bool {
        match self {
            Self::Warning | Self::Bad => true,
            Self::Waiting | Self::Active | Self::Good | Self::Skipped => false,
        }
    }

    fn style(self) -> ProgressStyle {
        // The colour of a sign can be set for a spinner only; one that stands still has one sign.
        let (template, signs): (_, &[&str]) = match self {
            Self::Waiting => ("{spinner:.dim} {prefix:.dim}  {msg:.dim}", &["·", "·"]),
            Self::Active => (
                "{spinner:.cyan} {prefix}  {msg}  {elapsed:.dim}",
                &["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏", "⠋"],
            ),
            Self::Good => ("{spinner:.green} {prefix}  {msg}", &["✓", "✓"]),
            Self::Warning => ("{spinner:.yellow} {prefix}  {msg}", &["!", "!"]),
            Self::Bad => ("{spinner:.red} {prefix}  {msg}", &["✗", "✗"]),
            Self::Skipped => ("{spinner:.dim} {prefix:.dim}  {msg:.dim}", &["-", "-"]),
        };
        ProgressStyle::with_template(template)
            .expect("the templates above are well-formed")
            .tick_strings(signs)
    }
}

/// Whether standard error is a terminal that can redraw lines.
pub fn is_live() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// The running picture of a pipeline.
#[derive(Debug)]
pub struct View<W> {
    out: W,
    width: usize,
    places: HashMap<String, usize>,
    shown: Vec<Option<JobLine>>,
    live: Option<Live>,
}

#[derive(Debug)]
struct Live {
    screen: MultiProgress,
    bars: Vec<ProgressBar>,
}

impl<W: Write> View<W> {
    /// Shows the jobs of these names as lines on standard error that change in place.
    ///
    /// For when [`is_live`] says so; nothing goes to `out`, which [`View::finish`] gives back.
    pub fn live(names: &[String], out: W) -> Self {
        Self::drawn(names, out, ProgressDrawTarget::stderr())
    }

    /// Writes a line to `out` whenever something about a job changes.
    pub fn plain(names: &[String], out: W) -> Self {
        let width = names.iter().map(|name| clean(name).chars().count()).max().unwrap_or(0);
        Self {
            out,
            width: width.min(MAX_NAME_WIDTH),
            places: names.iter().cloned().zip(0..).collect(),
            shown: vec![None; names.len()],
            live: None,
        }
    }

    fn drawn(names: &[String], out: W, target: ProgressDrawTarget) -> Self {
        let screen = MultiProgress::with_draw_target(target);
        let bars = names.iter().map(|_| screen.add(ProgressBar::new_spinner())).collect();
        Self { live: Some(Live { screen, bars }), ..Self::plain(names, out) }
    }

    /// Shows what has become of a job. A line that says what is already shown changes nothing.
    pub fn update(&mut self, line: &JobLine) -> io::Result<()> {
        let Some(&place) = self.places.get(&line.name) else { return Ok(()) };
        let before = self.shown[place].replace(line.clone());
        let same = before.as_ref().is_some_and(|before| {
            before.state == line.state
                && before.mood == line.mood
                && before.external_id == line.external_id
        });
        if same {
            return Ok(());
        }
        match &self.live {
            Some(live) => {
                draw(&live.bars[place], line, self.width, before.map(|line| line.mood));
                Ok(())
            }
            None => {
                let name = clean(&line.name);
                let mut text = format!("{name:<width$}  {}", told(line), width = self.width);
                if !matches!(line.mood, Mood::Waiting | Mood::Skipped) {
                    text = format!("{text}  {}", Elapsed(line.elapsed));
                }
                writeln!(self.out, "{}", text.trim_end())?;
                self.out.flush()
            }
        }
    }

    /// Says something that is about no single job.
    pub fn note(&mut self, text: &str) -> io::Result<()> {
        match &self.live {
            Some(live) => live.screen.println(text),
            None => {
                writeln!(self.out, "{text}")?;
                self.out.flush()
            }
        }
    }

    /// Ends the picture, leaves it as it is, and gives back where it was written.
    pub fn finish(self) -> W {
        for bar in self.live.iter().flat_map(|live| &live.bars) {
            if !bar.is_finished() {
                bar.abandon();
            }
        }
        self.out
    }
}

fn draw(bar: &ProgressBar, line: &JobLine, width: usize, before: Option<Mood>) {
    if before != Some(line.mood) {
        bar.set_style(line.mood.style());
    }
    let name = clean(&line.name);
    bar.set_prefix(format!("{name:<width$}"));
    if line.mood.is_over() {
        bar.disable_steady_tick();
        let shown = if line.mood == Mood::Skipped {
            line.state.clone()
        } else {
            format!("{}  {}", told(line), Elapsed(line.elapsed))
        };
        bar.finish_with_message(shown);
        return;
    }
    bar.set_message(told(line));
    if line.mood == Mood::Active && before != Some(Mood::Active) {
        // From here the terminal counts by itself, also while no update comes.
        drop(bar.clone().with_elapsed(line.elapsed.min(MAX_ELAPSED)));
        bar.enable_steady_tick(TICK);
    } else {
        bar.tick();
    }
}

/// Gives state and external id in columns.
fn told(line: &JobLine) -> String {
    let id = line.external_id.as_deref().map(clean).unwrap_or_default();
    format!("{:<STATE_WIDTH$}  {id:<12}", clean(&line.state))
}

/// Gives the table that ends a run.
pub fn summary(lines: &[JobLine]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["JOB", "STAGE", "RESULT", "ID", "ELAPSED"]);
    for line in lines {
        let elapsed = if line.mood == Mood::Skipped {
            String::new()
        } else {
            Elapsed(line.elapsed).to_string()
        };
        table.add_row([
            clean(&line.name),
            clean(&line.stage),
            clean(&line.state),
            clean(line.external_id.as_deref().unwrap_or("")),
            elapsed,
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = String::new();
    for row in table.lines() {
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

/// Writes a job's trace below a heading, as it is, and ends it with a line break.
///
/// Bytes are passed on untouched: section marks erase themselves on a terminal, and whoever reads
/// a file wants what GitLab would have got.
pub fn write_trace(out: &mut dyn Write, line: &JobLine, mut trace: impl Read) -> io::Result<()> {
    writeln!(out, "── trace of {} ({}) ──", clean(&line.name), clean(&line.state))?;
    let mut buffer = [0; 8192];
    let mut last = b'\n';
    let mut coloured = false;
    loop {
        let count = match trace.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let Some(read) = buffer.get(..count).filter(|read| !read.is_empty()) else { break };
        out.write_all(read)?;
        last = read.last().copied().unwrap_or(last);
        coloured |= read.contains(&0x1b);
    }
    if coloured {
        // It may stop in the middle of a colour, which would run on into everything after it.
        out.write_all(b"\x1b[0m")?;
    }
    if last != b'\n' {
        out.write_all(b"\n")?;
    }
    out.flush()
}

/// Gives a name without the characters that would move the cursor.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A time span as people say it, with as much of it as they care for.
struct Elapsed(Duration);

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        let tenths = self.0.subsec_millis() / 100;
        match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
            (0, 0, seconds) if seconds < 10 => write!(f, "{seconds}.{tenths}s"),
            (0, 0, seconds) => write!(f, "{seconds}s"),
            (0, minutes, seconds) => write!(f, "{minutes}m {seconds:02}s"),
            (hours, minutes, _) => write!(f, "{hours}h {minutes:02}m"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, state: &str, mood: Mood, id: Option<&str>, millis: u64) -> JobLine {
        JobLine {
            name: name.into(),
            stage: "build".into(),
            state: state.into(),
            mood,
            external_id: id.map(Into::into),
            elapsed: Duration::from_millis(millis),
        }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_plain_view_writes_a_line_only_when_something_changed() {
        let mut view = View::plain(&names(&["build", "a-longer-one"]), Vec::new());
        view.note("note: `tags` are ignored").unwrap();
        for update in [
            line("build", "waiting", Mood::Waiting, None, 0),
            line("build", "waiting", Mood::Waiting, None, 300),
            line("build", "running", Mood::Active, Some("4711"), 500),
            line("build", "running", Mood::Active, Some("4711"), 900),
            line("build", "passed", Mood::Good, Some("4711"), 61_000),
            line("unheard of", "running", Mood::Active, None, 0),
            line("a-longer-one", "skipped", Mood::Skipped, None, 0),
        ] {
            view.update(&update).unwrap();
        }
        insta::assert_snapshot!(String::from_utf8(view.finish()).unwrap(), @r"
        note: `tags` are ignored
        build         waiting
        build         running           4711          0.5s
        build         passed            4711          1m 01s
        a-longer-one  skipped
        ");
    }

    #[test]
    fn the_summary_is_a_table_without_borders() {
        let lines = [
            line("build", "passed", Mood::Good, Some("4711"), 4230),
            line("lint everything", "failed (allowed)", Mood::Warning, Some("4712"), 12_000),
            line("deploy", "skipped (manual)", Mood::Skipped, None, 0),
        ];
        insta::assert_snapshot!(summary(&lines), @r"
        JOB              STAGE  RESULT            ID    ELAPSED
        build            build  passed            4711  4.2s
        lint everything  build  failed (allowed)  4712  12s
        deploy           build  skipped (manual)
        ");
    }

    #[test]
    fn a_live_view_shows_state_id_and_time_and_rests_when_the_job_is_over() {
        let target = ProgressDrawTarget::hidden();
        let mut view = View::drawn(&names(&["build", "test"]), Vec::new(), target);
        view.update(&line("build", "running", Mood::Active, Some("4711"), 5000)).unwrap();
        view.update(&line("test", "waiting", Mood::Waiting, None, 0)).unwrap();
        let bars = view.live.as_ref().unwrap().bars.clone();
        assert_eq!(bars[0].prefix(), "build");
        assert_eq!(bars[0].message(), format!("{:<16}  {:<12}", "running", "4711"));
        assert!(bars[0].elapsed() >= Duration::from_secs(5));
        assert!(!bars[0].is_finished());
        view.update(&line("build", "failed", Mood::Bad, Some("4711"), 7000)).unwrap();
        assert!(bars[0].is_finished());
        assert_eq!(bars[0].message(), format!("{:<16}  {:<12}  7.0s", "failed", "4711"));
        assert!(!bars[1].is_finished());
        assert!(view.finish().is_empty());
        assert!(bars[1].is_finished());
    }

    #[test]
    fn every_mood_has_a_style_that_can_be_drawn() {
        use Mood::{Active, Bad, Good, Skipped, Waiting, Warning};
        for mood in [Waiting, Active, Good, Warning, Bad, Skipped] {
            drop(mood.style());
        }
    }

    #[test]
    fn a_trace_is_passed_on_byte_for_byte_and_ends_its_line_and_its_colours() {
        let mut out = Vec::new();
        let failed = line("b\x1bad", "failed", Mood::Bad, None, 0);
        write_trace(&mut out, &failed, &b"\x1b[31mno\xff"[..]).unwrap();
        let mut expected = "── trace of b?ad (failed) ──\n\x1b[31mno".as_bytes().to_vec();
        expected.extend(b"\xff\x1b[0m\n");
        assert_eq!(out, expected);
        let mut out = Vec::new();
        let long = "line\n".repeat(5000);
        write_trace(&mut out, &line("ok", "passed", Mood::Good, None, 0), long.as_bytes()).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), format!("── trace of ok (passed) ──\n{long}"));
    }

    #[test]
    fn time_spans_are_as_exact_as_people_care_for() {
        for (millis, text) in [
            (0, "0.0s"),
            (4230, "4.2s"),
            (10_000, "10s"),
            (65_900, "1m 05s"),
            (3_725_000, "1h 02m"),
        ] {
            assert_eq!(Elapsed(Duration::from_millis(millis)).to_string(), text);
        }
    }
}
