//! Compresses blocks on several cores and hands them back in order.
//!
//! What comes out depends on what goes in and on nothing else: blocks have a fixed length, and each is
//! compressed from a fresh state. A block of a longer file is primed with the end of the block before
//! it, so that cutting costs next to nothing in size, and ends on a byte's edge, so that the pieces can
//! be put one after the other.

use std::collections::VecDeque;
use std::io;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;

use flate2::{Compress, Compression, FlushCompress, Status};

use super::{ArchiveError, go_on};

/// How much is compressed at once where the format is Deflate.
pub(super) const BLOCK: usize = 256 * 1024;
/// How much is compressed at once where it is Zstandard, whose blocks cannot be primed.
pub(super) const LARGE_BLOCK: usize = 2 * 1024 * 1024;

/// How far back Deflate can see.
const WINDOW: usize = 32 * 1024;
/// The longest piece that Deflate can hold as it is.
const STORED: usize = 0xFFFF;

/// The bytes that may wait to be compressed or written, and so, roughly, the memory that packing needs.
const WAITING_BYTES: usize = 16 * 1024 * 1024;
/// The blocks that may wait; small files are one block each.
const WAITING_BLOCKS: usize = 512;

/// More threads than these bring little, and a submit node has other users.
const MOST_THREADS: usize = 4;

/// What is done to a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    /// Nothing, but its checksum is taken.
    Store,
    /// Deflate with this level.
    Deflate(u32),
    /// Zstandard with this level; each block is a frame.
    Zstd(i32),
}

impl Coding {
    /// How long blocks are.
    pub(super) fn block(self) -> usize {
        match self {
            Self::Store | Self::Deflate(_) => BLOCK,
            Self::Zstd(_) => LARGE_BLOCK,
        }
    }
}

struct Job {
    data: Arc<Vec<u8>>,
    before: Option<Arc<Vec<u8>>>,
    last: bool,
    reply: SyncSender<io::Result<Done>>,
}

/// A block that was compressed.
#[derive(Debug)]
pub(super) struct Done {
    /// What came out.
    pub(super) coded: Vec<u8>,
    /// What went in.
    pub(super) plain: Arc<Vec<u8>>,
    /// The checksum of what went in.
    pub(super) crc: crc32fast::Hasher,
    /// Whether it was the file's last.
    pub(super) last: bool,
}

/// Takes what is packed, in order.
pub(super) trait Sink {
    /// What is known of a file before its first block.
    type Meta;
    /// A file begins.
    fn begin(&mut self, meta: Self::Meta) -> Result<(), ArchiveError>;
    /// A block of it is ready.
    fn block(&mut self, done: Done) -> Result<(), ArchiveError>;
    /// It could not be read to its end: nothing of it may stay.
    fn discard(&mut self) -> Result<(), ArchiveError>;
}

enum Event<M> {
    Begin(M),
    Block(usize, Receiver<io::Result<Done>>),
    Discard,
}

/// Takes blocks in, and gives them to the sink when it is their turn.
pub(super) struct Pipeline<'a, S: Sink> {
    jobs: Sender<Job>,
    events: VecDeque<Event<S::Meta>>,
    bytes: usize,
    blocks: usize,
    stop: &'a AtomicBool,
    pub(super) sink: S,
}

/// Runs `work` with a pipeline; gives the sink back when all has gone through it.
pub(super) fn pipeline<S: Sink>(
    coding: Coding,
    sink: S,
    stop: &AtomicBool,
    work: impl FnOnce(&mut Pipeline<'_, S>) -> Result<(), ArchiveError>,
) -> Result<S, ArchiveError> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MOST_THREADS);
    let (jobs, queue) = channel();
    let queue = Mutex::new(queue);
    thread::scope(|scope| {
        for _ in 0..threads {
            thread::Builder::new()
                .name("pack".to_owned())
                .spawn_scoped(scope, || serve(&queue, coding, stop))
                .map_err(ArchiveError::io("start", "a thread"))?;
        }
        let mut pipeline =
            Pipeline { jobs, events: VecDeque::new(), bytes: 0, blocks: 0, stop, sink };
        work(&mut pipeline)?;
        while pipeline.hand_on()? {}
        Ok(pipeline.sink)
    })
}

