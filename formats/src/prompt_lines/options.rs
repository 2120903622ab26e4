//! The options of a prompt: one table, and how each is read.

use std::str::FromStr;

use super::{PromptLine, PromptLineError};

/// The smallest side of a picture.
const LEAST_SIDE: usize = 64;
const PIXELS: &str = "be a number of pixels";
/// More steps than there are timesteps mean nothing.
const MOST_STEPS: usize = 1000;

/// What an option does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Meaning {
    Width,
    Height,
    Steps,
    Seeds,
    Scale,
    Strength,
    Negative,
    /// Of SDXL's second text encoder.
    Prompt2,
    /// Likewise.
    Negative2,
    Sampler,
    Multipliers,
    FileName,
    /// Columns (0) or rows (1) that SDXL is told.
    Original(usize),
    OriginalNegative(usize),
    Crop(usize),
    /// No effect on the pictures of these models, with the reason.
    Ignored(&'static str),
    /// Would change the picture and is not there, with the reason.
    Refused(&'static str),
}

use Meaning::{
    Crop, FileName, Height, Ignored, Multipliers, Negative, Negative2, Original, OriginalNegative,
    Prompt2, Refused, Sampler, Scale, Seeds, Steps, Strength, Width,
};

/// An option of a prompt.
#[derive(Debug)]
pub(super) struct Row {
    /// As on a line, without hyphens.
    pub name: &'static str,
    /// As a key in TOML and JSON; empty if it is none there.
    pub key: &'static str,
    /// What people write instead; for suggestions alone.
    also: &'static [&'static str],
    meaning: Meaning,
}

const fn row(
    name: &'static str,
    key: &'static str,
    also: &'static [&'static str],
    meaning: Meaning,
) -> Row {
    Row { name, key, also, meaning }
}

const FLUX: Meaning = Ignored("it belongs to models with a flow, not to Stable Diffusion 1 and 2");
const SHRINK: Meaning = Refused("Deep Shrink is not there");
const GRADUAL: Meaning = Refused("Gradual Latent is not there");

const ROWS: [Row; 36] = [
    row("w", "width", &["wide"], Width),
    row("h", "height", &["high"], Height),
    row("s", "sample_steps", &["steps", "num_steps"], Steps),
    row("d", "seed", &["seeds"], Seeds),
    row("l", "scale", &["cfg", "cfg_scale"], Scale),
    row("t", "strength", &["denoise", "denoising"], Strength),
    row("n", "negative_prompt", &["neg", "np"], Negative),
    row("p2", "prompt_2", &["prompt2"], Prompt2),
    row("n2", "negative_prompt_2", &["negative_prompt2", "np2"], Negative2),
    row("ss", "sample_sampler", &["sampler"], Sampler),
    row("am", "network_mul", &["mul", "multiplier", "multipliers"], Multipliers),
    row("f", "file_name", &["filename", "file"], FileName),
    row("ow", "", &["original_width"], Original(0)),
    row("oh", "", &["original_height"], Original(1)),
    row("nw", "", &["original_width_negative"], OriginalNegative(0)),
    row("nh", "", &["original_height_negative"], OriginalNegative(1)),
    row("cl", "", &["crop_left"], Crop(0)),
    row("ct", "", &["crop_top"], Crop(1)),
    row("g", "guidance_scale", &["guidance"], FLUX),
    row("ctr", "cfg_trunc_ratio", &[], FLUX),
    row("rcfg", "renorm_cfg", &[], FLUX),
    row("fs", "flow_shift", &[], FLUX),
    row("cn", "controlnet_image", &["controlnet"], Ignored("no ControlNet takes part")),
    row("nl", "", &["negative_scale"], Refused("the negative prompt has no scale of its own")),
    row("c", "", &["clip_prompt"], Refused("pictures are not guided by CLIP")),
    row("dsd1", "", &[], SHRINK),
    row("dst1", "", &[], SHRINK),
    row("dsd2", "", &[], SHRINK),
    row("dst2", "", &[], SHRINK),
    row("dsr", "", &[], SHRINK),
    row("glt", "", &[], GRADUAL),
    row("glr", "", &[], GRADUAL),
    row("gle", "", &[], GRADUAL),
    row("gls", "", &[], GRADUAL),
    row("glsn", "", &[], GRADUAL),
    row("glus", "", &[], GRADUAL),
];

/// The option of a name on a line, in either case.
pub(super) fn find(name: &str) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.name.eq_ignore_ascii_case(name))
}

/// The option of a key in TOML and JSON.
pub(super) fn find_key(key: &str) -> Option<&'static Row> {
    ROWS.iter().find(|row| !row.key.is_empty() && row.key == key)
}

/// Advice on an option of a line that there is not.
pub(super) fn hint(name: &str) -> String {
    let wanted = name.to_lowercase().replace('-', "_");
    if let Some((name, value)) = wanted.split_once('=') {
        return format!("write a space, not `=`: `--{name} {value}`");
    }
    let is_meant = |row: &&Row| row.key == wanted || row.also.contains(&wanted.as_str());
    let by_start = |row: &&Row| {
        wanted.len() >= 3 && (row.key.starts_with(&wanted) || wanted.starts_with(row.key))
    };
    let with_key = || ROWS.iter().filter(|row| !row.key.is_empty());
    match ROWS.iter().find(is_meant).or_else(|| with_key().find(by_start)) {
        Some(row) => format!("did you mean `--{}`?", row.name),
        None => format!("the options are {}", listed(|row| format!("--{}", row.name))),
    }
}

