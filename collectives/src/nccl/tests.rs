//! What this folder does around NCCL, with a fake one between threads.

use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fake::{Faults, Net};
use super::*;
use crate::env::Env;
use crate::segment::{Author, Segment};

const STREAM: u64 = 7;
const PATH: &str = "libnccl.so.2";

/// Runs `work` on every rank of a group whose collectives have one second.
fn ranks<T: Send>(world_size: usize, work: impl Fn(Comm) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let comms = Comm::local_group(world_size).unwrap();
        let threads: Vec<_> = comms
            .into_iter()
            .map(|comm| {
                comm.set_deadline(Duration::from_secs(1));
                scope.spawn(move || work(comm))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn connect(net: &Arc<Net>, comm: &Comm, faults: Faults) -> Result<Nccl> {
    let library = net.library(comm.rank(), faults);
    Nccl::over(comm, Ok(library), (Path::new(PATH), comm.rank() as i32))
}

/// One sum that rank 0 waits for and the other ranks never ask for; how it ended on rank 0 while
/// `others` happened on them.
fn abandoned(deadline: Duration, others: impl Fn(&Comm, &Net) + Sync) -> (String, Duration) {
    let net = Net::new(2);
    let ends = ranks(2, |comm| {
        let nccl = connect(&net, &comm, Faults::default()).unwrap();
        if comm.rank() == 1 {
            others(&comm, &net);
            // Hangs until rank 0 is through.
            net.synchronize(0);
            return None;
        }
        net.write(0, 64, &[1.]);
        let start = Instant::now();
        nccl.all_reduce(64, 1, STREAM).unwrap();
        nccl.arm(deadline);
        net.synchronize(0);
        let error = nccl.disarm().unwrap_err();
        let took = start.elapsed();
        assert_eq!(nccl.all_reduce(64, 1, STREAM).unwrap_err().to_string(), error.to_string());
        // The peers are told by the flag that all collectives poll.
        assert!(comm.check_aborted().is_err());
        Some((error.to_string(), took))
    });
    ends.into_iter().flatten().next().unwrap()
}

#[test]
fn ranks_share_one_id_and_get_sums() {
    let net = Net::new(3);
    ranks(3, |comm| {
        // Ranks whose NCCL takes its time, each another one.
        let faults = Faults { polls: 2 + 3 * comm.rank(), ..Faults::default() };
        let nccl = connect(&net, &comm, faults).unwrap();
        assert_eq!(nccl.version(), "2.28.9");
        let own = comm.rank() as f32;
        net.write(comm.rank(), 256, &[own, 1.]);
        net.write(comm.rank(), 512, &[own * 10.]);
        nccl.all_reduce(256, 2, STREAM).unwrap();
        nccl.all_reduce(512, 1, STREAM).unwrap();
        nccl.arm(Duration::from_secs(5));
        net.synchronize(comm.rank());
        nccl.disarm().unwrap();
        assert_eq!(net.read(comm.rank(), 256), [3., 3.]);
        assert_eq!(net.read(comm.rank(), 512), [30.]);
        comm.barrier().unwrap();
    });
    assert_eq!(net.ids().len(), 1);
    // Ended in good order: finalized, then destroyed, none aborted.
    assert_eq!(net.ended(), [0, 3, 3]);
}

#[test]
fn a_rank_that_hangs_is_named_when_the_deadline_passes() {
    let (error, took) = abandoned(Duration::from_millis(300), |_, _| ());
    assert!(error.starts_with("deadline of 3"), "{error}");
    assert!(error.ends_with("in `NCCL all-reduce` number 1: waiting for rank 1"), "{error}");
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn a_rank_that_calls_for_a_stop_ends_the_wait_at_once() {
    let (error, took) = abandoned(Duration::from_secs(60), |comm, _| {
        std::thread::sleep(Duration::from_millis(100));
        comm.abort("disk full");
    });
    assert_eq!(error, "stopped by rank 1: disk full");
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn an_error_that_nccl_notices_itself_ends_the_wait() {
    let (error, took) = abandoned(Duration::from_secs(60), |_, net| {
        std::thread::sleep(Duration::from_millis(100));
        net.break_rank(0, 6);
    });
    let expected = "NCCL failed on rank 0 in `NCCL all-reduce`: remote process exited or there was \
                    a network error (6)";
    assert!(error.starts_with(expected), "{error}");
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn a_rank_that_left_is_named() {
    let net = Net::new(2);
    let ends = ranks(2, |comm| {
        let nccl = connect(&net, &comm, Faults::default()).unwrap();
        if comm.rank() == 1 {
            // Comm and communicator are dropped: the rank leaves.
            return None;
        }
        net.write(0, 64, &[1.]);
        nccl.all_reduce(64, 1, STREAM).unwrap();
        nccl.arm(Duration::from_secs(60));
        net.synchronize(0);
        Some(nccl.disarm().unwrap_err().to_string())
    });
    let error = ends.into_iter().flatten().next().unwrap();
    let expected = "rank 1 is gone before `NCCL all-reduce` number 1: it left the group";
    assert_eq!(error, expected);
    assert_eq!(net.ended(), [1, 1, 1]);
}

#[test]
fn an_error_of_the_network_is_blamed_on_the_rank_that_is_gone() {
    let net = Net::new(2);
    let ends = ranks(2, |comm| {
        let nccl = connect(&net, &comm, Faults::default()).unwrap();
        if comm.rank() == 1 {
            return None;
        }
        net.write(0, 64, &[1.]);
        // Until the other rank has left.
        while comm.witness().lost_peer().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        net.break_rank(0, 6);
        nccl.arm(Duration::from_secs(60));
        let start = Instant::now();
        while nccl.check().is_ok() && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Some(nccl.check().unwrap_err().to_string())
    });
    let error = ends.into_iter().flatten().next().unwrap();
    assert!(error.starts_with("rank 1 is gone before `NCCL all-reduce` number 1"), "{error}");
}

#[test]
fn a_communicator_that_does_not_come_up_is_given_up() {
    let net = Net::new(2);
    let start = Instant::now();
    let errors = ranks(2, |comm| {
        let faults = Faults { init_hangs: comm.rank() == 0, ..Faults::default() };
        let result = connect(&net, &comm, faults);
        if comm.rank() == 1 {
            // This rank is ready; it learns in its first collective that the other is not.
            comm.set_deadline(Duration::from_secs(10));
            return comm.barrier().unwrap_err().to_string();
        }
        result.unwrap_err().to_string()
    });
    assert!(start.elapsed() < Duration::from_secs(10));
    let expected = "NCCL failed on rank 0 in `ncclCommInitRankConfig`: it is not done after 1.0s";
    assert!(errors[0].starts_with(expected), "{}", errors[0]);
    assert!(errors[0].contains("hint: `NCCL_DEBUG=INFO`"), "{}", errors[0]);
    assert!(errors[1].starts_with(&format!("stopped by rank 0: {expected}")), "{}", errors[1]);
}

#[test]
fn a_refused_sum_is_an_error_at_once() {
    let net = Net::new(1);
    let comm = Comm::single();
    let faults = Faults { refuses: Some(5), ..Faults::default() };
    let nccl = connect(&net, &comm, faults).unwrap();
    let error = nccl.all_reduce(64, 1, STREAM).unwrap_err().to_string();
    assert!(error.starts_with("NCCL failed on rank 0 in `ncclAllReduce`: code 5"), "{error}");
    drop(nccl);
    assert_eq!(net.ended(), [1, 0, 0]);
}

#[test]
fn another_card_than_the_current_one_is_refused() {
    let net = Net::new(1);
    let faults = Faults { card: Some(3), ..Faults::default() };
    let error = connect(&net, &Comm::single(), faults).unwrap_err().to_string();
    assert!(error.contains("the current context is not that of card 0, got: card 3"), "{error}");
}

#[test]
fn without_nccl_on_one_rank_all_ranks_may_go_on_without_it() {
    let net = Net::new(2);
    let errors = ranks(2, |comm| {
        let library = match comm.rank() {
            0 => Ok(net.library(0, Faults::default())),
            _ => Err("it has no function `ncclAllReduce`".to_owned()),
        };
        let error = Nccl::over(&comm, library, (Path::new(PATH), 0)).unwrap_err();
        assert!(matches!(error, CollectiveError::NcclMissing { rank: 1, .. }), "{error}");
        // The group still works.
        let mut values = [1.];
        comm.all_reduce(&mut values).unwrap();
        assert_eq!(values, [2.]);
        error.to_string()
    });
    let expected =
        "NCCL cannot be used on rank 1, libnccl.so.2: it has no function `ncclAllReduce`";
    assert!(errors.iter().all(|error| error.starts_with(expected)), "{errors:?}");
}

#[test]
fn an_end_that_does_not_end_is_left_behind() {
    let net = Net::new(1);
    let faults = Faults { finalize_hangs: true, ..Faults::default() };
    let nccl = connect(&net, &Comm::single(), faults).unwrap();
    let start = Instant::now();
    drop(nccl);
    assert!(start.elapsed() < END_LIMIT * 2);
    assert_eq!(net.ended(), [0, 1, 0]);
}

/// Runs `work` on two ranks of each of two hosts, with the memory that the ranks of its host share.
fn ranks_of_two_hosts<T: Send>(work: impl Fn(Comm, &Segment) -> T + Sync) -> Vec<T> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let segments = [0, 2].map(|first| Segment::create_from(first, 2, 1).unwrap());
    let (work, segments) = (&work, &segments);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|rank| {
                let env = Env {
                    rank,
                    local_rank: rank % 2,
                    world_size: 4,
                    local_world_size: 2,
                    master_port: listener.local_addr().unwrap().port(),
                    generation: 1,
                    segment_fd: Some(segments[rank / 2].fd()),
                    meeting_fd: (rank == 0).then(|| listener.as_raw_fd()),
                    collective_timeout: Duration::from_secs(30),
                    ..Env::single()
                };
                scope.spawn(move || work(Comm::connect(&env).unwrap(), &segments[rank / 2]))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn one_communicator_spans_the_ranks_of_all_hosts() {
    let net = Net::new(4);
    ranks_of_two_hosts(|comm, _| {
        let nccl = connect(&net, &comm, Faults::default()).unwrap();
        net.write(comm.rank(), 64, &[comm.rank() as f32 + 1.]);
        nccl.all_reduce(64, 1, STREAM).unwrap();
        nccl.arm(Duration::from_secs(20));
        net.synchronize(comm.rank());
        nccl.disarm().unwrap();
        assert_eq!(net.read(comm.rank(), 64), [10.]);
        comm.barrier().unwrap();
    });
    assert_eq!(net.ids().len(), 1);
}

#[test]
fn a_rank_lost_on_another_host_ends_the_sum_once_the_launcher_says_so() {
    let net = Net::new(4);
    let ends = ranks_of_two_hosts(|comm, segment| {
        let nccl = connect(&net, &comm, Faults::default()).unwrap();
        if comm.rank() == 3 {
            // Its process would be gone; that host's launcher tells the others', which halt theirs.
            return None;
        }
        net.write(comm.rank(), 64, &[1.]);
        nccl.all_reduce(64, 1, STREAM).unwrap();
        let start = Instant::now();
        nccl.arm(Duration::from_secs(60));
        if comm.rank() == 0 {
            segment.abort(Author::Launcher, Some(3), "rank 3 on node 1 was killed");
        }
        net.synchronize(comm.rank());
        Some((nccl.disarm().unwrap_err().to_string(), start.elapsed()))
    });
    for (rank, end) in ends.into_iter().enumerate().take(3) {
        let (error, took) = end.unwrap();
        // Rank 2 has seen it by itself: it shares memory with the lost one.
        assert!(
            rank == 2 || error == "stopped by the launcher: rank 3 on node 1 was killed",
            "{error}"
        );
        assert!(rank != 2 || error.contains("rank 3 is gone"), "{error}");
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
}
