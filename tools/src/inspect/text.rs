//! Reports as text for a terminal: facts in aligned rows, long lists cut.

use super::adapter::{AdapterReport, Count, DtypeReport, PartReport};
use super::loaders::{Loads, Verdict};
use super::model::ModelReport;

/// Columns of a row's name.
const NAME: usize = 13;
/// Keys of a list that are shown.
const SHOWN: usize = 3;

/// The text of an adapter's report; `metadata` adds every entry of the header.
pub(crate) fn adapter(report: &AdapterReport, metadata: bool) -> String {
    let mut rows = Rows::new(&report.path, report.bytes);
    let family = family_title(report.family);
    let naming = match report.naming {
        "kohya" => "sd-scripts' names",
        "peft" => "PEFT's names",
        _ => "diffusers' old names",
    };
    rows.row("network", &format!("{} for {family}, {naming}", report.network));
    for part in &report.parts {
        rows.row(part_title(part.part), &part_text(part));
        if let (Some(mean), Some(max), Some(module)) =
            (part.norm_mean, part.norm_max, &part.norm_max_module)
        {
            rows.row("", &format!("norm {mean:.4} on average, at most {max:.4}: {module}"));
        }
    }
    rows.row("numbers", &dtypes_text(&report.dtypes));
    rows.list("unknown keys", &report.unknown_keys);
    rows.rows("training", &report.training.rows());
    let hashes = &report.hashes;
    rows.row("hashes", &format!("AutoV2 {}, legacy {}", hashes.auto_v2, hashes.legacy));
    let agrees = match hashes.sshs_model_agrees {
        None => "the header has none",
        Some(true) => "as the header says",
        Some(false) => "NOT what the header says",
    };
    let short: String = hashes.sshs_model.as_deref().unwrap_or("").chars().take(12).collect();
    rows.row("", &format!("sshs_model_hash {short}..., {agrees}"));
    if hashes.sshs_legacy_agrees == Some(false) {
        rows.row("", "sshs_legacy_hash is NOT what the header says");
    }
    for verdict in &report.programs {
        rows.verdict(verdict);
    }
    if metadata {
        rows.metadata(&report.metadata);
    }
    rows.text
}

/// The text of a model's report.
pub(crate) fn model(report: &ModelReport, metadata: bool) -> String {
    let mut rows = Rows::new(&report.path, report.bytes);
    match report.family {
        Some(_) => {
            let prediction = report.prediction.as_deref();
            let prediction =
                prediction.map(|what| format!(", predicts {what}")).unwrap_or_default();
            rows.row(
                "model",
                &format!("{}, {}{prediction}", family_title(report.family), report.kind),
            );
        }
        None => rows.row("tensors", &format!("{} of no known model", report.other_tensors)),
    }
    for component in &report.components {
        let millions = component.parameters as f64 / 1e6;
        rows.row(
            component_title(component.component),
            &format!("{millions:.1} M parameters in {} tensors", component.tensors),
        );
    }
    if report.ema {
        rows.row("EMA", "an average of the weights is there too; it can be left out to save space");
    }
    if report.family.is_some() && report.other_tensors > 0 {
        rows.row("other", &format!("{} tensors of no component", report.other_tensors));
    }
    rows.row("numbers", &dtypes_text(&report.dtypes));
    rows.rows("training", &report.training.rows());
    for (index, note) in report.notes.iter().enumerate() {
        rows.row(if index == 0 { "notes" } else { "" }, note);
    }
    if !report.loaded_by.is_empty() {
        rows.row("loads in", &report.loaded_by.join(", "));
    }
    if metadata {
        rows.metadata(&report.metadata);
    }
    rows.text
}

struct Rows {
    text: String,
}

impl Rows {
    fn new(path: &str, bytes: u64) -> Self {
        Self { text: format!("{path} ({})\n", size_text(bytes)) }
    }

