//! "Did you mean": the known name closest to a mistyped one.

/// The candidate most like `name`, or `None` when nothing is close.
pub fn closest<'a>(name: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let name = name.to_ascii_lowercase().replace('-', "_");
    candidates
        .iter()
        .map(|candidate| (likeness(&name, candidate), *candidate))
        .filter(|(score, _)| *score >= 0.72)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// From 0 to 1; a name that begins or ends with what was typed counts as close.
fn likeness(name: &str, candidate: &str) -> f64 {
    let edits = strsim::normalized_damerau_levenshtein(name, candidate);
    let part = name.len() >= 5 && (candidate.starts_with(name) || candidate.ends_with(name));
    if part { edits.max(0.75) } else { edits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_typing_errors_only() {
        let names = ["learning_rate", "network_dim", "max_train_steps", "seed"];
        assert_eq!(closest("learning_rat", &names), Some("learning_rate"));
        assert_eq!(closest("Learning-Rate", &names), Some("learning_rate"));
        assert_eq!(closest("newtork_dim", &names), Some("network_dim"));
        assert_eq!(closest("train_steps", &names), Some("max_train_steps"));
        assert_eq!(closest("banana", &names), None);
    }
}
