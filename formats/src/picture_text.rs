//! The text that WebUI writes into pictures (`parameters` in PNG): how a picture was made.
//!
//! ```text
//! a shape on a table
//! Negative prompt: blurred
//! Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x768
//! ```
//!
//! Prompt and negative prompt may have several lines. Values with a comma, a colon or a line break
//! are quoted as in JSON. The form has no escape for prompts: a line of a prompt that begins with
//! `Negative prompt:`, or a last line that looks like settings, is read as such. Nothing that is
//! read is an error: what looks like no settings belongs to the prompt, as in WebUI.

use std::fmt;

/// WebUI takes the last line for settings if it has at least this many.
const FEWEST_SETTINGS: usize = 3;
const NEGATIVE: &str = "Negative prompt:";

/// How a picture was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PictureText {
    /// What was asked for.
    pub prompt: String,
    /// What was to be kept away; empty if nothing.
    pub negative_prompt: String,
    /// Names and values of the settings, in the order of the text.
    pub settings: Vec<(String, String)>,
}

impl PictureText {
    /// Adds a setting at the end. A name has letters, digits, spaces, `-`, `_` and `/`, two at least;
    /// under another one it would not be read again.
    pub fn set(&mut self, name: &str, value: impl fmt::Display) {
        self.settings.push((name.to_owned(), value.to_string()));
    }

    /// The value of a setting.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.settings.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Width and height.
    pub fn size(&self) -> Option<(usize, usize)> {
        let (width, height) = self.get("Size")?.split_once('x')?;
        Some((width.trim().parse().ok()?, height.trim().parse().ok()?))
    }

    /// Reads a text that WebUI, this program or another one wrote.
    pub fn parse(text: &str) -> Self {
        let mut lines: Vec<&str> = text.trim().lines().map(str::trim).collect();
        let settings = lines.last().map(|line| read_settings(line)).unwrap_or_default();
        let has_settings = settings.len() >= FEWEST_SETTINGS;
        if has_settings {
            lines.pop();
        }
        let negative = lines.iter().position(|line| line.starts_with(NEGATIVE));
        let (prompt, after) = lines.split_at(negative.unwrap_or(lines.len()));
        let negative_prompt = after.join("\n");
        let negative_prompt = negative_prompt.strip_prefix(NEGATIVE).unwrap_or_default();
        Self {
            prompt: prompt.join("\n").trim().to_owned(),
            negative_prompt: negative_prompt.trim().to_owned(),
            settings: if has_settings { settings } else { Vec::new() },
        }
    }
}

impl fmt::Display for PictureText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.prompt.trim())?;
        if !self.negative_prompt.trim().is_empty() {
            write!(f, "\n{NEGATIVE} {}", self.negative_prompt.trim())?;
        }
        for (i, (name, value)) in self.settings.iter().enumerate() {
            f.write_str(if i == 0 { "\n" } else { ", " })?;
            write!(f, "{name}: {}", quoted(value))?;
        }
        Ok(())
    }
}

/// A value as it stands in the text.
fn quoted(value: &str) -> String {
    let is_plain =
        value == value.trim() && !value.starts_with('"') && !value.contains([',', ':', '\n', '\r']);
    if is_plain { value.to_owned() } else { serde_json::Value::from(value).to_string() }
}

/// `name: value, name: value`; parts that are no such pair are left out.
fn read_settings(line: &str) -> Vec<(String, String)> {
    let mut settings = Vec::new();
    let mut rest = line.trim();
    while !rest.is_empty() {
        let end = rest.find([':', ',']).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let Some(value) = after.strip_prefix(':').filter(|_| is_name(name)) else {
            // Not a pair: go on behind the next comma.
            rest = rest.split_once(',').map_or("", |(_, rest)| rest).trim_start();
            continue;
        };
        let (value, after) = read_value(value.trim_start());
        settings.push((name.trim().to_owned(), value));
        rest = after.trim_start();
    }
    settings
}

fn is_name(name: &str) -> bool {
    let name = name.trim();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    name.chars().count() >= 2
        && name.starts_with(is_word)
        && name.chars().all(|c| is_word(c) || matches!(c, ' ' | '-' | '/'))
}

/// A value and what follows its comma.
fn read_value(text: &str) -> (String, &str) {
    if let Some((value, after)) = read_quoted(text) {
        return (value, after);
    }
    let (value, after) = text.split_once(',').unwrap_or((text, ""));
    (value.trim().to_owned(), after)
}