    /// A row; further lines of `value` stand under its first.
    fn row(&mut self, name: &str, value: &str) {
        for (index, line) in value.lines().enumerate() {
            let name = if index == 0 { name } else { "" };
            self.text += &format!("  {name:NAME$}{line}\n");
        }
    }

    fn rows(&mut self, name: &str, values: &[(String, String)]) {
        for (index, (what, value)) in values.iter().enumerate() {
            self.row(if index == 0 { name } else { "" }, &format!("{what}: {value}"));
        }
    }

    fn list(&mut self, name: &str, keys: &[String]) {
        if !keys.is_empty() {
            self.row(name, &some_of(keys));
        }
    }

    fn verdict(&mut self, verdict: &Verdict) {
        let word = match verdict.loads {
            Loads::Yes => "loads",
            Loads::Partly => "loads in part",
            Loads::No => "does not load",
        };
        self.row(verdict.program, word);
        for reason in &verdict.reasons {
            self.row("", &format!("- {reason}"));
        }
        if !verdict.dropped.is_empty() && verdict.loads == Loads::Partly {
            self.row("", &format!("  drops {}", some_of(&verdict.dropped)));
        }
        if !verdict.misread.is_empty() {
            self.row("", &format!("  misreads {}", some_of(&verdict.misread)));
        }
    }

    fn metadata(&mut self, metadata: &std::collections::BTreeMap<String, String>) {
        for (index, (key, value)) in metadata.iter().enumerate() {
            self.row(if index == 0 { "metadata" } else { "" }, &format!("{key} = {value}"));
        }
    }
}

/// `128: a, b, c, ...`
fn some_of(keys: &[String]) -> String {
    let more = if keys.len() > SHOWN { ", ..." } else { "" };
    let shown: Vec<&str> = keys.iter().take(SHOWN).map(String::as_str).collect();
    format!("{}: {}{more}", keys.len(), shown.join(", "))
}

fn part_text(part: &PartReport) -> String {
    let mut text = format!("{} modules", part.modules);
    if !part.ranks.is_empty() {
        text += &format!(", rank {}, alpha {}", counts(&part.ranks), counts(&part.alphas));
    }
    if part.dora > 0 {
        text += &format!(", {} with DoRA", part.dora);
    }
    text
}

/// `4`, or `2 to 32 (2: 10, 4: 5, ...)`.
fn counts<T: std::fmt::Display>(counts: &[Count<T>]) -> String {
    match counts {
        [] => String::new(),
        [one] => one.value.to_string(),
        [first, .., last] => {
            let more = if counts.len() > 6 { ", ..." } else { "" };
            let shown =
                counts.iter().take(6).map(|count| format!("{}: {}", count.value, count.modules));
            let shown: Vec<String> = shown.collect();
            format!("{} to {} ({}{more})", first.value, last.value, shown.join(", "))
        }
    }
}

fn dtypes_text(dtypes: &[DtypeReport]) -> String {
    let one = |report: &DtypeReport| {
        let DtypeReport { dtype, tensors, values } = report;
        format!("{dtype} in {tensors} tensors, {} values", thousands(*values))
    };
    dtypes.iter().map(one).collect::<Vec<String>>().join("; ")
}

/// `1,234,567`
fn thousands(value: usize) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn size_text(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

fn family_title(family: Option<&str>) -> &'static str {
    match family {
        Some("sd1") => formats::Family::Sd1.title(),
        Some("sd2") => formats::Family::Sd2.title(),
        Some("sdxl") => formats::Family::Sdxl.title(),
        _ => "a family that nothing tells",
    }
}

fn part_title(part: &str) -> &'static str {
    match part {
        "unet" => "U-Net",
        "te" => "text encoder",
        "te1" => "text enc. 1",
        "te2" => "text enc. 2",
        _ => "other",
    }
}

fn component_title(component: &str) -> &'static str {
    match component {
        "unet" => "U-Net",
        "text_encoder" => "text encoder",
        "text_encoder_2" => "text enc. 2",
        _ => "VAE",
    }
}
