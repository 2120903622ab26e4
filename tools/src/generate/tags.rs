//! What stands in a prompt and is no text: `<lora:NAME:0.7>`, and braces that are not read.

use super::networks::Networks;

/// A prompt without its tags, and what they said of each applied LoRA.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tagged {
    pub prompt: String,
    /// A multiplier for each applied LoRA, 0 for those without a tag; `None` without any tag.
    pub multipliers: Option<Vec<f32>>,
}

/// Takes the tags out, as WebUI does: a LoRA without a tag is not used where another has one.
///
/// # Errors
/// A sentence about a tag that names no file of this run, or whose multiplier is none; about a choice
/// in braces, which the reference makes by lot.
pub(super) fn take_out(prompt: &str, networks: &Networks) -> Result<Tagged, String> {
    refuse_choices(prompt)?;
    let applied = networks.applied();
    let mut rest = prompt;
    let mut text = String::with_capacity(prompt.len());
    let mut multipliers: Option<Vec<f32>> = None;
    while let Some(start) = rest.find("<lora:") {
        let Some(length) = rest[start..].find('>') else { break };
        let tag = &rest[start..=start + length];
        text.push_str(&rest[..start]);
        rest = &rest[start + length + 1..];
        let inside = &tag["<lora:".len()..tag.len() - 1];
        let (name, multiplier) = inside.split_once(':').unwrap_or((inside, "1"));
        let multiplier: f32 = multiplier.trim().parse().map_err(|_| bad_multiplier(tag))?;
        if !multiplier.is_finite() {
            return Err(bad_multiplier(tag));
        }
        let place = applied.iter().position(|network| network.name == name.trim());
        let place = place.ok_or_else(|| unknown_name(tag, networks))?;
        multipliers.get_or_insert_with(|| vec![0.; applied.len()])[place] += multiplier;
    }
    text.push_str(rest);
    let prompt = if multipliers.is_some() { text.trim().to_owned() } else { text };
    Ok(Tagged { prompt, multipliers })
}

fn bad_multiplier(tag: &str) -> String {
    format!("the tag of a LoRA should end in one number, it is: `{tag}`")
}

fn unknown_name(tag: &str, networks: &Networks) -> String {
    let names: Vec<&str> = networks.applied().iter().map(|network| network.name.as_str()).collect();
    let hint = match names.is_empty() {
        true => "name its file with `--network_weights`, and do not merge it".to_owned(),
        false => format!("the LoRAs of this run are `{}`", names.join("`, `")),
    };
    format!("the prompt names a LoRA that is not applied: `{tag}`\nhint: {hint}")
}

fn refuse_choices(prompt: &str) -> Result<(), String> {
    let mut rest = prompt;
    while let Some(start) = rest.find('{') {
        let inside = &rest[start + 1..];
        let end = inside.find('}').unwrap_or(inside.len());
        let is_choice = end < inside.len() && inside[..end].contains('|');
        if is_choice {
            let choice = &rest[start..start + end + 2];
            return Err(format!(
                "choices in braces are not there: `{choice}`\nhint: write a prompt for each in a \
                 file (`--from_file`)"
            ));
        }
        rest = inside;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::networks::Network;
    use super::*;

    fn networks(names: &[&str], merged: usize) -> Networks {
        let network = |name: &&str| Network {
            path: name.into(),
            name: (*name).to_owned(),
            hash: String::new(),
        };
        let multipliers = vec![1.; names.len()];
        Networks { all: names.iter().map(network).collect(), merged, multipliers }
    }

    #[test]
    fn tags_set_multipliers_and_leave_the_text() {
        let two = networks(&["ring", "disc"], 0);
        let read = |prompt: &str| take_out(prompt, &two);
        let plain = Tagged { prompt: "a <b> ring ".to_owned(), multipliers: None };
        assert_eq!(read("a <b> ring "), Ok(plain));
        let tagged = read("a ring <lora:disc:-0.5>, big <lora:ring>").expect("tags");
        assert_eq!(tagged.prompt, "a ring , big");
        assert_eq!(tagged.multipliers, Some(vec![1., -0.5]));
        assert_eq!(read("x <lora:ring:0.25>").expect("a tag").multipliers, Some(vec![0.25, 0.]));
        assert_eq!(read("no end <lora:ring").expect("text").multipliers, None);
    }

    #[test]
    fn tags_that_mean_nothing_are_named() {
        let two = networks(&["ring", "disc"], 1);
        let said = |prompt: &str| take_out(prompt, &two).expect_err("a bad tag");
        assert!(said("a <lora:rnig:1>").ends_with("the LoRAs of this run are `disc`"));
        assert!(said("a <lora:ring:1>").contains("not applied: `<lora:ring:1>`"), "it is merged");
        assert!(said("a <lora:disc:x>").contains("one number, it is: `<lora:disc:x>`"));
        assert!(said("a <lora:disc:1:2>").contains("one number"));
        assert!(said("a <lora:disc:nan>").contains("one number"));
        assert!(said("a {red|blue} ring").contains("not there: `{red|blue}`"));
        assert!(take_out("a {red} ring | {", &two).is_ok());
    }
}
