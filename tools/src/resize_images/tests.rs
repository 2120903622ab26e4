//! Whole runs of the tool: the reference's pictures, names and copies, and bad input.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Parser;
use image::{DynamicImage, ImageBuffer, Luma, LumaA, Rgb, RgbImage, Rgba};

use super::{Options, run};
use crate::Usage;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    options: Options,
}

fn resize_images(source: &Path, destination: &Path, options: &str) -> anyhow::Result<()> {
    let paths = [source, destination].map(|path| path.to_str().unwrap());
    let words = ["resize-images"].into_iter().chain(paths).chain(options.split_whitespace());
    run(&Cli::try_parse_from(words)?.options)
}

/// What it made of the reference's inputs, beside what the reference made of them.
fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/resize_images")
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Mean and largest difference; the sizes must be equal.
fn difference(left: &Path, right: &Path) -> (f64, u8) {
    let open = |path: &Path| image::open(path).unwrap().into_rgb8();
    let (left, right) = (open(left), open(right));
    assert_eq!(left.dimensions(), right.dimensions());
    let each = || left.as_raw().iter().zip(right.as_raw()).map(|(l, r)| l.abs_diff(*r));
    (each().map(f64::from).sum::<f64>() / left.as_raw().len() as f64, each().max().unwrap())
}

fn pattern(width: u32, height: u32) -> RgbImage {
    ImageBuffer::from_fn(width, height, |x, y| {
        Rgb([(x * 5 % 256) as u8, (y * 3 % 256) as u8, (x * y % 256) as u8])
    })
}

#[test]
fn every_filter_gives_the_references_pixels() {
    let folder = tempfile::tempdir().unwrap();
    // Mean and largest difference that are allowed, from the png.
    let filters = [
        ("area", 0.0, 0),
        // Two values of 433,000: sums of floats in another order.
        ("cubic", 1e-5, 1),
        ("lanczos4", 0.0, 0),
        ("linear", 0.0, 0),
        ("nearest", 0.0, 0),
        ("box", 0.0, 0),
    ];
    let mut off = Vec::new();
    for (filter, mean, most) in filters {
        let out = folder.path().join(filter);
        let options = format!(
            "--max_resolution 384x384 --divisible_by 8 --save_as_png --interpolation {filter}"
        );
        resize_images(&golden().join("in"), &out, &options).unwrap();
        let name = "img00+384x384.png";
        let found = difference(&out.join(name), &golden().join(filter).join(name));
        if found.0 > mean || found.1 > most {
            off.push((filter, found));
        }
    }
    assert!(off.is_empty(), "{off:?}");
}

#[test]
fn jpegs_are_read_and_written_closely() {
    let folder = tempfile::tempdir().unwrap();
    let (png, jpg) = (folder.path().join("png"), folder.path().join("jpg"));
    let options = "--max_resolution 384x384 --divisible_by 8";
    resize_images(&golden().join("in"), &png, &format!("{options} --save_as_png")).unwrap();
    resize_images(&golden().join("in"), &jpg, options).unwrap();
    // Not resized: what two JPEG decoders make of one file.
    let name = "img11+384x384";
    let png_name = format!("{name}.png");
    let found = difference(&png.join(&png_name), &golden().join("area").join(&png_name));
    assert!(found.0 <= 0.25 && found.1 <= 4, "{found:?}");
    for name in ["img00", "img03", "img11"] {
        let found = difference(
            &png.join(format!("{name}+384x384.png")),
            &jpg.join(format!("{name}+384x384.jpg")),
        );
        // The first is noisy; with one colour for four pixels it would be 1.9.
        assert!(found.0 < 0.7, "{name}: {found:?}");
    }
}

