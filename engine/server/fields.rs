//! Owns reading typed, bounded values out of a JSON object whose fields anyone may have written. `null` is the same as
//! absent everywhere; a wrong type or a value out of range is an error that names the field. Knows no endpoint.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::errors::{ApiError, quoted};

/// JSON values in one body. A parsed value takes some 80 bytes where two bytes of text can spell one, so without this a
/// body of the allowed size could take forty times its size.
const MAX_VALUES: usize = 1 << 20;

type Read<T> = Result<Option<T>, ApiError>;

/// Parses a body. Nesting is bounded by the parser, at 128.
///
/// # Errors
/// 400: not JSON, not an object, too deep, too many values.
pub(super) fn parse_object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    if value_bound(body) > MAX_VALUES {
        return Err(ApiError::malformed(format!("the body has more than {MAX_VALUES} JSON values")));
    }
    match serde_json::from_slice(body) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(ApiError::malformed("the body must be a JSON object")),
        Err(error) => Err(ApiError::malformed(format!("the body is not valid JSON: {error}"))),
    }
}

/// At least the number of values: one and one more per separator outside of strings.
fn value_bound(body: &[u8]) -> usize {
    let (mut values, mut in_string, mut bytes) = (1, false, body.iter());
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => in_string = !in_string,
            b'\\' if in_string => {
                bytes.next();
            }
            b',' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    values
}

/// The fields of one object. A field that was read is gone, so what is left at the end is unknown.
pub(super) struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    pub(super) fn new(map: Map<String, Value>) -> Self {
        Self { map }
    }

    /// The raw value; `None` for absent and for `null`.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.swap_remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn bool(&mut self, name: &'static str) -> Read<bool> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(ApiError::invalid(name, "must be true or false")),
        }
    }

    pub(super) fn string(&mut self, name: &'static str) -> Read<String> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(_) => Err(ApiError::invalid(name, "must be a string")),
        }
    }

    pub(super) fn object(&mut self, name: &'static str) -> Read<Map<String, Value>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(value)) => Ok(Some(value)),
            Some(_) => Err(ApiError::invalid(name, "must be an object")),
        }
    }

    pub(super) fn array(&mut self, name: &'static str, most: usize) -> Read<Vec<Value>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) if items.len() <= most => Ok(Some(items)),
            Some(Value::Array(items)) => Err(ApiError::invalid(
                name,
                format_args!("has {} items; at most {most} are allowed", items.len()),
            )),
            Some(_) => Err(ApiError::invalid(name, "must be an array")),
        }
    }

    /// A whole number; `5.0` is not one.
    pub(super) fn integer(&mut self, name: &'static str, range: RangeInclusive<i64>) -> Read<i64> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_i64() {
                Some(value) if range.contains(&value) => Ok(Some(value)),
                _ if number.is_f64() => Err(ApiError::invalid(name, "must be a whole number")),
                _ => Err(ApiError::invalid(
                    name,
                    format_args!("must be between {} and {}, not {number}", range.start(), range.end()),
                )),
            },
            Some(_) => Err(ApiError::invalid(name, "must be a whole number")),
        }
    }

    pub(super) fn count(&mut self, name: &'static str, range: RangeInclusive<u32>) -> Read<usize> {
        let range = i64::from(*range.start())..=i64::from(*range.end());
        Ok(self.integer(name, range)?.map(|value| value as usize))
    }

    /// A finite number in the range. The range is that of the f64 on the wire, so nothing overflows on the way to f32.
    pub(super) fn number(&mut self, name: &'static str, range: RangeInclusive<f64>) -> Read<f32> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_f64() {
                Some(value) if range.contains(&value) => Ok(Some(value as f32)),
                _ => Err(ApiError::invalid(
                    name,
                    format_args!("must be between {} and {}, not {number}", range.start(), range.end()),
                )),
            },
            Some(_) => Err(ApiError::invalid(name, "must be a number")),
        }
    }

    /// Like [`number`](Self::number), zero excluded.
    pub(super) fn positive(&mut self, name: &'static str, most: f64) -> Read<f32> {
        match self.number(name, 0.0..=most)? {
            Some(value) if value <= 0.0 => Err(ApiError::invalid(name, "must be greater than 0")),
            value => Ok(value),
        }
    }

    /// Token ids below `vocab`.
    pub(super) fn token_ids(&mut self, name: &'static str, vocab: usize, most: usize) -> Read<Vec<u32>> {
        let Some(items) = self.array(name, most)? else { return Ok(None) };
        items.iter().map(|item| token_id(name, item, vocab)).collect::<Result<_, _>>().map(Some)
    }

    /// A non-empty value of this field means that the caller wants something this server does not do.
    pub(super) fn refuse(&mut self, name: &'static str, what: &str) -> Result<(), ApiError> {
        match self.take(name) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(Value::Array(items)) if items.is_empty() => Ok(()),
            Some(_) => Err(ApiError::unsupported(name, what)),
        }
    }

    /// What nobody read: clients send extras, so they are only mentioned.
    pub(super) fn finish(self) {
        for name in self.map.keys().take(32) {
            tracing::debug!(field = %quoted(name), "ignoring an unknown request field");
        }
    }
}

/// One token id below `vocab`.
pub(super) fn token_id(name: &'static str, value: &Value, vocab: usize) -> Result<u32, ApiError> {
    let id = value.as_u64().ok_or_else(|| ApiError::invalid(name, "must be a list of token ids"))?;
    match u32::try_from(id) {
        Ok(small) if (small as usize) < vocab => Ok(small),
        _ => Err(ApiError::invalid(
            name,
            format_args!("has the token id {id}; the vocabulary has {vocab} ids"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Fields::new(map),
            other => panic!("not an object: {other:?}"),
        }
    }

    #[test]
    fn separators_inside_strings_are_not_values() {
        assert_eq!(value_bound(br#"{"a,[{\"\\":[1,2,"x"]}"#), 5);
        assert_eq!(value_bound(b"\"\\"), 1, "an escape at the end of a broken body");
    }

    #[test]
    fn numbers_at_and_past_their_ends() {
        let mut f = fields(
            r#"{"a":1e308,"b":-0.1,"c":2,"d":2.0,"e":18446744073709551615,"f":null,"g":"1","h":5e-324}"#,
        );
        assert!(f.number("a", 0.0..=2.0).is_err());
        assert!(f.number("b", 0.0..=2.0).is_err());
        assert_eq!(f.number("c", 0.0..=2.0), Ok(Some(2.0)));
        assert!(f.integer("d", 0..=9).is_err());
        assert!(f.integer("e", 0..=i64::MAX).is_err());
        assert_eq!(f.integer("f", 0..=9), Ok(None));
        assert!(f.number("g", 0.0..=2.0).is_err());
        assert!(f.positive("h", 2.0).is_err(), "a denormal that rounds to 0 is 0");
        assert_eq!(f.integer("absent", 0..=9), Ok(None));
    }
}
