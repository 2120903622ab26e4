//! What a command will train on: its own arguments and config decide, the launcher's options fill in.
//!
//! The config is read here only to learn two things, `device` and `mixed_precision`; whatever is wrong
//! with it is said by the rank that trains.

use std::ffi::OsString;

use collectives::env::visible_cards;
use engine::cuda::nvidia;
use trainer::device;
use trainer::options::{self, Action, Device, Origin, Parsed};

use crate::cards::PerNode;
use crate::cli::{Command, Launch};

/// A training option that the launch sets where nothing else does.
#[derive(Debug, Clone, Copy)]
struct Wish {
    name: &'static str,
    value: &'static str,
    /// The config file of accelerate says it, not the command line.
    by_file: bool,
}

/// What a command will train on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    /// `None` if it does not train.
    pub device: Option<Device>,
    /// Arguments that the launcher's options add.
    pub added: Vec<OsString>,
    /// What the user should know, a line each.
    pub remarks: Vec<String>,
    /// The launch asks for cards.
    wants_cards: bool,
}

impl Intent {
    /// Reads the command's arguments and its config.
    ///
    /// # Errors
    /// Words for options that contradict each other.
    pub fn of(command: &Command, launch: &Launch) -> Result<Intent, String> {
        let wants_cards = launch.device().is_some_and(|wish| wish.value == "cuda");
        let mut intent =
            Intent { device: None, added: Vec::new(), remarks: Vec::new(), wants_cards };
        let (Command::Train(passed) | Command::Plan(passed)) = command else {
            if let Some(format) = launch.mixed_precision {
                let name = format.name();
                let line = format!(
                    "warning: `--mixed_precision {name}` has nothing to do: no training is started"
                );
                intent.remarks.push(line);
            }
            return Ok(intent);
        };
        let Some(parsed) = intent.read(&passed.arguments, launch)? else { return Ok(intent) };
        if parsed.action == Action::Train {
            intent.device = Some(parsed.options.device);
        }
        Ok(intent)
    }

    /// The arguments with what the launch adds; `None` where they cannot be read.
    fn read(&mut self, words: &[OsString], launch: &Launch) -> Result<Option<Parsed>, String> {
        let wishes: Vec<Wish> =
            launch.device().into_iter().chain(launch.wished_precision()).collect();
        let as_words = |wishes: &[Wish]| -> Vec<OsString> {
            let words =
                wishes.iter().flat_map(|wish| [format!("--{}", wish.name), wish.value.to_owned()]);
            words.map(OsString::from).collect()
        };
        let alone = options::parse(words);
        let Ok(parsed) = alone else {
            // A config may be complete with them alone.
            let names = |name: &str| {
                words.iter().any(|word| word.to_string_lossy().replace('-', "_").contains(name))
            };
            let unnamed: Vec<_> = wishes.into_iter().filter(|wish| !names(wish.name)).collect();
            let added = as_words(&unnamed);
            let parsed = options::parse(&[words, &added].concat()).ok();
            if parsed.is_some() {
                self.added = added;
            }
            return Ok(parsed);
        };
        let mut added = Vec::new();
        for wish in wishes {
            let written = options::find_option(wish.name)
                .and_then(|option| (option.read)(&parsed.options))
                .and_then(|value| value.as_str().map(str::to_owned))
                .unwrap_or_default();
            let wins = match parsed.options.written.get(wish.name) {
                Some(_) if written == wish.value => false,
                None => true,
                Some(origin) => self.settle(launch, wish, (origin, &written))?,
            };
            if wins {
                added.push(wish);
            }
        }
        self.added = as_words(&added);
        if self.added.is_empty() {
            return Ok(Some(parsed));
        }
        Ok(options::parse(&[words, &self.added].concat()).ok())
    }

    /// Whether the launch wins over what is written elsewhere.
    fn settle(
        &mut self,
        launch: &Launch,
        wish: Wish,
        (origin, written): (&Origin, &str),
    ) -> Result<bool, String> {
        let Wish { name, value, by_file } = wish;
        if name == "device" && !by_file {
            let flag = match (launch.cpu, launch.multi_gpu) {
                (true, _) => "--cpu",
                (_, true) => "--multi_gpu",
                _ => "--nproc_per_node",
            };
            return match origin {
                Origin::CommandLine => Err(format!(
                    "`{flag}` and `--device {written}` contradict each other\n\
                     hint: leave one of them out"
                )),
                Origin::File { .. } => Ok(true),
            };
        }
        let said = match by_file {
            true => format!("what `{}` says: {value}", launch.file.path.display()),
            false => format!("`--{name} {value}` of the launcher"),
        };
        let place = origin.name_option(name);
        self.remarks.push(format!("warning: {place} is {written}, which wins over {said}"));
        Ok(false)
    }

    /// Number of processes on this machine where nothing says it: one for each card.
    pub fn processes(&self) -> Option<usize> {
        let Some(device) = self.device else {
            return Some(cards_here()).filter(|count| self.wants_cards && *count > 0);
        };
        match device {
            Device::Cpu => None,
            Device::Cuda => Some(cards_here()).filter(|count| *count > 0),
            Device::Auto if device::choice(Device::Auto) == Device::Cuda => {
                nvidia::cards().ok().map(|cards| cards.len())
            }
            Device::Auto => None,
        }
    }

