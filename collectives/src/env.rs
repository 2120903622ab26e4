//! The environment contract: which rank of which run this process is.
//!
//! The names are torchrun's, so that any launcher that speaks them fits; our own begin with
//! `LORARUN_`. This is the only file that reads these variables. Nothing is guessed: a malformed or
//! contradictory value is an error that names the variable and the value.

use std::ffi::OsString;
use std::net::TcpListener;
use std::os::fd::{FromRawFd, RawFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::mesh::Token;

/// Number of this rank among all, from 0.
pub const RANK: &str = "RANK";
/// Number of this rank among those of its host, from 0: the card it uses unless [`CARD`] says another.
pub const LOCAL_RANK: &str = "LOCAL_RANK";
/// Number of ranks.
pub const WORLD_SIZE: &str = "WORLD_SIZE";
/// Number of ranks on this host.
pub const LOCAL_WORLD_SIZE: &str = "LOCAL_WORLD_SIZE";
/// Host of the coordinator.
pub const MASTER_ADDR: &str = "MASTER_ADDR";
/// TCP port of the coordinator.
pub const MASTER_PORT: &str = "MASTER_PORT";
/// Descriptor of the shared segment that the launcher passes on.
pub const SEGMENT_FD: &str = "LORARUN_SEGMENT_FD";
/// Descriptor of the listener at `MASTER_ADDR` and `MASTER_PORT` that the launcher passes to rank 0.
pub const MEETING_FD: &str = "LORARUN_MEETING_FD";
/// A text that all processes of a job share and nobody else knows; it seals what hosts say to each
/// other.
pub const TOKEN: &str = "LORARUN_TOKEN";
/// Folder for the flight recorder: a file for each rank with its last collectives.
pub const FLIGHT_DIR: &str = "LORARUN_FLIGHT_DIR";
/// Number of the start of this run; everything stamped with another one is refused.
pub const GENERATION: &str = "LORARUN_GENERATION";
/// Descriptor of the memory for snapshots that the launcher passes to the first rank of each host.
pub const SNAPSHOT_FD: &str = "LORARUN_SNAPSHOT_FD";
/// Steps from one snapshot to the next.
pub const SNAPSHOT_EVERY: &str = "LORARUN_SNAPSHOT_EVERY";
/// Number of ranks of this job when all its nodes are there; `WORLD_SIZE` is that of this start.
pub const FULL_WORLD_SIZE: &str = "LORARUN_FULL_WORLD_SIZE";
/// `1` where a cluster has started this job again: it goes on from its newest state unless its config
/// says otherwise.
pub const RESTARTED: &str = "LORARUN_RESTARTED";
/// CPU threads this rank may use.
pub const THREADS: &str = "LORARUN_THREADS";
/// Deadline of one collective, in seconds.
pub const COLLECTIVE_TIMEOUT: &str = "LORARUN_COLLECTIVE_TIMEOUT";
/// Number of the card that this rank uses, as CUDA counts those that `CUDA_VISIBLE_DEVICES` shows.
pub const CARD: &str = "LORARUN_CARD";
/// How sums travel between cards: `nccl` or `staged`; unset, whichever works.
pub const REDUCE: &str = "LORARUN_REDUCE";
/// `1` lets NCCL sum between ranks that share a card, which it takes for two hosts then. For tests.
pub const NCCL_ON_SHARED_CARD: &str = "LORARUN_NCCL_ON_SHARED_CARD";
/// How many processes `mpirun` of Open MPI has started, which of them this is, and the same on its
/// host; then MPICH's names.
const OPEN_MPI: [&str; 4] = [
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
];
const MPICH: [&str; 4] = ["PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"];
/// Set in job steps of Slurm, which may set `PMI_...` for programs that want no MPI.
const SLURM_STEP: &str = "SLURM_STEP_ID";
/// The cards that CUDA shows to this process: numbers or UUIDs, separated by commas.
const VISIBLE_CARDS: &str = "CUDA_VISIBLE_DEVICES";

/// Deadline of a collective when nothing else is said.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// A variable that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    /// The value does not parse or is out of range.
    #[error("environment variable `{name}` should be {expected}, got: {value}")]
    Malformed {
        /// Variable.
        name: &'static str,
        /// What it should be.
        expected: String,
        /// Its value.
        value: String,
    },
    /// One variable of the contract is set, another one is not.
    #[error(
        "environment variable `{missing}` is missing while `{present}` is set: {value}\n\
         hint: start ranks with `lorarun --num_processes N`, or unset `{present}`"
    )]
    Incomplete {
        /// Variable that is missing.
        missing: &'static str,
        /// Variable that is set.
        present: &'static str,
        /// Value of the one that is set.
        value: String,
    },
}

