//! Config files as accelerate writes them, and as people edit them.

use std::path::Path;

use super::*;

fn read(text: &str) -> Result<AccelerateConfig, String> {
    parse(Path::new("a.yaml"), text)
}

const TWO_MACHINES: &str = "\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_GPU
downcast_bf16: 'no'
enable_cpu_affinity: true
gpu_ids: all
machine_rank: 1
main_process_ip: 10.0.0.5
main_process_port: 29501
main_training_function: main
mixed_precision: bf16
num_machines: 2
num_processes: 8
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
";

#[test]
fn two_machines_with_cards() {
    let config = read(TWO_MACHINES).unwrap();
    let expected = AccelerateConfig {
        path: "a.yaml".into(),
        num_processes: Some(8),
        nodes: Some(2),
        node: Some(1),
        address: Some("10.0.0.5".to_owned()),
        port: Some(29501),
        gpu_ids: Some(Cards::All),
        mixed_precision: Some(MixedPrecision::Bf16),
        multi_gpu: true,
        numa_affinity: true,
        ..AccelerateConfig::default()
    };
    assert_eq!(config, expected);
}

#[test]
fn the_default_of_one_machine_says_little() {
    // Without quotes, other readers of YAML take NO and no for false.
    for (no, precision) in [("'NO'", "'no'"), ("NO", "no")] {
        let config = read(&format!(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: {no}\ngpu_ids: '0'\n\
             machine_rank: 0\nmain_process_ip: null\nmain_process_port: null\n\
             mixed_precision: {precision}\nnum_machines: 1\nnum_processes: 1\nuse_cpu: false\n"
        ))
        .unwrap();
        let expected = AccelerateConfig {
            path: "a.yaml".into(),
            num_processes: Some(1),
            gpu_ids: Some(Cards::List(vec![0])),
            mixed_precision: Some(MixedPrecision::No),
            ..AccelerateConfig::default()
        };
        assert_eq!(config, expected);
    }
}

#[test]
fn processes_on_the_processor() {
    let config = read("distributed_type: MULTI_CPU\nnum_processes: 4\nipex_config: {}\n").unwrap();
    assert!(config.cpu && !config.multi_gpu && config.warnings.is_empty());
    let config = read("distributed_type: 'NO'\nuse_cpu: yes\nnum_processes: -1\n").unwrap();
    assert_eq!((config.cpu, config.num_processes), (true, None));
}

#[test]
fn cards_in_every_spelling() {
    for text in ["0,2", "'0,2'", "[0, 2]", "['0', '2']", "\"0, 2\""] {
        let config = read(&format!("distributed_type: MULTI_GPU\ngpu_ids: {text}\n")).unwrap();
        assert_eq!(config.gpu_ids, Some(Cards::List(vec![0, 2])), "{text}");
    }
}

#[test]
fn json_is_read_as_well() {
    let text = r#"{
  "compute_environment": "LOCAL_MACHINE",
  "distributed_type": "MULTI_GPU",
  "fp16": true,
  "num_processes": 2,
  "use_cpu": false
}"#;
    let config = parse(Path::new("default_config.json"), text).unwrap();
    assert_eq!(config.num_processes, Some(2));
    assert_eq!(config.mixed_precision, Some(MixedPrecision::Fp16));
    let torn = parse(Path::new("default_config.json"), "{\"num_processes\": ").unwrap_err();
    assert!(torn.starts_with("default_config.json: EOF"), "{torn}");
}

#[test]
fn what_is_not_followed_is_named() {
    let config = read(
        "distributed_type: MULTI_GPU\ndynamo_config:\n  dynamo_backend: INDUCTOR\n\
         deepspeed_config:\n  zero_stage: 2\ntpu_env: [A]\ndebug: true\n",
    )
    .unwrap();
    assert_eq!(
        config.warnings,
        [
            "warning: a.yaml:2: `dynamo_config` is not followed: there is no PyTorch to compile for",
            "warning: a.yaml:4: `deepspeed_config` is not followed: every process holds the whole \
             model, and a LoRA's few weights are never divided",
            "warning: a.yaml:6: `tpu_env` is not followed: it is about TPUs",
            "warning: a.yaml:7: `debug` is not followed: what the ranks call is always compared",
        ]
    );
    let idle = "dynamo_config:\n  dynamo_backend: 'NO'\ndeepspeed_config: {}\ntpu_name: 'null'\n";
    assert_eq!(read(idle).unwrap().warnings, Vec::<String>::new());
}

