//! Runs for Weights & Biases, in the format of its offline mode: `wandb sync FOLDER` uploads them.
//!
//! This program does not talk to the network. A run is a folder `offline-run-<time>-<id>` with one
//! file `run-<id>.wandb`: a header of seven bytes, then records in blocks of 32 KiB as LevelDB's log
//! has them (checksum, length, kind; a record that does not fit is cut), but with zlib's CRC-32. Each
//! holds one protobuf `Record` of wandb's `wandb_internal.proto`: header, run, hidden metrics, then a
//! history item per call with the summary so far, and an exit. Field numbers are those of wandb
//! 0.17 to 0.31; a test decodes a file that wandb's own classes have read (see
//! `tests/data/reference_scripts/read_wandb.py`).

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use formats::atomic::write_atomic;
use formats::model_spec::civil_time;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::protobuf::{Message, now};
use crate::options::{OPTIONS, Options, PRIVATE};
use crate::samples::Sample;

/// Bytes of a block.
const BLOCK: usize = 32_768;
/// Checksum, length and kind of a record's piece.
const PIECE_HEADER: usize = 7;

/// What `log_tracker_config` may say about a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunNames {
    /// Name that is shown.
    pub name: Option<String>,
    /// User or team.
    pub entity: Option<String>,
    /// Runs that belong together.
    pub group: Option<String>,
    /// Kind of run.
    pub job_type: Option<String>,
    /// Free text.
    pub notes: Option<String>,
    /// Tags.
    pub tags: Vec<String>,
}

impl RunNames {
    /// Reads `wandb_run_name` and the `[wandb]` table of `log_tracker_config`, which wins, as in the
    /// reference.
    pub fn from_options(options: &Options) -> Result<Self> {
        let mut names = Self { name: options.wandb_run_name.clone(), ..Self::default() };
        let Some(path) = &options.log_tracker_config else { return Ok(names) };
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read `log_tracker_config`: {}", path.display()))?;
        let table: toml::Table = text
            .parse()
            .with_context(|| format!("`log_tracker_config` is no TOML: {}", path.display()))?;
        let Some(settings) = table.get("wandb").and_then(toml::Value::as_table) else {
            return Ok(names);
        };
        for (key, value) in settings {
            let fault =
                || format!("`{key}` under `[wandb]` has the wrong type in: {}", path.display());
            let text = || value.as_str().map(str::to_owned).with_context(fault).map(Some);
            match key.as_str() {
                "name" => names.name = text()?,
                "entity" => names.entity = text()?,
                "group" => names.group = text()?,
                "job_type" => names.job_type = text()?,
                "notes" => names.notes = text()?,
                "tags" => {
                    let tags = value.as_array().with_context(fault)?;
                    let text = |tag: &toml::Value| tag.as_str().map(str::to_owned);
                    names.tags =
                        tags.iter().map(text).collect::<Option<_>>().with_context(fault)?;
                }
                _ => bail!(
                    "`{key}` under `[wandb]` is not known here: {}\n\
                     hint: `name`, `entity`, `group`, `job_type`, `notes` and `tags` are; the rest can \
                     be given to `wandb sync`",
                    path.display()
                ),
            }
        }
        Ok(names)
    }
}

/// Writes one offline run.
#[derive(Debug)]
pub struct WandbRun {
    file: File,
    path: PathBuf,
    written: usize,
    id: String,
    records: u64,
    /// Items of the history.
    items: u64,
    started: Instant,
}

impl WandbRun {
    /// Makes the run's folder in `dir/wandb` and writes its beginning.
    pub fn create(dir: &Path, project: &str, names: &RunNames, options: &Options) -> Result<Self> {
        let started_at = now();
        let [year, month, day, hour, minute, second] = civil_time(started_at as i64);
        let id = new_id(started_at);
        let folder = dir.join("wandb").join(format!(
            "offline-run-{year:04}{month:02}{day:02}_{hour:02}{minute:02}{second:02}-{id}"
        ));
        let path = folder.join(format!("run-{id}.wandb"));
        let context = || format!("cannot make the log file: {}", path.display());
        std::fs::create_dir_all(folder.join("files")).with_context(context)?;
        let file = File::options().append(true).create_new(true).open(&path);
        let mut run = Self {
            file: file.with_context(context)?,
            path,
            written: 0,
            id,
            records: 0,
            items: 0,
            started: Instant::now(),
        };
        // ":W&B", the magic number, version 0.
        run.put(&[b':', b'W', b'&', b'B', 0xe1, 0xbe, 0])?;
        let producer = format!("lorarun {}", env!("CARGO_PKG_VERSION"));
        let version = Message::new().text(1, &producer);
        run.record(21, &Message::new().message(1, &version))?;
        let record = run.run_record(project, names, options, started_at);
        run.record(17, &record)?;
        for metric in ["epoch", "val_step", "global_step"] {
            let choices = Message::new().varint(2, 1).varint(3, 1);
            run.record(12, &Message::new().text(1, metric).message(6, &choices))?;
        }
        Ok(run)
    }

