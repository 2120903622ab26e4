//! SDXL in full size on a recording card: a LoRA of rank 16 on the U-Net, at 1024x1024.

use std::time::Instant;

use engine::cuda::CardMemory;
use engine::{Checkpointing, DType};
use models::lora::{Algorithm, LoraNetwork, Rank, UniformRanks, unet_targets};
use models::{ClipConfig, ClipTextModel, Unet, UnetConfig, Vae, VaeConfig};

use super::tests::Shapes;
use super::*;
use crate::optimizer::{Choice, choose as optimizer};

/// Stable Diffusion XL with a LoRA of rank 16 on the U-Net.
struct Sdxl {
    unet: (UnetConfig, Shapes),
    text: (ClipConfig, Shapes),
    second: (ClipConfig, Shapes),
    vae: (VaeConfig, Shapes),
    network: LoraNetwork,
    values: Vec<Vec<f32>>,
    adamw: Choice,
    eight_bit: Choice,
}

impl Sdxl {
    fn new() -> Self {
        let unet = UnetConfig::sdxl();
        let unet_shapes = Shapes::new(Unet::tensor_shapes(&unet));
        let text = |config: ClipConfig| {
            let shapes = Shapes::new(ClipTextModel::tensor_shapes(&config));
            (config, shapes)
        };
        let vae = VaeConfig::sd1();
        let vae_shapes = Shapes::new(Vae::tensor_shapes(&vae));
        let ranks = UniformRanks { linear: Rank::new(16, 16.), conv: None };
        let targets = unet_targets(&unet_shapes);
        let network = LoraNetwork::new(targets, &ranks, Algorithm::LowRank).unwrap();
        let values = network.initial_values(&mut |_, count| vec![0.; count]);
        Self {
            unet: (unet, unet_shapes),
            text: text(ClipConfig::sd1()),
            second: text(ClipConfig::sdxl_second()),
            vae: (vae, vae_shapes),
            network,
            values,
            adamw: optimizer("AdamW", &[]).unwrap(),
            eight_bit: optimizer("AdamW8bit", &[]).unwrap(),
        }
    }

    fn subject(&self, vae_dtype: DType) -> Subject<'_> {
        Subject {
            parts: Parts {
                unet: (&self.unet.0, &self.unet.1),
                text_encoder: (&self.text.0, &self.text.1),
                text_encoder_2: Some((&self.second.0, &self.second.1)),
                vae: (&self.vae.0, &self.vae.1),
            },
            network: &self.network,
            values: &self.values,
            dtype: DType::BF16,
            vae_dtype,
            clip_skip: None,
            encoded: true,
            captions: [16, 1],
            weighted: false,
            masked: false,
        }
    }

    fn plan(&self, batch: usize, limit: usize) -> anyhow::Result<CardPlan> {
        let shapes = [StepShape { batch, height: 128, width: 128, chunks: 1 }];
        let wishes = Wishes {
            checkpointing: false,
            fp8: false,
            optimizer: &self.adamw,
            eight_bit: Some(&self.eight_bit),
            shapes: &shapes,
            images: ([1, 1024, 1024], true),
        };
        choose(self.subject(DType::F32), &wishes, &imagined_card(limit), limit)
    }

    /// The whole run, as planned, on a recording card that enforces the limit.
    fn rehearse(&self, batch: usize, limit: usize, plan: &CardPlan) -> CardMemory {
        let rehearsal = Rehearsal {
            subject: self.subject(DType::F32),
            facts: &imagined_card(limit),
            limit,
            stored: if plan.chosen.fp8 { DType::F8 } else { DType::BF16 },
            optimizer: if plan.chosen.eight_bit { &self.eight_bit } else { &self.adamw },
            images: Some([1, 1024, 1024]),
        };
        let shape = StepShape { batch, height: 128, width: 128, chunks: 1 };
        rehearsal.run(shape, &plan.chosen.checkpointing, 0).unwrap().expect("it fits")
    }
}

/// Batch, and size of the card in GB.
type Case = (usize, usize);

/// The plans of SDXL that `docs/memory.md` shows.
const CASES: [Case; 8] = [(1, 8), (4, 8), (1, 12), (4, 12), (1, 16), (4, 16), (1, 24), (4, 24)];

const GB: usize = 1_000_000_000;

fn row_bytes(plan: &CardPlan, name: &str) -> usize {
    plan.rows.iter().find(|row| row.name == name).unwrap().bytes
}

/// A line of the table in `docs/memory.md`.
fn line(model: &str, (batch, card): Case, plan: &CardPlan) -> String {
    let blocks = plan.notes[0].split("; ").next().unwrap();
    let blocks =
        blocks.split(" are").next().unwrap().replace("nothing has to be checkpointed", "none");
    let again = plan.notes[0].split("; ").nth(1).and_then(|text| text.split(" of").next());
    let (fp8, eight) = (plan.chosen.fp8, plan.chosen.eight_bit);
    let before = plan.caching.max(plan.captions).map_or(0, |bytes| bytes + OVERHEAD);
    let cells = [
        model.to_owned(),
        format!("{card} GB"),
        batch.to_string(),
        blocks,
        again.unwrap_or("0 %").to_owned(),
        if eight { "AdamW8bit" } else { "AdamW" }.to_owned(),
        if fp8 { "fp8" } else { "bf16" }.to_owned(),
        show_bytes(row_bytes(plan, "U-Net")),
        show_bytes(row_bytes(plan, ARENA)),
        show_bytes(before),
        show_bytes(plan.training()),
    ];
    format!("| {} |\n", cells.join(" | "))
}

