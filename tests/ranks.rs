//! Ranks as processes: right sums, and how a run ends when a rank, the launcher or a user ends it.
//!
//! Every run carries a mark of its own in the environment, so that the processes it leaves behind
//! would be found in `/proc`, whatever they are and whoever their parent is.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// What the issue allows between a failure and the end of the run.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// A running launcher.
struct Run {
    child: Child,
    stdout: BufReader<ChildStdout>,
    mark: String,
}

/// How it ended.
struct End {
    code: i32,
    stdout: String,
    stderr: String,
}

/// `lorarun` with these arguments, split at blanks, and a fresh mark.
fn lorarun(arguments: &str) -> (Command, String) {
    static RUNS: AtomicU32 = AtomicU32::new(0);
    let run = RUNS.fetch_add(1, Ordering::Relaxed);
    let mark = format!("TEST_MARK=ranks-{}-{run}-end", std::process::id());
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorarun"));
    let (name, value) = mark.split_once('=').unwrap();
    command.args(arguments.split_whitespace()).env(name, value);
    (command, mark)
}

impl Run {
    fn start(arguments: &str) -> Run {
        let (mut command, mark) = lorarun(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Run { child, stdout, mark }
    }

    /// Waits until rank 0 has printed a line that contains `text`.
    fn wait_for(&mut self, text: &str) {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            let count = self.stdout.read_line(&mut line).unwrap();
            assert!(count > 0, "the run ended before it printed: {text}");
        }
    }

    fn signal(&self, signal: i32) {
        send(self.child.id() as i32, signal);
    }

    /// Process id of a rank, once its program runs.
    fn pid_of(&self, rank: usize) -> i32 {
        let start = Instant::now();
        let entry = format!("RANK={rank}");
        loop {
            for (pid, environment) in marked_processes(&self.mark) {
                if environment.contains(&entry) {
                    return pid;
                }
            }
            assert!(start.elapsed() < Duration::from_secs(10), "rank {rank} did not start");
        }
    }

    /// Waits for the end, and checks that nothing is left.
    fn finish(mut self) -> End {
        let mut stderr = String::new();
        let mut stdout = String::new();
        let mut stderr_pipe = self.child.stderr.take().unwrap();
        let reader = std::thread::spawn(move || {
            stderr_pipe.read_to_string(&mut stderr).unwrap();
            stderr
        });
        self.stdout.read_to_string(&mut stdout).unwrap();
        let status = self.child.wait().unwrap();
        let stderr = reader.join().unwrap();
        let code = std::os::unix::process::ExitStatusExt::signal(&status)
            .map_or_else(|| status.code().unwrap(), |signal| 128 + signal);
        assert_nothing_left(&self.mark);
        End { code, stdout, stderr }
    }
}

/// Runs to the end.
fn run(arguments: &str) -> End {
    Run::start(arguments).finish()
}

fn send(pid: i32, signal: i32) {
    // SAFETY: a plain system call on a process of this test.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "process {pid} is gone");
}

/// Live processes whose environment has the mark, with their environments. The launcher that a test
/// has just forked still shows the test's own environment, without the mark.
fn marked_processes(mark: &str) -> Vec<(i32, Vec<String>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(bytes) = std::fs::read(entry.path().join("environ")) else { continue };
        let variables: Vec<String> =
            bytes.split(|&byte| byte == 0).map(|v| String::from_utf8_lossy(v).into()).collect();
        if variables.iter().any(|variable| variable == mark) {
            found.push((pid, variables));
        }
    }
    found
}

/// Names in /dev/shm that could be ours. Other programs use the folder at the same time.
fn shared_memory_names() -> Vec<String> {
    let names = std::fs::read_dir("/dev/shm").unwrap().flatten();
    names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.contains("lora") || name.contains("rank"))
        .collect()
}

fn assert_nothing_left(mark: &str) {
    let start = Instant::now();
    // The kernel kills the children of a killed launcher a moment after it.
    while !marked_processes(mark).is_empty() && start.elapsed() < STOP_LIMIT {
        std::thread::sleep(Duration::from_millis(5));
    }
    let left: Vec<i32> = marked_processes(mark).into_iter().map(|(pid, _)| pid).collect();
    assert!(left.is_empty(), "processes left behind: {left:?}");
    assert_eq!(shared_memory_names(), Vec::<String>::new());
}

