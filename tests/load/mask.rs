//! The benchmark of masking: how fast a log is searched for a job's secrets, and what more secrets cost.
//!
//! `cargo bench --bench mask`
//!
//! Text and secrets are made up, the same in every run. Time is the thread's own on its core, so that
//! other load on the machine does not count. Prints one line for each kind of text and number of
//! secrets, and whether the aims are met: 500 MB/s with 200 secrets, and at most 10 % more time with
//! 200 and with 2000 secrets than with one, on text as it stands in logs. On text that is made to look
//! like secrets nothing is promised but that it stays linear.

#![expect(clippy::print_stdout, reason = "a benchmark prints")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use bridge::trace::Masker;
use bridge::trace::compose::HOLD_BACK;
use bridge::trace::mask::default_prefixes;
use bridge::trace::scan::MaskState;

const COUNTS: [usize; 4] = [1, 20, 200, 2000];
const TEXT: usize = 8 << 20;
const ROUNDS: usize = 7;
/// So often a text is masked at a time: the clock of time on a core ticks every few milliseconds.
const TIMES: u32 = 16;
const AIM: f64 = 500.0;
const GROWTH: f64 = 1.10;

/// A fixed sequence of numbers that look random.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % (limit as u64)).unwrap_or(0)
    }

    fn pick<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[self.below(all.len())]
    }

    fn word(&mut self, alphabet: &[u8], length: usize) -> String {
        (0..length).map(|_| char::from(alphabet[self.below(alphabet.len())])).collect()
    }
}

const HEX: &[u8] = b"0123456789abcdef";
const ALNUM: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
const BASE64: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const NAMES: &[&str] = &[
    "tracker",
    "geometry",
    "alignment",
    "simulation",
    "calorimeter",
    "reconstruction",
    "global",
    "field",
    "vertex",
    "digitization",
    "hits",
    "cluster",
    "patch",
    "parameters",
    "token",
    "private",
];
const WORDS: &[&str] = &[
    "the",
    "configuration",
    "of",
    "detector",
    "was",
    "loaded",
    "from",
    "warning:",
    "unused",
    "variable",
    "in",
    "function",
    "expected",
    "passed",
    "failed",
    "skipped",
    "after",
    "seconds",
    "with",
    "status",
];

/// Makes secrets as they are: tokens, passwords, keys.
fn secrets(count: usize) -> Vec<String> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    (0..count)
        .map(|n| match n % 5 {
            0 => random.word(ALNUM, 20),
            1 => format!("glcbt-64_{}", random.word(ALNUM, 20)),
            2 => format!("AKIA{}", random.word(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16)),
            3 => random.word(BASE64, 40),
            _ => format!("{}!{}#", random.word(ALNUM, 6), random.word(ALNUM, 6)),
        })
        .collect()
}

/// Makes a log as builds and tests write them, with a secret here and there.
fn log(secrets: &[String]) -> Vec<u8> {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut text = String::with_capacity(TEXT + 1024);
    while text.len() < TEXT {
        let (a, b, c) = (random.pick(NAMES), random.pick(NAMES), random.pick(NAMES));
        let number = random.below(10_000);
        let line = match random.below(12) {
            0 | 1 => format!(
                "[{:3}%] Building CXX object src/{a}/CMakeFiles/{b}.dir/src/{b}_{c}.cpp.o\n",
                number % 100
            ),
            2 => format!(
                "/builds/hep/{a}/src/{b}.cpp:{number}:17: warning: unused parameter '{c}'\n"
            ),
            3 => format!(
                "2026-03-0{}T12:{:02}:07.{number:04}Z INFO {a}::{b} {c}=0x{number:08x}\n",
                number % 9 + 1,
                number % 60
            ),
            4 => format!("test {a}::{b}::{c}_{number} ... ok ({}.{number:04} s)\n", number % 60),
            5 => format!("Step {number}/10000 : RUN apt-get install -y lib{a}-dev lib{b}{c}-dev\n"),
            6 => format!(
                "https://registry.example.org/v2/{a}/{b}/blobs/sha256:{}?from={c}&n={number}\n",
                random.word(HEX, 64)
            ),
            7 => format!(
                "{{\"level\":\"info\",\"module\":\"{a}\",\"{b}\":{number},\"msg\":\"{c}\"}}\n"
            ),
            8 => format!("   Compiling {a}-{b} v{}.{number}.0 (/builds/{c})\n", number % 10),
            9 => format!("+ export {}={}\n", a.to_uppercase(), random.word(ALNUM, 12)),
            _ => {
                let words: Vec<&str> = (0..12).map(|_| random.pick(WORDS)).collect();
                format!("{} {number}\n", words.join(" "))
            }
        };
        text.push_str(&line);
        if random.below(500) == 0 {
            let secret = &secrets[random.below(secrets.len())];
            text.extend(["+ curl -H 'Token: ", secret, "'\n"]);
        }
    }
    text.into_bytes()
}

