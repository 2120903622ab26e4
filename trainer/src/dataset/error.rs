//! Everything that can be wrong with a dataset, said so that it can be mended.

use std::path::{Path, PathBuf};

/// An error of the dataset: its configuration, its files, its images or its cache.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// A file or folder could not be read or written.
    #[error("could not {action} `{}`: {cause}", path.display())]
    File {
        /// What was tried, for example `read`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        cause: std::io::Error,
    },
    /// The dataset configuration is not TOML or JSON.
    #[error("could not parse the dataset configuration `{}`: {message}", path.display())]
    Parse {
        /// The configuration file.
        path: PathBuf,
        /// The parser's message with line and column.
        message: String,
    },
    /// A key that no dataset option has.
    #[error("unknown key `{key}` in {table} of `{}`{}", path.display(), hint(suggestion))]
    UnknownKey {
        /// The configuration file.
        path: PathBuf,
        /// The table, for example `[[datasets.subsets]] 2 of [[datasets]] 1`.
        table: String,
        /// The key as written.
        key: String,
        /// What was probably meant, or which keys exist.
        suggestion: String,
    },
    /// A value of the wrong type or out of its range.
    #[error(
        "`{key}` in {table} of `{}` should be {expected}, but it is: {found}", path.display()
    )]
    WrongValue {
        /// The configuration file, or `command line`.
        path: PathBuf,
        /// The table.
        table: String,
        /// The key.
        key: String,
        /// The type or range that is expected, with article.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A rule between options, or a missing option.
    #[error("{problem} in {table} of `{}`{}", path.display(), hint(advice))]
    Config {
        /// The configuration file, or `command line`.
        path: PathBuf,
        /// The table.
        table: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        advice: String,
    },
    /// Nothing to train on.
    #[error("no images found: {}{}", place.display(), hint(advice))]
    NoImages {
        /// The folder or metadata file.
        place: PathBuf,
        /// What to do.
        advice: String,
    },
    /// An image has neither a caption nor class tokens.
    #[error("no caption for the image `{}`{}", image.display(), hint(advice))]
    NoCaption {
        /// The image.
        image: PathBuf,
        /// What to do.
        advice: String,
    },
    /// A caption or metadata file that cannot be used.
    #[error("unusable caption data in `{}`: {problem}{}", path.display(), hint(advice))]
    Caption {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What to do.
        advice: String,
    },
    /// An image that cannot be used.
    #[error("unusable image `{}`: {problem}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A mask of `masked_loss` that is missing or does not fit.
    #[error("unusable mask `{}`: {problem}{}", path.display(), hint(advice))]
    Mask {
        /// The mask, or the image that has none.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What to do.
        advice: String,
    },
    /// The tokenizer could not be built or failed.
    #[error(transparent)]
    Tokenizer(#[from] models::prompt::PromptError),
    /// Latents could not be made or cached.
    #[error("could not cache the latents of `{}`: {problem}", path.display())]
    Latents {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A cached file is missing, damaged, or for something else.
    #[error("the cache file `{}` cannot be used: {problem}", path.display())]
    CacheFile {
        /// The cache file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Another rank failed while the ranks shared some work.
    #[error("rank {rank} reported: {message}")]
    OtherRank {
        /// The rank.
        rank: usize,
        /// Its message.
        message: String,
    },
    /// The ranks could not talk.
    #[error("the ranks cannot share the work of caching latents: {0}")]
    Exchange(String),
    /// Cached text encoder outputs that are not for this run, or outputs that cannot be cached.
    #[error("{0}")]
    TextOutputs(String),
    /// Asked to stop while something was being cached.
    #[error(
        "stopped on request while caching {what}\nhint: with `{option}` the next run goes on where \
         this one ended"
    )]
    Stopped {
        /// What was cached.
        what: &'static str,
        /// The option that keeps what was done.
        option: &'static str,
    },
    /// A data loading thread ended in a way that is a fault of this program.
    #[error("a data loading thread failed on batch {batch} of epoch {epoch}: {message}")]
    Worker {
        /// Epoch, from 1.
        epoch: u64,
        /// Batch in the epoch, from 1.
        batch: usize,
        /// The message of the panic.
        message: String,
    },
}

fn hint(advice: &str) -> String {
    if advice.is_empty() { String::new() } else { format!("\nhint: {advice}") }
}

impl DatasetError {
    /// A failed file operation as an error.
    pub(crate) fn file(action: &'static str, path: &Path, cause: std::io::Error) -> Self {
        Self::File { action, path: path.to_owned(), cause }
    }

    /// An image that cannot be used.
    pub(crate) fn image(path: &Path, problem: impl Into<String>) -> Self {
        Self::Image { path: path.to_owned(), problem: problem.into() }
    }
}
