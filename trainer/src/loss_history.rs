//! What each image costs: a running record of the losses of every image of the dataset.
//!
//! An image whose loss stays high does not fit the others, or its caption does not fit it. The ranks
//! tell each other the losses of their samples after every step (16 bytes each), so that every rank
//! holds the whole record, on any number of ranks the same to the bit.
//!
//! The loss is the sample's as it enters the mean: with the weights of timesteps and of
//! regularisation images. It depends on the timestep drawn, so look at the mean, not at the last.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use collectives::Comm;
use formats::{Dtype, OwnedTensor};

use crate::dataset::DatasetGroup;
use crate::optimizer::OptimizerState;

/// The loss of one sample of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleLoss {
    /// Number of the sample in the run.
    pub global_index: u64,
    /// Its image.
    pub image: PathBuf,
    /// Its loss.
    pub loss: f32,
}

/// The losses of one image.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ImageLoss {
    /// How often it was used.
    pub count: u64,
    /// Sum of its losses.
    pub sum: f64,
    /// The latest.
    pub last: f32,
}

impl ImageLoss {
    /// Mean of all; 0 before the first.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0. } else { self.sum / self.count as f64 }
    }
}

/// The losses of all images.
#[derive(Clone, Debug, PartialEq)]
pub struct LossHistory {
    images: Vec<PathBuf>,
    place: HashMap<PathBuf, usize>,
    losses: Vec<ImageLoss>,
}

const ENTRY: usize = 16;

impl LossHistory {
    /// Nothing is known of the images of `group`. An image that several datasets use has one record.
    pub fn new(group: &DatasetGroup) -> Self {
        let images = group.datasets.iter().flat_map(|dataset| &dataset.images);
        Self::of(images.map(|image| image.path.clone()).collect())
    }

    fn of(mut images: Vec<PathBuf>) -> Self {
        images.sort();
        images.dedup();
        let place = images.iter().enumerate().map(|(at, path)| (path.clone(), at)).collect();
        Self { losses: vec![ImageLoss::default(); images.len()], place, images }
    }

    /// Adds the losses of one step. All ranks call it, each with its own samples.
    pub fn add(&mut self, comm: &Comm, own: &[SampleLoss]) -> Result<()> {
        let mut bytes = Vec::with_capacity(own.len() * ENTRY);
        for sample in own {
            let Some(place) = self.place.get(&sample.image) else { continue };
            bytes.extend(sample.global_index.to_le_bytes());
            bytes.extend((*place as u32).to_le_bytes());
            bytes.extend(sample.loss.to_le_bytes());
        }
        let all = comm.all_gather(&bytes).context("exchange the losses of the images")?;
        let mut entries: Vec<(u64, usize, f32)> = all
            .iter()
            .flat_map(|bytes| bytes.chunks_exact(ENTRY))
            .map(|entry| {
                let (index, rest) = entry.split_at(8);
                let (place, loss) = rest.split_at(4);
                (u64::from_le_bytes(array(index)), word(place) as usize, f32::from_bits(word(loss)))
            })
            .collect();
        // One order on any number of ranks: sums of floats depend on it.
        entries.sort_by_key(|entry| entry.0);
        for (_, place, loss) in entries {
            if let Some(record) = self.losses.get_mut(place) {
                record.count += 1;
                record.sum += f64::from(loss);
                record.last = loss;
            }
        }
        Ok(())
    }

    /// Every image with its losses, sorted by name.
    pub fn records(&self) -> impl Iterator<Item = (&Path, &ImageLoss)> {
        self.images.iter().map(PathBuf::as_path).zip(&self.losses)
    }

    /// Everything to go on from.
    pub fn state(&self) -> Result<OptimizerState> {
        let names: Vec<String> = self.images.iter().map(|i| i.display().to_string()).collect();
        let names = serde_json::to_vec(&names).context("name the images")?;
        let count = self.losses.len();
        let tensor =
            |dtype, shape: usize, data: Vec<u8>| OwnedTensor { dtype, shape: vec![shape], data };
        let bytes = |each: fn(&ImageLoss) -> [u8; 8]| -> Vec<u8> {
            self.losses.iter().flat_map(each).collect()
        };
        let mut state = OptimizerState::default();
        for (name, tensor) in [
            ("images", tensor(Dtype::U8, names.len(), names)),
            ("counts", tensor(Dtype::I64, count, bytes(|l| l.count.to_le_bytes()))),
            ("sums", tensor(Dtype::F64, count, bytes(|l| l.sum.to_le_bytes()))),
            ("last", tensor(Dtype::F64, count, bytes(|l| f64::from(l.last).to_le_bytes()))),
        ] {
            state.tensors.insert(name.to_owned(), tensor);
        }
        Ok(state)
    }

