//! Ranks as processes that are killed or stopped in the middle of a sum of 100 MB: how soon the others
//! know, and whom they name. On one host, and on two (two groups of shared memory, TCP between them).
//!
//! `LORARUN_KILLS` is the number of kills on each (10 unless set); the longest time to an error is
//! printed.

#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![expect(
    clippy::print_stdout,
    reason = "ranks answer their test, and the test says how long it took"
)]

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use collectives::{Comm, Env, Segment, Token};

/// What the others may take to notice.
const LIMIT: Duration = Duration::from_secs(1);
/// Floats of a sum.
const FLOATS: usize = 25_000_000;

/// Not a test of its own: what a rank of the tests below does, in a process that they start.
#[test]
#[ignore = "the ranks that other tests start"]
fn rank_process() {
    let env = Env::from_process().unwrap();
    let comm = Comm::connect(&env).unwrap();
    let mut values = vec![0.5; FLOATS];
    let mut last = Duration::ZERO;
    loop {
        println!("sums {}", last.as_micros());
        let start = Instant::now();
        if let Err(error) = comm.all_reduce(&mut values) {
            println!("ended {} {error}", monotonic_nanoseconds());
            return;
        }
        last = start.elapsed();
        values.fill(0.5);
    }
}

fn monotonic_nanoseconds() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: one valid place to write.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A process of [`rank_process`] and what it says.
struct Rank {
    child: Child,
    lines: Receiver<String>,
}

impl Drop for Rank {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Rank {
    fn start(env: &Env) -> Rank {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "rank_process", "--ignored", "--nocapture"]);
        command.envs(env.to_variables()).stdout(Stdio::piped());
        let fds = [env.segment_fd, env.meeting_fd];
        // SAFETY: between fork and exec nothing but a system call on descriptors of this process.
        unsafe {
            command.pre_exec(move || {
                fds.iter().flatten().for_each(|fd| _ = libc::fcntl(*fd, libc::F_SETFD, 0));
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                drop(sender.send(line));
            }
        });
        Rank { child, lines }
    }

    /// The rest of the next line that has `word` in it.
    fn hear(&self, word: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(60)).unwrap();
            if let Some((_, rest)) = line.split_once(word) {
                return rest.trim().to_owned();
            }
        }
    }

    fn send(&self, signal: i32) {
        // SAFETY: a plain system call on a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }
}

/// Starts the ranks of a job, waits until they sum, and sends `signal` to one of them at a random
/// moment of a sum; that one's number and the errors of the others with the time that they took.
fn strike(
    (hosts, ranks): (usize, usize),
    deadline: Duration,
    signal: i32,
) -> (usize, Vec<(String, Duration)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let segments: Vec<Segment> =
        (0..hosts).map(|host| Segment::create_from(host * ranks, ranks, 5).unwrap()).collect();
    let started: Vec<Rank> = (0..hosts * ranks)
        .map(|rank| {
            Rank::start(&Env {
                rank,
                local_rank: rank % ranks,
                world_size: hosts * ranks,
                local_world_size: ranks,
                master_port: listener.local_addr().unwrap().port(),
                generation: 5,
                segment_fd: Some(segments[rank / ranks].fd()),
                meeting_fd: (rank == 0 && hosts > 1).then(|| listener.as_raw_fd()),
                token: Token::new("of this test"),
                collective_timeout: deadline,
                ..Env::single()
            })
        })
        .collect();
    let victim = draw(started.len() as u64) as usize;
    started[victim].hear("sums ");
    started[victim].hear("sums ");
    let last: u64 = started[victim].hear("sums ").parse().unwrap();
    std::thread::sleep(Duration::from_micros(draw(last * 9 / 10)));
    started[victim].send(signal);
    let struck = monotonic_nanoseconds();
    let others = started.iter().enumerate().filter(|(rank, _)| *rank != victim);
    let errors = others.map(|(_, rank)| {
        let said = rank.hear("ended ");
        let (when, error) = said.split_once(' ').unwrap();
        let took = when.parse::<u64>().unwrap().saturating_sub(struck);
        (error.to_owned(), Duration::from_nanos(took))
    });
    (victim, errors.collect())
}

/// Numbers that differ from run to run; a failing test prints what was drawn.
fn draw(below: u64) -> u64 {
    let mixed = monotonic_nanoseconds().wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 32) % below.max(1)
}

fn kill_often(job: (usize, usize)) {
    let kills = std::env::var("LORARUN_KILLS").map_or(10, |text| text.parse().unwrap());
    let mut longest = Duration::ZERO;
    for kill in 0..kills {
        let (victim, errors) = strike(job, Duration::from_secs(60), libc::SIGKILL);
        for (error, took) in errors {
            let case = format!("kill {kill} of {job:?}, rank {victim}, {took:?}: {error}");
            assert!(took < LIMIT, "{case}");
            assert!(error.contains(&format!("rank {victim} is gone")), "{case}");
            longest = longest.max(took);
        }
    }
    println!("{kills} kills on {} hosts: all others knew after {longest:?} at most", job.0);
}

#[test]
fn a_killed_rank_of_one_host_is_missed_within_a_second() {
    kill_often((1, 3));
}

#[test]
fn a_killed_rank_of_two_hosts_is_missed_within_a_second() {
    kill_often((2, 2));
}

#[test]
fn a_stopped_rank_is_named_on_every_host() {
    for job in [(2, 1), (2, 2)] {
        let (victim, errors) = strike(job, Duration::from_secs(4), libc::SIGSTOP);
        for (error, took) in errors {
            let case = format!("{job:?}, rank {victim}, {took:?}: {error}");
            assert!(error.ends_with(&format!("waiting for rank {victim}")), "{case}");
            assert!(took < Duration::from_secs(10), "{case}");
        }
    }
}