    fn run_record(
        &self,
        project: &str,
        names: &RunNames,
        options: &Options,
        started_at: f64,
    ) -> Message {
        let mut config = Message::new();
        for spec in OPTIONS.iter().filter(|spec| !PRIVATE.contains(&spec.name)) {
            let value = (spec.read)(options).and_then(|value| serde_json::to_value(value).ok());
            if let Some(value) = value {
                config = config.message(1, &item(1, spec.name, &value));
            }
        }
        let mut record = Message::new().text(1, &self.id);
        for (field, text) in [
            (2, names.entity.as_deref()),
            (3, Some(project)),
            (6, names.group.as_deref()),
            (7, names.job_type.as_deref()),
            (8, names.name.as_deref()),
            (9, names.notes.as_deref()),
        ] {
            if let Some(text) = text {
                record = record.text(field, text);
            }
        }
        for tag in &names.tags {
            record = record.text(10, tag);
        }
        let nanos = started_at.fract() * 1e9;
        let time = Message::new().varint(1, started_at as u64).varint(2, nanos as u64);
        record.message(4, &config).message(17, &time)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Logs values together with the step and the epoch (both from 1) that they belong to.
    pub fn log(&mut self, values: &[(&str, f64)], step: usize, epoch: usize) -> Result<()> {
        let items = values
            .iter()
            .filter(|(_, value)| value.is_finite())
            .map(|(tag, value)| ((*tag).to_owned(), json!(value)))
            .collect();
        self.history(items, step, epoch)
    }

    /// Logs a picture under `tag`: its file goes beside the run, the history names it.
    pub fn picture(
        &mut self,
        (tag, sample): (&str, &Sample),
        step: usize,
        epoch: usize,
    ) -> Result<()> {
        let sha256: String =
            Sha256::digest(&sample.png).iter().map(|byte| format!("{byte:02x}")).collect();
        let name = format!("media/images/{tag}_{step}_{}.png", &sha256[..20]);
        let file = self.path.with_file_name("files").join(&name);
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make the log folder: {}", folder.display()))?;
        }
        write_atomic(&file, |out| out.write_all(&sample.png))?;
        const MEDIA: u64 = 2;
        let named = Message::new().text(1, &name).varint(3, MEDIA);
        self.record(6, &Message::new().message(1, &named))?;
        let value = json!({
            "_type": "image-file",
            "sha256": sha256,
            "size": sample.png.len(),
            "path": name,
            "format": "png",
            "width": sample.size[0],
            "height": sample.size[1],
            "caption": sample.prompt,
        });
        self.history(vec![(tag.to_owned(), value)], step, epoch)
    }

    /// One item of the history, and the summary so far.
    fn history(
        &mut self,
        mut items: Vec<(String, Value)>,
        step: usize,
        epoch: usize,
    ) -> Result<()> {
        items.push(("global_step".into(), json!(step)));
        items.push(("epoch".into(), json!(epoch)));
        items.push(("_step".into(), json!(self.items)));
        items.push(("_runtime".into(), json!(self.started.elapsed().as_secs_f64())));
        items.push(("_timestamp".into(), json!(now())));
        let mut summary = Message::new();
        let mut history = Message::new();
        for (key, value) in &items {
            // The key as a path of one part, as wandb writes history.
            summary = summary.message(1, &item(2, key, value));
            history = history.message(1, &item(2, key, value));
        }
        // Zero is not written, as every protobuf library has it.
        let number = Message::new();
        let number = if self.items > 0 { number.varint(1, self.items) } else { number };
        history = history.message(2, &number);
        self.items += 1;
        self.record(3, &summary)?;
        self.record(2, &history)
    }

    /// The run is over.
    pub fn finish(&mut self) -> Result<()> {
        let seconds = self.started.elapsed().as_secs();
        self.record(18, &Message::new().varint(2, seconds))
    }