fn serve(queue: &Mutex<Receiver<Job>>, coding: Coding, stop: &AtomicBool) {
    let mut coder = Coder::new(coding);
    loop {
        // Poisoned by a thread that panicked: the others end as well, and its job is missed.
        let Ok(job) = queue.lock().map(|queue| queue.recv()) else { return };
        let Ok(job) = job else { return };
        let result = if stop.load(Ordering::Relaxed) {
            Err(io::ErrorKind::Interrupted.into())
        } else {
            coder.code(&job).map(|coded| {
                let mut crc = crc32fast::Hasher::new();
                crc.update(&job.data);
                Done { coded, plain: Arc::clone(&job.data), crc, last: job.last }
            })
        };
        if job.reply.send(result).is_err() {
            // Nobody waits for it: the packer has ended with an error.
            return;
        }
    }
}

impl<S: Sink> Pipeline<'_, S> {
    /// A file begins.
    pub(super) fn begin(&mut self, meta: S::Meta) {
        self.events.push_back(Event::Begin(meta));
    }

    /// Another block of it; `before` is the one that came last.
    pub(super) fn block(
        &mut self,
        data: Arc<Vec<u8>>,
        before: Option<Arc<Vec<u8>>>,
        last: bool,
    ) -> Result<(), ArchiveError> {
        go_on(self.stop)?;
        while self.bytes + data.len() > WAITING_BYTES || self.blocks >= WAITING_BLOCKS {
            if !self.hand_on()? {
                break;
            }
        }
        let (reply, answer) = sync_channel(1);
        self.bytes += data.len();
        self.blocks += 1;
        self.events.push_back(Event::Block(data.len(), answer));
        let job = Job { data, before, last, reply };
        // Where no thread is left, the missing answer is found when its turn comes.
        if self.jobs.send(job).is_err() {
            return Err(lost());
        }
        Ok(())
    }

    /// The file that began last cannot be read.
    pub(super) fn discard(&mut self) {
        self.events.push_back(Event::Discard);
    }

    /// Gives the sink what comes next, waiting for it; says whether there was anything.
    fn hand_on(&mut self) -> Result<bool, ArchiveError> {
        match self.events.pop_front() {
            None => return Ok(false),
            Some(Event::Begin(meta)) => self.sink.begin(meta)?,
            Some(Event::Discard) => self.sink.discard()?,
            Some(Event::Block(length, answer)) => {
                self.bytes -= length;
                self.blocks -= 1;
                let Ok(done) = answer.recv() else { return Err(lost()) };
                go_on(self.stop)?;
                self.sink.block(done.map_err(ArchiveError::io("compress", "a file"))?)?;
            }
        }
        Ok(true)
    }
}

fn lost() -> ArchiveError {
    let source = io::Error::other("a compressing thread has ended");
    ArchiveError::Io { action: "compress", path: "a file".to_owned(), source }
}

/// One thread's compressor.
struct Coder {
    coding: Coding,
    deflate: Option<Compress>,
    /// For a cheap look at what does not look compressible.
    trial: Option<Compress>,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Coder {
    fn new(coding: Coding) -> Self {
        Self { coding, deflate: None, trial: None, zstd: None }
    }

    fn code(&mut self, job: &Job) -> io::Result<Vec<u8>> {
        match self.coding {
            Coding::Store => Ok(Vec::new()),
            Coding::Zstd(level) => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(zstd::bulk::Compressor::new(level)?),
                };
                zstd.compress(&job.data)
            }
            Coding::Deflate(level) => self.deflate(level, job),
        }
    }

    fn deflate(&mut self, level: u32, job: &Job) -> io::Result<Vec<u8>> {
        let data = job.data.as_slice();
        let window = job.before.as_deref().map(|before| {
            let from = before.len().saturating_sub(WINDOW);
            before.get(from..).unwrap_or_default()
        });
        if self.looks_random(data, window)? {
            return Ok(stored(data, job.last));
        }
        let deflate = ready(&mut self.deflate, level, window);
        let coded = run(deflate, data, window, job.last)?;
        // What only grew is kept as it was.
        if coded.len() > data.len() + 5 * data.len().div_ceil(STORED) {
            return Ok(stored(data, job.last));
        }
        Ok(coded)
    }

    /// Says whether compressing is not worth the time: bytes as frequent as each other, and nothing won
    /// by trying a part of them.
    fn looks_random(&mut self, data: &[u8], window: Option<&[u8]>) -> io::Result<bool> {
        const SAMPLE: usize = 4096;
        if data.len() < 16 * SAMPLE {
            return Ok(false);
        }
        let mut counts = [0_u32; 256];
        for sample in data.chunks_exact(SAMPLE).step_by(data.len() / SAMPLE / 4) {
            for byte in sample {
                if let Some(count) = counts.get_mut(usize::from(*byte)) {
                    *count += 1;
                }
            }
        }
        let total: u32 = counts.iter().sum();
        let bits: f64 = counts
            .iter()
            .filter(|count| **count > 0)
            .map(|count| {
                let share = f64::from(*count) / f64::from(total);
                -share * share.log2()
            })
            .sum();
        if bits < 7.9 {
            return Ok(false);
        }
        let trial = ready(&mut self.trial, 1, window);
        let part = data.get(..8 * SAMPLE).unwrap_or(data);
        Ok(run(trial, part, window, true)?.len() * 100 >= part.len() * 98)
    }
}

