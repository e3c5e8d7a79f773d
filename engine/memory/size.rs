//! Numbers of bytes as people write and read them.

use std::fmt;

/// Units by name, in lower case.
const UNITS: [(&str, u128); 15] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
    ("bytes", 1),
];
/// Most digits behind the point: more than any unit can resolve are a mistake.
const MAX_FRACTION_DIGITS: usize = 12;

/// Reads a size: `4GiB`, `512MiB`, `1.5G`, `20gb`, `1048576`. K, M, G and T count in 1024s, as does whatever ends in
/// `iB`; KB, MB, GB and TB count in 1000s. Fractions of a byte are dropped.
///
/// # Errors
/// If it is no such number, is 0 or cannot be counted.
pub fn parse_size(text: &str) -> Result<usize, String> {
    let wrong = || format!("{text:?} is not a size such as 4GiB, 512MiB, 20G or 1048576");
    let text_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(text_end);
    let unit = unit.trim_start().to_ascii_lowercase();
    let &(_, scale) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
    let (whole, fraction) = match number.split_once('.') {
        Some((_, "")) => return Err(wrong()),
        Some((whole, fraction)) => (whole, fraction),
        None => (number, ""),
    };
    if whole.is_empty() || fraction.len() > MAX_FRACTION_DIGITS || fraction.contains('.') {
        return Err(wrong());
    }
    let too_large = || format!("{text}: more bytes than this machine can count");
    let whole: u128 = whole.parse().map_err(|_| too_large())?;
    // Twelve digits by a scale of 40 bits: far from 128.
    let part = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| wrong())? };
    let part: u128 = part * scale / 10u128.pow(fraction.len() as u32);
    let bytes = whole.checked_mul(scale).and_then(|bytes| bytes.checked_add(part)).ok_or_else(too_large)?;
    match usize::try_from(bytes).map_err(|_| too_large())? {
        0 => Err(format!("{text}: a size of 0 holds nothing")),
        bytes => Ok(bytes),
    }
}

/// A number of bytes for people.
pub struct Bytes(pub usize);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let text = match unit {
            0 => format!("{} B", self.0),
            _ => format!("{value:.1} {}", UNITS[unit]),
        };
        f.pad(&text)
    }
}

/// A count for people, in threes: `70,272`.
pub struct Count(pub usize);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let mut text = String::with_capacity(digits.len() + digits.len() / 3);
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("1", 1),
            ("1048576", 1 << 20),
            ("17b", 17),
            ("17 bytes", 17),
            ("2k", 2048),
            ("2KiB", 2048),
            ("2kB", 2000),
            ("512MiB", 512 << 20),
            ("512m", 512 << 20),
            ("512 MB", 512_000_000),
            ("4GiB", 4 << 30),
            ("20G", 20 << 30),
            ("20gb", 20_000_000_000),
            ("1.5G", 3 << 29),
            ("0.5k", 512),
            ("1.0001k", 1024),
            ("0.000000000001T", 1),
            ("3TiB", 3 << 40),
            ("3TB", 3_000_000_000_000),
            ("007", 7),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            " ",
            "G",
            ".5G",
            "5.G",
            "1.2.3G",
            "-1",
            "+1",
            "1e9",
            "4 Gi",
            "4GiBs",
            "four",
            "4G4",
            "1,000",
            "0x10",
            " 4G",
            "4G ",
            "1.0000000000001T",
            "４",
        ] {
            let message = parse_size(text).unwrap_err();
            assert!(message.contains("is not a size"), "{text:?}: {message}");
        }
        for text in ["0", "0G", "0.0k", "0.3"] {
            assert!(parse_size(text).unwrap_err().contains("holds nothing"), "{text:?}");
        }
        for text in ["99999999T", "18446744073709551616", &"9".repeat(50)] {
            assert!(parse_size(text).unwrap_err().contains("more bytes than"), "{text:?}");
        }
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(Bytes(900).to_string(), "900 B");
        assert_eq!(Bytes(1536).to_string(), "1.5 KiB");
        assert_eq!(Bytes(18_421_383_168).to_string(), "17.2 GiB");
        assert_eq!(format!("{:>9}", Bytes(5)), "      5 B");
        let counts = [0, 999, 1000, 70_272, 1_234_567].map(|n| Count(n).to_string());
        assert_eq!(counts, ["0", "999", "1,000", "70,272", "1,234,567"]);
    }
}