#[test]
fn names_sizes_and_copies_are_the_references() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("in"), folder.path().join("new/out"));
    std::fs::create_dir_all(source.join("sub")).unwrap();
    pattern(200, 100).save(source.join("a.png")).unwrap();
    pattern(60, 90).save(source.join("b.c.PNG")).unwrap();
    for name in ["a.txt", "a.tags.txt", "b.c.caption", "notes.md", ".hidden.png", "sub/x.png"] {
        std::fs::write(source.join(name), name).unwrap();
    }
    let options = "--max_resolution 100x100,64x64 --divisible_by 8 --save_as_png";
    resize_images(&source, &out, options).unwrap();
    let pictures =
        ["a+100x100.png", "a+64x64.png", "b.c+100x100.png", "b.c+64x64.png"].map(str::to_owned);
    let others = ["a.tags.txt", "a.txt", "b.c.caption", "notes.md"].map(str::to_owned);
    let mut expected = [&pictures[..], &others].concat();
    expected.sort();
    assert_eq!(names(&out), expected);
    let sizes: BTreeMap<&str, (u32, u32)> = pictures
        .iter()
        .map(|name| (name.as_str(), image::image_dimensions(out.join(name)).unwrap()))
        .collect();
    // From the original: 200x100 at 64x64 is 90x45, cut to 88x40; 60x90 fits into 100x100.
    assert_eq!(sizes["a+100x100.png"], (136, 64));
    assert_eq!(sizes["a+64x64.png"], (88, 40));
    assert_eq!(sizes["b.c+100x100.png"], (56, 88));
    assert_eq!(sizes["b.c+64x64.png"], (48, 72));
    let whole = pattern(60, 90);
    let cut = image::open(out.join("b.c+100x100.png")).unwrap().into_rgb8();
    assert_eq!(cut.get_pixel(0, 0), whole.get_pixel(2, 1));
    assert_eq!(cut.get_pixel(55, 87), whole.get_pixel(57, 88));

    let with = folder.path().join("with");
    resize_images(&source, &with, &format!("{options} --copy_associated_files")).unwrap();
    let mut copies: Vec<String> = names(&with);
    copies.retain(|name| !expected.contains(name));
    let copied = [
        "a+100x100.tags.txt",
        "a+100x100.txt",
        "a+64x64.tags.txt",
        "a+64x64.txt",
        "b.c+100x100.caption",
        "b.c+64x64.caption",
    ];
    assert_eq!(copies, copied);
    assert_eq!(std::fs::read(with.join("a+64x64.txt")).unwrap(), b"a.txt");

    // Once more over its own results, the same bytes.
    let before = std::fs::read(out.join("a+64x64.png")).unwrap();
    resize_images(&source, &out, options).unwrap();
    assert_eq!(std::fs::read(out.join("a+64x64.png")).unwrap(), before);
    assert_eq!(names(&out), expected);
}

#[test]
fn every_kind_of_pixel_becomes_rgb() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("in"), folder.path().join("out"));
    std::fs::create_dir(&source).unwrap();
    let wide = |x: u32| (x * 1000) as u16;
    let kinds: [(&str, DynamicImage, [u8; 3]); 5] = [
        ("grey", ImageBuffer::from_fn(40, 30, |x, _| Luma([x as u8])).into(), [7, 7, 7]),
        ("grey_alpha", ImageBuffer::from_fn(40, 30, |x, _| LumaA([x as u8, 9])).into(), [7, 7, 7]),
        ("alpha", ImageBuffer::from_fn(40, 30, |x, _| Rgba([x as u8, 3, 4, 0])).into(), [7, 3, 4]),
        // The high byte, as Pillow has it: 7000 is 27 * 256 + 88, 65535 is 255.
        (
            "rgb16",
            ImageBuffer::from_fn(40, 30, |x, _| Rgb([wide(x), 255, 65_535])).into(),
            [27, 0, 255],
        ),
        ("grey16", ImageBuffer::from_fn(40, 30, |x, _| Luma([wide(x)])).into(), [27, 27, 27]),
    ];
    for (name, picture, _) in &kinds {
        picture.save(source.join(format!("{name}.png"))).unwrap();
    }
    resize_images(&source, &out, "--max_resolution 64x64 --save_as_png").unwrap();
    for (name, _, pixel) in &kinds {
        let written = image::open(out.join(format!("{name}+64x64.png"))).unwrap();
        assert_eq!(written.color(), image::ColorType::Rgb8, "{name}");
        assert_eq!(written.into_rgb8().get_pixel(7, 5).0, *pixel, "{name}");
    }
}

#[test]
fn orientation_is_applied_and_not_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("in"), folder.path().join("out"));
    std::fs::create_dir(&source).unwrap();
    let mut jpeg = Vec::new();
    let halves = ImageBuffer::from_fn(64, 32, |x, _| Rgb([if x < 32 { 250u8 } else { 5 }; 3]));
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 100)
        .encode_image(&halves)
        .unwrap();
    // Orientation 6: turn clockwise.
    let exif = [
        &b"\xFF\xE1\x00\x22Exif\0\0"[..],
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
    ]
    .concat();
    std::fs::write(source.join("a.jpg"), [&jpeg[..2], &exif, &jpeg[2..]].concat()).unwrap();
    resize_images(&source, &out, "--max_resolution 32x32").unwrap();
    let bytes = std::fs::read(out.join("a+32x32.jpg")).unwrap();
    assert!(!bytes.windows(4).any(|four| four == b"Exif"));
    let upright = image::load_from_memory(&bytes).unwrap().into_rgb8();
    assert_eq!(upright.dimensions(), (22, 45));
    assert!(upright.get_pixel(10, 2)[0] > 240 && upright.get_pixel(10, 42)[0] < 15);
}

