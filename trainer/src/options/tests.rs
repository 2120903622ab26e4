//! The option table against the reference's list, and reading configs as users write them.

use super::*;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::Path;

/// Options that the reference does not have, or has in its SDXL trainer alone.
const OWN: &[&str] = &[
    "allow_batch_change",
    "allow_unknown",
    "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk",
    "config_check",
    "device",
    "disable_mmap_load_safetensors",
    "dry_run",
    "ema_decay",
    "max_skipped_steps",
    "no_cuda_graph",
    "reproducible",
    "sdxl",
    "strict_data",
    "text_encoder_batch_size",
    "threads",
    "vram_limit",
];

fn data(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/options").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|fault| panic!("{}: {fault}", path.display()))
}

/// Name, type and default of each option of the reference.
fn reference() -> Vec<(String, String, String)> {
    let text = data("options.txt");
    text.lines()
        .filter(|line| !line.starts_with("--help "))
        .map(|line| {
            let (name, rest) = line[2..].split_once(' ').unwrap();
            let (kind, rest) = rest.split_once(" default=").unwrap();
            let default = rest.split(" choices=").next().unwrap();
            (name.to_owned(), kind.to_owned(), default.trim().to_owned())
        })
        .collect()
}

fn try_parse(words: &[&str]) -> anyhow::Result<Parsed> {
    parse(&words.iter().map(OsString::from).collect::<Vec<_>>())
}

/// The words of a smallest valid run, and some more.
fn run_with(words: &[&str]) -> anyhow::Result<Parsed> {
    let smallest =
        ["--pretrained_model_name_or_path=m", "--output_dir=o", "--dataset_config=d.toml"];
    try_parse(&[&smallest[..], words].concat())
}

fn options(words: &[&str]) -> Options {
    run_with(words).unwrap().options
}

fn fault(words: &[&str]) -> String {
    run_with(words).unwrap_err().to_string()
}

