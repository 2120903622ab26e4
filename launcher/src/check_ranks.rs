//! `lorarun check-ranks`: the ranks of this machine meet, sum numbers whose sums are known, compare
//! what they got bit for bit, and say how long it took. No model, no data: what is wrong here is the
//! machine or the launcher.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use collectives::{Comm, Env, Moment, Phase, Snapshots, exit_code, report_failure, signals};

use crate::fault::{Fault, WrongConfiguration};
use crate::output::{print_data, tell};
use crate::summary::host_name;

/// Options of `check-ranks`.
#[derive(Debug, Args)]
pub struct Options {
    /// Sizes to sum, in bytes or with kB, MB, GB
    #[arg(long, value_name = "SIZES", value_delimiter = ',', default_value = "4kB,1MB,10MB",
          value_parser = parse_size)]
    sizes: Vec<usize>,

    /// Rounds per size; 0 goes on until it is stopped
    #[arg(long, value_name = "N", default_value = "20")]
    rounds: u64,

    /// Pause before each round, in milliseconds
    #[arg(long = "pause_ms", alias = "pause-ms", value_name = "MS", default_value = "0")]
    pause_ms: u64,

    /// Make a rank fail: RANK:ROUND:KIND
    #[arg(long, value_name = "FAULT", hide = true)]
    fault: Vec<Fault>,
}

/// Times of one size, in the order of the rounds.
struct Times {
    bytes: usize,
    rounds: Vec<Duration>,
}

/// Runs the check on this rank and returns its exit code.
pub fn run(options: &Options, env: &Env) -> i32 {
    match check(options, env) {
        Ok(()) => exit_code::DONE,
        Err(error) => {
            report_failure(env, &format!("error: {error:#}"));
            if error.is::<WrongConfiguration>() {
                exit_code::CONFIGURATION
            } else {
                exit_code::FAILURE
            }
        }
    }
}

fn check(options: &Options, env: &Env) -> Result<()> {
    let comm = Comm::connect(env).context("cannot join the other ranks")?;
    let outcome = Memory::open(env).and_then(|memory| exercise(options, &comm, &memory));
    if let Err(error) = &outcome {
        comm.abort(&format!("{error:#}"));
    }
    outcome
}

/// Where to go on after a failure: what a trainer keeps whole is here the number of a round.
struct Memory {
    /// On the first rank of each host, where ranks may start again.
    snapshots: Option<Snapshots>,
    every: u64,
    generation: u64,
}

impl Memory {
    fn open(env: &Env) -> Result<Memory> {
        let snapshots = env.snapshot_fd.map(Snapshots::attach).transpose();
        let snapshots = snapshots.context("cannot open the memory for snapshots")?;
        let every = env.snapshot_every.unwrap_or(u64::MAX);
        Ok(Memory { snapshots, every, generation: env.generation })
    }

