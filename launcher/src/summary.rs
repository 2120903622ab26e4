//! How a run ended: which rank failed first, the exit code of the whole, and the words for it.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use collectives::{AbortRecord, Author, exit_code};

/// How one rank's process ended.
#[derive(Debug, Clone)]
pub struct Ending {
    /// Rank.
    pub rank: usize,
    /// Process id.
    pub pid: i32,
    /// Exit code, or signal that killed it.
    pub status: Status,
    /// Since the start of the run.
    pub after: Duration,
    /// Whether the launcher had already told it to stop.
    pub was_told: bool,
    /// The message it left for the launcher to print.
    pub last_words: Option<String>,
    /// Its last lines, as far as the launcher has read its output.
    pub last_lines: Vec<String>,
    /// Its log file.
    pub log: Option<PathBuf>,
}

/// Exit code or signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It ended by itself.
    Code(i32),
    /// It was killed.
    Signal(i32),
}

impl From<ExitStatus> for Status {
    fn from(status: ExitStatus) -> Status {
        match (status.code(), status.signal()) {
            (Some(code), _) => Status::Code(code),
            (None, Some(signal)) => Status::Signal(signal),
            // A stopped or continued process is not reported as ended.
            (None, None) => Status::Code(exit_code::FAILURE),
        }
    }
}

impl Status {
    /// What a shell would show.
    pub fn exit_code(self) -> i32 {
        match self {
            Status::Code(code) => code,
            Status::Signal(signal) => exit_code::SIGNAL_BASE + signal,
        }
    }

    /// Words for all ranks that fail in this way.
    pub fn cause(self) -> String {
        match self {
            Status::Code(code) => format!("ranks that end with exit code {code}"),
            Status::Signal(signal) => format!("ranks killed by signal {signal}"),
        }
    }

    /// Words that follow "rank 2".
    pub fn describe(self) -> String {
        match self {
            Status::Code(code) => format!("ended with exit code {code}"),
            Status::Signal(signal) => match signal_name(signal) {
                Some(name) => format!("was killed by signal {signal} ({name})"),
                None => format!("was killed by signal {signal}"),
            },
        }
    }
}

impl Ending {
    /// Whether this is a failure of the rank's own, not a consequence of the launcher's signals.
    fn is_own_failure(&self) -> bool {
        let told =
            self.was_told && matches!(self.status, Status::Signal(libc::SIGTERM | libc::SIGKILL));
        is_failure(self.status) && !told
    }
}

/// Whether this ending must stop the other ranks.
pub fn is_failure(status: Status) -> bool {
    !matches!(status, Status::Code(exit_code::DONE | exit_code::REQUEUE))
}

/// The rank that failed first. `endings` are in the order in which they were noticed, but who dies
/// of a peer's failure may be noticed before the peer: the first abort record knows better.
pub fn first_failure<'a>(endings: &'a [Ending], abort: Option<&AbortRecord>) -> Option<&'a Ending> {
    let failures = || endings.iter().filter(|ending| ending.is_own_failure());
    let culprit = abort.and_then(|record| record.culprit);
    let author = abort.and_then(|record| match record.by {
        Author::Rank(rank) => Some(rank),
        Author::Launcher => None,
    });
    let of = |rank: Option<usize>| failures().find(|ending| Some(ending.rank) == rank);
    of(culprit).or_else(|| of(author)).or_else(|| failures().next())
}

/// Exit code of the run; `stopped_by` is the signal whose repetition ended it at once.
pub fn exit_code_of(
    endings: &[Ending],
    abort: Option<&AbortRecord>,
    stopped_by: Option<i32>,
) -> i32 {
    if let Some(signal) = stopped_by {
        return exit_code::SIGNAL_BASE + signal;
    }
    match first_failure(endings, abort) {
        Some(failure) => failure.status.exit_code(),
        None if endings.iter().any(|ending| ending.status == Status::Code(exit_code::REQUEUE)) => {
            exit_code::REQUEUE
        }
        // A polite stop that came before a rank could be polite.
        None => endings
            .iter()
            .find(|ending| is_failure(ending.status))
            .map_or(exit_code::DONE, |ending| ending.status.exit_code()),
    }
}