/// A quoted value, if there is one up to a comma or the end.
fn read_quoted(text: &str) -> Option<(String, &str)> {
    let inside = text.strip_prefix('"')?;
    let mut is_escaped = false;
    let close = inside.char_indices().find_map(|(at, c)| {
        let closes = c == '"' && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        closes.then_some(at)
    })?;
    let (whole, after) = text.split_at(close + 2);
    let after = after.trim_start();
    let after = if after.is_empty() { after } else { after.strip_prefix(',')? };
    let value: String = serde_json::from_str(whole).ok()?;
    Some((value, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &PictureText) -> Vec<(&str, &str)> {
        text.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    #[test]
    fn a_whole_text_is_read_and_written_back() {
        let written = "a red ring, (sks shape:1.2)\non a table <lora:ring:0.7>\n\
             Negative prompt: blurred,\ntwo rings\n\
             Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, \
             Size: 512x768, Model: tiny-sd, Lora hashes: \"ring: 0f3a, disc: 77b1\", Clip skip: 2";
        let text = PictureText::parse(written);
        assert_eq!(text.prompt, "a red ring, (sks shape:1.2)\non a table <lora:ring:0.7>");
        assert_eq!(text.negative_prompt, "blurred,\ntwo rings");
        assert_eq!(text.get("Sampler"), Some("DPM++ 2M"));
        assert_eq!(text.get("Lora hashes"), Some("ring: 0f3a, disc: 77b1"));
        assert_eq!(text.get("Clip skip"), Some("2"));
        assert_eq!(text.get("Hires upscale"), None);
        assert_eq!(text.size(), Some((512, 768)));
        assert_eq!(text.to_string(), written);
    }

    #[test]
    fn parts_may_be_missing() {
        let text = PictureText::parse("only a prompt: one, two");
        assert_eq!(text.prompt, "only a prompt: one, two");
        assert_eq!((text.negative_prompt.as_str(), text.settings.len()), ("", 0));
        let text = PictureText::parse("Negative prompt: grey\nSteps: 4, Seed: 1, Size: 64x64");
        assert_eq!((text.prompt.as_str(), text.negative_prompt.as_str()), ("", "grey"));
        assert_eq!(pairs(&text), [("Steps", "4"), ("Seed", "1"), ("Size", "64x64")]);
        let text = PictureText::parse("a ring\nSteps: 4, Seed: 1");
        assert_eq!(text.prompt, "a ring\nSteps: 4, Seed: 1", "two settings are none");
        assert_eq!(PictureText::parse(""), PictureText::default());
        assert_eq!(PictureText::default().to_string(), "");
    }

    #[test]
    fn what_another_program_wrote_is_read_as_far_as_it_goes() {
        let text = PictureText::parse(
            "a ring\r\nSteps: 9,Sampler:Euler a, : odd, x: 1, Hires/up-scale: 2, \
             Open: \"no end, Empty: , URL: http://a:80/b, Size: 64 x 96,",
        );
        assert_eq!(text.prompt, "a ring");
        assert_eq!(
            pairs(&text),
            [
                ("Steps", "9"),
                ("Sampler", "Euler a"),
                ("Hires/up-scale", "2"),
                ("Open", "\"no end"),
                ("Empty", ""),
                ("URL", "http://a:80/b"),
                ("Size", "64 x 96"),
            ]
        );
        assert_eq!(text.size(), Some((64, 96)));
        assert_eq!(PictureText::parse("p\nAb: 1, Bc: 2, Size: 9xq").size(), None);
    }

    #[test]
    fn any_value_comes_back() {
        let values = [
            "plain",
            "a, b",
            "c: d",
            "two\nlines",
            "\"quoted\"",
            "back\\slash, \"x\"",
            " spaces ",
            "",
            "日本語、",
            "\\",
            "\"",
            "tab\there",
            "-1.5e-3",
            "\u{1f600}, ok",
        ];
        for first in values {
            for second in values {
                let mut text = PictureText { prompt: "a\nb".to_owned(), ..Default::default() };
                text.set("Steps", 20);
                text.set("First value", first);
                text.set("Second value", second);
                let written = text.to_string();
                assert_eq!(PictureText::parse(&written), text, "{written}");
            }
        }
    }

    #[test]
    fn no_input_is_an_error() {
        let alphabet = ["\"", "\\", ":", ",", "\n", "Negative prompt:", "ab", " ", "é", "Steps: 1"];
        let mut state = 7u64;
        for _ in 0..5000 {
            let mut text = String::new();
            for _ in 0..12 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                text.push_str(alphabet[(state >> 33) as usize % alphabet.len()]);
            }
            let once = PictureText::parse(&text);
            assert!(once.settings.is_empty() || once.settings.len() >= 3, "{text:?}");
            assert!(once.settings.iter().all(|(name, _)| is_name(name)), "{text:?}");
        }
    }
}
