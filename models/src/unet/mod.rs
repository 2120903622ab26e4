//! The U-Net of Stable Diffusion 1.x, 2.x and XL (diffusers' `UNet2DConditionModel`).
//!
//! Each pair of residual block and transformer is a segment of the tape, so that checkpointing keeps
//! one feature map per pair.

mod blocks;
mod config;
#[cfg(test)]
mod tests;
mod time;
mod transformer;

use engine::{
    Conv2d, DType, Device, EngineError, GroupNorm, Linear, Result as EngineResult, Tape, Tensor,
    Value,
};
use formats::Weights;

use self::blocks::{DownBlock, MidBlock, Pass, UpBlock};
pub use self::config::{SizeIds, UnetConfig};
pub use self::time::timestep_embedding;
use crate::Result;
use crate::reader::{ConvShape, LayerVisitor, Reader, SlotVisitor, TensorShape};

/// A U-Net on one device, its weights frozen.
pub struct Unet {
    config: UnetConfig,
    device: Device,
    dtype: DType,
    time_1: Linear,
    time_2: Linear,
    /// SDXL's way into the time embedding for pooled text and sizes.
    added: Option<(Linear, Linear)>,
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    mid: MidBlock,
    up: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// What a U-Net is asked about.
#[derive(Clone, Copy, Debug)]
pub struct UnetInput<'a> {
    /// Noisy latents `[B,h,w,4]`, f32 or the compute type.
    pub latents: &'a Tensor,
    /// [`Unet::waves`] of the timesteps, one row per image.
    pub waves: &'a Tensor,
    /// Text encoder output `[B,T,C]`.
    pub context: &'a Value,
    /// What is added to the time embedding, `[B,config.added]`; needed where that is set:
    /// [`Unet::added`].
    pub added: Option<&'a Value>,
}

fn added_embedding(reader: &Reader, time: usize, width: usize) -> Result<(Linear, Linear)> {
    reader.in_compute_type(|reader| {
        let first = reader.linear("add_embedding.linear_1", time, width)?;
        Ok((first, reader.linear("add_embedding.linear_2", time, time)?))
    })
}

impl Unet {
    /// Reads a U-Net; `dtype` is the type of its arithmetic.
    pub fn load(
        weights: &dyn Weights,
        config: &UnetConfig,
        device: Device,
        dtype: DType,
    ) -> Result<Self> {
        Self::load_stored(weights, config, device, (dtype, dtype))
    }

    /// As [`Unet::load`], with the weights of linear layers and convolutions kept as `stored`: on a
    /// card [`DType::F8`] halves them. The first and last convolution and the time embedding stay
    /// in the type of the arithmetic, they are small and everything passes through them.
    pub fn load_stored(
        weights: &dyn Weights,
        config: &UnetConfig,
        device: Device,
        (dtype, stored): (DType, DType),
    ) -> Result<Self> {
        Self::read(&Reader::new(weights, device, dtype).storing(stored), config, dtype)
    }

    /// Names and shapes of all tensors of a U-Net of this config.
    pub fn tensor_shapes(config: &UnetConfig) -> Result<Vec<TensorShape>> {
        let reader = Reader::listing();
        Self::read(&reader, config, DType::F32)?;
        Ok(reader.into_list())
    }

    fn read(reader: &Reader, config: &UnetConfig, dtype: DType) -> Result<Self> {
        let first = config.channels[0];
        let time = config.time_width();
        let (in_channels, out_channels) = (config.in_channels, config.out_channels);
        Ok(Self {
            config: config.clone(),
            device: reader.device(),
            dtype,
            conv_in: reader.in_compute_type(|reader| {
                reader.conv("conv_in", ConvShape::same3(first, in_channels))
            })?,
            time_1: reader
                .in_compute_type(|reader| reader.linear("time_embedding.linear_1", time, first))?,
            time_2: reader
                .in_compute_type(|reader| reader.linear("time_embedding.linear_2", time, time))?,
            added: config.added.map(|width| added_embedding(reader, time, width)).transpose()?,
            down: (0..config.levels())
                .map(|level| DownBlock::load(reader, config, level))
                .collect::<Result<_>>()?,
            mid: MidBlock::load(reader, config)?,
            up: (0..config.levels())
                .map(|level| UpBlock::load(reader, config, level))
                .collect::<Result<_>>()?,
            norm_out: reader.group_norm("conv_norm_out", first, config.groups, config.norm_eps)?,
            conv_out: reader.in_compute_type(|reader| {
                reader.conv("conv_out", ConvShape::same3(out_channels, first))
            })?,
        })
    }

