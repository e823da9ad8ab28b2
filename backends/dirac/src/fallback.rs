//! What a job leaves with DIRAC itself, when nothing else gets through.
//!
//! A worker that cannot reach the server hands nothing in. DIRAC's wrapper has other ways and more time:
//! it brings home the files that the job's description names. Among them are the job's last word and
//! what there is of its log; this reads them. It also reads the mark of the end, for a job that could
//! hand in all but could not say so.

use std::io::{self, Read};

use bridge_backend::Result;
use bytes::Bytes;

use crate::dirac::Dirac;
use crate::failure::transient;
use crate::pieces::Kind;
use crate::sandbox::Fetched;
use crate::verdict::OURS;

/// Holds the job's last word.
pub(crate) const WORD_FILE: &str = "bridge-result.txt";

/// Holds the log from where its pieces end.
pub(crate) const LOG_FILE: &str = "bridge-log.txt";

/// What was written by the job's program for people, before it could do better.
const OUTPUT_FILE: &str = "std.out";

/// Sites let through some 10 MB; the helper keeps to less.
const LARGEST: u64 = 16 << 20;

/// The word is one line.
const LONGEST_WORD: u64 = 4096;

/// DIRAC's own sandbox is the last, or the job's mark of the end stands just before it.
const LOOKS: usize = 8;

/// What became of a job's last word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Words {
    Said(String),
    /// It left none.
    None,
    /// The store does not have all yet that might hold it.
    Coming,
}

/// What DIRAC's own sandbox held.
#[derive(Debug, Default, PartialEq, Eq)]
struct Left {
    word: Option<String>,
    log: Option<Bytes>,
}

type Unpacker = fn(&[u8]) -> io::Result<Box<dyn Read + '_>>;

/// Gives what unpacks a sandbox that begins so, if it is of a kind that DIRAC's programs make.
pub(crate) fn unpacker(head: &[u8]) -> Option<Unpacker> {
    let begins = |magic: &[u8]| head.starts_with(magic);
    if begins(b"BZh") {
        Some(|bytes| Ok(Box::new(bzip2::read::MultiBzDecoder::new(bytes))))
    } else if begins(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Some(|bytes| Ok(Box::new(zstd::Decoder::with_buffer(bytes)?)))
    } else {
        None
    }
}

fn read(bytes: &[u8]) -> io::Result<Left> {
    let Some(unpacker) = unpacker(bytes) else { return Ok(Left::default()) };
    let mut archive = tar::Archive::new(unpacker(bytes)?.take(LARGEST));
    let (mut left, mut output) = (Left::default(), None);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.to_string_lossy().into_owned();
        let mut content = Vec::new();
        match name.trim_start_matches("./") {
            WORD_FILE | OUTPUT_FILE if entry.header().entry_type().is_file() => {
                (&mut entry).take(LONGEST_WORD).read_to_end(&mut content)?;
                let text = String::from_utf8_lossy(&content);
                let line = text.lines().find(|line| line.starts_with(OURS)).map(str::to_owned);
                if name.ends_with(WORD_FILE) {
                    left.word = line;
                } else {
                    output = line;
                }
            }
            LOG_FILE if entry.header().entry_type().is_file() => {
                entry.read_to_end(&mut content)?;
                left.log = Some(Bytes::from(content));
            }
            _ => {}
        }
    }
    // A program that could not even begin says so to DIRAC alone.
    if left.word.is_none() {
        left.word =
            output.and_then(|line| Some(format!("{OURS}refused {}", line.strip_prefix(OURS)?)));
    }
    Ok(left)
}