    /// The round to begin with, the same on all ranks.
    fn first_round(&self, comm: &Comm) -> Result<u64> {
        let newest = self.snapshots.as_ref().and_then(Snapshots::newest);
        let own = newest.map_or(0, |moment| moment.step);
        let agreed = comm.broadcast(0, own.to_le_bytes().to_vec())?;
        Ok(agreed.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }

    /// Notes that all rounds before this one are done.
    fn note(&self, round: u64) -> Result<()> {
        let Some(snapshots) = self.snapshots.as_ref().filter(|_| round.is_multiple_of(self.every))
        else {
            return Ok(());
        };
        let moment = Moment { generation: self.generation, step: round };
        snapshots.write(moment, &[]).context("cannot write a snapshot")
    }
}

fn exercise(options: &Options, comm: &Comm, memory: &Memory) -> Result<()> {
    let names = comm.all_gather(host_name().as_bytes())?;
    ensure!(names.len() == comm.world_size(), "number of ranks that answered: {}", names.len());
    if comm.rank() == 0 {
        let host = String::from_utf8_lossy(&names[0]);
        print_data(&format!("ranks: {}, host: {host}\n", comm.world_size()));
        if comm.world_size() == 1 {
            tell("hint: one rank has nobody to talk to; try `--num_processes 2`");
        }
    }
    let first = memory.first_round(comm)?;
    if first > 0 && comm.rank() == 0 {
        print_data(&format!("going on from round {first}\n"));
    }
    comm.enter_phase(Phase::Training);
    let all = options.rounds as usize * options.sizes.len();
    let mut round = 0;
    for &bytes in &options.sizes {
        let mut times = Times { bytes, rounds: Vec::new() };
        let mut values = vec![0.0; bytes / size_of::<f32>()];
        let last = round + options.rounds;
        while options.rounds == 0 || round < last {
            if round < first {
                round += 1;
                continue;
            }
            if all_agree_to_stop(comm)? {
                if comm.rank() == 0 {
                    print_data(&format!("stopped before round {round}\n"));
                }
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(options.pause_ms));
            for fault in &options.fault {
                fault.strike(comm, memory.generation, round)?;
            }
            times.rounds.push(sum_once(comm, &mut values, round)?);
            if options.rounds == 0 && comm.rank() == 0 {
                print_data(&format!("round {round} done\n"));
            }
            round += 1;
            comm.finish_step((round as usize, all), f32::NAN, 0.0);
            memory.note(round)?;
        }
        sum_in_parts(comm, &mut values, round)?;
        if comm.rank() == 0 {
            print_data(&times.describe());
        }
    }
    if comm.rank() == 0 {
        print_data("all sums are right, bit for bit the same on all ranks\n");
    }
    Ok(())
}

/// Whether any rank was asked to stop: all of them answer the same in the same round.
fn all_agree_to_stop(comm: &Comm) -> Result<bool> {
    let asked = comm.all_gather(&[u8::from(signals::stop_requested())])?;
    Ok(asked.iter().any(|rank| rank.first() == Some(&1)))
}

/// One timed sum, checked.
fn sum_once(comm: &Comm, values: &mut [f32], round: u64) -> Result<Duration> {
    fill(values, comm.rank(), round);
    comm.barrier()?;
    let start = Instant::now();
    comm.all_reduce(values)?;
    let time = start.elapsed();
    verify(comm, values, round)?;
    Ok(time)
}

/// The same sum in parts that are started first and waited for later, as a trainer does it.
fn sum_in_parts(comm: &Comm, values: &mut [f32], round: u64) -> Result<()> {
    fill(values, comm.rank(), round);
    let part = values.len().div_ceil(5).max(1);
    let started: Vec<_> =
        values.chunks(part).map(|part| comm.all_reduce_start(part.to_vec())).collect();
    for (target, pending) in values.chunks_mut(part).zip(started) {
        target.copy_from_slice(&pending.wait()?);
    }
    verify(comm, values, round)
}

/// After this many values, a prime number, they begin again.
const PERIOD: usize = 1021;

/// Eighths below 128: their sums over up to 256 ranks are exact in `f32`.
fn value(rank: usize, index: usize, round: u64) -> f32 {
    ((index + 31 * rank + 7 * (round % 1000) as usize) % PERIOD) as f32 / 8.0
}

fn fill(values: &mut [f32], rank: usize, round: u64) {
    let period: Vec<f32> = (0..PERIOD).map(|index| value(rank, index, round)).collect();
    for part in values.chunks_mut(PERIOD) {
        part.copy_from_slice(&period[..part.len()]);
    }
}

/// Checks every sum, and that all ranks hold the same bits.
fn verify(comm: &Comm, values: &[f32], round: u64) -> Result<()> {
    let sum = |index| (0..comm.world_size()).map(|rank| value(rank, index, round)).sum();
    let period: Vec<f32> = (0..PERIOD).map(sum).collect();
    let mut mark = 0u64;
    for (count, part) in values.chunks(PERIOD).enumerate() {
        let wrong = part.iter().zip(&period).position(|(got, expected)| got != expected);
        if let Some(index) = wrong {
            bail!(
                "wrong sum in round {round} at element {} of {} on rank {}, expected {}, got: {}",
                count * PERIOD + index,
                values.len(),
                comm.rank(),
                period[index],
                part[index]
            );
        }
        // Equal values may still differ in the sign of zero.
        mark = part.iter().fold(mark, |mark, got| mark.rotate_left(5) ^ u64::from(got.to_bits()));
    }
    let marks = comm.all_gather(&mark.to_le_bytes())?;
    for (rank, other) in marks.iter().enumerate() {
        ensure!(
            *other == marks[0],
            "ranks hold different sums of {} values in round {round}: ranks 0 and {rank}",
            values.len()
        );
    }
    Ok(())
}

impl Times {
    /// One line: size, median, best and worst time, and the bytes summed per second.
    fn describe(&self) -> String {
        let mut sorted = self.rounds.clone();
        sorted.sort();
        let Some((&best, &worst)) = sorted.first().zip(sorted.last()) else {
            return String::new();
        };
        let median = sorted[sorted.len() / 2];
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        format!(
            "all_reduce {:>11} bytes  median {:>9.3} ms  best {:>9.3} ms  worst {:>9.3} ms  \
             {:>6.2} GB/s\n",
            self.bytes,
            ms(median),
            ms(best),
            ms(worst),
            self.bytes as f64 / median.as_secs_f64() / 1e9
        )
    }
}

fn parse_size(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: usize = match &text[digits.len()..] {
        "" | "B" => 1,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        other => return Err(format!("unit should be kB, MB or GB, got: {other}")),
    };
    let count: usize = digits.parse().map_err(|_| "a size like 10MB is needed".to_owned())?;
    count.checked_mul(unit).ok_or_else(|| "the size is too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed_or_refused() {
        assert_eq!(parse_size("10MB"), Ok(10_000_000));
        assert_eq!(parse_size("4kB"), Ok(4_000));
        assert_eq!(parse_size("7"), Ok(7));
        for text in ["", "MB", "1XB", "-1MB", "99999999999999GB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_wrong_sum_is_found_and_placed() {
        let comm = Comm::single();
        let mut values = vec![0.0; 3000];
        fill(&mut values, 0, 3);
        assert_eq!(values[2500], value(0, 2500, 3));
        verify(&comm, &values, 3).unwrap();
        values[2500] += 0.125;
        let message = verify(&comm, &values, 3).unwrap_err().to_string();
        assert!(message.contains("element 2500 of 3000 on rank 0"), "{message}");
    }
}
