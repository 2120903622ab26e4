//! Values of options: how each Rust type is read from TOML or from words of the command line.
//!
//! Reading is as lenient as argparse, which sees only text: `"4"` is a number and `4` is a text.
//! What cannot be meant is refused with what was expected and what came.

use std::path::PathBuf;
use toml::Value;

/// What a value must look like, for help and error messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// On or off; on the command line the name alone turns it on.
    Flag,
    /// A whole number, 0 or more.
    Int,
    /// Any finite number.
    Float,
    /// Any text.
    Text,
    /// A file or folder.
    Path,
    /// Steps as a whole number, or a share of all steps.
    IntOrFloat,
    /// `width,height` or one number for both.
    Resolution,
    /// Two numbers, `low,high`.
    Range,
    /// Any number of texts.
    TextList,
    /// Any number of numbers.
    FloatList,
    /// An amount of memory with its unit.
    Size,
    /// One of these words.
    Choice(&'static [&'static str]),
}

impl Kind {
    /// Whether the option takes every word up to the next option on the command line.
    pub fn takes_many(self) -> bool {
        matches!(self, Kind::TextList | Kind::FloatList)
    }

    /// Placeholder of the value in the help.
    pub fn placeholder(self) -> String {
        match self {
            Kind::Flag => String::new(),
            Kind::Int => "N".into(),
            Kind::Float => "NUMBER".into(),
            Kind::Text => "TEXT".into(),
            Kind::Path => "PATH".into(),
            Kind::IntOrFloat => "N|SHARE".into(),
            Kind::Resolution => "SIZE|W,H".into(),
            Kind::Range => "LOW,HIGH".into(),
            Kind::Size => "8GB".into(),
            Kind::TextList => "TEXT ...".into(),
            Kind::FloatList => "NUMBER ...".into(),
            Kind::Choice(words) if words.len() <= 4 => words.join("|"),
            Kind::Choice(_) => "WORD".into(),
        }
    }
}

/// A value of the wrong type: what was expected and what came instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// What the option takes, as words that fit after "must be".
    pub expected: String,
    /// What was given, type and value.
    pub got: String,
}

impl Mismatch {
    /// A mismatch from both descriptions.
    pub fn new(expected: impl Into<String>, got: impl Into<String>) -> Self {
        Mismatch { expected: expected.into(), got: got.into() }
    }
}

/// Type and value of a TOML value in one phrase, for error messages.
pub fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("text: `{text}`"),
        Value::Integer(number) => format!("a whole number: `{number}`"),
        Value::Float(number) => format!("a number: `{number}`"),
        Value::Boolean(flag) => format!("a boolean: `{flag}`"),
        Value::Datetime(date) => format!("a date: `{date}`"),
        Value::Array(_) => format!("a list: `{value}`"),
        Value::Table(_) => "a table".to_owned(),
    }
}

/// A type that an option can have.
pub trait OptionValue: Sized {
    /// How the value looks on the command line.
    const KIND: Kind;
    /// Reads the value as leniently as argparse would.
    fn from_toml(value: &Value) -> Result<Self, Mismatch>;
    /// The value as it would stand in a config; `None` where the option is unset.
    fn to_toml(&self) -> Option<Value>;
}

impl OptionValue for bool {
    const KIND: Kind = Kind::Flag;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        match value {
            Value::Boolean(flag) => Ok(*flag),
            Value::Integer(0) => Ok(false),
            Value::Integer(1) => Ok(true),
            Value::String(text) if text.eq_ignore_ascii_case("true") || text == "1" => Ok(true),
            Value::String(text) if text.eq_ignore_ascii_case("false") || text == "0" => Ok(false),
            other => Err(Mismatch::new("true or false", describe(other))),
        }
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::Boolean(*self))
    }
}

impl OptionValue for usize {
    const KIND: Kind = Kind::Int;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        let wrong = || Mismatch::new("a whole number, 0 or more", describe(value));
        usize::try_from(u64::from_toml(value)?).map_err(|_| wrong())
    }

    fn to_toml(&self) -> Option<Value> {
        (*self as u64).to_toml()
    }
}

impl OptionValue for u64 {
    const KIND: Kind = Kind::Int;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        let number = match value {
            Value::Integer(number) => u64::try_from(*number).ok(),
            // A whole number written as 1e3 or 4.0 is unambiguous.
            Value::Float(number) if number.fract() == 0.0 && (0.0..=9e15).contains(number) => {
                Some(*number as u64)
            }
            Value::String(text) => text.trim().replace('_', "").parse().ok(),
            _ => None,
        };
        number.ok_or_else(|| Mismatch::new("a whole number, 0 or more", describe(value)))
    }

    fn to_toml(&self) -> Option<Value> {
        // TOML integers end at i64; a larger seed goes as text, which reading accepts.
        Some(match i64::try_from(*self) {
            Ok(number) => Value::Integer(number),
            Err(_) => Value::String(self.to_string()),
        })
    }
}

impl OptionValue for f64 {
    const KIND: Kind = Kind::Float;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        let number = match value {
            Value::Integer(number) => Some(*number as f64),
            Value::Float(number) => Some(*number),
            Value::String(text) => text.trim().replace('_', "").parse().ok(),
            _ => None,
        };
        number
            .filter(|number: &f64| number.is_finite())
            .ok_or_else(|| Mismatch::new("a finite number", describe(value)))
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::Float(*self))
    }
}

