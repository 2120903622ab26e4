//! Whose the names of a run's files are: a small file `.NAME.lease` beside them, which the newest
//! start holds.
//!
//! A run that was stopped or cut off and comes back finds that another start has taken its place, and
//! writes nothing more; two runs that write under one name are noticed likewise. The file is read
//! just before each rename of a LoRA or a state, and now and then between. A rename that is under way
//! while the lease is taken can still come through: file systems of clusters offer no lock that would
//! hold for them all.
//!
//! Rank 0 alone has one. It goes when the run ends, and stays where a run lost it that may come back.

use std::cell::Cell;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use collectives::Env;
use formats::atomic::write_atomic;
use formats::model_spec::iso_date;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{SavePoint, Saving};
use crate::console;
use crate::plan::Stamp;

/// Between two looks at the lease while the run trains.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// How long a start waits for a killed run to be gone.
const PATIENCE: Duration = Duration::from_secs(2);

/// A process that cannot be confused with a later one of its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Process {
    host: String,
    pid: u32,
    /// In ticks of the kernel's clock.
    started: u64,
}

/// Who holds a lease, as the file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    id: String,
    generation: u64,
    process: Process,
    /// What starts its job again: its launcher on this host, or itself.
    job: Process,
    /// Seconds since 1970.
    since: u64,
    /// The job that it has taken the names from, if that may come back.
    replaced: Option<Process>,
    /// Whether it has come to its end.
    ended: bool,
}

/// The lease of a run, held by this process until it is dropped or another start takes it.
#[derive(Debug)]
pub struct Lease {
    path: PathBuf,
    own: Holder,
    looked: Cell<Instant>,
}

/// The names belong to another run.
#[derive(Debug, thiserror::Error)]
#[error("{0}\nhint: each run needs an `output_name` or an `output_dir` of its own")]
pub struct LeaseLost(String);

impl Process {
    fn of(pid: u32) -> Option<Self> {
        let (started, _) = stat(pid)?;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Some(Self { host: host.trim().to_owned(), pid, started })
    }

    /// What can be said of it from here.
    fn fate(&self, here: &Process) -> Fate {
        if self.host != here.host {
            return Fate::Unknown;
        }
        match stat(self.pid) {
            Some((started, state)) if started == self.started => match state {
                b'Z' | b'X' => Fate::Gone,
                b'T' | b't' => Fate::Unknown,
                _ => Fate::Running,
            },
            _ => Fate::Gone,
        }
    }
}

/// Whether a process can write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Running,
    /// It was stopped (SIGSTOP), or lives on another host, or does not.
    Unknown,
    Gone,
}

/// When a process started and its state, as the kernel tells.
fn stat(pid: u32) -> Option<(u64, u8)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything, also brackets.
    let (_, fields) = text.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    let state = *fields.next()?.as_bytes().first()?;
    // Field 22 of proc_pid_stat(5); the state was the third.
    Some((fields.nth(18)?.parse().ok()?, state))
}

impl Holder {
    /// This process, as rank 0 of the start that `env` says.
    fn here(env: &Env) -> Result<Self> {
        let process = Process::of(std::process::id()).context("cannot read `/proc/self/stat`")?;
        let job = match env.is_supervised() {
            true => Process::of(std::os::unix::process::parent_id()),
            false => None,
        };
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid").context("cannot draw an id")?;
        Ok(Self {
            id: id.trim().to_owned(),
            generation: env.generation,
            job: job.unwrap_or_else(|| process.clone()),
            process,
            since: Stamp::Clock.now() as u64,
            replaced: None,
            ended: false,
        })
    }