/// Numbers that differ from run to run; a failing test prints what was drawn.
fn draw(below: u64) -> u64 {
    static STATE: AtomicU32 = AtomicU32::new(0);
    let count = u64::from(STATE.fetch_add(1, Ordering::Relaxed));
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let mixed = (now ^ count << 48).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 32) % below
}

#[test]
fn ranks_agree_on_sums_bit_for_bit() {
    for world_size in [1, 2, 3, 4] {
        let end = run(&format!(
            "--num_processes {world_size} check-ranks --rounds 4 --sizes 0,4,60,4kB,777777,3MB"
        ));
        assert_eq!(end.code, 0, "{}", end.stderr);
        assert!(end.stdout.contains("all sums are right, bit for bit the same"), "{}", end.stdout);
    }
}

#[test]
fn killing_any_rank_at_any_moment_ends_the_others() {
    for (world_size, times) in [(2, 6), (4, 4)] {
        for _ in 0..times {
            let rank = draw(world_size) as usize;
            let mut run = Run::start(&format!(
                "--num_processes {world_size} check-ranks --rounds 0 --sizes 2MB"
            ));
            // From the very start, or in the middle of the work.
            if draw(3) > 0 {
                run.wait_for("round 0 done");
            }
            let delay = Duration::from_micros(draw(80_000));
            let pid = run.pid_of(rank);
            std::thread::sleep(delay);
            send(pid, libc::SIGKILL);
            let killed = Instant::now();
            let end = run.finish();
            let took = killed.elapsed();
            let case = format!("rank {rank} of {world_size} after {delay:?}");
            assert!(took < STOP_LIMIT, "{case}: {took:?}");
            assert_eq!(end.code, 137, "{case}: {}", end.stderr);
            let named = format!("rank {rank} of {world_size} was killed by signal 9");
            assert!(end.stderr.contains(&named), "{case}: {}", end.stderr);
            assert!(end.stderr.contains(&format!("process {pid}")), "{case}: {}", end.stderr);
        }
    }
}

#[test]
fn no_rank_outlives_a_killed_launcher() {
    for delay_ms in [0, 1, 3, 10, 100] {
        let mut run = Run::start("--num_processes 4 check-ranks --rounds 0 --sizes 4kB");
        std::thread::sleep(Duration::from_millis(delay_ms));
        if delay_ms == 100 {
            run.wait_for("round 0 done");
            assert_eq!(marked_processes(&run.mark).len(), 5);
        }
        run.signal(libc::SIGKILL);
        // `finish` looks for what is left.
        assert_eq!(run.finish().code, 137);
    }
}

#[test]
fn the_shared_segment_has_no_name() {
    let mut run = Run::start("--num_processes 2 check-ranks --rounds 0 --sizes 4kB");
    run.wait_for("round 0 done");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", run.pid_of(1))).unwrap();
    // The flight recorder's file is what remains of a rank on purpose.
    let is_segment = |line: &&str| line.contains("rw-s") && !line.contains("/lorarun-flights-");
    let shared: Vec<&str> = maps.lines().filter(is_segment).collect();
    assert!(!shared.is_empty());
    for line in shared {
        assert!(line.contains("/memfd:lorarun-ranks (deleted)"), "{line}");
    }
    run.signal(libc::SIGTERM);
    assert_eq!(run.finish().code, 0);
}

#[test]
fn one_interrupt_ends_politely_and_in_the_same_round() {
    for (world_size, signal) in [(1, libc::SIGINT), (2, libc::SIGINT), (4, libc::SIGTERM)] {
        let mut run = Run::start(&format!(
            "--num_processes {world_size} check-ranks --rounds 0 --sizes 4kB --pause_ms 1"
        ));
        run.wait_for("round 3 done");
        run.signal(signal);
        let asked = Instant::now();
        let end = run.finish();
        assert_eq!(end.code, 0, "{}", end.stderr);
        assert!(end.stdout.contains("stopped before round"), "{}", end.stdout);
        assert!(asked.elapsed() < STOP_LIMIT);
    }
}

