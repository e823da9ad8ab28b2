//! Where in a text a pattern may begin: the part of the search that looks at every byte.
//!
//! Patterns of five bytes or more are found by samples. Of every four places in the text where one may
//! begin, two samples of four bytes are looked up: whichever place it is, one of the two is what the
//! pattern begins with, or what stands at its second byte. So a load of eight bytes and two look-ups
//! decide about four places, and nearly always say no. Where they say yes, the first eight bytes (five,
//! for shorter patterns) of each of the four places are looked up. What is not ruled out by then is
//! very likely a secret, and an automaton has the last word.
//!
//! Neither depends on how many patterns there are, as long as the tables are sparse; they grow with the
//! patterns. Names of URL parameters, which may be written in capitals, are there in every way.
//!
//! Shorter patterns are secrets that nobody should have. They are looked for at every place, at half the
//! speed, and only if there are any.

/// The shortest pattern that is found by samples.
const SAMPLED: usize = 5;

/// So many places are decided by one load.
const PLACES: usize = 4;

const FOUR_BYTES: u64 = 0xffff_ffff;
const FIVE_BYTES: u64 = 0xff_ffff_ffff;

const TINY: usize = 1 << 10;
const SMALLISH: usize = 1 << 12;
const LARGE: usize = 1 << 14;

/// Two bits of one word for each sample: with a word for every six samples at most, one look-up in a
/// thousand is wrong.
enum Samples {
    /// 8 KiB: a job with a handful of secrets.
    Few(Box<[u64; TINY]>),
    /// 32 KiB.
    Some(Box<[u64; SMALLISH]>),
    /// 256 KiB: thousands of secrets.
    Many(Box<[u64; LARGE]>),
}

/// What patterns begin with.
pub(super) struct Starts {
    samples: Samples,
    /// A set of hashes of what patterns begin with: a bit each.
    heads: Vec<u64>,
    /// For patterns too short for samples: a bit for each pair of bytes that one may begin with.
    pairs: Option<Box<[u64; 1024]>>,
    /// The bytes that patterns begin with, for the last few places of a text.
    single: [bool; 256],
}

fn hash(bytes: u64) -> u64 {
    bytes.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Gives a number that fits for certain: all callers shift enough bits away.
fn index(hash: u64) -> usize {
    usize::try_from(hash).unwrap_or(0)
}

fn bits(hash: u64) -> u64 {
    1 << ((hash >> 26) & 63) | 1 << ((hash >> 32) & 63)
}

#[inline]
fn sampled<const N: usize>(table: &[u64; N], sample: u64) -> bool {
    let hash = hash(sample & FOUR_BYTES);
    let wanted = bits(hash);
    table[index(hash >> (64 - N.ilog2()))] & wanted == wanted
}

/// Gives the first eight bytes as one number; missing ones are zero.
fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(word)
}

/// Two sets in one: what is only five bytes long gets hashes of its own.
fn short_head(word: u64) -> u64 {
    (word & FIVE_BYTES) | 1 << 63
}

/// Gives the first five bytes of a URL with this parameter from its `?` or `&` on, in all ways to write
/// them.
fn beginnings(name: &[u8]) -> Vec<Vec<u8>> {
    let mut all = vec![b"?".to_vec(), b"&".to_vec()];
    for byte in &name[..name.len().min(SAMPLED - 1)] {
        let mut cases = vec![byte.to_ascii_lowercase(), byte.to_ascii_uppercase()];
        cases.dedup();
        let longer = |begun: &Vec<u8>| {
            let begun = begun.clone();
            cases.iter().map(move |case| [&begun[..], &[*case]].concat()).collect::<Vec<_>>()
        };
        all = all.iter().flat_map(longer).collect();
    }
    all
}

