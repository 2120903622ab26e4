//! How gradients on cards are summed over the ranks: by NCCL, or over the host.
//!
//! All ranks take the same way. NCCL sums on a stream of its own, behind what the card has been given
//! so far; the host waits only where it reads results, and a watchdog ends that wait when a rank is
//! lost ([`Reducer::arm`]). Over the host, the numbers go from the card through the ranks' shared
//! memory and back.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use collectives::nccl::Nccl;
use collectives::{CollectiveError, Comm, Env, Pending, ReduceWay};
use engine::Tensor;
use engine::cuda::Card;
use engine::cuda::driver::Stream;
use engine::cuda::nvidia::{self, Library};

use crate::console;
use crate::memory::show_bytes;

/// The way from card to card.
pub enum Reducer {
    /// One rank: nothing to do.
    Alone,
    /// Through the host and the ranks' shared memory.
    Staged(Staged),
    /// From card to card.
    Nccl(OnCards),
}

/// Sums over the host.
pub struct Staged {
    /// Why not by NCCL.
    why: String,
    under_way: Vec<(Range<usize>, Pending)>,
    told: bool,
}

/// Sums by NCCL.
pub struct OnCards {
    nccl: Nccl,
    card: &'static Card,
}

/// What the environment says about the way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ways {
    way: ReduceWay,
    nccl_on_shared_card: bool,
}

impl From<&Env> for Ways {
    fn from(env: &Env) -> Self {
        Self { way: env.reduce, nccl_on_shared_card: env.nccl_on_shared_card }
    }
}

impl Reducer {
    /// The way for the ranks of `comm`, each with a card. All ranks call it together.
    pub fn connect(comm: &Comm, card: &'static Card, ways: Ways) -> Result<Self> {
        if comm.world_size() == 1 {
            return Ok(Self::Alone);
        }
        let identity = card.driver().identity().unwrap_or_default();
        let identities = comm.all_gather(identity.as_bytes())?;
        let obstacle = match ways.way {
            ReduceWay::Staged => Some("`LORARUN_REDUCE` asks for it".to_owned()),
            _ => obstacle(&identities, ways.nccl_on_shared_card),
        };
        let why = match obstacle {
            Some(why) => why,
            None => match connect_nccl(comm, card) {
                Ok(nccl) => {
                    if comm.rank() == 0 {
                        let version = nccl.version();
                        console::note(&format!("gradients are summed by NCCL {version}"));
                    }
                    return Ok(Self::Nccl(OnCards { nccl, card }));
                }
                // All ranks get this one; with any other the ranks are out of step.
                Err(error) => match error.downcast_ref::<CollectiveError>() {
                    Some(CollectiveError::NcclMissing { .. }) => format!("{error:#}"),
                    _ => return Err(error),
                },
            },
        };
        if ways.way == ReduceWay::Nccl {
            bail!("`LORARUN_REDUCE` asks for NCCL, but {why}");
        }
        Ok(Self::Staged(Staged { why, under_way: Vec::new(), told: false }))
    }

    /// Whether there is nothing to reduce.
    pub fn is_alone(&self) -> bool {
        matches!(self, Self::Alone)
    }

    /// Starts the sum of `range` of the f32 tensor `flat` over the ranks; all ranks in the same order.
    pub fn start(&mut self, comm: &Comm, flat: &Tensor, range: Range<usize>) -> Result<()> {
        let part = || flat.view(range.start, &[range.len()]);
        match self {
            Self::Alone => (),
            Self::Staged(staged) => {
                let values = part()?.to_vec_f32()?;
                staged.under_way.push((range, comm.all_reduce_start(values)));
            }
            Self::Nccl(OnCards { nccl, card }) => {
                let driver = card.driver();
                driver.order(Stream::Compute, Stream::Reduce)?;
                let address = part()?.address("all-reduce")?;
                nccl.all_reduce(address, range.len(), driver.raw_stream(Stream::Reduce))
                    .context("gradient all-reduce")?;
            }
        }
        Ok(())
    }

