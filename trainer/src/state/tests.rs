//! Tests of states: what is written comes back, what is damaged or foreign is refused by name.

use std::collections::BTreeMap;
use std::path::Path;

use super::facts::{DataFacts, Facts, RunFacts, VERSION};
use super::find::{Found, named, newest};
use super::fit::{Expected, check};
use super::folder::{Files, MANIFEST, StateFolder, write};
use crate::checkpoint::Saving;
use crate::options::Options;

/// A state after 12 steps, 5 an epoch.
pub fn facts() -> Facts {
    Facts {
        version: VERSION,
        written_by: "lorarun test".to_owned(),
        step: 12,
        epoch: 3,
        data_offset: 0,
        schedule_offset: 0,
        seed: 42,
        ranks: 2,
        run: RunFacts {
            base_model: "model".to_owned(),
            base_model_hash: "aa".to_owned(),
            optimizer: "torch.optim.adamw.AdamW".to_owned(),
            tensors: vec![
                ("a.lora_down.weight".to_owned(), vec![4, 8]),
                ("a.lora_up.weight".to_owned(), vec![8, 4]),
            ],
            alphas: BTreeMap::from([("a".to_owned(), "1".to_owned())]),
            data: DataFacts {
                images_hash: "ii".to_owned(),
                captions_hash: "cc".to_owned(),
                samples_per_epoch: 20,
                steps_per_epoch: 5,
                global_batches: vec![4],
                accumulation: 1,
            },
            options: BTreeMap::from([("learning_rate".to_owned(), "0.001".to_owned())]),
        },
    }
}

fn files() -> Files {
    Files::from([("weights".to_owned(), vec![1; 100]), ("optimizer".to_owned(), vec![2; 50])])
}

#[test]
fn a_state_comes_back_whole_and_damage_is_named() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("x-state");
    write(&path, &facts(), &files(), || Ok(())).unwrap();
    let state = StateFolder::open(&path).unwrap();
    assert_eq!(state.facts, facts());
    assert_eq!(state.read().unwrap(), files());

    std::fs::write(path.join("optimizer"), [2; 49]).unwrap();
    let error = state.read().unwrap_err().to_string();
    assert!(error.contains("`optimizer` has 49 bytes of 50"), "{error}");
    let mut flipped = vec![2; 50];
    flipped[7] = 3;
    std::fs::write(path.join("optimizer"), flipped).unwrap();
    let error = state.read().unwrap_err().to_string();
    assert!(error.contains("`optimizer` does not have the checksum"), "{error}");
    std::fs::remove_file(path.join("optimizer")).unwrap();
    assert!(state.read().unwrap_err().to_string().contains("`optimizer` cannot be read"));
}

#[test]
fn a_manifest_that_is_torn_or_changed_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("x-state");
    write(&path, &facts(), &files(), || Ok(())).unwrap();
    let manifest = std::fs::read_to_string(path.join(MANIFEST)).unwrap();
    let cases = [
        (manifest[..manifest.len() / 2].to_owned(), "is cut short"),
        (manifest.replace("\"step\": 12", "\"step\": 13"), "does not have the checksum"),
        (manifest.replace("\"seed\": 42,", ""), "lacks what it must say"),
        (manifest.replace("lorarun state", "other"), "is not one of lorarun"),
        (manifest.replace("\"version\": 1", "\"version\": 9"), "another version of lorarun"),
    ];
    for (text, expected) in cases {
        assert_ne!(text, manifest);
        std::fs::write(path.join(MANIFEST), text).unwrap();
        let error = StateFolder::open(&path).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn the_newest_whole_state_of_the_name_is_found() {
    let parent = tempfile::tempdir().unwrap();
    let options = Options {
        output_dir: Some(parent.path().to_owned()),
        output_name: Some("cat".to_owned()),
        ..Options::default()
    };
    let saving = Saving::from_options(&options, 1).unwrap();
    assert!(newest(&saving).unwrap().is_none());
    for (name, step) in [
        ("cat-step00000004-state", 4),
        ("cat-000002-state", 8),
        ("dog-state", 99),
        ("cat-state", 6),
    ] {
        write(&parent.path().join(name), &Facts { step, ..facts() }, &files(), || Ok(())).unwrap();
    }
    let name = |found: Option<Found>| match found {
        Some(Found::Own(state)) => state.path.file_name().unwrap().to_str().unwrap().to_owned(),
        other => panic!("{other:?}"),
    };
    assert_eq!(name(newest(&saving).unwrap()), "cat-000002-state");
    std::fs::write(parent.path().join("cat-000002-state/weights"), "").unwrap();
    assert_eq!(name(newest(&saving).unwrap()), "cat-state");
    std::fs::write(parent.path().join("cat-state").join(MANIFEST), "{").unwrap();
    assert_eq!(name(newest(&saving).unwrap()), "cat-step00000004-state");

    let error = format!("{:#}", named(&parent.path().join("cat-000002-state")).unwrap_err());
    assert!(error.contains("cannot go on") && error.contains("`weights` has 0 bytes"), "{error}");
    let error = named(Path::new("/nonexistent")).unwrap_err().to_string();
    assert!(error.contains("is no folder: /nonexistent"), "{error}");
}

#[test]
fn another_network_optimizer_model_or_seed_is_an_error_and_the_rest_a_note() {
    let (state, run) = (facts(), facts().run);
    let refused = |change: &dyn Fn(&mut RunFacts)| {
        let mut run = run.clone();
        change(&mut run);
        check(&state, &Expected { run: &run, seed: 42 }).unwrap_err().to_string()
    };
    type Change<'a> = &'a dyn Fn(&mut RunFacts);
    let cases: [(Change, &str); 7] = [
        (&|r| r.tensors[0].1[0] = 8, "`a.lora_down.weight` was [4, 8], here it is: [8, 8]"),
        (&|r| r.tensors[1].0 = "b".into(), "has `b`, the state has: `a.lora_up.weight`"),
        (&|r| drop(r.tensors.pop()), "which also has the tensor: `a.lora_up.weight`"),
        (&|r| r.tensors.push(("c".into(), vec![1])), "which lacks the tensor: `c`"),
        (&|r| drop(r.alphas.insert("a".into(), "2".into())), "alpha of `a` was 1, here it is: 2"),
        (&|r| r.optimizer = "Lion".into(), "another optimizer"),
        (&|r| r.base_model_hash = "bb".into(), "another base model"),
    ];
    for (change, expected) in cases {
        let error = refused(change);
        assert!(error.contains(expected) && error.contains("\nhint: "), "{error}");
    }
    let error = check(&state, &Expected { run: &run, seed: 43 }).unwrap_err().to_string();
    assert!(error.contains("another seed, 42, this run has: 43"), "{error}");

    let mut changed = run.clone();
    assert!(check(&state, &Expected { run: &changed, seed: 42 }).unwrap().is_empty());
    changed.options.insert("learning_rate".into(), "0.0005".into());
    changed.options.insert("loss_type".into(), "\"huber\"".into());
    changed.data.captions_hash = "dd".into();
    let notes = check(&state, &Expected { run: &changed, seed: 42 }).unwrap();
    assert_eq!(notes.len(), 3);
    assert_eq!(notes[1], "`learning_rate` differs from the state's, 0.001, and is now: 0.0005");
}