    /// Number of cards of this machine, where every rank has to have one. `None` too where there are
    /// none: the rank that misses its card knows why.
    pub fn cards_needed(&self, are_named: bool) -> Option<usize> {
        let must = match self.device? {
            Device::Cpu => false,
            Device::Cuda => true,
            Device::Auto => are_named || self.wants_cards,
        };
        must.then(cards_here).filter(|cards| *cards > 0)
    }
}

/// Cards that this machine shows to its processes.
fn cards_here() -> usize {
    let listed = || nvidia::cards().map_or(0, |cards| cards.len());
    visible_cards().unwrap_or_else(listed)
}

impl Launch {
    /// The device that the launch asks for.
    fn device(&self) -> Option<Wish> {
        let wish = |value, by_file| Some(Wish { name: "device", value, by_file });
        match self.nproc_per_node {
            _ if self.cpu => wish("cpu", false),
            _ if self.multi_gpu => wish("cuda", false),
            Some(PerNode::Cpu) => wish("cpu", false),
            Some(PerNode::Gpu) => wish("cuda", false),
            _ if self.file.cpu => wish("cpu", true),
            _ if self.file.multi_gpu => wish("cuda", true),
            _ => None,
        }
    }

    /// The number format that the launch asks for.
    fn wished_precision(&self) -> Option<Wish> {
        let by_file = self.mixed_precision.is_none();
        let value = self.mixed_precision.or(self.file.mixed_precision)?.name();
        Some(Wish { name: "mixed_precision", value, by_file })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::accelerate_config::AccelerateConfig;
    use crate::cli::Cli;
    use crate::launch::MixedPrecision;

    fn intent_of(line: &str, file: Option<AccelerateConfig>) -> Result<Intent, String> {
        let words = ["lorarun"].into_iter().chain(line.split_whitespace());
        let mut cli = Cli::try_parse_from(words).unwrap();
        if let Some(file) = file {
            cli.launch.fill_from(file);
        }
        Intent::of(&cli.command, &cli.launch)
    }

    /// A config file that holds these lines.
    fn config(lines: &str) -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        std::fs::write(
            &path,
            format!(
                "pretrained_model_name_or_path = \"m.safetensors\"\ntrain_data_dir = \"d\"\n\
                 resolution = 512\noutput_dir = \"o\"\n{lines}\n"
            ),
        )
        .unwrap();
        let path = path.display().to_string();
        (folder, path)
    }

    fn added(line: &str) -> String {
        let intent = intent_of(line, None).unwrap();
        assert_eq!(intent.remarks, Vec::<String>::new());
        let words: Vec<_> = intent.added.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    }

    #[test]
    fn what_the_launcher_says_is_added_where_nothing_else_says_it() {
        let (_folder, file) = config("");
        assert_eq!(added(&format!("train {file}")), "");
        assert_eq!(added(&format!("--cpu train {file}")), "--device cpu");
        assert_eq!(added(&format!("--nproc_per_node cpu train {file}")), "--device cpu");
        assert_eq!(
            added(&format!("--mixed_precision bf16 --multi_gpu plan {file}")),
            "--device cuda --mixed_precision bf16"
        );
        assert_eq!(
            added(&format!("--mixed_precision bf16 train {file} --mixed_precision=bf16")),
            ""
        );
    }

    #[test]
    fn a_config_that_needs_it_is_complete_with_it() {
        let (_folder, file) = config("full_bf16 = true");
        assert_eq!(
            added(&format!("--mixed_precision bf16 train {file}")),
            "--mixed_precision bf16"
        );
        assert_eq!(added(&format!("--mixed_precision fp16 train {file}")), "");
    }

    #[test]
    fn the_config_wins_over_the_launchers_precision() {
        let (_folder, file) = config("mixed_precision = \"bf16\"");
        let intent = intent_of(&format!("--mixed_precision fp16 train {file}"), None).unwrap();
        assert_eq!(intent.added, Vec::<OsString>::new());
        let line = &intent.remarks[0];
        assert!(
            line.ends_with(
                "`mixed_precision` is bf16, which wins over `--mixed_precision fp16` of the launcher"
            ),
            "{line}"
        );
        let from_file = AccelerateConfig {
            path: "a.yaml".into(),
            mixed_precision: Some(MixedPrecision::No),
            ..AccelerateConfig::default()
        };
        let intent = intent_of(&format!("train {file}"), Some(from_file)).unwrap();
        assert!(intent.remarks[0].ends_with("wins over what `a.yaml` says: no"));
    }

    #[test]
    fn the_command_line_wins_over_the_device_of_a_config() {
        let (_folder, file) = config("device = \"cuda\"");
        assert_eq!(added(&format!("--cpu train {file}")), "--device cpu");
        let error = intent_of(&format!("--cpu train {file} --device cuda"), None).unwrap_err();
        assert!(error.starts_with("`--cpu` and `--device cuda` contradict each other"), "{error}");
    }

    #[test]
    fn only_what_trains_needs_cards() {
        let (_folder, file) = config("device = \"cpu\"");
        let device = |line: &str| intent_of(line, None).unwrap().device;
        assert_eq!(device(&format!("train {file}")), Some(Device::Cpu));
        assert_eq!(intent_of(&format!("train {file}"), None).unwrap().processes(), None);
        assert_eq!(device(&format!("train {file} --device cuda")), Some(Device::Cuda));
        assert_eq!(device("check-ranks"), None);
        assert_eq!(device("train --help"), None);
        assert_eq!(device("train /nowhere.toml"), None);
        let remarks = intent_of("--mixed_precision no check-ranks", None).unwrap().remarks;
        assert!(remarks[0].contains("no training is started"), "{remarks:?}");
    }
}