    fn read(path: &Path) -> Result<Option<Self>> {
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .with_context(|| format!("the lease is damaged: {}", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("cannot read the lease: {}", path.display()))
            }
        }
    }

    fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self)?;
        Ok(write_atomic(path, |file| file.write_all(&text))?)
    }

    fn describe(&self) -> String {
        let Process { host, pid, .. } = &self.process;
        format!("process {pid} on host `{host}`, since {} UTC", iso_date(self.since as i64))
    }

    fn lost(&self, what: &str) -> LeaseLost {
        let holder = self.describe();
        LeaseLost(format!("{what}, the files of this name belong to another start: {holder}"))
    }

    /// Whether the names can be taken from it by `own`.
    fn yields_to(&self, own: &Holder) -> Result<(), LeaseLost> {
        let lost = |what| Err(self.lost(what));
        if self.job == own.job {
            return match self.generation > own.generation {
                true => lost("a later start of this job is there"),
                false => Ok(()),
            };
        }
        if self.replaced.as_ref() == Some(&own.job) {
            return lost("this job was replaced");
        }
        match self.ended || self.process.fate(&own.process) != Fate::Running {
            true => Ok(()),
            false => lost("another run is writing"),
        }
    }
}

fn path_of(saving: &Saving) -> PathBuf {
    saving.output_dir.join(lease_name(saving))
}

/// Name of the lease's file.
pub fn lease_name(saving: &Saving) -> String {
    let file = saving.path(SavePoint::Last);
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    format!(".{stem}.lease")
}

/// Refuses to start beside a run that is writing files of these names, once it had a moment to end.
/// For rank 0.
pub fn refuse_rival(saving: &Saving, env: &Env) -> Result<()> {
    let (own, start) = (Holder::here(env)?, Instant::now());
    loop {
        // A damaged one is replaced when the run takes it.
        let Ok(Some(holder)) = Holder::read(&path_of(saving)) else { return Ok(()) };
        match holder.yields_to(&own) {
            Err(_) if start.elapsed() < PATIENCE => std::thread::sleep(PATIENCE / 20),
            result => return Ok(result?),
        }
    }
}

impl Lease {
    /// Takes the names of this run's files. For rank 0.
    pub fn take(saving: &Saving, env: &Env) -> Result<Self> {
        let path = path_of(saving);
        let mut own = Holder::here(env)?;
        match Holder::read(&path) {
            Ok(Some(before)) => {
                before.yields_to(&own)?;
                let is_of_this_job = before.job == own.job;
                if before.ended || is_of_this_job {
                    own.replaced = before.replaced;
                } else if before.process.fate(&own.process) == Fate::Unknown {
                    console::note(&format!(
                        "takes the place of another run of this name, which will write nothing \
                         more: {}",
                        before.describe()
                    ));
                    own.replaced = Some(before.job);
                }
            }
            Ok(None) => {}
            Err(error) => console::warn(&format!("{error:#}; it is replaced")),
        }
        own.write(&path)?;
        Ok(Self { path, own, looked: Cell::new(Instant::now()) })
    }

    /// Asked before anything is written: whether the lease is still this process's.
    ///
    /// # Errors
    /// [`LeaseLost`], or the lease cannot be read.
    pub fn check(&self) -> Result<()> {
        self.looked.set(Instant::now());
        match Holder::read(&self.path)? {
            Some(holder) if holder.id == self.own.id => Ok(()),
            Some(holder) => Err(holder.lost("nothing was written").into()),
            None => Err(LeaseLost(format!(
                "nothing was written, a run of this name has ended meanwhile, or somebody has \
                 removed the lease: {}",
                self.path.display()
            ))
            .into()),
        }
    }

    /// The error to report when writing has failed: another start clears away what it finds half
    /// written, and then that is the cause.
    pub fn cause(&self, error: anyhow::Error) -> anyhow::Error {
        match self.check() {
            Err(lost) if lost.is::<LeaseLost>() => lost,
            _ => error,
        }
    }

    /// Whether another start has taken the lease; asked after each step, the file is read every few
    /// seconds. A file system that fails for a moment is no reason to end a run that writes nothing.
    ///
    /// # Errors
    /// [`LeaseLost`].
    pub fn look(&self) -> Result<()> {
        if self.looked.get().elapsed() < LOOK_INTERVAL {
            return Ok(());
        }
        match self.check() {
            Err(error) if error.is::<LeaseLost>() => Err(error),
            _ => Ok(()),
        }
    }

