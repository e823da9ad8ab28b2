//! Which files a job's patterns mean.
//!
//! The rules are the official runner's (`commands/helpers/file_archiver.go`): a pattern matches names
//! relative to the root; a directory that matches is walked; links are stored as links. All patterns
//! share one walk, which lists a directory only if one of them can match something in it.
//!
//! Where the official runner is plainly wrong, this is not:
//!
//! * A thing that a pattern meets twice, by itself and inside a directory that matches as well, counts
//!   once.
//! * Links are followed where a pattern names them before any special character, as over there, but
//!   only while they stay inside the root. A link and what is behind it are never both selected: that
//!   archive could not be unpacked.
//! * An exclusion that leads out of the root excludes nothing; the others still do.
//! * `a\[b\]/*` means the directory `a[b]`.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{ffi::OsStr, io, os::unix::ffi::OsStrExt as _};

use camino::Utf8Path;
use rustix::fs::{FileType, RawDir};

use super::beneath::Beneath;
use super::glob::{self, Alternative, BadPattern, Segment};
use super::{ArchiveError, go_on, shown};

/// The name under which what git listed is counted.
pub const UNTRACKED: &str = "untracked";

/// With more states than this in one directory, those that want one exact name are looked up.
const MANY_STATES: usize = 16;

/// What a job wants packed.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Patterns of files and directories.
    pub paths: Vec<String>,
    /// Patterns of names that are left out.
    pub exclude: Vec<String>,
    /// Names that git listed as untracked, relative to the root.
    pub untracked: Vec<Vec<u8>>,
}

/// What something in a selection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link, which is never followed.
    Link,
    /// A pipe, a socket or a device.
    Special,
}

impl Kind {
    pub(super) fn of(kind: FileType) -> Self {
        match kind {
            FileType::RegularFile => Self::File,
            FileType::Directory => Self::Directory,
            FileType::Symlink => Self::Link,
            FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Unknown => Self::Special,
        }
    }
}

/// One thing that was selected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name relative to the root, without a slash at its end; the root itself is `.`.
    pub name: Vec<u8>,
    /// What it was when it was found.
    pub kind: Kind,
    /// Where it lies, if its name leads through a link.
    behind: Option<Box<[u8]>>,
}

impl Entry {
    /// Names a thing that lies where its name says.
    pub fn new(name: Vec<u8>, kind: Kind) -> Self {
        Self { name, kind, behind: None }
    }

    /// The way to it, relative to the root and free of links.
    pub(super) fn place(&self) -> &[u8] {
        self.behind.as_deref().unwrap_or(&self.name)
    }
}

/// What patterns select.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Sorted by name, each name once; a directory stands before what is in it.
    pub entries: Vec<Entry>,
    /// How many things each pattern found, in the order of the patterns, [`UNTRACKED`] last; only those
    /// that found any.
    pub found: Vec<(String, usize)>,
    /// How many things each pattern left out; only those that left out any.
    pub excluded: Vec<(String, usize)>,
    /// Sentences for the job's log.
    pub warnings: Vec<String>,
}

impl Selection {
    /// What was counted, in the words of the official runner.
    pub fn report(&self) -> Vec<String> {
        let found = self.found.iter().map(|(pattern, count)| {
            if pattern == UNTRACKED {
                format!("{pattern}: found {count} files")
            } else {
                format!("{pattern}: found {count} matching artifact files and directories")
            }
        });
        let excluded = self.excluded.iter();
        let excluded =
            excluded.map(|(pattern, count)| format!("{pattern}: excluded {count} files"));
        found.chain(excluded).collect()
    }

