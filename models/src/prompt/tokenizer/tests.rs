//! Token ids, chunks and prompt weights against transformers and the reference.

use super::*;

/// Ids of transformers' tokenizer and of the reference: `tests/data/dataset/make_tokens.py`.
const GOLDEN: &str = include_str!("../../../../tests/data/dataset/tokens.json");

/// Runs of equal numbers as (number, count).
type Runs<T> = Vec<(T, usize)>;

#[derive(serde::Deserialize)]
struct Golden {
    prompts: Vec<Prompt>,
    chunks: Vec<Chunks>,
}

#[derive(serde::Deserialize)]
struct Prompt {
    text: String,
    v1: Runs<u32>,
    v2: Runs<u32>,
    v1_line: Runs<u32>,
    v2_line: Runs<u32>,
}

#[derive(serde::Deserialize)]
struct Chunks {
    text: String,
    version: String,
    length: u32,
    ids: Vec<Runs<u32>>,
    weighted_ids: Vec<Runs<u32>>,
    weights: Vec<Runs<f32>>,
}

fn unfold<T: Copy>(runs: &Runs<T>) -> Vec<T> {
    runs.iter().flat_map(|(value, count)| std::iter::repeat_n(*value, *count)).collect()
}

fn both() -> [ClipTokenizer; 2] {
    [ClipTokenizer::embedded(false).unwrap(), ClipTokenizer::embedded(true).unwrap()]
}

#[test]
fn ids_equal_transformers() {
    let golden: Golden = serde_json::from_str(GOLDEN).unwrap();
    let [v1, v2] = both();
    assert_eq!((v1.begin_id(), v1.end_id(), v1.pad_id()), (49406, 49407, 49407));
    assert_eq!((v2.begin_id(), v2.end_id(), v2.pad_id()), (49406, 49407, 0));
    assert!(golden.prompts.len() >= 30);
    for prompt in &golden.prompts {
        for (tokenizer, ids, line) in
            [(&v1, &prompt.v1, &prompt.v1_line), (&v2, &prompt.v2, &prompt.v2_line)]
        {
            assert_eq!(tokenizer.encode(&prompt.text).unwrap(), unfold(ids), "{:?}", prompt.text);
            let chunks = tokenizer.input_ids(&prompt.text, TokenLength::One).unwrap();
            assert_eq!(chunks.len(), 1);
            assert_eq!(chunks[0].to_vec(), unfold(line), "{:?}", prompt.text);
        }
    }
}

#[test]
fn chunks_and_weights_equal_the_reference() {
    let golden: Golden = serde_json::from_str(GOLDEN).unwrap();
    let [v1, v2] = both();
    assert!(golden.chunks.len() >= 70);
    for case in &golden.chunks {
        let tokenizer = if case.version == "v1" { &v1 } else { &v2 };
        let length = TokenLength::from_option(Some(case.length)).unwrap();
        let name = format!("{:?} {} {}", case.text, case.version, case.length);
        let rows = |runs: &[Runs<u32>]| runs.iter().map(unfold).collect::<Vec<_>>();
        let plain = tokenizer.input_ids(&case.text, length).unwrap();
        assert_eq!(plain.iter().map(|c| c.to_vec()).collect::<Vec<_>>(), rows(&case.ids), "{name}");
        let weighted = tokenizer.weighted_input_ids(&case.text, length).unwrap();
        let ids: Vec<Vec<u32>> = weighted.ids.iter().map(|c| c.to_vec()).collect();
        assert_eq!(ids, rows(&case.weighted_ids), "{name}");
        for (got, want) in weighted.weights.iter().zip(&case.weights) {
            for (got, want) in got.iter().zip(unfold(want)) {
                assert!((got - want).abs() < 2e-6, "{name}: {got} {want}");
            }
        }
    }
}

#[test]
fn ids_equal_the_parity_inputs() {
    for (v2, folder) in [(false, "parity"), (true, "parity-sd2")] {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data");
        let path = format!("{root}/{folder}/inputs.safetensors");
        let file = formats::open_tensor_file(Path::new(&path)).unwrap();
        let tensor = file.view("input_ids").unwrap();
        assert_eq!(tensor.dtype, formats::Dtype::I64);
        let words = tensor.data.chunks_exact(8);
        let want: Vec<i64> =
            words.map(|word| i64::from_le_bytes(word.try_into().unwrap())).collect();
        let tokenizer = ClipTokenizer::embedded(v2).unwrap();
        let texts = ["a photo of sks dog", "sks dog, red bucket, night"];
        let got: Vec<i64> = texts
            .iter()
            .flat_map(|text| tokenizer.input_ids(text, TokenLength::One).unwrap()[0])
            .map(i64::from)
            .collect();
        assert_eq!(got, want, "{folder}");
    }
}

#[test]
fn folders_of_both_layouts_and_their_faults() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let text = ClipTokenizer::open(Some(folder.path()), false).unwrap_err().to_string();
    assert!(text.contains("neither"), "{text}");

    let (vocabulary, merges) = embedded_vocabulary();
    let vocabulary: std::collections::BTreeMap<_, _> = vocabulary.into_iter().collect();
    std::fs::write(at("vocab.json"), serde_json::to_string(&vocabulary).unwrap()).unwrap();
    let lines: Vec<String> = merges.iter().map(|(l, r)| format!("{l} {r}")).collect();
    std::fs::write(at("merges.txt"), format!("#version: 0.2\n{}\n", lines.join("\n"))).unwrap();
    let map = r#"{"pad_token": {"content": "!", "special": true}}"#;
    std::fs::write(at("special_tokens_map.json"), map).unwrap();
    let own = ClipTokenizer::open(Some(folder.path()), false).unwrap();
    let [_, v2] = both();
    assert_eq!(own.pad_id(), 0);
    assert_eq!(own.encode("a dog! x").unwrap(), v2.encode("a dog! x").unwrap());

    v2.tokenizer.save(at("tokenizer.json"), false).unwrap();
    std::fs::remove_file(at("vocab.json")).unwrap();
    let own = ClipTokenizer::open(Some(folder.path()), true).unwrap();
    assert_eq!(own.encode("a dog! x").unwrap(), v2.encode("a dog! x").unwrap());
    std::fs::write(at("tokenizer.json"), "{}").unwrap();
    let text = ClipTokenizer::open(Some(folder.path()), true).unwrap_err().to_string();
    assert!(text.contains("tokenizer.json"), "{text}");
}

#[test]
fn token_lengths() {
    assert_eq!(TokenLength::from_option(None), Some(TokenLength::One));
    assert_eq!(TokenLength::from_option(Some(225)).map(TokenLength::chunks), Some(3));
    assert_eq!(TokenLength::from_option(Some(100)), None);
}
