//! Every check that the program has for real cards.

use engine::{Device, selfcheck};

/// More than any check needs.
const MEMORY: usize = 1 << 30;

/// Runs the small checks whose names contain `only` (or `$ONLY`, to look for a fault).
fn run(device: Device, only: &str) {
    let chosen = std::env::var("ONLY").unwrap_or_else(|_| only.to_owned());
    let checks = selfcheck::all();
    let checks = checks.iter().filter(|check| !check.big && check.name.contains(&chosen));
    let failures: Vec<String> = checks.filter_map(|check| check.failure(device)).collect();
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn a_card_computes_what_the_cpu_does() {
    let device = emulator::open(MEMORY).unwrap();
    run(device, "");
    if std::env::var_os("ONLY").is_none() {
        let missing = emulator::launches(device).missing();
        assert!(missing.is_empty(), "kernels without a check: {}", missing.join(", "));
    }
}

#[test]
fn without_a_convolution_library_windows_are_laid_out() {
    run(emulator::open_without_convolution(MEMORY).unwrap(), "conv ");
}
