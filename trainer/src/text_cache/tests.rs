//! Files beside images: what is written is read, and what differs is named.

use super::file::{Found, check, path_of, read, write};
use super::settings::Setting;
use crate::dataset::Tokens;
use crate::encoded::{Caption, Form};
use formats::Dtype;
use std::path::Path;

fn caption(text: &str, first: u32) -> Caption {
    let tokens = Tokens { ids: vec![first; 77], ids_2: Some(vec![0; 77]), weights: None };
    Caption { text: text.to_owned(), tokens }
}

fn form(dtype: Dtype) -> Form {
    Form { tokens: 77, width: 3, pooled: Some(2), dtype }
}

fn settings(text_encoder: &str, clip_skip: &str) -> Vec<Setting> {
    let setting = |name, value: &str, hashed| Setting { name, value: value.to_owned(), hashed };
    vec![
        setting("text_encoder", text_encoder, Some("another text encoder")),
        setting("clip_skip", clip_skip, None),
    ]
}

#[test]
fn a_file_holds_what_was_written_in_every_type() {
    let folder = tempfile::tempdir().unwrap();
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let path = folder.path().join(dtype.to_string());
        let form = form(dtype);
        let bytes: Vec<u8> = (0..form.bytes()).map(|i| i as u8).collect();
        let (caption, settings) = (caption("a circle", 5), settings("a1", "1"));
        assert_eq!(check(&path, &settings, &caption, &form), Found::Nothing);
        write(&path, &settings, &caption, (&bytes, &form)).unwrap();
        assert_eq!(check(&path, &settings, &caption, &form), Found::Fits);
        assert_eq!(read(&path, &form).unwrap(), bytes);
        let wider = Form { width: 4, ..form };
        assert!(read(&path, &wider).unwrap_err().contains("has the shape [77, 3]"));
    }
}

#[test]
fn what_differs_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (path, form) = (folder.path().join("one"), form(Dtype::F32));
    let (bytes, text) = (vec![1; form.bytes()], caption("a circle", 5));
    write(&path, &settings("a1", "1"), &text, (&bytes, &form)).unwrap();
    let other =
        |settings: &[Setting], caption: &Caption| match check(&path, settings, caption, &form) {
            Found::Other(difference) => difference,
            found => panic!("{found:?}"),
        };
    assert_eq!(other(&settings("b2", "1"), &text), "it was made with another text encoder");
    let skip = "`clip_skip` was `1` when it was made, it is now: `2`";
    assert_eq!(other(&settings("a1", "2"), &text), skip);
    let square = other(&settings("a1", "1"), &caption("a square", 6));
    assert_eq!(square, "it was made for the caption `a circle`, which is now: `a square`");
    let both = other(&settings("b2", "2"), &text);
    assert!(both.starts_with("it was made with another text encoder; `clip_skip`"), "{both}");
    // The same words, read otherwise.
    assert!(other(&settings("a1", "1"), &caption("a circle", 6)).contains("other tokens"));
}

#[test]
fn a_damaged_file_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (path, form) = (folder.path().join("one"), form(Dtype::F32));
    let (bytes, text) = (vec![1; form.bytes()], caption("a circle", 5));
    write(&path, &settings("a1", "1"), &text, (&bytes, &form)).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [&whole[..whole.len() / 2], &whole[..3], &flipped] {
        std::fs::write(&path, damaged).unwrap();
        assert_eq!(check(&path, &settings("a1", "1"), &text, &form), Found::Nothing);
        assert!(read(&path, &form).is_err());
    }
}

#[test]
fn files_lie_beside_their_images_and_suffixes_count() {
    let path = path_of(Path::new("set/a.png"));
    assert_eq!(path, Path::new("set/.lorarun-cache/a.png_te_outputs.safetensors"));
    assert_ne!(path, path_of(Path::new("set/a.jpg")));
}
