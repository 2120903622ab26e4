//! Prompts with their options, `a shape --w 512 --s 20 --n blurred`, one on a line.
//!
//! Both dialects of sd-scripts are read alike: the lines of its generation script (`--d 1,2,3`, `--t`,
//! `--am 0.5,0.7`, `--f`) and the sample prompts of its trainers (`--ss`, `--g`; text, TOML and
//! JSON). Where the reference passes over what it does not know, an unknown option or a bad value is
//! an error here that names file, line and option. Options of networks that do not take part are
//! refused where they would change the picture, else they leave a note.

mod error;
mod file;
mod options;

pub use error::PromptLineError;
pub use file::read_prompt_file;

/// One prompt; what a line does not say is `None` or empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptLine {
    /// Where it stands in its file, from 1.
    pub line: usize,
    /// What the picture shows.
    pub prompt: String,
    /// `--n`: what it does not show.
    pub negative: Option<String>,
    /// `--p2`: what SDXL's second text encoder reads in place of the prompt.
    pub prompt_2: Option<String>,
    /// `--n2`: the same for what the picture does not show.
    pub negative_2: Option<String>,
    /// `--w`: columns, a multiple of 8, at least 64.
    pub width: Option<usize>,
    /// `--h`: rows, likewise.
    pub height: Option<usize>,
    /// `--s`: steps of the sampler, 1 to 1000.
    pub steps: Option<usize>,
    /// `--d`: a seed for each picture in turn.
    pub seeds: Vec<u64>,
    /// `--l`: weight of the prompt over the negative prompt.
    pub scale: Option<f32>,
    /// `--ss`: name of the sampler, as written.
    pub sampler: Option<String>,
    /// `--t`: share of a given picture that is made anew, 0 to 1.
    pub strength: Option<f64>,
    /// `--am`: multiplier of each LoRA in turn.
    pub multipliers: Vec<f32>,
    /// `--f`: name of the picture's file.
    pub file_name: Option<String>,
    /// What SDXL is told of the picture's size and crop.
    pub told: ToldSizes,
    /// What was read and has no effect, each with its reason.
    pub notes: Vec<String>,
}

/// What SDXL is told of a picture beside its own size, in pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ToldSizes {
    /// `--ow`, `--oh`: columns and rows of the picture before it was resized.
    pub original: [Option<usize>; 2],
    /// `--nw`, `--nh`: the same for the negative prompt.
    pub original_negative: [Option<usize>; 2],
    /// `--cl`, `--ct`: left and top of the crop.
    pub crop: [Option<usize>; 2],
}

/// Reads one line, `prompt --option value ...`. `line` is for messages; 0 if there is no file.
///
/// ```
/// let line = formats::prompt_lines::parse_line("a ring --w 256 --d 1,2 --am 0.5,-1", 1)?;
/// assert_eq!((line.prompt.as_str(), line.width, line.height), ("a ring", Some(256), None));
/// assert_eq!((line.seeds, line.multipliers), (vec![1, 2], vec![0.5, -1.0]));
/// # Ok::<(), formats::prompt_lines::PromptLineError>(())
/// ```
///
/// # Errors
/// An unknown option (with a suggestion), a value that does not fit, an option that is refused.
pub fn parse_line(text: &str, line: usize) -> Result<PromptLine, PromptLineError> {
    let text = text.trim();
    if text.starts_with("--") {
        let hint = "write the prompt first, `a shape --w 512`".to_owned();
        return Err(PromptLineError::new(line, "the line begins with an option", text, hint));
    }
    // An option begins at a space and two hyphens, as in the reference.
    let mut parts = text.split(" --");
    let prompt = parts.next().unwrap_or_default().trim().to_owned();
    let mut read = PromptLine { line, prompt, ..PromptLine::default() };
    let mut seen: Vec<&str> = Vec::new();
    for part in parts {
        let (name, value) = part.split_once(char::is_whitespace).unwrap_or((part, ""));
        let row = options::find(name)
            .ok_or_else(|| PromptLineError::unknown(line, name, options::hint(name)))?;
        if seen.contains(&row.name) {
            read.notes.push(format!("`--{}` is given twice, the last one counts", row.name));
        }
        seen.push(row.name);
        options::set(&mut read, row, &format!("--{}", row.name), value.trim())?;
    }
    Ok(read)
}

#[cfg(test)]
mod tests;
