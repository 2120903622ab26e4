//! Ranks that `mpirun` starts; with the feature `mpi` alone, and an `mpirun` on this machine.

#![cfg(feature = "mpi")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::process::{Command, Output};
use std::time::Duration;

use collectives::{Comm, Env};

/// What rank `rank` brings: numbers whose sum depends on the order.
fn values(rank: usize, length: usize) -> Vec<f32> {
    (0..length).map(|n| 1.1_f32.powi((n % 97) as i32) * (rank as f32 - 1.3)).collect()
}

/// The sum of four, one after the other or in pairs.
fn sum_of_four(length: usize, in_pairs: bool) -> Vec<f32> {
    let all: Vec<Vec<f32>> = (0..4).map(|rank| values(rank, length)).collect();
    (0..length)
        .map(|n| match in_pairs {
            false => ((all[0][n] + all[1][n]) + all[2][n]) + all[3][n],
            true => (all[0][n] + all[1][n]) + (all[2][n] + all[3][n]),
        })
        .collect()
}

/// One rank, when `mpirun` has started this.
#[test]
#[ignore = "started by the others, through mpirun"]
fn a_rank() {
    let env = Env::from_process().unwrap();
    assert!(env.by_mpi);
    let comm = Comm::connect(&env).unwrap();
    if std::env::var_os("TEST_OF_DEATH").is_some() {
        comm.barrier().unwrap();
        if comm.rank() == 2 {
            std::process::abort();
        }
        comm.set_deadline(Duration::from_secs(300));
        comm.barrier().unwrap();
        return;
    }
    if std::env::var_os("TEST_OF_DEADLINE").is_some() {
        comm.set_deadline(Duration::from_millis(300));
        if comm.rank() == 1 {
            std::thread::sleep(Duration::from_secs(600));
        }
        drop(comm.barrier());
        return;
    }
    for length in [0, 1, 5, 1000, 100_003] {
        let mut sum = values(comm.rank(), length);
        comm.all_reduce(&mut sum).unwrap();
        assert!(sum == sum_of_four(length, false), "{length}");
        let mut sum = values(comm.rank(), length);
        comm.all_reduce_in_pairs(&mut sum).unwrap();
        assert!(sum == sum_of_four(length, true), "{length} in pairs");
        let pending = comm.all_reduce_start(values(comm.rank(), length));
        assert!(pending.wait().unwrap() == sum_of_four(length, false), "{length} started");
    }
    let own = vec![comm.rank() as u8; comm.rank() * 3];
    let all = comm.all_gather(&own).unwrap();
    assert_eq!(all, (0..4).map(|rank| vec![rank as u8; rank * 3]).collect::<Vec<_>>());
    for root in 0..4 {
        let bytes = if comm.rank() == root { b"from the root".to_vec() } else { b"x".to_vec() };
        assert_eq!(comm.broadcast(root, bytes).unwrap(), b"from the root");
    }
    assert!(comm.broadcast(4, Vec::new()).is_err());
    let mut unequal = vec![0.0; 2 + usize::from(comm.rank() == 3)];
    let error = comm.all_reduce(&mut unequal).unwrap_err().to_string();
    assert!(error.contains("2 floats") && error.contains("3 floats"), "{error}");
    println!("rank {} is content", comm.rank());
}

fn four_ranks(variable: &str) -> Output {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", "4"]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "a_rank", "--ignored", "--nocapture"]).env(variable, "1");
    command.output().expect("mpirun is installed")
}

fn text(output: &Output) -> String {
    let words = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&words).into_owned()
}

#[test]
fn ranks_of_mpi_sum_as_others_do() {
    let output = four_ranks("TEST_OF_SUMS");
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for rank in 0..4 {
        assert!(said.contains(&format!("rank {rank} is content")), "{said}");
    }
}

#[test]
fn a_dead_rank_ends_the_job() {
    let output = four_ranks("TEST_OF_DEATH");
    assert!(!output.status.success(), "{}", text(&output));
}

#[test]
fn a_rank_that_does_not_come_ends_the_job_by_name() {
    let output = four_ranks("TEST_OF_DEADLINE");
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("`barrier` number 1") && said.contains("rank"), "{said}");
}
