//! The autoencoder on one tile after another, for pictures whose feature maps do not fit the memory.
//!
//! Tiles overlap by a quarter and are blended over the overlap, as in diffusers. Normalisations see a
//! tile instead of the picture, so that the result is close to the untiled one but not the same.

use engine::{DType, EngineError, Result, Tensor};

use super::{Moments, Vae};

/// When the autoencoder works tile by tile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tiling {
    /// On the CPU, where the memory that is free would not do for the whole picture; on cards, from
    /// 1024x1024 pixels on.
    #[default]
    Auto,
    /// Wherever a picture is larger than a tile.
    Always,
    /// Never.
    Never,
}

/// Side of a tile in latents: 512 pixels, what the models were trained at.
const TILE: usize = 64;
/// Least overlap of neighbours in latents.
const OVERLAP: usize = 16;
/// Pixels to a latent's side.
const FACTOR: usize = 8;

impl Tiling {
    /// Whether a picture of these latents is made in tiles.
    fn applies(self, vae: &Vae, [width, height]: [usize; 2]) -> bool {
        let pixels = width * height * FACTOR * FACTOR;
        match self {
            _ if width <= TILE && height <= TILE => false,
            Tiling::Always => true,
            Tiling::Never => false,
            Tiling::Auto if vae.device().card().is_some() => pixels > 1024 * 1024,
            Tiling::Auto => {
                // Four maps of the widest of the levels at full size.
                let widest = vae.config().channels.iter().take(2).max().copied().unwrap_or(0);
                let needed = 4 * pixels * widest * size_of::<f32>();
                free_memory().is_some_and(|free| needed > free)
            }
        }
    }
}

/// Bytes that the system can give without swapping, where it says so.
fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// First latents of the tiles along a side, equally far apart, and how long they are.
fn tiles(side: usize) -> (Vec<usize>, usize) {
    if side <= TILE {
        return (vec![0], side);
    }
    let count = (side - OVERLAP).div_ceil(TILE - OVERLAP);
    let last = side - TILE;
    ((0..count).map(|i| i * last / (count - 1)).collect(), TILE)
}

/// How much a tile counts at each of its `length` places: rising over the overlap with the one before,
/// falling over that with the one behind.
fn ramps(starts: &[usize], index: usize, length: usize, factor: usize) -> Vec<f32> {
    let shared = |left: usize, right: usize| (left + length - right) * factor;
    let before = index.checked_sub(1).map(|before| shared(starts[before], starts[index]));
    let behind = starts.get(index + 1).map(|behind| shared(starts[index], *behind));
    let rise = |at: usize, over: Option<usize>| match over {
        Some(over) => ((at as f32 + 0.5) / over as f32).min(1.),
        None => 1.,
    };
    let length = length * factor;
    (0..length).map(|at| rise(at, before) * rise(length - 1 - at, behind)).collect()
}

/// A map `[height,width,channels]` that is put together from tiles.
struct Blend {
    width: usize,
    channels: usize,
    sum: Vec<f32>,
    weight: Vec<f32>,
}

impl Blend {
    fn new([width, height]: [usize; 2], channels: usize) -> Self {
        let pixels = width * height;
        Self { width, channels, sum: vec![0.; pixels * channels], weight: vec![0.; pixels] }
    }

    /// Adds a tile whose upper left corner is at `corner` (column and row).
    fn add(&mut self, tile: &[f32], corner: [usize; 2], [across, down]: [&[f32]; 2]) {
        for ((y, row), of_row) in tile.chunks(across.len() * self.channels).enumerate().zip(down) {
            let first = (corner[1] + y) * self.width + corner[0];
            for ((x, pixel), of_column) in row.chunks(self.channels).enumerate().zip(across) {
                let (at, weight) = (first + x, of_row * of_column);
                self.weight[at] += weight;
                let sum = &mut self.sum[at * self.channels..][..self.channels];
                sum.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += weight * value);
            }
        }
    }

    fn finish(mut self) -> Vec<f32> {
        for (pixel, weight) in self.sum.chunks_mut(self.channels).zip(&self.weight) {
            pixel.iter_mut().for_each(|value| *value /= weight);
        }
        self.sum
    }
}

/// Calls `each` with the corner (column and row), size and weights of each tile, all in latents but
/// the weights, which have `factor` places to a latent.
fn each_tile(
    [width, height]: [usize; 2],
    factor: usize,
    mut each: impl FnMut([usize; 2], [usize; 2], [&[f32]; 2]) -> Result<()>,
) -> Result<()> {
    let ((columns, across), (rows, down)) = (tiles(width), tiles(height));
    for (j, row) in rows.iter().enumerate() {
        let of_rows = ramps(&rows, j, down, factor);
        for (i, column) in columns.iter().enumerate() {
            let of_columns = ramps(&columns, i, across, factor);
            each([*column, *row], [across, down], [&of_columns, &of_rows])?;
        }
    }
    Ok(())
}

