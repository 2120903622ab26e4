//! `lorarun doctor`: what this machine trains with, what is missing, and how to get it.
//!
//! Everything is tried as a run would try it: libraries are opened, kernels compiled, cards asked.
//! The facts are gathered first ([`Findings`]) and told after, as lines or as JSON.

use std::path::PathBuf;

use clap::Args;
use collectives::exit_code;
use engine::cuda::driver::{CardFacts, WORKSPACE};
use engine::cuda::nvidia::{self, Capability, Library};
use serde_json::{Value, json};
use trainer::card_reach;

use crate::machine::{Machine, show_bytes};
use crate::output::print_data;

/// Bytes of a card that the trial sum may use, beside the workspace.
const TRIAL: usize = 1 << 20;

/// Options of `doctor`.
#[derive(Debug, Args)]
pub struct Options {
    /// Print JSON instead of lines for people
    #[arg(long)]
    json: bool,
}

/// What was found of a library.
struct LibraryFinding {
    library: Library,
    /// Path and version, or places that were tried and advice.
    state: Result<(PathBuf, Option<String>), (Vec<String>, String)>,
}

/// What was found of a card.
struct CardFinding {
    facts: CardFacts,
    /// Free and all bytes.
    memory: Result<(usize, usize), String>,
    /// Why it cannot train.
    trouble: Option<String>,
}

/// Everything.
struct Findings {
    machine: Machine,
    libraries: Vec<LibraryFinding>,
    cards: Result<Vec<CardFinding>, String>,
    cache: Option<PathBuf>,
    /// Whether all kernels compile, for each kind of card here.
    kernels: Vec<(Capability, Result<(), String>)>,
    /// What NCCL did with the cards; `None` where there is nothing to try.
    nccl: Option<Result<String, String>>,
}

/// Examines this machine; always something can train, if only the processor.
pub fn run(options: &Options) -> i32 {
    let findings = Findings::gather();
    let text =
        if options.json { format!("{:#}\n", findings.as_json()) } else { findings.as_lines() };
    print_data(&text);
    exit_code::DONE
}

impl Findings {
    fn gather() -> Self {
        let libraries = Library::ALL.map(|library| LibraryFinding {
            library,
            state: match nvidia::find(library) {
                Ok(found) => Ok((found.path.clone(), found.version.clone())),
                Err(missing) => Err((missing.tried.clone(), missing.how_to_get.clone())),
            },
        });
        let cards = nvidia::cards().map_err(|error| error.to_string()).map(|cards| {
            let examine = |(index, facts): (usize, CardFacts)| CardFinding {
                facts,
                memory: nvidia::memory(index).map_err(|error| error.to_string()),
                trouble: nvidia::usable(index).err().map(|error| error.to_string()),
            };
            cards.into_iter().enumerate().map(examine).collect::<Vec<_>>()
        });
        let found = cards.as_deref().unwrap_or_default();
        let usable: Vec<usize> =
            (0..found.len()).filter(|index| found[*index].trouble.is_none()).collect();
        let mut kinds: Vec<Capability> =
            usable.iter().map(|index| found[*index].facts.capability).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let kernels = kinds.into_iter().map(|kind| (kind, compile_all(kind))).collect();
        let nccl = reach(&usable);
        let cache = nvidia::cache_folder();
        let libraries = libraries.into();
        Self { machine: Machine::examine(), libraries, cards, cache, kernels, nccl }
    }

    /// What a run without `--device` uses.
    fn device(&self) -> &str {
        let cards = self.cards.as_deref().unwrap_or_default();
        let usable = cards.iter().find(|card| card.trouble.is_none());
        usable.map_or("cpu", |card| &card.facts.label)
    }

