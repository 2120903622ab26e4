//! Options of the launcher itself, in the words of accelerate and torchrun.
//!
//! Every name is taken with underscores and with hyphens. What has a meaning here means what it means
//! there; what those launchers know and this one has no use for is in `accepted`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::accelerate_config::AccelerateConfig;
use crate::accepted::Accepted;
use crate::cards::{Cards, PerNode};
use crate::job::options::JobOptions;
use crate::site::{Asked, Site, Source};
use crate::streams::{LocalRanks, Streams};

/// Options of the launcher itself; they come before the command.
#[derive(Debug, Default, Args)]
pub struct Launch {
    /// Number of processes (ranks), on all machines together [default: one per card of this machine
    /// that training can use, as `device` says; else 1 on each machine]. With cards, at most one
    /// process for each; `--gpu_ids 0,0` shares one
    #[arg(long = "num_processes", alias = "num-processes", value_name = "N",
          value_parser = parse_count)]
    pub num_processes: Option<usize>,

    /// Cards to use, one process on each: numbers as CUDA counts them, or `all`. A card named twice
    /// is shared by two processes
    #[arg(long = "gpu_ids", alias = "gpu-ids", value_name = "IDS", value_parser = Cards::parse,
          conflicts_with = "cpu")]
    pub gpu_ids: Option<Cards>,

    /// Train on cards, and fail where there are none; the number of processes is not changed
    #[arg(long = "multi_gpu", alias = "multi-gpu", conflicts_with = "cpu")]
    pub multi_gpu: bool,

    /// Train on the processor, as `--device cpu` behind `train` does; with `--num_processes N` in N
    /// processes
    #[arg(long = "cpu", aliases = ["use_cpu", "use-cpu"])]
    pub cpu: bool,

    /// Number format of training, where neither the config nor the arguments of `train` name one:
    /// those win, as in sd-scripts under `accelerate launch`
    #[arg(long = "mixed_precision", alias = "mixed-precision", value_name = "FORMAT")]
    pub mixed_precision: Option<MixedPrecision>,

    /// Options from a file that `accelerate config` wrote (YAML or JSON): those of the command line
    /// win. `default` reads accelerate's own, `~/.cache/huggingface/accelerate/default_config.yaml`;
    /// without this option that is not read, because a forgotten file must not change a run. A
    /// config of the training itself comes behind `train`
    #[arg(long = "config_file", alias = "config-file", value_name = "FILE")]
    pub config_file: Option<PathBuf>,

    /// Several nodes as one job.
    #[command(flatten)]
    pub job: JobOptions,

    /// Number of processes on each node, where `num_processes` is not given; `gpu` is one for each
    /// card, `auto` the same where cards can be used, `cpu` one process with all cores
    #[arg(long = "nproc_per_node", aliases = ["nproc-per-node"], value_name = "N",
          value_parser = PerNode::parse, conflicts_with = "num_processes")]
    pub nproc_per_node: Option<PerNode>,

    /// CPU threads of each process [default: CPU cores / processes]
    #[arg(
        long = "num_cpu_threads_per_process",
        alias = "num-cpu-threads-per-process",
        value_name = "T",
        value_parser = parse_count
    )]
    pub num_cpu_threads_per_process: Option<usize>,

    /// Keep the threads and the memory of each process at the processor socket (NUMA node) of its
    /// card; processes without a card are spread over the nodes
    #[arg(
        long = "numa_affinity",
        aliases = ["numa-affinity", "enable_numa_affinity", "enable-numa-affinity",
                   "enable_cpu_affinity", "enable-cpu-affinity"]
    )]
    pub numa_affinity: bool,

    /// Folder for one log file per process, `rank0.log` and so on; lines are appended
    #[arg(long = "log_dir", alias = "log-dir", value_name = "DIR")]
    pub log_dir: Option<PathBuf>,

    /// With `--log_dir`: what is both shown and logged: 0 nothing, 1 stdout, 2 stderr, 3 both, for all
    /// processes or for some: `0:3,1:2`. What is named neither here nor in `--redirects` is shown
    /// alone. Without both options everything is shown and logged
    #[arg(short = 't', long = "tee", value_name = "STREAMS", value_parser = Streams::parse)]
    pub tee: Option<Streams>,

    /// With `--log_dir`: what is logged and not shown; values as for `--tee`
    #[arg(short = 'r', long = "redirects", value_name = "STREAMS", value_parser = Streams::parse,
          requires = "log_dir")]
    pub redirects: Option<Streams>,

    /// Processes of this machine whose output is shown, as in `0,2` [default: all]
    #[arg(long = "local_ranks_filter", alias = "local-ranks-filter", value_name = "RANKS",
          value_parser = LocalRanks::parse)]
    pub local_ranks_filter: Option<LocalRanks>,

    /// Seconds that one process waits for the others before it gives up
    #[arg(
        long = "collective_timeout",
        alias = "collective-timeout",
        value_name = "SECONDS",
        default_value = "600",
        value_parser = parse_seconds
    )]
    pub collective_timeout: f64,

    /// What other launchers know.
    #[command(flatten)]
    pub accepted: Accepted,

    /// What `config_file` says.
    #[arg(skip)]
    pub file: AccelerateConfig,
}

