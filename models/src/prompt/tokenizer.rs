//! CLIP's tokenizer: text to the ids that the text encoder takes, in chunks of 77.
//!
//! From the model's folder (`tokenizer.json`, or `vocab.json` with `merges.txt`) or from the
//! vocabulary embedded in this program; both give the ids of transformers' `CLIPTokenizer`. SD1 pads
//! with the end token, SD2 with `!`, which is then a token of its own (id 0) in captions too.

use super::PromptError;
use super::weights::parse_weights;
use formats::clip_vocabulary::{self, BEGIN, END};
use std::path::Path;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::{AddedToken, SplitDelimiterBehavior, Tokenizer};

/// Ids in one chunk, with the begin and end tokens.
pub const CHUNK: usize = 77;

const EMBEDDED: &str = "embedded CLIP vocabulary";
/// Words, single digits, runs of anything else, English contractions.
const PATTERN: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// `max_token_length`: how many tokens of a caption count, begin and end not included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TokenLength {
    /// 75 tokens, one chunk.
    #[default]
    One,
    /// 150 tokens, two chunks.
    Two,
    /// 225 tokens, three chunks.
    Three,
}

impl TokenLength {
    /// Of the number given as `max_token_length`; none and 75 are the same.
    pub fn from_option(value: Option<u32>) -> Option<Self> {
        Some(match value {
            None | Some(75) => Self::One,
            Some(150) => Self::Two,
            Some(225) => Self::Three,
            Some(_) => return None,
        })
    }

    /// Number of chunks of 77 ids.
    pub fn chunks(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two => 2,
            Self::Three => 3,
        }
    }
}

/// Ids and weights of a caption, one entry for each chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedIds {
    /// As [`ClipTokenizer::input_ids`].
    pub ids: Vec<[u32; CHUNK]>,
    /// The weight of each token's embedding; 1 for begin, end and padding.
    pub weights: Vec<[f32; CHUNK]>,
}

/// A CLIP tokenizer with its special tokens.
#[derive(Debug, Clone)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    place: String,
    begin: u32,
    end: u32,
    pad: u32,
}

impl ClipTokenizer {
    /// The tokenizer of a model: that of `folder` if given, else the embedded one. `v2` chooses the
    /// padding of SD2; a folder that says otherwise wins, as it belongs to the model.
    ///
    /// # Errors
    /// A folder whose files are missing or damaged, or which is not CLIP's.
    pub fn open(folder: Option<&Path>, v2: bool) -> Result<Self, PromptError> {
        match folder {
            Some(folder) => Self::from_folder(folder, v2),
            None => Self::embedded(v2),
        }
    }

    /// The vocabulary of CLIP ViT-L/14, which SD1, SD2 and SDXL share.
    ///
    /// # Errors
    /// None in a sound build; the tokenizer library's constructors can fail.
    pub fn embedded(v2: bool) -> Result<Self, PromptError> {
        let (vocabulary, merges) = embedded_vocabulary();
        let pad = if v2 { "!" } else { END };
        build(EMBEDDED, vocabulary, merges, pad)
    }