#[test]
fn a_second_interrupt_ends_at_once() {
    for (world_size, fault) in [(1, "0:5:hang"), (2, "1:5:hang"), (4, "*:5:hang")] {
        let mut run = Run::start(&format!(
            "--num_processes {world_size} check-ranks --rounds 0 --sizes 4kB --fault {fault}"
        ));
        run.wait_for("round 4 done");
        // Before round 5 the ranks ask each other for the last time.
        std::thread::sleep(Duration::from_millis(200));
        run.signal(libc::SIGINT);
        std::thread::sleep(Duration::from_millis(300));
        assert!(run.child.try_wait().unwrap().is_none(), "ended politely in spite of a hang");
        run.signal(libc::SIGINT);
        let asked = Instant::now();
        let end = run.finish();
        assert_eq!(end.code, 130, "{}", end.stderr);
        assert!(asked.elapsed() < STOP_LIMIT);
    }
}

#[test]
fn a_repeated_sigterm_is_one_request() {
    let mut run = Run::start("--num_processes 2 check-ranks --rounds 0 --sizes 4kB --pause_ms 100");
    run.wait_for("round 1 done");
    for _ in 0..3 {
        run.signal(libc::SIGTERM);
    }
    let end = run.finish();
    assert_eq!(end.code, 0, "{}", end.stderr);
    assert!(end.stdout.contains("stopped before round"), "{}", end.stdout);
}

#[test]
fn the_first_failing_rank_gives_the_exit_code() {
    for (fault, code, words) in [
        ("1:3:exit=7", 7, "rank 1 of 3 ended with exit code 7"),
        ("0:0:exit=41", 41, "rank 0 of 3 ended with exit code 41"),
        ("2:2:crash", 134, "rank 2 of 3 was killed by signal 6 (SIGABRT)"),
        ("2:2:kill", 137, "rank 2 of 3 was killed by signal 9"),
        ("1:2:abort", 1, "asked to abort in round 2"),
        ("0:2:panic", 101, "rank 0 of 3 ended with exit code 101"),
        ("2:2:mismatch", 1, "calls `all_reduce of 3 floats`"),
    ] {
        let start = Instant::now();
        let end =
            run(&format!("--num_processes 3 check-ranks --rounds 100 --sizes 1MB --fault {fault}"));
        assert_eq!(end.code, code, "{fault}: {}", end.stderr);
        assert!(end.stderr.contains(words), "{fault}: {}", end.stderr);
        assert!(start.elapsed() < Duration::from_secs(10), "{fault}");
    }
}

#[test]
fn an_early_success_of_one_rank_does_not_leave_the_others_waiting() {
    let end = run("--num_processes 2 check-ranks --rounds 100 --sizes 4kB --fault 1:3:exit=0");
    assert_eq!(end.code, 1, "{}", end.stderr);
    assert!(end.stderr.contains("rank 1 is gone before `barrier`"), "{}", end.stderr);
}

#[test]
fn saved_and_wanting_more_is_no_failure() {
    let end = run("--num_processes 2 check-ranks --rounds 9 --sizes 4kB --fault *:3:exit=75");
    assert_eq!(end.code, 75, "{}", end.stderr);
    assert!(!end.stderr.contains("error"), "{}", end.stderr);
}

#[test]
fn a_wrong_configuration_is_told_once() {
    let end = run("--num_processes 4 check-ranks --rounds 9 --sizes 4kB --fault *:0:configuration");
    assert_eq!(end.code, 78, "{}", end.stderr);
    assert_eq!(end.stderr, "error: asked to find the configuration wrong\n");
}

#[test]
fn a_hanging_rank_is_named_at_the_deadline() {
    let end = run("--num_processes 4 --collective_timeout 0.7 check-ranks --rounds 9 --sizes 4kB \
         --fault 3:2:hang");
    assert_eq!(end.code, 1, "{}", end.stderr);
    assert!(end.stderr.contains("deadline of"), "{}", end.stderr);
    assert!(end.stderr.contains("waiting for rank 3"), "{}", end.stderr);
    assert!(end.stderr.contains("rank 3 was still busy and was killed"), "{}", end.stderr);
}

#[test]
fn a_frozen_rank_is_named_at_the_deadline() {
    let mut run =
        Run::start("--num_processes 2 --collective_timeout 1 check-ranks --rounds 0 --sizes 4kB");
    run.wait_for("round 0 done");
    send(run.pid_of(1), libc::SIGSTOP);
    let end = run.finish();
    assert_eq!(end.code, 1, "{}", end.stderr);
    assert!(end.stderr.contains("waiting for rank 1"), "{}", end.stderr);
}

