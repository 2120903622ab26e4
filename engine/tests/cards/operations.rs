//! Every check that the program has for real cards.

use engine::selfcheck;

/// More than any check needs.
const MEMORY: usize = 1 << 30;

#[test]
fn a_card_computes_what_the_cpu_does() {
    let device = emulator::open(MEMORY).unwrap();
    let checks = selfcheck::all();
    let only = std::env::var("ONLY").unwrap_or_default();
    let chosen = checks.iter().filter(|check| !check.big && check.name.contains(&only));
    let failures: Vec<String> = chosen.filter_map(|check| check.failure(device)).collect();
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}
