//! What becomes of a caption when its sample is used: prefix and suffix, dropout, alternatives,
//! shuffling. Follows sd-scripts step by step; all choices come from the sample's own stream.

use super::config::{SubsetOptions, SubsetSource};
use super::error::DatasetError;
use super::group::DatasetGroup;
use crate::rng::Rng;

/// When a sample is used, for the options that depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CaptionMoment {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Optimizer step, from 0.
    pub step: u64,
    /// Steps of the whole run.
    pub max_train_steps: u64,
}

/// Whether the captions of a subset are the same each time.
pub fn is_constant(options: &SubsetOptions) -> bool {
    changing_option(options).is_none()
}

/// The first option that makes the captions of a subset differ from use to use.
fn changing_option(options: &SubsetOptions) -> Option<&'static str> {
    let all = [
        ("shuffle_caption", options.shuffle_caption),
        ("caption_dropout_rate", options.caption_dropout_rate > 0.),
        ("caption_dropout_every_n_epochs", options.caption_dropout_every_n_epochs > 0),
        ("caption_tag_dropout_rate", options.caption_tag_dropout_rate > 0.),
        ("token_warmup_step", options.token_warmup_step > 0.),
        ("enable_wildcard", options.enable_wildcard),
    ];
    all.into_iter().find(|(_, changes)| *changes).map(|(name, _)| name)
}

/// Whether captions can be encoded once (`cache_text_encoder_outputs`).
///
/// # Errors
/// Names the first subset and option that are in the way.
pub fn check_cacheable(group: &DatasetGroup) -> Result<(), DatasetError> {
    for (number, dataset) in group.datasets.iter().enumerate() {
        for (subset, plan) in dataset.plan.subsets.iter().enumerate() {
            let Some(option) = changing_option(&plan.options) else { continue };
            let place = match &plan.source {
                SubsetSource::DreamBooth { image_dir, .. } => image_dir,
                SubsetSource::FineTuning { metadata_file, .. } => metadata_file,
            };
            return Err(DatasetError::Config {
                path: place.clone(),
                table: format!("dataset {}, subset {}", number + 1, subset + 1),
                problem: format!("`cache_text_encoder_outputs` does not go with `{option}`"),
                advice: format!(
                    "remove one of the two; `{option}` gives other captions from use to use"
                ),
            });
        }
    }
    Ok(())
}

fn changes_tags(options: &SubsetOptions) -> bool {
    options.shuffle_caption
        || options.token_warmup_step > 0.0
        || options.caption_tag_dropout_rate > 0.0
}

/// The caption that the text encoder is given for one use of a sample.
pub fn caption_at(
    caption: &str,
    options: &SubsetOptions,
    moment: CaptionMoment,
    rng: &mut Rng,
) -> String {
    let mut caption = caption.to_owned();
    if let Some(prefix) = options.caption_prefix.as_ref().filter(|prefix| !prefix.is_empty()) {
        caption = format!("{prefix} {caption}");
    }
    if let Some(suffix) = options.caption_suffix.as_ref().filter(|suffix| !suffix.is_empty()) {
        caption = format!("{caption} {suffix}");
    }
    let rate = options.caption_dropout_rate;
    let dropped = rate > 0.0 && rng.uniform_f64() < rate;
    // Epochs count from 1 here, so that `caption_dropout_every_n_epochs = 3` means the third.
    let every = options.caption_dropout_every_n_epochs;
    if dropped || every > 0 && (moment.epoch + 1).is_multiple_of(every) {
        return String::new();
    }
    caption = if options.enable_wildcard {
        choose_wildcards(&caption, rng)
    } else {
        caption.split('\n').next().unwrap_or_default().to_owned()
    };
    if changes_tags(options) {
        caption = change_tags(&caption, options, moment, rng);
    }
    if let Some(secondary) = options.secondary_separator.as_ref().filter(|s| !s.is_empty()) {
        caption = caption.replace(secondary.as_str(), &options.caption_separator);
    }
    caption
}