    fn from_folder(folder: &Path, v2: bool) -> Result<Self, PromptError> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).map_err(|error| PromptError {
                place: path.display().to_string(),
                problem: format!("cannot be read, {error}"),
            })
        };
        let problem = |name: &str, message: String| PromptError {
            place: folder.join(name).display().to_string(),
            problem: message,
        };
        let pad = match pad_token(folder) {
            Some(pad) => pad,
            None => (if v2 { "!" } else { END }).to_owned(),
        };
        if folder.join("vocab.json").is_file() && folder.join("merges.txt").is_file() {
            let vocabulary: std::collections::HashMap<String, u32> =
                serde_json::from_str(&read("vocab.json")?)
                    .map_err(|error| problem("vocab.json", error.to_string()))?;
            let merges = parse_merges(&read("merges.txt")?)
                .map_err(|message| problem("merges.txt", message))?;
            let place = folder.display().to_string();
            return build(&place, vocabulary.into_iter().collect(), merges, &pad);
        }
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(problem("", "it holds neither tokenizer.json nor vocab.json".into()));
        }
        let mut tokenizer = Tokenizer::from_file(&path)
            .map_err(|error| problem("tokenizer.json", error.to_string()))?;
        // Padding and truncation are done here, in the way that chunks need.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| problem("tokenizer.json", error.to_string()))?;
        finish(&path.display().to_string(), tokenizer, &pad)
    }

    /// Everything that it does, as text: two tokenizers with the same text give the same ids.
    ///
    /// # Errors
    /// None that a caption could cause; the library's failures come through.
    pub fn definition(&self) -> Result<String, PromptError> {
        let text = self.tokenizer.to_string(false).map_err(|error| PromptError {
            place: self.place.clone(),
            problem: error.to_string(),
        })?;
        Ok(format!("{} {} {} {text}", self.begin, self.end, self.pad))
    }

    /// Id of the begin token.
    pub fn begin_id(&self) -> u32 {
        self.begin
    }

    /// Id of the end token.
    pub fn end_id(&self) -> u32 {
        self.end
    }

    /// Id of the padding.
    pub fn pad_id(&self) -> u32 {
        self.pad
    }

    /// The ids of a text, without begin, end and padding, of any length.
    ///
    /// # Errors
    /// None that a text could cause; the library's failures come through.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|error| PromptError {
            place: self.place.clone(),
            problem: error.to_string(),
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a caption: `[begin, up to 75 tokens, end, padding...]` in each chunk.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn input_ids(
        &self,
        text: &str,
        length: TokenLength,
    ) -> Result<Vec<[u32; CHUNK]>, PromptError> {
        Ok(self.chunks(&self.encode(text)?, length))
    }

    /// The ids of a caption with `(weights:1.2)`, and the weights.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn weighted_input_ids(
        &self,
        text: &str,
        length: TokenLength,
    ) -> Result<WeightedIds, PromptError> {
        let (mut tokens, mut token_weights) = (Vec::new(), Vec::new());
        for (part, weight) in parse_weights(text) {
            let ids = self.encode(&part)?;
            token_weights.extend(std::iter::repeat_n(weight as f32, ids.len()));
            tokens.extend(ids);
        }
        let ids = self.chunks(&tokens, length);
        let mut weights = vec![[1.0; CHUNK]; length.chunks()];
        for (chunk, part) in weights.iter_mut().zip(token_weights.chunks(CHUNK - 2)) {
            chunk[1..=part.len()].copy_from_slice(part);
        }
        Ok(WeightedIds { ids, weights })
    }

    /// Tokens as chunks. The reference first makes one line `begin tokens end padding` and then cuts
    /// it, which is why an end token may open a chunk; SD2 mends some of that afterwards.
    fn chunks(&self, tokens: &[u32], length: TokenLength) -> Vec<[u32; CHUNK]> {
        let inner = CHUNK - 2;
        let total = inner * length.chunks();
        let mut line = vec![self.begin];
        line.extend_from_slice(&tokens[..tokens.len().min(total)]);
        line.push(self.end);
        line.resize(total + 2, self.pad);
        let last = line[total + 1];
        (0..length.chunks())
            .map(|chunk| {
                let mut ids = [last; CHUNK];
                ids[0] = self.begin;
                ids[1..=inner].copy_from_slice(&line[1 + chunk * inner..1 + (chunk + 1) * inner]);
                if self.pad != self.end && length != TokenLength::One {
                    if ids[inner] != self.end && ids[inner] != self.pad {
                        ids[inner + 1] = self.end;
                    }
                    if ids[1] == self.pad {
                        ids[1] = self.end;
                    }
                }
                ids
            })
            .collect()
    }
}

/// The pad token that a tokenizer folder names.
fn pad_token(folder: &Path) -> Option<String> {
    ["special_tokens_map.json", "tokenizer_config.json"].iter().find_map(|name| {
        let text = std::fs::read_to_string(folder.join(name)).ok()?;
        let json: serde_json::Value = serde_json::from_str(&text).ok()?;
        let token = json.get("pad_token")?;
        let content = token.as_str().or_else(|| token.get("content")?.as_str())?;
        Some(content.to_owned())
    })
}

fn parse_merges(text: &str) -> Result<Merges, String> {
    let lines = text.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
    lines
        .map(|line| {
            let (left, right) =
                line.split_once(' ').ok_or_else(|| format!("this is no merge: {line}"))?;
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect()
}

/// The vocabulary and merges embedded in this program.
fn embedded_vocabulary() -> (Vocab, Merges) {
    let merges = clip_vocabulary::merges();
    let merges = merges.map(|(left, right)| (left.to_owned(), right.to_owned())).collect();
    let tokens = clip_vocabulary::tokens().into_iter().enumerate();
    (tokens.map(|(id, name)| (name, id as u32)).collect(), merges)
}

fn build(
    place: &str,
    vocabulary: Vocab,
    merges: Merges,
    pad: &str,
) -> Result<ClipTokenizer, PromptError> {
    let problem = |error: tokenizers::Error| PromptError {
        place: place.to_owned(),
        problem: error.to_string(),
    };
    let model = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .unk_token(END.to_owned())
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".to_owned())
        .build()
        .map_err(problem)?;
    let mut tokenizer = Tokenizer::new(model);
    let spaces =
        Replace::new(tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " ")
            .map_err(problem)?;
    tokenizer
        .with_normalizer(Some(Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()])))
        .map_err(problem)?;
    let split =
        Split::new(SplitPattern::Regex(PATTERN.into()), SplitDelimiterBehavior::Removed, true)
            .map_err(problem)?;
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![
        split.into(),
        ByteLevel::new(false, true, true).into(),
    ])));
    let special = [BEGIN, END].map(|token| AddedToken::from(token, true));
    tokenizer.add_special_tokens(special).map_err(problem)?;
    finish(place, tokenizer, pad)
}

/// Looks the special tokens up and makes the pad token one.
fn finish(place: &str, mut tokenizer: Tokenizer, pad: &str) -> Result<ClipTokenizer, PromptError> {
    let failure = |problem: String| PromptError { place: place.to_owned(), problem };
    tokenizer
        .add_special_tokens([AddedToken::from(pad, true)])
        .map_err(|error| failure(error.to_string()))?;
    let id = |token: &str| {
        tokenizer.token_to_id(token).ok_or_else(|| failure(format!("it lacks the token: {token}")))
    };
    let (begin, end, pad) = (id(BEGIN)?, id(END)?, id(pad)?);
    Ok(ClipTokenizer { place: place.to_owned(), begin, end, pad, tokenizer })
}

#[cfg(test)]
mod tests;