#[test]
fn what_would_change_the_result_is_refused() {
    for kind in ["DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA", "TPU", "MULTI_XPU", "MULTI_NPU"] {
        let why = read(&format!("num_processes: 2\ndistributed_type: {kind}\n")).unwrap_err();
        let start = format!("a.yaml:2: `distributed_type` cannot be `{kind}`: ");
        assert!(why.starts_with(&start) && why.contains("\nhint: "), "{why}");
    }
    let why = read("mixed_precision: fp8\n").unwrap_err();
    assert!(why.starts_with("a.yaml:1: `mixed_precision` cannot be fp8"), "{why}");
    let why = read("compute_environment: AMAZON_SAGEMAKER\n").unwrap_err();
    assert!(why.contains("got: AMAZON_SAGEMAKER"), "{why}");
    let why = read("mpirun_config:\n  mpirun_hostfile: hosts\n").unwrap_err();
    assert!(why.contains("hosts are not started from a file"), "{why}");
}

#[test]
fn every_mistake_is_told_at_once_with_its_line() {
    let why = read(
        "num_proceses: 2\nnum_machines: two\ngpu_ids: first\nmixed_precision: half\n\
         use_cpu: perhaps\nmain_process_port: 70000\ndistributed_type: SOME\nlearning_rate: 1\n",
    )
    .unwrap_err();
    for (line, words) in [
        (1, "`num_proceses` is no key of accelerate's\nhint: did you mean `num_processes`?"),
        (2, "`num_machines` should be a whole number from 0, got: two"),
        (3, "`gpu_ids` numbers like 0,2,3 or `all` are needed, got: first"),
        (4, "`mixed_precision` should be `no`, `fp16` or `bf16`, got: half"),
        (5, "`use_cpu` should be true or false, got: perhaps"),
        (6, "`main_process_port` should be a port up to 65535, got: 70000"),
        (7, "`distributed_type` cannot be `SOME`\nhint: `NO`, `MULTI_GPU`"),
        (8, "`learning_rate` is no key of accelerate's\nhint: take it out"),
    ] {
        assert!(why.contains(&format!("a.yaml:{line}: {words}")), "{words}: {why}");
    }
}

#[test]
fn what_is_no_config_is_refused() {
    for text in ["", "- a\n", "12\n", "a: [1\n", "a: 1\n  b: 2\n", "\t- x: :\n", "a: 1\na: 2\n"] {
        let why = read(text).unwrap_err();
        assert!(why.starts_with("a.yaml"), "{text:?}: {why}");
    }
    let twice = read("a: 1\na: 2\n").unwrap_err();
    assert_eq!(twice, "a.yaml: line 2 column 1: duplicate mapping key: a");
    let missing = super::read(Path::new("/nowhere/a.yaml")).unwrap_err();
    assert!(missing.starts_with("cannot read the config file of accelerate: `/nowhere/a.yaml`"));
}

#[test]
fn the_default_place_is_accelerates() {
    let path = |variables: &[(&str, &str)]| {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        default_path(|name| find(name).map(|(_, value)| value.into()))
    };
    let file = "accelerate/default_config.yaml";
    assert_eq!(path(&[("HF_HOME", "/h"), ("HOME", "/r")]), Some(Path::new("/h").join(file)));
    let cache = Some(Path::new("/c/huggingface").join(file));
    assert_eq!(path(&[("XDG_CACHE_HOME", "/c"), ("HOME", "/r")]), cache);
    let home = Some(Path::new("/r/.cache/huggingface").join(file));
    assert_eq!(path(&[("HOME", "/r")]), home);
    assert_eq!(path(&[]), None);
}