    /// Says whether anything selected was changed after `time`; what has vanished was not.
    pub fn is_newer_than(
        &self,
        root: &Utf8Path,
        time: SystemTime,
        stop: &AtomicBool,
    ) -> Result<bool, ArchiveError> {
        let mut beneath = Beneath::open(root).map_err(ArchiveError::io("open", root.as_str()))?;
        for entry in &self.entries {
            go_on(stop)?;
            let Ok(stat) = beneath.stat(entry.place()) else { continue };
            let seconds = u64::try_from(stat.st_mtime).unwrap_or_default();
            let nanos = stat.st_mtime_nsec;
            let changed = UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_nanos(nanos);
            if changed > time {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Finds the files below `root` that the patterns mean.
pub fn select(
    root: &Utf8Path,
    wanted: &Wanted,
    stop: &AtomicBool,
) -> Result<Selection, ArchiveError> {
    let beneath = Beneath::open(root).map_err(ArchiveError::io("open", root.as_str()))?;
    let real = std::fs::canonicalize(root).map_err(ArchiveError::io("resolve", root.as_str()))?;
    let mut walk = Walk {
        root,
        real,
        beneath,
        stop,
        alternatives: Vec::new(),
        exclusions: Exclusions::default(),
        found: vec![0; wanted.paths.len()],
        entries: Vec::new(),
        followed: Vec::new(),
        warnings: Vec::new(),
    };
    for pattern in &wanted.exclude {
        walk.exclude(pattern);
    }
    let mut refused = vec![false; wanted.paths.len()];
    for (index, pattern) in wanted.paths.iter().enumerate() {
        if let (Some(refused), false) = (refused.get_mut(index), walk.want(index, pattern)) {
            *refused = true;
        }
    }
    walk.run()?;

    let untracked = walk.take_untracked(&wanted.untracked)?;
    let mut selection = Selection::default();
    for ((pattern, found), refused) in wanted.paths.iter().zip(&walk.found).zip(refused) {
        match (found, refused) {
            (_, true) => {}
            (0, false) => walk.warnings.push(format!(
                "{pattern}: no matching files. Ensure that the artifact path is relative to the \
                 working directory ({root})"
            )),
            (found, false) => selection.found.push((pattern.clone(), *found)),
        }
    }
    match untracked {
        0 if wanted.untracked.is_empty() => {}
        0 => walk.warnings.push(format!("{UNTRACKED}: no files")),
        count => selection.found.push((UNTRACKED.to_owned(), count)),
    }
    selection.entries = walk.sorted();
    if selection.entries.iter().any(|entry| is_git(&entry.name)) {
        walk.warnings.push("Part of .git directory is on the list of files to archive".to_owned());
        walk.warnings.push("This may introduce unexpected problems".to_owned());
    }
    selection.excluded = walk.exclusions.counted();
    selection.warnings = walk.warnings;
    Ok(selection)
}

/// Says whether a name is that of the repository's own directory, or of something in it.
pub(super) fn is_git(name: &[u8]) -> bool {
    name.split(|byte| *byte == b'/').next() == Some(b".git")
}

/// Says whether there is nothing of this name; one that is too long is the name of nothing.
fn names_nothing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::InvalidFilename
    )
}

fn below(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

/// What is left out, and how often.
#[derive(Default)]
struct Exclusions {
    patterns: Vec<(String, usize)>,
    /// Those that mean one name.
    exact: HashMap<Vec<u8>, usize>,
    others: Vec<(usize, Vec<Segment>)>,
}

impl Exclusions {
    fn add(&mut self, pattern: &str, variants: Vec<Vec<Segment>>) {
        let index = self.patterns.len();
        self.patterns.push((pattern.to_owned(), 0));
        for segments in variants {
            let names: Option<Vec<&[u8]>> = segments
                .iter()
                .map(|segment| match segment {
                    Segment::Literal { name, .. } => Some(name.as_slice()),
                    Segment::Stars | Segment::Shape(_) => None,
                })
                .collect();
            match names {
                Some(names) => {
                    self.exact.entry(names.join(&b'/')).or_insert(index);
                }
                None => self.others.push((index, segments)),
            }
        }
    }

    /// Says whether a name is left out, and counts it for the first pattern that says so.
    fn covers(&mut self, name: &[u8]) -> bool {
        let exact = self.exact.get(name).copied();
        let before = exact.unwrap_or(usize::MAX);
        let mut others = self.others.iter().take_while(|(index, _)| *index < before);
        let index = others
            .find(|(_, segments)| glob::matches(segments, name))
            .map(|(index, _)| *index)
            .or(exact);
        let counted = index.and_then(|index| self.patterns.get_mut(index));
        counted.map(|(_, count)| *count += 1).is_some()
    }

    fn counted(&mut self) -> Vec<(String, usize)> {
        self.patterns.drain(..).filter(|(_, count)| *count > 0).collect()
    }
}

/// How far one alternative has come: the segment that the names of a directory are compared with.
type State = (usize, usize);

/// A directory that is to be looked into.
struct Task {
    /// The way to it, free of links.
    place: Vec<u8>,
    /// Its name in the archive.
    name: Vec<u8>,
    states: Vec<State>,
    /// The patterns that take everything in it.
    taken: Rc<[usize]>,
}

/// What the patterns say about one name in a directory.
#[derive(Default)]
struct Step {
    /// The patterns that match it.
    matched: Vec<usize>,
    /// The patterns that match it if it is not a link to nothing.
    asked: Vec<usize>,
    /// What goes on below it if it is a directory.
    inside: Vec<State>,
    /// What goes on behind it if it is a link to a directory.
    behind: Vec<State>,
}

struct Walk<'a> {
    root: &'a Utf8Path,
    real: PathBuf,
    beneath: Beneath,
    stop: &'a AtomicBool,
    /// Each with the index of its pattern.
    alternatives: Vec<(usize, Alternative)>,
    exclusions: Exclusions,
    found: Vec<usize>,
    entries: Vec<Entry>,
    /// Links that names lead through.
    followed: Vec<Vec<u8>>,
    warnings: Vec<String>,
}

impl Walk<'_> {
    fn exclude(&mut self, pattern: &str) {
        match self.read(pattern).map(|relative| glob::of_names(&relative)) {
            Ok(Ok(variants)) => self.exclusions.add(pattern, variants),
            Ok(Err(error)) => self.warnings.push(format!("{pattern}: {error}")),
            Err(outside) => self.warnings.push(format!("isExcluded: {outside}")),
        }
    }

    /// Takes a pattern up; says whether it can match anything at all.
    fn want(&mut self, index: usize, pattern: &str) -> bool {
        if pattern.is_empty() {
            self.warnings.push("No matching files. Path is empty.".to_owned());
            return false;
        }
        let alternatives: Result<Vec<Alternative>, BadPattern> = match self.read(pattern) {
            Ok(relative) if relative == "." => {
                Ok(vec![Alternative { segments: Vec::new(), directory: false }])
            }
            Ok(relative) => glob::of_files(&relative),
            Err(outside) => {
                self.warnings.push(format!("processPath: {outside}"));
                return false;
            }
        };
        match alternatives {
            Ok(alternatives) => {
                self.alternatives.extend(alternatives.into_iter().map(|one| (index, one)));
                true
            }
            Err(error) => {
                self.warnings.push(format!("{pattern}: {error}"));
                false
            }
        }
    }

    fn read(&self, pattern: &str) -> Result<String, String> {
        glob::relative(self.root.as_str(), pattern).ok_or_else(|| {
            format!("artifact path is not a subpath of project directory: {pattern}")
        })
    }

    fn run(&mut self) -> Result<(), ArchiveError> {
        let mut matched = Vec::new();
        let mut states = Vec::new();
        for (index, (pattern, alternative)) in self.alternatives.iter().enumerate() {
            if alternative.segments.is_empty() {
                matched.push(*pattern);
            } else {
                states.push((index, 0));
            }
        }
        let states = self.enter(states, &mut matched);
        let taken = self.record(b".", b".", Kind::Directory, matched, &[]);
        let mut tasks = vec![Task { place: Vec::new(), name: Vec::new(), states, taken }];
        while let Some(task) = tasks.pop() {
            go_on(self.stop)?;
            if let Err(error) = self.look_into(&task, &mut tasks) {
                if matches!(error.kind(), io::ErrorKind::Interrupted) {
                    return Err(ArchiveError::Stopped);
                }
                if !names_nothing(&error) {
                    self.warnings.push(format!("{}: {error}", shown(&task.name)));
                }
            }
        }
        Ok(())
    }

    /// Adds what a double star may skip, and notes the patterns that end in one: they match the
    /// directory itself.
    fn enter(&self, raw: Vec<State>, matched: &mut Vec<usize>) -> Vec<State> {
        let mut states: Vec<State> = Vec::with_capacity(raw.len());
        for (index, mut segment) in raw {
            let Some((pattern, alternative)) = self.alternatives.get(index) else { continue };
            loop {
                let stars = alternative.segments.get(segment) == Some(&Segment::Stars);
                if stars && segment + 1 == alternative.segments.len() {
                    matched.push(*pattern);
                    break;
                }
                states.push((index, segment));
                if !stars {
                    break;
                }
                segment += 1;
            }
        }
        states.sort_unstable();
        states.dedup();
        states
    }

    /// Adds something to what was selected, unless it is left out. The patterns that take everything
    /// below it are the answer, sorted.
    fn record(
        &mut self,
        name: &[u8],
        place: &[u8],
        kind: Kind,
        mut matched: Vec<usize>,
        taken: &[usize],
    ) -> Rc<[usize]> {
        matched.extend_from_slice(taken);
        matched.sort_unstable();
        matched.dedup();
        if !matched.is_empty() && !self.exclusions.covers(name) {
            for pattern in &matched {
                if let Some(found) = self.found.get_mut(*pattern) {
                    *found += 1;
                }
            }
            let behind = (place != name).then(|| place.into());
            self.entries.push(Entry { name: name.to_vec(), kind, behind });
        }
        matched.into()
    }

    fn look_into(&mut self, task: &Task, tasks: &mut Vec<Task>) -> io::Result<()> {
        let asked = |state: &State| {
            let segment = self.segment(*state);
            matches!(segment, Some(Segment::Literal { asked: true, .. }))
        };
        if task.taken.is_empty() && task.states.iter().all(asked) {
            return self.ask(task, tasks);
        }
        let directory = self.beneath.directory(&task.place)?;
        let index = Index::of(self, &task.states);
        let mut buffer = vec![MaybeUninit::uninit(); 64 * 1024];
        let mut listing = RawDir::new(&directory, &mut buffer);
        let mut seen = 0_u32;
        while let Some(entry) = listing.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            seen = seen.wrapping_add(1);
            if seen.is_multiple_of(1024) && go_on(self.stop).is_err() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let mut kind = entry.file_type();
            if kind == FileType::Unknown {
                // Some file systems do not say in the listing.
                kind = match self.beneath.stat(&below(&task.place, name)) {
                    Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
            }
            let kind = Kind::of(kind);
            let step = index.step(self, name, kind);
            self.child(task, name, kind, step, tasks);
        }
        Ok(())
    }

    /// Asks for names instead of reading a listing that nothing else needs.
    fn ask(&mut self, task: &Task, tasks: &mut Vec<Task>) -> io::Result<()> {
        let index = Index::of(self, &task.states);
        let mut names: Vec<Vec<u8>> = task
            .states
            .iter()
            .filter_map(|state| match self.segment(*state) {
                Some(Segment::Literal { name, .. }) => Some(name.clone()),
                Some(Segment::Stars | Segment::Shape(_)) | None => None,
            })
            .collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let kind = match self.beneath.stat(&below(&task.place, &name)) {
                Ok(stat) => Kind::of(FileType::from_raw_mode(stat.st_mode)),
                Err(error) if names_nothing(&error) => continue,
                Err(error) => return Err(error),
            };
            let step = index.step(self, &name, kind);
            self.child(task, &name, kind, step, tasks);
        }
        Ok(())
    }

