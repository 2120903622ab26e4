//! Jobs as processes: several launchers on this machine, or one that starts its ranks again; what
//! happens when ranks and launchers are killed or stopped, and who is not let in.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// For what takes long on a loaded machine.
const LONG: Duration = Duration::from_secs(60);

/// The launchers of one job.
struct Job {
    port: String,
    mark: String,
    options: String,
    command: String,
}

/// One of them.
struct Launcher {
    child: Child,
    said: Arc<Mutex<String>>,
    readers: Vec<std::thread::JoinHandle<()>>,
}

impl Job {
    fn new(options: &str, command: &str) -> Job {
        static JOBS: AtomicU32 = AtomicU32::new(0);
        let number = JOBS.fetch_add(1, Ordering::Relaxed);
        // Free now, and hardly taken by another program in the next moment.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Job {
            port: listener.local_addr().unwrap().port().to_string(),
            mark: format!("jobs-{}-{number}-end", std::process::id()),
            options: options.to_owned(),
            command: command.to_owned(),
        }
    }

    /// The launcher of one node of several.
    fn node(&self, node: usize) -> Launcher {
        let place =
            format!("--node_rank {node} --master_addr 127.0.0.1 --master_port {}", self.port);
        self.start(&format!("{place} {} {}", self.options, self.command), &[])
    }

    /// The only launcher.
    fn alone(&self) -> Launcher {
        self.start(&format!("{} {}", self.options, self.command), &[])
    }

    fn start(&self, arguments: &str, variables: &[(&str, &str)]) -> Launcher {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorarun"));
        command.args(arguments.split_whitespace()).env("JOB_MARK", &self.mark);
        command.envs(variables.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let streams: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        let read = |stream: Box<dyn Read + Send>| {
            let said = said.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    said.lock().unwrap().push_str(&format!("{line}\n"));
                }
            })
        };
        let readers = streams.into_iter().map(read).collect();
        Launcher { child, said, readers }
    }

    /// Ranks of this job that run: their number, start and process.
    fn ranks(&self) -> Vec<(usize, u64, i32)> {
        let mut ranks = Vec::new();
        for (pid, variables) in self.processes() {
            let number = |name: &str| {
                let value = variables.iter().find_map(|variable| variable.strip_prefix(name));
                value.and_then(|value| value.parse::<u64>().ok())
            };
            if let Some((rank, start)) = number("RANK=").zip(number("LORARUN_GENERATION=")) {
                ranks.push((rank as usize, start, pid));
            }
        }
        ranks.sort_unstable();
        ranks
    }

    /// Process of a rank of the newest start.
    fn pid_of(&self, rank: usize) -> i32 {
        let ranks = self.ranks();
        let newest = ranks.iter().filter(|(number, ..)| *number == rank).max_by_key(|r| r.1);
        newest.unwrap_or_else(|| panic!("rank {rank} does not run: {ranks:?}")).2
    }

    fn processes(&self) -> Vec<(i32, Vec<String>)> {
        let mut found = Vec::new();
        let mark = format!("JOB_MARK={}", self.mark);
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Ok(bytes) = std::fs::read(entry.path().join("environ")) else { continue };
            let variables: Vec<String> =
                bytes.split(|&byte| byte == 0).map(|v| String::from_utf8_lossy(v).into()).collect();
            if variables.contains(&mark) {
                found.push((pid, variables));
            }
        }
        found
    }

    /// Checks that no process of the job is left.
    fn assert_over(&self) {
        let start = Instant::now();
        while !self.processes().is_empty() {
            assert!(start.elapsed() < Duration::from_secs(10), "left: {:?}", self.ranks());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Launcher {
    fn text(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// Waits until it has said this behind the first `from` bytes of what it says.
    fn wait_for(&self, words: &str, from: usize) {
        let start = Instant::now();
        while !self.text()[from..].contains(words) {
            assert!(start.elapsed() < LONG, "not said: {words}\n{}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&self, signal: i32) {
        kill(self.child.id() as i32, signal);
    }

    /// Waits for the end; gives code and text.
    fn end(mut self) -> (i32, String) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > LONG {
                self.child.kill().unwrap();
                panic!("no end: {}", self.text());
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        self.readers.drain(..).for_each(|reader| reader.join().unwrap());
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        let code = signal.map_or_else(|| status.code().unwrap(), |signal| 128 + signal);
        (code, self.text())
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: a plain system call on a process of this test.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "process {pid} is gone");
}

/// Rounds without end, with a snapshot every five.
const ENDLESS: &str = "check-ranks --rounds 0 --sizes 4kB --pause_ms 20";

#[test]
fn a_killed_rank_costs_the_rounds_since_the_last_snapshot() {
    let job = Job::new("--nnodes 2 --nproc_per_node 2 --snapshot_every_n_steps 5", ENDLESS);
    let nodes = [job.node(0), job.node(1)];
    nodes[0].wait_for("round 20 done", 0);
    kill(job.pid_of(3), libc::SIGKILL);
    nodes[0].wait_for("starting again after rank 3 on node 1", 0);
    let text = nodes[0].text();
    assert!(
        text.contains("1 of 3 restarts for ranks killed by signal 9, going on from step "),
        "{text}"
    );
    nodes[0].wait_for("going on from round ", text.len());
    nodes[0].wait_for(" done", text.len());
    assert!(job.ranks().iter().all(|(_, start, _)| *start == 2), "{:?}", job.ranks());
    nodes[1].signal(libc::SIGTERM);
    for node in nodes {
        let (code, text) = node.end();
        assert_eq!(code, 0, "{text}");
    }
    job.assert_over();
}

#[test]
fn a_lost_node_is_gone_on_without_and_taken_in_when_it_is_back() {
    let options = "--nnodes 1:2 --nproc_per_node 2 --snapshot_every_n_steps 5 --rejoin_wait 0.5";
    let job = Job::new(options, ENDLESS);
    let first = job.node(0);
    let second = job.node(1);
    first.wait_for("round 8 done", 0);
    second.signal(libc::SIGKILL);
    assert_eq!(second.end().0, 137);
    first.wait_for("going on with 2 of 4 ranks, without node 1", 0);
    let text = first.text();
    assert!(text.contains("starting again after node 1"), "{text}");
    first.wait_for(" done", text.len());
    assert_eq!(job.ranks().len(), 2);
    let second = job.node(1);
    first.wait_for("node 1 is back", 0);
    let text = first.text();
    first.wait_for(" done", text.len());
    assert_eq!(job.ranks().len(), 4);
    first.signal(libc::SIGTERM);
    for node in [first, second] {
        let (code, text) = node.end();
        assert_eq!(code, 0, "{text}");
    }
    job.assert_over();
}

#[test]
fn without_the_coordinator_a_node_asks_to_be_started_again() {
    let job = Job::new("--nnodes 2 --nproc_per_node 1", ENDLESS);
    let nodes = [job.node(0), job.node(1)];
    nodes[0].wait_for("round 3 done", 0);
    nodes[0].signal(libc::SIGKILL);
    let [first, second] = nodes;
    assert_eq!(first.end().0, 137);
    let (code, text) = second.end();
    assert_eq!(code, 75, "{text}");
    assert!(text.contains("error: node 0, which coordinates the job"), "{text}");
    job.assert_over();
}

#[test]
fn a_stopped_rank_is_named_killed_and_replaced() {
    let job = Job::new("--nproc_per_node 2 --max_restarts 2 --snapshot_every_n_steps 5", ENDLESS);
    let launcher = job.alone();
    launcher.wait_for("round 8 done", 0);
    let pid = job.pid_of(1);
    kill(pid, libc::SIGSTOP);
    launcher.wait_for("error: rank 1 on node 0", 0);
    launcher.wait_for("hangs: its process is stopped (SIGSTOP)", 0);
    launcher.wait_for("1 of 2 restarts for ranks that hang, going on from step", 0);
    let text = launcher.text();
    assert!(text.contains("rank 1 never entered `"), "{text}");
    let kept = text.lines().find_map(|line| line.strip_prefix("what ranks recorded is kept: "));
    std::fs::remove_dir_all(kept.unwrap()).unwrap();
    launcher.wait_for(" done", text.len());
    // SAFETY: a plain system call; the process is gone.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGCONT) }, -1);
    launcher.signal(libc::SIGTERM);
    let (code, text) = launcher.end();
    assert_eq!(code, 0, "{text}");
    job.assert_over();
}

#[test]
fn a_rank_that_computes_for_ever_is_named_after_the_time_allowed() {
    let command = "check-ranks --rounds 30 --sizes 4kB --pause_ms 5 --fault 0:12:hang@1";
    let job = Job::new("--nproc_per_node 2 --max_restarts 1 --hang_timeout 3", command);
    let (code, text) = job.alone().end();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("rank 0 on node 0"), "{text}");
    assert!(text.contains("hangs: no sign of life for "), "{text}");
    assert!(text.contains("while training, where 3 s are allowed"), "{text}");
    assert!(text.contains("rank 0 never entered `barrier` number "), "{text}");
    let kept = text.lines().find_map(|line| line.strip_prefix("what ranks recorded is kept: "));
    std::fs::remove_dir_all(kept.unwrap()).unwrap();
    assert!(text.contains("all sums are right"), "{text}");
    job.assert_over();
}

#[test]
fn ranks_killed_within_two_seconds_are_one_restart() {
    let job = Job::new("--nnodes 3 --nproc_per_node 1", ENDLESS);
    let nodes = [job.node(0), job.node(1), job.node(2)];
    nodes[0].wait_for("round 8 done", 0);
    for rank in [2, 0, 1] {
        // One that has ended because of another is what was wanted, too.
        if let Some((.., pid)) = job.ranks().into_iter().find(|(number, ..)| *number == rank) {
            // SAFETY: a plain system call on a process of this test.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    nodes[0].wait_for("starting again after", 0);
    let text = nodes[0].text();
    nodes[0].wait_for(" done", text.len());
    assert!(job.ranks().iter().all(|(_, start, _)| *start == 2), "{:?}", job.ranks());
    nodes[2].signal(libc::SIGTERM);
    for node in nodes {
        let (code, text) = node.end();
        assert_eq!(code, 0, "{text}");
        assert!(text.matches("starting again after").count() <= 1, "{text}");
    }
    job.assert_over();
}

#[test]
fn a_budget_ends_and_wrong_usage_is_never_tried_again() {
    let faulty = "check-ranks --rounds 9 --sizes 4kB --fault 1:3:";
    let job = Job::new("--nproc_per_node 2 --max_restarts 1", &format!("{faulty}exit=7"));
    let (code, text) = job.alone().end();
    assert_eq!(code, 7, "{text}");
    assert!(text.contains("1 of 1 restarts for ranks that end with exit code 7"), "{text}");
    assert!(text.contains("nothing is kept in memory yet, starting as the config says"), "{text}");
    let last = "and the restarts for ranks that end with exit code 7 are used up: 1";
    assert!(text.contains(last), "{text}");
    let job = Job::new("--nproc_per_node 2 --max_restarts 3", &format!("{faulty}configuration"));
    let (code, text) = job.alone().end();
    assert_eq!(code, 78, "{text}");
    assert!(!text.contains("starting again"), "{text}");
    job.assert_over();
}

#[test]
fn one_process_starts_again_as_well() {
    let command = "check-ranks --rounds 40 --sizes 4kB --fault 0:33:kill@1";
    let job = Job::new("--max_restarts 1 --snapshot_every_n_steps 10", command);
    let (code, text) = job.alone().end();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("going on from step 30 kept in memory"), "{text}");
    assert!(text.contains("going on from round 30\n"), "{text}");
    job.assert_over();
}

/// Arguments, variables, and what is said.
type Refused<'c> = (String, &'c [(&'c str, &'c str)], &'c str);

#[test]
fn who_does_not_belong_is_not_let_in() {
    let job = Job::new("--nnodes 3 --join_wait 40", ENDLESS);
    let coordinator = job.node(0);
    let member = job.node(1);
    let place = format!("--nnodes 3 --master_addr 127.0.0.1 --master_port {}", job.port);
    let other = "check-ranks --rounds 7";
    let cases: [Refused<'_>; 5] = [
        (format!("{place} --node_rank 1 {ENDLESS}"), &[], "two launchers say that they are node 1"),
        (format!("{place} --node_rank 2 {other}"), &[], "its config differs from that of node 0"),
        (
            format!("{place} --node_rank 2 --nproc_per_node 2 {ENDLESS}"),
            &[],
            "its number of processes differs from that of node 0: 2 instead of 1",
        ),
        (
            format!("{place} --node_rank 2 {ENDLESS}"),
            &[("LORARUN_TOKEN", "other")],
            "its token is not that of node 0 at 127.0.0.1",
        ),
        (
            format!("{place} --node_rank 2 --rdzv_id other {ENDLESS}"),
            &[],
            "it belongs to the job `other`, not to ``",
        ),
    ];
    coordinator.wait_for("waiting for node 2 (2 of 3 nodes are there)", 0);
    for (arguments, variables, words) in cases {
        let (code, text) = job.start(&arguments, variables).end();
        assert_eq!(code, 64, "{arguments}: {text}");
        assert!(text.contains(words), "{arguments}: {text}");
        assert!(text.contains("hint: "), "{arguments}: {text}");
    }
    let text = coordinator.text();
    assert!(text.contains("refused a process at 127.0.0.1: its token is not that of"), "{text}");
    // A job that gathers has nothing to save.
    coordinator.signal(libc::SIGTERM);
    for node in [coordinator, member] {
        let (code, text) = node.end();
        assert_eq!(code, 75, "{text}");
    }
    job.assert_over();
}

#[test]
fn a_port_that_is_taken_is_named() {
    let job = Job::new("--nnodes 2", ENDLESS);
    let held = std::net::TcpListener::bind(format!("0.0.0.0:{}", job.port)).unwrap();
    let (code, text) = job.node(0).end();
    drop(held);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains(&format!("cannot coordinate the job at port {}", job.port)), "{text}");
    assert!(text.contains("hint: `--main_process_port` chooses another one"), "{text}");
}

#[test]
fn a_coordinator_that_nobody_is_is_named() {
    let job = Job::new("--nnodes 2 --join_wait 1", ENDLESS);
    let (code, text) = job.node(1).end();
    assert_eq!(code, 75, "{text}");
    assert!(text.contains("error: node 0 was not reached in"), "{text}");
    assert!(text.contains(&format!("at 127.0.0.1:{}", job.port)), "{text}");
}
