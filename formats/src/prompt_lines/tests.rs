//! Lines and files of prompts: both dialects, and everything that is refused.

use std::path::PathBuf;

use super::*;

/// What is said of a line.
fn refusal(text: &str) -> String {
    parse_line(text, 3).expect_err("a bad line").to_string()
}

/// Reads a file of this name and text.
fn read(name: &str, text: &str) -> Result<Vec<PromptLine>, String> {
    let folder = tempfile::tempdir().expect("a folder");
    let path: PathBuf = folder.path().join(name);
    std::fs::write(&path, text).expect("written");
    let shown = format!("{}/", folder.path().display());
    read_prompt_file(&path).map_err(|error| error.to_string().replace(&shown, ""))
}

#[test]
fn all_options_of_a_line_are_read() {
    let line = parse_line(
        "a (red:1.2) ring, on a table --W 256 --h 512 --s 20 --d 5,6 --l 7.5 --t 0.6 \
         --n blurred, two rings --p2 night --n2 day --SS k_euler_a --am 0.5,-0.7 --f ring.png --ow 64 --nh 32 --ct 8",
        4,
    );
    let expected = PromptLine {
        line: 4,
        prompt: "a (red:1.2) ring, on a table".to_owned(),
        negative: Some("blurred, two rings".to_owned()),
        prompt_2: Some("night".to_owned()),
        negative_2: Some("day".to_owned()),
        width: Some(256),
        height: Some(512),
        steps: Some(20),
        seeds: vec![5, 6],
        scale: Some(7.5),
        sampler: Some("k_euler_a".to_owned()),
        strength: Some(0.6),
        multipliers: vec![0.5, -0.7],
        file_name: Some("ring.png".to_owned()),
        told: ToldSizes {
            original: [Some(64), None],
            original_negative: [None, Some(32)],
            crop: [None, Some(8)],
        },
        notes: Vec::new(),
    };
    assert_eq!(line, Ok(expected));
    let plain = PromptLine { prompt: "h 20 rings".to_owned(), ..PromptLine::default() };
    assert_eq!(parse_line("  h 20 rings ", 0), Ok(plain), "a prompt is no option");
    let emptied = parse_line("a ring --n", 0).expect("no negative prompt");
    assert_eq!(emptied.negative.as_deref(), Some(""));
}

#[test]
fn what_has_no_effect_is_noted() {
    let line = parse_line("a ring --ow 512 --g 3.5 --cn a.png --s 4 --s 5", 1).expect("a line");
    assert_eq!((line.steps, line.told.original), (Some(5), [Some(512), None]));
    assert_eq!(line.notes.len(), 3);
    assert!(line.notes[0].starts_with("`--g` has no effect"), "{:?}", line.notes);
    assert_eq!(line.notes[2], "`--s` is given twice, the last one counts");
}

#[test]
fn unknown_options_get_a_suggestion() {
    let said = refusal("a ring --width 512");
    assert_eq!(
        said,
        "line 3 of the prompts: unknown option of a prompt: `--width`\nhint: did you mean `--w`?"
    );
    for (written, meant) in
        [("steps", "s"), ("seed", "d"), ("negative", "n"), ("sampler", "ss"), ("cfg", "l")]
    {
        let said = refusal(&format!("a ring --{written} 1"));
        assert!(said.ends_with(&format!("did you mean `--{meant}`?")), "{said}");
    }
    assert!(refusal("a ring --w=512").ends_with("write a space, not `=`: `--w 512`"));
    assert!(refusal("a ring --zz 1").contains("the options are `--w`, `--h`"));
    assert!(refusal("a ring -- 1").contains("unknown option of a prompt: `--`"));
    assert!(refusal("--w 512").contains("begins with an option"));
}

#[test]
fn bad_values_are_named() {
    for (text, part) in [
        ("a --w wide", "`--w` should be a number of pixels that 8 divides, 64 at least: `wide`"),
        ("a --w 500", "hint: take 496 or 504"),
        ("a --h 0", "`--h` should be"),
        ("a --h -64", "`--h` should be"),
        ("a --w", "`--w` has no value"),
        ("a --s 0", "1 to 1000: `0`"),
        ("a --s 1001", "1 to 1000: `1001`"),
        ("a --s 2.5", "1 to 1000: `2.5`"),
        ("a --d -1", "64 bits"),
        ("a --d 1,,2", "64 bits"),
        ("a --d 18446744073709551616", "64 bits"),
        ("a --l nan", "`--l` should be a number: `nan`"),
        ("a --t 1.5", "0 to 1: `1.5`"),
        ("a --t nan", "0 to 1: `nan`"),
        ("a --am 1,x", "for each LoRA"),
        ("a --am inf", "for each LoRA"),
        ("a --ss", "has no value"),
        ("a --f ../x.png", "without a folder"),
        ("a --f .hidden", "without a folder"),
        ("a --nl 3", "`--nl` cannot be done, the negative prompt has no scale of its own: `3`"),
        ("a --c x", "not guided by CLIP"),
        ("a --glus 3,0.5", "Gradual Latent is not there"),
    ] {
        let said = refusal(text);
        assert!(said.contains(part), "{text}: {said}");
    }
}

