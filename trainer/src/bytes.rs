//! Amounts of memory as people write and read them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes. Read from a whole or decimal number with a unit: `23GiB`, `24 GB`, `1.5GiB`; written back exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// Units, the largest first. Those with an i are powers of 1024, the others of 1000.
const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("KB", 1000),
    ("B", 1),
];

/// A text that is not an amount of memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not an amount of memory; write a number with a unit, such as 23GiB or 24GB")]
pub struct NoAmount {
    text: String,
}

impl FromStr for Bytes {
    type Err = NoAmount;

    fn from_str(text: &str) -> Result<Self, NoAmount> {
        let refuse = || NoAmount { text: text.to_owned() };
        let unit_at = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(refuse)?;
        let (number, unit) = (text[..unit_at].trim(), &text[unit_at..]);
        let known = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
        let &(_, size) = known.ok_or_else(refuse)?;
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(size).map(Self).ok_or_else(refuse);
        }
        let is_plain = number.chars().all(|c| c.is_ascii_digit() || c == '.');
        match number.parse::<f64>() {
            Ok(number) if is_plain => Ok(Self((number * size as f64).round() as u64)),
            _ => Err(refuse()),
        }
    }
}

impl Bytes {
    /// The text that reads back as exactly this number: in the largest unit that divides it.
    fn exactly(self) -> String {
        let divides = |&&(_, size): &&(&str, u64)| self.0 >= size && self.0.is_multiple_of(size);
        let (unit, size) = UNITS.iter().find(divides).copied().unwrap_or(("B", 1));
        format!("{}{unit}", self.0 / size)
    }
}

/// For people: MiB or GiB, rounded.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        const MIB: f64 = 1024.0 * 1024.0;
        let mib = self.0 as f64 / MIB;
        if mib < 1024.0 { write!(f, "{mib:.1} MiB") } else { write!(f, "{:.2} GiB", mib / 1024.0) }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.exactly())
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_read_as_people_write_them_and_back_to_the_byte() {
        for (text, bytes) in [
            ("23GiB", 23 << 30),
            ("24 GB", 24_000_000_000),
            ("1.5gib", 3 << 29),
            ("512 MiB", 512 << 20),
            ("0B", 0),
            ("7b", 7),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "23", "GiB", "-1GiB", "1e3GiB", "nanGiB", "23GiBs", "1.2.3GiB", "99999999999TiB"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        for bytes in [0, 1, 1023, 1024, 24_000_000_000, 23 << 30, (1 << 40) + 1, u64::MAX] {
            assert_eq!(Bytes(bytes).exactly().parse(), Ok(Bytes(bytes)));
        }
    }
}