/// Advice on a key that there is not.
pub(super) fn key_hint(key: &str) -> String {
    let wanted = key.to_lowercase().replace('-', "_");
    let is_meant = |row: &&Row| {
        !row.key.is_empty()
            && (row.name == wanted
                || row.also.contains(&wanted.as_str())
                || row.key.replace('_', "") == wanted.replace('_', ""))
    };
    match ROWS.iter().find(is_meant) {
        Some(row) => format!("did you mean `{}`?", row.key),
        None => format!("the keys are `prompt`, {}", listed(|row| row.key.to_owned())),
    }
}

/// The options that do something.
fn listed(name: fn(&Row) -> String) -> String {
    let does = |row: &&Row| !matches!(row.meaning, Ignored(_) | Refused(_));
    let names: Vec<String> =
        ROWS.iter().filter(does).map(|row| format!("`{}`", name(row))).collect();
    names.join(", ")
}

/// Reads a value; `written` is how the option was called.
pub(super) fn set(
    line: &mut PromptLine,
    row: &Row,
    written: &str,
    value: &str,
) -> Result<(), PromptLineError> {
    let reader = Reader { line: line.line, written, value };
    match row.meaning {
        Width => line.width = Some(reader.side()?),
        Height => line.height = Some(reader.side()?),
        Steps => line.steps = Some(reader.steps()?),
        Seeds => {
            line.seeds =
                reader.list("be a whole number of at most 64 bits, or several with commas")?
        }
        Scale => line.scale = Some(reader.finite("be a number")?),
        Strength => line.strength = Some(reader.strength()?),
        Negative => line.negative = Some(value.to_owned()),
        Prompt2 => line.prompt_2 = Some(value.to_owned()),
        Negative2 => line.negative_2 = Some(value.to_owned()),
        Sampler => line.sampler = Some(reader.text("be the name of a sampler")?),
        Multipliers => line.multipliers = reader.numbers()?,
        FileName => line.file_name = Some(reader.file_name()?),
        Original(side) => line.told.original[side] = Some(reader.one(PIXELS)?),
        OriginalNegative(side) => line.told.original_negative[side] = Some(reader.one(PIXELS)?),
        Crop(side) => line.told.crop[side] = Some(reader.one(PIXELS)?),
        Ignored(reason) => line.notes.push(format!("`{written}` has no effect: {reason}")),
        Refused(reason) => {
            let reason = format!("`{written}` cannot be done, {reason}");
            let hint = "leave the option out".to_owned();
            return Err(PromptLineError::new(line.line, &reason, value, hint));
        }
    }
    Ok(())
}

/// A value on its way to a number.
struct Reader<'a> {
    line: usize,
    written: &'a str,
    value: &'a str,
}

impl Reader<'_> {
    fn refuse(&self, should: &str, hint: &str) -> PromptLineError {
        let reason = match self.value.is_empty() {
            true => format!("`{}` has no value, it should {should}", self.written),
            false => format!("`{}` should {should}", self.written),
        };
        PromptLineError::new(self.line, &reason, self.value, hint.to_owned())
    }

    fn text(&self, should: &str) -> Result<String, PromptLineError> {
        if self.value.is_empty() {
            return Err(self.refuse(should, ""));
        }
        Ok(self.value.to_owned())
    }

    fn one<T: FromStr>(&self, should: &str) -> Result<T, PromptLineError> {
        self.value.parse().map_err(|_| self.refuse(should, ""))
    }

    fn list<T: FromStr>(&self, should: &str) -> Result<Vec<T>, PromptLineError> {
        let values = self.value.split(',').map(|one| one.trim().parse());
        values.collect::<Result<_, _>>().map_err(|_| self.refuse(should, ""))
    }

    fn finite(&self, should: &str) -> Result<f32, PromptLineError> {
        let number: f32 = self.one(should)?;
        if number.is_finite() { Ok(number) } else { Err(self.refuse(should, "")) }
    }

    fn numbers(&self) -> Result<Vec<f32>, PromptLineError> {
        let should = "be a number for each LoRA, with commas";
        let numbers: Vec<f32> = self.list(should)?;
        match numbers.iter().all(|number| number.is_finite()) {
            true => Ok(numbers),
            false => Err(self.refuse(should, "")),
        }
    }

    fn side(&self) -> Result<usize, PromptLineError> {
        let should = "be a number of pixels that 8 divides, 64 at least";
        let side: usize = self.one(should)?;
        if side < LEAST_SIDE {
            return Err(self.refuse(should, ""));
        }
        if !side.is_multiple_of(8) {
            let below = side - side % 8;
            return Err(self.refuse(should, &format!("take {below} or {}", below + 8)));
        }
        Ok(side)
    }

    fn steps(&self) -> Result<usize, PromptLineError> {
        let should = "be a number of steps, 1 to 1000";
        let steps: usize = self.one(should)?;
        match (1..=MOST_STEPS).contains(&steps) {
            true => Ok(steps),
            false => Err(self.refuse(should, "")),
        }
    }

    fn strength(&self) -> Result<f64, PromptLineError> {
        let should = "be a share of the picture, 0 to 1";
        let strength: f64 = self.one(should)?;
        match (0. ..=1.).contains(&strength) {
            true => Ok(strength),
            false => Err(self.refuse(should, "")),
        }
    }

    /// A name alone: a prompt writes into the folder of the pictures, nowhere else.
    fn file_name(&self) -> Result<String, PromptLineError> {
        let name = self.text("be the name of a file")?;
        if name.contains(['/', '\\', '\0']) || name.starts_with('.') {
            return Err(self.refuse(
                "be the name of a file without a folder",
                "the folder is that of `--outdir`",
            ));
        }
        Ok(name)
    }
}
