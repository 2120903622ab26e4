//! Collectives between ranks that are threads over one segment: right sums, identical bits, errors.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use collectives::{CollectiveError, Comm};

/// Runs `rank_main` on every rank of a group and returns the results by rank.
fn on_all_ranks<T: Send>(world_size: usize, rank_main: impl Fn(Comm) -> T + Sync) -> Vec<T> {
    let group = Comm::local_group(world_size).unwrap();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = group.into_iter().map(|comm| scope.spawn(|| rank_main(comm))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A reproducible value of `rank` at `index` whose sums depend on the order of addition.
fn value(rank: usize, index: usize, round: usize) -> f32 {
    let mut state = (rank as u64) << 40 ^ (round as u64) << 32 ^ index as u64;
    state = state.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    state ^= state >> 29;
    state = state.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mantissa = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
    mantissa * 10f32.powi((state % 7) as i32 - 3)
}

fn values(rank: usize, length: usize, round: usize) -> Vec<f32> {
    (0..length).map(|index| value(rank, index, round)).collect()
}

/// The sum in rank order.
fn expected(world_size: usize, length: usize, round: usize) -> Vec<u32> {
    let sum = |index| {
        (1..world_size).fold(value(0, index, round), |sum, rank| sum + value(rank, index, round))
    };
    (0..length).map(|index| sum(index).to_bits()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Around line, shard, block and chunk boundaries, and several chunks.
const LENGTHS: [usize; 16] =
    [0, 1, 2, 15, 16, 17, 63, 1000, 4096, 4097, 65_536, 131_071, 131_072, 131_073, 400_003, 0];

#[test]
fn sums_are_those_in_rank_order_bit_for_bit() {
    for world_size in 1..=4 {
        on_all_ranks(world_size, |comm| {
            for (round, length) in LENGTHS.into_iter().enumerate() {
                let mut sum = values(comm.rank(), length, round);
                comm.all_reduce(&mut sum).unwrap();
                assert!(
                    bits(&sum) == expected(world_size, length, round),
                    "rank {} of {world_size}, {length} floats",
                    comm.rank()
                );
            }
        });
    }
}

#[test]
fn sums_in_pairs_are_those_of_halving_bit_for_bit() {
    for world_size in [1, 2, 4] {
        on_all_ranks(world_size, |comm| {
            for (round, length) in LENGTHS.into_iter().enumerate() {
                let mut sum = values(comm.rank(), length, round);
                comm.all_reduce_in_pairs(&mut sum).unwrap();
                let value = |rank, index| value(rank, index, round);
                let halves = |index| match world_size {
                    1 => value(0, index),
                    2 => value(0, index) + value(1, index),
                    _ => (value(0, index) + value(1, index)) + (value(2, index) + value(3, index)),
                };
                let expected: Vec<f32> = (0..length).map(halves).collect();
                assert!(bits(&sum) == bits(&expected), "{world_size} ranks, {length} floats");
            }
        });
    }
}

#[test]
fn started_sums_arrive_in_order_whatever_the_timing() {
    for world_size in 1..=4 {
        on_all_ranks(world_size, |comm| {
            let mut pending = Vec::new();
            for (round, length) in LENGTHS.into_iter().enumerate() {
                if (round + comm.rank()) % 3 == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
                pending.push(comm.all_reduce_start(values(comm.rank(), length, round)));
            }
            // A call on this thread goes behind the started ones.
            let everyone = comm.all_gather(&[comm.rank() as u8]).unwrap();
            assert_eq!(everyone.concat(), (0..world_size as u8).collect::<Vec<_>>());
            for (round, (sum, length)) in pending.into_iter().zip(LENGTHS).enumerate() {
                assert!(bits(&sum.wait().unwrap()) == expected(world_size, length, round));
            }
        });
    }
}

#[test]
fn collectives_of_all_kinds_follow_each_other() {
    // Mixed kinds and sizes, many rounds: every buffer and both announcements are reused often.
    on_all_ranks(3, |comm| {
        for round in 0..400 {
            let length = (round * 7919) % 5000;
            match round % 4 {
                0 => comm.barrier().unwrap(),
                1 => {
                    let root = round % 3;
                    let own = vec![comm.rank() as u8; if comm.rank() == root { length } else { 9 }];
                    assert_eq!(comm.broadcast(root, own).unwrap(), vec![root as u8; length]);
                }
                2 => {
                    let own = vec![comm.rank() as u8; length * comm.rank()];
                    for (rank, bytes) in comm.all_gather(&own).unwrap().into_iter().enumerate() {
                        assert_eq!(bytes, vec![rank as u8; length * rank]);
                    }
                }
                _ => {
                    let mut sum = values(comm.rank(), length, round);
                    comm.all_reduce(&mut sum).unwrap();
                    assert!(bits(&sum) == expected(3, length, round));
                }
            }
        }
    });
}

#[test]
fn long_messages_take_several_buffers() {
    let long: Arc<Vec<u8>> = Arc::new((0..1_700_001usize).map(|i| ((i * i) >> 5) as u8).collect());
    on_all_ranks(4, |comm| {
        let own = if comm.rank() == 2 { long.to_vec() } else { Vec::new() };
        assert!(comm.broadcast(2, own).unwrap() == *long);
        let own = &long[..long.len() >> (2 * comm.rank())];
        for (rank, bytes) in comm.all_gather(own).unwrap().into_iter().enumerate() {
            assert!(bytes == long[..long.len() >> (2 * rank)]);
        }
    });
}

#[test]
fn nan_and_infinity_reach_every_rank() {
    let sums = on_all_ranks(3, |comm| {
        let mut values = match comm.rank() {
            0 => vec![f32::NAN, f32::INFINITY, -0.0],
            1 => vec![1.0, f32::NEG_INFINITY, -0.0],
            _ => vec![1.0, 1.0, -0.0],
        };
        comm.all_reduce(&mut values).unwrap();
        assert!(values[0].is_nan() && values[1].is_nan());
        assert_eq!(values[2].to_bits(), (-0.0f32).to_bits());
        bits(&values)
    });
    assert!(sums.iter().all(|sum| *sum == sums[0]));
}

#[test]
fn an_abort_wakes_waiting_ranks_at_once_with_its_reason() {
    let outcomes = on_all_ranks(3, |comm| {
        if comm.rank() == 1 {
            std::thread::sleep(Duration::from_millis(100));
            comm.abort("loss is not finite");
            return (Duration::ZERO, comm.barrier().unwrap_err());
        }
        comm.check_aborted().unwrap();
        let start = Instant::now();
        let error = comm.barrier().unwrap_err();
        assert!(comm.check_aborted().is_err());
        (start.elapsed(), error)
    });
    for (waited, error) in outcomes {
        assert!(waited < Duration::from_secs(1), "{waited:?}");
        assert_eq!(error.to_string(), "stopped by rank 1: loss is not finite");
    }
}

#[test]
fn a_deadline_names_the_missing_ranks() {
    let outcomes = on_all_ranks(4, |comm| {
        comm.set_deadline(Duration::from_millis(300));
        comm.barrier().unwrap();
        if comm.rank() % 2 == 1 {
            // Stays in the group, does not come.
            while comm.check_aborted().is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
            return None;
        }
        Some(comm.all_reduce(&mut [1.0; 5]).unwrap_err())
    });
    let mut own = 0;
    for error in outcomes.into_iter().flatten() {
        if let CollectiveError::Deadline { missing_ranks, seq, .. } = &error {
            assert_eq!((missing_ranks.as_slice(), *seq), (&[1, 3][..], 3));
            own += 1;
        }
        let message = error.to_string();
        assert!(message.contains("all_reduce of 5 floats"), "{message}");
        assert!(message.contains("ranks 1, 3"), "{message}");
    }
    assert!(own >= 1);
}

#[test]
fn a_mismatch_names_both_calls() {
    for error in on_all_ranks(2, |comm| {
        if comm.rank() == 0 {
            comm.all_reduce(&mut [0.0; 10]).unwrap_err()
        } else {
            comm.all_reduce(&mut [0.0; 20]).unwrap_err()
        }
    }) {
        let message = error.to_string();
        assert!(message.contains("all_reduce of 10 floats"), "{message}");
        assert!(message.contains("all_reduce of 20 floats"), "{message}");
    }
    for error in on_all_ranks(2, |comm| {
        if comm.rank() == 0 {
            comm.barrier().unwrap_err()
        } else {
            comm.broadcast(1, vec![1; 100]).unwrap_err()
        }
    }) {
        let message = error.to_string();
        assert!(message.contains("`barrier`"), "{message}");
        assert!(message.contains("`broadcast from rank 1`"), "{message}");
    }
    for error in on_all_ranks(2, |comm| {
        if comm.rank() == 0 {
            comm.barrier().unwrap_err()
        } else {
            comm.all_reduce(&mut [0.0; 3]).unwrap_err()
        }
    }) {
        assert!(error.to_string().contains("`all_reduce of 3 floats`"), "{error}");
    }
}

#[test]
fn a_rank_that_leaves_is_missed_by_those_who_wait() {
    let outcomes = on_all_ranks(3, |comm| {
        comm.barrier().unwrap();
        if comm.rank() == 2 {
            return None;
        }
        let pending = comm.all_reduce_start(vec![1.0; 100]);
        let error = pending.wait().unwrap_err();
        // The group is finished: the same error again, without waiting.
        assert_eq!(comm.barrier().unwrap_err().to_string(), error.to_string());
        Some(error.to_string())
    });
    for message in outcomes.into_iter().flatten() {
        assert!(message.contains("rank 2 is gone before"), "{message}");
        assert!(message.contains("it left the group"), "{message}");
    }
}

#[test]
fn a_panic_of_one_rank_stops_the_others() {
    let group = Comm::local_group(2).unwrap();
    let mut ranks = group.into_iter().map(|comm| {
        std::thread::spawn(move || {
            assert!(comm.rank() == 0, "rank 1 panics on purpose");
            comm.barrier().unwrap_err().to_string()
        })
    });
    let (first, second) = (ranks.next().unwrap(), ranks.next().unwrap());
    assert!(second.join().is_err());
    assert_eq!(first.join().unwrap(), "stopped by rank 1: it panicked");
}

#[test]
fn a_root_outside_the_group_is_refused() {
    let error = Comm::single().broadcast(1, Vec::new()).unwrap_err().to_string();
    assert!(error.ends_with("outside the group of 1: 1"), "{error}");
    for error in on_all_ranks(2, |comm| comm.broadcast(2, Vec::new()).unwrap_err().to_string()) {
        assert!(error.ends_with("outside the group of 2: 2"), "{error}");
    }
}