    /// The sums are in place for what the card is given from now on. With NCCL the host does not wait.
    pub fn finish(&mut self, flat: &Tensor) -> Result<()> {
        match self {
            Self::Alone => (),
            Self::Staged(staged) => {
                let mut elements = 0;
                for (range, pending) in staged.under_way.drain(..) {
                    elements += range.len();
                    let values = pending.wait().context("gradient all-reduce")?;
                    flat.view(range.start, &[range.len()])?.refill(&values)?;
                }
                if !std::mem::replace(&mut staged.told, true) {
                    console::warn(&cost(&staged.why, elements));
                }
            }
            Self::Nccl(OnCards { card, .. }) => {
                card.driver().order(Stream::Reduce, Stream::Compute)?;
            }
        }
        Ok(())
    }

    /// Whether sums are work of the card like any other: the host waits for none of them, and they
    /// can be captured.
    pub fn is_on_cards(&self) -> bool {
        !matches!(self, Self::Staged(_))
    }

    /// From now on the host may wait for sums. With NCCL such a wait ends with an error at the
    /// deadline of `comm`, or when a rank is lost; see [`Reducer::conclude`].
    pub fn arm(&self, comm: &Comm) {
        if let Self::Nccl(OnCards { nccl, .. }) = self {
            nccl.arm(comm.deadline());
        }
    }

    /// The end of what [`Reducer::arm`] began: its result, or why the sums were ended, without which
    /// the result means nothing.
    pub fn conclude<T>(&self, result: Result<T>) -> Result<T> {
        let Self::Nccl(OnCards { nccl, .. }) = self else { return result };
        match result {
            Ok(value) => nccl.disarm().map(|()| value).context("gradient all-reduce"),
            // Sums that are under way will not be waited for: it stays armed, and ends by an abort.
            Err(error) => Err(match nccl.check() {
                Ok(()) => error,
                Err(cause) => anyhow::Error::new(cause).context("gradient all-reduce"),
            }),
        }
    }
}

fn connect_nccl(comm: &Comm, card: &'static Card) -> Result<Nccl> {
    // A rank without the library takes part in the agreement that there is none.
    let library = match nvidia::find(Library::Nccl) {
        Ok(found) => found.path.clone(),
        Err(_) => PathBuf::from("libnccl.so.2"),
    };
    // Every call of the driver makes the card's context current on the calling thread, and NCCL takes
    // the card whose context that is.
    card.driver().synchronize(Stream::Reduce)?;
    let label = &card.facts().label;
    let number = label.strip_prefix("cuda:").and_then(|number| number.parse().ok());
    let number = number.with_context(|| format!("a card has no number: {label}"))?;
    Ok(Nccl::connect(comm, &library, number)?)
}

/// What stands against NCCL between ranks whose cards have these names; empty for a card that is not
/// NVIDIA's.
fn obstacle(identities: &[Vec<u8>], nccl_on_shared_card: bool) -> Option<String> {
    if let Some(rank) = identities.iter().position(Vec::is_empty) {
        return Some(format!("NCCL does not know the card of rank {rank}"));
    }
    let mut owners: HashMap<&[u8], usize> = HashMap::new();
    for (rank, identity) in identities.iter().enumerate() {
        if let Some(first) = owners.insert(identity, rank)
            && !nccl_on_shared_card
        {
            return Some(format!("ranks {first} and {rank} share a card"));
        }
    }
    None
}

fn cost(why: &str, elements: usize) -> String {
    let bytes = show_bytes(elements * size_of::<f32>());
    format!(
        "gradients are summed over the host: in each step {bytes} go from each card and {bytes} to \
         it, while it waits; {why}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nccl_needs_a_card_of_its_own_for_each_rank() {
        let names = |names: &[&str]| names.iter().map(|name| name.as_bytes().to_vec()).collect();
        let own: Vec<Vec<u8>> = names(&["GPU-1", "GPU-2", "GPU-3"]);
        assert_eq!(obstacle(&own, false), None);
        let shared: Vec<Vec<u8>> = names(&["GPU-1", "GPU-2", "GPU-1"]);
        assert_eq!(obstacle(&shared, false).unwrap(), "ranks 0 and 2 share a card");
        assert_eq!(obstacle(&shared, true), None);
        let emulated: Vec<Vec<u8>> = names(&["GPU-1", ""]);
        assert_eq!(obstacle(&emulated, true).unwrap(), "NCCL does not know the card of rank 1");
    }

    #[test]
    fn the_way_over_the_host_says_what_it_costs() {
        let told = cost("ranks 0 and 1 share a card", 3 << 20);
        assert!(told.contains("12 MiB go from each card and 12 MiB to it"), "{told}");
        assert!(told.ends_with("; ranks 0 and 1 share a card"), "{told}");
    }
}