    fn segment(&self, (index, segment): State) -> Option<&Segment> {
        self.alternatives.get(index)?.1.segments.get(segment)
    }

    fn child(
        &mut self,
        task: &Task,
        name: &[u8],
        kind: Kind,
        mut step: Step,
        tasks: &mut Vec<Task>,
    ) {
        if task.taken.is_empty()
            && step.matched.is_empty()
            && step.asked.is_empty()
            && step.inside.is_empty()
            && step.behind.is_empty()
        {
            return;
        }
        let full = below(&task.name, name);
        let place = below(&task.place, name);
        if !step.asked.is_empty()
            && (kind != Kind::Link || self.real.join(OsStr::from_bytes(&place)).exists())
        {
            step.matched.append(&mut step.asked);
        }
        match kind {
            Kind::Directory => {
                let mut states = self.enter(step.inside, &mut step.matched);
                let taken = self.record(&full, &place, kind, step.matched, &task.taken);
                states.retain(|(index, _)| {
                    let pattern = self.alternatives.get(*index).map(|(pattern, _)| pattern);
                    pattern.is_some_and(|pattern| taken.binary_search(pattern).is_err())
                });
                if !states.is_empty() || !taken.is_empty() {
                    tasks.push(Task { place, name: full, states, taken });
                }
            }
            Kind::Link => {
                if !step.behind.is_empty() {
                    self.follow(&full, &place, step.behind, tasks);
                }
                self.record(&full, &place, kind, step.matched, &task.taken);
            }
            Kind::File | Kind::Special => {
                self.record(&full, &place, kind, step.matched, &task.taken);
            }
        }
    }

