//! Python literals, as the values in `optimizer_args` are written: numbers, `True`, `None`, text in
//! quotes, tuples with or without parentheses, lists. Read as `ast.literal_eval` reads them, shown
//! as Python's `str` shows them; `true`, `none` and `inf` are understood besides.

use std::fmt;

use crate::metadata::python_float;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Literal {
    /// `None`
    None,
    /// `True` or `False`
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// Text in quotes.
    Text(String),
    /// `(1, 2)` or `1, 2`
    Tuple(Vec<Literal>),
    /// `[1, 2]`
    List(Vec<Literal>),
}

impl Literal {
    /// Reads a literal; `None` where it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let mut reader = Reader { rest: text.trim() };
        let value = reader.items(None)?;
        reader.rest.is_empty().then_some(value)
    }

    /// The number, also of a bool as in Python.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Bool(flag) => Some(f64::from(u8::from(*flag))),
            Self::Int(number) => Some(*number as f64),
            Self::Float(number) => Some(*number),
            _ => None,
        }
    }

    /// The values of a tuple or list.
    pub fn items(&self) -> Option<&[Self]> {
        match self {
            Self::Tuple(items) | Self::List(items) => Some(items),
            _ => None,
        }
    }

    fn nested(&self) -> String {
        match self {
            Self::Text(text) => format!("'{text}'"),
            other => other.to_string(),
        }
    }
}

impl fmt::Display for Literal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let join = |items: &[Self]| {
            let items: Vec<String> = items.iter().map(Self::nested).collect();
            items.join(", ")
        };
        match self {
            Self::None => out.write_str("None"),
            Self::Bool(flag) => out.write_str(if *flag { "True" } else { "False" }),
            Self::Int(number) => write!(out, "{number}"),
            Self::Float(number) => out.write_str(&python_float(*number)),
            Self::Text(text) => out.write_str(text),
            Self::Tuple(items) if items.len() == 1 => write!(out, "({},)", join(items)),
            Self::Tuple(items) => write!(out, "({})", join(items)),
            Self::List(items) => write!(out, "[{}]", join(items)),
        }
    }
}

struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn take(&mut self, character: char) -> bool {
        let found = self.rest.strip_prefix(character);
        if let Some(rest) = found {
            self.rest = rest.trim_start();
        }
        found.is_some()
    }

    /// Values up to `end` (or the end of the text): one value is itself unless a comma follows.
    fn items(&mut self, end: Option<char>) -> Option<Literal> {
        let mut items = Vec::new();
        let mut comma = false;
        loop {
            if self.ends(end) {
                break;
            }
            items.push(self.value()?);
            if self.ends(end) {
                break;
            }
            if !self.take(',') {
                return None;
            }
            comma = true;
        }
        match (end, comma, items.len()) {
            (Some(']'), ..) => Some(Literal::List(items)),
            (_, false, 1) => items.pop(),
            (None, _, 0) => None,
            _ => Some(Literal::Tuple(items)),
        }
    }

    fn ends(&mut self, end: Option<char>) -> bool {
        match end {
            Some(end) => self.take(end),
            None => self.rest.is_empty(),
        }
    }

    fn value(&mut self) -> Option<Literal> {
        if self.take('(') {
            return self.items(Some(')'));
        }
        if self.take('[') {
            return self.items(Some(']'));
        }
        for quote in ['"', '\''] {
            if let Some(rest) = self.rest.strip_prefix(quote) {
                let (text, rest) = rest.split_once(quote)?;
                self.rest = rest.trim_start();
                return Some(Literal::Text(text.to_owned()));
            }
        }
        let end = self.rest.find([',', ')', ']']).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        read_word(word.trim())
    }
}

fn read_word(word: &str) -> Option<Literal> {
    match word.to_ascii_lowercase().as_str() {
        "true" => return Some(Literal::Bool(true)),
        "false" => return Some(Literal::Bool(false)),
        "none" => return Some(Literal::None),
        "nan" | "+nan" | "-nan" => return None,
        _ => {}
    }
    let digits = word.replace('_', "");
    match (digits.parse::<i64>(), digits.parse::<f64>()) {
        (Ok(number), _) => Some(Literal::Int(number)),
        (_, Ok(number)) => Some(Literal::Float(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_read_and_shown_as_python_does() {
        let cases = [
            ("0.01", "0.01"),
            ("1e-1", "0.1"),
            ("1e-06", "1e-06"),
            ("10", "10"),
            ("-.5", "-0.5"),
            ("True", "True"),
            ("false", "False"),
            ("None", "None"),
            ("0.9,0.999", "(0.9, 0.999)"),
            ("(0.9, 0.99)", "(0.9, 0.99)"),
            ("[0.9,0.99,]", "[0.9, 0.99]"),
            ("(1,)", "(1,)"),
            ("(5)", "5"),
            ("'adamw'", "adamw"),
            ("('a', 1)", "('a', 1)"),
            ("inf", "inf"),
        ];
        for (text, shown) in cases {
            assert_eq!(Literal::parse(text).map(|v| v.to_string()).as_deref(), Some(shown));
        }
    }

    #[test]
    fn what_is_no_literal_is_refused() {
        for text in ["", "abc", "1 2", "(1, 2", "1)", "'open", "nan", "1,,2", "[1", "__import__"] {
            assert_eq!(Literal::parse(text), None, "{text}");
        }
    }
}
