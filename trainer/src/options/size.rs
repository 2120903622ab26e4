//! Amounts of memory as people write them: `8GB`, `5.5 GiB`, `6000MB`.

use toml::Value;

use super::value::{Kind, Mismatch, OptionValue, describe};

/// An amount of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteSize {
    /// Bytes.
    pub bytes: usize,
}

/// Less is no card that anything could be trained on: somebody forgot the unit.
const LEAST: f64 = 64. * 1024. * 1024.;

const UNITS: [(&str, f64); 8] = [
    ("gib", 1_073_741_824.),
    ("mib", 1_048_576.),
    ("gb", 1e9),
    ("mb", 1e6),
    ("g", 1e9),
    ("m", 1e6),
    ("b", 1.),
    ("", 1.),
];

impl OptionValue for ByteSize {
    const KIND: Kind = Kind::Size;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        let wrong = || {
            Mismatch::new(
                "an amount of memory with its unit, like `8GB` (8·10^9 bytes), `7.5GiB` or `6000MB`",
                describe(value),
            )
        };
        let text = match value {
            Value::String(text) => text.trim().to_lowercase(),
            Value::Integer(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            _ => return Err(wrong()),
        };
        let unit = UNITS.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)));
        let Some((number, factor)) = unit else { return Err(wrong()) };
        let number: f64 = number.trim().replace('_', "").parse().map_err(|_| wrong())?;
        let bytes = number * factor;
        if !(LEAST..=1e15).contains(&bytes) {
            return Err(wrong());
        }
        Ok(Self { bytes: bytes as usize })
    }

    fn to_toml(&self) -> Option<Value> {
        let text = [("GiB", 1 << 30), ("GB", 1_000_000_000), ("MiB", 1 << 20), ("MB", 1_000_000)]
            .into_iter()
            .find(|(_, unit)| self.bytes.is_multiple_of(*unit))
            .map_or_else(
                || self.bytes.to_string(),
                |(name, unit)| format!("{}{name}", self.bytes / unit),
            );
        Some(Value::String(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<usize, Mismatch> {
        ByteSize::from_toml(&Value::String(text.to_owned())).map(|size| size.bytes)
    }

    #[test]
    fn units_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("8GB", 8_000_000_000),
            ("8 gb", 8_000_000_000),
            ("8GiB", 8 << 30),
            ("7.5G", 7_500_000_000),
            ("6000MB", 6_000_000_000),
            ("512mib", 512 << 20),
            ("8_000_000_000", 8_000_000_000),
        ] {
            assert_eq!(read(text).unwrap(), bytes, "{text}");
        }
        let number = ByteSize::from_toml(&Value::Integer(6_000_000_000)).unwrap();
        assert_eq!(number.bytes, 6_000_000_000);
    }

    #[test]
    fn what_has_no_unit_or_no_sense_is_refused() {
        for text in ["8", "", "GB", "-8GB", "8TBs", "eight GB", "nanGB", "infGB", "1e300GB", "0GB"]
        {
            let fault = read(text).unwrap_err();
            assert!(fault.expected.contains("`8GB`"), "{text}");
        }
        assert!(ByteSize::from_toml(&Value::Boolean(true)).is_err());
    }

    #[test]
    fn what_is_written_reads_back() {
        for bytes in [8_000_000_000, 8 << 30, 6 << 20 | 1 << 27, 7_500_000_000, 123_456_789] {
            let size = ByteSize { bytes };
            assert_eq!(ByteSize::from_toml(&size.to_toml().unwrap()).unwrap(), size);
        }
    }
}
