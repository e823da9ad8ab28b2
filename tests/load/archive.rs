//! The benchmark of archives: packing against Info-ZIP's `zip`, choosing among 200,000 files, unpacking,
//! memory.
//!
//! `cargo bench --bench archive -- [--mib 1024] [--rounds 2]`
//!
//! The files are made anew each time, always the same ones. What is compared runs in turns, so that
//! whatever else the machine does meets both. Prints one line for each figure.

#![expect(
    clippy::panic,
    clippy::print_stdout,
    reason = "a benchmark prints, and ends when it cannot go on"
)]

use std::fs::File;
use std::io::{BufWriter, Seek as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use bridge::archive::{Bounds, Format, Level, Packed, Selection, Wanted, pack, select, unpack};
use camino::Utf8Path;

static NEVER: AtomicBool = AtomicBool::new(false);
const MIB: usize = 1024 * 1024;

/// xorshift: enough to look random to a compressor.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, most: usize) -> usize {
        usize::try_from(self.next() >> 33).expect("31 bits") % most
    }
}

/// Words with a frequency like that of language, as in logs and sources.
fn text(noise: &mut Noise, length: usize) -> Vec<u8> {
    const LETTERS: &[u8; 16] = b"etaoinshrdlucm_.";
    let mut words = Noise(7);
    let words: Vec<Vec<u8>> = (0..4000)
        .map(|_| (0..2 + words.below(9)).map(|_| LETTERS[words.below(16)]).collect())
        .collect();
    let mut text = Vec::with_capacity(length + 16);
    while text.len() < length {
        let rank = noise.below(words.len()) * noise.below(words.len()) / words.len();
        text.extend_from_slice(&words[rank]);
        text.push(if noise.below(12) == 0 { b'\n' } else { b' ' });
    }
    text.truncate(length);
    text
}

/// Records of which half the bytes repeat, as in object files.
fn object(noise: &mut Noise, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 16);
    let mut address = 0x40_0000_u64;
    while bytes.len() < length {
        address += noise.next() & 0x3F;
        bytes.extend_from_slice(&address.to_le_bytes());
        bytes.extend_from_slice(&(noise.next() & 0xFFFF_FF0F).to_le_bytes()[..5]);
        bytes.extend_from_slice(&[0x48, 0x89, 0xE5]);
    }
    bytes.truncate(length);
    bytes
}

fn random(noise: &mut Noise, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&noise.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Half text, a quarter object files, a quarter compressed already; files of all sizes.
fn mixed(root: &Path, mib: usize) -> usize {
    let mut noise = Noise(42);
    let mut total = 0;
    let mut number = 0;
    while total < mib * MIB {
        let length = match noise.below(100) {
            0 => 24 * MIB + noise.below(8 * MIB),
            1..30 => 256 * 1024 + noise.below(2 * MIB),
            _ => 512 + noise.below(64 * 1024),
        };
        let length = length.min(mib * MIB - total);
        let (kind, bytes) = match number % 4 {
            0 | 1 => ("log", text(&mut noise, length)),
            2 => ("o", object(&mut noise, length)),
            _ => ("jpg", random(&mut noise, length)),
        };
        let directory = root.join(format!("part{}/{kind}", number % 37));
        std::fs::create_dir_all(&directory).expect("a folder");
        std::fs::write(directory.join(format!("{number}.{kind}")), bytes).expect("a file");
        total += length;
        number += 1;
    }
    total
}

fn chosen(root: &Path, patterns: &[&str]) -> (Selection, Duration) {
    let paths = patterns.iter().map(|one| (*one).to_owned()).collect();
    let begun = Instant::now();
    let wanted = Wanted { paths, ..Wanted::default() };
    let selection = select(utf8(root), &wanted, &NEVER).expect("a selection");
    (selection, begun.elapsed())
}

fn utf8(path: &Path) -> &Utf8Path {
    Utf8Path::from_path(path).expect("a temporary folder has a plain name")
}

fn packed(root: &Path, into: &mut File, format: Format, level: Level) -> (Packed, Duration) {
    let begun = Instant::now();
    let (selection, _) = chosen(root, &["**/*"]);
    let packed = pack(utf8(root), &selection, format, level, into, &NEVER).expect("an archive");
    assert!(packed.warnings.is_empty(), "{:?}", packed.warnings);
    (packed, begun.elapsed())
}

fn run(program: &str, args: &[&str], dir: &Path) -> Duration {
    let begun = Instant::now();
    let status = Command::new(program).args(args).current_dir(dir).status();
    match status {
        Ok(status) if status.success() => begun.elapsed(),
        other => panic!("{program}: {other:?}"),
    }
}

/// Forgets the peak that was reached before.
fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").expect("the peak of memory");
}

