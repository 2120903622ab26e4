//! The settings of an optimizer as one table: name, type, default and range of every key that
//! `optimizer_args` may set, and the keys of the reference that mean nothing here.

use crate::options::Literal;

/// What a number may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// Anything.
    Any,
    /// 0 or more.
    NotNegative,
    /// More than 0.
    Positive,
    /// From 0 up to but not 1.
    Share,
    /// More than 0, less than 1.
    Inside,
}

impl Range {
    fn holds(self, number: f64) -> bool {
        match self {
            Self::Any => !number.is_nan(),
            Self::NotNegative => number >= 0.,
            Self::Positive => number > 0.,
            Self::Share => (0. ..1.).contains(&number),
            Self::Inside => number > 0. && number < 1.,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Any => "",
            Self::NotNegative => " not below 0",
            Self::Positive => " above 0",
            Self::Share => " from 0 up to but not 1",
            Self::Inside => " between 0 and 1",
        }
    }
}

/// A type of settings.
pub(super) trait Setting: Sized {
    /// For messages: `a number`.
    const KIND: &'static str;
    /// Reads it from a literal.
    fn read(value: &Literal) -> Option<Self>;
    /// The numbers that must lie in the range.
    fn numbers(&self) -> Vec<f64>;
}

impl Setting for f64 {
    const KIND: &'static str = "a number";

    fn read(value: &Literal) -> Option<Self> {
        value.number()
    }

    fn numbers(&self) -> Vec<f64> {
        vec![*self]
    }
}

impl Setting for usize {
    const KIND: &'static str = "a whole number";

    fn read(value: &Literal) -> Option<Self> {
        match value {
            Literal::Int(number) => usize::try_from(*number).ok(),
            _ => None,
        }
    }

    fn numbers(&self) -> Vec<f64> {
        vec![*self as f64]
    }
}

impl Setting for bool {
    const KIND: &'static str = "`True` or `False`";

    fn read(value: &Literal) -> Option<Self> {
        match value {
            Literal::Bool(flag) => Some(*flag),
            Literal::Int(number @ 0..=1) => Some(*number == 1),
            _ => None,
        }
    }

    fn numbers(&self) -> Vec<f64> {
        Vec::new()
    }
}

impl Setting for Option<f64> {
    const KIND: &'static str = "a number or `None`";

    fn read(value: &Literal) -> Option<Self> {
        match value {
            Literal::None => Some(None),
            value => value.number().map(Some),
        }
    }

    fn numbers(&self) -> Vec<f64> {
        self.iter().copied().collect()
    }
}

impl Setting for (f64, f64) {
    const KIND: &'static str = "two numbers, like `0.9,0.999`,";

    fn read(value: &Literal) -> Option<Self> {
        match value.items()? {
            [first, second] => Some((first.number()?, second.number()?)),
            _ => None,
        }
    }

    fn numbers(&self) -> Vec<f64> {
        vec![self.0, self.1]
    }
}

impl Setting for (f64, f64, f64) {
    const KIND: &'static str = "three numbers, like `0.9,0.999,0.9999`,";

    fn read(value: &Literal) -> Option<Self> {
        match value.items()? {
            [first, second, third] => Some((first.number()?, second.number()?, third.number()?)),
            _ => None,
        }
    }

    fn numbers(&self) -> Vec<f64> {
        vec![self.0, self.1, self.2]
    }
}

/// Reads a value and checks its range; the error says what it must be.
pub(super) fn read<T: Setting>(value: &Literal, range: Range) -> Result<T, String> {
    match T::read(value) {
        Some(setting) if setting.numbers().iter().all(|number| range.holds(*number)) => Ok(setting),
        _ => Err(format!("{}{}", T::KIND, range.words())),
    }
}

/// Settings that are set by name.
pub trait Settings {
    /// Sets a key. `None`: there is no such key. The error is what the value must be.
    fn set(&mut self, key: &str, value: &Literal) -> Option<Result<(), String>>;

    /// All keys.
    fn keys(&self) -> &'static [&'static str];

    /// Keys of the reference that only choose how it computes, which changes nothing here.
    fn idle_keys(&self) -> &'static [&'static str];
}

/// Declares a struct of settings: `key: type = default, Range;` each.
macro_rules! settings {
    (
        $(#[$doc:meta])*
        $name:ident {
            $( $(#[$key_doc:meta])* $key:ident: $kind:ty = $default:expr, $range:ident; )*
        }
        idle: [$($idle:literal),* $(,)?]
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub struct $name { $( $(#[$key_doc])* pub $key: $kind, )* }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $key: $default, )* }
            }
        }

        impl $crate::optimizer::settings::Settings for $name {
            fn set(
                &mut self,
                key: &str,
                value: &$crate::options::Literal,
            ) -> Option<Result<(), String>> {
                use $crate::optimizer::settings::{Range, read};
                match key {
                    $( stringify!($key) => {
                        Some(read(value, Range::$range).map(|value| self.$key = value))
                    } )*
                    _ => None,
                }
            }

            fn keys(&self) -> &'static [&'static str] {
                &[$( stringify!($key), )*]
            }

            fn idle_keys(&self) -> &'static [&'static str] {
                &[$( $idle, )*]
            }
        }
    };
}
pub(super) use settings;
