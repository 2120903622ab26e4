//! Options of accelerate and torchrun beside those that `launch` honours: some are translated, some
//! have nothing to do here and are named in a warning, some would change the result if they were
//! ignored and are refused with the reason.

use clap::{ArgAction, Args};

/// What users bring from other launchers.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "From accelerate and torchrun")]
pub struct Accepted {
    /// Host of node 0, and with `:` its port: `--main_process_ip` and `--main_process_port` in one
    #[arg(long = "rdzv_endpoint", alias = "rdzv-endpoint", value_name = "HOST:PORT",
          value_parser = parse_endpoint)]
    pub rdzv_endpoint: Option<(String, Option<u16>)>,

    /// This machine alone, whatever the environment says of others
    #[arg(long = "standalone", conflicts_with_all = ["num_machines", "machine_rank"])]
    pub standalone: bool,

    /// `static`, `c10d` or `etcd`. Nodes always meet at node 0, which coordinates: no other service
    /// is needed, so all of these mean the same
    #[arg(long = "rdzv_backend", alias = "rdzv-backend", value_name = "NAME",
          value_parser = ["static", "c10d", "etcd", "etcd-v2"])]
    pub rdzv_backend: Option<String>,

    /// Settings of that service, ignored; `--join_wait` and `--rejoin_wait` set the waiting times
    #[arg(long = "rdzv_conf", alias = "rdzv-conf", value_name = "KEY=VALUE,..")]
    pub rdzv_conf: Option<String>,

    #[arg(short = 'm', long = "module", hide = true)]
    module: bool,

    #[arg(short = 'q', long = "quiet", hide = true)]
    quiet: bool,

    #[command(flatten)]
    nothing_to_do: NothingToDo,

    #[command(flatten)]
    refused: Refused,
}

/// Declares options that are hidden from the help: flags and values.
macro_rules! hidden_options {
    ($(#[$doc:meta])* $name:ident { $($flag:ident [$($flag_alias:literal),*]),* ; $($value:ident [$($value_alias:literal),*]),* }) => {
        $(#[$doc])*
        #[derive(Debug, Default, Args)]
        struct $name {
            $(#[arg(long = stringify!($flag), aliases = { const NAMES: &[&str] = &[$($flag_alias),*]; NAMES }, hide = true,
                    action = ArgAction::SetTrue)]
            $flag: bool,)*
            $(#[arg(long = stringify!($value), aliases = { const NAMES: &[&str] = &[$($value_alias),*]; NAMES }, hide = true)]
            $value: Option<String>,)*
        }

        impl $name {
            /// Names of those that were given.
            fn given(&self) -> Vec<&'static str> {
                let mut given = Vec::new();
                $(if self.$flag { given.push(stringify!($flag)); })*
                $(if self.$value.is_some() { given.push(stringify!($value)); })*
                given
            }
        }
    };
}

hidden_options! {
    /// Ignoring these changes nothing of the result.
    NothingToDo {
        same_network ["same-network"],
        no_python ["no-python"],
        run_path ["run-path"],
        debug [],
        dynamo_use_fullgraph ["dynamo-use-fullgraph"],
        dynamo_use_dynamic ["dynamo-use-dynamic"],
        dynamo_use_regional_compilation ["dynamo-use-regional-compilation"],
        virtual_local_rank ["virtual-local-rank"];
        dynamo_backend ["dynamo-backend"],
        dynamo_mode ["dynamo-mode"],
        main_training_function ["main-training-function"],
        monitor_interval ["monitor-interval"],
        role [],
        start_method ["start-method"],
        event_log_handler ["event-log-handler"],
        logs_specs ["logs-specs"],
        local_addr ["local-addr"]
    }
}

hidden_options! {
    /// Ignoring these would train something else, or elsewhere.
    Refused {
        use_deepspeed ["use-deepspeed"],
        use_fsdp ["use-fsdp"],
        use_megatron_lm ["use-megatron-lm"],
        use_parallelism_config ["use-parallelism-config"],
        tpu [],
        use_xpu ["use-xpu"],
        mps [],
        ipex [];
        downcast_bf16 ["downcast-bf16"],
        mpirun_hostfile ["mpirun-hostfile"]
    }
}

