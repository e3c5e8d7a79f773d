//! The header of a safetensors file.

use models::checkpoint::safetensors::parse;

use crate::tiny::{self, Tiny};

/// A file with this header and as much data.
fn file(header: &str, data: usize) -> Vec<u8> {
    raw(header.len() as u64, header.as_bytes(), data)
}

fn raw(len: u64, header: &[u8], data: usize) -> Vec<u8> {
    [&len.to_le_bytes()[..], header, &vec![0; data]].concat()
}

fn tensor(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"t": {{"dtype": {dtype:?}, "shape": {shape}, "data_offsets": {offsets}}}}}"#)
}

#[test]
fn a_bad_header_is_refused() {
    let two = |first: &str, second: &str| {
        let entry = |name: &str, at: &str| {
            format!(r#""{name}": {{"dtype": "U8", "shape": [4], "data_offsets": {at}}}"#)
        };
        file(&format!("{{{}, {}}}", entry("first", first), entry("second", second)), 8)
    };
    let twice = r#"{"t": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                    "t": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}"#;
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "0 bytes are too few"),
        (vec![0; 7], "7 bytes are too few"),
        (raw(0, b"", 0), "header is not valid: EOF"),
        (raw(1, b"{", 0), "header is not valid: EOF"),
        (raw(1 << 63, b"{}", 0), "9223372036854775808 is over the limit"),
        (raw(u64::MAX, b"{}", 0), "18446744073709551615 is over the limit"),
        (raw(100_000_001, b"{}", 0), "100000001 is over the limit"),
        (raw(100_000_000, b"{}", 0), "needs 100000008 bytes, the file has 10"),
        (raw(3, b"{}", 0), "needs 11 bytes, the file has 10"),
        (file("{}", 5), "holds 5 bytes of data, of which tensors cover 0"),
        (file("{} x", 0), "trailing characters"),
        (file("[]", 0), "expected a map"),
        (file("null", 0), "expected a map"),
        (file("{\"\u{fffd}", 0), "EOF"),
        (raw(6, b"{\"\xff\": ", 0), "header is not valid"),
        (file(&"[".repeat(100_000), 0), "header is not valid"),
        (file(&format!("{{\"t\": {}", "[".repeat(100_000)), 0), "tensor t"),
        (file(r#"{"t": 5}"#, 0), "tensor t"),
        (file(r#"{"t": {}}"#, 0), "tensor t: missing field"),
        (file(r#"{"t": {"shape": [1], "data_offsets": [0, 1]}}"#, 1), "missing field `dtype`"),
        (file(r#"{"t": {"dtype": "U8", "data_offsets": [0, 1]}}"#, 1), "missing field `shape`"),
        (file(r#"{"t": {"dtype": "U8", "shape": [1]}}"#, 1), "missing field `data_offsets`"),
        (file(&tensor("Q4_K", "[4]", "[0, 4]"), 4), "Q4_K"),
        (file(&tensor("", "[4]", "[0, 4]"), 4), "tensor t"),
        (file(&tensor("u8", "[4]", "[0, 4]"), 4), "u8"),
        (file(&tensor("U8", "[-4]", "[0, 4]"), 4), "`-4`"),
        (file(&tensor("U8", "[4.0]", "[0, 4]"), 4), "floating point `4.0`"),
        (file(&tensor("U8", "[1e300]", "[0, 4]"), 4), "floating point"),
        (file(&tensor("U8", "[18446744073709551616]", "[0, 4]"), 4), "tensor t"),
        (file(&tensor("U8", "4", "[0, 4]"), 4), "tensor t"),
        (file(&tensor("U8", "[null]", "[0, 4]"), 4), "tensor t"),
        (file(&tensor("U8", "[4294967296, 4294967296]", "[0, 0]"), 0), "overflows"),
        (file(&tensor("U8", "[4294967296, 4294967296]", "[0, 4]"), 4), "overflows"),
        (file(&tensor("U8", "[9223372036854775808, 2]", "[0, 0]"), 0), "overflows"),
        (file(&tensor("F32", "[4611686018427387904]", "[0, 0]"), 0), "overflows"),
        (file(&tensor("F32", "[2305843009213693952]", "[0, 0]"), 0), "overflows"),
        (file(&tensor("F32", "[1]", "[0, 3]"), 3), "F32 [1] needs 4 bytes, not 3"),
        (file(&tensor("F32", "[2]", "[0, 4]"), 4), "F32 [2] needs 8 bytes, not 4"),
        (file(&tensor("F32", "[]", "[0, 0]"), 0), "needs 4 bytes, not 0"),
        (file(&tensor("F4", "[3]", "[0, 1]"), 1), "tensor t"),
        (file(&tensor("U8", "[4]", "[4, 0]"), 4), "ends at 0, before it begins at 4"),
        (file(&tensor("U8", "[4]", "[-4, 0]"), 4), "`-4`"),
        (file(&tensor("U8", "[4]", "[0]"), 4), "tensor t"),
        (file(&tensor("U8", "[4]", "[0, 4, 8]"), 4), "tensor t"),
        (file(&tensor("U8", "[4]", "[1, 5]"), 5), "begins at 1, leaves a gap"),
        (file(&tensor("U8", "[4]", "[0, 4]"), 3), "ends at byte 4 of the data, which has 3"),
        (file(&tensor("U8", "[4]", "[0, 4]"), 5), "holds 5 bytes of data, of which tensors cover 4"),
        (file(&tensor("U8", "[4]", "[18446744073709551612, 18446744073709551616]"), 4), "tensor t"),
        (file(&tensor("U8", "[4]", "[18446744073709551611, 18446744073709551615]"), 4), "ends at byte"),
        (file(&tensor("U8", "[18446744073709551615]", "[0, 18446744073709551615]"), 4), "overflows"),
        (two("[0, 4]", "[0, 4]"), "tensor second: begins at 0, overlaps its predecessor"),
        (two("[0, 4]", "[3, 7]"), "tensor second: begins at 3, overlaps its predecessor"),
        (two("[4, 8]", "[2, 6]"), "tensor second: begins at 2, leaves a gap"),
        (two("[0, 4]", "[5, 9]"), "tensor second: ends at byte 9"),
        (file(twice, 8), "tensor t occurs twice"),
        (file(r#"{"__metadata__": {}, "__metadata__": {}}"#, 0), "__metadata__ occurs twice"),
    ];
    for (bytes, words) in cases {
        let what = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
        let message = parse("x.safetensors", &bytes).expect_err(&what).to_string();
        assert!(message.starts_with("x.safetensors: ") && message.contains(words), "{what:?}: {message}");
    }
    assert!(parse("x", &two("[0, 4]", "[4, 8]")).is_ok());
    assert!(parse("x", &two("[4, 8]", "[0, 4]")).is_ok());
    assert!(parse("x", &file(&tensor("F32", "[0, 3]", "[0, 0]"), 0)).is_ok());
}

/// What the program says, with little address space to say it in.
#[test]
fn a_huge_header_takes_no_memory() {
    let folder = Tiny::new(tiny::mixtral()).folder();
    let cases = [
        (raw(1 << 63, b"{}", 0), "header length 9223372036854775808 is over the limit"),
        (raw(99_999_999, b"{}", 0), "truncated"),
        (file(&tensor("F32", "[4611686018427387904]", "[0, 0]"), 0), "tensor t: shape [4611686018427387904]"),
        (
            file(&tensor("U8", "[4]", "[9223372036854775808, 9223372036854775812]"), 4),
            "tensor t: ends at byte",
        ),
        (vec![], "truncated"),
    ];
    for (bytes, words) in cases {
        folder.write("model.safetensors", bytes);
        tiny::refuses(&folder, &["error: model.safetensors: ", words]);
    }
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let tiny = Tiny::new(tiny::mixtral());
    let whole = tiny.shard();
    assert!(parse("x", &whole).is_ok());
    for end in 0..whole.len() {
        assert!(parse("x", &whole[..end]).is_err(), "cut at {end}");
    }
    // Through the map of a file, where a read past the end would end the program.
    let folder = tiny.folder();
    let header = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    let ends = (0..16)
        .chain(header - 8..header + 8)
        .chain((0..whole.len()).step_by(101))
        .chain(whole.len() - 8..whole.len());
    for end in ends {
        folder.write("model.safetensors", &whole[..end]);
        tiny::refused(&folder, &format!("cut at {end}"), "model.safetensors: ");
    }
    folder.write("model.safetensors", &whole);
    tiny::open(&folder).unwrap();
}

/// A changed header either is refused or still describes ranges inside of the file.
#[test]
fn a_changed_header_stays_within_the_file() {
    let whole = Tiny::new(tiny::mixtral()).shard();
    let header = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    let mut bytes = whole.clone();
    for at in 0..header {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            if let Ok(entries) = parse("x", &bytes) {
                let inside = entries
                    .values()
                    .all(|entry| entry.start >= header && entry.start + entry.len <= bytes.len());
                assert!(inside, "bit {bit} of byte {at}");
            }
            bytes[at] = whole[at];
        }
    }
}