/// How sums travel between the cards of several ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ReduceWay {
    /// By NCCL where it can be used, over the host otherwise.
    #[default]
    Whichever,
    /// By NCCL, or not at all.
    Nccl,
    /// Over the host's memory.
    Staged,
}

/// Which rank of which run this process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Env {
    /// Number of this rank among all, `0..world_size`.
    pub rank: usize,
    /// Number of this rank on its host, `0..local_world_size`.
    pub local_rank: usize,
    /// Number of ranks, at least 1.
    pub world_size: usize,
    /// Number of ranks on this host, at least 1.
    pub local_world_size: usize,
    /// Host of the coordinator.
    pub master_addr: String,
    /// TCP port of the coordinator.
    pub master_port: u16,
    /// Number of the start of this run.
    pub generation: u64,
    /// Descriptor of the shared segment, when a launcher made one.
    pub segment_fd: Option<RawFd>,
    /// Descriptor of rank 0's listener for the ranks of other hosts, when a launcher made one.
    pub meeting_fd: Option<RawFd>,
    /// Seals what hosts say to each other.
    pub token: Token,
    /// Where the flight recorder writes.
    pub flight_dir: Option<PathBuf>,
    /// Descriptor of the memory for snapshots, on the first rank of each host; see
    /// [`Snapshots`](crate::Snapshots).
    pub snapshot_fd: Option<RawFd>,
    /// Steps from one snapshot to the next.
    pub snapshot_every: Option<u64>,
    /// Number of ranks of this job when all its nodes are there; at least `world_size` unless nothing
    /// was said.
    pub full_world_size: Option<usize>,
    /// Whether a cluster has started this job again.
    pub restarted: bool,
    /// Whether MPI has started this rank, and carries what ranks say to each other.
    pub by_mpi: bool,
    /// CPU threads this rank may use; `None` leaves the choice to the thread pool.
    pub threads: Option<usize>,
    /// Deadline of one collective.
    pub collective_timeout: Duration,
    /// The card that this rank was told to use; see [`card_index`](Env::card_index).
    pub card: Option<usize>,
    /// How sums travel between cards.
    pub reduce: ReduceWay,
    /// Whether NCCL may sum between ranks that share a card.
    pub nccl_on_shared_card: bool,
}

impl Env {
    /// One rank on its own, no launcher.
    pub fn single() -> Env {
        Env {
            rank: 0,
            local_rank: 0,
            world_size: 1,
            local_world_size: 1,
            master_addr: "127.0.0.1".to_owned(),
            master_port: 29500,
            generation: 0,
            segment_fd: None,
            meeting_fd: None,
            token: Token::new(""),
            flight_dir: None,
            snapshot_fd: None,
            snapshot_every: None,
            full_world_size: None,
            restarted: false,
            by_mpi: false,
            threads: None,
            collective_timeout: DEFAULT_TIMEOUT,
            card: None,
            reduce: ReduceWay::Whichever,
            nccl_on_shared_card: false,
        }
    }

    /// Reads the environment of this process. Without `RANK` and `WORLD_SIZE` it is [`single`].
    ///
    /// [`single`]: Env::single
    pub fn from_process() -> Result<Env, EnvError> {
        Env::from_lookup(|name| std::env::var_os(name))
    }