impl OptionValue for String {
    const KIND: Kind = Kind::Text;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        match value {
            Value::String(text) => Ok(text.clone()),
            Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => Ok(value.to_string()),
            other => Err(Mismatch::new("text", describe(other))),
        }
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::String(self.clone()))
    }
}

impl OptionValue for PathBuf {
    const KIND: Kind = Kind::Path;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        match value {
            Value::String(text) if !text.is_empty() => Ok(PathBuf::from(text)),
            other => Err(Mismatch::new("a path", describe(other))),
        }
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::String(self.to_string_lossy().into_owned()))
    }
}

impl<T: OptionValue> OptionValue for Option<T> {
    const KIND: Kind = T::KIND;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        match (value, T::KIND) {
            // An empty path in a config means "none"; so does the word None where words are listed.
            (Value::String(text), Kind::Path) if text.is_empty() => Ok(None),
            (Value::String(text), Kind::Choice(_)) if text.is_empty() || text == "None" => Ok(None),
            _ => T::from_toml(value).map(Some),
        }
    }

    fn to_toml(&self) -> Option<Value> {
        self.as_ref().and_then(T::to_toml)
    }
}

/// Reads a list; a single text is split at white space, any other single value is a list of one.
fn list_from_toml<T: OptionValue>(value: &Value) -> Result<Vec<T>, Mismatch> {
    match value {
        Value::Array(items) => items.iter().map(T::from_toml).collect(),
        Value::String(text) => text
            .split_whitespace()
            .map(|word| T::from_toml(&Value::String(word.to_owned())))
            .collect(),
        other => Ok(vec![T::from_toml(other)?]),
    }
}

impl OptionValue for Vec<String> {
    const KIND: Kind = Kind::TextList;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        list_from_toml(value)
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::Array(self.iter().filter_map(String::to_toml).collect()))
    }
}

impl OptionValue for Vec<f64> {
    const KIND: Kind = Kind::FloatList;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        list_from_toml(value)
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::Array(self.iter().filter_map(f64::to_toml).collect()))
    }
}

/// A number of steps, or a share of all steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum IntOrFloat {
    /// So many optimizer steps.
    Steps(usize),
    /// This share (0 to 1) of all optimizer steps.
    Share(f64),
}

impl IntOrFloat {
    /// The number of steps in a run of `total` steps; a share is rounded down.
    pub fn of(self, total: usize) -> usize {
        match self {
            IntOrFloat::Steps(steps) => steps,
            IntOrFloat::Share(share) => (share * total as f64) as usize,
        }
    }
}

impl OptionValue for IntOrFloat {
    const KIND: Kind = Kind::IntOrFloat;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        let wrong = || {
            Mismatch::new(
                "a whole number of steps, a share below 1 or a percentage",
                describe(value),
            )
        };
        if let Value::String(text) = value
            && let Some(percent) = text.trim().strip_suffix('%')
        {
            let share = percent.trim().parse::<f64>().map_err(|_| wrong())? / 100.0;
            return if (0.0..=1.0).contains(&share) {
                Ok(Self::Share(share))
            } else {
                Err(wrong())
            };
        }
        let number = f64::from_toml(value).map_err(|_| wrong())?;
        match number {
            number if number < 0.0 => Err(wrong()),
            0.0 => Ok(Self::Steps(0)),
            number if number < 1.0 => Ok(Self::Share(number)),
            number if number.fract() == 0.0 => Ok(Self::Steps(number as usize)),
            _ => Err(wrong()),
        }
    }

    fn to_toml(&self) -> Option<Value> {
        match self {
            IntOrFloat::Steps(steps) => steps.to_toml(),
            IntOrFloat::Share(share) => share.to_toml(),
        }
    }
}

/// Splits `"a,b"`, `a` or `[a, b]` into one or two values.
fn pair_from_toml<T: OptionValue>(value: &Value) -> Result<Vec<T>, Mismatch> {
    match value {
        Value::Array(items) => items.iter().map(T::from_toml).collect(),
        Value::String(text) => text
            .split(',')
            .map(|part| T::from_toml(&Value::String(part.trim().to_owned())))
            .collect(),
        other => Ok(vec![T::from_toml(other)?]),
    }
}

/// Size of training images in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolution {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
}

impl OptionValue for Resolution {
    const KIND: Kind = Kind::Resolution;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        let wrong = || Mismatch::new("a size like `512` or `512,768`", describe(value));
        match pair_from_toml::<usize>(value).map_err(|_| wrong())?[..] {
            [size] if size > 0 => Ok(Resolution { width: size, height: size }),
            [width, height] if width > 0 && height > 0 => Ok(Resolution { width, height }),
            _ => Err(wrong()),
        }
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::String(format!("{},{}", self.width, self.height)))
    }
}

/// Factors between which a face crop is enlarged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CropRange {
    /// Smallest factor.
    pub low: f64,
    /// Largest factor.
    pub high: f64,
}

impl OptionValue for CropRange {
    const KIND: Kind = Kind::Range;

    fn from_toml(value: &Value) -> Result<Self, Mismatch> {
        let wrong = || Mismatch::new("two rising numbers like `2.0,4.0`", describe(value));
        match pair_from_toml::<f64>(value).map_err(|_| wrong())?[..] {
            [low, high] if low <= high => Ok(CropRange { low, high }),
            _ => Err(wrong()),
        }
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::String(format!("{:?},{:?}", self.low, self.high)))
    }
}
