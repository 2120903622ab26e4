//! Prompts, when they are due, names, and what ranks tell each other.

use super::*;
use crate::options::parse;
use models::sampler::SamplerKind;

/// The plan of these options and this text of a file of prompts.
fn plan(file: &str, text: &str, words: &[&str]) -> Result<Option<SamplePlan>, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(file);
    std::fs::write(&path, text).unwrap();
    let prompts = format!("--sample_prompts={}", path.display());
    // The check collects problems instead of refusing: other options are missing here.
    let words: Vec<std::ffi::OsString> =
        ["--config-check", &prompts].iter().chain(words).map(std::ffi::OsString::from).collect();
    let parsed = parse(&words).unwrap();
    let shown = format!("{}/", folder.path().display());
    SamplePlan::read(&parsed.options).map_err(|error| error.to_string().replace(&shown, ""))
}

#[test]
fn defaults_are_those_of_the_reference() {
    let text = "# a comment\na cat\na dog --w 64 --h 128 --s 7 --l 3 --d 9 --n grey --ss k_lms\n";
    let plan = plan("p.txt", text, &["--sample_at_first"]).unwrap().expect("samples");
    let [cat, dog] = &plan.prompts[..] else { panic!("{:?}", plan.prompts) };
    assert_eq!((cat.number, cat.line, cat.size, cat.options.steps), (0, 2, [512, 512], 30));
    assert_eq!((cat.scale, cat.seed, cat.sampler), (7.5, None, SamplerKind::Ddim));
    assert_eq!((cat.prompt.as_str(), cat.negative.as_str()), ("a cat", ""));
    assert_eq!((dog.number, dog.line, dog.size, dog.options.steps), (1, 3, [64, 128], 7));
    assert_eq!((dog.scale, dog.seed, dog.sampler), (3., Some(9), SamplerKind::Lms));
    assert_eq!(dog.negative, "grey");
    assert!(plan.notes.is_empty(), "{:?}", plan.notes);
}

#[test]
fn options_decide_what_the_model_predicts() {
    use models::sampler::Prediction;
    let text = "a --ss lms\nb --ss euler\nc --l 0.5 --t 0.5 --am 1 --d 1,2 --f x.png\n";
    let words = ["--sample_at_first", "--v2", "--v_parameterization", "--zero_terminal_snr"];
    let plan = plan("p.txt", text, &words).unwrap().expect("samples");
    assert!(plan.prompts.iter().all(|p| p.options.prediction == Prediction::Velocity));
    let starts: Vec<bool> = plan.prompts.iter().map(|p| p.options.zero_terminal_snr).collect();
    assert_eq!(starts, [false, true, true], "`lms` cannot start at pure noise");
    assert_eq!((plan.prompts[2].scale, plan.prompts[2].seed), (1., Some(1)), "no guidance below 1");
    assert_eq!(plan.notes.len(), 1 + 4, "{:?}", plan.notes);
    assert!(plan.notes[0].contains("p.txt:1: `lms` cannot start"), "{:?}", plan.notes);
    assert!(plan.notes[1].contains("p.txt:3: `--t` has no effect"), "{:?}", plan.notes);
}

#[test]
fn faults_name_file_and_line() {
    for (file, text, part) in [
        ("p.txt", "a\nb --ss eular_a\n", "p.txt:2: unknown sampler: `eular_a`\nhint: did you mean"),
        ("p.txt", "a --s 999\n", "p.txt:1: the number of sampling steps should lie between"),
        ("p.txt", "\n\na --w 7\n", "p.txt:3: "),
        ("p.json", "[\"a\",\n{\"prompt\": \"b\", \"width\": 1}]", "p.json:2: `width`"),
        ("p.toml", "[prompt]\n[[prompt.subset]]\nprompt='a'\nscale='x'\n", "p.toml:4: `scale`"),
    ] {
        let said = plan(file, text, &["--sample_every_n_steps=2"]).expect_err(text);
        assert!(said.contains(part), "{said}");
    }
    let text = format!("a cat\n{}\n", "word ".repeat(226));
    let long = plan("p.txt", &text, &["--sample_at_first"]).unwrap().expect("samples");
    let said =
        long.check_lengths(&models::prompt::ClipTokenizer::open(None, false).unwrap()).unwrap_err();
    let said = said.to_string();
    assert!(said.contains("p.txt:2: the prompt has 226 tokens, 225 fit"), "{said}");
}

#[test]
fn samples_are_due_as_in_the_reference() {
    let due = |words: &[&str]| {
        let plan = plan("p.txt", "a\n", words).unwrap().expect("samples");
        // Twelve steps in epochs of four, the last of which ends early.
        let of =
            |step: usize| plan.due(step, (step - 1) / 4 + 1, step.is_multiple_of(4) || step == 11);
        (1..=11).filter_map(of).map(Occasion::name).collect::<Vec<String>>()
    };
    assert_eq!(due(&["--sample_every_n_steps=5"]), ["000005", "000010"]);
    assert_eq!(due(&["--sample_every_n_epochs=1"]), ["e000001", "e000002", "e000003"]);
    assert_eq!(due(&["--sample_every_n_epochs=2", "--sample_every_n_steps=1"]), ["e000002"]);
    assert!(due(&["--sample_at_first"]).is_empty());
    // Nothing asks for pictures: the file is not even read.
    assert_eq!(plan("p.txt", "a --w x\n", &["--sample_every_n_steps=0"]), Ok(None));
}

#[test]
fn names_tell_whose_a_sample_is() {
    for name in ["cat_000003_00_20261123130000_7.png", "cat_e000001_12_20261123130000.png"] {
        assert!(is_sample_of("cat_", name), "{name}");
        assert!(!is_sample_of("", name) && !is_sample_of("ca", name), "{name}");
    }
    assert!(is_sample_of("", "e000001_12_20261123130000.png"));
    assert!(!is_sample_of("cat_", "cat_b_000003_00_20261123130000.png"));
    assert!(!is_sample_of("cat_", "cat_000003.png") && !is_sample_of("cat_", "cat_a_b_c.png"));
}

#[test]
fn what_ranks_say_comes_through() {
    let all = [
        Made::Picture(vec![1, 2, 3]),
        Made::NotFinite("the latents are not finite".to_owned()),
        Made::Stopped,
    ];
    for made in all {
        assert_eq!(unpack(pack(Some(&made))).unwrap(), made);
    }
    assert!(unpack(pack(None)).is_err() && unpack(Vec::new()).is_err());
}