    fn as_json(&self) -> Value {
        let library = |finding: &LibraryFinding| {
            let (found, missing) = (finding.state.as_ref().ok(), finding.state.as_ref().err());
            json!({
                "name": finding.library.name(),
                "found": found.is_some(),
                "path": found.map(|(path, _)| path.display().to_string()),
                "version": found.and_then(|(_, version)| version.clone()),
                "without_it": finding.library.purpose(),
                "tried": missing.map(|(tried, _)| tried),
                "how_to_get": missing.map(|(_, how)| how),
            })
        };
        let card = |card: &CardFinding| {
            let memory = card.memory.as_ref().ok();
            json!({
                "label": card.facts.label,
                "name": card.facts.name,
                "capability": capability_text(card.facts.capability),
                "processors": card.facts.processors,
                "memory_total": card.facts.memory,
                "memory_free": memory.map(|(free, _)| free),
                "memory_error": card.memory.as_ref().err(),
                "usable": card.trouble.is_none(),
                "trouble": card.trouble,
            })
        };
        let kernels = |(kind, result): &(Capability, Result<(), String>)| {
            json!({
                "capability": capability_text(*kind),
                "compile": result.is_ok(),
                "error": result.as_ref().err(),
            })
        };
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "device": self.device(),
            "processor": self.machine.as_json(),
            "cards": self.cards.as_deref().unwrap_or_default().iter().map(card).collect::<Vec<_>>(),
            "cards_error": self.cards.as_ref().err(),
            "libraries": self.libraries.iter().map(library).collect::<Vec<_>>(),
            "kernels": {
                "modules": nvidia::modules().collect::<Vec<_>>(),
                "cache": self.cache.as_ref().map(|folder| folder.display().to_string()),
                "cards": self.kernels.iter().map(kernels).collect::<Vec<_>>(),
            },
            "nccl": self.nccl.as_ref().map(|result| json!({
                "works": result.is_ok(),
                "told": result.as_ref().unwrap_or_else(|why| why),
            })),
        })
    }

    fn as_lines(&self) -> String {
        let mut sheet = Sheet::default();
        for line in self.machine.as_lines() {
            sheet.line("processor", &line);
        }
        match &self.cards {
            Err(why) => sheet.line("cards", &format!("none: {why}")),
            Ok(cards) if cards.is_empty() => sheet.line("cards", "none"),
            Ok(cards) => cards.iter().for_each(|card| sheet.line("cards", &card_text(card))),
        }
        let width = Library::ALL.map(|library| library.name().len()).into_iter().max();
        for finding in &self.libraries {
            let name = format!("{:width$}", finding.library.name(), width = width.unwrap_or(0));
            let text = match &finding.state {
                Ok((path, version)) => {
                    let version = version.as_deref().unwrap_or("version unknown");
                    format!("{name}  {version}, {}", path.display())
                }
                Err((tried, how)) => format!(
                    "{name}  missing: {}\nhint: {how}\n{} places were tried, `--json` lists them",
                    finding.library.purpose(),
                    tried.len()
                ),
            };
            sheet.line("libraries", &text);
        }
        let cache = self.cache.as_ref().map_or_else(
            || "no cache: neither `HOME` nor `XDG_CACHE_HOME` is set".to_owned(),
            |folder| format!("kept in {}", folder.display()),
        );
        sheet.line("kernels", &format!("{} modules, {cache}", nvidia::modules().count()));
        for (kind, result) in &self.kernels {
            let text = match result {
                Ok(()) => "all compile".to_owned(),
                Err(why) => why.clone(),
            };
            sheet.line("kernels", &format!("for {}: {text}", capability_text(*kind)));
        }
        match &self.nccl {
            None => {}
            Some(Ok(line)) => sheet.line("between cards", line),
            Some(Err(why)) => sheet.line("between cards", why),
        }
        sheet.line("trains on", self.device());
        sheet.text
    }
}

/// Lines with a heading on the left, said once.
#[derive(Default)]
struct Sheet {
    text: String,
    heading: &'static str,
}

impl Sheet {
    const INDENT: usize = 15;

    fn line(&mut self, heading: &'static str, text: &str) {
        for line in text.lines() {
            let shown = if self.heading == heading { "" } else { heading };
            self.heading = heading;
            let indent = Self::INDENT;
            self.text.push_str(format!("{shown:indent$}{line}").trim_end());
            self.text.push('\n');
        }
    }
}

fn compile_all(kind: Capability) -> Result<(), String> {
    let broken: Vec<String> = nvidia::modules()
        .filter_map(|module| nvidia::image(module, kind).err().map(|error| error.to_string()))
        .collect();
    if broken.is_empty() { Ok(()) } else { Err(broken.join("\n")) }
}