/// Writes a config into a fresh folder and reads it; `{dir}` in the words becomes the folder.
fn with_config(case: &str, text: &str, words: &[&str]) -> anyhow::Result<Parsed> {
    let dir = std::env::temp_dir().join(format!("lorarun-options-{}-{case}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("config.toml");
    std::fs::write(&path, text).unwrap();
    let mut all = vec![path.to_str().unwrap()];
    all.extend(words);
    let result = try_parse(&all);
    std::fs::remove_dir_all(&dir).unwrap();
    result
}

const SMALLEST: &str =
    "pretrained_model_name_or_path = 'm'\noutput_dir = 'o'\ndataset_config = 'd.toml'\n";

#[test]
fn names_are_those_of_the_reference_and_our_own() {
    let mut expected: BTreeSet<String> = reference().into_iter().map(|row| row.0).collect();
    expected.extend(OWN.iter().map(|name| (*name).to_owned()));
    let names: BTreeSet<String> = OPTIONS.iter().map(|spec| spec.name.to_owned()).collect();
    assert_eq!(names, expected);
    assert_eq!(names.len(), OPTIONS.len(), "a name is declared twice");
}

#[test]
fn defaults_are_those_of_the_reference() {
    for (name, kind, default) in reference() {
        let spec = find_option(&name).unwrap();
        let mut read = Options::default();
        match (kind.as_str(), default.as_str()) {
            ("flag", _) => {
                assert_eq!(spec.kind, Kind::Flag, "{name}");
                assert_eq!(default, "False", "{name}");
            }
            (_, "None") => assert_eq!((spec.default)(), None, "{name}"),
            _ => (spec.assign)(&mut read, &toml::Value::String(default.clone())).unwrap(),
        }
        assert!(spec.is_default(&read), "{name}: the reference has {default}");
        let fits = match spec.kind {
            Kind::Int => kind == "int",
            Kind::Float => kind == "float",
            Kind::TextList | Kind::FloatList => kind == "list",
            Kind::IntOrFloat => kind == "int_or_float",
            Kind::Path => kind == "str" || kind == "Path",
            Kind::Choice(_) | Kind::Text | Kind::Size | Kind::Resolution | Kind::Range => {
                kind == "str"
            }
            Kind::Flag => kind == "flag",
        };
        // DeepSpeed's stage is a number among four.
        assert!(fits || name == "zero_stage", "{name}: {:?} is {kind} in the reference", spec.kind);
    }
}

#[test]
fn every_option_teaches() {
    for spec in OPTIONS {
        let help = spec.help.trim();
        assert!(help.len() >= 15 && help.ends_with('.'), "{}: {help}", spec.name);
    }
}

#[test]
fn smallest_run_is_valid() {
    let parsed = run_with(&[]).unwrap();
    assert_eq!(parsed.action, Action::Train);
    assert_eq!(parsed.options.network_rank(), 4);
    assert!(parsed.notes.iter().any(|note| note.contains("`learning_rate` is not given")));
}

#[test]
fn words_are_read_as_argparse_does() {
    let o = options(&[
        "--network-dim",
        "16",
        "--learning_rate=1e-4",
        "--cache_latents",
        "--noise_offset",
        "-0.1",
        "--network_args",
        "conv_dim=4",
        "conv_alpha=1",
        "--text_encoder_lr",
        "5e-5",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=10%",
        "--resolution",
        "512,768",
        "--seed=42",
        "--flip_aug=false",
    ]);
    assert_eq!(o.network_dim, Some(16));
    assert_eq!(o.learning_rate, 1e-4);
    assert!(o.cache_latents && !o.flip_aug);
    assert_eq!(o.noise_offset, Some(-0.1));
    assert_eq!(o.read_network_args().unwrap().conv_dim, Some(4));
    assert_eq!(o.text_encoder_lr, Some(vec![5e-5]));
    assert_eq!(o.lr_warmup_steps, IntOrFloat::Share(0.1));
    assert_eq!(o.resolution, Some(Resolution { width: 512, height: 768 }));
    assert_eq!(o.written["seed"], Origin::CommandLine);
    assert!(!o.is_written("vae"));
}

#[test]
fn config_types_are_lenient() {
    let text = format!(
        "{SMALLEST}[a]\nlearning_rate = '1e-4'\nnetwork_dim = '8'\nmax_train_steps = 1e3\n\
         cache_latents = 'true'\nresolution = 512\nface_crop_aug_range = [2.0, 4]\n\
         optimizer_args = 'weight_decay=0.1 eps=1e-6'\ntext_encoder_lr = 5e-5\n\
         training_comment = 3\nvae = ''\nsave_precision = 'None'\nkeep_tokens=1\n\
         [b]\nnetwork_alpha = 4\n"
    );
    let o = with_config("lenient", &text, &[]).unwrap().options;
    assert_eq!((o.learning_rate, o.network_dim, o.max_train_steps), (1e-4, Some(8), 1000));
    assert!(o.cache_latents);
    assert_eq!(o.resolution, Some(Resolution { width: 512, height: 512 }));
    assert_eq!(o.face_crop_aug_range, Some(CropRange { low: 2.0, high: 4.0 }));
    assert_eq!(o.choose_optimizer().unwrap().python_text, "weight_decay=0.1,eps=1e-06");
    assert_eq!(o.text_encoder_lr, Some(vec![5e-5]));
    assert_eq!(o.training_comment.as_deref(), Some("3"));
    assert_eq!((o.vae, o.save_precision), (None, None));
    assert_eq!(o.network_alpha, 4.0);
}

#[test]
fn the_command_line_wins_over_the_file() {
    let text = format!("{SMALLEST}seed = 1\nnetwork_dim = 8\ncache_latents = true\n");
    let words = ["--seed", "2", "--cache_latents=false"];
    let parsed = with_config("wins", &text, &words).unwrap();
    let o = &parsed.options;
    assert_eq!((o.seed, o.network_dim, o.cache_latents), (Some(2), Some(8), false));
    assert_eq!(o.written["seed"], Origin::CommandLine);
    assert!(matches!(o.written["network_dim"], Origin::File { line: 5, .. }));
    assert_eq!(o.config_file, parsed.config_path);
}

#[test]
fn inline_datasets_are_handed_over() {
    let text = "pretrained_model_name_or_path='m'\noutput_dir='o'\n[[datasets]]\nresolution=64\n";
    let parsed = with_config("inline", text, &[]).unwrap();
    assert_eq!(parsed.datasets.unwrap()["datasets"][0]["resolution"].as_integer(), Some(64));
    let both = with_config("both", &format!("dataset_config='d'\n{text}"), &[]).unwrap_err();
    assert!(both.to_string().contains("although the config file holds `[[datasets]]`"));
}

#[test]
fn config_names() {
    assert!(fault(&["nowhere.toml"]).starts_with("the config file does not exist: `nowhere.toml`"));
    assert!(fault(&["a.toml", "b.toml"]).starts_with("more than one config file is named"));
    assert!(fault(&["a.toml", "--config_file", "b"]).starts_with("two config files are named"));
    let dir = std::env::temp_dir().join(format!("lorarun-options-{}-name", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("run.toml"), format!("{SMALLEST}seed=5")).unwrap();
    let found = try_parse(&["--config_file", dir.join("run").to_str().unwrap()]);
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(found.unwrap().options.seed, Some(5));
}

#[test]
fn unknown_names_get_a_suggestion_and_their_line() {
    let text = format!("{SMALLEST}\nlerning_rate = 1\nepochs = 2\nnetwork_dim = 'x'\n");
    let message = with_config("unknown", &text, &[]).unwrap_err().to_string();
    assert!(
        message.contains(
            "config.toml:5: unknown option: `lerning_rate`\nhint: did you mean `learning_rate`?"
        ),
        "{message}"
    );
    assert!(
        message.contains(":6: unknown option: `epochs`\nhint: here it is `max_train_epochs`"),
        "{message}"
    );
    assert!(
        message.contains(":7: `network_dim` must be a whole number, 0 or more, not text: `x`"),
        "{message}"
    );
    assert_eq!(fault(&["--sed", "1"]), "unknown option: `--sed`\nhint: did you mean `seed`?");
    assert!(fault(&["--num_processes=2"]).contains("before `train`"));
    assert!(fault(&["-x"]).contains("two dashes"));
}

#[test]
fn wrong_values_say_expected_and_got() {
    assert_eq!(
        fault(&["--network_dim", "4.5"]),
        "`--network_dim` must be a whole number, 0 or more, not text: `4.5`"
    );
    assert_eq!(fault(&["--network_dim"]), "`--network_dim` needs a value: `--network_dim N`");
    assert!(fault(&["--loss_type", "l3"]).contains("one of l1, l2, huber, smooth_l1"));
    assert!(fault(&["--learning_rate", "inf"]).contains("a finite number"));
    assert!(fault(&["--seed", "-1"]).contains("0 or more"));
    assert!(fault(&["--resolution", "512,512,3"]).contains("a size like"));
    assert!(
        fault(&["--lr_warmup_steps", "2.5", "--lr_scheduler", "linear"])
            .contains("a share below 1")
    );
    assert!(fault(&["--face_crop_aug_range", "4,2"]).contains("rising"));
    assert!(fault(&["--cache_latents=maybe"]).contains("true or false"));
}

#[test]
fn options_that_are_not_built_are_refused_unless_default() {
    let message = fault(&["--optimizer_type", "AdamWbit"]);
    assert!(message.contains("hint: did you mean `AdamW8bit`?"), "{message}");
    assert!(
        fault(&["--use_8bit_adam", "--use_lion_optimizer"]).contains("both choose an optimizer")
    );
    assert!(
        fault(&["--use_lion_optimizer", "--optimizer_type=AdamW"])
            .contains("both choose an optimizer")
    );
    assert!(fault(&["--deepspeed"]).contains("`--deepspeed` is refused: DeepSpeed divides"));
    assert!(fault(&["--network_module", "networks.oft"]).contains("is not built"));
    assert!(
        fault(&["--huggingface_repo_id=a/b"])
            .contains("`--huggingface_repo_id` is not supported yet\nhint: nothing is uploaded")
    );
    run_with(&["--device=cuda"]).unwrap();
    for default in ["--multires_noise_discount=0.3", "--optimizer_type=adamw", "--deepspeed=false"]
    {
        run_with(&[default]).unwrap();
    }
    assert!(fault(&["--full_bf16"]).contains("`full_bf16` needs `mixed_precision = \"bf16\"`"));
    run_with(&["--full_fp16", "--mixed_precision=fp16"]).unwrap();
    let note = run_with(&["--xformers"]).unwrap().notes.join("\n");
    assert!(note.contains("`--xformers` has no effect here: attention is always memory-efficient"));
}

#[test]
fn schedules_and_their_settings() {
    let notes = |words: &[&str]| run_with(words).unwrap().notes.join("\n");
    assert!(fault(&["--lr_scheduler=polynomal"]).contains("one of constant, "));
    assert!(fault(&["--lr_scheduler_type=Rex"]).contains("not built here: `Rex`"));
    assert!(
        fault(&["--lr_scheduler=cosine_with_min_lr"]).contains("lr_scheduler_min_lr_ratio = 0.1")
    );
    let words = ["--lr_scheduler_type=StepLR", "--lr_scheduler_args", "step_size=5"];
    assert!(
        fault(&[&words[..], &["--lr_warmup_steps=3"]].concat()).contains("the schedule `StepLR`")
    );
    assert!(!notes(&words).contains("schedule"));
    let piecewise = ["--lr_scheduler=piecewise_constant", "--lr_scheduler_args", "step_rules=1"];
    assert!(!notes(&piecewise).contains("lr_warmup_steps"));
    assert!(
        notes(&[&piecewise[..], &["--lr_warmup_steps=3"]].concat())
            .contains("`step_rules` can begin")
    );
}

#[test]
fn equal_timesteps_train_one() {
    let parsed = run_with(&["--min_timestep=500", "--max_timestep=500"]).unwrap();
    let o = &parsed.options;
    assert_eq!((o.min_timestep, o.max_timestep), (Some(500), Some(501)));
    assert!(parsed.notes.join("").contains("only timestep 500 is trained"));
    assert!(fault(&["--min_timestep=1000", "--max_timestep=1000"]).contains("no valid timesteps"));
}

#[test]
fn noise_rules() {
    let notes = |words: &[&str]| run_with(words).unwrap().notes.join("\n");
    let discount = |word| fault(&["--multires_noise_iterations=6", word]);
    assert!(discount("--multires_noise_discount=0").contains("above 0 and at most 1: `0`"));
    assert!(discount("--multires_noise_discount=1.5").contains("0.3 is usual"));
    assert!(!notes(&["--multires_noise_discount=0"]).contains("multires"));
    assert!(fault(&["--ip_noise_gamma=-0.1"]).contains("from 0 to 1: `-0.1`"));
    let exponential = ["--loss_type=huber", "--huber_schedule=exponential", "--huber_c=0"];
    assert!(fault(&exponential).contains("must be above 0"));
}

#[test]
fn contradictions_are_refused() {
    let cases: &[(&[&str], &str)] = &[
        (&["--cache_latents", "--color_aug"], "`--color_aug` changes images at random"),
        (&["--cache_latents_to_disk", "--random_crop"], "`--random_crop` changes images at random"),
        (&["--v_pred_like_loss=0.1", "--v_parameterization"], "cannot be combined"),
        (&["--scale_v_pred_loss_like_noise_pred"], "only for models that predict v"),
        (&["--adaptive_noise_scale=0.1"], "needs `noise_offset`"),
        (&["--min_bucket_reso=2048"], "is above `max_bucket_reso`: `2048` > `1024`"),
        (&["--max_bucket_reso=128"], "is below `min_bucket_reso`: `128` < `256`"),
        (&["--bucket_reso_steps=12"], "multiple of 8"),
        (&["--dim_from_weights"], "hint: add `network_weights`"),
        (&["--network_train_unet_only", "--network_train_text_encoder_only"], "nothing to train"),
        (&["--network_dim=0"], "must be 1 or more"),
        (&["--lr_warmup_steps=10"], "no place in the schedule `constant`"),
        (&["--max_token_length=100"], "must be 75, 150 or 225"),
        (&["--min_timestep=500", "--max_timestep=400"], "leaves no valid timesteps"),
        (&["--caption_dropout_rate=1.5"], "a probability from 0 to 1"),
        (&["--log_with=tensorboard"], "needs a folder for the logs"),
        (&["--log_with=all"], "needs a folder for the logs"),
        (&["--ema_decay=0.9", "--optimizer_type=AdamWScheduleFree"], "schedule-free optimizer"),
        (&["--ema_decay=1"], "must be from 0 up to, not including, 1"),
        (&["--validation_split=1.5"], "is a share from 0 to 1"),
    ];
    for (words, expected) in cases {
        let message = fault(words);
        assert!(message.contains(expected), "{words:?}: {message}");
    }
}

#[test]
fn what_is_missing_is_named_at_once() {
    let message = try_parse(&["--seed=1"]).unwrap_err().to_string();
    for part in [
        "`pretrained_model_name_or_path` is missing",
        "no dataset is named",
        "`output_dir` is missing",
    ] {
        assert!(message.contains(part), "{message}");
    }
    let folder = ["--pretrained_model_name_or_path=m", "--output_dir=o", "--train_data_dir=t"];
    assert!(try_parse(&folder).unwrap_err().to_string().contains("`resolution` is missing"));
}

#[test]
fn old_spellings_and_implied_options() {
    let o = options(&[
        "--caption_extention",
        ".txt",
        "--cache_latents_to_disk",
        "--max_token_length=75",
    ]);
    assert_eq!(o.caption_extension, ".txt");
    assert!(o.caption_extention.is_none() && o.is_written("caption_extension"));
    assert!(o.cache_latents);
    assert_eq!(o.max_token_length, None);
    assert_eq!(options(&["--log_with=wandb"]).logging_dir, Some("o/logs".into()));
}

#[test]
fn options_print_as_a_config_that_reads_back() {
    let mut o = options(&[
        "--network_dim=8",
        "--learning_rate=5e-05",
        "--network_args",
        "conv_dim=4",
        "--seed=18446744073709551615",
        "--training_comment",
        "say \"hi\"\n",
        "--lr_scheduler=linear",
        "--lr_warmup_steps=0.25",
        "--resolution=512",
        "--cache_latents",
        "--unet_lr=1e-4",
    ]);
    o.wandb_api_key = Some("secret".into());
    let text = o.to_toml();
    assert!(text.contains("# Network\nnetwork_dim = 8\n"), "{text}");
    assert!(!text.contains("wandb"));
    let mut back = with_config("print", &text, &[]).unwrap().options;
    back.written = o.written.clone();
    back.config_file = None;
    back.wandb_api_key = o.wandb_api_key.clone();
    assert_eq!(back, o);
}

#[test]
fn help_and_output_config_ask_for_other_actions() {
    assert_eq!(try_parse(&["--help"]).unwrap().action, Action::Help(None));
    assert_eq!(try_parse(&["x.toml", "-h", "lr"]).unwrap().action, Action::Help(Some("lr".into())));
    let parsed = try_parse(&["--output_config", "--config_file=new", "--seed=3"]).unwrap();
    assert_eq!(parsed.action, Action::WriteConfig("new.toml".into()));
    assert!(try_parse(&["--output_config"]).unwrap_err().to_string().contains("needs the name"));
    let path = std::env::temp_dir().join(format!("lorarun-options-{}.toml", std::process::id()));
    write_config(&path, &parsed.options).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "# Training\nseed = 3\n");
    assert!(write_config(&path, &parsed.options).is_err(), "an existing file must stay");
    std::fs::remove_file(&path).unwrap();
}
