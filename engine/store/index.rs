//! Which blocks are on the disk, how many bytes they take, and which goes first.
//!
//! Pure policy over integers: knows no file. Bytes are counted from before a file is written until after
//! it is removed, so what is counted is never less than what is there.
//!
//! The order is by *place*, a number of microseconds: the time of the use of a chain, less the depth of the
//! block in it. A block is used whenever one behind it is, so its place is above theirs, and the lowest
//! place is always the end of a chain. A place is also the time its file carries, which is how the order
//! outlives the process.

use std::collections::{BTreeSet, HashMap};

use crate::blocks::BlockKey;

/// A file of the store.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) file_bytes: u64,
    pub(super) place: u64,
    /// Tells a file from an earlier one of the same name.
    pub(super) born: u64,
    /// False if it is known not to hold its block; it is counted until it is removed.
    pub(super) usable: bool,
    /// Whether its place has moved since its time was set.
    pub(super) moved: bool,
}

/// What must happen before a file can be written.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Nothing.
    Enough,
    /// This one must go.
    Remove(BlockKey),
    /// All that is there is worth more.
    Refused,
}

#[derive(Debug)]
pub(super) struct Index {
    entries: HashMap<BlockKey, Entry>,
    order: BTreeSet<(u64, BlockKey)>,
    bytes: u64,
    limit_bytes: u64,
    births: u64,
}

impl Index {
    /// `fixed_bytes` are taken by what is never removed.
    pub(super) fn new(limit_bytes: u64, fixed_bytes: u64) -> Self {
        let (entries, order) = (HashMap::new(), BTreeSet::new());
        Self { entries, order, bytes: fixed_bytes, limit_bytes, births: 0 }
    }

    pub(super) fn get(&self, key: BlockKey) -> Option<&Entry> {
        self.entries.get(&key)
    }

    /// Counted bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn is_over_limit(&self) -> bool {
        self.bytes > self.limit_bytes
    }

    pub(super) fn lowest(&self) -> Option<BlockKey> {
        self.order.first().map(|&(_, key)| key)
    }

    /// Counts bytes that are about to be written or have been found.
    pub(super) fn reserve(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    /// Stops counting bytes that are gone.
    pub(super) fn release(&mut self, bytes: u64) {
        self.bytes = self.bytes.checked_sub(bytes).expect("bytes are released once");
    }

    /// Enters a file whose bytes are reserved.
    pub(super) fn insert(&mut self, key: BlockKey, file_bytes: u64, place: u64, usable: bool) {
        self.births += 1;
        let entry = Entry { file_bytes, place, born: self.births, usable, moved: false };
        let before = self.entries.insert(key, entry);
        assert!(before.is_none(), "a file is entered once");
        self.order.insert((place, key));
    }

    /// Takes a file out; its bytes stay reserved.
    pub(super) fn take(&mut self, key: BlockKey) -> Option<Entry> {
        let entry = self.entries.remove(&key)?;
        self.order.remove(&(entry.place, key));
        Some(entry)
    }

    /// Enters a file again that could not be removed, highest, so that the next attempt meets another.
    pub(super) fn put_back(&mut self, key: BlockKey, entry: Entry) {
        let place = self.order.last().map_or(entry.place, |&(highest, _)| highest.max(entry.place));
        self.entries.insert(key, Entry { place, ..entry });
        self.order.insert((place, key));
    }

    /// Notes that `key` does not hold its block, and gives whether that is news about this very file.
    pub(super) fn condemn(&mut self, key: BlockKey, born: u64) -> bool {
        let entry = self.entries.get_mut(&key).filter(|entry| entry.born == born && entry.usable);
        entry.map(|entry| entry.usable = false).is_some()
    }

    /// Moves a file up to `place`, and gives whether it had not been moved since its time was set.
    pub(super) fn raise(&mut self, key: BlockKey, place: u64) -> bool {
        let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.place < place) else {
            return false;
        };
        self.order.remove(&(entry.place, key));
        self.order.insert((place, key));
        entry.place = place;
        !std::mem::replace(&mut entry.moved, true)
    }

    /// The place whose time the file is to get.
    pub(super) fn settle(&mut self, key: BlockKey) -> Option<u64> {
        let entry = self.entries.get_mut(&key).filter(|entry| entry.moved)?;
        entry.moved = false;
        Some(entry.place)
    }

    /// What stands between a file of these bytes at `place` and the disk.
    pub(super) fn room(&self, key: BlockKey, file_bytes: u64, place: u64) -> Room {
        if self.entries.contains_key(&key) {
            return Room::Remove(key);
        }
        if self.bytes.saturating_add(file_bytes) <= self.limit_bytes {
            return Room::Enough;
        }
        match self.order.first() {
            Some(&lowest) if lowest < (place, key) => Room::Remove(lowest.1),
            _ => Room::Refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: BlockKey = BlockKey(1);
    const B: BlockKey = BlockKey(2);
    const C: BlockKey = BlockKey(3);

    /// A and B of ten bytes each, of at most 25.
    fn index() -> Index {
        let mut index = Index::new(25, 5);
        for (key, place) in [(A, 100), (B, 200)] {
            assert_eq!(index.room(key, 10, place), Room::Enough);
            index.reserve(10);
            index.insert(key, 10, place, true);
        }
        index
    }

    #[test]
    fn the_lowest_place_goes_unless_the_new_one_is_lower() {
        let mut index = index();
        assert_eq!(index.room(C, 10, 300), Room::Remove(A));
        assert_eq!(index.room(C, 10, 99), Room::Refused);
        assert_eq!(index.room(B, 10, 300), Room::Remove(B), "a name holds one file");
        assert!(index.raise(A, 250) && !index.raise(A, 260), "moved once is moved");
        assert!(!index.raise(A, 150) && !index.raise(C, 400), "never down, and only what is there");
        assert_eq!(index.room(C, 10, 300), Room::Remove(B));
        assert_eq!((index.settle(A), index.settle(A), index.settle(B)), (Some(260), None, None));
        let entry = index.take(B).unwrap();
        assert_eq!((index.bytes(), index.room(C, 10, 300)), (25, Room::Remove(A)), "bytes count to the last");
        index.release(entry.file_bytes);
        assert_eq!((index.bytes(), index.room(C, 10, 300)), (15, Room::Enough));
    }

    #[test]
    fn a_file_that_cannot_be_removed_does_not_stand_in_the_way() {
        let mut index = index();
        let entry = index.take(A).unwrap();
        index.put_back(A, entry);
        assert_eq!((index.bytes(), index.get(A).unwrap().place), (25, 200));
        index.raise(A, 201);
        assert_eq!(index.room(C, 10, 300), Room::Remove(B), "the next attempt meets another");
    }

    #[test]
    fn only_the_very_file_is_condemned() {
        let mut index = index();
        let born = index.get(A).unwrap().born;
        index.take(A).unwrap();
        index.insert(A, 10, 300, true);
        assert!(!index.condemn(A, born));
        assert!(index.get(A).unwrap().usable);
        let born = index.get(A).unwrap().born;
        assert!(index.condemn(A, born) && !index.condemn(A, born));
        assert!(!index.get(A).unwrap().usable);
    }
}
