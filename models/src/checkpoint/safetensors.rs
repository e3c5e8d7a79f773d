//! The header of one safetensors file, checked so strictly that every later read is in range.
//!
//! The JSON is decoded into the `safetensors` crate's own types; the checks are made here because
//! an error must name the tensor and the file, which the crate's errors do not always do.

use std::collections::BTreeMap;
use std::fmt;

use safetensors::tensor::{Dtype, TensorInfo};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};

/// Longest header accepted. The largest published shards need about 200 KB.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// First byte, from the beginning of the file.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

/// Parses and checks the header of a file given as a whole.
///
/// # Errors
/// Anything that is not a well-formed file whose tensors lie one after another without gap or
/// overlap and end where the file ends.
pub fn parse(file: &str, bytes: &[u8]) -> Result<BTreeMap<String, Entry>> {
    let fail = |message: String| Error::format(file, message);
    let Some(prefix) = bytes.first_chunk::<8>() else {
        return Err(fail(format!("is truncated: {} bytes are too few for a header length", bytes.len())));
    };
    let header_len = u64::from_le_bytes(*prefix);
    if header_len > MAX_HEADER_BYTES {
        return Err(fail(format!(
            "header length {header_len} is over the limit of {MAX_HEADER_BYTES} bytes"
        )));
    }
    let data_start = 8 + header_len as usize;
    let Some(header) = bytes.get(8..data_start) else {
        let message =
            format!("is truncated: the header needs {data_start} bytes, the file has {}", bytes.len());
        return Err(fail(message));
    };
    let mut json = serde_json::Deserializer::from_slice(header);
    let tensors = json
        .deserialize_map(HeaderVisitor)
        .and_then(|tensors| json.end().map(|()| tensors))
        .map_err(|error| fail(format!("header is not valid: {error}")))?;

    let mut entries = BTreeMap::new();
    let mut spans = Vec::with_capacity(tensors.len());
    for (name, info) in tensors {
        let (start, end) = info.data_offsets;
        let tensor = |message: String| fail(format!("tensor {name}: {message}"));
        if end < start {
            return Err(tensor(format!("ends at {end}, before it begins at {start}")));
        }
        let elements = info.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
        let bits = elements.and_then(|n| n.checked_mul(info.dtype.bitsize()));
        let Some(bits) = bits else {
            return Err(tensor(format!("shape {:?} overflows", info.shape)));
        };
        if bits % 8 != 0 || bits / 8 != end - start {
            let (dtype, shape) = (info.dtype, &info.shape);
            return Err(tensor(format!("{dtype:?} {shape:?} needs {} bytes, not {}", bits / 8, end - start)));
        }
        let available = bytes.len() - data_start;
        if end > available {
            let message = format!("ends at byte {end} of the data, which has {available}: truncated?");
            return Err(tensor(message));
        }
        spans.push((start, end, name.clone()));
        let entry =
            Entry { dtype: info.dtype, shape: info.shape, start: data_start + start, len: end - start };
        entries.insert(name, entry);
    }
    check_layout(file, &mut spans, bytes.len() - data_start)?;
    Ok(entries)
}

fn check_layout(file: &str, spans: &mut [(usize, usize, String)], data_len: usize) -> Result<()> {
    spans.sort();
    let mut end = 0;
    for (start, next, name) in spans.iter() {
        if *start != end {
            let what = if *start < end { "overlaps its predecessor" } else { "leaves a gap before it" };
            return Err(Error::format(
                file,
                format!("tensor {name}: begins at {start}, {what} (which ends at {end})"),
            ));
        }
        end = *next;
    }
    if end != data_len {
        return Err(Error::format(
            file,
            format!("holds {data_len} bytes of data, of which tensors cover {end}"),
        ));
    }
    Ok(())
}

/// Reads the header's map, refusing a name that occurs twice.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Vec<(String, TensorInfo)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor names to dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
        use serde::de::Error as _;
        let mut seen = std::collections::HashSet::new();
        let mut tensors = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("tensor {name} occurs twice")));
            }
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                let info = map
                    .next_value::<TensorInfo>()
                    .map_err(|error| A::Error::custom(format!("tensor {name}: {error}")))?;
                tensors.push((name, info));
            }
        }
        Ok(tensors)
    }
}
