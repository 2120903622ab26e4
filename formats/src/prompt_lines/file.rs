//! Files of prompts: text with a prompt per line, TOML with `[[prompt.subset]]`, a JSON list.

use std::fs;
use std::path::Path;

use serde_json::Value;
use toml::de::{DeTable, DeValue};

use super::{PromptLine, PromptLineError, options, parse_line};

/// A key of TOML or JSON, its line and its value as text.
struct Given {
    key: String,
    line: usize,
    value: Result<String, &'static str>,
}

/// Reads the prompts of a file: `.toml` and `.json` as sd-scripts' `--sample_prompts`, anything else
/// as text, where empty lines and those that begin with `#` are passed over.
///
/// # Errors
/// A file that cannot be read, is no UTF-8 or holds no prompt; as [`parse_line`], with the file.
pub fn read_prompt_file(path: &Path) -> Result<Vec<PromptLine>, PromptLineError> {
    let whole = |reason: &str, value: &str, hint: &str| {
        PromptLineError::new(0, reason, value, hint.to_owned()).in_file(path)
    };
    let bytes = fs::read(path)
        .map_err(|error| whole("the file of prompts cannot be read", &error.to_string(), ""))?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count() + 1;
        let hint = "save the file as UTF-8".to_owned();
        PromptLineError { file: None, line, reason: "the line is not UTF-8".to_owned(), hint }
            .in_file(path)
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let is = |ending: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(ending));
    let read = match (is("toml"), is("json")) {
        (true, _) => read_toml(text),
        (_, true) => read_json(text),
        _ => read_text(text),
    };
    let prompts = read.map_err(|error| error.in_file(path))?;
    if prompts.is_empty() {
        let shown = path.display().to_string();
        return Err(whole("the file holds no prompt", &shown, "write one prompt on each line"));
    }
    Ok(prompts)
}

fn read_text(text: &str) -> Result<Vec<PromptLine>, PromptLineError> {
    let lines = text.lines().enumerate();
    let prompts = lines.filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    prompts.map(|(index, line)| parse_line(line, index + 1)).collect()
}

/// The prompt of a table: its keys in order, a later one in place of an earlier.
fn of_table(line: usize, given: Vec<Given>) -> Result<PromptLine, PromptLineError> {
    let mut read = PromptLine { line, ..PromptLine::default() };
    for Given { key, line, value } in given {
        read.line = line;
        let value = value.map_err(|found| {
            let reason = format!("`{key}` should be a text, a number or a list of numbers");
            PromptLineError::new(line, &reason, found, String::new())
        })?;
        if key == "prompt" {
            value.trim().clone_into(&mut read.prompt);
        } else if key != "enum" {
            // `enum` is the reference's own count, which it writes into what it has read.
            let row = options::find_key(&key).ok_or_else(|| {
                let hint = options::key_hint(&key);
                PromptLineError::new(line, "unknown key of a prompt", &key, hint)
            })?;
            options::set(&mut read, row, &key, value.trim())?;
        }
    }
    read.line = line;
    Ok(read)
}