    /// Reads variables from `lookup`; [`from_process`](Env::from_process) with another source.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Env, EnvError> {
        let read = Reader { lookup };
        let alone = Env::single();
        let rank = read.number::<usize>(RANK, "a whole number from 0")?;
        let world = read.number::<usize>(WORLD_SIZE, "a whole number from 1")?;
        let (rank, world_size) = match (rank, world) {
            (None, None) => match read.mpi()? {
                Some(env) => return Ok(env),
                None => (0, 1),
            },
            (Some(rank), Some(world)) => (rank, world),
            (Some(rank), None) => return Err(incomplete(WORLD_SIZE, RANK, rank)),
            (None, Some(world)) => return Err(incomplete(RANK, WORLD_SIZE, world)),
        };
        at_least_one(WORLD_SIZE, world_size)?;
        below(RANK, rank, WORLD_SIZE, world_size)?;
        let local_world_size =
            read.number(LOCAL_WORLD_SIZE, "a whole number from 1")?.unwrap_or(world_size);
        at_least_one(LOCAL_WORLD_SIZE, local_world_size)?;
        below(LOCAL_WORLD_SIZE, local_world_size - 1, WORLD_SIZE, world_size)
            .map_err(|error| with_value(error, local_world_size))?;
        let local_rank = match read.number(LOCAL_RANK, "a whole number from 0")? {
            Some(local) => local,
            // All ranks are on this host, so the two numberings are one.
            None if local_world_size == world_size => rank,
            None => return Err(incomplete(LOCAL_RANK, LOCAL_WORLD_SIZE, local_world_size)),
        };
        below(LOCAL_RANK, local_rank, LOCAL_WORLD_SIZE, local_world_size)?;
        let threads = read.count(THREADS)?;
        Ok(Env {
            rank,
            local_rank,
            world_size,
            local_world_size,
            master_addr: read.text(MASTER_ADDR, "a host name")?.unwrap_or(alone.master_addr),
            master_port: read
                .number(MASTER_PORT, "a port from 0 to 65535")?
                .unwrap_or(alone.master_port),
            generation: read.number(GENERATION, "a whole number from 0")?.unwrap_or(0),
            segment_fd: read.descriptor(SEGMENT_FD)?,
            meeting_fd: read.descriptor(MEETING_FD)?,
            token: Token::new(&read.text(TOKEN, "a text")?.unwrap_or_default()),
            flight_dir: (read.lookup)(FLIGHT_DIR).map(PathBuf::from),
            snapshot_fd: read.descriptor(SNAPSHOT_FD)?,
            snapshot_every: read.count(SNAPSHOT_EVERY)?.map(|steps| steps as u64),
            full_world_size: read.count(FULL_WORLD_SIZE)?,
            restarted: read.flag(RESTARTED)?,
            by_mpi: false,
            threads,
            collective_timeout: read.timeout()?.unwrap_or(DEFAULT_TIMEOUT),
            card: read.number(CARD, "the number of a card from 0")?,
            reduce: read.reduce()?,
            nccl_on_shared_card: read.flag(NCCL_ON_SHARED_CARD)?,
        })
    }

    /// The variables that make a child process this rank.
    pub fn to_variables(&self) -> Vec<(&'static str, String)> {
        let mut variables = vec![
            (RANK, self.rank.to_string()),
            (LOCAL_RANK, self.local_rank.to_string()),
            (WORLD_SIZE, self.world_size.to_string()),
            (LOCAL_WORLD_SIZE, self.local_world_size.to_string()),
            (MASTER_ADDR, self.master_addr.clone()),
            (MASTER_PORT, self.master_port.to_string()),
            (GENERATION, self.generation.to_string()),
            (COLLECTIVE_TIMEOUT, self.collective_timeout.as_secs_f64().to_string()),
        ];
        if let Some(fd) = self.segment_fd {
            variables.push((SEGMENT_FD, fd.to_string()));
        }
        if let Some(fd) = self.meeting_fd {
            variables.push((MEETING_FD, fd.to_string()));
        }
        if !self.token.is_empty() {
            variables.push((TOKEN, self.token.text().to_owned()));
        }
        if let Some(folder) = &self.flight_dir {
            variables.push((FLIGHT_DIR, folder.display().to_string()));
        }
        if let Some(fd) = self.snapshot_fd {
            variables.push((SNAPSHOT_FD, fd.to_string()));
        }
        if let Some(steps) = self.snapshot_every {
            variables.push((SNAPSHOT_EVERY, steps.to_string()));
        }
        if let Some(count) = self.full_world_size {
            variables.push((FULL_WORLD_SIZE, count.to_string()));
        }
        if self.restarted {
            variables.push((RESTARTED, "1".to_owned()));
        }
        if let Some(threads) = self.threads {
            variables.push((THREADS, threads.to_string()));
        }
        if let Some(card) = self.card {
            variables.push((CARD, card.to_string()));
        }
        match self.reduce {
            ReduceWay::Whichever => (),
            ReduceWay::Nccl => variables.push((REDUCE, "nccl".to_owned())),
            ReduceWay::Staged => variables.push((REDUCE, "staged".to_owned())),
        }
        if self.nccl_on_shared_card {
            variables.push((NCCL_ON_SHARED_CARD, "1".to_owned()));
        }
        variables
    }

    /// The listener that a launcher handed to this rank.
    pub(crate) fn meeting_listener(&self) -> Option<TcpListener> {
        let fd = self.meeting_fd?;
        // SAFETY: fcntl checks the descriptor itself and returns -1 for what is none; a duplicate is
        // owned by nobody else.
        unsafe {
            let own = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3);
            (own >= 0).then(|| TcpListener::from_raw_fd(own))
        }
    }

    /// The card of this rank, as CUDA counts those that `CUDA_VISIBLE_DEVICES` shows: what the
    /// launcher's `--gpu_ids` or `LORARUN_CARD` say, otherwise its number on this host.
    pub fn card_index(&self) -> usize {
        self.card.unwrap_or(self.local_rank)
    }

    /// Whether a launcher started this rank, watches it and prints its last words.
    pub fn is_supervised(&self) -> bool {
        self.segment_fd.is_some()
    }
}