fn peak_mib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("own status");
    let line = status.lines().find(|line| line.starts_with("VmHWM")).expect("a peak");
    let kib: usize = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number");
    kib / 1024
}

fn verdict(name: &str, figure: &str, good: bool) {
    println!("{} {name}: {figure}", if good { "PASS " } else { "short" });
}

fn number(args: &[String], name: &str, default: usize) -> usize {
    match args.iter().position(|arg| arg == name) {
        None => default,
        Some(at) => args.get(at + 1).and_then(|n| n.parse().ok()).expect("a number"),
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mib = number(&args, "--mib", 1024);
    let rounds = number(&args, "--rounds", 2);
    against_zip(mib, rounds);
    long_file();
    many_files();
}

fn against_zip(mib: usize, rounds: usize) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let root = dir.path().join("tree");
    let total = mixed(&root, mib);
    let mb = |time: Duration| total as f64 / 1e6 / time.as_secs_f64();
    let theirs_path = dir.path().join("theirs.zip");
    let theirs_name = theirs_path.to_str().expect("a plain name");
    let ours_path = dir.path().join("ours.zip");
    let mut ours_file = File::create_new(&ours_path).expect("a file");
    let (mut ours, mut theirs) = (Duration::MAX, Duration::MAX);
    let mut sums = Vec::new();
    forget_peak();
    for round in 0..rounds {
        let (packed, time) = packed(&root, &mut ours_file, Format::Zip, Level::Default);
        ours = ours.min(time);
        sums.push(packed.sha256);
        if round > 0 {
            // It would be brought up to date instead of being made.
            std::fs::remove_file(&theirs_path).expect("their archive");
        }
        theirs = theirs.min(run("zip", &["-q", "-r", theirs_name, "."], &root));
    }
    let peak = peak_mib();
    let size = |path: &Path| std::fs::metadata(path).expect("an archive").len() / 1_000_000;
    let ratio = theirs.as_secs_f64() / ours.as_secs_f64();
    verdict(
        "zip against Info-ZIP, 1.5 times",
        &format!(
            "{ratio:.2} times: {:.0} MB/s, {} MB; zip -q {:.0} MB/s, {} MB; {mib} MiB",
            mb(ours),
            size(&ours_path),
            mb(theirs),
            size(&theirs_path),
        ),
        ratio >= 1.5,
    );
    verdict("packing, peak of memory under 100 MiB", &format!("{peak} MiB"), peak < 100);
    verdict(
        "the same bytes twice",
        &format!("{rounds} times"),
        sums.windows(2).all(|w| w[0] == w[1]),
    );
    run("unzip", &["-tqq", ours_path.to_str().expect("a plain name")], dir.path());
    for (format, level) in [
        (Format::Zip, Level::Fastest),
        (Format::Zip, Level::Fast),
        (Format::ZipZstd, Level::Default),
        (Format::TarZstd, Level::Default),
    ] {
        let mut file = tempfile::tempfile_in(dir.path()).expect("a file");
        forget_peak();
        let (packed, time) = packed(&root, &mut file, format, level);
        let figure =
            format!("{:.0} MB/s, {} MB, {} MiB", mb(time), packed.bytes / 1_000_000, peak_mib());
        verdict(&format!("{format:?} {level:?}"), &figure, true);
        let again = self::packed(&root, &mut file, format, level).0;
        let same = again.sha256 == packed.sha256;
        verdict(&format!("{format:?} {level:?}, the same bytes twice"), "by checksum", same);
        file.rewind().expect("a file");
        let into = dir.path().join("into");
        let begun = Instant::now();
        unpack(&file, utf8(&into), &Bounds::default(), &NEVER).expect("what was packed");
        let figure = format!("{:.0} MB/s", mb(begun.elapsed()));
        verdict(&format!("{format:?} {level:?} unpacked"), &figure, true);
        std::fs::remove_dir_all(into).expect("a folder");
    }
    let (ours_into, theirs_into) = (dir.path().join("ours"), dir.path().join("theirs"));
    let begun = Instant::now();
    forget_peak();
    unpack(&ours_file, utf8(&ours_into), &Bounds::default(), &NEVER).expect("what was packed");
    let ours = begun.elapsed();
    let peak = peak_mib();
    let theirs_into = theirs_into.to_str().expect("a plain name");
    let theirs = run("unzip", &["-qq", "-d", theirs_into, theirs_name], dir.path());
    verdict(
        "unpacking against unzip",
        &format!("{:.0} MB/s, {peak} MiB; unzip {:.0} MB/s", mb(ours), mb(theirs)),
        ours < theirs,
    );
}

