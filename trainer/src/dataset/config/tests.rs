//! Dataset configs: precedence, one format in TOML and JSON, and what wrong input is told.

use super::*;

const FULL: &str = r#"
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
num_repeats = 2

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2
enable_bucket = true
min_bucket_reso = 300
max_bucket_reso = 1000

  [[datasets.subsets]]
  image_dir = "a"
  class_tokens = "hoge girl"

  [[datasets.subsets]]
  image_dir = "b"
  keep_tokens = 3
  caption_extension = "cap"

  [[datasets.subsets]]
  is_reg = true
  image_dir = "reg"
  num_repeats = 1

[[datasets]]
resolution = [768, 640]

  [[datasets.subsets]]
  image_dir = "c"
  metadata_file = "c.json"
  face_crop_aug_range = [1, 3.5]
"#;

fn plan(text: &str) -> Result<DatasetConfig, DatasetError> {
    let table: Table = text.parse().expect("valid TOML");
    let input = DatasetInput::Inline { table, origin: "run.toml".into() };
    plan_datasets(&input, &DatasetDefaults::default())
}

fn message(text: &str) -> String {
    plan(text).expect_err("should be refused").to_string()
}

#[test]
fn subset_wins_over_dataset_over_general_over_command_line() {
    let mut defaults = DatasetDefaults::default();
    defaults.dataset.batch_size = 7;
    defaults.subset.flip_aug = true;
    defaults.subset.num_repeats = 9;
    let input = DatasetInput::Inline { table: FULL.parse().unwrap(), origin: "run.toml".into() };
    let config = plan_datasets(&input, &defaults).unwrap();
    let first = &config.datasets[0];
    assert_eq!(first.resolution, (512, 512));
    assert_eq!(first.options.batch_size, 4);
    assert_eq!((first.options.min_bucket_reso, first.options.max_bucket_reso), (256, 1024));
    assert_eq!(config.warnings.len(), 2, "{:?}", config.warnings);
    let keep: Vec<usize> = first.subsets.iter().map(|s| s.options.keep_tokens).collect();
    assert_eq!(keep, [2, 3, 2]);
    let repeats: Vec<u32> = first.subsets.iter().map(|s| s.options.num_repeats).collect();
    assert_eq!(repeats, [2, 2, 1]);
    assert_eq!(first.subsets[0].options.caption_extension, ".txt");
    assert_eq!(first.subsets[1].options.caption_extension, ".cap");
    assert!(first.subsets[2].is_reg() && first.subsets[0].options.shuffle_caption);
    assert!(first.subsets[0].options.flip_aug);
    let second = &config.datasets[1];
    assert!(!second.is_dreambooth && config.from_user_config);
    assert_eq!((second.resolution, second.options.batch_size), ((768, 640), 7));
    assert_eq!(second.subsets[0].options.face_crop_aug_range, Some((1.0, 3.5)));
}

#[test]
fn json_is_the_same_format() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.JSON");
    let json = r#"{"general": {"resolution": [512, 768], "caption_prefix": null},
                   "datasets": [{"subsets": [{"image_dir": "x", "caption_dropout_rate": 1}]}]}"#;
    std::fs::write(&path, json).unwrap();
    let config = plan_datasets(&DatasetInput::File(path), &DatasetDefaults::default()).unwrap();
    assert_eq!(config.datasets[0].resolution, (512, 768));
    assert_eq!(config.datasets[0].subsets[0].options.caption_dropout_rate, 1.0);
    assert_eq!(config.datasets[0].subsets[0].options.caption_prefix, None);
}

#[test]
fn unknown_keys_are_refused_with_a_suggestion() {
    let text = message(&FULL.replace("class_tokens", "class_token"));
    assert!(text.contains("`class_token`") && text.contains("`run.toml`"), "{text}");
    assert!(text.contains("[[datasets.subsets]] 1 of [[datasets]] 1"), "{text}");
    assert!(text.contains("hint: did you mean `class_tokens`?"), "{text}");
    let text = message(&FULL.replace("[general]", "[genral]"));
    assert!(text.contains("did you mean `general`?"), "{text}");
    let text = message(&format!("batch_size = 3\n{FULL}"));
    assert!(text.contains("options go into `[general]`"), "{text}");
}

#[test]
fn wrong_types_and_ranges_say_what_is_expected() {
    for (from, to, expected) in [
        ("batch_size = 4", "batch_size = \"4\"", "an integer of at least 1"),
        ("batch_size = 4", "batch_size = 0", "an integer of at least 1"),
        ("shuffle_caption = true", "shuffle_caption = 1", "true or false"),
        ("resolution = 512", "resolution = [512]", "a number of pixels or [width, height]"),
        ("[1, 3.5]", "[3.5, 1]", "two numbers above 0"),
        ("keep_tokens = 3", "caption_dropout_rate = 1.5", "a number from 0 to 1"),
        ("keep_tokens = 3", "resize_interpolation = \"cube\"", "one of `lanczos`"),
        ("image_dir = \"a\"", "image_dir = 3", "a string"),
    ] {
        let text = message(&FULL.replacen(from, to, 1));
        assert!(text.contains(expected), "{text}");
    }
    let text = message("[datasets]\nresolution = 512");
    assert!(text.contains("an array of tables"), "{text}");
}

