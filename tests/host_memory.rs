//! A step on the CPU takes the memory that was planned for it: a test alone in its process, as it
//! counts the buffers of all threads.

use std::path::Path;

use engine::{Checkpointing, DType, Device, ParamId};
use formats::{OpenOptions, open_base_model};
use models::SizeIds;
use models::lora::{Algorithm, LoraNetwork, Rank, UniformRanks, unet_targets};
use trainer::base::Base;
use trainer::card_plan::{Parts, Recording, StepShape, Subject, imagined_card};
use trainer::gradients::Gradients;
use trainer::inputs::{MicroBatch, Prompts, SecondPrompts, StepInputs};
use trainer::objective::Objective;
use trainer::options::Options;
use trainer::step::{Models, Setting, forward_backward};

const BATCH: usize = 2;
const SIDE: usize = 48;

fn base(dtype: DType) -> Base {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/parity-sdxl/model");
    let name = model.to_str().expect("a path");
    let files = open_base_model(name, &OpenOptions::default()).expect("the small model");
    Base::from_files(files, dtype).expect("the small model's sizes")
}

/// Most bytes that a step takes beside what was there before.
fn measured(base: &Base, network: &LoraNetwork, how: &Checkpointing) -> usize {
    let values = network.initial_values(&mut |_, count| vec![0.01; count]);
    let params = network.parameters(Device::Cpu, values).expect("parameters");
    let text_encoder = Some(base.load_text_encoder().expect("text encoders"));
    let mut models = Models { text_encoder, unet: base.load_unet().expect("a U-Net") };
    models.install(network).expect("the LoRA fits");
    let objective = Objective::from_options(&Options::default()).expect("defaults");
    let shape = [BATCH, SIDE, SIDE, 4];
    let draws: Vec<_> = (0..BATCH).map(|b| objective.draw(1, b as u64, [SIDE, SIDE, 4])).collect();
    let latents = vec![0.5; shape.iter().product()];
    let noised = objective.prepare(&latents, shape, &draws, &[0.5; BATCH]).expect("noise");
    let size = SizeIds { original: [384.; 2], crop: [0.; 2], target: [384.; 2] };
    let ids = vec![49407; 77 * BATCH];
    let second = Some(SecondPrompts {
        ids: ids.clone(),
        pooled: base.pooled_width().expect("SDXL"),
        sizes: vec![size; BATCH],
    });
    let prompts = Prompts { ids, weights: None, chunks: 1, second };
    let micro = MicroBatch { noised, prompts, encoded: None };
    let inputs = StepInputs::new(Device::Cpu, models.unet.config(), &micro).expect("inputs");
    let mut gradients = Gradients::new(&params);
    let mut most = 0;
    // What a step keeps for later ones is there before the second.
    for _ in 0..2 {
        engine::release_pool();
        let before = engine::pool_stats().live;
        engine::reset_pool_peak();
        let setting = Setting { clip_skip: None, checkpointing: how.clone(), draws: None };
        let mut ready = |id: ParamId, g: engine::Tensor| gradients.add(id, &g);
        drop(forward_backward((&models, &params), setting, &inputs, &mut ready).expect("a step"));
        let stats = engine::pool_stats();
        assert!(stats.live + stats.idle <= stats.peak, "idle buffers beyond the peak: {stats:?}");
        most = stats.peak - before;
    }
    most
}

fn planned(base: &Base, network: &LoraNetwork, how: &Checkpointing) -> usize {
    let files = &base.files;
    let values = network.initial_values(&mut |_, count| vec![0.; count]);
    let second = base.text_encoder_2.as_ref().zip(files.text_encoder_2.as_deref());
    let subject = Subject {
        parts: Parts {
            unet: (&base.unet, &*files.unet),
            text_encoder: (&base.text_encoder, &*files.text_encoder),
            text_encoder_2: second,
            vae: (&base.vae, &*files.vae),
        },
        network,
        values: &values,
        dtype: base.dtype,
        vae_dtype: base.vae_dtype,
        clip_skip: None,
        encoded: false,
        captions: [16, 1],
        weighted: false,
        masked: false,
    };
    let optimizer = trainer::optimizer::choose("AdamW", &[]).expect("AdamW");
    let card = imagined_card(usize::MAX);
    let mut recording =
        Recording::new(subject, &card, base.dtype, &optimizer).expect("a recording");
    let shape = StepShape { batch: BATCH, height: SIDE, width: SIDE, chunks: 1 };
    recording.step(shape, how).expect("a recorded step").0.peak()
}

#[test]
fn a_step_on_the_cpu_takes_what_was_recorded_for_a_card() {
    for dtype in [DType::F32, DType::BF16] {
        let base = base(dtype);
        let ranks = UniformRanks { linear: Rank::new(8, 8.), conv: None };
        let targets = unet_targets(&*base.files.unet);
        let network = LoraNetwork::new(targets, &ranks, Algorithm::LowRank).expect("a network");
        for how in [Checkpointing::None, Checkpointing::All] {
            let (planned, measured) =
                (planned(&base, &network, &how), measured(&base, &network, &how));
            let ratio = measured as f64 / planned as f64;
            println!("{dtype:?} {how:?}: planned {planned}, measured {measured}, {ratio:.3}");
            // Both run the same host code. What the plan of a whole run may be off by.
            assert!((0.95..1.05).contains(&ratio), "{dtype:?} {how:?}: {measured} of {planned}");
        }
    }
}
