//! A ring in the host's memory to which [`Group`](super::Group) writes which experts got how many pairs and when,
//! and that the host reads at any time without waiting for the device.

use std::sync::atomic::{Ordering, fence};

use super::buffer::Buffer;
use super::device::Device;
use super::error::DeviceError;
use super::host::HostBuffer;

/// Experts that an entry has room for, as in group.cu.
const MOST_EXPERTS: usize = 512;
/// 64-bit words of an entry, and where its parts are: its number when its writing began, nanoseconds, layer and
/// tokens, experts, counts of 16 bits, and its number again when it was written.
const WORDS: usize = COUNTS + MOST_EXPERTS / 4 + 1;
const BEGUN: usize = 0;
const NANOSECONDS: usize = 1;
const LAYER_AND_TOKENS: usize = 2;
const EXPERTS: usize = 3;
const COUNTS: usize = 4;
const ENDED: usize = WORDS - 1;

/// What one grouping recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grouped {
    /// Counts up by one with every grouping.
    pub number: u64,
    /// On the device's clock.
    pub nanoseconds: u64,
    /// The number that the layer was given.
    pub layer: u32,
    /// Tokens of the call.
    pub tokens: u32,
    /// `[experts]`: pairs of each; 65535 means that or more.
    pub counts: Vec<u16>,
}

/// What is new in the ring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// In order.
    pub groupings: Vec<Grouped>,
    /// Groupings that were overwritten before they were read.
    pub lost: u64,
}

/// The ring, and how far it has been read.
pub struct ExpertRing {
    entries: HostBuffer<u64>,
    /// In the device's memory: how many entries were written, and the capacity, 0 while the ring is off.
    control: Buffer<u64>,
    reader: Reader,
}

impl ExpertRing {
    /// A ring of `capacity` entries, which is on.
    ///
    /// # Panics
    /// If the capacity is 0.
    pub fn new(device: &Device, capacity: usize) -> Result<Self, DeviceError> {
        assert!(capacity > 0, "a ring without entries");
        let entries = device.host(capacity * WORDS)?;
        let capacity = capacity as u64;
        let control = device.upload(&[0, capacity])?;
        Ok(Self { entries, control, reader: Reader { capacity, next: 1 } })
    }

    /// Turns recording on or off, also for graphs that were captured before.
    pub fn set_on(&self, on: bool) -> Result<(), DeviceError> {
        self.control.slice(1..).write(&[if on { self.reader.capacity } else { 0 }])
    }

    /// What was recorded since the last call, as far as the ring still holds it. Does not wait for the device.
    pub fn read_new(&mut self) -> News {
        let entries = &self.entries;
        self.reader.read_new(&|word| {
            let word = entries.get(word);
            // Words that are read later are no older.
            fence(Ordering::Acquire);
            word
        })
    }

    pub(super) fn control(&self) -> &Buffer<u64> {
        &self.control
    }

    pub(super) fn entries(&self) -> &HostBuffer<u64> {
        &self.entries
    }
}

/// Reads words that somebody else writes.
///
/// An entry is numbered before and after the rest of it is written: one that has its number at both ends, looked
/// at in the opposite order, is whole.
struct Reader {
    capacity: u64,
    /// The number of the entry that is read next; the first is 1.
    next: u64,
}

impl Reader {
    fn read_new(&mut self, word: &dyn Fn(usize) -> u64) -> News {
        let mut news = News::default();
        // A writer that is faster than this does not keep it here for ever.
        while news.groupings.len() < self.capacity as usize {
            let place = |part| (self.next % self.capacity) as usize * WORDS + part;
            let ended = word(place(ENDED));
            if ended < self.next {
                break;
            }
            if ended > self.next {
                // The newest that is known of. The ring holds it and those before it, as many as there are places.
                let oldest = ended - self.capacity + 1;
                news.lost += oldest - self.next;
                self.next = oldest;
                continue;
            }
            let entry = entry(self.next, &|part| word(place(part)));
            if word(place(BEGUN)) == self.next {
                news.groupings.push(entry);
            } else {
                news.lost += 1;
            }
            self.next += 1;
        }
        news
    }
}

fn entry(number: u64, word: &dyn Fn(usize) -> u64) -> Grouped {
    let layer_and_tokens = word(LAYER_AND_TOKENS);
    let experts = (word(EXPERTS) as u32 as usize).min(MOST_EXPERTS);
    let counts = (0..experts.div_ceil(4)).map(|i| word(COUNTS + i));
    let counts = counts.flat_map(|word| (0..4).map(move |i| (word >> (16 * i)) as u16));
    Grouped {
        number,
        nanoseconds: word(NANOSECONDS),
        layer: layer_and_tokens as u32,
        tokens: (layer_and_tokens >> 32) as u32,
        counts: counts.take(experts).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes entry `number` of two experts in a ring of three.
    fn write(words: &mut [u64], number: u64) {
        let entry = &mut words[(number % 3) as usize * WORDS..][..WORDS];
        entry[BEGUN] = number;
        entry[NANOSECONDS] = 1000 + number;
        entry[LAYER_AND_TOKENS] = 7 | number << 32;
        entry[EXPERTS] = 2;
        entry[COUNTS] = number | 5 << 16;
        entry[ENDED] = number;
    }

    fn whole(number: u64) -> Grouped {
        let counts = vec![number as u16, 5];
        Grouped { number, nanoseconds: 1000 + number, layer: 7, tokens: number as u32, counts }
    }

    fn read(reader: &mut Reader, words: &[u64]) -> (Vec<u64>, u64) {
        let news = reader.read_new(&|word| words[word]);
        for grouping in &news.groupings {
            assert_eq!(*grouping, whole(grouping.number));
        }
        (news.groupings.iter().map(|grouping| grouping.number).collect(), news.lost)
    }

    #[test]
    fn what_was_overwritten_is_counted() {
        let mut words = vec![0; 3 * WORDS];
        let mut reader = Reader { capacity: 3, next: 1 };
        assert_eq!(read(&mut reader, &words), (vec![], 0));
        (1..=2).for_each(|number| write(&mut words, number));
        assert_eq!(read(&mut reader, &words), (vec![1, 2], 0));
        assert_eq!(read(&mut reader, &words), (vec![], 0));
        (3..=5).for_each(|number| write(&mut words, number));
        assert_eq!(read(&mut reader, &words), (vec![3, 4, 5], 0));
        // 6 and 7 are gone. What was at 6's place when it was looked at is 9.
        (6..=10).for_each(|number| write(&mut words, number));
        assert_eq!(read(&mut reader, &words), (vec![8, 9, 10], 2));
        (11..=100).for_each(|number| write(&mut words, number));
        assert_eq!(read(&mut reader, &words), (vec![98, 99, 100], 87));
    }

    #[test]
    fn what_is_being_written_is_left_out() {
        let mut words = vec![0; 3 * WORDS];
        let mut reader = Reader { capacity: 3, next: 1 };
        (1..=3).for_each(|number| write(&mut words, number));
        // 4 has begun to take the place of 1, or 1 was read while that began.
        words[WORDS + BEGUN] = 4;
        words[WORDS + COUNTS] = 77;
        assert_eq!(read(&mut reader, &words), (vec![2, 3], 1));
        // 4 has not ended: nothing of it is read yet.
        assert_eq!(read(&mut reader, &words), (vec![], 0));
        write(&mut words, 4);
        assert_eq!(read(&mut reader, &words), (vec![4], 0));
    }
}