/// What `CUDA_VISIBLE_DEVICES` names: numbers or UUIDs, separated by commas.
pub fn visible_card_names() -> Option<String> {
    std::env::var(VISIBLE_CARDS).ok()
}

/// Number of cards that CUDA will show to the processes of this one: what `CUDA_VISIBLE_DEVICES`
/// names, otherwise those that the kernel's driver lists. `None` where neither tells.
pub fn visible_cards() -> Option<usize> {
    match visible_card_names() {
        // CUDA reads up to the first thing that names no card: `-1` hides the rest.
        Some(list) => Some(
            list.split(',').map(str::trim).take_while(|id| !id.is_empty() && *id != "-1").count(),
        ),
        None => Some(std::fs::read_dir("/proc/driver/nvidia/gpus").ok()?.count()),
    }
}

/// Which of the variables that decide how NCCL reaches other ranks are not set, with what makes
/// ranks that share a card meet over the host's own network. `rank` has to differ between them: NCCL
/// refuses two ranks of one host on one card.
pub fn nccl_defaults_on_shared_card(rank: usize) -> Vec<(&'static str, String)> {
    let wanted = [
        ("NCCL_HOSTID", format!("lorarun-rank-{rank}")),
        ("NCCL_NET", "Socket".to_owned()),
        ("NCCL_SOCKET_IFNAME", "lo".to_owned()),
    ];
    wanted.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect()
}

/// Reads and parses variables from one source.
struct Reader<F> {
    lookup: F,
}

impl<F: Fn(&str) -> Option<OsString>> Reader<F> {
    fn text(&self, name: &'static str, expected: &str) -> Result<Option<String>, EnvError> {
        match (self.lookup)(name) {
            None => Ok(None),
            Some(value) => match value.into_string() {
                Ok(text) => Ok(Some(text)),
                Err(raw) => Err(malformed(name, expected, raw.to_string_lossy().into_owned())),
            },
        }
    }