    /// Writes one record: its number, its content, and the name of the stream.
    fn record(&mut self, field: u64, content: &Message) -> Result<()> {
        self.records += 1;
        let stream = Message::new().text(1, &self.id);
        let record =
            Message::new().varint(1, self.records).message(field, content).message(200, &stream);
        let mut bytes = Vec::with_capacity(record.0.len() + 2 * PIECE_HEADER);
        let mut rest = record.0.as_slice();
        let mut is_first = true;
        loop {
            let room = BLOCK - (self.written + bytes.len()) % BLOCK;
            if room < PIECE_HEADER {
                bytes.resize(bytes.len() + room, 0);
                continue;
            }
            let (piece, after) = rest.split_at(rest.len().min(room - PIECE_HEADER));
            // Whole, first, middle, last.
            let kind: u8 = match (is_first, after.is_empty()) {
                (true, true) => 1,
                (true, false) => 2,
                (false, false) => 3,
                (false, true) => 4,
            };
            let mut crc = crc32fast::Hasher::new();
            crc.update(&[kind]);
            crc.update(piece);
            bytes.extend(crc.finalize().to_le_bytes());
            // A piece is shorter than a block.
            bytes.extend((piece.len() as u16).to_le_bytes());
            bytes.push(kind);
            bytes.extend(piece);
            (rest, is_first) = (after, false);
            if rest.is_empty() {
                return self.put(&bytes);
            }
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len();
        self.file
            .write_all(bytes)
            .with_context(|| format!("cannot write the log file: {}", self.path.display()))
    }
}

/// A key and its value as JSON; `field` 1 holds the key, 2 the key as a path of one part.
fn item(field: u64, key: &str, value: &Value) -> Message {
    Message::new().text(field, key).text(16, &value.to_string())
}

/// Eight letters and digits that no other run has.
fn new_id(started_at: f64) -> String {
    let mut hasher = Sha256::new();
    hasher.update(started_at.to_bits().to_le_bytes());
    hasher.update(std::process::id().to_le_bytes());
    let alphabet = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let letter = |byte: &u8| char::from(alphabet[usize::from(*byte) % alphabet.len()]);
    hasher.finalize().iter().take(8).map(letter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes the file apart into its records, checking every checksum.
    fn records(path: &Path) -> Vec<Vec<u8>> {
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(bytes[..7], [b':', b'W', b'&', b'B', 0xe1, 0xbe, 0]);
        let (mut at, mut found, mut open) = (7, Vec::new(), Vec::new());
        while at < bytes.len() {
            let room = BLOCK - at % BLOCK;
            if room < PIECE_HEADER {
                assert!(bytes[at..at + room].iter().all(|byte| *byte == 0));
                at += room;
                continue;
            }
            let length = usize::from(u16::from_le_bytes([bytes[at + 4], bytes[at + 5]]));
            let piece = &bytes[at + 6..at + PIECE_HEADER + length];
            assert_eq!(crc32fast::hash(piece).to_le_bytes(), bytes[at..at + 4]);
            open.extend_from_slice(&piece[1..]);
            if matches!(piece[0], 1 | 4) {
                found.push(std::mem::take(&mut open));
            }
            at += PIECE_HEADER + length;
        }
        assert!(open.is_empty());
        found
    }

    fn holds(record: &[u8], part: &str) -> bool {
        record.windows(part.len()).any(|window| window == part.as_bytes())
    }

    #[test]
    fn records_are_cut_into_blocks_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let names = RunNames { notes: Some("n".repeat(70_000)), ..RunNames::default() };
        let options = Options { wandb_api_key: Some("SECRET".into()), ..Options::default() };
        let mut run = WandbRun::create(folder.path(), "network_train", &names, &options).unwrap();
        for step in 1..=400 {
            run.log(&[("loss/current", 0.25), ("lr/unet", f64::NAN)], step, 1).unwrap();
        }
        run.finish().unwrap();
        let records = records(run.path());
        assert_eq!(records.len(), 2 + 3 + 2 * 400 + 1);
        assert!(holds(&records[1], "network_train") && holds(&records[1], &"n".repeat(70_000)));
        assert!(records.iter().all(|record| !holds(record, "SECRET")));
        let last = &records[2 + 3 + 2 * 400 - 1];
        assert!(holds(last, "loss/current") && holds(last, "0.25") && !holds(last, "lr/unet"));
        // Record: field 1 is its number. Nine is 0x09.
        assert_eq!(records[8][..2], [0x08, 0x09]);
        let name = run.path().parent().unwrap().file_name().unwrap().to_string_lossy().into_owned();
        assert!(name.starts_with("offline-run-20") && name.ends_with(&run.id), "{name}");
    }

    #[test]
    fn names_come_from_the_tracker_config() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tracker.toml");
        std::fs::write(&path, "[wandb]\nname = 'better'\ntags = ['a', 'b']\n[tensorboard]\n")
            .unwrap();
        let options = |path: &Path| Options {
            wandb_run_name: Some("plain".into()),
            log_tracker_config: Some(path.to_owned()),
            ..Options::default()
        };
        let names = RunNames::from_options(&options(&path)).unwrap();
        assert_eq!((names.name.as_deref(), names.tags.len()), (Some("better"), 2));
        for (text, expected) in [
            ("[wandb]\nmagic = 1", "`magic` under `[wandb]` is not known"),
            ("[wandb]\ntags = 'a'", "`tags` under `[wandb]` has the wrong type"),
            ("[wandb", "is no TOML"),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = RunNames::from_options(&options(&path)).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        let message = RunNames::from_options(&options(&folder.path().join("none"))).unwrap_err();
        assert!(message.to_string().starts_with("cannot read `log_tracker_config`"), "{message}");
    }
}