#[test]
fn a_deaf_rank_is_killed_after_a_failure_elsewhere() {
    let start = Instant::now();
    let mut run =
        Run::start("--num_processes 3 check-ranks --rounds 0 --sizes 4kB --fault 2:3:hang");
    run.wait_for("round 2 done");
    // Rank 2 must be deaf before the failure: else it hears of it in the sum of round 2.
    std::thread::sleep(Duration::from_millis(500));
    send(run.pid_of(1), libc::SIGKILL);
    let end = run.finish();
    assert_eq!(end.code, 137, "{}", end.stderr);
    assert!(end.stderr.contains("rank 2 was still busy and was killed"), "{}", end.stderr);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn output_is_prefixed_and_logged_by_rank() {
    let folder = std::env::temp_dir().join(format!("lorarun-logs-{}", std::process::id()));
    let logs = folder.display();
    let end = run(&format!(
        "--num_processes 2 --log_dir {logs} check-ranks --rounds 5 --sizes 4kB --fault 1:1:panic"
    ));
    let first = std::fs::read_to_string(folder.join("rank0.log"));
    let second = std::fs::read_to_string(folder.join("rank1.log"));
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(end.code, 101, "{}", end.stderr);
    assert!(end.stderr.contains("[rank 1] asked to panic in round 1"), "{}", end.stderr);
    assert!(end.stderr.contains(&format!("log: {logs}/rank1.log")), "{}", end.stderr);
    assert!(end.stdout.starts_with("ranks: 2, host: "), "{}", end.stdout);
    assert!(first.unwrap().starts_with("ranks: 2, host: "));
    assert!(second.unwrap().contains("asked to panic in round 1"));
}

#[test]
fn rank_0_draws_on_a_terminal_and_is_logged() {
    let folder = std::env::temp_dir().join(format!("lorarun-terminal-{}", std::process::id()));
    let (mut ours, mut theirs) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: two valid places for descriptors, which nobody else owns afterwards.
    let (mut screen, terminal) = unsafe {
        let opened =
            libc::openpty(&raw mut ours, &raw mut theirs, none, std::ptr::null(), std::ptr::null());
        assert_eq!(opened, 0);
        (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs))
    };
    let (mut command, mark) = lorarun(&format!(
        "--num_processes 2 --log_dir {} check-ranks --rounds 0 --sizes 4kB --pause_ms 2 \
         --fault 0:50:panic",
        folder.display()
    ));
    let mut child = command.stdout(Stdio::piped()).stderr(terminal).spawn().unwrap();
    // The launcher's copy alone must keep the terminal open, so that its end is noticed.
    drop(command);
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let mut run = Run { child, stdout, mark };
    run.wait_for("round 0 done");
    for (rank, kind) in [(0, "/dev/pts/"), (1, "pipe:")] {
        let stderr = std::fs::read_link(format!("/proc/{}/fd/2", run.pid_of(rank))).unwrap();
        assert!(stderr.to_string_lossy().starts_with(kind), "{}", stderr.display());
    }
    let mut shown = Vec::new();
    let mut part = [0; 4096];
    // A terminal that nobody writes to any more says so by an error.
    while let Ok(count @ 1..) = screen.read(&mut part) {
        shown.extend_from_slice(&part[..count]);
    }
    assert_eq!(run.child.wait().unwrap().code(), Some(101));
    let log = std::fs::read_to_string(folder.join("rank0.log"));
    std::fs::remove_dir_all(&folder).unwrap();
    let shown = String::from_utf8_lossy(&shown).into_owned();
    assert!(shown.contains("\nasked to panic in round 50"), "{shown}");
    assert!(!shown.contains("[rank 0]"), "{shown}");
    assert!(log.unwrap().contains("\nasked to panic in round 50\n"));
    assert_nothing_left(&run.mark);
}

#[test]
fn a_reader_that_goes_away_does_not_end_a_run() {
    let mut run =
        Run::start("--num_processes 2 check-ranks --rounds 40 --sizes 4kB,0,8 --pause_ms 5");
    run.wait_for("ranks: 2");
    // Nobody reads what is still to come.
    drop(run.child.stderr.take());
    let Run { mut child, stdout, mark } = run;
    drop(stdout);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_nothing_left(&mark);
}