    fn number<T: FromStr>(
        &self,
        name: &'static str,
        expected: &str,
    ) -> Result<Option<T>, EnvError> {
        let Some(text) = self.text(name, expected)? else { return Ok(None) };
        match text.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(malformed(name, expected, text)),
        }
    }

    /// The place of a process that MPI has started with others.
    fn mpi(&self) -> Result<Option<Env>, EnvError> {
        let mpich = (self.lookup)(SLURM_STEP).is_none().then_some(MPICH);
        for [size, rank, local_size, local_rank] in std::iter::once(OPEN_MPI).chain(mpich) {
            let Some(world_size) = self.count(size)?.filter(|size| *size > 1) else { continue };
            let whole = "a whole number from 0";
            let Some(own) = self.number(rank, whole)? else {
                return Err(incomplete(rank, size, world_size));
            };
            below(rank, own, size, world_size)?;
            return Ok(Some(Env {
                rank: own,
                world_size,
                local_world_size: self.count(local_size)?.unwrap_or(1),
                local_rank: self.number(local_rank, whole)?.unwrap_or(0),
                threads: self.count(THREADS)?,
                collective_timeout: self.timeout()?.unwrap_or(DEFAULT_TIMEOUT),
                card: self.number(CARD, "the number of a card from 0")?,
                reduce: self.reduce()?,
                by_mpi: true,
                ..Env::single()
            }));
        }
        Ok(None)
    }

    fn count(&self, name: &'static str) -> Result<Option<usize>, EnvError> {
        let count = self.number(name, "a whole number from 1")?;
        count.map_or(Ok(()), |count| at_least_one(name, count))?;
        Ok(count)
    }

    fn descriptor(&self, name: &'static str) -> Result<Option<RawFd>, EnvError> {
        let expected = "an open descriptor from 3";
        match self.number::<RawFd>(name, expected)? {
            Some(fd) if fd < 3 => Err(malformed(name, expected, fd.to_string())),
            other => Ok(other),
        }
    }

    fn reduce(&self) -> Result<ReduceWay, EnvError> {
        let expected = "`nccl` or `staged`";
        match self.text(REDUCE, expected)?.as_deref() {
            None | Some("") => Ok(ReduceWay::Whichever),
            Some("nccl") => Ok(ReduceWay::Nccl),
            Some("staged") => Ok(ReduceWay::Staged),
            Some(other) => Err(malformed(REDUCE, expected, other.to_owned())),
        }
    }

    fn flag(&self, name: &'static str) -> Result<bool, EnvError> {
        let expected = "0 or 1";
        match self.text(name, expected)?.as_deref() {
            None | Some("" | "0") => Ok(false),
            Some("1") => Ok(true),
            Some(other) => Err(malformed(name, expected, other.to_owned())),
        }
    }

    fn timeout(&self) -> Result<Option<Duration>, EnvError> {
        let expected = "a number of seconds above 0";
        let Some(seconds) = self.number::<f64>(COLLECTIVE_TIMEOUT, expected)? else {
            return Ok(None);
        };
        match Duration::try_from_secs_f64(seconds) {
            Ok(timeout) if !timeout.is_zero() => Ok(Some(timeout)),
            _ => Err(malformed(COLLECTIVE_TIMEOUT, expected, seconds.to_string())),
        }
    }
}

fn malformed(name: &'static str, expected: &str, value: String) -> EnvError {
    EnvError::Malformed { name, expected: expected.to_owned(), value }
}

fn incomplete(missing: &'static str, present: &'static str, value: usize) -> EnvError {
    EnvError::Incomplete { missing, present, value: value.to_string() }
}

fn at_least_one(name: &'static str, value: usize) -> Result<(), EnvError> {
    if value == 0 { Err(malformed(name, "a whole number from 1", "0".to_owned())) } else { Ok(()) }
}

fn below(
    name: &'static str,
    value: usize,
    bound_name: &'static str,
    bound: usize,
) -> Result<(), EnvError> {
    if value < bound {
        return Ok(());
    }
    Err(EnvError::Malformed {
        name,
        expected: format!("within `{bound_name}` {bound}"),
        value: value.to_string(),
    })
}

