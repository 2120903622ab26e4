//! The base model of a run: opened once, its parts loaded when they are needed.

use std::path::Path;

use anyhow::{Context, Result};
use engine::{DType, Device};
use formats::Weights;
use formats::{BaseModel, OpenOptions, open_base_model};
use models::lora::{
    BaseMerge, Part, Target, sdxl_text_encoder_targets, text_encoder_targets, unet_targets,
};
use models::prompt::Tokenizers;
use models::{
    ClipConfig, ClipTextModel, Preset, TextEncoders, Unet, UnetConfig, Vae, VaeConfig, preset,
    second_text_preset,
};

use crate::console;
use crate::family::check_family;
use crate::lora_input::read_lora;
use crate::options::Options;
use crate::precision::{compute_type, vae_type};

/// An opened base model and the sizes of its parts.
pub struct Base {
    /// Mapped files.
    pub files: BaseModel,
    /// Facts of the family.
    pub preset: &'static Preset,
    /// Sizes of the U-Net.
    pub unet: UnetConfig,
    /// Sizes of the text encoder.
    pub text_encoder: ClipConfig,
    /// Sizes of SDXL's second.
    pub text_encoder_2: Option<ClipConfig>,
    /// Sizes of the autoencoder.
    pub vae: VaeConfig,
    /// Where the arithmetic is done.
    pub device: Device,
    /// Type of the U-Net's and the text encoder's arithmetic.
    pub dtype: DType,
    /// What the U-Net's frozen weights are kept in.
    pub stored: DType,
    /// Type of the VAE's.
    pub vae_dtype: DType,
    /// LoRA files that are part of the loaded weights (`base_weights`).
    pub merge: BaseMerge,
}

impl Base {
    /// Opens the model that the options name.
    pub fn open(options: &Options, device: Device) -> Result<Self> {
        let name = options.pretrained_model_name_or_path.as_deref().context(
            "`pretrained_model_name_or_path` is missing\nhint: name a `.safetensors` or `.ckpt` \
             file, a diffusers folder or a hub id",
        )?;
        let open = OpenOptions {
            v2: options.is_written("v2").then_some(options.v2),
            variant: None,
            vae: options.vae.as_ref().map(|path| path.display().to_string()),
        };
        let files = open_base_model(name, &open)?;
        let mut base = Self::from_files(files, compute_type(options, device))?;
        let family = base.files.family;
        (base.device, base.vae_dtype) = (device, vae_type(options, device, family));
        base.store(options);
        Ok(base)
    }

    /// [`Base::open`], compared with the options, with the files of `base_weights`; says what there is
    /// to say about it.
    pub fn prepare(options: &Options, device: Device) -> Result<Self> {
        let mut base = Self::open(options, device)?;
        let known = check_family(options, &base)?;
        let merged = base.merge_base_weights(options)?;
        let stored = base.note_on_storage(options);
        for note in base.files.notes.iter().chain(&merged).chain(&known).chain(&stored) {
            console::note(note);
        }
        Ok(base)
    }

    /// Reads the sizes of an opened model.
    pub fn from_files(files: BaseModel, dtype: DType) -> Result<Self> {
        let preset = preset(files.family);
        let unet = UnetConfig::resolve(files.unet_config.as_ref(), &*files.unet, preset)?;
        let text = files.text_encoder_config.as_ref();
        let text_encoder = ClipConfig::resolve(text, &*files.text_encoder, preset)?;
        let second = files.text_encoder_2.as_deref().zip(second_text_preset(files.family));
        let text_encoder_2 = second
            .map(|(weights, preset)| {
                let config = files.text_encoder_2_config.as_ref();
                ClipConfig::resolve(config, weights, preset)
            })
            .transpose()?;
        let vae = VaeConfig::resolve(files.vae_config.as_ref(), &*files.vae, preset)?;
        Ok(Self {
            files,
            preset,
            unet,
            text_encoder,
            text_encoder_2,
            vae,
            device: Device::Cpu,
            dtype,
            stored: dtype,
            vae_dtype: DType::F32,
            merge: BaseMerge::default(),
        })
    }

    /// Keeps the U-Net's frozen weights as the options say, where a card computes.
    pub fn store(&mut self, options: &Options) {
        let packed = options.fp8_base || options.fp8_base_unet;
        self.stored = if packed && self.device.card().is_some() { DType::F8 } else { self.dtype };
    }