    /// Gives the lease back.
    fn release(&self) -> Result<()> {
        match Holder::read(&self.path)? {
            Some(holder) if holder.id == self.own.id => {}
            _ => return Ok(()),
        }
        match &self.own.replaced {
            None => fs::remove_file(&self.path).map_err(|error| anyhow!(error)),
            Some(_) => Holder { ended: true, ..self.own.clone() }.write(&self.path),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            console::warn(&format!("cannot give back {}: {error:#}", self.path.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;

    fn saving(folder: &Path) -> Saving {
        let options = Options {
            output_dir: Some(folder.to_owned()),
            output_name: Some("cat".to_owned()),
            ..Options::default()
        };
        Saving::from_options(&options, 1).unwrap()
    }

    /// A holder that is no process of this host's present.
    fn stranger(host: &str) -> Holder {
        let mut holder = Holder::here(&Env::single()).unwrap();
        holder.process = Process { host: host.to_owned(), pid: 1, started: u64::MAX };
        holder.job = holder.process.clone();
        holder.id = format!("stranger on {host}");
        holder
    }

    fn here() -> Process {
        Process::of(std::process::id()).unwrap()
    }

    #[test]
    fn a_lease_is_held_until_another_takes_it() {
        let folder = tempfile::tempdir().unwrap();
        let saving = saving(folder.path());
        let path = path_of(&saving);
        assert!(path.ends_with(".cat.lease"));
        let lease = Lease::take(&saving, &Env::single()).unwrap();
        lease.check().unwrap();
        stranger("elsewhere").write(&path).unwrap();
        let error = lease.check().unwrap_err();
        assert!(error.is::<LeaseLost>());
        let said = error.to_string();
        assert!(said.starts_with("nothing was written") && said.contains("process 1 on host"));
        assert!(said.contains("`elsewhere`, since 20"), "{said}");
        lease.look().unwrap();
        lease.looked.set(Instant::now() - LOOK_INTERVAL);
        assert!(lease.look().is_err());
        drop(lease);
        assert!(path.exists(), "another's lease is left alone");
        // It took this process's place, so this one may not come again under the same launcher.
        let mut other = stranger("elsewhere");
        other.replaced = Some(here());
        other.write(&path).unwrap();
        assert!(Lease::take(&saving, &Env::single()).is_err());
        assert!(refuse_rival(&saving, &Env::single()).is_err());
    }

    #[test]
    fn the_file_goes_unless_one_who_lost_it_may_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let saving = saving(folder.path());
        let path = path_of(&saving);
        drop(Lease::take(&saving, &Env::single()).unwrap());
        assert!(!path.exists());
        // Killed on this host: nobody comes back.
        stranger(&here().host).write(&path).unwrap();
        drop(Lease::take(&saving, &Env::single()).unwrap());
        assert!(!path.exists());
        stranger("elsewhere").write(&path).unwrap();
        drop(Lease::take(&saving, &Env::single()).unwrap());
        let left = Holder::read(&path).unwrap().unwrap();
        assert!(left.ended && left.replaced.is_some_and(|job| job.host == "elsewhere"));
        fs::write(&path, "torn").unwrap();
        Lease::take(&saving, &Env::single()).unwrap().check().unwrap();
    }

    #[test]
    fn a_running_process_is_not_replaced_unless_it_is_of_this_job() {
        let folder = tempfile::tempdir().unwrap();
        let saving = saving(folder.path());
        let path = path_of(&saving);
        let parent = Process::of(std::os::unix::process::parent_id()).unwrap();
        let mut rival = stranger("elsewhere");
        (rival.process, rival.job) = (parent.clone(), parent);
        rival.write(&path).unwrap();
        let error = refuse_rival(&saving, &Env::single()).unwrap_err().to_string();
        assert!(error.starts_with("another run is writing"), "{error}");
        assert!(Lease::take(&saving, &Env::single()).is_err());
        rival.job = here();
        rival.write(&path).unwrap();
        refuse_rival(&saving, &Env::single()).unwrap();
        rival.generation = 2;
        rival.write(&path).unwrap();
        let later = Env { generation: 3, ..Env::single() };
        Lease::take(&saving, &later).unwrap().check().unwrap();
        rival.write(&path).unwrap();
        let error = Lease::take(&saving, &Env::single()).unwrap_err().to_string();
        assert!(error.starts_with("a later start of this job"), "{error}");
    }
}