#[test]
fn a_text_file_has_comments_and_lines() {
    let text = "\u{feff}# comment\r\n\r\na ring --s 4\r\n  a disc\r\n";
    let prompts = read("p.txt", text).expect("prompts");
    let seen: Vec<_> = prompts.iter().map(|p| (p.line, p.prompt.as_str(), p.steps)).collect();
    assert_eq!(seen, [(3, "a ring", Some(4)), (4, "a disc", None)]);
    let said = read("p.txt", "a ring\n\na disc --w 7 --n x\n").expect_err("7 pixels");
    assert!(said.starts_with("p.txt:3: `--w` should be"), "{said}");
    let said = read("p.txt", "# nothing\n").expect_err("no prompt");
    assert!(said.contains("the file holds no prompt"), "{said}");
    let missing = read_prompt_file(std::path::Path::new("/nowhere/p.txt")).expect_err("no file");
    assert!(missing.to_string().starts_with("/nowhere/p.txt: the file of prompts cannot be read"));
}

#[test]
fn bytes_that_are_no_text_are_named_by_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("p.txt");
    std::fs::write(&path, b"a ring\na \xff disc\n").expect("written");
    let said = read_prompt_file(&path).expect_err("no UTF-8").to_string();
    assert!(said.contains("p.txt:2: the line is not UTF-8"), "{said}");
}

#[test]
fn toml_has_options_for_all_and_for_each() {
    let text = "[prompt]\nwidth = 256\nseed = 7\nscale = 7\n\n[[prompt.subset]]\n\
                prompt = \"a ring\"\nsample_sampler = \"euler_a\"\n[[prompt.subset]]\n\
                prompt = \"a disc\"\nseed = [1, 2]\nscale = 3.5\nsample_steps = 20\n\
                negative_prompt = \"grey\"\nguidance_scale = 4\n";
    let prompts = read("p.toml", text).expect("prompts");
    assert_eq!(prompts.len(), 2);
    let (ring, disc) = (&prompts[0], &prompts[1]);
    assert_eq!((ring.prompt.as_str(), ring.width, ring.scale), ("a ring", Some(256), Some(7.)));
    assert_eq!((ring.seeds.as_slice(), ring.sampler.as_deref()), (&[7][..], Some("euler_a")));
    assert_eq!((disc.seeds.as_slice(), disc.scale, disc.steps), (&[1, 2][..], Some(3.5), Some(20)));
    assert_eq!((disc.line, disc.negative.as_deref()), (9, Some("grey")));
    assert_eq!(disc.notes.len(), 1);
    for (text, part) in [
        ("[prompt]\nwidth = 255\n[[prompt.subset]]\nprompt='a'\n", "p.toml:2: `width` should be"),
        (
            "[prompt]\n[[prompt.subset]]\nprompt='a'\nsteps=4\n",
            "p.toml:4: unknown key of a prompt: `steps`\nhint: did you mean `sample_steps`?",
        ),
        (
            "[prompt]\n[[prompt.subset]]\nprompt=true\n",
            "p.toml:3: `prompt` should be a text, a number or a list of numbers: `a truth value`",
        ),
        ("[prompt]\nwidth=64\n", "`[[prompt.subset]]` is missing"),
        ("[prompts]\n", "p.toml:1: unknown table: `prompts`"),
        ("a = = 2\n", "p.toml:1: not valid TOML"),
        ("", "`[prompt]` is missing"),
        ("[prompt]\nsubset = [1]\n", "no table"),
    ] {
        let said = read("p.toml", text).expect_err("bad TOML");
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn json_is_a_list_of_tables_and_lines() {
    let text = "[\n  {\"prompt\": \"a \\\"ring\\\", [x\", \"width\": 256, \"seed\": null},\n\n  \
                \"a disc --s 4\",\n  {\"prompt\": \"b\", \"enum\": 2, \"scale\": 1e1}\n]\n";
    let prompts = read("p.json", text).expect("prompts");
    let seen: Vec<_> = prompts.iter().map(|p| (p.line, p.prompt.as_str())).collect();
    assert_eq!(seen, [(2, "a \"ring\", [x"), (4, "a disc"), (5, "b")]);
    assert_eq!((prompts[0].width, prompts[1].steps), (Some(256), Some(4)));
    assert_eq!(prompts[2].scale, Some(10.));
    for (text, part) in [
        ("[\"a\",\n{\"prompt\": \"b\", \"width\": 12.5}]", "p.json:2: `width` should be"),
        ("[\"a\",\n\"b --foo 1\"]", "p.json:2: unknown option of a prompt: `--foo`"),
        ("[\n\n3]", "p.json:3: a prompt should be a text or a table: `a number`"),
        ("{\"prompt\": \"a\"}", "should hold a list"),
        ("[\"a\",\n", "p.json:2: not valid JSON"),
        ("[]", "holds no prompt"),
        ("[{\"prompt\": {}}]", "`a table`"),
    ] {
        let said = read("p.json", text).expect_err("bad JSON");
        assert!(said.contains(part), "{said}");
    }
}
