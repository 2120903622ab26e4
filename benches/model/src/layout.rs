//! Which tensors a Stable Diffusion 1.x single-file checkpoint holds: names, shapes and how each is filled.
//!
//! Names are those of the original latent-diffusion code (`model.diffusion_model.input_blocks.1.0...`), checked against
//! what diffusers' single-file conversion expects.

/// Sizes of a model; everything else of the layout is the same for all Stable Diffusion 1.x models.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// Channels of the four U-Net levels; multiples of 32, the number of norm groups.
    pub unet_widths: [usize; 4],
    /// Channels of the four VAE levels; multiples of 32.
    pub vae_widths: [usize; 4],
    /// Width of the text encoder, which is also the width of the U-Net's cross-attention input.
    pub text_width: usize,
    /// Width of the text encoder's hidden layer.
    pub text_mlp_width: usize,
    /// Layers of the text encoder.
    pub text_layers: usize,
}

impl Preset {
    /// Stable Diffusion 1.5: 859,520,964 + 83,653,863 + 123,060,480 parameters.
    pub const FULL: Preset = Preset {
        unet_widths: [320, 640, 1280, 1280],
        vae_widths: [128, 256, 512, 512],
        text_width: 768,
        text_mlp_width: 3072,
        text_layers: 12,
    };

    /// The same layout in a few megabytes, most of them the vocabulary.
    #[cfg(test)]
    pub const TINY: Preset = Preset {
        unet_widths: [32, 32, 64, 64],
        vae_widths: [32, 32, 32, 32],
        text_width: 32,
        text_mlp_width: 64,
        text_layers: 2,
    };
}

/// How a tensor is filled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fill {
    /// Biases.
    Zero,
    /// Weights of norms.
    One,
    /// Random around zero with this standard deviation.
    Random { deviation: f32 },
}

/// One tensor of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Full name in the checkpoint.
    pub name: String,
    /// Dimensions, outermost first: `[out, in]`, `[out, in, height, width]`, `[channels]`.
    pub shape: Vec<usize>,
    /// What its values are.
    pub fill: Fill,
}

impl TensorSpec {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it holds nothing; no tensor of a model does.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Collects the tensors of one component under its prefix.
#[derive(Debug)]
pub struct Collector {
    prefix: &'static str,
    tensors: Vec<TensorSpec>,
}

impl Collector {
    pub(crate) fn new(prefix: &'static str) -> Self {
        Self { prefix, tensors: Vec::new() }
    }

    pub(crate) fn finish(self) -> Vec<TensorSpec> {
        self.tensors
    }

    fn push(&mut self, name: String, shape: Vec<usize>, fill: Fill) {
        self.tensors.push(TensorSpec { name: format!("{}{name}", self.prefix), shape, fill });
    }

    /// Weight only. The deviation 1/sqrt(3 * inputs) is that of PyTorch's default for Linear and Conv2d: with norms
    /// before every block, activations stay of the order of one.
    pub(crate) fn weight(&mut self, name: &str, shape: &[usize]) {
        let inputs: usize = shape[1..].iter().product();
        let deviation = 1.0 / (3.0 * inputs as f32).sqrt();
        self.push(format!("{name}.weight"), shape.to_vec(), Fill::Random { deviation });
    }

    /// Weight and zero bias.
    pub(crate) fn layer(&mut self, name: &str, shape: &[usize]) {
        self.weight(name, shape);
        self.push(format!("{name}.bias"), vec![shape[0]], Fill::Zero);
    }

    /// Convolution with a square kernel.
    pub(crate) fn conv(&mut self, name: &str, output: usize, input: usize, kernel: usize) {
        self.layer(name, &[output, input, kernel, kernel]);
    }

    /// Weight one, bias zero.
    pub(crate) fn norm(&mut self, name: &str, channels: usize) {
        self.push(format!("{name}.weight"), vec![channels], Fill::One);
        self.push(format!("{name}.bias"), vec![channels], Fill::Zero);
    }

    /// Rows of small numbers, as CLIP is initialised.
    pub(crate) fn embedding(&mut self, name: &str, rows: usize, width: usize) {
        self.push(format!("{name}.weight"), vec![rows, width], Fill::Random { deviation: 0.02 });
    }
}

/// All tensors of a model, sorted by name as they lie in the file.
pub fn model_tensors(preset: &Preset) -> Vec<TensorSpec> {
    let mut tensors = crate::unet::unet_tensors(preset);
    tensors.extend(crate::text_and_vae::text_tensors(preset));
    tensors.extend(crate::text_and_vae::vae_tensors(preset));
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The counts diffusers' and transformers' models of the published configs have.
    #[test]
    fn full_size_has_the_published_parameter_counts() {
        let tensors = model_tensors(&Preset::FULL);
        let component = |prefix: &str| {
            let of: Vec<_> = tensors.iter().filter(|t| t.name.starts_with(prefix)).collect();
            (of.len(), of.iter().map(|t| t.len()).sum::<usize>())
        };
        assert_eq!(component("model.diffusion_model."), (686, 859_520_964));
        assert_eq!(component("first_stage_model."), (248, 83_653_863));
        assert_eq!(component("cond_stage_model.transformer."), (196, 123_060_480));
        assert_eq!(tensors.len(), 686 + 248 + 196);
    }

    #[test]
    fn names_are_unique_and_sorted() {
        let tensors = model_tensors(&Preset::TINY);
        assert!(tensors.windows(2).all(|pair| pair[0].name < pair[1].name));
    }

    #[test]
    fn tiny_differs_from_full_in_sizes_only() {
        let names = |preset| -> Vec<String> {
            let text = "cond_stage_model.";
            let all = model_tensors(preset).into_iter().map(|t| t.name);
            // A level that does not change the width has no shortcut convolution, and the tiny text encoder fewer layers.
            let shortcut = |n: &String| n.contains("skip_connection") || n.contains("nin_shortcut");
            all.filter(|n| !n.starts_with(text) && !shortcut(n)).collect()
        };
        assert_eq!(names(&Preset::TINY), names(&Preset::FULL));
    }
}
