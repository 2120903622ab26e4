//! Pictures of a model with three LoRAs, one of them at another strength, then merged.
//!
//! ```text
//! cargo run --release -p models --example pipeline -- MODEL LORA1 LORA2 LORA3 FOLDER
//! ```
//!
//! MODEL is a `.safetensors` or `.ckpt` file, a diffusers folder or a hub id; the LoRAs are files of any
//! kind and naming. The pictures go into FOLDER, which must exist.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use models::pipeline::{Picture, Pipeline, PipelineOptions, Request};
use models::sampler::{SamplerKind, SamplerOptions};
use pictures::{Pixels, encode_png};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, lora1, lora2, lora3, folder] = arguments.as_slice() else {
        return Err("give a model, three LoRA files and a folder".into());
    };
    let request = Request {
        prompt: "masterpiece, best quality, 1girl, in white shirt, looking at viewer".into(),
        negative_prompt: "bad quality, worst quality, bad anatomy, bad hands".into(),
        seed: 1,
        sampler: SamplerKind::EulerAncestral,
        options: SamplerOptions::new(20),
        guidance_scale: 7.5,
        ..Request::default()
    };
    let loras = [lora1, lora2, lora3].map(PathBuf::from);
    make_pictures(model, &loras, &request, folder.as_ref())?;
    Ok(())
}

/// Writes three pictures; gives them too.
fn make_pictures(
    model: &str,
    loras: &[PathBuf; 3],
    request: &Request,
    folder: &Path,
) -> Result<[Picture; 3], Box<dyn Error>> {
    eprintln!("loading {model}");
    let mut pipeline = Pipeline::load(model, &PipelineOptions::default())?;
    let first = pipeline.add_lora(&loras[0], 0.5)?;
    pipeline.add_lora(&loras[1], 0.7)?;
    pipeline.add_lora(&loras[2], 0.5)?;
    for module in &pipeline.lora_report(first)?.unused {
        eprintln!("the model has no place for {module}");
    }
    let together = make(&pipeline, request)?;
    save(&together, &folder.join("together.png"))?;

    // As long as a LoRA is not merged, its strength can be changed.
    pipeline.set_multiplier(first, 0.8)?;
    let stronger = make(&pipeline, request)?;
    save(&stronger, &folder.join("stronger.png"))?;

    // From here on they are part of the weights.
    pipeline.merge_loras();
    let merged = make(&pipeline, request)?;
    save(&merged, &folder.join("merged.png"))?;
    Ok([together, stronger, merged])
}

fn make(pipeline: &Pipeline, request: &Request) -> Result<Picture, Box<dyn Error>> {
    let picture = pipeline.generate(request, &mut |progress| {
        eprint!("\r{} of {}", progress.done, progress.of);
        ControlFlow::Continue(())
    })?;
    eprintln!();
    Ok(picture)
}

fn save(picture: &Picture, path: &Path) -> Result<(), Box<dyn Error>> {
    let (width, height) = (picture.width, picture.height);
    let pixels = Pixels { width, height, channels: 3, data: picture.to_rgb8() };
    std::fs::write(path, encode_png(&pixels, &[])?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The way of the program on a small model.
    #[test]
    fn the_program_runs() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/parity");
        let model = data.join("model").display().to_string();
        let loras = ["lierla/after5", "c3lier/after5", "lierla/init"]
            .map(|name| data.join(format!("{name}.safetensors")));
        let request = Request {
            prompt: "a red circle".into(),
            width: 64,
            height: 64,
            options: SamplerOptions::new(3),
            ..Request::default()
        };
        let folder = tempfile::tempdir().expect("a folder");
        let [together, stronger, merged] =
            make_pictures(&model, &loras, &request, folder.path()).expect("pictures");
        assert_ne!(together, stronger);
        assert_eq!(stronger, merged);
        for name in ["together", "stronger", "merged"] {
            let file = std::fs::read(folder.path().join(format!("{name}.png"))).expect("a file");
            assert!(file.starts_with(b"\x89PNG"), "{name}");
        }
    }
}
