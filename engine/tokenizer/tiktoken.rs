//! `tiktoken.model`: byte-pair merging by rank, as Kimi publishes it.
//!
//! The file holds `base64(token bytes) SPACE rank` lines. Within a piece of text (`scanner.rs`) the adjacent pair
//! whose bytes together have the lowest rank is merged first, the leftmost on a tie, until no pair is a token.
//! Short pieces are scanned; long ones use a heap, so that a run of n bytes costs n log n.
//!
//! The reference encoder cuts its input every 400,000 characters and every 25,000 consecutive white-space (or
//! consecutive other) characters before anything else; the same cuts are made here, except that a control
//! token is never cut.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::TokenizerError;
use super::added::Segment;
use super::scanner::Scanner;
use super::vocabulary::MAX_ID;

/// The file's name.
pub(crate) const FILE: &str = "tiktoken.model";
/// Pieces up to this many bytes are merged by scanning all pairs.
const SCAN_LIMIT: usize = 48;
/// Longest line accepted; published ones stay under 200 bytes.
const MAX_LINE_BYTES: usize = 4096;
const MAX_CHUNK_CHARS: usize = 400_000;
const MAX_RUN_CHARS: usize = 25_000;

/// The ranks of a `tiktoken.model` file.
pub(crate) struct Tiktoken {
    ranks: HashMap<Box<[u8]>, u32>,
    single: [u32; 256],
    longest_bytes: usize,
    scanner: Scanner,
}

impl Tiktoken {
    /// Reads the file. `found` is called with each token's id and bytes.
    pub fn parse(
        file: &[u8],
        mut found: impl FnMut(u32, &[u8]) -> Result<(), TokenizerError>,
    ) -> Result<Tiktoken, TokenizerError> {
        let mut ranks: HashMap<Box<[u8]>, u32> = HashMap::new();
        let mut seen: Vec<bool> = Vec::new();
        let mut token = Vec::new();
        let mut longest_bytes = 0;
        for (index, line) in file.split(|&byte| byte == b'\n').enumerate() {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.is_empty() {
                continue;
            }
            let fail = |why: &str| TokenizerError::at_line(FILE, index + 1, why);
            if line.len() > MAX_LINE_BYTES {
                return Err(fail(&format!("line of {} bytes; the limit is {MAX_LINE_BYTES}", line.len())));
            }
            let Some(space) = line.iter().position(|&byte| byte == b' ') else {
                return Err(fail("no rank after the token"));
            };
            decode_base64(&line[..space], &mut token).map_err(fail)?;
            let rank = parse_rank(&line[space + 1..]).map_err(fail)?;
            if seen.len() <= rank as usize {
                seen.resize(rank as usize + 1, false);
            }
            if std::mem::replace(&mut seen[rank as usize], true) {
                return Err(fail(&format!("rank {rank} appears twice")));
            }
            if ranks.insert(token.as_slice().into(), rank).is_some() {
                return Err(fail("this token appears twice"));
            }
            longest_bytes = longest_bytes.max(token.len());
            found(rank, &token)?;
        }
        if let Some(rank) = seen.iter().position(|seen| !seen) {
            return Err(TokenizerError::in_file(
                FILE,
                format!("rank {rank} is missing; is the file complete?"),
            ));
        }
        let mut single = [0; 256];
        for byte in 0..=255u8 {
            single[byte as usize] = *ranks.get([byte].as_slice()).ok_or_else(|| {
                TokenizerError::in_file(
                    FILE,
                    format!("no token for the single byte {byte:#04x}; is the file complete?"),
                )
            })?;
        }
        Ok(Tiktoken { ranks, single, longest_bytes, scanner: Scanner::new() })
    }

    /// Number of ranks; special ids follow.
    pub fn len(&self) -> u32 {
        self.ranks.len() as u32
    }

    /// Appends the ids of `text`, cut into `segments`, to `ids`.
    pub fn encode(&self, text: &str, segments: &[Segment], ids: &mut Vec<u32>) {
        let cuts = cuts(text);
        let mut merger = Merger::default();
        for segment in segments {
            if let Some(id) = segment.id {
                ids.push(id);
                continue;
            }
            let from = cuts.partition_point(|&cut| cut <= segment.start);
            let mut start = segment.start;
            for &cut in cuts[from..].iter().take_while(|&&cut| cut < segment.end) {
                self.encode_chunk(&text[start..cut], &mut merger, ids);
                start = cut;
            }
            self.encode_chunk(&text[start..segment.end], &mut merger, ids);
        }
    }

    fn encode_chunk(&self, mut text: &str, merger: &mut Merger, ids: &mut Vec<u32>) {
        while !text.is_empty() {
            let (piece, rest) = text.split_at(self.scanner.piece(text));
            match self.rank(piece.as_bytes()) {
                Some(rank) => ids.push(rank),
                None if piece.len() <= SCAN_LIMIT => merger.scan(self, piece.as_bytes(), ids),
                None => merger.heap(self, piece.as_bytes(), ids),
            }
            text = rest;
        }
    }

    fn rank(&self, bytes: &[u8]) -> Option<u32> {
        match bytes {
            [byte] => Some(self.single[*byte as usize]),
            _ if bytes.len() > self.longest_bytes => None,
            _ => self.ranks.get(bytes).copied(),
        }
    }

