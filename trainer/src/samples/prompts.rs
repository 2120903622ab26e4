//! What the sample pictures show and when they are made, resolved from the options and the file of
//! prompts before anything heavy happens.

use std::path::{Path, PathBuf};

use formats::prompt_lines::{PromptLine, PromptLineError, ToldSizes, read_prompt_file};
use models::prompt::{CHUNK, ClipTokenizer, parse_weights};
use models::sampler::{Prediction, Sampler, SamplerError, SamplerKind, SamplerOptions};

use crate::options::Options;

/// What the reference takes where a prompt says nothing.
const SIDE: usize = 512;
const STEPS: usize = 30;
const SCALE: f32 = 7.5;

/// Chunks of 75 tokens that a prompt may have, as in the reference's pipeline.
pub const MOST_CHUNKS: usize = 3;

/// One picture of each round of samples.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplePrompt {
    /// Its place among the prompts, from 0; it is part of the picture's name.
    pub number: usize,
    /// Its line in the file; 0 if unknown.
    pub line: usize,
    /// What the picture shows.
    pub prompt: String,
    /// What it does not show.
    pub negative: String,
    /// Columns and rows.
    pub size: [usize; 2],
    /// The sampler.
    pub sampler: SamplerKind,
    /// Its steps and options.
    pub options: SamplerOptions,
    /// Weight of the prompt over the negative prompt; 1 is no guidance.
    pub scale: f32,
    /// `None`: another one each time.
    pub seed: Option<u64>,
}

/// How often samples are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Every {
    Never,
    Steps(usize),
    Epochs(usize),
}

/// What occasions a round of samples; the pictures are named by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// Steps are done, as many as this.
    Step(usize),
    /// An epoch is over, counted from 1; 0 is before the first step.
    Epoch(usize),
}

impl Occasion {
    /// The part of a picture's name.
    pub fn name(self) -> String {
        match self {
            Self::Step(step) => format!("{step:06}"),
            Self::Epoch(epoch) => format!("e{epoch:06}"),
        }
    }
}

/// The samples that a run is to make.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplePlan {
    /// The prompts, in the order of the file.
    pub prompts: Vec<SamplePrompt>,
    /// What was read and has no effect.
    pub notes: Vec<String>,
    file: PathBuf,
    at_first: bool,
    every: Every,
}

impl SamplePlan {
    /// Reads the prompts; `None` where no samples are asked for.
    ///
    /// # Errors
    /// The file or one of its prompts cannot be meant; names file and line.
    pub fn read(options: &Options) -> Result<Option<Self>, PromptLineError> {
        // As in the reference, epochs go before steps.
        let every = match (options.sample_every_n_epochs, options.sample_every_n_steps) {
            (Some(epochs), _) => Every::Epochs(epochs.max(1)),
            (None, Some(steps)) => Every::Steps(steps.max(1)),
            (None, None) => Every::Never,
        };
        let Some(file) = &options.sample_prompts else { return Ok(None) };
        if every == Every::Never && !options.sample_at_first {
            return Ok(None);
        }
        let mut plan = Self {
            prompts: Vec::new(),
            notes: Vec::new(),
            file: file.clone(),
            at_first: options.sample_at_first,
            every,
        };
        for (number, line) in read_prompt_file(file)?.into_iter().enumerate() {
            let place = format!("{}:{}", file.display(), line.line);
            let notes = line.notes.iter().cloned().chain(idle(&line));
            plan.notes.extend(notes.map(|note| format!("{place}: {note}")));
            let prompt = resolve(number, line, options).map_err(|error| error.in_file(file))?;
            let misses_noise = options.zero_terminal_snr && !prompt.options.zero_terminal_snr;
            if misses_noise && options.v_parameterization {
                plan.notes.push(format!(
                    "{place}: `{}` cannot start at zero terminal SNR, the sample starts a little \
                     below",
                    prompt.sampler
                ));
            }
            plan.prompts.push(prompt);
        }
        Ok(Some(plan))
    }

