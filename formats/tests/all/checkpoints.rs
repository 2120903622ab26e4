//! Torch checkpoints made by PyTorch (`tests/data/formats/make_checkpoints.py`) read as PyTorch
//! reads them, and ours read back.

use std::collections::BTreeMap;

use formats::pickle::{PickleFile, write_pickle};
use formats::{FormatError, TensorFile, TensorView};

use crate::support::{data, load};

#[test]
fn nested_flat_and_protocol_4_hold_the_same_tensors() {
    let expected = load(&data("formats/expected.safetensors"));
    assert_eq!(expected.len(), 21);
    for name in ["nested.ckpt", "flat.pt", "flat_protocol4.bin"] {
        let read = load(&data(&format!("formats/{name}")));
        let keys = |t: &BTreeMap<String, _>| t.keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&read), keys(&expected), "{name}");
        for (key, tensor) in &read {
            assert_eq!(tensor, &expected[key], "{name} {key}");
        }
    }
}

#[test]
fn the_moments_of_an_optimizer_are_named_by_parameter() {
    let read = load(&data("formats/optimizer.bin"));
    let names: Vec<_> = read.keys().map(String::as_str).collect();
    let expected = ["0.exp_avg", "0.exp_avg_sq", "0.step", "1.exp_avg", "1.exp_avg_sq", "1.step"];
    assert_eq!(names, expected);
    assert_eq!(read, load(&data("formats/optimizer_expected.safetensors")));
}

#[test]
fn contiguous_tensors_are_borrowed_from_the_map() {
    let file = PickleFile::open(&data("formats/nested.ckpt")).unwrap();
    let is_borrowed = |name: &str| {
        let TensorView { data, .. } = file.view(name).unwrap();
        matches!(data, std::borrow::Cow::Borrowed(_))
    };
    for name in ["plain.f32", "shared.rows", "shared.all", "scalar", "empty", "strided.size_one"] {
        assert!(is_borrowed(name), "{name}");
    }
    for name in ["strided.transposed", "strided.columns", "strided.expanded"] {
        assert!(!is_borrowed(name), "{name}");
    }
}

#[test]
fn the_format_before_1_6_is_refused_with_a_way_out() {
    let error = PickleFile::open(&data("formats/before_1_6.ckpt")).unwrap_err();
    assert!(matches!(error, FormatError::Unsupported { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("before_1_6.ckpt") && text.contains("hint: save it once"), "{text}");
}

#[test]
fn a_pickle_that_runs_a_command_is_refused_by_name() {
    let error = PickleFile::open(&data("formats/evil.ckpt")).unwrap_err();
    assert!(matches!(error, FormatError::ForbiddenPickle { .. }), "{error}");
    assert!(error.to_string().contains("`posix.system`"), "{error}");
}

#[test]
fn what_we_write_reads_back_and_is_the_same_every_time() {
    let mut tensors = load(&data("formats/expected.safetensors"));
    tensors.remove("plain.f8");
    let write = || {
        let mut bytes = Vec::new();
        write_pickle(&mut bytes, &tensors).unwrap();
        bytes
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ours.pt");
    std::fs::write(&path, write()).unwrap();
    assert_eq!(load(&path), tensors);
    assert_eq!(write(), write());
}

#[test]
fn eight_bit_floats_cannot_be_written_as_a_checkpoint() {
    let tensors = load(&data("formats/expected.safetensors"));
    let error = write_pickle(&mut Vec::new(), &tensors).unwrap_err();
    assert!(error.to_string().contains("F8_E4M3"), "{error}");
}
