//! The ranks share the work of encoding captions: rounds of a batch for each rank, with an exchange
//! after each, so that no rank waits long for another, and what stops one stops all with its message.

use anyhow::{Context, Result};
use collectives::{Comm, signals};
use serde::{Deserialize, Serialize};

use crate::dataset::DatasetError;

/// What a rank tells the others.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Said {
    /// Why this rank cannot go on.
    pub error: Option<String>,
    /// This rank was asked to stop.
    pub stop: bool,
    /// Numbers of files, and what differs in each; empty where one is missing.
    pub files: Vec<(usize, String)>,
    /// A path that all ranks of a host use.
    pub folder: String,
}

impl Said {
    /// Nothing but an error, if there is one.
    pub fn outcome<T>(result: &Result<T>) -> Self {
        Self { error: result.as_ref().err().map(|error| format!("{error:#}")), ..Self::default() }
    }
}

/// Gives every rank what all said, with the bytes that they add; an error of any rank is one of all,
/// and so is being asked to stop.
///
/// # Errors
/// Those of other ranks; the caller returns its own.
pub fn exchange(comm: &Comm, mut said: Said, bytes: &[u8]) -> Result<Vec<(Said, Vec<u8>)>> {
    said.stop = signals::stop_requested();
    let failed = said.error.is_some();
    let head = serde_json::to_vec(&said)?;
    let length = u32::try_from(head.len()).context("too much to tell the other ranks")?;
    let message = [&length.to_le_bytes()[..], &head, bytes].concat();
    let all = comm.all_gather(&message).context("share the work of encoding captions")?;
    let mut out = Vec::with_capacity(all.len());
    for (rank, mut message) in all.into_iter().enumerate() {
        let head = message
            .split_first_chunk::<4>()
            .and_then(|(length, rest)| rest.get(..u32::from_le_bytes(*length) as usize));
        let head = head.with_context(|| format!("rank {rank} sent a damaged message"))?;
        let said: Said = serde_json::from_slice(head)?;
        let taken = 4 + head.len();
        let bytes = message.split_off(taken);
        out.push((said, bytes));
    }
    if !failed {
        let other =
            out.iter().enumerate().find_map(|(rank, (said, _))| Some((rank, said.error.as_ref()?)));
        if let Some((rank, message)) = other {
            return Err(DatasetError::OtherRank { rank, message: message.clone() }.into());
        }
        if out.iter().any(|(said, _)| said.stop) {
            let option = "cache_text_encoder_outputs_to_disk";
            return Err(DatasetError::Stopped { what: "text encoder outputs", option }.into());
        }
    }
    Ok(out)
}

/// Rounds in which `count` captions are encoded, `batch` at a time on each of so many ranks.
pub fn rounds(count: usize, batch: usize, world: usize) -> usize {
    count.div_ceil((batch * world).max(1))
}

/// The captions that a rank encodes in a round.
pub fn share(
    count: usize,
    batch: usize,
    (rank, world): (usize, usize),
    round: usize,
) -> std::ops::Range<usize> {
    // Evenly, also where fewer captions are left than a batch for each rank.
    let start = (round * batch * world).min(count);
    let left = (count - start).min(batch * world);
    start + left * rank / world..start + left * (rank + 1) / world
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_caption_is_encoded_once_in_any_world() {
        for count in [0, 1, 5, 16, 17, 100] {
            for (batch, world) in [(1, 1), (16, 1), (16, 2), (3, 4), (16, 7)] {
                let mut seen = vec![0; count];
                for round in 0..rounds(count, batch, world) {
                    let mut next = None;
                    for rank in 0..world {
                        let share = share(count, batch, (rank, world), round);
                        assert!(share.len() <= batch);
                        assert!(next.is_none_or(|next| next == share.start), "in rank order");
                        next = Some(share.end);
                        share.for_each(|index| seen[index] += 1);
                    }
                }
                assert!(seen.iter().all(|times| *times == 1), "{count} {batch} {world}: {seen:?}");
            }
        }
    }

    #[test]
    fn an_error_of_one_rank_reaches_all() {
        let group = Comm::local_group(3).unwrap();
        std::thread::scope(|scope| {
            for comm in &group {
                scope.spawn(move || {
                    let failed = comm.rank() == 1;
                    let result = if failed { Err(anyhow::anyhow!("no space")) } else { Ok(()) };
                    let told = exchange(comm, Said::outcome(&result), &[comm.rank() as u8; 3]);
                    match told {
                        Ok(all) => {
                            assert!(failed, "rank {}", comm.rank());
                            assert_eq!(all[2].1, [2, 2, 2]);
                        }
                        Err(error) => {
                            assert_eq!(error.to_string(), "rank 1 reported: no space");
                        }
                    }
                });
            }
        });
    }
}
