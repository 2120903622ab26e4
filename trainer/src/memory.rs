//! What this process and this machine have of main memory, as the system tells.

/// Largest resident set of this process so far, in bytes; `None` where the system does not tell.
pub fn peak_resident() -> Option<usize> {
    told("/proc/self/status", "VmHWM:")
}

/// Resident set of this process, in bytes; `None` where the system does not tell.
pub fn resident() -> Option<usize> {
    told("/proc/self/status", "VmRSS:")
}

/// The number of KiB after `name` in a file of the system, in bytes.
fn told(path: &str, name: &str) -> Option<usize> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Refuses what cannot fit into this machine's free memory, before the system kills the process.
pub fn refuse_beyond_memory(what: &str, bytes: usize, hint: &str) -> anyhow::Result<()> {
    match available() {
        Some(free) if bytes > free => anyhow::bail!(
            "{what} take about {}, this machine has free: {}\nhint: {hint}",
            show_bytes(bytes),
            show_bytes(free)
        ),
        _ => Ok(()),
    }
}

/// Memory that can be had without swapping, in bytes; `None` where the system does not tell.
fn available() -> Option<usize> {
    told("/proc/meminfo", "MemAvailable:")
}

/// Bytes for people: `3.4 GiB`, `12 MiB`.
pub fn show_bytes(bytes: usize) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    if mib >= 1024. { format!("{:.1} GiB", mib / 1024.) } else { format!("{mib:.0} MiB") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_refused_with_numbers() {
        assert!(refuse_beyond_memory("weights", 1 << 20, "").is_ok());
        if available().is_some() {
            let error = refuse_beyond_memory("weights", usize::MAX, "lower it").unwrap_err();
            assert!(error.to_string().contains("hint: lower it"), "{error}");
        }
    }

    #[test]
    fn bytes_are_shown_for_people() {
        assert_eq!(show_bytes(3 << 20), "3 MiB");
        assert_eq!(show_bytes(3 << 30), "3.0 GiB");
        assert!(peak_resident().is_none_or(|bytes| bytes > 1 << 20));
    }
}
