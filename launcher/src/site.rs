//! Which node of which job this launcher is: from options, or from what a cluster sets.
//!
//! The one file that reads the variables of Slurm, Kubernetes and Kubeflow. Options win over
//! variables; among these the more particular wins: torchrun's (`PET_...`, as Kubeflow sets them),
//! then Kubernetes' Indexed Job, then Slurm. Nothing is guessed: what is set by halves is an error
//! that names the variable.

use std::ffi::OsString;

use crate::hostlist;

/// The port of the coordinator where none is given, as torchrun's.
pub const DEFAULT_PORT: u16 = 29500;

/// Who told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Nobody: one node.
    Alone,
    /// Options of the command line.
    Options,
    /// `PET_NNODES` and its like: Kubeflow's TrainJob, torchrun's own variables.
    Torchrun,
    /// An Indexed Job or JobSet.
    Kubernetes,
    /// A job step of `srun`.
    Slurm,
}

/// This node's place in its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Who told.
    pub source: Source,
    /// Number of this node, from 0. Node 0 coordinates.
    pub node: usize,
    /// Least and largest number of nodes that the job runs on.
    pub nodes: (usize, usize),
    /// Where node 0 is found.
    pub address: String,
    /// Its port.
    pub port: u16,
    /// Name of the job: nodes of another job are refused.
    pub job: String,
    /// How often the cluster has started this job again.
    pub restarts: usize,
    /// Processes on each node, where the cluster says so.
    pub processes: Option<usize>,
    /// Which of the node's processes that the cluster has started this one is; the first one
    /// launches, the others wait for it.
    pub task: usize,
    /// Names of the nodes, where the cluster says them.
    pub names: Vec<String>,
}

/// What the command line says; `None` where it says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// `--num_machines N`, `--nnodes MIN:MAX`.
    pub nodes: Option<(usize, usize)>,
    /// `--machine_rank`, `--node_rank`.
    pub node: Option<usize>,
    /// `--main_process_ip`, `--master_addr`.
    pub address: Option<String>,
    /// `--main_process_port`, `--master_port`.
    pub port: Option<u16>,
    /// `--rdzv_id`.
    pub job: Option<String>,
}

impl Site {
    /// One node, no cluster.
    pub fn alone() -> Site {
        Site {
            source: Source::Alone,
            node: 0,
            nodes: (1, 1),
            address: "127.0.0.1".to_owned(),
            port: DEFAULT_PORT,
            job: String::new(),
            restarts: 0,
            processes: None,
            task: 0,
            names: Vec::new(),
        }
    }

    /// Puts options and variables together.
    ///
    /// # Errors
    /// Words for what is missing, malformed or contradicts itself.
    pub fn find(asked: &Asked, lookup: impl Fn(&str) -> Option<OsString>) -> Result<Site, String> {
        let read = Reader { lookup: &lookup };
        let mut site = if asked.nodes.is_some() || asked.node.is_some() {
            Site { source: Source::Options, ..Site::alone() }
        } else if read.has("PET_NNODES") {
            torchrun(&read)?
        } else if read.has("JOB_COMPLETION_INDEX") {
            kubernetes(&read)?
        } else if read.has("SLURM_STEP_ID") && read.has("SLURM_JOB_ID") {
            slurm(&read)?
        } else {
            Site::alone()
        };
        site.obey(asked, &read)?;
        site.check()
    }

    /// Options win.
    fn obey(&mut self, asked: &Asked, read: &Reader<'_>) -> Result<(), String> {
        if let Some(nodes) = asked.nodes {
            self.nodes = nodes;
        }
        match asked.node {
            Some(node) => self.node = node,
            None if self.source == Source::Options && self.nodes.1 > 1 => {
                return Err("`--node_rank` is missing while `--nnodes` is set\n\
                            hint: give every node its number, from 0"
                    .to_owned());
            }
            None => {}
        }
        if let Some(address) = asked.address.clone().or(read.text("MASTER_ADDR")?) {
            self.address = address;
        } else if self.source == Source::Options && self.nodes.1 > 1 {
            return Err("`--master_addr` is missing while `--nnodes` is set\n\
                        hint: name the host of node 0, by which all nodes reach it"
                .to_owned());
        }
        if let Some(port) = asked.port.or(read.number("MASTER_PORT", "a port")?) {
            self.port = port;
        }
        if let Some(job) = &asked.job {
            self.job.clone_from(job);
        }
        Ok(())
    }