/// Number format of training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MixedPrecision {
    /// float32.
    No,
    /// float16, with dynamic loss scaling.
    Fp16,
    /// bfloat16.
    Bf16,
}

impl MixedPrecision {
    /// As options and configs write it.
    pub fn name(self) -> &'static str {
        match self {
            MixedPrecision::No => "no",
            MixedPrecision::Fp16 => "fp16",
            MixedPrecision::Bf16 => "bf16",
        }
    }
}

impl Launch {
    /// Takes what the command line leaves open from the config file.
    pub fn fill_from(&mut self, mut file: AccelerateConfig) {
        file.cpu &= !self.multi_gpu && self.gpu_ids.is_none();
        file.multi_gpu &= !self.cpu;
        if self.gpu_ids.is_none() && !self.cpu && !file.cpu {
            self.gpu_ids.clone_from(&file.gpu_ids);
        }
        self.numa_affinity |= file.numa_affinity;
        self.file = file;
    }

    /// This node's place: the command line wins over a cluster's variables, these win over the config
    /// file, which is the same on all nodes as a rule.
    ///
    /// # Errors
    /// Words for what is missing, malformed or contradicts itself.
    pub fn site(
        &self,
        lookup: impl Fn(&str) -> Option<std::ffi::OsString>,
    ) -> Result<Site, String> {
        let asked = self.asked()?;
        let site = Site::find(&asked, &lookup);
        let by_environment = site.as_ref().is_ok_and(|site| site.source != Source::Alone);
        let options_say = asked.nodes.is_some() || asked.node.is_some();
        if self.file.nodes.is_none() || (by_environment && !options_say) {
            return site;
        }
        let file = &self.file;
        let nodes = asked.nodes.or(file.nodes.map(|nodes| (nodes, nodes)));
        let merged = Asked {
            nodes,
            node: asked.node.or(file.node),
            address: asked.address.or(file.address.clone()),
            port: asked.port.or(file.port),
            job: asked.job,
        };
        Site::find(&merged, &lookup)
    }

    /// What the options say of this node's place.
    fn asked(&self) -> Result<Asked, String> {
        let mut asked = self.job.asked();
        if let Some((host, port)) = &self.accepted.rdzv_endpoint {
            let said = asked.address.get_or_insert_with(|| host.clone());
            if said != host {
                return Err(format!(
                    "`--rdzv_endpoint` and `--main_process_ip` name different hosts: {host} and {said}"
                ));
            }
            asked.port = asked.port.or(*port);
        }
        if self.accepted.standalone {
            asked.nodes = Some((1, 1));
            asked.node = Some(0);
        }
        Ok(asked)
    }
}

/// A number from 1.
pub fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 is needed".to_owned()),
        Ok(count) => Ok(count),
        Err(_) => Err("a whole number from 1 is needed".to_owned()),
    }
}

/// A time above 0.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 1e9 => Ok(seconds),
        _ => Err("a number of seconds above 0 is needed".to_owned()),
    }
}
