//! Values as Python prints them: the form in which other programs compare metadata.

use serde_json::Value;

/// A value as Python's `str` prints it.
pub(super) trait PythonText {
    /// The text.
    fn text(&self) -> String;
}

impl PythonText for bool {
    fn text(&self) -> String {
        (if *self { "True" } else { "False" }).to_owned()
    }
}

impl PythonText for usize {
    fn text(&self) -> String {
        self.to_string()
    }
}

impl PythonText for u64 {
    fn text(&self) -> String {
        self.to_string()
    }
}

impl PythonText for f64 {
    fn text(&self) -> String {
        python_float(*self)
    }
}

impl PythonText for String {
    fn text(&self) -> String {
        self.clone()
    }
}

impl PythonText for &str {
    fn text(&self) -> String {
        (*self).to_owned()
    }
}

impl PythonText for Vec<f64> {
    fn text(&self) -> String {
        let items: Vec<String> = self.iter().map(|item| python_float(*item)).collect();
        format!("[{}]", items.join(", "))
    }
}

impl<T: PythonText> PythonText for Option<T> {
    fn text(&self) -> String {
        self.as_ref().map_or_else(|| "None".to_owned(), T::text)
    }
}

/// A float as Python's `repr` prints it: `0.0001`, `5e-05`, `1.0`, `1e+16`.
pub fn python_float(number: f64) -> String {
    if !number.is_finite() {
        return number.to_string().replace("NaN", "nan");
    }
    // Rust's shortest digits are Python's; only the choice between the two notations differs.
    let scientific = format!("{number:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// A word as Python would print it after reading it as a literal: numbers in their normal form,
/// anything else unchanged.
pub fn python_literal(word: &str) -> String {
    match (word.parse::<i64>(), word.parse::<f64>()) {
        (Ok(number), _) => number.to_string(),
        (_, Ok(number)) => python_float(number),
        _ => word.to_owned(),
    }
}

/// JSON as Python's `json.dumps` writes it: a space after `,` and `:`, all but ASCII escaped.
pub fn python_json(value: &Value) -> String {
    let mut text = String::new();
    write_json(&mut text, value);
    text
}

fn write_json(text: &mut String, value: &Value) {
    match value {
        Value::Null => text.push_str("null"),
        Value::Bool(flag) => text.push_str(if *flag { "true" } else { "false" }),
        Value::Number(number) if number.is_f64() => {
            text.push_str(&python_float(number.as_f64().unwrap_or(f64::NAN)));
        }
        Value::Number(number) => text.push_str(&number.to_string()),
        Value::String(string) => write_json_string(text, string),
        Value::Array(items) => {
            text.push('[');
            for (index, item) in items.iter().enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                write_json(text, item);
            }
            text.push(']');
        }
        Value::Object(object) => {
            text.push('{');
            for (index, (key, item)) in object.iter().enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                write_json_string(text, key);
                text.push_str(": ");
                write_json(text, item);
            }
            text.push('}');
        }
    }
}

fn write_json_string(text: &mut String, string: &str) {
    text.push('"');
    for character in string.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            ' '..='~' => text.push(character),
            other => {
                let mut units = [0u16; 2];
                for unit in other.encode_utf16(&mut units) {
                    text.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    text.push('"');
}