impl Accepted {
    /// One line that names what was given and has nothing to do here.
    pub fn warning(&self) -> Option<String> {
        let mut names = self.nothing_to_do.given();
        // Not to compile is what happens.
        let compiles = |value: &Option<String>| value.as_deref().is_some_and(|v| !is_no(v));
        if !compiles(&self.nothing_to_do.dynamo_backend) {
            names.retain(|name| *name != "dynamo_backend");
        }
        let others = [
            (self.module, "module"),
            (self.quiet, "quiet"),
            (self.rdzv_conf.is_some(), "rdzv_conf"),
        ];
        names.extend(others.into_iter().filter(|(given, _)| *given).map(|(_, name)| name));
        let list: Vec<String> = names.iter().map(|name| format!("`--{name}`")).collect();
        (!list.is_empty())
            .then(|| format!("warning: nothing to do for these here, ignored: {}", list.join(", ")))
    }

    /// Why the command line cannot be followed.
    pub fn refusal(&self) -> Option<String> {
        if self.refused.downcast_bf16.as_deref().is_some_and(is_no) {
            return None;
        }
        let name = self.refused.given().into_iter().next()?;
        Some(format!("`--{name}` cannot be followed: {}", why_refused(name)))
    }
}

/// Why ignoring it would train something else, or elsewhere.
pub fn why_refused(name: &str) -> &'static str {
    match name {
        "use_deepspeed" | "use_fsdp" | "use_megatron_lm" | "use_parallelism_config" => {
            "every process holds the whole model here, and a LoRA's few weights are never divided\n\
             hint: leave it out; `--num_processes N` divides the images of a batch"
        }
        "mpirun_hostfile" => {
            "hosts are not started from a file\n\
             hint: start `lorarun` on each host with `--nnodes`, `--node_rank` and `--master_addr`"
        }
        _ => {
            "this program trains on NVIDIA cards and on the processor\n\
             hint: leave it out, or say `--cpu`"
        }
    }
}

/// How accelerate writes "no".
pub fn is_no(text: &str) -> bool {
    matches!(text.to_lowercase().as_str(), "no" | "false" | "none" | "null" | "")
}

/// `HOST`, `HOST:PORT`, `[ADDRESS]:PORT`.
fn parse_endpoint(text: &str) -> Result<(String, Option<u16>), String> {
    let wrong = || "a host and a port are needed, as in `node0:29500`".to_owned();
    let (host, port) = match text.rsplit_once(':') {
        // An address of IPv6 holds colons itself.
        Some((host, _)) if host.contains(':') && !host.starts_with('[') => (text, None),
        Some((host, port)) if !port.ends_with(']') => {
            (host, Some(port.parse().map_err(|_| wrong())?))
        }
        _ => (text, None),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() { Err(wrong()) } else { Ok((host.to_owned(), port)) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn accepted(options: &str) -> Accepted {
        let words = ["lorarun"].into_iter().chain(options.split_whitespace());
        Cli::try_parse_from(words.chain(["check-ranks"])).unwrap().launch.accepted
    }

    #[test]
    fn what_has_nothing_to_do_is_named_in_one_line() {
        assert_eq!(accepted("").warning(), None);
        assert_eq!(accepted("--dynamo_backend no --rdzv_backend c10d").warning(), None);
        let line =
            accepted("--same_network --dynamo-backend inductor -m --role w -q").warning().unwrap();
        assert_eq!(
            line,
            "warning: nothing to do for these here, ignored: `--same_network`, \
             `--dynamo_backend`, `--role`, `--module`, `--quiet`"
        );
    }

    #[test]
    fn what_would_change_the_result_is_refused() {
        assert_eq!(accepted("--same_network --downcast_bf16 no").refusal(), None);
        for option in ["--use_deepspeed", "--use-fsdp", "--tpu", "--mps", "--downcast_bf16=yes"] {
            let why = accepted(option).refusal().unwrap();
            assert!(why.contains("cannot be followed: ") && why.contains("\nhint: "), "{why}");
        }
    }

    #[test]
    fn endpoints_name_a_host() {
        let host = |name: &str, port| Ok((name.to_owned(), port));
        assert_eq!(parse_endpoint("n0:29400"), host("n0", Some(29400)));
        assert_eq!(parse_endpoint("10.0.0.1"), host("10.0.0.1", None));
        assert_eq!(parse_endpoint("[fd00::1]:29400"), host("fd00::1", Some(29400)));
        assert_eq!(parse_endpoint("fd00::1"), host("fd00::1", None));
        for wrong in ["", ":29400", "n0:", "n0:http", "n0:70000"] {
            assert!(parse_endpoint(wrong).is_err(), "{wrong}");
        }
    }
}