/// One line of several, then one alternative of each `{a|b|c}`; `{{` and `}}` stand for braces.
fn choose_wildcards(caption: &str, rng: &mut Rng) -> String {
    let lines: Vec<&str> = caption.split('\n').collect();
    let line =
        if lines.len() > 1 { rng.choose(&lines).copied().unwrap_or_default() } else { caption };
    // Two code points that no text holds stand in for the doubled braces meanwhile.
    const OPEN: &str = "\u{FDD0}";
    const CLOSE: &str = "\u{FDD1}";
    let line = line.replace("{{", OPEN).replace("}}", CLOSE);
    let mut out = String::with_capacity(line.len());
    let mut rest = line.as_str();
    while let Some(start) = rest.find('{') {
        let (before, inside) = (&rest[..start], &rest[start + 1..]);
        match inside.find('}') {
            Some(end) if end > 0 => {
                let choices: Vec<&str> = inside[..end].split('|').collect();
                out.push_str(before);
                out.push_str(rng.choose(&choices).copied().unwrap_or_default());
                rest = &inside[end + 1..];
            }
            _ => {
                out.push_str(&rest[..=start]);
                rest = inside;
            }
        }
    }
    out.push_str(rest);
    out.replace(OPEN, "{").replace(CLOSE, "}")
}

fn tags<'a>(text: &'a str, separator: &str) -> Vec<&'a str> {
    text.split(separator).map(str::trim).filter(|tag| !tag.is_empty()).collect()
}

/// Keeps, shuffles and drops tags. Tags are joined with `, ` whatever the separator, as in the
/// reference.
fn change_tags(
    caption: &str,
    options: &SubsetOptions,
    moment: CaptionMoment,
    rng: &mut Rng,
) -> String {
    let separator = options.caption_separator.as_str();
    let keep_separator = options.keep_tokens_separator.as_str();
    let (fixed, mut flexible, fixed_end) = match caption.split_once(keep_separator) {
        Some((first, rest)) if !keep_separator.is_empty() => {
            let (middle, last) = rest.split_once(keep_separator).unwrap_or((rest, ""));
            (tags(first, separator), tags(middle, separator), tags(last, separator))
        }
        _ => {
            let mut all: Vec<&str> = caption.trim().split(separator).map(str::trim).collect();
            let flexible = all.split_off(options.keep_tokens.min(all.len()));
            (all, flexible, Vec::new())
        }
    };
    flexible.truncate(warmed_up(flexible.len(), options, moment));
    if options.shuffle_caption {
        rng.shuffle(&mut flexible);
    }
    if options.caption_tag_dropout_rate > 0.0 {
        flexible.retain(|_| rng.uniform_f64() >= options.caption_tag_dropout_rate);
    }
    let all: Vec<&str> = fixed.into_iter().chain(flexible).chain(fixed_end).collect();
    all.join(", ")
}