    /// Goes on behind a link that a pattern names, if it leads to a directory inside the root.
    fn follow(&mut self, name: &[u8], place: &[u8], states: Vec<State>, tasks: &mut Vec<Task>) {
        let link = self.real.join(OsStr::from_bytes(place));
        let Ok(target) = std::fs::canonicalize(&link) else { return };
        let Ok(place) = target.strip_prefix(&self.real) else {
            self.warnings.push(format!("{}: not supported: outside build directory", shown(name)));
            return;
        };
        if !target.is_dir() {
            return;
        }
        let place = place.as_os_str().as_bytes().to_vec();
        let mut matched = Vec::new();
        let states = self.enter(states, &mut matched);
        matched.sort_unstable();
        matched.dedup();
        self.followed.push(name.to_vec());
        tasks.push(Task { place, name: name.to_vec(), states, taken: matched.into() });
    }

    /// Adds what git listed; says how many of it.
    fn take_untracked(&mut self, names: &[Vec<u8>]) -> Result<usize, ArchiveError> {
        let mut found = 0;
        for name in names {
            go_on(self.stop)?;
            let clean = glob::clean(name);
            if clean.starts_with(b"/") || clean == b".." || clean.starts_with(b"../") {
                let name = shown(name);
                self.warnings.push(format!("{name}: not supported: outside build directory"));
                continue;
            }
            if self.exclusions.covers(&clean) {
                continue;
            }
            // What has gone meanwhile is not mentioned.
            let Ok(stat) = self.beneath.stat(&clean) else { continue };
            let kind = Kind::of(FileType::from_raw_mode(stat.st_mode));
            self.entries.push(Entry { name: clean, kind, behind: None });
            found += 1;
        }
        Ok(found)
    }