fn read_toml(text: &str) -> Result<Vec<PromptLine>, PromptLineError> {
    let line_at = |offset: usize| {
        text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
    };
    let table = DeTable::parse(text).map_err(|error| {
        let line = line_at(error.span().map_or(0, |span| span.start));
        PromptLineError::new(line, "not valid TOML", error.message().trim(), String::new())
    })?;
    let form = |line: usize, reason: &str| PromptLineError {
        file: None,
        line,
        reason: reason.to_owned(),
        hint: "the form is `[prompt]` with options for all, then `[[prompt.subset]]` with \
               `prompt = \"...\"` for each"
            .to_owned(),
    };
    let root = table.get_ref();
    if let Some((key, _)) = root.iter().find(|(key, _)| key.get_ref().as_ref() != "prompt") {
        let reason = format!("unknown table: `{}`", key.get_ref());
        return Err(form(line_at(key.span().start), &reason));
    }
    let prompt = root.get("prompt").and_then(|value| value.get_ref().as_table());
    let prompt = prompt.ok_or_else(|| form(1, "the table `[prompt]` is missing"))?;
    let given = |table: &DeTable<'_>| -> Vec<Given> {
        let entries = table.iter().filter(|(key, _)| key.get_ref().as_ref() != "subset");
        let given = entries.map(|(key, value)| Given {
            key: key.get_ref().to_string(),
            line: line_at(key.span().start),
            value: toml_text(value.get_ref()),
        });
        given.collect()
    };
    let subsets = prompt.get("subset").and_then(|value| value.get_ref().as_array());
    let subsets = subsets.ok_or_else(|| form(1, "the list `[[prompt.subset]]` is missing"))?;
    let prompts = subsets.iter().map(|subset| {
        let line = line_at(subset.span().start);
        let table = subset.get_ref().as_table();
        let table = table.ok_or_else(|| form(line, "an entry of `subset` is no table"))?;
        let all = given(prompt).into_iter().chain(given(table)).collect();
        of_table(line, all)
    });
    prompts.collect()
}

fn toml_text(value: &DeValue<'_>) -> Result<String, &'static str> {
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) => Ok(number.to_string()),
        DeValue::Float(number) => Ok(number.to_string()),
        DeValue::Array(values) => {
            let texts: Result<Vec<String>, _> =
                values.iter().map(|value| toml_text(value.get_ref())).collect();
            Ok(texts?.join(","))
        }
        DeValue::Boolean(_) => Err("a truth value"),
        DeValue::Datetime(_) => Err("a date"),
        DeValue::Table(_) => Err("a table"),
    }
}

fn read_json(text: &str) -> Result<Vec<PromptLine>, PromptLineError> {
    let form = |line: usize, reason: &str, found: &str| {
        let hint = "the form is `[{\"prompt\": \"...\", \"width\": 512}, \"... --w 512\"]`";
        PromptLineError::new(line, reason, found, hint.to_owned())
    };
    let value: Value = serde_json::from_str(text).map_err(|error| {
        PromptLineError::new(error.line(), "not valid JSON", &error.to_string(), String::new())
    })?;
    let Value::Array(entries) = value else {
        return Err(form(1, "the file should hold a list of prompts", json_kind(&value)));
    };
    let lines = entry_lines(text);
    let prompts = entries.into_iter().enumerate().map(|(index, entry)| {
        let line = lines.get(index).copied().unwrap_or(0);
        match entry {
            Value::String(text) => parse_line(&text, line),
            Value::Object(table) => {
                let stated = table.into_iter().filter(|(_, value)| !value.is_null());
                let given =
                    stated.map(|(key, value)| Given { key, line, value: json_text(&value) });
                of_table(line, given.collect())
            }
            other => Err(form(line, "a prompt should be a text or a table", json_kind(&other))),
        }
    });
    prompts.collect()
}

fn json_text(value: &Value) -> Result<String, &'static str> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Array(values) => {
            let texts: Result<Vec<String>, _> = values.iter().map(json_text).collect();
            Ok(texts?.join(","))
        }
        other => Err(json_kind(other)),
    }
}

fn json_kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a table",
    }
}

/// The line of each entry of the outermost list, in valid JSON.
fn entry_lines(text: &str) -> Vec<usize> {
    let (mut lines, mut line, mut depth) = (Vec::new(), 1, 0);
    let (mut in_text, mut is_escaped, mut awaits) = (false, false, true);
    for byte in text.bytes() {
        if byte == b'\n' {
            line += 1;
        }
        if in_text {
            in_text = is_escaped || byte != b'"';
            is_escaped = byte == b'\\' && !is_escaped;
            continue;
        }
        if depth == 1 && awaits && !byte.is_ascii_whitespace() && byte != b']' {
            lines.push(line);
            awaits = false;
        }
        match byte {
            b'"' => in_text = true,
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth -= 1,
            b',' if depth == 1 => awaits = true,
            _ => {}
        }
    }
    lines
}
