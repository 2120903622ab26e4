//! Everything that is settled before the first process starts: the config file, which node this is,
//! which ranks it starts on which cards and cores, and that logs can be written.

use collectives::{Env, exit_code};
use trainer::options::Device;

use crate::accelerate_config;
use crate::cards::Ranks;
use crate::cli::{Cli, Command};
use crate::intent::Intent;
use crate::numa::Machine;
use crate::output::{check_log_folder, tell};
use crate::site::Site;

/// Why nothing is started.
pub struct Refusal {
    /// Exit code.
    pub code: i32,
    /// Words for the user.
    pub message: String,
}

/// A wrong command line.
fn usage(message: String) -> Refusal {
    Refusal { code: exit_code::USAGE, message }
}

/// Settles where this node stands and what it starts; adds to the command what the launcher's options
/// say of the training.
pub fn prepare(cli: &mut Cli, env: &Env) -> Result<(Site, Ranks), Refusal> {
    if let Some(message) = cli.launch.accepted.refusal() {
        return Err(usage(message));
    }
    read_config_file(cli)?;
    // A rank that another launcher started stands where that says.
    let site = match env.world_size {
        1 => cli.launch.site(|name| std::env::var_os(name)).map_err(usage)?,
        _ => Site::alone(),
    };
    let intent = Intent::of(&cli.command, &cli.launch).map_err(usage)?;
    let ranks = cli.ranks(env, &site, &intent).map_err(usage)?;
    let remarks = cli.launch.accepted.warning().into_iter().chain(intent.remarks.iter().cloned());
    // One task of a node speaks for all.
    if site.task == 0 {
        remarks.for_each(|remark| tell(&remark));
        if let Some(folder) = &cli.launch.log_dir {
            check_log_folder(folder).map_err(usage)?;
        } else if cli.launch.tee.is_some() {
            tell("warning: `--tee` logs nothing without `--log_dir`");
        }
    }
    let launch = &cli.launch;
    let was_said = launch.num_processes.is_some()
        || launch.nproc_per_node.is_some()
        || launch.gpu_ids.is_some()
        || launch.file.num_processes.is_some()
        || site.processes.is_some();
    if !was_said && ranks.count() > 1 && site.task == 0 {
        tell(&format!(
            "one process on each card of this machine: {}; `--num_processes` or `--gpu_ids` takes \
             fewer",
            ranks.count()
        ));
    }
    if let Command::Train(passed) | Command::Plan(passed) = &mut cli.command {
        passed.added.clone_from(&intent.added);
    }
    let ranks = if cli.launch.numa_affinity { bind(ranks, &intent) } else { ranks };
    Ok((site, ranks))
}

fn read_config_file(cli: &mut Cli) -> Result<(), Refusal> {
    let Some(path) = cli.launch.config_file.clone() else { return Ok(()) };
    let wrong = |message| Refusal { code: exit_code::CONFIGURATION, message };
    let path = match path.as_os_str() == "default" {
        false => path,
        true => {
            accelerate_config::default_path(|name| std::env::var_os(name)).ok_or_else(|| {
                wrong("`--config_file default` needs the variable `HOME` or `HF_HOME`".to_owned())
            })?
        }
    };
    let file = accelerate_config::read(&path).map_err(wrong)?;
    file.warnings.iter().for_each(|warning| tell(warning));
    cli.launch.fill_from(file);
    Ok(())
}

/// Keeps ranks at the cores near their cards.
fn bind(ranks: Ranks, intent: &Intent) -> Ranks {
    let machine = Machine::read();
    let nodes = machine.nodes();
    if nodes < 2 {
        tell(&format!("`--numa_affinity`: nothing to bind, NUMA nodes of this machine: {nodes}"));
        return ranks;
    }
    let by_number = intent.device.is_some_and(|device| device != Device::Cpu);
    let card = |rank| ranks.card(rank).or(by_number.then_some(rank));
    let cards: Vec<Option<usize>> = (0..ranks.count()).map(card).collect();
    let bindings = machine.bind(&cards);
    ranks.with_bindings(bindings)
}