    fn check(self) -> Result<Site, String> {
        let (least, most) = self.nodes;
        if least == 0 || least > most {
            return Err(format!(
                "numbers of nodes should be from 1 and in order, got: {least}:{most}"
            ));
        }
        if self.node >= most {
            return Err(format!(
                "the number of this node should be from 0 to {}, got: {}",
                most - 1,
                self.node
            ));
        }
        Ok(self)
    }
}

/// torchrun's own variables, which Kubeflow's TrainJob sets.
fn torchrun(read: &Reader<'_>) -> Result<Site, String> {
    let nodes = read.text("PET_NNODES")?.unwrap_or_default();
    let nodes = parse_nodes(&nodes).map_err(|why| format!("`PET_NNODES` {why}"))?;
    let node = read.number("PET_NODE_RANK", "a whole number from 0")?;
    let node = match (node, nodes.1) {
        (Some(node), _) => node,
        (None, 1) => 0,
        (None, _) => return Err(missing("PET_NODE_RANK", "PET_NNODES")),
    };
    let address = read.text("PET_MASTER_ADDR")?;
    if address.is_none() && nodes.1 > 1 && !read.has("MASTER_ADDR") {
        return Err(missing("PET_MASTER_ADDR", "PET_NNODES"));
    }
    let alone = Site::alone();
    Ok(Site {
        source: Source::Torchrun,
        node,
        nodes,
        address: address.unwrap_or(alone.address),
        port: read.number("PET_MASTER_PORT", "a port")?.unwrap_or(DEFAULT_PORT),
        job: read.text("PET_RDZV_ID")?.unwrap_or_default(),
        // `auto`, `gpu` and `cpu` leave it to this program.
        processes: read.text("PET_NPROC_PER_NODE")?.and_then(|text| text.trim().parse().ok()),
        ..Site::alone()
    })
}

/// An Indexed Job: Kubernetes tells the index alone, `LORARUN_NODES` and `MASTER_ADDR` come from the
/// manifest.
fn kubernetes(read: &Reader<'_>) -> Result<Site, String> {
    let node = read.number("JOB_COMPLETION_INDEX", "a whole number from 0")?.unwrap_or_default();
    let Some(nodes) = read.text("LORARUN_NODES")? else {
        // A job of one pod says nothing of others.
        return match node {
            0 => Ok(Site { source: Source::Kubernetes, ..Site::alone() }),
            _ => Err(missing("LORARUN_NODES", "JOB_COMPLETION_INDEX")),
        };
    };
    let nodes = parse_nodes(&nodes).map_err(|why| format!("`LORARUN_NODES` {why}"))?;
    if nodes.1 > 1 && !read.has("MASTER_ADDR") {
        return Err(missing("MASTER_ADDR", "LORARUN_NODES"));
    }
    let job = read.text("JOB_NAME")?.unwrap_or_default();
    Ok(Site { source: Source::Kubernetes, node, nodes, job, ..Site::alone() })
}