    /// The sinusoidal embedding of timesteps that [`UnetInput::waves`] takes, f32 `[B,width]`.
    pub fn waves(&self, device: Device, timesteps: &[f32]) -> EngineResult<Tensor> {
        let width = self.config.channels[0];
        let waves = timestep_embedding(timesteps, width);
        Tensor::from_f32(device, &[timesteps.len(), width], &waves, DType::F32)
    }

    /// What SDXL adds to the time embedding, `[B,config.added]`: pooled text `[B,P]`, then the
    /// embedded sizes ([`UnetConfig::size_waves`]), `[B,config.added-P]`.
    ///
    /// # Errors
    /// Parts that do not fit each other.
    pub fn added<'m>(
        &self,
        tape: &Tape<'m>,
        pooled: &Value,
        sizes: &Tensor,
    ) -> EngineResult<Value> {
        let pooled = tape.cast(pooled, self.dtype)?;
        tape.concat_last(&pooled, &Value::constant(sizes.to_dtype(self.dtype)?))
    }

    /// Where its weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Its sizes.
    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// The noise (or v) that the model sees in the latents, `[B,h,w,4]`, in the compute type.
    pub fn forward<'m>(&'m self, tape: &Tape<'m>, input: UnetInput) -> EngineResult<Value> {
        self.check(&input)?;
        let time = self.time_signal(tape, &input)?;
        let context = tape.cast(input.context, self.dtype)?;
        let pass = Pass { tape, time: &time, context: &context };
        let latents = Value::constant(input.latents.to_dtype(self.dtype)?);

        let mut h = self.conv_in.forward(tape, &latents)?;
        let mut skips = vec![h.clone()];
        for block in &self.down {
            h = block.forward(&pass, h, &mut skips)?;
        }
        h = self.mid.forward(&pass, h)?;
        for block in &self.up {
            h = block.forward(&pass, h, &mut skips)?;
        }
        h = self.norm_out.forward_silu(tape, &h)?;
        self.conv_out.forward(tape, &h)
    }

    fn check(&self, input: &UnetInput) -> EngineResult<()> {
        let (latents, context) = (input.latents.shape(), input.context.shape());
        let fits = match (latents, context) {
            ([batch, _, _, channels], [contexts, _, width]) => {
                *channels == self.config.in_channels
                    && *width == self.config.context_width
                    && batch == contexts
                    && *input.waves.shape() == [*batch, self.config.channels[0]]
            }
            _ => false,
        };
        let added = input.added.map(|added| added.shape().to_vec());
        let added_fits = added == self.config.added.map(|width| vec![latents[0], width]);
        if fits && added_fits {
            return Ok(());
        }
        let detail = format!(
            "latents {latents:?}, text {context:?}, time {:?}, added {added:?}; the model takes {} \
             channels, text of width {}, added {:?}",
            input.waves.shape(),
            self.config.in_channels,
            self.config.context_width,
            self.config.added
        );
        Err(EngineError::shape("unet", detail))
    }

    /// SiLU of the time embedding `[B,time]`, with what is added to it: what every residual block
    /// projects.
    fn time_signal<'m>(&'m self, tape: &Tape<'m>, input: &UnetInput) -> EngineResult<Value> {
        let waves = Value::constant(input.waves.to_dtype(self.dtype)?);
        let mut h = self.time_1.forward(tape, &waves)?;
        h = tape.activation(engine::Activation::Silu, &h)?;
        h = match (&self.added, input.added) {
            (Some((first, second)), Some(added)) => {
                let added = tape.cast(added, self.dtype)?;
                let added = first.forward(tape, &added)?;
                let added = tape.activation(engine::Activation::Silu, &added)?;
                let added = second.forward(tape, &added)?;
                self.time_2.forward_add(tape, &h, &added)?
            }
            _ => self.time_2.forward(tape, &h)?,
        };
        tape.activation(engine::Activation::Silu, &h)
    }

    /// Visits every layer that can carry an adapter.
    pub fn visit_slots(&mut self, visit: SlotVisitor) {
        self.visit_layers(&mut |path, layer| visit(path, layer.slot()));
    }

    pub(crate) fn visit_layers(&mut self, visit: LayerVisitor) {
        visit("conv_in", (&mut self.conv_in).into());
        visit("time_embedding.linear_1", (&mut self.time_1).into());
        visit("time_embedding.linear_2", (&mut self.time_2).into());
        if let Some((first, second)) = &mut self.added {
            visit("add_embedding.linear_1", first.into());
            visit("add_embedding.linear_2", second.into());
        }
        for (level, block) in self.down.iter_mut().enumerate() {
            block.visit(&format!("down_blocks.{level}"), visit);
        }
        self.mid.visit("mid_block", visit);
        for (level, block) in self.up.iter_mut().enumerate() {
            block.visit(&format!("up_blocks.{level}"), visit);
        }
        visit("conv_out", (&mut self.conv_out).into());
    }
}