#[test]
fn what_is_no_picture_is_named_and_the_others_are_made() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("in"), folder.path().join("out"));
    std::fs::create_dir(&source).unwrap();
    pattern(90, 90).save(source.join("good.png")).unwrap();
    let whole = std::fs::read(source.join("good.png")).unwrap();
    std::fs::write(source.join("cut.png"), &whole[..whole.len() / 2]).unwrap();
    std::fs::write(source.join("text.jpg"), "a sentence").unwrap();
    std::fs::write(source.join("nothing.webp"), "").unwrap();
    std::fs::write(source.join("text.txt"), "caption").unwrap();
    std::os::unix::fs::symlink("gone", source.join("link.bmp")).unwrap();
    let options = "--max_resolution 64x64,32x32 --copy_associated_files";
    let error = resize_images(&source, &out, options).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("4 of 5 pictures could not be read"), "{text}");
    for name in ["`cut.png`", "`text.jpg`", "`nothing.webp`", "`link.bmp`"] {
        assert!(text.contains(name), "{text}");
    }
    assert_eq!(crate::exit::code_of(Err(error)), 1);
    assert_eq!(names(&out), ["good+32x32.jpg", "good+64x64.jpg", "text.txt"]);
}

#[test]
fn two_files_of_one_name_are_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("in"), folder.path().join("out"));
    std::fs::create_dir(&source).unwrap();
    pattern(8, 8).save(source.join("a.png")).unwrap();
    pattern(8, 8).save(source.join("a.bmp")).unwrap();
    let text = resize_images(&source, &out, "").unwrap_err().to_string();
    assert!(text.contains("`a.bmp`") && text.contains("`a.png`"), "{text}");
    std::fs::remove_file(source.join("a.bmp")).unwrap();
    std::fs::write(source.join("a.txt"), "").unwrap();
    std::fs::write(source.join("a+128x128.txt"), "").unwrap();
    let options = "--copy_associated_files";
    let text = resize_images(&source, &out, options).unwrap_err().to_string();
    assert!(text.contains("written as `a+128x128.txt`"), "{text}");
    assert!(!out.exists());
}

#[test]
fn where_to_write_is_outside_of_what_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("in");
    std::fs::create_dir(&source).unwrap();
    pattern(8, 8).save(source.join("a.png")).unwrap();
    std::os::unix::fs::symlink(&source, folder.path().join("link")).unwrap();
    for inside in ["in", "in/deep/er", "link", "link/deep", "in/../in"] {
        let error = resize_images(&source, &folder.path().join(inside), "").unwrap_err();
        assert!(error.downcast_ref::<Usage>().is_some(), "{inside}: {error}");
        assert!(error.to_string().contains("the folder of pictures"), "{inside}: {error}");
    }
    assert_eq!(names(&source), ["a.png"]);
    // A name that begins alike is another folder; the folder around is fine too.
    resize_images(&source, &folder.path().join("in2"), "--max_resolution 8x8").unwrap();
    resize_images(&source, folder.path(), "--max_resolution 8x8").unwrap();
    assert!(folder.path().join("a+8x8.jpg").exists());
}

#[test]
fn options_and_folders_that_cannot_be_meant_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("in"), folder.path().join("out"));
    let error = |options: &str| resize_images(&source, &out, options).unwrap_err();
    assert!(error("").to_string().contains("is no folder"));
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("a.txt"), "").unwrap();
    assert!(error("").to_string().contains("holds no picture"));
    pattern(90, 20).save(source.join("a.png")).unwrap();
    let usages = [
        ("--divisible_by 0", "1 or more"),
        ("--max_resolution 512", "`512`"),
        ("--divisible_by 64", "`a.png`"),
        ("--max_resolution 64x64,64x64", "twice"),
    ];
    for (options, part) in usages {
        let error = error(options);
        assert!(error.downcast_ref::<Usage>().is_some(), "{options}: {error}");
        assert!(error.to_string().contains(part), "{options}: {error}");
    }
    assert!(error("--interpolation sharp").to_string().contains("lanczos4"));
    assert!(!out.exists());
}
