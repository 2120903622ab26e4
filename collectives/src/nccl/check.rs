//! Do the cards of this host reach each other? A communicator with one thread per card, one sum.

use std::path::Path;
use std::time::{Duration, Instant};

use super::Nccl;
use crate::comm::Comm;
use crate::error::{CollectiveError, Result};

/// Deadline of the trial: making a communicator of eight cards takes some seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// What a card's thread needs for the trial; made on that thread, with the card's context current on
/// it.
pub struct Site<'a> {
    /// One float on the card.
    pub address: u64,
    /// A stream of the card.
    pub stream: u64,
    /// Sets the float, before what the stream does next.
    pub write: Box<dyn Fn(f32) -> std::result::Result<(), String> + 'a>,
    /// Waits for the stream and gives the float.
    pub read: Box<dyn Fn() -> std::result::Result<f32, String> + 'a>,
}

/// Sums one number over the cards `cards` of this process and gives a line about it: NCCL's version,
/// cards, time. `open` is called on a thread of its own for each card, makes the card's context
/// current there and gives a place on it.
pub fn check<'a>(
    library: &Path,
    cards: &[i32],
    open: impl Fn(i32) -> std::result::Result<Site<'a>, String> + Sync,
) -> Result<String> {
    check_with(cards, |comm, card| {
        let trouble = |op: &str, why: String| {
            let error = CollectiveError::Nccl { rank: comm.rank(), op: op.to_owned(), why };
            comm.abort(&error.to_string());
            error
        };
        let site = open(card).map_err(|why| trouble("open the card", why))?;
        let nccl = Nccl::connect(comm, library, card)?;
        (site.write)((comm.rank() + 1) as f32).map_err(|why| trouble("write", why))?;
        nccl.arm(LIMIT);
        nccl.all_reduce(site.address, 1, site.stream)?;
        let read = (site.read)();
        nccl.disarm()?;
        Ok((nccl.version().to_owned(), read.map_err(|why| trouble("read", why))?))
    })
}

/// Runs `sum` for every card on a thread of its own and compares the sums.
fn check_with(
    cards: &[i32],
    sum: impl Fn(&Comm, i32) -> Result<(String, f32)> + Sync,
) -> Result<String> {
    let start = Instant::now();
    let group = Comm::local_group(cards.len().max(1))?;
    let sum = &sum;
    let results: Vec<Result<(String, f32)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = group
            .into_iter()
            .zip(cards)
            .map(|(comm, card)| {
                scope.spawn(move || {
                    comm.set_deadline(LIMIT);
                    sum(&comm, *card)
                })
            })
            .collect();
        let ended = threads.into_iter().enumerate().map(|(rank, thread)| {
            let panicked = || "the thread of its card panicked".to_owned();
            thread.join().unwrap_or_else(|_| Err(CollectiveError::Thread { rank, why: panicked() }))
        });
        ended.collect()
    });
    // What others were told comes after what somebody saw.
    let told = |result: &Result<_>| matches!(result, Err(CollectiveError::Aborted { .. }));
    if let Some(Err(error)) = results
        .iter()
        .find(|result| result.is_err() && !told(result))
        .or_else(|| results.iter().find(|result| result.is_err()))
    {
        return Err(error.clone());
    }
    let expected = (cards.len() * (cards.len() + 1) / 2) as f32;
    let mut version = String::new();
    for (rank, result) in results.into_iter().enumerate() {
        let (name, got) = result?;
        if got != expected {
            let why =
                format!("card {} has a wrong sum, expected {expected}, got: {got}", cards[rank]);
            return Err(CollectiveError::Nccl { rank, op: "all-reduce".to_owned(), why });
        }
        version = name;
    }
    let noun = if cards.len() == 1 { "card" } else { "cards" };
    let list: Vec<String> = cards.iter().map(i32::to_string).collect();
    let seconds = start.elapsed().as_secs_f64();
    Ok(format!("NCCL {version} sums over {noun} {} in {seconds:.1} s", list.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_sum_and_a_lost_card_are_told() {
        let add = |comm: &Comm, _: i32| -> Result<(String, f32)> {
            let mut value = [(comm.rank() + 1) as f32];
            comm.all_reduce(&mut value)?;
            Ok(("2.28.9".to_owned(), value[0]))
        };
        let line = check_with(&[0, 2, 3], add).unwrap();
        assert!(line.starts_with("NCCL 2.28.9 sums over cards 0, 2, 3 in "), "{line}");
        let wrong = check_with(&[4, 5], |comm, _| Ok((String::new(), comm.rank() as f32 + 2.)));
        let wrong = wrong.unwrap_err().to_string();
        assert!(wrong.contains("card 4 has a wrong sum, expected 3, got: 2"), "{wrong}");
        let lost = check_with(&[0, 1], |comm, card| {
            if card == 1 {
                comm.abort("fell off the bus");
                let why = "fell off the bus".to_owned();
                return Err(CollectiveError::Nccl { rank: 1, op: "open".to_owned(), why });
            }
            add(comm, card)
        });
        let lost = lost.unwrap_err().to_string();
        assert!(lost.contains("NCCL failed on rank 1 in `open`: fell off the bus"), "{lost}");
    }

    #[test]
    fn a_library_that_is_missing_is_told_by_every_card() {
        let open = |_| -> std::result::Result<Site<'static>, String> {
            let (write, read) = (Box::new(|_| Ok(())), Box::new(|| Ok(0.)));
            Ok(Site { address: 0, stream: 0, write, read })
        };
        let error = check(Path::new("/nowhere/libnccl.so.2"), &[0, 1], open).unwrap_err();
        assert!(matches!(error, CollectiveError::NcclMissing { rank: 0, .. }), "{error}");
        assert!(error.to_string().contains("rank 0, /nowhere/libnccl.so.2: "), "{error}");
    }
}
