//! `debug_dataset`: the batches of the first epoch as text, in place of training.
//!
//! What is printed is what training would see: the same order, captions, crops and mirroring for the
//! same seed. Every image is read and prepared on the way, so that damaged ones are met.

use anyhow::Result;

use crate::console;
use crate::dataset::{Batch, Loader};

/// Prints the batches of the first `steps` optimizer steps as data, rank 0's share of them.
///
/// # Errors
/// An image that went bad or away.
pub fn print_batches(loader: &mut Loader, steps: usize) -> Result<()> {
    for step in 0..steps {
        for _ in 0..loader.batches_in_step(step) {
            let batch = loader.next_batch()?;
            console::data(&describe(&batch));
        }
    }
    Ok(())
}

/// A batch in one line and one line for each of its images.
fn describe(batch: &Batch) -> String {
    let mut text = format!(
        "step {}, batch {} of epoch {}: {} of {} images at {}x{}",
        batch.step + 1,
        batch.index + 1,
        batch.epoch + 1,
        batch.samples.len(),
        batch.global_count,
        batch.size.0,
        batch.size.1
    );
    for sample in &batch.samples {
        let (left, top) = sample.crop_left_top;
        text += &format!(
            "\n  {} ({}x{}, at {left},{top}{}, weight {}): {}",
            sample.image_path.display(),
            sample.original_size.0,
            sample.original_size.1,
            if sample.flipped { ", mirrored" } else { "" },
            sample.loss_weight,
            if sample.caption.is_empty() { "(no caption)" } else { &sample.caption }
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::SampleMeta;

    #[test]
    fn a_batch_as_text() {
        let sample = SampleMeta {
            global_index: 0,
            image_path: "a/1.png".into(),
            loss_weight: 0.5,
            caption: String::new(),
            flipped: true,
            original_size: (640, 480),
            crop_left_top: (-16, 0),
        };
        let batch = Batch {
            epoch: 0,
            index: 2,
            step: 1,
            size: (256, 192),
            part: 0,
            global_count: 4,
            full_share: 2,
            samples: vec![sample],
            images: None,
            moments: None,
            input_ids: Vec::new(),
            input_ids_2: None,
            token_weights: None,
            chunks: 1,
            alpha_masks: None,
        };
        let expected = "step 2, batch 3 of epoch 1: 1 of 4 images at 256x192\n  \
                        a/1.png (640x480, at -16,0, mirrored, weight 0.5): (no caption)";
        assert_eq!(describe(&batch), expected);
    }
}