#[test]
fn ranks_share_the_processor() {
    let mut run = Run::start(
        "--num_processes 2 --num_cpu_threads_per_process 3 check-ranks --rounds 0 --sizes 4kB",
    );
    run.wait_for("round 0 done");
    let environments = marked_processes(&run.mark);
    for name in ["LORARUN_THREADS=3", "RAYON_NUM_THREADS=3", "LOCAL_WORLD_SIZE=2"] {
        let having = environments.iter().filter(|(_, all)| all.iter().any(|one| one == name));
        assert_eq!(having.count(), 2, "{name}");
    }
    run.signal(libc::SIGINT);
    assert_eq!(run.finish().code, 0);
}

#[test]
fn each_rank_is_told_its_card() {
    let arguments = "--gpu_ids 3,1,3 check-ranks --rounds 0 --sizes 4kB";
    let (mut command, mark) = lorarun(arguments);
    command.env("LORARUN_NCCL_ON_SHARED_CARD", "1").env("NCCL_NET", "IB");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let mut run = Run { child, stdout, mark };
    run.wait_for("round 0 done");
    let environments = marked_processes(&run.mark);
    for (rank, card, host) in [(0, 3, true), (1, 1, false), (2, 3, true)] {
        let entry = format!("RANK={rank}");
        let own = environments.iter().find(|(_, all)| all.contains(&entry)).unwrap();
        assert!(own.1.contains(&format!("LORARUN_CARD={card}")), "{own:?}");
        // Who shares a card is another host for NCCL; what the user has set stays.
        assert_eq!(own.1.contains(&format!("NCCL_HOSTID=lorarun-rank-{rank}")), host, "{own:?}");
        assert!(own.1.contains(&"NCCL_NET=IB".to_owned()), "{own:?}");
    }
    run.signal(libc::SIGINT);
    assert_eq!(run.finish().code, 0);
}

#[test]
fn wrong_usage_ends_with_64() {
    for (arguments, words) in [
        ("--num_processes 0 check-ranks", "at least 1 is needed"),
        ("--num_processes two check-ranks", "a whole number from 1 is needed"),
        ("--num_processes 300 check-ranks", "ranks on one host should be 1 to 256, got: 300"),
        ("--num_cpu_threads_per_process 0 check-ranks", "at least 1 is needed"),
        ("--collective_timeout 0 check-ranks", "seconds above 0"),
        ("--num_proceses 2 check-ranks", "--num_processes"),
        ("--gpu_ids one check-ranks", "numbers like 0,2,3 or `all` are needed"),
        ("--num_processes 2 --gpu_ids 0 check-ranks", "hint: to share cards, name them twice"),
        ("--num_processes 2 selftest", "`selftest` is the work of one process"),
        ("check-ranks --sizes 1XB", "unit should be kB, MB or GB"),
        ("--nnodes 3:2 check-ranks", "should be a number of nodes, `N` or `MIN:MAX`, got: 3:2"),
        ("--nnodes two check-ranks", "should be a number of nodes, `N` or `MIN:MAX`, got: two"),
        ("--nnodes 2 --node_rank 0 check-ranks", "`--master_addr` is missing"),
        ("--rdzv_endpoint host:port check-ranks", "as in `node0:29500`"),
        ("--mixed_precision half check-ranks", "[possible values: no, fp16, bf16]"),
        ("--tee 4 check-ranks", "1 (stdout), 2 (stderr) or 3 (both)"),
        ("--use_deepspeed check-ranks", "`--use_deepspeed` cannot be followed: "),
        ("--numa_afinity check-ranks", "--numa_affinity"),
        ("--cpu --gpu_ids 0 check-ranks", "cannot be used with"),
        (
            "--num_processes 2 --log_dir /proc/self/status/logs check-ranks",
            "cannot write logs to the folder: /proc/self/status/logs",
        ),
        (
            concat!(
                "--cpu train ",
                env!("CARGO_MANIFEST_DIR"),
                "/../examples/quickstart/config.toml --device cuda"
            ),
            "`--cpu` and `--device cuda` contradict each other",
        ),
    ] {
        let end = run(arguments);
        assert_eq!(end.code, 64, "{arguments}: {}", end.stderr);
        assert!(end.stderr.contains(words), "{arguments}: {}", end.stderr);
    }
}

