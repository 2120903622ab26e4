//! SD1 in full size on a recording card: what its LoRA takes, what is given up for which limit.

use std::collections::HashMap;
use std::time::Instant;

use engine::{Checkpointing, DType};
use formats::{FormatError, TensorView, Weights};
use models::lora::{
    Algorithm, LoraNetwork, Rank, UniformRanks, text_encoder_targets, unet_targets,
};
use models::{ClipConfig, ClipTextModel, TensorShape, Unet, UnetConfig, Vae, VaeConfig};

use super::*;
use crate::optimizer::{Choice, choose as optimizer};

/// Names and shapes without a byte.
pub(super) struct Shapes(HashMap<String, Vec<usize>>);

impl Shapes {
    pub(super) fn new(list: models::Result<Vec<TensorShape>>) -> Self {
        Self(list.unwrap().into_iter().collect())
    }
}

impl Weights for Shapes {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.0.keys().cloned().collect();
        names.sort();
        names
    }
    fn get(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        Err(FormatError::MissingTensor { path: "shapes".into(), name: name.to_owned() })
    }
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).cloned()
    }
}

/// Stable Diffusion 1 with a LoRA of rank 16 on text encoder and U-Net.
pub(super) struct Sd1 {
    unet: (UnetConfig, Shapes),
    text: (ClipConfig, Shapes),
    vae: (VaeConfig, Shapes),
    network: LoraNetwork,
    values: Vec<Vec<f32>>,
    adamw: Choice,
    eight_bit: Choice,
}

impl Sd1 {
    pub(super) fn new() -> Self {
        let (unet, text, vae) = (UnetConfig::sd1(), ClipConfig::sd1(), VaeConfig::sd1());
        let unet_shapes = Shapes::new(Unet::tensor_shapes(&unet));
        let text_shapes = Shapes::new(ClipTextModel::tensor_shapes(&text));
        let vae_shapes = Shapes::new(Vae::tensor_shapes(&vae));
        let mut targets = text_encoder_targets(&text_shapes);
        targets.extend(unet_targets(&unet_shapes));
        let ranks = UniformRanks { linear: Rank::new(16, 16.), conv: None };
        let network = LoraNetwork::new(targets, &ranks, Algorithm::LowRank).unwrap();
        let values = network.initial_values(&mut |_, count| vec![0.; count]);
        Self {
            unet: (unet, unet_shapes),
            text: (text, text_shapes),
            vae: (vae, vae_shapes),
            network,
            values,
            adamw: optimizer("AdamW", &[]).unwrap(),
            eight_bit: optimizer("AdamW8bit", &[]).unwrap(),
        }
    }

    fn subject(&self, dtype: DType) -> Subject<'_> {
        Subject {
            parts: Parts {
                unet: (&self.unet.0, &self.unet.1),
                text_encoder: (&self.text.0, &self.text.1),
                text_encoder_2: None,
                vae: (&self.vae.0, &self.vae.1),
            },
            network: &self.network,
            values: &self.values,
            dtype,
            vae_dtype: dtype,
            clip_skip: None,
            encoded: false,
            captions: [16, 1],
            weighted: false,
            masked: false,
        }
    }

    pub(super) fn plan(
        &self,
        batch: usize,
        limit: usize,
        checkpointing: bool,
    ) -> anyhow::Result<CardPlan> {
        self.plan_kept(batch, limit, (checkpointing, false))
    }

    fn plan_kept(
        &self,
        batch: usize,
        limit: usize,
        (checkpointing, fp8): (bool, bool),
    ) -> anyhow::Result<CardPlan> {
        let shapes = [StepShape { batch, height: 64, width: 64, chunks: 1 }];
        let wishes = Wishes {
            checkpointing,
            fp8,
            optimizer: &self.adamw,
            eight_bit: Some(&self.eight_bit),
            shapes: &shapes,
            images: ([1, 512, 512], true),
        };
        choose(self.subject(DType::BF16), &wishes, &imagined_card(limit), limit)
    }
}

/// Everything fits into it.
const HUGE: usize = 1 << 40;