/// A compressor that knows nothing of earlier blocks.
///
/// Starting one over is cheap, but leaves the bytes of earlier blocks where its window is not filled
/// yet, and priming looks one byte too far: what comes out would depend on what came before. So a
/// primed one is always new.
fn ready<'a>(
    kept: &'a mut Option<Compress>,
    level: u32,
    window: Option<&[u8]>,
) -> &'a mut Compress {
    if window.is_some() {
        *kept = None;
    }
    kept.get_or_insert_with(|| Compress::new(Compression::new(level), false))
}

/// Compresses from a fresh state up to the edge of a byte.
fn run(
    deflate: &mut Compress,
    data: &[u8],
    window: Option<&[u8]>,
    last: bool,
) -> io::Result<Vec<u8>> {
    deflate.reset();
    if let Some(window) = window.filter(|window| !window.is_empty()) {
        deflate.set_dictionary(window).map_err(io::Error::other)?;
    }
    let flush = if last { FlushCompress::Finish } else { FlushCompress::Sync };
    let mut coded = Vec::with_capacity(data.len() / 2 + 64);
    let mut rest = data;
    loop {
        let before = deflate.total_in();
        let status = deflate.compress_vec(rest, &mut coded, flush).map_err(io::Error::other)?;
        let taken = usize::try_from(deflate.total_in() - before).map_err(io::Error::other)?;
        rest = rest.get(taken..).unwrap_or_default();
        let room = coded.len() < coded.capacity();
        match status {
            Status::StreamEnd => return Ok(coded),
            // A flush is complete once it leaves room.
            Status::Ok | Status::BufError if !last && rest.is_empty() && room => return Ok(coded),
            Status::Ok | Status::BufError => coded.reserve(data.len() / 4 + 64),
        }
    }
}

