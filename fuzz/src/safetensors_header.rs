//! A safetensors file as one input.

use models::checkpoint::safetensors::parse;

/// What is accepted lies within the file, without overlap.
pub fn run(data: &[u8]) {
    let Ok(entries) = parse("fuzz.safetensors", data) else { return };
    let mut covered = 0;
    for (name, entry) in &entries {
        let end = entry.start.checked_add(entry.len).expect("a range");
        assert!(entry.start >= 8 && end <= data.len(), "{name:?} is outside of the file");
        covered += entry.len;
    }
    assert!(covered <= data.len() - 8);
}

pub fn seeds() -> Vec<Vec<u8>> {
    let file = |header: &str, data: usize| {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![1; data]].concat()
    };
    vec![
        file(
            r#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}"#,
            16,
        ),
        file(
            r#"{"x":{"dtype":"F4","shape":[1,4],"data_offsets":[0,2]},"y":{"dtype":"I64","shape":[0],"data_offsets":[2,2]}}"#,
            2,
        ),
        file("{}", 0),
    ]
}
