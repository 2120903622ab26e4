//! Draws the training pictures of `tests/gpu` and their captions.

use std::path::PathBuf;

use anyhow::Result;
use bench_model::pictures::{SCENES, draw_pictures};
use clap::Parser;

/// Draws twelve pictures (png) and captions (txt)
#[derive(Parser)]
struct Args {
    /// Folder to write into; made if it does not exist
    folder: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    draw_pictures(&args.folder)?;
    eprintln!("{} pictures: {}", SCENES.len(), args.folder.display());
    Ok(())
}