/// Reads a number out of a job's word; what the helper says comes after what the job's script says.
fn fact(word: &str, key: &str) -> Option<u64> {
    word.split_whitespace()
        .rev()
        .find_map(|fact| fact.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
}

/// Gives how many parts of outputs a job handed in, by its word.
pub(crate) fn outs(word: &str) -> Option<u64> {
    fact(word, "outs")
}

/// Reads one of DIRAC's own sandboxes as a piece of the log.
pub(crate) fn piece(bytes: &[u8]) -> Kind {
    let Ok(Left { word: Some(word), log: Some(bytes) }) = read(bytes) else { return Kind::Other };
    let Some(offset) = fact(&word, "log") else { return Kind::Other };
    let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if len == 0 { Kind::Other } else { Kind::Log { offset, len, bytes: Some(bytes) } }
}

/// Makes a mark of the end the word that a job would have said.
fn word_of_end(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let mut word = format!("{OURS}ended");
    for line in text.lines().filter(|line| !line.ends_with('=')).take(32) {
        word.push(' ');
        word.push_str(line);
    }
    word
}

impl Dirac {
    /// Gives the last word of a job of which DIRAC says that it is over, if it left one anywhere.
    pub(crate) async fn last_words(&self, id: u64) -> Result<Words> {
        let context = "read what the job left with DIRAC";
        let Some(list) = self.handed_in(id).await? else { return Ok(Words::None) };
        let mut none = Words::None;
        for pfn in list.iter().rev().take(LOOKS) {
            let open = match self.open_sandbox(id, pfn).await? {
                Fetched::Open(open) => open,
                Fetched::Coming => {
                    none = Words::Coming;
                    continue;
                }
                Fetched::Gone => continue,
            };
            if open.is_diracs() {
                let Some(bytes) = open.whole(LARGEST).await? else { continue };
                let left = tokio::task::spawn_blocking(move || read(&bytes)).await;
                let left = left.map_err(|error| transient(context).with_source(error))?;
                match left {
                    Ok(Left { word: Some(word), .. }) => return Ok(Words::Said(word)),
                    Ok(Left { word: None, .. }) => {}
                    Err(error) => {
                        let error: &dyn std::error::Error = &error;
                        tracing::warn!(job = id, error, "a sandbox of DIRAC's cannot be read");
                    }
                }
            } else if open.is_gzip()
                || open.plain_name().is_some_and(|name| name.starts_with("bridge-end."))
            {
                let Some((name, content)) = open.small().await? else { continue };
                if name == format!("bridge-end.{id}") {
                    return Ok(Words::Said(word_of_end(&content)));
                }
            }
        }
        Ok(none)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::verdict::{Report, report};

    fn tar_of(files: &[(&str, &str)]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(u64::try_from(content.len()).unwrap());
            header.set_mode(0o644);
            tar.append_data(&mut header, name, content.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn bz2(files: &[(&str, &str)]) -> Vec<u8> {
        let mut out = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
        out.write_all(&tar_of(files)).unwrap();
        out.finish().unwrap()
    }

    const WORD: &str = "bridge: ended exit_code=0 step=script pieces=2 outs=1 log=12";

    #[test]
    fn the_last_word_is_read_from_what_dirac_brings() {
        let files = [("std.out", ""), (WORD_FILE, WORD), (LOG_FILE, "the rest\n")];
        for packed in [bz2(&files), zstd::encode_all(tar_of(&files).as_slice(), 3).unwrap()] {
            let left = read(&packed).unwrap();
            assert_eq!(left.word.as_deref(), Some(WORD));
            let Kind::Log { offset: 12, len: 9, bytes: Some(bytes) } = piece(&packed) else {
                panic!("{:?}", piece(&packed));
            };
            assert_eq!(&bytes[..], b"the rest\n");
        }
        assert_eq!(outs(WORD), Some(1));
        assert!(matches!(piece(&bz2(&files[..2])), Kind::Other));
    }

    #[test]
    fn a_program_that_could_not_begin_is_heard() {
        let said = "bridge: there is neither curl nor python3 on this worker\n";
        let left = read(&bz2(&[("std.err", "x"), ("std.out", said)])).unwrap();
        let report = report(left.word.as_deref());
        let Some(Report::Refused { why }) = report else { panic!("{report:?}") };
        assert_eq!(why, "there is neither curl nor python3 on this worker");
        assert_eq!(read(&bz2(&[("std.out", "hello\n")])).unwrap(), Left::default());
    }

    #[test]
    fn damaged_sandboxes_say_nothing() {
        let whole = bz2(&[(WORD_FILE, WORD)]);
        for cut in [&whole[..whole.len() / 2], b"BZh9 is how it begins".as_slice()] {
            assert!(read(cut).is_err());
            assert!(matches!(piece(cut), Kind::Other));
        }
        assert_eq!(read(b"something else").unwrap(), Left::default());
    }

    #[test]
    fn the_mark_of_the_end_is_a_word_too() {
        let text = b"exit_code=3\nstep=script\n\nlog=5\npieces=1\nouts=0\nwhy=\n";
        let word = word_of_end(text);
        let Some(Report::Ended { result: Some(result), why: None }) = report(Some(&word)) else {
            panic!("{word}");
        };
        assert_eq!(result.exit_code, 3);
        let word = word_of_end(b"exit_code=143\nstep=script\nwhy=timeout\n");
        assert!(matches!(report(Some(&word)), Some(Report::Ended { why: Some(_), .. })), "{word}");
    }
}