/// A training whose device is the card, which this machine is told to have two of.
fn on_two_cards(arguments: &str) -> (Option<i32>, String) {
    let (mut command, _) = lorarun(arguments);
    let output = command.env("CUDA_VISIBLE_DEVICES", "0,1").output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn more_processes_than_cards_are_refused_before_any_starts() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/quickstart/config.toml");
    for (options, words) in [
        ("--num_processes 3", "3 processes on this machine need a card each, and it shows: 2"),
        ("--nproc_per_node 5", "5 processes on this machine need a card each, and it shows: 2"),
        ("--num_processes 3 --gpu_ids all", "3 processes on this machine need a card each"),
        ("--gpu_ids 0,2", "`--gpu_ids` names a card that this machine does not show: 2"),
    ] {
        let (code, stderr) = on_two_cards(&format!("{options} train {config} --device cuda"));
        assert_eq!(code, Some(64), "{options}: {stderr}");
        assert!(stderr.contains(words), "{options}: {stderr}");
    }
    let (code, stderr) = on_two_cards(&format!("--multi_gpu --num_processes 4 train {config}"));
    assert_eq!(code, Some(64), "{stderr}");
    assert!(stderr.contains("4 processes on this machine need a card each"), "{stderr}");
}

#[test]
fn a_config_file_of_accelerate_is_followed() {
    let folder = std::env::temp_dir().join(format!("lorarun-accelerate-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("a.yaml");
    let with = |text: &str, options: &str| {
        std::fs::write(&file, text).unwrap();
        let shown = file.display();
        run(&format!("--config_file {shown} {options} check-ranks --rounds 1 --sizes 4kB"))
    };
    let three = "distributed_type: MULTI_CPU\nnum_processes: 3\nuse_cpu: true\n";
    let end = with(&format!("{three}dynamo_config:\n  dynamo_backend: INDUCTOR\n"), "");
    assert_eq!(end.code, 0, "{}", end.stderr);
    assert!(end.stdout.starts_with("ranks: 3, "), "{}", end.stdout);
    assert!(end.stderr.contains("a.yaml:4: `dynamo_config` is not followed"), "{}", end.stderr);
    // The command line wins.
    let end = with(three, "--num_processes 2 --same_network");
    assert!(end.stdout.starts_with("ranks: 2, "), "{}", end.stdout);
    assert!(end.stderr.contains("ignored: `--same_network`"), "{}", end.stderr);
    for (text, words) in [
        ("distributed_type: FSDP\n", "a.yaml:1: `distributed_type` cannot be `FSDP`"),
        ("num_proceses: 2\n", "did you mean `num_processes`?"),
        ("num_processes: [2\n", "a.yaml"),
    ] {
        let end = with(text, "");
        assert_eq!(end.code, 78, "{text}: {}", end.stderr);
        assert!(end.stderr.contains(words), "{text}: {}", end.stderr);
    }
    std::fs::remove_dir_all(&folder).unwrap();
    let end = run("--config_file /nowhere.yaml check-ranks");
    assert_eq!(end.code, 78, "{}", end.stderr);
}

#[test]
fn streams_go_where_tee_and_redirects_say() {
    let folder = std::env::temp_dir().join(format!("lorarun-tee-{}", std::process::id()));
    let logs = folder.display();
    let end = run(&format!(
        "--num_processes 2 --log_dir {logs} -t 0:2 -r 0:1,1:3 check-ranks --rounds 2 --sizes 4kB \
         --fault 1:1:panic"
    ));
    let first = std::fs::read_to_string(folder.join("rank0.log")).unwrap();
    let second = std::fs::read_to_string(folder.join("rank1.log")).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(end.code, 101, "{}", end.stderr);
    // Rank 0's stdout went into its log alone, and so did all of rank 1.
    assert_eq!(end.stdout, "");
    assert!(first.starts_with("ranks: 2, host: "), "{first}");
    assert!(second.contains("asked to panic in round 1"), "{second}");
    assert!(!end.stderr.contains("[rank 1]"), "{}", end.stderr);
    // One process is watched too where its output is led elsewhere.
    let folder = std::env::temp_dir().join(format!("lorarun-one-{}", std::process::id()));
    let end = run(&format!("--log_dir {} check-ranks --rounds 1 --sizes 4kB", folder.display()));
    let log = std::fs::read_to_string(folder.join("rank0.log")).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(end.code, 0, "{}", end.stderr);
    // The log holds both streams: those of stdout in their order, others between them.
    assert!(end.stdout.starts_with("ranks: 1, host: "), "{}", end.stdout);
    let mut logged = log.lines();
    assert!(end.stdout.lines().all(|line| logged.any(|other| other == line)), "{log}");
}

#[test]
fn a_wrong_environment_is_named() {
    for (variables, code, words) in [
        (&[("RANK", "1")][..], 78, "`WORLD_SIZE` is missing while `RANK` is set: 1"),
        (&[("RANK", "x"), ("WORLD_SIZE", "2")][..], 78, "`RANK` should be a whole number"),
        (
            &[("RANK", "0"), ("WORLD_SIZE", "2"), ("LORARUN_SEGMENT_FD", "99")][..],
            1,
            "descriptor 99 of `LORARUN_SEGMENT_FD`",
        ),
        (&[("RANK", "0"), ("WORLD_SIZE", "2")][..], 1, "`lorarun --num_processes N`"),
    ] {
        let (mut command, _) = lorarun("check-ranks --rounds 1");
        let output = command.envs(variables.iter().copied()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{variables:?}: {stderr}");
        assert!(stderr.contains(words), "{variables:?}: {stderr}");
    }
    let (mut command, _) = lorarun("--num_processes 2 check-ranks --rounds 1");
    let output = command.envs([("RANK", "0"), ("WORLD_SIZE", "2")]).output().unwrap();
    assert_eq!(output.status.code(), Some(64));
}

#[test]
fn the_version_says_what_was_built() {
    let end = run("--version");
    assert_eq!(end.code, 0);
    for word in ["lorarun 0.", "commit", "target", "compiler"] {
        assert!(end.stdout.contains(word), "{}", end.stdout);
    }
}

#[test]
fn top_tells_what_a_run_is_at() {
    let folder = tempfile::tempdir().unwrap();
    let logs = folder.path().join("logs");
    let (mut command, mark) = lorarun(&format!(
        "--num_processes 2 --rdzv_id night --log_dir {} check-ranks --rounds 0 --sizes 4kB \
         --pause_ms 5",
        logs.display()
    ));
    command.env("XDG_RUNTIME_DIR", folder.path());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let mut run = Run { child, stdout, mark };
    run.wait_for("round 3 done");
    let top = |arguments: &str| {
        let (mut command, _) = lorarun(&format!("top {arguments}"));
        let output = command.env("XDG_RUNTIME_DIR", folder.path()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let start = Instant::now();
    let view = loop {
        let (code, line, error) = top("--job night --json");
        assert_eq!(code, Some(0), "{error}");
        assert_eq!(line.lines().count(), 1, "{line}");
        let view: serde_json::Value = serde_json::from_str(&line).unwrap();
        if view["ranks"].as_array().unwrap().len() == 2 {
            break view;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{line}");
    };
    assert_eq!(view["pid"], run.child.id());
    assert_eq!(view["job"], "night");
    assert_eq!(view["state"], "running");
    assert_eq!(view["ranks"][1]["rank"], 1);
    assert_eq!(view["ranks"][1]["pid"], run.pid_of(1));
    assert!(view["command"].as_str().unwrap().starts_with("check-ranks "), "{view}");
    // The only run needs no name.
    let (code, text, _) = top("--once");
    assert_eq!(code, Some(0));
    assert!(text.starts_with("night   running   ranks: 2   for "), "{text}");
    assert!(text.contains("\nrank  host"), "{text}");
    let (code, _, error) = top("--job day");
    assert_eq!(code, Some(1));
    assert!(error.contains("no run of this name") && error.contains("--job night"), "{error}");
    run.signal(libc::SIGTERM);
    let end = run.finish();
    assert_eq!(end.code, 0, "{}", end.stderr);
    // Nothing is left, and that is said.
    assert_eq!(std::fs::read_dir(folder.path().join("lorarun")).unwrap().count(), 0);
    let (code, _, error) = top("");
    assert_eq!(code, Some(1));
    assert!(error.starts_with("no run of yours is going on"), "{error}");
}
