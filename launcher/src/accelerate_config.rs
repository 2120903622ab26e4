//! The config file that `accelerate config` writes, YAML or JSON.
//!
//! Every key that accelerate knows is known here. What is honoured becomes a field; what has nothing
//! to do here is named in a warning if it says anything; what would train something else if it were
//! ignored is an error. All faults of a file are told at once.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use trainer::options::closest;

use crate::accepted::{is_no, why_refused};
use crate::cards::Cards;
use crate::launch::MixedPrecision;

/// What a config file says of a launch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccelerateConfig {
    /// The file.
    pub path: PathBuf,
    /// Processes on all machines together.
    pub num_processes: Option<usize>,
    /// Machines, where there are several.
    pub nodes: Option<usize>,
    /// Number of this machine, where there are several.
    pub node: Option<usize>,
    /// Host of machine 0.
    pub address: Option<String>,
    /// Its port.
    pub port: Option<u16>,
    /// Cards to use.
    pub gpu_ids: Option<Cards>,
    /// Number format.
    pub mixed_precision: Option<MixedPrecision>,
    /// Train on the processor.
    pub cpu: bool,
    /// Train on cards.
    pub multi_gpu: bool,
    /// Keep processes at the socket of their card.
    pub numa_affinity: bool,
    /// What is not followed, a line each.
    pub warnings: Vec<String>,
}

/// What is done with a key.
#[derive(Clone, Copy)]
enum Key {
    /// It becomes a field.
    Honoured,
    /// It changes nothing, whatever it says.
    Silent,
    /// It has nothing to do here, which is said if it asks for something.
    Idle(&'static str),
    /// It would change the result.
    Refused(&'static str),
}

const WHOLE_MODEL: &str = "every process holds the whole model, and a LoRA's few weights are never \
                           divided";
const NO_TPU: &str = "it is about TPUs";

/// All keys.
const KEYS: &[(&str, Key)] = &[
    ("compute_environment", Key::Honoured),
    ("distributed_type", Key::Honoured),
    ("mixed_precision", Key::Honoured),
    ("fp16", Key::Honoured),
    ("use_cpu", Key::Honoured),
    ("num_processes", Key::Honoured),
    ("machine_rank", Key::Honoured),
    ("num_machines", Key::Honoured),
    ("gpu_ids", Key::Honoured),
    ("main_process_ip", Key::Honoured),
    ("main_process_port", Key::Honoured),
    ("enable_cpu_affinity", Key::Honoured),
    ("rdzv_backend", Key::Silent),
    ("same_network", Key::Silent),
    ("main_training_function", Key::Silent),
    ("debug", Key::Idle("what the ranks call is always compared")),
    ("dynamo_config", Key::Idle("there is no PyTorch to compile for")),
    ("dynamo_backend", Key::Idle("there is no PyTorch to compile for")),
    ("deepspeed_config", Key::Idle(WHOLE_MODEL)),
    ("fsdp_config", Key::Idle(WHOLE_MODEL)),
    ("tp_config", Key::Idle(WHOLE_MODEL)),
    ("parallelism_config", Key::Idle(WHOLE_MODEL)),
    ("megatron_lm_config", Key::Idle(WHOLE_MODEL)),
    ("fp8_config", Key::Idle("`fp8_base` of the training config keeps the base model in fp8")),
    ("ipex_config", Key::Idle("there is no PyTorch to extend")),
    ("mpirun_config", Key::Refused("mpirun_hostfile")),
    ("use_mps_device", Key::Refused("mps")),
    ("use_xpu", Key::Refused("use_xpu")),
    ("downcast_bf16", Key::Idle(NO_TPU)),
    ("tpu_name", Key::Idle(NO_TPU)),
    ("tpu_zone", Key::Idle(NO_TPU)),
    ("tpu_use_cluster", Key::Idle(NO_TPU)),
    ("tpu_use_sudo", Key::Idle(NO_TPU)),
    ("tpu_vm", Key::Idle(NO_TPU)),
    ("tpu_env", Key::Idle(NO_TPU)),
    ("command_file", Key::Idle(NO_TPU)),
    ("commands", Key::Idle(NO_TPU)),
];

/// Where `accelerate config` leaves its file, for `--config_file default`.
pub fn default_path(lookup: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| lookup(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = set("HF_HOME").or_else(|| {
        let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
        Some(cache?.join("huggingface"))
    })?;
    let folder = home.join("accelerate");
    let json = folder.join("default_config.json");
    Some(if json.is_file() { json } else { folder.join("default_config.yaml") })
}

/// Reads a file.
///
/// # Errors
/// Words for everything that is wrong with it.
pub fn read(path: &Path) -> Result<AccelerateConfig, String> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).map_err(|error| {
        format!(
            "cannot read the config file of accelerate: `{shown}`: {error}\n\
             hint: `accelerate config` writes one; the config of a training comes behind `train`"
        )
    })?;
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<AccelerateConfig, String> {
    let shown = path.display();
    let is_json = path.extension().is_some_and(|ending| ending == "json");
    let value: Value = if is_json {
        serde_json::from_str(text).map_err(|error| format!("{shown}: {error}"))?
    } else {
        serde_saphyr::from_str(text)
            .map_err(|error| format!("{shown}: {}", first_line(&error.to_string())))?
    };
    let Value::Object(entries) = value else {
        return Err(format!(
            "{shown}: should hold `key: value` lines, as `accelerate config` writes them"
        ));
    };
    let mut reader = Reader { path, text, entries, faults: Vec::new(), warnings: Vec::new() };
    let config = reader.config();
    if reader.faults.is_empty() { Ok(config) } else { Err(reader.faults.join("\n")) }
}

struct Reader<'t> {
    path: &'t Path,
    text: &'t str,
    entries: Map<String, Value>,
    faults: Vec<String>,
    warnings: Vec<String>,
}

impl Reader<'_> {
    fn config(&mut self) -> AccelerateConfig {
        self.look_at_keys();
        let kind = self.distributed_type();
        let nodes = self.number("num_machines").unwrap_or(1);
        let node = self.number("machine_rank");
        let cpu = self.flag("use_cpu") || kind == Some("MULTI_CPU");
        let mut config = AccelerateConfig {
            path: self.path.to_owned(),
            num_processes: self.num_processes(),
            nodes: (nodes > 1).then_some(nodes),
            node: node.filter(|_| nodes > 1),
            address: self.text_of("main_process_ip").filter(|_| nodes > 1),
            port: self.port().filter(|_| nodes > 1),
            gpu_ids: self.gpu_ids(),
            mixed_precision: self.mixed_precision(),
            cpu,
            multi_gpu: kind == Some("MULTI_GPU") && !cpu,
            numa_affinity: self.flag("enable_cpu_affinity"),
            warnings: Vec::new(),
        };
        if nodes == 0 {
            self.fault("num_machines", "should be at least 1, got: 0");
        }
        config.warnings = std::mem::take(&mut self.warnings);
        config
    }