/// A job step: one task a node launches that node's processes; more tasks are as many processes.
fn slurm(read: &Reader<'_>) -> Result<Site, String> {
    let whole = "a whole number from 0";
    let nodes = read.number("SLURM_STEP_NUM_NODES", whole)?;
    let nodes = match nodes.or(read.number("SLURM_NNODES", whole)?) {
        Some(nodes) => nodes,
        None => return Err(missing("SLURM_NNODES", "SLURM_STEP_ID")),
    };
    let tasks = read.number("SLURM_STEP_NUM_TASKS", whole)?.or(read.number("SLURM_NTASKS", whole)?);
    let tasks: usize = tasks.unwrap_or(nodes);
    if nodes == 0 || !tasks.is_multiple_of(nodes) {
        return Err(format!(
            "every node should have the same number of tasks, got: {tasks} tasks on {nodes} nodes\n\
             hint: `--ntasks-per-node` sets it"
        ));
    }
    let names = match read.text("SLURM_STEP_NODELIST")?.or(read.text("SLURM_NODELIST")?) {
        Some(list) => hostlist::expand(&list)?,
        None => Vec::new(),
    };
    let address = match names.first() {
        Some(name) => name.clone(),
        None if nodes == 1 => Site::alone().address,
        None => return Err(missing("SLURM_STEP_NODELIST", "SLURM_STEP_ID")),
    };
    let job = read.number::<u64>("SLURM_JOB_ID", whole)?.unwrap_or_default();
    let step = read.number::<u64>("SLURM_STEP_ID", whole)?.unwrap_or_default();
    Ok(Site {
        source: Source::Slurm,
        node: read.number("SLURM_NODEID", whole)?.unwrap_or_default(),
        nodes: (nodes, nodes),
        address,
        // Jobs that share a node must not share a port.
        port: 20_000 + ((job * 31 + step) % 20_000) as u16,
        job: format!("slurm-{job}.{step}"),
        restarts: read.number("SLURM_RESTART_COUNT", whole)?.unwrap_or_default(),
        processes: (tasks > nodes).then_some(tasks / nodes),
        task: read.number("SLURM_LOCALID", whole)?.unwrap_or_default(),
        names,
    })
}

/// `N` or `MIN:MAX`; the error follows the name of what was parsed.
pub fn parse_nodes(text: &str) -> Result<(usize, usize), String> {
    let wrong = || format!("should be a number of nodes, `N` or `MIN:MAX`, got: {text}");
    let number = |text: &str| text.trim().parse::<usize>().ok().filter(|number| *number > 0);
    let (least, most) = text.split_once(':').unwrap_or((text, text));
    let nodes = number(least).zip(number(most)).ok_or_else(wrong)?;
    if nodes.0 > nodes.1 { Err(wrong()) } else { Ok(nodes) }
}

fn missing(name: &str, present: &str) -> String {
    format!(
        "the variable `{name}` is missing while `{present}` is set\n\
         hint: set it, or say where this node is by `--nnodes`, `--node_rank` and `--master_addr`"
    )
}

/// Reads variables from one source.
struct Reader<'l> {
    lookup: &'l dyn Fn(&str) -> Option<OsString>,
}

