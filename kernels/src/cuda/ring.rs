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
///
/// The device numbers an entry before and after it writes the rest: an entry that has its number at both ends,
/// looked at in the opposite order, is whole.
pub struct ExpertRing {
    entries: HostBuffer<u64>,
    /// In the device's memory: how many entries were written, and the capacity, 0 while the ring is off.
    control: Buffer<u64>,
    capacity: u64,
    next: u64,
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
        Ok(Self { entries, control, capacity, next: 1 })
    }

    /// Turns recording on or off, also of graphs that were captured before.
    pub fn set_on(&self, on: bool) -> Result<(), DeviceError> {
        self.control.slice(1..).write(&[if on { self.capacity } else { 0 }])
    }

    pub(super) fn control(&self) -> &Buffer<u64> {
        &self.control
    }

    pub(super) fn entries(&self) -> &HostBuffer<u64> {
        &self.entries
    }

    /// What was recorded since the last call, as far as the ring still holds it. Does not wait for the device.
    pub fn read_new(&mut self) -> News {
        let mut news = News::default();
        // A device that writes faster than this reads does not keep it here for ever.
        while news.groupings.len() < self.capacity as usize {
            let ended = self.word(self.next, ENDED);
            if ended < self.next {
                break;
            }
            if ended > self.next {
                // The entry there now is the newest that is known of, or older: the ring holds this many before it.
                let oldest = ended - self.capacity + 1;
                news.lost += oldest - self.next;
                self.next = oldest;
                continue;
            }
            match self.entry(self.next) {
                Some(entry) => news.groupings.push(entry),
                None => news.lost += 1,
            }
            self.next += 1;
        }
        news
    }

    fn word(&self, number: u64, word: usize) -> u64 {
        let word = self.entries.get((number % self.capacity) as usize * WORDS + word);
        // Words that are read later are no older.
        fence(Ordering::Acquire);
        word
    }

    /// The entry, whose writing has ended, unless it is being overwritten.
    fn entry(&self, number: u64) -> Option<Grouped> {
        let both = self.word(number, LAYER_AND_TOKENS);
        let experts = (self.word(number, EXPERTS) as u32 as usize).min(MOST_EXPERTS);
        let words = (0..experts.div_ceil(4)).map(|i| self.word(number, COUNTS + i));
        let counts = words.flat_map(|word| (0..4).map(move |i| (word >> (16 * i)) as u16));
        let entry = Grouped {
            number,
            nanoseconds: self.word(number, NANOSECONDS),
            layer: both as u32,
            tokens: (both >> 32) as u32,
            counts: counts.take(experts).collect(),
        };
        (self.word(number, BEGUN) == number).then_some(entry)
    }
}