/// The part of `[1,height,width,channels]` at `corner` of `size`, both columns and rows.
fn cut(map: &Tensor, values: &[f32], corner: [usize; 2], size: [usize; 2]) -> Result<Tensor> {
    let (width, channels) = (map.dim(2), map.last_dim());
    let mut part = Vec::with_capacity(size[0] * size[1] * channels);
    for row in corner[1]..corner[1] + size[1] {
        part.extend_from_slice(
            &values[(row * width + corner[0]) * channels..][..size[0] * channels],
        );
    }
    Tensor::from_f32(map.device(), &[1, size[1], size[0], channels], &part, DType::F32)
}

fn size_of_one(op: &'static str, map: &Tensor) -> Result<[usize; 2]> {
    match *map.shape() {
        [1, height, width, _] => Ok([width, height]),
        _ => Err(EngineError::shape(op, format!("{:?}, one picture is needed", map.shape()))),
    }
}

impl Vae {
    /// As [`Vae::decode`] for one picture, in tiles where `tiling` says so.
    pub fn decode_by(&self, latents: &Tensor, tiling: Tiling) -> Result<Tensor> {
        let size = size_of_one("vae decode", latents)?;
        if !tiling.applies(self, size) {
            return self.decode(latents);
        }
        let values = latents.to_vec_f32()?;
        let pixels = size.map(|side| side * FACTOR);
        let channels = self.config().image_channels;
        let mut picture = Blend::new(pixels, channels);
        each_tile(size, FACTOR, |corner, size, weights| {
            let tile = self.decode(&cut(latents, &values, corner, size)?)?;
            picture.add(&tile.to_vec_f32()?, corner.map(|at| at * FACTOR), weights);
            Ok(())
        })?;
        let shape = [1, pixels[1], pixels[0], channels];
        Tensor::from_f32(latents.device(), &shape, &picture.finish(), DType::F32)
    }

    /// As [`Vae::encode`] for one picture, in tiles where `tiling` says so.
    pub fn encode_by(&self, image: &Tensor, tiling: Tiling) -> Result<Moments> {
        let size = size_of_one("vae encode", image)?.map(|side| side / FACTOR);
        if !tiling.applies(self, size) {
            return self.encode(image);
        }
        let values = image.to_vec_f32()?;
        let channels = self.config().latent_channels;
        let (mut mean, mut logvar) = (Blend::new(size, channels), Blend::new(size, channels));
        each_tile(size, 1, |corner, size, weights| {
            let (corner_of_pixels, pixels) =
                (corner.map(|at| at * FACTOR), size.map(|n| n * FACTOR));
            let tile = self.encode(&cut(image, &values, corner_of_pixels, pixels)?)?;
            mean.add(&tile.mean, corner, weights);
            logvar.add(&tile.logvar, corner, weights);
            Ok(())
        })?;
        let shape = [1, size[1], size[0], channels];
        Ok(Moments { shape, mean: mean.finish(), logvar: logvar.finish() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_side_and_overlap() {
        for side in 1..400 {
            let (starts, length) = tiles(side);
            assert_eq!((starts[0], starts[starts.len() - 1] + length), (0, side));
            let overlaps = starts.windows(2).all(|pair| pair[0] + length >= pair[1] + OVERLAP);
            assert!(overlaps && length == side.min(TILE), "{side}: {starts:?}");
        }
    }

    /// A map cut into tiles and put together is the map, so that only what is done to a tile shows.
    #[test]
    fn untouched_tiles_give_the_map() -> Result<()> {
        let size = [150, 70];
        let map: Vec<f32> = (0..150 * 70 * 2).map(|i| (i % 977) as f32).collect();
        let tensor = Tensor::from_f32(engine::Device::Cpu, &[1, 70, 150, 2], &map, DType::F32)?;
        let mut blend = Blend::new(size, 2);
        each_tile(size, 1, |corner, size, weights| {
            blend.add(&cut(&tensor, &map, corner, size)?.to_vec_f32()?, corner, weights);
            Ok(())
        })?;
        for (new, old) in blend.finish().iter().zip(&map) {
            assert!((new - old).abs() <= 1e-4 * old.max(1.), "{new} of {old}");
        }
        Ok(())
    }
}