/// How many tags the token warm-up lets through.
fn warmed_up(count: usize, options: &SubsetOptions, moment: CaptionMoment) -> usize {
    let mut end = options.token_warmup_step;
    if end < 1.0 {
        end = (end * moment.max_train_steps as f64).floor();
    }
    let step = moment.step as f64;
    if end <= 0.0 || step >= end {
        return count;
    }
    let least = options.token_warmup_min as f64;
    let allowed = (step * ((count as f64 - least) / end)).floor() + least;
    (allowed.max(0.0) as usize).min(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, stream};
    use std::collections::HashSet;

    const MOMENT: CaptionMoment = CaptionMoment { epoch: 0, step: 0, max_train_steps: 100 };

    fn at(index: u64, caption: &str, options: &SubsetOptions) -> String {
        caption_at(caption, options, MOMENT, &mut stream(1, Purpose::Caption, index, 0))
    }

    fn all(caption: &str, options: &SubsetOptions) -> HashSet<String> {
        (0..300).map(|index| at(index, caption, options)).collect()
    }

    #[test]
    fn plain_captions_are_left_alone_but_for_the_first_line() {
        let mut options = SubsetOptions::default();
        assert_eq!(at(0, "a,  b {x|y}\nsecond", &options), "a,  b {x|y}");
        options.caption_prefix = Some("best,".into());
        options.caption_suffix = Some(", end".into());
        assert_eq!(at(0, "a", &options), "best, a , end");
    }

    #[test]
    fn shuffling_keeps_the_first_tags() {
        let mut options =
            SubsetOptions { shuffle_caption: true, keep_tokens: 2, ..SubsetOptions::default() };
        let seen = all("a, b,c ,d,e", &options);
        assert_eq!(seen.len(), 6);
        assert!(seen.iter().all(|caption| caption.starts_with("a, b, ")), "{seen:?}");
        assert!(seen.contains("a, b, e, d, c"));
        options.keep_tokens = 9;
        assert_eq!(at(0, "a,b", &options), "a, b");
    }

    #[test]
    fn keep_tokens_separator_and_secondary_separator() {
        let mut options = SubsetOptions {
            shuffle_caption: true,
            keep_tokens: 1,
            keep_tokens_separator: "|||".into(),
            secondary_separator: Some(";;;".into()),
            ..SubsetOptions::default()
        };
        let seen = all("a, b ||| c;;;d, e ||| f, g", &options);
        let expected = ["a, b, c,d, e, f, g", "a, b, e, c,d, f, g"].map(str::to_owned);
        assert_eq!(seen, HashSet::from(expected));
        options.shuffle_caption = false;
        assert_eq!(at(0, "c;;;d ||| x", &options), "c,d ||| x");
    }

    #[test]
    fn wildcards_choose_alternatives_and_lines() {
        let options = SubsetOptions { enable_wildcard: true, ..SubsetOptions::default() };
        let seen = all("a {red|blue} {{dog}} {x}", &options);
        let expected = ["a red {dog} x", "a blue {dog} x"].map(str::to_owned);
        assert_eq!(seen, HashSet::from(expected));
        assert_eq!(all("one\ntwo {1|2}", &options).len(), 3);
        for odd in ["{", "}", "{}", "a { b", "}{", "{{", "{a|b", "{{}", "{a}}}", "{é|é}"] {
            let _ = at(0, odd, &options);
        }
        assert_eq!(at(0, "{} {a", &options), "{} {a");
    }

    #[test]
    fn dropout_of_captions_and_tags() {
        let mut options = SubsetOptions { caption_dropout_rate: 0.5, ..SubsetOptions::default() };
        let empty = (0..2000).filter(|index| at(*index, "a", &options).is_empty()).count();
        assert!((900..1100).contains(&empty), "{empty}");
        options.caption_dropout_rate = 0.0;
        options.caption_dropout_every_n_epochs = 3;
        let dropped: Vec<bool> = (0..6)
            .map(|epoch| {
                let moment = CaptionMoment { epoch, ..MOMENT };
                let mut rng = stream(1, Purpose::Caption, 0, 0);
                caption_at("a", &options, moment, &mut rng).is_empty()
            })
            .collect();
        assert_eq!(dropped, [false, false, true, false, false, true]);
        options.caption_dropout_every_n_epochs = 0;
        options.caption_tag_dropout_rate = 0.5;
        options.keep_tokens = 1;
        let seen = all("a,b,c", &options);
        assert_eq!(seen.len(), 4);
        assert!(seen.contains("a") && seen.contains("a, b, c"));
    }

    #[test]
    fn token_warm_up_lets_tags_in_step_by_step() {
        let options = SubsetOptions { token_warmup_step: 0.1, ..SubsetOptions::default() };
        let count = |step| {
            let moment = CaptionMoment { step, ..MOMENT };
            let mut rng = stream(1, Purpose::Caption, 0, 0);
            caption_at("a,b,c,d,e", &options, moment, &mut rng).split(',').count()
        };
        assert_eq!([0, 4, 5, 9, 10].map(count), [1, 2, 3, 4, 5]);
    }
}