    fn look_at_keys(&mut self) {
        let names: Vec<&str> = KEYS.iter().map(|(name, _)| *name).collect();
        for (key, value) in self.entries.clone() {
            match KEYS.iter().find(|(name, _)| *name == key) {
                None => {
                    let advice = match closest(&key, &names) {
                        Some(name) => format!("did you mean `{name}`?"),
                        None => {
                            "take it out; a config of the training comes behind `train`".to_owned()
                        }
                    };
                    self.fault(&key, &format!("is no key of accelerate's\nhint: {advice}"));
                }
                Some((_, Key::Idle(why))) if !says_nothing(&value) => {
                    let line =
                        format!("warning: {}`{key}` is not followed: {why}", self.place(&key));
                    self.warnings.push(line);
                }
                Some((_, Key::Refused(option))) if !says_nothing(&value) => {
                    self.fault(&key, &format!("cannot be followed: {}", why_refused(option)));
                }
                Some(_) => {}
            }
        }
        let environment = self.text_of("compute_environment").unwrap_or_default();
        if !matches!(environment.as_str(), "" | "LOCAL_MACHINE" | "LOCAL") {
            self.fault(
                "compute_environment",
                &format!(
                    "should be `LOCAL_MACHINE`, got: {environment}\n\
                     hint: start `lorarun` on the machines themselves"
                ),
            );
        }
    }