#[test]
fn checkpointing_saves_most_of_a_step_and_steps_grow_with_the_batch() {
    let sd1 = Sd1::new();
    let arena = |plan: &CardPlan| {
        plan.rows.iter().find(|row| row.name == "arena of a step").unwrap().bytes as f64
    };
    let mut plain = Vec::new();
    for batch in [1, 4, 8] {
        let started = Instant::now();
        let kept = sd1.plan(batch, HUGE, false).unwrap();
        let lean = sd1.plan(batch, HUGE, true).unwrap();
        println!("batch {batch}, planned twice in {:?}", started.elapsed());
        println!("{}\n{}", kept.table(), lean.table());
        assert!(arena(&lean) * 4. < arena(&kept));
        plain.push(arena(&kept) / batch as f64);
    }
    // The same for each sample, but for temporaries and gaps.
    assert!(plain.iter().all(|each| (0.9..1.1).contains(&(each / plain[0]))), "{plain:?}");
}

#[test]
fn a_card_of_six_gigabytes_trains_sd1() {
    let sd1 = Sd1::new();
    for limit in [6_000_000_000, 8_000_000_000] {
        let plan = sd1.plan(1, limit, false).unwrap();
        println!("{}", plan.table());
        assert!(plan.peak() <= limit, "{}", plan.table());
        // Neither the weights nor the optimizer's state have to be made smaller for it.
        assert!(!plan.chosen.eight_bit && !plan.chosen.fp8, "{}", plan.table());
    }
}

#[test]
fn no_more_is_given_up_than_the_limit_asks_for() {
    let sd1 = Sd1::new();
    let plain = sd1.plan(1, HUGE, false).unwrap();
    assert_eq!(plain.chosen, Chosen::default());
    let frozen = |plan: &CardPlan| plan.rows.iter().find(|row| row.name == "U-Net").unwrap().bytes;
    // Just below what everything takes: some blocks, not all.
    let less = sd1.plan(1, plain.training() - (64 << 20), false).unwrap();
    let Checkpointing::Chosen(some) = &less.chosen.checkpointing else {
        panic!("{}", less.table());
    };
    assert!(!some.is_empty() && some.len() < 30, "{some:?}");
    assert!(less.training() <= plain.training() - (64 << 20));
    let all = sd1.plan(1, HUGE, true).unwrap();
    assert_eq!(all.chosen.checkpointing, Checkpointing::All);
    // Below all blocks: the optimizer's state first, then the weights. Allocators round up, so that the
    // limits themselves are a little above what is planned.
    let state =
        |plan: &CardPlan| plan.rows.iter().find(|row| row.name == "optimizer state").unwrap().bytes;
    let first_below = |start: usize, wanted: &dyn Fn(&Chosen) -> bool| {
        let limits = (0..8).map(|step| start - step * (40 << 20));
        let mut plans = limits.map(|limit| sd1.plan(1, limit, false).unwrap());
        plans.find(|plan| wanted(&plan.chosen)).unwrap()
    };
    let eight = first_below(all.training() + (128 << 20), &|chosen| chosen.eight_bit || chosen.fp8);
    assert!(eight.chosen.eight_bit && !eight.chosen.fp8, "{}", eight.table());
    assert!(state(&eight) * 3 < state(&all), "{} {}", state(&eight), state(&all));
    let packed = first_below(eight.limit - (40 << 20), &|chosen| chosen.fp8);
    assert!(!packed.chosen.eight_bit && packed.chosen.fp8, "{}", packed.table());
    assert!(frozen(&packed) * 100 < frozen(&all) * 52);
    let both = sd1.plan_kept(1, HUGE, (true, true)).unwrap();
    let both = first_below(both.training() + (128 << 20), &|chosen| chosen.eight_bit);
    assert!(both.chosen.eight_bit && both.chosen.fp8, "{}", both.table());
}

#[test]
fn what_cannot_fit_is_refused_with_numbers() {
    let sd1 = Sd1::new();
    let error = sd1.plan(8, 2_600_000_000, false).unwrap_err().to_string();
    assert!(error.contains("takes at least"), "{error}");
    assert!(error.contains("it may use: 2.4 GiB"), "{error}");
    assert!(error.contains("`gradient_accumulation_steps = "), "{error}");
    let error = sd1.plan(1, 1 << 30, false).unwrap_err().to_string();
    assert!(error.contains("a lower resolution"), "{error}");
    assert!(!error.contains("train_batch_size"), "{error}");
}
