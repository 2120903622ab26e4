//! `resize-images` as a command: the reference's pictures, exit codes, what is left behind.

use std::path::Path;

use super::{attempt_in, run_in};
use crate::harness::{data, text};

fn scene() -> tempfile::TempDir {
    let scene = tempfile::tempdir().expect("a temporary folder");
    let pictures = scene.path().join("in");
    std::fs::create_dir(&pictures).expect("a folder");
    for name in ["img00.png", "img00.txt", "img11.jpg", "img11.txt"] {
        std::fs::copy(data("resize_images/in").join(name), pictures.join(name)).expect("a copy");
    }
    scene
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.expect("an entry").file_name();
    let mut names: Vec<String> =
        entries.map(|entry| name(entry).to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn the_references_arguments_give_its_pictures() {
    let scene = scene();
    let output = run_in(
        scene.path(),
        "resize_images_to_resolution in out --max_resolution 512x512,384x384 --divisible_by 8 \
         --save_as_png --copy_associated_files",
    );
    let said = text(&output);
    assert!(output.stdout.is_empty(), "{said}");
    assert!(said.contains("2 of 2 pictures, 4 files written: 2 resized, 2 of the size"), "{said}");
    let stems = ["img00+384x384", "img00+512x512", "img11+384x384", "img11+512x512"];
    let mut expected: Vec<String> =
        stems.iter().flat_map(|stem| ["png", "txt"].map(|end| format!("{stem}.{end}"))).collect();
    expected.extend(["img00.txt".to_owned(), "img11.txt".to_owned()]);
    expected.sort();
    assert_eq!(names(&scene.path().join("out")), expected);
    let open = |path: &Path| image::open(path).expect("a picture").into_rgb8();
    let name = "img00+384x384.png";
    let ours = open(&scene.path().join("out").join(name));
    assert!(ours == open(&data("resize_images/area").join(name)), "not the same pixels");
    let sizes = ["img00+512x512.png", "img11+384x384.png"]
        .map(|name| open(&scene.path().join("out").join(name)).dimensions());
    assert_eq!(sizes, [(584, 440), (256, 384)]);
}

#[test]
fn a_file_that_is_no_picture_is_left_out_and_named() {
    let scene = scene();
    std::fs::write(scene.path().join("in/broken.jpg"), "no picture").expect("a file");
    let output = attempt_in(scene.path(), "resize-images in out --max_resolution 64x64");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("1 of 3 pictures could not be read"), "{said}");
    assert!(said.contains("`broken.jpg`: it is not a png, jpeg, webp or bmp picture"), "{said}");
    let written = names(&scene.path().join("out"));
    assert_eq!(written, ["img00+64x64.jpg", "img00.txt", "img11+64x64.jpg", "img11.txt"]);
}

#[test]
fn a_destination_inside_the_source_is_refused() {
    let scene = scene();
    let before = names(&scene.path().join("in"));
    for destination in ["in", "in/small", "./in/../in/small"] {
        let output = attempt_in(scene.path(), &format!("resize-images in {destination}"));
        let said = text(&output);
        assert_eq!(output.status.code(), Some(64), "{said}");
        assert!(said.contains("the folder of pictures") && said.contains("hint: "), "{said}");
    }
    assert_eq!(names(&scene.path().join("in")), before);
}