/// Every plan is also run, on a recording card that enforces the limit.
#[test]
fn plans_of_all_cards_are_those_of_the_document_and_run_within_their_limits() {
    let (sdxl, sd1) = (Sdxl::new(), super::tests::Sd1::new());
    let mut table = String::new();
    for (batch, card) in CASES {
        let started = Instant::now();
        let plan = sdxl.plan(batch, card * GB).unwrap();
        let planned = started.elapsed();
        assert!(plan.peak() <= card * GB, "{}", plan.table());
        println!("{card} GB, batch {batch}: planned in {planned:?}\n{}", plan.table());
        if card == 8 {
            // A plan was rehearsed when it was made; what that took is shown here.
            let CardMemory { peak, reserved, .. } = sdxl.rehearse(batch, card * GB, &plan);
            let [peak, reserved, beside] = [peak, reserved, OVERHEAD].map(show_bytes);
            println!("run: peak {peak}, in the end reserved {reserved}, beside {beside}");
        }
        table += &line("SDXL 1024x1024", (batch, card), &plan);
    }
    for (batch, card) in [(1, 8), (4, 8), (8, 8), (8, 12), (8, 16), (16, 24)] {
        let plan = sd1.plan(batch, card * GB, false).unwrap();
        assert!(plan.peak() <= card * GB, "{}", plan.table());
        table += &line("SD 1.5 512x512", (batch, card), &plan);
    }
    println!("{table}");
    compare(&table);
}

/// Compares with the table in `docs/memory.md`, or writes it.
fn compare(table: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/memory.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let is_row = |line: &&str| line.starts_with("| SDXL ") || line.starts_with("| SD 1.5 ");
    let written: String = lines.iter().copied().filter(is_row).collect();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let first = lines.iter().position(|line| line.starts_with("|---")).unwrap() + 1;
        let rest = lines[first..].iter().copied().filter(|line| !is_row(line));
        let new: String = lines[..first].iter().copied().chain([table]).chain(rest).collect();
        std::fs::write(&path, new).unwrap();
    } else {
        assert!(
            written == table,
            "docs/memory.md does not show what is planned; write it with `UPDATE_DOCS=1 cargo test \
             -p trainer --lib card_plan`"
        );
    }
}

#[test]
fn larger_cards_give_up_less() {
    let sdxl = Sdxl::new();
    let six = sdxl.plan(1, 6 * GB).unwrap();
    println!("{}", six.table());
    assert!(six.chosen.fp8 && six.peak() <= 6 * GB, "{}", six.table());
    let huge = sdxl.plan(1, 16 * GB).unwrap();
    assert_eq!(huge.chosen, Chosen::default(), "{}", huge.table());
}

/// Weights in 8 bits are widened one layer at a time, in the arena: it grows by the largest at most.
#[test]
fn widened_weights_are_a_small_part_of_the_arena() {
    let sdxl = Sdxl::new();
    let shape = StepShape { batch: 1, height: 128, width: 128, chunks: 1 };
    let arena = |stored| {
        let subject = sdxl.subject(DType::F32);
        let facts = imagined_card(1 << 40);
        let mut recording = Recording::new(subject, &facts, stored, &sdxl.adamw).unwrap();
        let (trace, _) = recording.step(shape, &Checkpointing::All).unwrap();
        (trace.peak(), recording.resident.unet)
    };
    let ((plain, whole), (packed, half)) = (arena(DType::BF16), arena(DType::F8));
    // A convolution of 2560 to 1280 channels.
    let largest = 2560 * 1280 * 9 * 2;
    println!("arena {plain} and {packed}, U-Net {whole} and {half}");
    assert!((plain..=plain + largest).contains(&packed), "{plain} {packed}");
    // 2.567e9 weights; scales, biases, norms, the embeddings of time and sizes are the rest.
    let parameters = 2_567_463_684;
    assert!((parameters..parameters + (20 << 20)).contains(&half), "{half}");
}

/// A batch of images that the VAE cannot encode at once is cut; a sample that cannot be decoded at once
/// is made in tiles.
#[test]
fn the_vae_takes_what_there_is() {
    let sdxl = Sdxl::new();
    let shapes = [StepShape { batch: 1, height: 128, width: 128, chunks: 1 }];
    let wishes = Wishes {
        checkpointing: false,
        fp8: false,
        optimizer: &sdxl.adamw,
        eight_bit: Some(&sdxl.eight_bit),
        shapes: &shapes,
        images: ([8, 1024, 1024], true),
    };
    let limit = 8 * GB;
    let mut plan = choose(sdxl.subject(DType::F32), &wishes, &imagined_card(limit), limit).unwrap();
    let together = plan.chosen.vae_batch.unwrap();
    println!("{together} images together\n{}", plan.table());
    assert!(together < 8 && plan.caching.unwrap() + OVERHEAD <= limit, "{}", plan.table());
    let vae = (&sdxl.vae.0, &sdxl.vae.1 as &dyn formats::Weights);
    let vae = VaeRecording::new(vae, &imagined_card(limit), DType::F32).unwrap();
    let [whole, tiled] = [models::Tiling::Never, models::Tiling::Always]
        .map(|tiling| vae.decode([128, 128], tiling).unwrap());
    println!("decoded whole {}, in tiles {}", show_bytes(whole), show_bytes(tiled));
    assert!(tiled * 2 < whole, "{whole} {tiled}");
    let picture = PictureBytes {
        denoising: 0,
        decoding: whole,
        decoding_in_tiles: tiled,
        size: [1024, 1024],
    };
    plan.add_samples(picture).unwrap();
    println!("{}", plan.table());
    assert!(plan.chosen.tiled_samples && plan.peak() <= limit, "{}", plan.table());
}