/// Makes text of nothing but beginnings of secrets.
fn near_misses(secrets: &[String]) -> Vec<u8> {
    let mut random = Random(0x0fed_cba9_8765_4321);
    let mut text = String::with_capacity(TEXT + 1024);
    while text.len() < TEXT {
        let secret = &secrets[random.below(secrets.len())];
        let cut = 5 + random.below(secret.len() - 5);
        text.extend(secret.chars().take(cut));
        text.push(if random.below(8) == 0 { '\n' } else { ' ' });
    }
    text.into_bytes()
}

/// The time that this thread has spent on a core.
fn on_core() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = text.split(' ').next().and_then(|word| word.parse().ok());
    Duration::from_nanos(nanos.expect("/proc/thread-self/schedstat"))
}

/// Masks a text as a trace is masked: piece by piece, the rest with what follows.
fn mask(masker: &Masker, text: &[u8]) -> usize {
    let mut state = MaskState::default();
    let mut out = Vec::with_capacity(2 * HOLD_BACK);
    let (mut at, mut written) = (0, 0);
    while at < text.len() {
        let to = text.len().min(at + HOLD_BACK);
        at += masker.feed(&mut state, &text[at..to], to == text.len(), &mut out);
        written += black_box(&out).len();
        out.clear();
    }
    written
}

fn main() {
    let all = secrets(2000);
    let maskers: Vec<(usize, Masker, Duration)> = COUNTS
        .into_iter()
        .map(|count| {
            let started = Instant::now();
            let masker = Masker::of_secrets(&all[..count], default_prefixes(true));
            (count, masker.expect("secrets that fit"), started.elapsed())
        })
        .collect();
    let mut met = true;
    for (kind, judged) in [("log", true), ("near misses", false)] {
        // The same log for all, so that only the number of secrets differs.
        let shared = if judged { log(&all[..1]) } else { near_misses(&all[..1]) };
        let mut best = [f64::MAX; COUNTS.len()];
        // In turns, so that whatever else happens on the machine happens to all.
        for _ in 0..ROUNDS {
            for (best, (count, masker, _)) in best.iter_mut().zip(&maskers) {
                let own = (!judged).then(|| near_misses(&all[..*count]));
                let text = own.as_ref().unwrap_or(&shared);
                let before = on_core();
                for _ in 0..TIMES {
                    black_box(mask(masker, black_box(text)));
                }
                let took = (on_core() - before).as_secs_f64() / f64::from(TIMES);
                *best = best.min(took / text.len() as f64);
            }
        }
        for ((count, masker, made), seconds) in maskers.iter().zip(best) {
            let (rate, growth) = (1e-6 / seconds, seconds / best[0]);
            let good = (*count > 200 || rate >= AIM) && growth <= GROWTH;
            met &= good || !judged;
            let verdict = match (judged, good) {
                (false, _) => "",
                (true, true) => "pass",
                (true, false) => "SHORT",
            };
            println!(
                "{kind:12} {count:5} secrets {rate:7.0} MB/s {growth:5.2} times one secret's time \
                 (made in {:5.1} ms, {masker:?}) {verdict}",
                made.as_secs_f64() * 1e3
            );
        }
    }
    println!("{}", if met { "all aims are met" } else { "SHORT of an aim" });
}