/// Deflate's form of bytes as they are.
fn stored(data: &[u8], last: bool) -> Vec<u8> {
    let mut coded = Vec::with_capacity(data.len() + 5 * (data.len() / STORED + 1));
    let mut pieces = data.chunks(STORED).peekable();
    if pieces.peek().is_none() {
        coded.extend([u8::from(last), 0, 0, 0xFF, 0xFF]);
    }
    while let Some(piece) = pieces.next() {
        // A piece fits by construction.
        let length = u16::try_from(piece.len()).unwrap_or(u16::MAX);
        coded.push(u8::from(last && pieces.peek().is_none()));
        coded.extend(length.to_le_bytes());
        coded.extend((!length).to_le_bytes());
        coded.extend_from_slice(piece);
    }
    coded
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn noise(length: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        std::iter::repeat_with(next).take(length).collect()
    }

    fn job(data: &[u8], before: Option<&[u8]>, last: bool) -> Job {
        let (reply, _) = sync_channel(1);
        let before = before.map(|before| Arc::new(before.to_vec()));
        Job { data: Arc::new(data.to_vec()), before, last, reply }
    }

    #[test]
    fn blocks_put_one_after_the_other_are_one_stream() {
        let text = "all work and no play ".repeat(9000).into_bytes();
        let random = noise(200_000, 7);
        let blocks: [&[u8]; 5] = [&text, &random, &text, b"", &random];
        let mut coder = Coder::new(Coding::Deflate(5));
        let mut stream = Vec::new();
        for (index, block) in blocks.iter().enumerate() {
            let before = index.checked_sub(1).map(|index| blocks[index]);
            let coded = coder.code(&job(block, before, index + 1 == blocks.len())).unwrap();
            stream.extend(coded);
        }
        let mut plain = Vec::new();
        flate2::read::DeflateDecoder::new(stream.as_slice()).read_to_end(&mut plain).unwrap();
        assert_eq!(plain, blocks.concat());
        assert!(stream.len() < 2 * random.len() + 10_000, "{}", stream.len());
    }

    #[test]
    fn a_block_does_not_depend_on_what_its_thread_did_before() {
        let text = "to be or not to be ".repeat(5000).into_bytes();
        let mut fresh = Coder::new(Coding::Deflate(5));
        let mut used = Coder::new(Coding::Deflate(5));
        used.code(&job(&noise(100_000, 3), None, false)).unwrap();
        used.code(&job(b"x", Some(&text), true)).unwrap();
        for before in [None, Some(text.as_slice())] {
            let job = job(&text, before, true);
            assert_eq!(fresh.code(&job).unwrap(), used.code(&job).unwrap());
        }
    }

    /// Records of which half the bytes repeat, as in object files.
    fn object(length: usize, seed: u64) -> Vec<u8> {
        let mut noise = noise(length, seed).into_iter();
        let mut bytes = Vec::new();
        let mut address = 0x40_0000_u64;
        while bytes.len() < length {
            let mut next = || noise.next().unwrap();
            address += u64::from(next() & 0x3F);
            bytes.extend_from_slice(&address.to_le_bytes());
            bytes.extend([next() & 0x0F, next(), next(), next(), 0, 0x48, 0x89, 0xE5]);
        }
        bytes.truncate(length);
        bytes
    }

    #[test]
    fn blocks_are_the_same_from_every_thread() {
        let length = 40 * 1024;
        let mut datas: Vec<Vec<u8>> = (0..10).map(|seed| object(length, seed)).collect();
        datas.push("to be or not to be, that is the question ".repeat(1000).into_bytes());
        for coding in [1, 5, 7, 9].map(Coding::Deflate).into_iter().chain([Coding::Zstd(3)]) {
            let mut used = Coder::new(coding);
            for (number, data) in datas.iter().enumerate() {
                for before in [None, datas.get(number + 1), datas.get(number / 2)] {
                    for length in [7, 500, data.len()] {
                        let job = job(&data[..length], before.map(Vec::as_slice), number % 2 == 0);
                        let mut fresh = Coder::new(coding);
                        let same = fresh.code(&job).unwrap() == used.code(&job).unwrap();
                        assert!(same, "{coding:?} {number} {length} {}", before.is_some());
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_of_another_block_is_seen_behind_the_window() {
        // The compressor hashes the window's end together with the byte that happens to lie behind it,
        // and forgets for it what began with these bytes before.
        let again = b"XYZ0123456789abcdefghijklmnopq";
        let window = [&noise(WINDOW, 1), again.as_slice(), &noise(999, 4), b"XYZ"].concat();
        let data = [b"Q".as_slice(), &noise(999, 2), again, &noise(999, 3)].concat();
        for level in [1, 5, 7, 9] {
            let mut used = Coder::new(Coding::Deflate(level));
            used.code(&job(&b"0".repeat(200_000), None, true)).unwrap();
            let mut fresh = Coder::new(Coding::Deflate(level));
            let job = job(&data, Some(&window), true);
            assert_eq!(fresh.code(&job).unwrap(), used.code(&job).unwrap(), "{level}");
        }
    }

    #[test]
    fn only_what_nothing_can_be_won_from_looks_random() {
        let mut coder = Coder::new(Coding::Deflate(5));
        let random = noise(BLOCK, 11);
        assert!(coder.looks_random(&random, None).unwrap());
        // Flat, but the same as before.
        let part = noise(16 * 1024, 12);
        assert!(!coder.looks_random(&part.repeat(16), None).unwrap());
        assert!(!coder.looks_random(&part.repeat(16), Some(&part)).unwrap());
        assert!(!coder.looks_random(&"text".repeat(70_000).into_bytes(), None).unwrap());
    }

    #[test]
    fn bytes_as_they_are_need_no_whole_piece() {
        for length in [0, 1, STORED, STORED + 1, 3 * STORED] {
            let data = noise(length, 5);
            let mut plain = Vec::new();
            let coded = stored(&data, true);
            flate2::read::DeflateDecoder::new(coded.as_slice()).read_to_end(&mut plain).unwrap();
            assert_eq!(plain, data, "{length}");
        }
    }
}