#[test]
fn options_in_the_wrong_place_are_refused() {
    let text = message(&FULL.replace("keep_tokens = 3", "batch_size = 3"));
    assert!(text.contains("it belongs in `[general]` or `[[datasets]]`"), "{text}");
    let text =
        message(&FULL.replace(
            "metadata_file = \"c.json\"",
            "metadata_file = \"c.json\"\nclass_tokens = \"x\"",
        ));
    assert!(text.contains("`class_tokens` does not go with `metadata_file`"), "{text}");
    let text = message(&FULL.replace("keep_tokens = 3", "metadata_file = \"m.json\""));
    assert!(text.contains("mixed"), "{text}");
    let text = message(&FULL.replace("keep_tokens = 3", "skip_image_resolution = 512"));
    assert!(text.contains("not supported yet") && text.contains("hint: move the images"), "{text}");
    let text = message(&FULL.replace("keep_tokens = 2", "network_multiplier = 0.5"));
    assert!(text.contains("1: other values are not built"), "{text}");
}

#[test]
fn options_without_effect_are_said() {
    let text = FULL.replace("keep_tokens = 3", "custom_attributes = { a = 1 }\ncache_info = true");
    let warnings = plan(&text).unwrap().warnings.join("\n");
    let said = "`custom_attributes` of a subset of [[datasets]] 1 has no effect here";
    assert!(warnings.contains(said) && warnings.contains("`cache_info`"), "{warnings}");
    assert!(plan(&FULL.replace("keep_tokens = 2", "network_multiplier = 1.0")).is_ok());
}

#[test]
fn unknown_names_can_be_allowed() {
    let text = FULL.replace("class_tokens", "class_token").replace("batch_size", "batchsize");
    let input = DatasetInput::Inline { table: text.parse().unwrap(), origin: "run.toml".into() };
    let defaults = DatasetDefaults { allow_unknown: true, ..DatasetDefaults::default() };
    let warnings = plan_datasets(&input, &defaults).unwrap().warnings.join("\n");
    let said = "unknown options of `run.toml` are ignored: `batchsize`, `class_token`";
    assert!(warnings.contains(said), "{warnings}");
}

#[test]
fn rules_between_options() {
    let minimal = |options: &str| {
        format!("[[datasets]]\n{options}\n[[datasets.subsets]]\nimage_dir = \"a\"\n")
    };
    assert!(message(&minimal("")).contains("`resolution` is missing"));
    assert!(message(&minimal("resolution = 500")).contains("not a multiple of 64"));
    let steps = "resolution = 512\nenable_bucket = true\nbucket_reso_steps = 8";
    assert!(message(&minimal(steps)).contains("`bucket_reso_steps` is not a multiple of 64"));
    let small = "resolution = 192\nenable_bucket = true";
    assert!(message(&minimal(small)).contains("lower `min_bucket_reso`"));
    let large = "resolution = 2048\nenable_bucket = true";
    assert!(message(&minimal(large)).contains("raise `max_bucket_reso`"));
    let huge = "resolution = 65536";
    assert!(message(&minimal(huge)).contains("cannot be trained on"));
    let huge = "resolution = 512\nenable_bucket = true\nmax_bucket_reso = 4294967295";
    assert!(message(&minimal(huge)).contains("cannot be trained on"));
    assert!(message("[general]\nflip_aug = true").contains("there is no dataset"));
    assert!(message("[[datasets]]\nresolution = 512").contains("there is no subset"));
    let twice = "resolution = 512\n[[datasets.subsets]]\nimage_dir = \"a\"";
    let config = plan(&minimal(twice)).unwrap();
    assert_eq!((config.datasets[0].subsets.len(), config.warnings.len()), (1, 1));
}

#[test]
fn parse_errors_name_the_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.toml");
    std::fs::write(&path, "[general]\nflip_aug = yes\n").unwrap();
    let error = plan_datasets(&DatasetInput::File(path.clone()), &DatasetDefaults::default());
    let text = error.unwrap_err().to_string();
    assert!(text.contains("line 2") && text.contains("set.toml"), "{text}");
    std::fs::remove_file(&path).unwrap();
    let error = plan_datasets(&DatasetInput::File(path), &DatasetDefaults::default());
    assert!(error.unwrap_err().to_string().contains("there is no such file\nhint: relative paths"));
}

#[test]
fn folders_carry_repeats_and_class_tokens() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["train/10_sks dog", "train/3_a_b", "train/notes", "reg/1_dog", "train/.cache"] {
        std::fs::create_dir_all(folder.path().join(name)).unwrap();
    }
    let mut defaults = DatasetDefaults::default();
    defaults.dataset.resolution = Some((512, 512));
    let input = DatasetInput::Folders {
        train_data_dir: folder.path().join("train"),
        reg_data_dir: Some(folder.path().join("reg")),
    };
    let config = plan_datasets(&input, &defaults).unwrap();
    let subsets: Vec<(u32, Option<&str>, bool)> = config.datasets[0]
        .subsets
        .iter()
        .map(|s| (s.options.num_repeats, s.options.class_tokens.as_deref(), s.is_reg()))
        .collect();
    assert_eq!(
        subsets,
        [(10, Some("sks dog"), false), (3, Some("a_b"), false), (1, Some("dog"), true)]
    );
    assert_eq!(config.warnings.len(), 1);
    let refused = |train_data_dir: std::path::PathBuf| {
        let input = DatasetInput::Folders { train_data_dir, reg_data_dir: None };
        plan_datasets(&input, &defaults).unwrap_err().to_string()
    };
    let notes = folder.path().join("train/notes");
    assert!(refused(notes.clone()).contains("should hold folders named"));
    std::fs::write(notes.join("a.png"), "").unwrap();
    assert!(refused(notes).contains("hint: the images lie in `train_data_dir` itself"));
    assert!(refused("/nowhere".into()).contains("`train_data_dir` is not a folder"));
}