/// A sum by NCCL over the cards; `None` without cards or without NCCL.
fn reach(cards: &[usize]) -> Option<Result<String, String>> {
    if cards.is_empty() || nvidia::find(Library::Nccl).is_err() {
        return None;
    }
    let open = |card: &usize| nvidia::open(*card, Some(WORKSPACE + TRIAL));
    let opened = cards.iter().map(open).collect::<Result<Vec<_>, _>>();
    Some(match opened {
        Ok(devices) => card_reach::sum_over(&devices).map_err(|error| format!("{error:#}")),
        Err(error) => Err(error.to_string()),
    })
}

fn capability_text((major, minor): Capability) -> String {
    format!("{major}.{minor}")
}

fn card_text(card: &CardFinding) -> String {
    let facts = &card.facts;
    let memory = match &card.memory {
        Ok((free, total)) => format!("{} of {} free", show_bytes(*free), show_bytes(*total)),
        Err(why) => format!("{}, {why}", show_bytes(facts.memory)),
    };
    let kind = capability_text(facts.capability);
    let mut text = format!(
        "{}  {}, compute capability {kind}, {} multiprocessors, {memory}",
        facts.label, facts.name, facts.processors
    );
    if let Some(trouble) = &card.trouble {
        text.push_str(&format!("\ncannot train: {trouble}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings() -> Findings {
        let facts = CardFacts {
            name: "NVIDIA GeForce RTX 3070".into(),
            label: "cuda:0".into(),
            capability: (8, 6),
            processors: 46,
            memory: 8 << 30,
            shared_memory: 99 << 10,
            computes: true,
        };
        let old = CardFacts { label: "cuda:1".into(), capability: (7, 5), ..facts.clone() };
        let card = |facts, trouble: Option<&str>| CardFinding {
            facts,
            memory: Ok((6 << 30, 8 << 30)),
            trouble: trouble.map(str::to_owned),
        };
        let found = Ok((PathBuf::from("/opt/libnvrtc.so.13"), Some("13.0".to_owned())));
        let missing = Err((vec!["/a: not there".to_owned()], "`pip install x`".to_owned()));
        Findings {
            machine: Machine::examine(),
            libraries: vec![
                LibraryFinding { library: Library::Nvrtc, state: found },
                LibraryFinding { library: Library::Cudnn, state: missing },
            ],
            cards: Ok(vec![card(old, Some("too old\nhint: none")), card(facts, None)]),
            cache: Some("/cache".into()),
            kernels: vec![((8, 6), Err("`norm.cu` failed".into()))],
            nccl: Some(Ok("NCCL 2.28.9 sums over card 0".into())),
        }
    }

    #[test]
    fn lines_are_aligned_and_say_everything() {
        let mut findings = findings();
        findings.machine = Machine::for_tests();
        let want = "\
processor      Some CPU, 8 cores, 12.0 GiB of 16.0 GiB free
               AVX2 yes, AVX-512 yes, AVX-512 BF16 no
cards          cuda:1  NVIDIA GeForce RTX 3070, compute capability 7.5, 46 multiprocessors, 6.0 GiB of 8.0 GiB free
               cannot train: too old
               hint: none
               cuda:0  NVIDIA GeForce RTX 3070, compute capability 8.6, 46 multiprocessors, 6.0 GiB of 8.0 GiB free
libraries      NVRTC     13.0, /opt/libnvrtc.so.13
               cuDNN     missing: convolutions take a slower way
               hint: `pip install x`
               1 places were tried, `--json` lists them
";
        let lines = findings.as_lines();
        assert!(lines.starts_with(want), "{lines}");
        assert!(lines.contains("\nkernels        "), "{lines}");
        assert!(lines.contains("for 8.6: `norm.cu` failed\n"), "{lines}");
        assert!(
            lines.ends_with("between cards  NCCL 2.28.9 sums over card 0\ntrains on      cuda:0\n")
        );
    }

    #[test]
    fn json_holds_the_same_facts() {
        let value = findings().as_json();
        assert_eq!(value["device"], "cuda:0");
        assert_eq!(value["cards"][0]["usable"], false);
        assert_eq!(value["cards"][1]["memory_free"], 6_u64 << 30);
        assert_eq!(value["libraries"][0]["version"], "13.0");
        assert_eq!(value["libraries"][1]["found"], false);
        assert_eq!(value["libraries"][1]["how_to_get"], "`pip install x`");
        assert_eq!(value["kernels"]["cards"][0]["compile"], false);
        assert_eq!(value["nccl"]["works"], true);
    }
}