    /// Refuses prompts that are longer than what is read of one.
    ///
    /// # Errors
    /// Names file and line, tokens found and tokens that fit.
    pub fn check_lengths(&self, tokenizer: &ClipTokenizer) -> Result<(), PromptLineError> {
        let most = (CHUNK - 2) * MOST_CHUNKS;
        for prompt in &self.prompts {
            for text in [&prompt.prompt, &prompt.negative] {
                let parts = parse_weights(text);
                let tokens: usize = parts
                    .iter()
                    .map(|(part, _)| tokenizer.encode(part).map_or(0, |ids| ids.len()))
                    .sum();
                if tokens > most {
                    let reason = format!("the prompt has {tokens} tokens, {most} fit");
                    let error =
                        PromptLineError::new(prompt.line, &reason, text, "shorten it".to_owned());
                    return Err(error.in_file(&self.file));
                }
            }
        }
        Ok(())
    }

    /// Whether pictures are made before the first step.
    pub fn is_due_at_first(&self) -> bool {
        self.at_first
    }

    /// The occasion of samples after `step` steps, in `epoch` (from 1).
    pub fn due(&self, step: usize, epoch: usize, epoch_ends: bool) -> Option<Occasion> {
        match self.every {
            Every::Epochs(n) => {
                (epoch_ends && epoch.is_multiple_of(n)).then_some(Occasion::Epoch(epoch))
            }
            Every::Steps(n) => step.is_multiple_of(n).then_some(Occasion::Step(step)),
            Every::Never => None,
        }
    }

    /// A line for people.
    pub fn describe(&self, folder: &Path) -> String {
        let every = match self.every {
            Every::Never => None,
            Every::Steps(1) => Some("after each step".to_owned()),
            Every::Steps(n) => Some(format!("every {n} steps")),
            Every::Epochs(1) => Some("after each epoch".to_owned()),
            Every::Epochs(n) => Some(format!("every {n} epochs")),
        };
        let first = self.at_first.then(|| "before the first step".to_owned());
        let when: Vec<String> = first.into_iter().chain(every).collect();
        let count = self.prompts.len();
        let pictures = if count == 1 { "picture" } else { "pictures" };
        format!("{count} {pictures} {}, in {}", when.join(" and "), folder.display())
    }
}

/// What of a line has no effect here.
fn idle(line: &PromptLine) -> Vec<String> {
    let mut notes = Vec::new();
    for (name, given, why) in [
        ("--t", line.strength.is_some(), "samples start from noise"),
        ("--am", !line.multipliers.is_empty(), "samples show the LoRA in training as it is"),
        ("--f", line.file_name.is_some(), "samples have names of their own"),
        ("--d", line.seeds.len() > 1, "each prompt is one picture, its first seed counts"),
        ("--p2", line.prompt_2.is_some(), "all text encoders read the same prompt in samples"),
        ("--n2", line.negative_2.is_some(), "all text encoders read the same prompt in samples"),
        ("--ow", line.told != ToldSizes::default(), "SDXL is told a sample's own size"),
    ] {
        if given {
            notes.push(format!("`{name}` has no effect: {why}"));
        }
    }
    notes
}

fn resolve(
    number: usize,
    line: PromptLine,
    options: &Options,
) -> Result<SamplePrompt, PromptLineError> {
    let fault = |error: SamplerError| {
        let text = error.to_string();
        let (reason, hint) = text.split_once("\nhint: ").unwrap_or((&text, ""));
        let (reason, hint) = (reason.to_owned(), hint.to_owned());
        PromptLineError { file: None, line: line.line, reason, hint }
    };
    let name = line.sampler.as_deref().unwrap_or(options.sample_sampler.as_str());
    let sampler: SamplerKind = name.parse().map_err(fault)?;
    let mut how = SamplerOptions::new(line.steps.unwrap_or(STEPS));
    if options.v_parameterization {
        how.prediction = Prediction::Velocity;
        // The reference samples as if the schedule ended before pure noise. The model has learnt
        // the other one.
        how.zero_terminal_snr = options.zero_terminal_snr && sampler.offers_zero_terminal_snr();
    }
    Sampler::new(sampler, &how).map_err(fault)?;
    let scale = line.scale.unwrap_or(SCALE);
    Ok(SamplePrompt {
        number,
        line: line.line,
        prompt: line.prompt,
        negative: line.negative.unwrap_or_default(),
        size: [line.width.unwrap_or(SIDE), line.height.unwrap_or(SIDE)],
        sampler,
        options: how,
        // At 1 and below the reference does not look at the negative prompt.
        scale: scale.max(1.),
        seed: line.seeds.first().copied(),
    })
}