    fn distributed_type(&mut self) -> Option<&'static str> {
        let known = ["NO", "MULTI_CPU", "MULTI_GPU"];
        let text = match self.entries.get("distributed_type")? {
            // Without quotes, YAML reads NO as false.
            Value::Bool(false) => "NO".to_owned(),
            _ => self.text_of("distributed_type")?.to_uppercase(),
        };
        if let Some(known) = known.into_iter().find(|known| *known == text) {
            return Some(known);
        }
        let why = match text.as_str() {
            "DEEPSPEED" | "FSDP" | "MEGATRON_LM" | "TP" => why_refused("use_deepspeed"),
            "XLA" | "TPU" => why_refused("tpu"),
            other if other.starts_with("MULTI_") => why_refused("use_xpu"),
            _ => "hint: `NO`, `MULTI_GPU` and `MULTI_CPU` are understood",
        };
        let line_or_colon = if why.starts_with("hint") { "\n" } else { ": " };
        self.fault("distributed_type", &format!("cannot be `{text}`{line_or_colon}{why}"));
        None
    }

    fn num_processes(&mut self) -> Option<usize> {
        // accelerate's word for "not said".
        if self.entries.get("num_processes").and_then(Value::as_i64) == Some(-1) {
            return None;
        }
        let count = self.number("num_processes");
        if count == Some(0) {
            self.fault("num_processes", "should be at least 1, got: 0");
        }
        count
    }

    fn port(&mut self) -> Option<u16> {
        let port = self.number("main_process_port")?;
        let fits = u16::try_from(port).ok();
        if fits.is_none() {
            self.fault("main_process_port", &format!("should be a port up to 65535, got: {port}"));
        }
        // 0 leaves the choice to the launcher.
        fits.filter(|port| *port > 0)
    }

    fn gpu_ids(&mut self) -> Option<Cards> {
        let text = match self.said("gpu_ids")? {
            Value::Array(ids) => ids.iter().map(plain).collect::<Vec<_>>().join(","),
            value => plain(value),
        };
        Cards::parse(&text)
            .map_err(|why| self.fault("gpu_ids", &format!("{why}, got: {text}")))
            .ok()
    }

    fn mixed_precision(&mut self) -> Option<MixedPrecision> {
        let text = match self.entries.get("mixed_precision").cloned() {
            // Without quotes, YAML reads no as false.
            Some(Value::Bool(false)) => "no".to_owned(),
            Some(value) if value.is_null() => return None,
            Some(value) => plain(&value).to_lowercase(),
            None if self.flag("fp16") => "fp16".to_owned(),
            None => return None,
        };
        match text.as_str() {
            "no" => Some(MixedPrecision::No),
            "fp16" => Some(MixedPrecision::Fp16),
            "bf16" => Some(MixedPrecision::Bf16),
            "fp8" => {
                let why = "cannot be fp8, which changes what is computed\n\
                           hint: `bf16` here; `fp8_base = true` in the training config keeps the \
                           base model in fp8";
                self.fault("mixed_precision", why);
                None
            }
            _ => {
                let why = format!("should be `no`, `fp16` or `bf16`, got: {text}");
                self.fault("mixed_precision", &why);
                None
            }
        }
    }

    /// The value of a key, if it says anything.
    fn said(&self, key: &str) -> Option<&Value> {
        self.entries.get(key).filter(|value| match value {
            Value::String(text) => !matches!(text.as_str(), "" | "null" | "None"),
            Value::Array(list) => !list.is_empty(),
            value => !value.is_null(),
        })
    }

    fn text_of(&mut self, key: &str) -> Option<String> {
        match self.said(key)? {
            Value::Array(_) | Value::Object(_) => {
                self.fault(key, "should be one word");
                None
            }
            value => Some(plain(value)),
        }
    }

    fn number(&mut self, key: &str) -> Option<usize> {
        let text = plain(self.said(key)?);
        let number = text.trim().parse().ok();
        if number.is_none() {
            self.fault(key, &format!("should be a whole number from 0, got: {text}"));
        }
        number
    }

    fn flag(&mut self, key: &str) -> bool {
        let Some(value) = self.said(key) else { return false };
        let text = plain(value);
        match text.to_lowercase().as_str() {
            "true" | "yes" => true,
            other if is_no(other) => false,
            _ => {
                self.fault(key, &format!("should be true or false, got: {text}"));
                false
            }
        }
    }

    fn fault(&mut self, key: &str, what: &str) {
        let fault = format!("{}`{key}` {what}", self.place(key));
        self.faults.push(fault);
    }

    /// `FILE:LINE: ` of a key.
    fn place(&self, key: &str) -> String {
        let shown = self.path.display();
        let is_it = |line: &str| {
            let line = line.trim_start().trim_start_matches(['{', '"', '\'', ' ']);
            line.strip_prefix(key)
                .is_some_and(|rest| rest.trim_start_matches(['"', '\'', ' ']).starts_with(':'))
        };
        match self.text.lines().position(is_it) {
            Some(at) => format!("{shown}:{}: ", at + 1),
            None => format!("{shown}: "),
        }
    }
}

/// What the reader of YAML says, without its drawing of the place and advice for programmers.
fn first_line(error: &str) -> &str {
    let line = error.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    line.split(", set DuplicateKeyPolicy").next().unwrap_or(line)
}

/// A value as it is written.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Whether a value asks for nothing.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => is_no(text),
        Value::Array(list) => list.iter().all(says_nothing),
        Value::Object(map) => map.values().all(says_nothing),
        _ => false,
    }
}

#[cfg(test)]
#[path = "accelerate_config_tests.rs"]
mod tests;