impl Reader<'_> {
    fn has(&self, name: &str) -> bool {
        (self.lookup)(name).is_some_and(|value| !value.is_empty())
    }

    fn text(&self, name: &str) -> Result<Option<String>, String> {
        let Some(value) = (self.lookup)(name).filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        let text = value.into_string();
        text.map(Some).map_err(|raw| {
            format!("the variable `{name}` should be a text, got: {}", raw.to_string_lossy())
        })
    }

    fn number<T: std::str::FromStr>(&self, name: &str, what: &str) -> Result<Option<T>, String> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let number = text.trim().parse().map(Some);
        number.map_err(|_| format!("the variable `{name}` should be {what}, got: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn find(asked: &Asked, variables: &[(&str, &str)]) -> Result<Site, String> {
        let variables: HashMap<&str, &str> = variables.iter().copied().collect();
        Site::find(asked, |name| variables.get(name).map(OsString::from))
    }

    const NOTHING: Asked = Asked { nodes: None, node: None, address: None, port: None, job: None };

    #[test]
    fn nothing_said_is_one_node() {
        assert_eq!(find(&NOTHING, &[]), Ok(Site::alone()));
        // A batch script is not a job step: nothing there says that this is one task of several.
        let batch = [("SLURM_JOB_ID", "7"), ("SLURM_NNODES", "4"), ("SLURM_PROCID", "0")];
        assert_eq!(find(&NOTHING, &batch), Ok(Site::alone()));
    }

    #[test]
    fn options_name_every_part() {
        let asked = Asked {
            nodes: Some((2, 4)),
            node: Some(3),
            address: Some("h1".to_owned()),
            port: Some(1234),
            job: Some("night".to_owned()),
        };
        let site = find(&asked, &[("PET_NNODES", "9")]).unwrap();
        assert_eq!((site.source, site.node, site.nodes), (Source::Options, 3, (2, 4)));
        assert_eq!((site.address.as_str(), site.port, site.job.as_str()), ("h1", 1234, "night"));
        let half = Asked { nodes: Some((2, 2)), ..NOTHING };
        assert!(find(&half, &[]).unwrap_err().contains("`--node_rank` is missing"));
        let half = Asked { nodes: Some((2, 2)), node: Some(0), ..NOTHING };
        assert!(find(&half, &[]).unwrap_err().contains("`--master_addr` is missing"));
        let beyond = Asked { node: Some(4), ..asked };
        assert!(find(&beyond, &[]).unwrap_err().ends_with("from 0 to 3, got: 4"));
    }

    #[test]
    fn a_job_step_of_slurm() {
        let step = [
            ("SLURM_JOB_ID", "41"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_NNODES", "2"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_NODEID", "1"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_NODELIST", "gpu[07-08]"),
            ("SLURM_RESTART_COUNT", "2"),
        ];
        let site = find(&NOTHING, &step).unwrap();
        assert_eq!(site.source, Source::Slurm);
        assert_eq!((site.node, site.nodes, site.task), (1, (2, 2), 1));
        assert_eq!((site.address.as_str(), site.job.as_str()), ("gpu07", "slurm-41.0"));
        assert_eq!((site.processes, site.restarts), (Some(2), 2));
        assert_eq!(site.names, ["gpu07", "gpu08"]);
        assert!((20_000..40_000).contains(&site.port));
        // One task a node: the launcher chooses the number of processes.
        let one: Vec<_> =
            step.iter().copied().filter(|(name, _)| *name != "SLURM_NTASKS").collect();
        assert_eq!(find(&NOTHING, &one).unwrap().processes, None);
        let odd: Vec<_> = step
            .iter()
            .map(|(name, value)| (*name, if *name == "SLURM_NTASKS" { "3" } else { *value }))
            .collect();
        assert!(find(&NOTHING, &odd).unwrap_err().contains("3 tasks on 2 nodes"));
    }

    #[test]
    fn pods_of_a_job() {
        let alone = find(&NOTHING, &[("JOB_COMPLETION_INDEX", "0")]).unwrap();
        assert_eq!((alone.source, alone.nodes), (Source::Kubernetes, (1, 1)));
        let half = [("JOB_COMPLETION_INDEX", "1")];
        assert!(find(&NOTHING, &half).unwrap_err().contains("`LORARUN_NODES` is missing"));
        let pod = [
            ("JOB_COMPLETION_INDEX", "1"),
            ("LORARUN_NODES", "2:4"),
            ("MASTER_ADDR", "train-0.train"),
            ("MASTER_PORT", "29400"),
        ];
        let site = find(&NOTHING, &pod).unwrap();
        assert_eq!((site.node, site.nodes), (1, (2, 4)));
        assert_eq!((site.address.as_str(), site.port), ("train-0.train", 29400));
        let no_address: Vec<_> = pod.iter().copied().filter(|(n, _)| *n != "MASTER_ADDR").collect();
        assert!(find(&NOTHING, &no_address).unwrap_err().contains("`MASTER_ADDR` is missing"));
    }

    #[test]
    fn a_train_job_of_kubeflow() {
        let pod = [
            ("PET_NNODES", "3"),
            ("PET_NODE_RANK", "2"),
            ("PET_MASTER_ADDR", "job-node-0-0.job"),
            ("PET_MASTER_PORT", "29400"),
            ("PET_NPROC_PER_NODE", "8"),
            ("JOB_COMPLETION_INDEX", "2"),
        ];
        let site = find(&NOTHING, &pod).unwrap();
        assert_eq!((site.source, site.node, site.nodes), (Source::Torchrun, 2, (3, 3)));
        assert_eq!((site.processes, site.port), (Some(8), 29400));
        let auto = [("PET_NNODES", "1"), ("PET_NPROC_PER_NODE", "auto")];
        assert_eq!(find(&NOTHING, &auto).unwrap().processes, None);
        let wrong = [("PET_NNODES", "3:2")];
        let text = find(&NOTHING, &wrong).unwrap_err();
        assert_eq!(text, "`PET_NNODES` should be a number of nodes, `N` or `MIN:MAX`, got: 3:2");
    }
}