    fn sorted(&mut self) -> Vec<Entry> {
        let mut entries = std::mem::take(&mut self.entries);
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        entries.dedup_by(|a, b| a.name == b.name);
        for link in &self.followed {
            let Ok(at) = entries.binary_search_by(|entry| entry.name.cmp(link)) else { continue };
            let inside = below(link, b"");
            let next = entries.partition_point(|entry| entry.name < inside);
            if entries.get(next).is_some_and(|entry| entry.name.starts_with(&inside)) {
                let link = entries.remove(at);
                let link = shown(&link.name);
                self.warnings.push(format!("{link}: left out, since files behind it are packed"));
            }
        }
        entries
    }
}

/// The states of one directory, ready to be asked about names.
struct Index<'a> {
    exact: HashMap<Vec<u8>, Vec<State>>,
    shapes: Vec<State>,
    stars: Vec<State>,
    all: &'a [State],
}

impl<'a> Index<'a> {
    fn of(walk: &Walk<'_>, states: &'a [State]) -> Self {
        let mut index =
            Self { exact: HashMap::new(), shapes: Vec::new(), stars: Vec::new(), all: states };
        if states.len() <= MANY_STATES {
            return index;
        }
        for state in states {
            match walk.segment(*state) {
                Some(Segment::Literal { name, .. }) => {
                    index.exact.entry(name.clone()).or_default().push(*state);
                }
                Some(Segment::Shape(_)) => index.shapes.push(*state),
                Some(Segment::Stars) => index.stars.push(*state),
                None => {}
            }
        }
        index
    }

    fn step(&self, walk: &Walk<'_>, name: &[u8], kind: Kind) -> Step {
        let mut step = Step::default();
        if self.all.len() <= MANY_STATES {
            for state in self.all {
                one_step(walk, *state, name, kind, &mut step);
            }
            return step;
        }
        for state in self.exact.get(name).into_iter().flatten().chain(&self.shapes) {
            one_step(walk, *state, name, kind, &mut step);
        }
        if kind == Kind::Directory {
            step.inside.extend_from_slice(&self.stars);
        }
        step
    }
}

fn one_step(walk: &Walk<'_>, state: State, name: &[u8], kind: Kind, step: &mut Step) {
    let (index, segment) = state;
    let Some((pattern, alternative)) = walk.alternatives.get(index) else { return };
    let Some(wanted) = alternative.segments.get(segment) else { return };
    if *wanted == Segment::Stars {
        if kind == Kind::Directory {
            step.inside.push(state);
        }
        return;
    }
    if !wanted.matches(name) {
        return;
    }
    let asked = matches!(wanted, Segment::Literal { asked: true, .. });
    let next = (index, segment + 1);
    if segment + 1 < alternative.segments.len() {
        match kind {
            Kind::Directory => step.inside.push(next),
            Kind::Link if asked => step.behind.push(next),
            Kind::Link | Kind::File | Kind::Special => {}
        }
    } else if asked {
        step.asked.push(*pattern);
    } else if kind == Kind::Directory || !alternative.directory {
        step.matched.push(*pattern);
    }
}