    /// Says so where `fp8_base` has no effect; a plan for a card that is not there follows it.
    pub fn note_on_storage(&self, options: &Options) -> Option<String> {
        let planned = options.dry_run && options.vram_limit.is_some();
        let asked = options.fp8_base || options.fp8_base_unet;
        let ignored = asked && self.device.card().is_none() && !planned;
        let name = match self.dtype {
            DType::BF16 => "bf16",
            _ => "float32",
        };
        ignored.then(|| {
            format!(
                "`fp8_base` is for cards: on the CPU the U-Net is kept as it is computed, in {name}"
            )
        })
    }

    /// Takes the files of `base_weights` into the base model; gives a line about each.
    pub fn merge_base_weights(&mut self, options: &Options) -> Result<Vec<String>> {
        let mut targets = self.text_targets();
        targets.extend(unet_targets(&*self.files.unet));
        let multipliers = options.base_weights_multiplier.as_deref().unwrap_or_default();
        let mut notes = Vec::new();
        for (index, name) in options.base_weights.iter().flatten().enumerate() {
            let multiplier = multipliers.get(index).copied().unwrap_or(1.);
            let context = || format!("cannot merge the file of `base_weights`: {name}");
            let file = read_lora(Path::new(name), self.files.family).with_context(context)?;
            let report =
                self.merge.add(&file.tensors, multiplier as f32, &targets).with_context(context)?;
            let merged = report.merged;
            notes
                .push(format!("merge {name} into the base model: {merged} modules x {multiplier}"));
            if let Some(first) = report.unused.first() {
                let count = report.unused.len();
                notes.push(format!(
                    "{name} has {count} modules that are not merged, the first: {first}"
                ));
            }
        }
        Ok(notes)
    }

    /// The weights of a part, if the model has it.
    pub fn weights(&self, part: Part) -> Option<&dyn Weights> {
        match part {
            Part::TextEncoder => Some(&*self.files.text_encoder),
            Part::TextEncoder2 => self.files.text_encoder_2.as_deref(),
            Part::Unet => Some(&*self.files.unet),
        }
    }

    /// The parts that the model has, with their weights.
    pub fn parts(&self) -> impl Iterator<Item = (Part, &dyn Weights)> {
        let parts = [Part::TextEncoder, Part::TextEncoder2, Part::Unet].into_iter();
        parts.filter_map(|part| Some((part, self.weights(part)?)))
    }

    /// The layers of the text encoders that can carry an adapter.
    pub fn text_targets(&self) -> Vec<Target> {
        match &self.files.text_encoder_2 {
            Some(second) => sdxl_text_encoder_targets(&*self.files.text_encoder, &**second),
            None => text_encoder_targets(&*self.files.text_encoder),
        }
    }

    /// Width of SDXL's pooled text.
    pub fn pooled_width(&self) -> Option<usize> {
        self.text_encoder_2.as_ref()?.pooled
    }

    /// Loads the U-Net in the compute type, or as it is to be stored.
    pub fn load_unet(&self) -> Result<Unet> {
        let weights = self.merge.over(Part::Unet, &*self.files.unet);
        let types = (self.dtype, self.stored);
        let unet = Unet::load_stored(&weights, &self.unet, self.device, types);
        unet.with_context(|| format!("load the U-Net of {}", self.files.path.display()))
    }

    /// Loads the text encoders in the compute type.
    pub fn load_text_encoder(&self) -> Result<TextEncoders> {
        let load = |part, weights, config| {
            let weights = self.merge.over(part, weights);
            let model = ClipTextModel::load(&weights, config, self.device, self.dtype);
            model.with_context(|| format!("load the text encoder of {}", self.files.path.display()))
        };
        let second = self.files.text_encoder_2.as_deref().zip(self.text_encoder_2.as_ref());
        Ok(TextEncoders {
            first: load(Part::TextEncoder, &*self.files.text_encoder, &self.text_encoder)?,
            second: second
                .map(|(weights, config)| load(Part::TextEncoder2, weights, config))
                .transpose()?,
        })
    }

    /// The model's tokenizers.
    pub fn tokenizers(&self) -> Result<Tokenizers> {
        Ok(Tokenizers::of(&self.files)?)
    }

    /// Loads the autoencoder in its own type: in half precision some autoencoders overflow.
    pub fn load_vae(&self) -> Result<Vae> {
        let vae = Vae::load(&*self.files.vae, &self.vae, self.device, self.vae_dtype);
        vae.with_context(|| format!("load the VAE of {}", self.files.path.display()))
    }
}
