//! Ranks of several hosts: threads that share memory within a "host" and TCP between them.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use collectives::{CollectiveError, Comm, Env, Segment, Token};

/// What the launchers of all hosts would set; changed by a test before the ranks start.
struct Job {
    hosts: usize,
    ranks_per_host: usize,
    listener: TcpListener,
    segments: Vec<Segment>,
}

impl Job {
    fn new(hosts: usize, ranks_per_host: usize) -> Job {
        let segments = (0..hosts)
            .map(|host| Segment::create_from(host * ranks_per_host, ranks_per_host, 3).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Job { hosts, ranks_per_host, listener, segments: segments.collect() }
    }

    fn env(&self, rank: usize) -> Env {
        Env {
            rank,
            local_rank: rank % self.ranks_per_host,
            world_size: self.hosts * self.ranks_per_host,
            local_world_size: self.ranks_per_host,
            master_port: self.listener.local_addr().unwrap().port(),
            generation: 3,
            segment_fd: Some(self.segments[rank / self.ranks_per_host].fd()),
            meeting_fd: (rank == 0).then(|| self.listener.as_raw_fd()),
            token: Token::new("the job's own"),
            collective_timeout: Duration::from_secs(30),
            ..Env::single()
        }
    }

    /// Runs `rank_main` on every rank with its environment.
    fn run<T: Send>(&self, rank_main: impl Fn(Env) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..self.hosts * self.ranks_per_host)
                .map(|rank| {
                    let (env, rank_main) = (self.env(rank), &rank_main);
                    scope.spawn(move || rank_main(env))
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }
}

fn value(rank: usize, index: usize) -> f32 {
    let mut state = (rank as u64) << 40 ^ index as u64;
    state = state.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    state ^= state >> 29;
    ((state.wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40) as f32 / 2e6 - 4.)
        * 1.7_f32.powi(rank as i32)
}

fn values(rank: usize, length: usize) -> Vec<f32> {
    (0..length).map(|index| value(rank, index)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn sums_are_those_of_the_hosts_sums_bit_for_bit() {
    let few =
        [0, 1, 17, 4097, 131_073, 500_001].map(|length| (length, [(2, 1), (2, 2), (3, 2), (2, 3)]));
    // Longer than what is on its way at a time.
    let many = [(2_500_000, [(2, 2), (4, 2), (2, 4), (3, 1)])];
    for (length, jobs) in few.into_iter().chain(many) {
        for (hosts, ranks) in jobs {
            let host_sum = |host: usize, index: usize| {
                let first = host * ranks;
                (first + 1..first + ranks).fold(value(first, index), |sum, r| sum + value(r, index))
            };
            let expected: Vec<f32> = (0..length)
                .map(|index| (1..hosts).fold(host_sum(0, index), |sum, h| sum + host_sum(h, index)))
                .collect();
            let results = Job::new(hosts, ranks).run(|env| {
                let comm = Comm::connect(&env).unwrap();
                assert_eq!((comm.rank(), comm.world_size()), (env.rank, env.world_size));
                let mut sum = values(env.rank, length);
                comm.all_reduce(&mut sum).unwrap();
                let again = comm.all_reduce_start(values(env.rank, length)).wait().unwrap();
                comm.barrier().unwrap();
                assert!(bits(&again) == bits(&sum));
                sum
            });
            for result in results {
                assert!(bits(&result) == bits(&expected), "{hosts} x {ranks}, {length}");
            }
        }
    }
}

#[test]
fn pairs_add_up_as_on_one_host() {
    let length = 10_001;
    let alone: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let ranks = Comm::local_group(4).unwrap().into_iter().enumerate();
        let ranks: Vec<_> = ranks
            .map(|(rank, comm)| {
                scope.spawn(move || {
                    let mut sum = values(rank, length);
                    comm.all_reduce_in_pairs(&mut sum).unwrap();
                    sum
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for (hosts, ranks) in [(2, 2), (4, 1)] {
        let spread = Job::new(hosts, ranks).run(|env| {
            let comm = Comm::connect(&env).unwrap();
            let mut sum = values(env.rank, length);
            comm.all_reduce_in_pairs(&mut sum).unwrap();
            sum
        });
        assert!(spread.iter().all(|sum| bits(sum) == bits(&alone[0])), "{hosts} x {ranks}");
    }
}

#[test]
fn bytes_reach_every_rank_of_every_host() {
    Job::new(3, 2).run(|env| {
        let comm = Comm::connect(&env).unwrap();
        for root in 0..6 {
            let own = if env.rank == root { vec![root as u8; 700_000] } else { Vec::new() };
            assert_eq!(comm.broadcast(root, own).unwrap(), vec![root as u8; 700_000]);
        }
        let gathered = comm.all_gather(&vec![env.rank as u8; env.rank * 1000]).unwrap();
        assert_eq!(gathered.len(), 6);
        for (rank, bytes) in gathered.iter().enumerate() {
            assert_eq!(*bytes, vec![rank as u8; rank * 1000]);
        }
        let error = comm.broadcast(6, Vec::new()).unwrap_err();
        assert!(matches!(error, CollectiveError::NoSuchRoot { root: 6, world_size: 6 }));
    });
}

#[test]
fn a_rank_that_leaves_is_noticed_on_every_host_at_once() {
    let start = Instant::now();
    let errors = Job::new(2, 2).run(|env| {
        let comm = Comm::connect(&env).unwrap();
        let met = comm.barrier();
        if env.rank == 3 {
            met.unwrap();
            drop(comm);
            return None;
        }
        // The news can reach a rank that is still on its way out of the barrier.
        let sum = met.and_then(|()| comm.all_reduce(&mut values(env.rank, 100_000)));
        Some(sum.unwrap_err().to_string())
    });
    // Well below the deadline of 30 s; how fast a busy machine is, no test can say.
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    let said: Vec<String> = errors.into_iter().flatten().collect();
    assert_eq!(said.len(), 3);
    assert!(said.iter().any(|text| text.starts_with("rank 3 is gone")), "{said:?}");
}

#[test]
fn ranks_that_call_different_things_are_named_among_all() {
    let errors = Job::new(2, 1).run(|env| {
        let comm = Comm::connect(&env).unwrap();
        let result = match env.rank {
            0 => comm.barrier(),
            _ => comm.all_reduce(&mut [0.; 5]),
        };
        result.unwrap_err().to_string()
    });
    let full = "rank 0 calls `barrier`, rank 1 calls `all_reduce of 5 floats`";
    let other = "rank 1 calls `all_reduce of 5 floats`, rank 0 calls `barrier`";
    assert!(errors.iter().any(|text| text.contains(full) || text.contains(other)), "{errors:?}");
}

#[test]
fn a_sum_of_different_lengths_on_two_hosts_is_refused() {
    let errors = Job::new(2, 1).run(|env| {
        let comm = Comm::connect(&env).unwrap();
        comm.all_reduce(&mut vec![0.; 5 + env.rank]).unwrap_err().to_string()
    });
    let said = errors.join("\n");
    assert!(said.contains("all_reduce of 5 floats") && said.contains("of 6 floats"), "{said}");
}

#[test]
fn who_has_another_token_or_anothers_number_does_not_get_in() {
    let job = Job::new(2, 1);
    let errors = job.run(|mut env| {
        env.collective_timeout = Duration::from_secs(2);
        if env.rank == 1 {
            env.token = Token::new("guessed");
        }
        Comm::connect(&env).unwrap_err().to_string()
    });
    assert!(errors[0].contains("time ran out before all had come"), "{errors:?}");
    assert!(errors[1].contains("another token"), "{errors:?}");

    let job = Job::new(3, 1);
    let errors = job.run(|mut env| {
        env.collective_timeout = Duration::from_secs(20);
        if env.rank == 2 {
            env.rank = 1;
        }
        Comm::connect(&env).unwrap_err().to_string()
    });
    for text in errors {
        assert!(text.contains("two processes say that they are rank 1"), "{text}");
    }
}

#[test]
fn a_job_whose_sizes_differ_is_refused_with_both() {
    let job = Job::new(2, 1);
    let errors = job.run(|mut env| {
        if env.rank == 1 {
            env.world_size = 3;
        }
        Comm::connect(&env).unwrap_err().to_string()
    });
    for text in errors {
        assert!(text.contains("counts 3 ranks") && text.contains("rank 0 counts 2"), "{text}");
    }
}

#[test]
fn an_address_where_nobody_is_is_named() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let env = Env {
        rank: 1,
        world_size: 2,
        local_world_size: 1,
        master_port: port,
        collective_timeout: Duration::from_millis(300),
        ..Env::single()
    };
    let text = Comm::connect(&env).unwrap_err().to_string();
    assert!(text.contains(&format!("127.0.0.1:{port}")) && text.contains("refused"), "{text}");
}

#[test]
fn strangers_at_the_door_neither_delay_nor_end_the_meeting() {
    let job = Job::new(2, 2);
    let address = job.listener.local_addr().unwrap();
    let mut strangers = Vec::new();
    for knock in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 5000], &[0; 20]] {
        for _ in 0..5 {
            let mut stranger = TcpStream::connect(address).unwrap();
            stranger.write_all(knock).unwrap();
            strangers.push(stranger);
        }
    }
    // One that is gone before it is heard.
    drop(TcpStream::connect(address).unwrap());
    let start = Instant::now();
    job.run(|env| {
        let comm = Comm::connect(&env).unwrap();
        assert!(start.elapsed() < Duration::from_millis(1900), "{:?}", start.elapsed());
        comm.barrier().unwrap();
    });
    drop(strangers);
}

#[test]
fn a_rank_of_an_earlier_start_is_told_so_and_the_missing_one_is_named() {
    let job = Job::new(2, 1);
    let errors = job.run(|mut env| {
        env.collective_timeout = Duration::from_secs(2);
        env.segment_fd = None;
        if env.rank == 1 {
            env.generation = 2;
        }
        Comm::connect(&env).unwrap_err().to_string()
    });
    assert!(errors[0].contains("before all had come, missing ranks: 1"), "{errors:?}");
    let told = "rank 1 belongs to start 2 of this job, and this is start 3";
    assert!(errors[1].contains(told), "{errors:?}");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let env = Env { world_size: 2, local_world_size: 1, master_port: port, ..Env::single() };
    let text = Comm::connect(&env).unwrap_err().to_string();
    assert!(text.contains(&format!(":{port}: cannot listen there: Address already")), "{text}");
}
