//! What a run's folder holds, also after a resumption.

use super::*;

fn values(step: usize, loss: Option<f64>) -> StepLog {
    StepLog {
        step,
        epoch: 1,
        loss,
        average_loss: 0.5,
        rates: vec![
            Rate { label: "textencoder".into(), lr: 5e-5, scaled: None },
            Rate { label: "unet".into(), lr: 1.0, scaled: Some(1e-4) },
        ],
        gradient_norm: if loss.is_some() { 2.0 } else { f64::NAN },
        loss_scale: None,
        key_norms: Some(KeyNorms { scaled: 3, mean: 0.25, max: 1.0 }),
        seconds: 0.5,
        images: 4,
    }
}

#[test]
fn tags_are_those_of_the_reference() {
    let scalars = values(1, Some(0.25)).scalars();
    let tags: Vec<&str> = scalars.iter().map(|(tag, _)| tag.as_str()).collect();
    assert_eq!(
        tags,
        [
            "loss/current",
            "loss/average",
            "lr/textencoder",
            "lr/unet",
            "lr/d*lr/unet",
            "max_norm/keys_scaled",
            "max_norm/max_key_norm",
            "norm/avg_key_norm",
            "grad_norm",
            "time/step_seconds",
            "time/images_per_second",
        ]
    );
    assert_eq!(scalars[10].1, 8.0);
    let left_out = values(1, None).scalars();
    assert!(left_out.iter().all(|(tag, _)| tag != "loss/current" && tag != "grad_norm"));
}

fn open(folder: &Path) -> RunLog {
    let options = Options {
        logging_dir: Some(folder.join("logs")),
        log_prefix: Some("p-".into()),
        log_config: true,
        ..Options::default()
    };
    RunLog::new(&options, 1795364356.4).unwrap().unwrap()
}

fn lines(log: &RunLog, name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(log.folder().join(name)).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn a_resumed_run_goes_on_in_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = open(folder.path());
    log.open(0, 0).unwrap();
    assert_eq!(log.folder(), folder.path().join("logs/p-20261122161916"));
    let loss = ImageLoss { count: 2, sum: 0.5, last: 0.125 };
    for step in 1..=3 {
        log.step(&values(step, (step != 2).then_some(0.25))).unwrap();
        log.validation(step, (step, 1), &[("loss/validation/step_average".into(), 0.5)]).unwrap();
        log.epoch((step, step), 0.5, [(Path::new("a,b.png"), &loss)].into_iter()).unwrap();
    }
    let steps = lines(&log, "steps.jsonl");
    assert_eq!(steps.len(), 6);
    let first: Value = serde_json::from_str(&steps[0]).unwrap();
    assert_eq!(first["step"], 1);
    assert_eq!(first["lr"]["unet"], 1.0);
    assert_eq!(first["d*lr"], json!({"unet": 1e-4}));
    assert_eq!(first["images_per_second"], 8.0);
    assert!(first["peak_memory"].is_u64() || first["peak_memory"].is_null());
    let left_out: Value = serde_json::from_str(&steps[2]).unwrap();
    assert_eq!((&left_out["loss"], &left_out["left_out"]), (&Value::Null, &json!(true)));
    assert_eq!(lines(&log, "image_losses.csv").len(), 4);
    let run = log.run().to_owned();
    drop(log);

    let options = Options { logging_dir: Some(folder.path().join("logs")), ..Options::default() };
    let mut log = RunLog::new(&options, 1795364999.0).unwrap().unwrap();
    log.continue_run(&run);
    log.open(2, 2).unwrap();
    let steps = lines(&log, "steps.jsonl");
    assert_eq!(steps.len(), 4, "{steps:?}");
    let rows = lines(&log, "image_losses.csv");
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[1], "1,\"a,b.png\",2,0.25,0.125");
    log.step(&values(3, Some(0.25))).unwrap();
    assert_eq!(lines(&log, "steps.jsonl").len(), 5);
    let events = std::fs::read_dir(log.folder().join("network_train")).unwrap().count();
    assert_eq!(events, 2);
}

#[test]
fn a_run_whose_folder_is_gone_gets_a_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = open(folder.path());
    let own = log.run().to_owned();
    log.continue_run("gone");
    log.continue_run("../logs");
    assert_eq!(log.run(), own);
    assert!(RunLog::new(&Options::default(), 0.0).unwrap().is_none());
    let blocked = folder.path().join("file");
    std::fs::write(&blocked, "").unwrap();
    let options = Options { logging_dir: Some(blocked), ..Options::default() };
    let message = check(&options).unwrap_err().to_string();
    assert!(message.starts_with("cannot write to `logging_dir`"), "{message}");
    let good = Options { logging_dir: Some(folder.path().join("logs")), ..Options::default() };
    check(&good).unwrap();
}