/// Four gigabytes and a bit, most of them a hole.
fn long_file() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let root = dir.path().join("tree");
    std::fs::create_dir(&root).expect("a folder");
    let mut file = BufWriter::new(File::create(root.join("image")).expect("a file"));
    let mut noise = Noise(3);
    for _ in 0..64 {
        file.write_all(&random(&mut noise, MIB)).expect("a file");
        file.write_all(&text(&mut noise, MIB)).expect("a file");
    }
    file.into_inner().expect("a file").set_len((4 << 30) + 4097).expect("a file");
    let path = dir.path().join("long.zip");
    let mut into = File::create_new(&path).expect("a file");
    forget_peak();
    let (packed, time) = packed(&root, &mut into, Format::Zip, Level::Default);
    let peak = peak_mib();
    let figure =
        format!("{peak} MiB, {:.1} s, {} MB", time.as_secs_f64(), packed.bytes / 1_000_000);
    verdict("4 GiB in one file, peak of memory under 100 MiB", &figure, peak < 100);
    run("unzip", &["-tqq", path.to_str().expect("a plain name")], dir.path());
}

fn many_files() {
    const FILES: usize = 200_000;
    let dir = tempfile::tempdir().expect("a temporary folder");
    let root = dir.path();
    for number in 0..FILES {
        let directory = root.join(format!("build/{}/{}", number % 40, number / 40 % 50));
        if number < 40 * 50 {
            std::fs::create_dir_all(&directory).expect("a folder");
        }
        let kind = if number % 4 == 0 { "d" } else { "o" };
        std::fs::write(directory.join(format!("{number}.{kind}")), number.to_string())
            .expect("a file");
    }
    for (patterns, least) in [
        (["build/**/*.o"].as_slice(), FILES * 3 / 4),
        (&["build"], FILES),
        (&["**/*.o", "**/*.d", "build/1*/*/*.{o,d}"], FILES),
    ] {
        let (selection, time) = chosen(root, patterns);
        assert!(selection.entries.len() >= least, "{}", selection.entries.len());
        verdict(
            &format!("200,000 files by {patterns:?} under 3 s"),
            &format!("{:.2} s, {} entries", time.as_secs_f64(), selection.entries.len()),
            time < Duration::from_secs(3),
        );
    }
    let mut file = tempfile::tempfile().expect("a file");
    forget_peak();
    let (packed, time) = packed(root, &mut file, Format::Zip, Level::Default);
    let again = self::packed(root, &mut file, Format::Zip, Level::Default).0;
    let same = again.sha256 == packed.sha256;
    verdict("200,000 small files, the same bytes twice", "by checksum", same);
    let figure =
        format!("{:.2} s, {} entries, {} MiB", time.as_secs_f64(), packed.files, peak_mib());
    verdict("200,000 small files packed", &figure, true);
    let into = dir.path().join("into");
    let begun = Instant::now();
    unpack(&file, utf8(&into), &Bounds::default(), &NEVER).expect("what was packed");
    verdict(
        "200,000 small files unpacked",
        &format!("{:.2} s", begun.elapsed().as_secs_f64()),
        true,
    );
}