    /// Goes on from a state of [`LossHistory::state`]. Images that are gone are forgotten, new ones
    /// start at nothing.
    pub fn load_state(&mut self, mut state: OptimizerState) -> Result<()> {
        let mut take = |name: &str| match state.tensors.remove(name) {
            Some(tensor) => Ok(tensor.data),
            None => bail!("the saved losses of the images lack: `{name}`"),
        };
        let names: Vec<PathBuf> =
            serde_json::from_slice(&take("images")?).context("the saved names of the images")?;
        let (counts, sums, last) = (take("counts")?, take("sums")?, take("last")?);
        if [&counts, &sums, &last].iter().any(|data| data.len() != names.len() * 8) {
            bail!("the saved losses are not as many as the images: {}", names.len());
        }
        let words = counts.chunks_exact(8).zip(sums.chunks_exact(8)).zip(last.chunks_exact(8));
        for (name, ((count, sum), last)) in names.into_iter().zip(words) {
            if let Some(place) = self.place.get(&name) {
                self.losses[*place] = ImageLoss {
                    count: u64::from_le_bytes(array(count)),
                    sum: f64::from_le_bytes(array(sum)),
                    last: f64::from_le_bytes(array(last)) as f32,
                };
            }
        }
        Ok(())
    }
}

/// Eight bytes; the callers cut them so.
fn array(bytes: &[u8]) -> [u8; 8] {
    let mut out = [0; 8];
    out.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    out
}

fn word(bytes: &[u8]) -> u32 {
    let [a, b, c, d, ..] = array(bytes);
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(global_index: u64, image: &str, loss: f32) -> SampleLoss {
        SampleLoss { global_index, image: image.into(), loss }
    }

    fn history() -> LossHistory {
        LossHistory::of(["b", "a", "c", "b"].map(PathBuf::from).to_vec())
    }

    fn of<'a>(history: &'a LossHistory, image: &str) -> &'a ImageLoss {
        history.records().find(|(path, _)| *path == Path::new(image)).unwrap().1
    }

    #[test]
    fn every_number_of_ranks_keeps_the_same_record() {
        let steps = [
            vec![sample(0, "a", 0.1), sample(1, "b", 1e8), sample(2, "a", 0.3)],
            vec![sample(3, "a", 1e-7), sample(4, "b", -1e8), sample(5, "b", 0.7)],
        ];
        let mut alone = history();
        steps.iter().for_each(|step| alone.add(&Comm::single(), step).unwrap());
        assert_eq!((of(&alone, "a").count, of(&alone, "a").last), (3, 1e-7));
        assert_eq!(of(&alone, "c").mean(), 0.);
        assert!((of(&alone, "b").mean() - 0.7 / 3.).abs() < 1e-7);
        let ranks = Comm::local_group(2).unwrap();
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|comm| {
                let steps = steps.clone();
                std::thread::spawn(move || {
                    let mut shared = history();
                    for step in &steps {
                        // The second rank has the first samples: order is by index, not by rank.
                        let own = if comm.rank() == 1 { &step[..2] } else { &step[2..] };
                        shared.add(&comm, own).unwrap();
                    }
                    shared
                })
            })
            .collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), alone);
        }
    }

    #[test]
    fn a_resumed_record_knows_the_images_by_name() {
        let mut first = history();
        first.add(&Comm::single(), &[sample(0, "a", 0.5), sample(1, "c", 0.25)]).unwrap();
        let mut resumed = LossHistory::of(["c", "d"].map(PathBuf::from).to_vec());
        resumed.load_state(first.state().unwrap()).unwrap();
        assert_eq!(of(&resumed, "c"), of(&first, "c"));
        assert_eq!(of(&resumed, "d").count, 0);
        let mut torn = first.state().unwrap();
        torn.tensors.get_mut("sums").unwrap().data.pop();
        assert!(resumed.load_state(torn).unwrap_err().to_string().contains("not as many"));
        let mut torn = first.state().unwrap();
        torn.tensors.remove("counts");
        assert!(resumed.load_state(torn).unwrap_err().to_string().contains("`counts`"));
    }
}
