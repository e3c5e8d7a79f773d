//! The bytes of a saved block's file.
//!
//! ```text
//!  0  magic "MOEBIUSB"
//!  8  format version, u32
//! 12  zero
//! 16  key, u128
//! 32  payload length, u64
//! 40  zero
//! 48  blake3 of bytes 0 to 48 and the payload
//! 80  payload
//! ```
//!
//! All little-endian. A reader knows the key and the length it wants, so it compares and never believes a
//! number in the file.

use crate::blocks::BlockKey;

/// Bytes before the payload.
pub(super) const HEADER_BYTES: usize = 80;

const MAGIC: &[u8; 8] = b"MOEBIUSB";
const VERSION: u32 = 1;
const FIELDS_BYTES: usize = 48;

fn fields(key: BlockKey, payload_bytes: usize) -> [u8; FIELDS_BYTES] {
    let mut fields = [0; FIELDS_BYTES];
    fields[..8].copy_from_slice(MAGIC);
    fields[8..12].copy_from_slice(&VERSION.to_le_bytes());
    fields[16..32].copy_from_slice(&key.0.to_le_bytes());
    fields[32..40].copy_from_slice(&(payload_bytes as u64).to_le_bytes());
    fields
}

fn checksum(fields: &[u8], payload: &[u8]) -> blake3::Hash {
    blake3::Hasher::new().update(fields).update(payload).finalize()
}

/// Writes the header of `file`, whose payload stands behind the header's place.
pub(super) fn seal(file: &mut [u8], key: BlockKey) {
    let (header, payload) = file.split_at_mut(HEADER_BYTES);
    let fields = fields(key, payload.len());
    header[..FIELDS_BYTES].copy_from_slice(&fields);
    header[FIELDS_BYTES..].copy_from_slice(checksum(&fields, payload).as_bytes());
}

/// Whether `file` is the block `key`, whole and unchanged.
pub(super) fn is_sealed(file: &[u8], key: BlockKey) -> bool {
    let Some((header, payload)) = file.split_at_checked(HEADER_BYTES) else { return false };
    let (found, sum) = header.split_at(FIELDS_BYTES);
    found == fields(key, payload.len()) && checksum(found, payload).as_bytes() == sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_other_bytes_are_not_the_block() {
        let key = BlockKey(7 << 100 | 9);
        let mut file = vec![0; HEADER_BYTES + 37];
        file[HEADER_BYTES..].iter_mut().enumerate().for_each(|(n, byte)| *byte = n as u8);
        assert!(!is_sealed(&file, key));
        seal(&mut file, key);
        assert!(is_sealed(&file, key));
        assert!(!is_sealed(&file, BlockKey(key.0 ^ 1)));
        for length in 0..file.len() {
            assert!(!is_sealed(&file[..length], key), "cut to {length} bytes");
        }
        for at in 0..file.len() {
            for bit in 0..8 {
                file[at] ^= 1 << bit;
                assert!(!is_sealed(&file, key), "bit {bit} of byte {at}");
                file[at] ^= 1 << bit;
            }
        }
        file.push(0);
        assert!(!is_sealed(&file, key), "a byte too many");
    }
}