/// What to print about a failed run, with a line end.
pub fn describe_failure(
    failure: &Ending,
    endings: &[Ending],
    abort: Option<&AbortRecord>,
) -> String {
    let code = failure.status.exit_code();
    // What is wrong with the command line or the configuration is wrong for all ranks: once, and
    // without the particulars of a process.
    if matches!(code, exit_code::USAGE | exit_code::CONFIGURATION)
        && let Some(words) = &failure.last_words
    {
        return format!("{words}\n");
    }
    let mut text = format!(
        "error: rank {} of {} {}\n  host: {}, process {}, after {:.1} s\n",
        failure.rank,
        endings.len(),
        failure.status.describe(),
        host_name(),
        failure.pid,
        failure.after.as_secs_f64()
    );
    if let Some(words) = &failure.last_words {
        push_block(&mut text, "its message", words.lines());
    }
    if let Some(log) = &failure.log {
        text.push_str(&format!("  log: {}\n", log.display()));
    }
    if !failure.last_lines.is_empty() {
        push_block(&mut text, "its last lines", failure.last_lines.iter().map(String::as_str));
    }
    // What the rank says of itself stands above.
    if let Some(AbortRecord { by: by @ Author::Rank(rank), reason, .. }) = abort
        && *rank != failure.rank
    {
        text.push_str(&format!("  first report, by {by}: {reason}\n"));
    }
    for other in endings.iter().filter(|other| other.rank != failure.rank) {
        let how = if other.was_told && other.status == Status::Signal(libc::SIGKILL) {
            "was still busy and was killed".to_owned()
        } else if other.was_told && other.status == Status::Signal(libc::SIGTERM) {
            "was stopped".to_owned()
        } else {
            other.status.describe()
        };
        text.push_str(&format!("  rank {} {how}\n", other.rank));
    }
    text
}

fn push_block<'a>(text: &mut String, title: &str, lines: impl Iterator<Item = &'a str>) {
    text.push_str(&format!("  {title}:\n"));
    for line in lines {
        text.push_str(&format!("    {line}\n"));
    }
}

/// Name of this host as its kernel has it.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "unknown".to_owned(), |name| name.trim().to_owned())
}

/// Names of the signals that end a process without its doing.
pub fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL, perhaps for lack of memory",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGALRM => "SIGALRM",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ending(rank: usize, status: Status, was_told: bool) -> Ending {
        Ending {
            rank,
            pid: 100 + rank as i32,
            status,
            after: Duration::from_millis(1500),
            was_told,
            last_words: None,
            last_lines: Vec::new(),
            log: None,
        }
    }

    fn blame(by: Author, culprit: usize) -> AbortRecord {
        AbortRecord { by, culprit: Some(culprit), reason: "why".to_owned() }
    }

    #[test]
    fn the_first_noticed_failure_gives_the_code() {
        let endings = [
            ending(1, Status::Code(0), false),
            ending(0, Status::Code(3), false),
            ending(2, Status::Code(1), true),
        ];
        assert_eq!(first_failure(&endings, None).unwrap().rank, 0);
        assert_eq!(exit_code_of(&endings, None, None), 3);
    }

    #[test]
    fn the_culprit_comes_before_who_was_noticed_first() {
        let endings = [
            ending(0, Status::Code(1), false),
            ending(2, Status::Signal(libc::SIGKILL), false),
            ending(1, Status::Signal(libc::SIGTERM), true),
        ];
        let record = blame(Author::Rank(0), 2);
        assert_eq!(exit_code_of(&endings, Some(&record), None), 137);
        // A culprit that only ended because the launcher killed it is not the one.
        let record = blame(Author::Rank(0), 1);
        assert_eq!(exit_code_of(&endings, Some(&record), None), 1);
    }

    #[test]
    fn saved_and_done_are_no_failures() {
        let endings = [ending(0, Status::Code(75), false), ending(1, Status::Code(0), false)];
        assert!(first_failure(&endings, None).is_none());
        assert_eq!(exit_code_of(&endings, None, None), 75);
        assert_eq!(exit_code_of(&endings[1..], None, None), 0);
    }

    #[test]
    fn a_stop_before_the_start_is_not_success() {
        let endings = [ending(0, Status::Signal(libc::SIGTERM), true)];
        assert!(first_failure(&endings, None).is_none());
        assert_eq!(exit_code_of(&endings, None, None), 143);
    }

    #[test]
    fn a_repeated_signal_gives_its_own_code() {
        let endings = [ending(0, Status::Signal(libc::SIGKILL), true)];
        assert_eq!(exit_code_of(&endings, None, Some(libc::SIGINT)), 130);
    }

    #[test]
    fn a_summary_names_rank_process_log_and_last_lines() {
        let mut endings = [
            ending(1, Status::Signal(libc::SIGSEGV), false),
            ending(0, Status::Signal(libc::SIGKILL), true),
        ];
        endings[0].log = Some("logs/rank1.log".into());
        endings[0].last_lines = vec!["step 7".to_owned()];
        let text = describe_failure(&endings[0], &endings, Some(&blame(Author::Launcher, 1)));
        let expected = format!(
            "error: rank 1 of 2 was killed by signal 11 (SIGSEGV)\n  host: {}, process 101, \
             after 1.5 s\n  log: logs/rank1.log\n  its last lines:\n    step 7\n  \
             rank 0 was still busy and was killed\n",
            host_name()
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn a_wrong_configuration_is_told_without_ranks() {
        let mut endings = [ending(1, Status::Code(78), false), ending(0, Status::Code(78), true)];
        endings[0].last_words = Some("error: unknown key".to_owned());
        endings[1].last_words = endings[0].last_words.clone();
        assert_eq!(describe_failure(&endings[0], &endings, None), "error: unknown key\n");
    }
}
