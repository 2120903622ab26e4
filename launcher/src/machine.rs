//! The processor and the memory of this machine, for `doctor`.

use serde_json::{Value, json};

/// What the processor offers.
pub struct Machine {
    name: String,
    cores: usize,
    /// Free and all bytes of memory, if the system tells.
    memory: Option<(usize, usize)>,
    avx2: bool,
    avx512: bool,
    avx512_bf16: bool,
}

impl Machine {
    /// Asks the processor and the system.
    pub fn examine() -> Self {
        #[cfg(target_arch = "x86_64")]
        let (avx2, avx512, avx512_bf16) = (
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            is_x86_feature_detected!("avx512f"),
            is_x86_feature_detected!("avx512bf16"),
        );
        #[cfg(not(target_arch = "x86_64"))]
        let (avx2, avx512, avx512_bf16) = (false, false, false);
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            name: field(&read("/proc/cpuinfo"), "model name").unwrap_or("unknown").to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory: memory(&read("/proc/meminfo")),
            avx2,
            avx512,
            avx512_bf16,
        }
    }

    /// For people.
    pub fn as_lines(&self) -> [String; 2] {
        let memory = self.memory.map_or_else(String::new, |(free, total)| {
            format!(", {} of {} free", show_bytes(free), show_bytes(total))
        });
        let noun = if self.cores == 1 { "core" } else { "cores" };
        let word = |has| if has { "yes" } else { "no" };
        let (avx2, avx512, bf16) = (word(self.avx2), word(self.avx512), word(self.avx512_bf16));
        [
            format!("{}, {} {noun}{memory}", self.name, self.cores),
            format!("AVX2 {avx2}, AVX-512 {avx512}, AVX-512 BF16 {bf16}"),
        ]
    }

    /// For programs; sizes in bytes.
    pub fn as_json(&self) -> Value {
        json!({
            "name": self.name,
            "cores": self.cores,
            "memory_free": self.memory.map(|(free, _)| free),
            "memory_total": self.memory.map(|(_, total)| total),
            "avx2": self.avx2,
            "avx512": self.avx512,
            "avx512_bf16": self.avx512_bf16,
        })
    }

    #[cfg(test)]
    pub fn for_tests() -> Self {
        let memory = Some((12 << 30, 16 << 30));
        let name = "Some CPU".to_owned();
        Self { name, cores: 8, memory, avx2: true, avx512: true, avx512_bf16: false }
    }
}

/// The value behind `key:` in the first line that has it.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let value = |line: &'a str| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    };
    text.lines().find_map(value)
}

/// Available and all bytes, from what the kernel writes in kB.
fn memory(text: &str) -> Option<(usize, usize)> {
    let bytes = |key| {
        let number = field(text, key)?.strip_suffix("kB")?.trim();
        number.parse::<usize>().ok()?.checked_mul(1024)
    };
    Some((bytes("MemAvailable")?, bytes("MemTotal")?))
}

/// Bytes in GiB with one digit.
pub fn show_bytes(bytes: usize) -> String {
    format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_the_kernel_says() {
        let text = "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    300 kB\n";
        assert_eq!(memory(text), Some((300 * 1024, 1000 * 1024)));
        assert_eq!(memory("MemTotal: many\n"), None);
    }

    #[test]
    fn this_machine_has_a_core() {
        assert!(Machine::examine().cores > 0);
    }
}