fn with_value(error: EnvError, value: usize) -> EnvError {
    match error {
        EnvError::Malformed { name, expected, .. } => {
            EnvError::Malformed { name, expected, value: value.to_string() }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Env, EnvError> {
        Env::from_lookup(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn nothing_set_is_one_rank() {
        assert_eq!(read(&[]).unwrap(), Env::single());
    }

    #[test]
    fn torchrun_variables_are_understood() {
        let env = read(&[
            ("RANK", "5"),
            ("LOCAL_RANK", "1"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("MASTER_ADDR", "node0"),
            ("MASTER_PORT", "1234"),
        ])
        .unwrap();
        assert_eq!((env.rank, env.local_rank, env.world_size, env.local_world_size), (5, 1, 8, 4));
        assert_eq!((env.master_addr.as_str(), env.master_port), ("node0", 1234));
    }

    #[test]
    fn processes_of_mpi_are_ranks() {
        let open = [
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ];
        let env = read(&open).unwrap();
        assert_eq!((env.rank, env.local_rank, env.world_size, env.local_world_size), (3, 1, 4, 2));
        assert!(env.by_mpi);
        assert!(read(&open[..1]).unwrap_err().to_string().contains("`OMPI_COMM_WORLD_RANK`"));
        assert_eq!(read(&[("OMPI_COMM_WORLD_SIZE", "1")]).unwrap(), Env::single());
        // Our own launcher's words count more, and Slurm sets MPICH's for everybody.
        let own = [("RANK", "0"), ("WORLD_SIZE", "2"), open[0], open[1]];
        assert!(!read(&own).unwrap().by_mpi);
        let pmi = [("PMI_SIZE", "2"), ("PMI_RANK", "1")];
        assert!(read(&pmi).unwrap().by_mpi);
        assert_eq!(read(&[pmi[0], pmi[1], ("SLURM_STEP_ID", "0")]).unwrap(), Env::single());
    }

    #[test]
    fn variables_round_trip() {
        let env = Env {
            rank: 3,
            local_rank: 3,
            world_size: 4,
            local_world_size: 4,
            generation: 7,
            segment_fd: Some(9),
            snapshot_fd: Some(11),
            snapshot_every: Some(20),
            full_world_size: Some(8),
            restarted: true,
            threads: Some(2),
            collective_timeout: Duration::from_millis(1500),
            card: Some(5),
            reduce: ReduceWay::Staged,
            nccl_on_shared_card: true,
            ..Env::single()
        };
        assert_eq!((env.card_index(), Env { card: None, ..env.clone() }.card_index()), (5, 3));
        let variables = env.to_variables();
        let again = Env::from_lookup(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
        });
        assert_eq!(again.unwrap(), env);
    }

    #[test]
    fn every_malformed_value_is_named() {
        let two = [("RANK", "0"), ("WORLD_SIZE", "2")];
        for (name, value) in [
            ("RANK", "x"),
            ("RANK", "-1"),
            ("RANK", "2"),
            ("WORLD_SIZE", "0"),
            ("LOCAL_RANK", "2"),
            ("LOCAL_WORLD_SIZE", "3"),
            ("LOCAL_WORLD_SIZE", "0"),
            ("MASTER_PORT", "65536"),
            ("LORARUN_SEGMENT_FD", "2"),
            ("LORARUN_GENERATION", "new"),
            ("LORARUN_THREADS", "0"),
            ("LORARUN_SNAPSHOT_FD", "1"),
            ("LORARUN_SNAPSHOT_EVERY", "0"),
            ("LORARUN_FULL_WORLD_SIZE", "0"),
            ("LORARUN_RESTARTED", "maybe"),
            ("LORARUN_COLLECTIVE_TIMEOUT", "nan"),
            ("LORARUN_COLLECTIVE_TIMEOUT", "0"),
            ("LORARUN_CARD", "-1"),
            ("LORARUN_REDUCE", "mpi"),
            ("LORARUN_NCCL_ON_SHARED_CARD", "yes"),
        ] {
            let mut variables = vec![(name, value)];
            variables.extend(two.iter().filter(|(key, _)| *key != name));
            let message = read(&variables).unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")), "{message}");
            assert!(message.to_lowercase().ends_with(value), "{message} should end with {value}");
        }
    }

    #[test]
    fn half_a_contract_is_refused() {
        let error = read(&[("RANK", "1")]).unwrap_err().to_string();
        assert!(error.contains("`WORLD_SIZE` is missing"), "{error}");
        let error = read(&[("WORLD_SIZE", "4")]).unwrap_err().to_string();
        assert!(error.contains("`RANK` is missing"), "{error}");
    }
}
