//! Options that make several nodes one job, in the words of accelerate and torchrun.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use collectives::Token;

use super::event::Policy;
use crate::site::{Asked, Site, Source, parse_nodes};

/// How long a node may take to end its ranks.
const HALT_WAIT: Duration = Duration::from_secs(8);
/// A node that was not heard from for this long is gone.
const SILENCE: Duration = Duration::from_secs(3);
/// Failures this close together are one.
const MERGE: Duration = Duration::from_secs(2);

/// Options of a job of several nodes. Under Slurm and in Kubernetes the environment says all of it.
#[derive(Debug, Default, Args)]
pub struct JobOptions {
    /// Number of nodes (machines), or MIN:MAX: the job then goes on with fewer when nodes are lost
    #[arg(long = "num_machines", aliases = ["num-machines", "nnodes"], value_name = "N",
          value_parser = parse_nodes)]
    pub num_machines: Option<(usize, usize)>,

    /// Number of this node, from 0; node 0 coordinates
    #[arg(long = "machine_rank", aliases = ["machine-rank", "node_rank", "node-rank"],
          value_name = "K")]
    pub machine_rank: Option<usize>,

    /// Host of node 0, by which every node reaches it
    #[arg(long = "main_process_ip", aliases = ["main-process-ip", "master_addr", "master-addr"],
          value_name = "HOST")]
    pub main_process_ip: Option<String>,

    /// Port of node 0 [default: 29500]
    #[arg(long = "main_process_port",
          aliases = ["main-process-port", "master_port", "master-port"], value_name = "PORT")]
    pub main_process_port: Option<u16>,

    /// Name of the job: nodes that say another one are refused
    #[arg(long = "rdzv_id", alias = "rdzv-id", value_name = "NAME")]
    pub rdzv_id: Option<String>,

    /// File with the secret of this job, the same on all nodes and read by nobody else: frames between
    /// nodes are sealed with it. `LORARUN_TOKEN` is the same in the environment and wins. Without
    /// either, also under Slurm and Kubernetes, whoever reaches the port and knows the job's name can
    /// take part
    #[arg(long = "rdzv_token_file", alias = "rdzv-token-file", value_name = "FILE")]
    pub rdzv_token_file: Option<PathBuf>,

    /// Starts after a failure, for each cause; 0 ends the job with the first one [default: 3 with
    /// several nodes and in a cluster's job, otherwise 0]
    #[arg(long = "max_restarts", alias = "max-restarts", value_name = "N")]
    pub max_restarts: Option<usize>,

    /// Steps between snapshots in memory, from which ranks go on after a failure
    #[arg(long = "snapshot_every_n_steps", alias = "snapshot-every-n-steps", value_name = "N",
          default_value = "20", value_parser = clap::value_parser!(u64).range(1..))]
    pub snapshot_every: u64,

    /// Seconds that the first start waits for all nodes
    #[arg(long = "join_wait", aliases = ["join-wait", "rdzv_timeout", "rdzv-timeout"],
          value_name = "SECONDS", default_value = "600", value_parser = crate::cli::parse_seconds)]
    pub join_wait: f64,

    /// Seconds that a start after a failure waits for a lost node
    #[arg(long = "rejoin_wait", alias = "rejoin-wait", value_name = "SECONDS",
          default_value = "60", value_parser = crate::cli::parse_seconds)]
    pub rejoin_wait: f64,

    /// Seconds without a sign of life after which a process hangs and all start again [default: ten
    /// times the longest that the run has shown, and minutes while nothing is known]
    #[arg(long = "hang_timeout", alias = "hang-timeout", value_name = "SECONDS",
          value_parser = crate::cli::parse_seconds)]
    pub hang_timeout: Option<f64>,
}

impl JobOptions {
    /// What they say of this node's place.
    pub fn asked(&self) -> Asked {
        Asked {
            nodes: self.num_machines,
            node: self.machine_rank,
            address: self.main_process_ip.clone(),
            port: self.main_process_port,
            job: self.rdzv_id.clone(),
        }
    }

    /// The secret of the job; `known` is that of the environment.
    ///
    /// # Errors
    /// Words for a file that cannot be read or holds none.
    pub fn token(&self, known: Token) -> Result<Token, String> {
        let Some(path) = self.rdzv_token_file.as_ref().filter(|_| known.is_empty()) else {
            return Ok(known);
        };
        let shown = path.display();
        let text = std::fs::read_to_string(path).map_err(|error| {
            format!("cannot read the file of `--rdzv_token_file`: {shown}: {error}")
        })?;
        match text.trim() {
            "" => Err(format!("the file of `--rdzv_token_file` should hold a secret: {shown}")),
            text => Ok(Token::new(text)),
        }
    }

    /// What the job allows.
    pub fn policy(&self, site: &Site) -> Policy {
        let is_cluster = site.nodes.1 > 1
            || matches!(site.source, Source::Slurm | Source::Kubernetes | Source::Torchrun);
        Policy {
            nodes: site.nodes,
            join_wait: Duration::from_secs_f64(self.join_wait),
            rejoin_wait: Duration::from_secs_f64(self.rejoin_wait),
            max_restarts: self.max_restarts.unwrap_or(if is_cluster { 3 } else { 0 }),
            hang_timeout: self.hang_timeout.map(Duration::from_secs_f64),
            silence: SILENCE,
            merge: MERGE,
            halt_wait: HALT_WAIT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_wins_over_the_file_of_the_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let options = JobOptions { rdzv_token_file: Some(path.clone()), ..JobOptions::default() };
        let token = |known: &str| options.token(Token::new(known)).map(|t| t.text().to_owned());
        assert_eq!(token("known"), Ok("known".to_owned()));
        assert!(token("").unwrap_err().starts_with("cannot read the file of `--rdzv_token_file`"));
        std::fs::write(&path, " \n").unwrap();
        assert!(token("").unwrap_err().contains("should hold a secret"));
        std::fs::write(&path, "secret\n").unwrap();
        assert_eq!(token(""), Ok("secret".to_owned()));
    }

    #[test]
    fn a_plain_machine_does_not_start_again_unless_asked() {
        let options = JobOptions { join_wait: 1.0, rejoin_wait: 1.0, ..JobOptions::default() };
        let restarts = |site: &Site| options.policy(site).max_restarts;
        assert_eq!(restarts(&Site::alone()), 0);
        assert_eq!(restarts(&Site { source: Source::Slurm, ..Site::alone() }), 3);
        assert_eq!(restarts(&Site { nodes: (1, 2), ..Site::alone() }), 3);
        let asked = JobOptions { max_restarts: Some(0), ..options };
        assert_eq!(asked.policy(&Site { nodes: (2, 2), ..Site::alone() }).max_restarts, 0);
    }
}
