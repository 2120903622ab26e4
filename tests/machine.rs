//! The binary needs no library of NVIDIA's to start, and says what is missing to use a card.

use std::path::Path;
use std::process::{Command, Output};

fn lorarun(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lorarun")).args(arguments).output().expect("it starts")
}

/// Names of the libraries that the loader opens with an ELF file of 64 bits, little-endian.
fn needed(file: &[u8]) -> Vec<String> {
    let number = |at: usize, size: usize| -> usize {
        let bytes = file.get(at..at + size).expect("within the file");
        bytes.iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte))
    };
    assert_eq!(file[..6], *b"\x7fELF\x02\x01", "an ELF file of 64 bits, little-endian");
    let (headers, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    // Kind, place in the file, address in memory, length in the file.
    let segments: Vec<[usize; 4]> = (0..count)
        .map(|index| headers + index * size)
        .map(|at| [number(at, 4), number(at + 8, 8), number(at + 16, 8), number(at + 32, 8)])
        .collect();
    let dynamic = segments.iter().find(|segment| segment[0] == 2).expect("a dynamic section");
    let entries: Vec<(usize, usize)> = (dynamic[1]..dynamic[1] + dynamic[3])
        .step_by(16)
        .map(|at| (number(at, 8), number(at + 8, 8)))
        .take_while(|(tag, _)| *tag != 0)
        .collect();
    let (_, strings) = *entries.iter().find(|(tag, _)| *tag == 5).expect("names");
    let loaded = |address: usize| {
        let holds = |s: &&[usize; 4]| s[0] == 1 && (s[2]..s[2] + s[3]).contains(&address);
        let segment = segments.iter().find(holds).expect("a segment with the address");
        segment[1] + address - segment[2]
    };
    let names = loaded(strings);
    let name = |offset: usize| {
        let bytes = file[names + offset..].iter().take_while(|byte| **byte != 0).copied();
        String::from_utf8(bytes.collect()).expect("a name")
    };
    entries.iter().filter(|(tag, _)| *tag == 1).map(|(_, offset)| name(*offset)).collect()
}

#[test]
fn nothing_of_cuda_is_linked() {
    let file = std::fs::read(env!("CARGO_BIN_EXE_lorarun")).expect("the binary");
    let needed = needed(&file);
    // What every program of its kind needs was found: the list is not empty by mistake.
    assert!(needed.iter().any(|name| name.starts_with("libc.so")), "{needed:?}");
    let vendor = ["cuda", "cublas", "cudnn", "nvrtc", "nccl", "nvidia", "cudart"];
    let of_vendor = |name: &&String| vendor.iter().any(|word| name.contains(word));
    assert_eq!(needed.iter().find(of_vendor), None, "{needed:?}");
}

#[test]
fn doctor_tells_people_and_programs_the_same() {
    let lines = lorarun(&["doctor"]);
    assert!(lines.status.success(), "{lines:?}");
    let lines = String::from_utf8(lines.stdout).expect("UTF-8");
    let output = lorarun(&["doctor", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let device = value["device"].as_str().expect("a device");
    assert!(lines.ends_with(&format!("trains on      {device}\n")), "{lines}");
    let cards = value["cards"].as_array().expect("a list");
    assert_eq!(device == "cpu", !cards.iter().any(|card| card["usable"] == true), "{value:#}");
    assert!(value["processor"]["cores"].as_u64().expect("a number") > 0);
    let libraries = value["libraries"].as_array().expect("a list");
    assert_eq!(libraries.len(), 5);
    for library in libraries {
        let name = library["name"].as_str().expect("a name");
        let is_it = |line: &&str| line.get(15..).is_some_and(|text| text.starts_with(name));
        let line = lines.lines().filter(|line| line.contains("  ")).find(is_it).expect("a line");
        if library["found"] == true {
            let path = library["path"].as_str().expect("a path");
            assert!(Path::new(path).is_file(), "{path}");
            assert!(line.contains(path), "{line}");
        } else {
            assert!(line.contains("missing"), "{line}");
            assert!(library["how_to_get"].as_str().is_some_and(|how| !how.is_empty()));
        }
    }
}

#[test]
fn doctor_is_the_work_of_one_process() {
    let output = lorarun(&["--num_processes", "2", "doctor"]);
    assert_eq!(output.status.code(), Some(64), "{output:?}");
}
