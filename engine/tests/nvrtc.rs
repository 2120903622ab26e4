//! Every kernel compiles with NVRTC for the cards that are promised; no GPU is needed.
//!
//! Without NVRTC on the machine this says so and tests nothing, unless `LORARUN_REQUIRE_NVRTC` is
//! set, as continuous integration does.

use std::path::Path;
use std::sync::Mutex;

use engine::cuda::nvidia::{Capability, Library, find, image_in, modules};

const CARDS: [Capability; 4] = [(8, 0), (8, 6), (8, 9), (9, 0)];

/// Machine code as the driver loads it: an ELF file with at least one kernel.
fn is_machine_code(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF") && image.windows(6).any(|window| window == b".text.")
}

#[test]
fn every_kernel_compiles_for_every_card() {
    let nvrtc = match find(Library::Nvrtc) {
        Ok(found) => found,
        Err(missing) => {
            let required = std::env::var_os("LORARUN_REQUIRE_NVRTC").is_some();
            assert!(!required, "NVRTC is required here: {missing:?}");
            eprintln!("NVRTC is not on this machine; nothing is tested: {missing:?}");
            return;
        }
    };
    eprintln!("{} {:?}", nvrtc.path.display(), nvrtc.version);
    // What was compiled before from the same text need not be compiled again.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    let mut work: Vec<(&str, Capability)> =
        modules().flat_map(|module| CARDS.map(|card| (module, card))).collect();
    assert!(!work.is_empty(), "no kernels were found");
    let count = work.len();
    work.reverse();
    let (work, broken) = (Mutex::new(work), Mutex::new(Vec::new()));
    let take = || work.lock().expect("no thread panics with it").pop();
    let run = || {
        while let Some((module, card)) = take() {
            let why = match image_in(Some(&folder), module, card) {
                Ok(image) if is_machine_code(&image) => continue,
                Ok(image) => {
                    format!("{module} for {card:?}: no machine code, {} bytes", image.len())
                }
                Err(error) => error.to_string(),
            };
            broken.lock().expect("no thread panics with it").push(why);
        }
    };
    // Two threads: more take memory and gain little where tests run beside each other.
    std::thread::scope(|scope| {
        scope.spawn(run);
        run();
    });
    let broken = broken.into_inner().expect("no thread panics with it");
    assert!(broken.is_empty(), "{} of {count}:\n{}", broken.len(), broken.join("\n"));
}

#[test]
fn an_error_names_the_module() {
    let error = image_in(None, "no_such_module", (8, 6)).expect_err("there is none").to_string();
    // Without NVRTC the library is what is named.
    let expected = if find(Library::Nvrtc).is_ok() { "no_such_module" } else { "NVRTC" };
    assert!(error.contains(expected), "{error}");
}