    fn emit(&self, bytes: &[u8], ids: &mut Vec<u32>) {
        // A part is a single byte or was merged because it has a rank.
        ids.push(self.rank(bytes).expect("a merged part is a token"));
    }
}

/// Working memory of merging, reused from piece to piece.
#[derive(Default)]
struct Merger {
    /// Start of each part and the rank of the part joined with the next one.
    parts: Vec<(usize, u32)>,
    previous: Vec<u32>,
    next: Vec<u32>,
    queue: BinaryHeap<Reverse<(u32, u32, u32)>>,
}

const NO_RANK: u32 = u32::MAX;

impl Merger {
    /// Finds the lowest pair by looking at all: fastest on short pieces.
    fn scan(&mut self, model: &Tiktoken, piece: &[u8], ids: &mut Vec<u32>) {
        let parts = &mut self.parts;
        let joined = |parts: &[(usize, u32)], at: usize| match parts.get(at + 2) {
            Some(end) => model.rank(&piece[parts[at].0..end.0]).unwrap_or(NO_RANK),
            None => NO_RANK,
        };
        parts.clear();
        parts.extend((0..=piece.len()).map(|start| (start, NO_RANK)));
        for at in 0..piece.len() {
            parts[at].1 = joined(parts, at);
        }
        loop {
            let lowest = parts.iter().enumerate().min_by_key(|(at, part)| (part.1, *at));
            let Some((at, &(_, rank))) = lowest.filter(|(_, part)| part.1 != NO_RANK) else { break };
            debug_assert!(rank != NO_RANK);
            parts.remove(at + 1);
            parts[at].1 = joined(parts, at);
            if at > 0 {
                parts[at - 1].1 = joined(parts, at - 1);
            }
        }
        parts.windows(2).for_each(|pair| model.emit(&piece[pair[0].0..pair[1].0], ids));
    }

    /// Keeps pairs in a heap of `(rank, start, end)`; parts are a linked list over byte positions.
    fn heap(&mut self, model: &Tiktoken, piece: &[u8], ids: &mut Vec<u32>) {
        let length = piece.len() as u32;
        self.next.clear();
        self.next.extend(1..=length);
        self.previous.clear();
        self.previous.extend((0..length).map(|at| at.wrapping_sub(1)));
        self.queue.clear();
        let (next, previous, queue) = (&mut self.next, &mut self.previous, &mut self.queue);
        let offer = |queue: &mut BinaryHeap<_>, start: u32, end: u32| {
            if let Some(rank) = model.rank(&piece[start as usize..end as usize]) {
                queue.push(Reverse((rank, start, end)));
            }
        };
        (0..length.saturating_sub(1)).for_each(|start| offer(queue, start, start + 2));
        const GONE: u32 = u32::MAX;
        while let Some(Reverse((_, start, end))) = queue.pop() {
            // Stale unless `start` still begins a part and the part after it still ends at `end`.
            let middle = next[start as usize];
            if middle == GONE || middle >= end || next[middle as usize] != end {
                continue;
            }
            next[start as usize] = end;
            next[middle as usize] = GONE;
            if end < length {
                previous[end as usize] = start;
                offer(queue, start, next[end as usize]);
            }
            if start > 0 {
                offer(queue, previous[start as usize], end);
            }
        }
        let mut start = 0;
        while start < length {
            let end = next[start as usize];
            model.emit(&piece[start as usize..end as usize], ids);
            start = end;
        }
    }
}

/// Byte offsets at which the reference encoder cuts `text`.
fn cuts(text: &str) -> Vec<usize> {
    let mut cuts = Vec::new();
    if text.len() <= MAX_RUN_CHARS {
        return cuts;
    }
    let (mut chars, mut run, mut run_is_space) = (0, 0, false);
    for (at, c) in text.char_indices() {
        // White space as Python's `str.isspace` has it.
        let is_space = c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}');
        if chars == MAX_CHUNK_CHARS {
            cuts.push(at);
            (chars, run) = (0, 0);
        }
        if run > 0 && is_space != run_is_space {
            run = 0;
        }
        run_is_space = is_space;
        run += 1;
        if run > MAX_RUN_CHARS {
            cuts.push(at);
            run = 1;
        }
        chars += 1;
    }
    cuts
}

fn parse_rank(digits: &[u8]) -> Result<u32, &'static str> {
    let text = std::str::from_utf8(digits).unwrap_or_default().trim();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("the rank is not a number");
    }
    match text.parse::<u32>() {
        Ok(rank) if rank <= MAX_ID => Ok(rank),
        _ => Err("the rank is larger than any vocabulary"),
    }
}

/// Standard base64 with padding, into `out`.
fn decode_base64(text: &[u8], out: &mut Vec<u8>) -> Result<(), &'static str> {
    out.clear();
    let digits = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    if text.is_empty() || !text.len().is_multiple_of(4) || digits.len() % 4 == 1 {
        return Err("the token is not base64: its length is wrong");
    }
    let (mut bits, mut count) = (0u32, 0);
    for &digit in digits {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return Err("the token is not base64"),
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    if bits != 0 {
        return Err("the token is not base64: bits are left over");
    }
    Ok(())
}