impl Starts {
    /// Makes the tables for these patterns, of which none is empty, and for names of URL parameters.
    pub(super) fn new<'a>(patterns: impl Iterator<Item = &'a [u8]>, parameters: &[&[u8]]) -> Self {
        let patterns: Vec<&[u8]> = patterns.collect();
        let parameters: Vec<Vec<u8>> =
            parameters.iter().flat_map(|name| beginnings(name)).collect();
        let all = || parameters.iter().map(Vec::as_slice).chain(patterns.iter().copied());
        let long = all().filter(|pattern| pattern.len() >= SAMPLED).count();
        let samples = match 2 * long {
            0..=6_000 if 2 * long <= 6 * TINY / 10 => Samples::Few(Box::new([0; TINY])),
            0..=6_000 => Samples::Some(Box::new([0; SMALLISH])),
            _ => Samples::Many(vec![0; LARGE].try_into().unwrap_or_else(|_| Box::new([0; LARGE]))),
        };
        let mut starts = Self {
            samples,
            heads: vec![0; long.max(16).next_power_of_two()],
            pairs: None,
            single: [false; 256],
        };
        for pattern in all() {
            starts.insert(pattern);
        }
        starts
    }

    fn insert(&mut self, pattern: &[u8]) {
        let Some(first) = pattern.first() else { return };
        self.single[usize::from(*first)] = true;
        if pattern.len() < SAMPLED {
            self.insert_pairs(pattern);
            return;
        }
        let word = word_of(pattern);
        for sample in [word, word >> 8] {
            let hash = hash(sample & FOUR_BYTES);
            let place = |words: usize| index(hash >> (64 - words.ilog2()));
            match &mut self.samples {
                Samples::Few(table) => table[place(TINY)] |= bits(hash),
                Samples::Some(table) => table[place(SMALLISH)] |= bits(hash),
                Samples::Many(table) => table[place(LARGE)] |= bits(hash),
            }
        }
        let head = if pattern.len() < 8 { short_head(word) } else { word };
        let (word, bit) = self.head(head);
        self.heads[word] |= bit;
    }

    fn insert_pairs(&mut self, pattern: &[u8]) {
        let pairs = self.pairs.get_or_insert_with(|| Box::new([0; 1024]));
        let first = usize::from(pattern[0]);
        let mut note = |second: usize| pairs[(second << 8 | first) / 64] |= 1 << (first % 64);
        match pattern.get(1) {
            Some(second) => note(usize::from(*second)),
            None => (0..256).for_each(note),
        }
    }

    /// Gives the place of a bit: a word for each pattern, so that at most one bit of 64 is set.
    fn head(&self, head: u64) -> (usize, u64) {
        let hash = hash(head ^ (head >> 32));
        let word = index(hash >> 32) & (self.heads.len() - 1);
        (word, 1 << ((hash >> 26) & 63))
    }

    fn is_head(&self, head: u64) -> bool {
        let (word, bit) = self.head(head);
        self.heads[word] & bit != 0
    }

    /// Looks closer at a place that the samples could not rule out.
    #[inline(never)]
    fn may_begin(&self, bytes: &[u8], at: usize) -> bool {
        match bytes[at..].first_chunk() {
            Some(word) => {
                let word = u64::from_le_bytes(*word);
                self.is_head(word) || self.is_head(short_head(word))
            }
            None => self.single[usize::from(bytes[at])],
        }
    }

    /// Finds the next place at or after `from` where a pattern may begin, or may be cut off by the end
    /// of the text; the length of the text if there is none.
    pub(super) fn next(&self, bytes: &[u8], from: usize) -> usize {
        match &self.samples {
            Samples::Few(table) => self.next_by(table, bytes, from),
            Samples::Some(table) => self.next_by(table, bytes, from),
            Samples::Many(table) => self.next_by(table, bytes, from),
        }
    }

    fn next_by<const N: usize>(&self, table: &[u64; N], bytes: &[u8], from: usize) -> usize {
        match &self.pairs {
            None => self.next_long(table, bytes, from),
            Some(pairs) => self.next_short(table, pairs, bytes, from),
        }
    }

    /// Says whether a pattern of five bytes or more may begin at one of four places.
    #[inline]
    fn any_long<const N: usize>(table: &[u64; N], word: u64) -> bool {
        // At its second byte, seen from the first and third place; at its first, from the others.
        sampled(table, word >> 8) | sampled(table, word >> 24)
    }

    fn next_long<const N: usize>(&self, table: &[u64; N], bytes: &[u8], from: usize) -> usize {
        let mut at = from;
        while let Some(word) = bytes[at..].first_chunk() {
            if Self::any_long(table, u64::from_le_bytes(*word))
                && let Some(place) = (at..at + PLACES).find(|at| self.may_begin(bytes, *at))
            {
                return place;
            }
            at += PLACES;
        }
        self.next_single(bytes, at)
    }

    fn next_short<const N: usize>(
        &self,
        table: &[u64; N],
        pairs: &[u64; 1024],
        bytes: &[u8],
        from: usize,
    ) -> usize {
        let mut at = from;
        while let Some(word) = bytes[at..].first_chunk() {
            let word = u64::from_le_bytes(*word);
            let short = (0..PLACES).fold(0_u32, |hits, place| {
                let pair = (word >> (8 * place)) & 0xffff;
                let hit = pairs[index(pair >> 6)] >> (pair & 63) & 1;
                hits | u32::from(hit == 1) << place
            });
            if short != 0 || Self::any_long(table, word) {
                let may =
                    |place: &usize| short >> place & 1 == 1 || self.may_begin(bytes, at + place);
                if let Some(place) = (0..PLACES).find(may) {
                    return at + place;
                }
            }
            at += PLACES;
        }
        self.next_single(bytes, at)
    }

    fn next_single(&self, bytes: &[u8], from: usize) -> usize {
        let found = bytes[from..].iter().position(|byte| self.single[usize::from(*byte)]);
        found.map_or(bytes.len(), |place| from + place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_found_whatever_stands_around_it() {
        for pattern in ["a", "ab", "abcd", "abcde", "abcdefg", "abcdefgh", "abcdefghijkl"] {
            let starts = Starts::new([pattern.as_bytes()].into_iter(), &[]);
            for before in 0..30 {
                for after in 0..12 {
                    let text = format!("{}{pattern}{}", ".".repeat(before), ".".repeat(after));
                    for from in 0..=before {
                        let found = starts.next(text.as_bytes(), from);
                        assert_eq!(found, before, "{pattern} in {text} from {from}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_pattern_that_the_end_cuts_off_is_found() {
        let starts = Starts::new([&b"abcdefghijkl"[..]].into_iter(), &[]);
        for cut in 1..12 {
            for before in 0..12 {
                let text = format!("{}{}", ".".repeat(before), "abcdefghijkl".split_at(cut).0);
                assert_eq!(starts.next(text.as_bytes(), 0), before, "{text}");
            }
        }
    }

    #[test]
    fn thousands_of_patterns_rule_out_nearly_everything() {
        let mut random = 7_u64;
        let mut next = move || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            random >> 33
        };
        let mut word = move || -> Vec<u8> {
            (0..20).map(|_| b"abcdefghijklmnopqrstuvwxyz0123456789"[index(next() % 36)]).collect()
        };
        let patterns: Vec<Vec<u8>> = (0..12_000).map(|_| word()).collect();
        let starts = Starts::new(patterns.iter().map(Vec::as_slice), &[]);
        let text: Vec<u8> = (0..5_000).flat_map(|_| word()).collect();
        let (mut at, mut hits) = (0, 0);
        while at < text.len() {
            at = starts.next(&text, at) + 1;
            hits += 1;
        }
        assert!(hits < text.len() / 500, "{hits} of {}", text.len());
        for pattern in &patterns {
            assert_eq!(starts.next(pattern, 0), 0);
        }
    }
}
