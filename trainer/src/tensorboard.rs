//! TensorBoard logs: event files with scalars and text, readable by TensorBoard as they grow.
//!
//! An event file is a sequence of records (length, masked CRC-32C of the length, data, masked
//! CRC-32C of the data), each holding one protobuf `Event`. The few fields needed are encoded by
//! hand; field numbers are those of tensorflow's `event.proto` and `summary.proto`.
//! Rank 0 writes alone. Each call is flushed, so a killed run keeps every finished step.

use crate::options::Options;
use anyhow::{Context, Result};
use formats::model_spec::civil_time;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What is logged after each optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepLog {
    /// Loss of this step; `None` where it was left out.
    pub loss: Option<f64>,
    /// Its moving average over an epoch.
    pub average_loss: f64,
    /// Learning rate of the text encoder, if that is trained.
    pub text_encoder_lr: Option<f64>,
    /// Learning rate of the U-Net, if that is trained.
    pub unet_lr: Option<f64>,
    /// Norm of all gradients before clipping.
    pub grad_norm: Option<f64>,
    /// Wall time of the step in seconds.
    pub seconds: f64,
}

/// The log of one run.
#[derive(Debug)]
pub struct RunLog {
    events: EventWriter,
}

impl RunLog {
    /// Opens the log that the options ask for; `None` without `logging_dir`. `started_at` is in
    /// seconds since 1970.
    pub fn open(options: &Options, started_at: f64) -> Result<Option<Self>> {
        let Some(dir) = log_dir(options, started_at) else { return Ok(None) };
        let mut log = RunLog { events: EventWriter::create(&dir)? };
        if options.log_config {
            // TensorBoard shows text as Markdown; an indented block stays as it is.
            let config: String =
                options.to_toml().lines().map(|line| format!("    {line}\n")).collect();
            log.events.text("config", 0, &config)?;
        }
        Ok(Some(log))
    }

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.events.path
    }

    /// Logs optimizer step `step` (from 1) under sd-scripts' tags and a few of our own.
    pub fn step(&mut self, step: usize, values: &StepLog) -> Result<()> {
        let all = [
            ("loss/current", values.loss),
            ("loss/average", Some(values.average_loss)),
            ("lr/textencoder", values.text_encoder_lr),
            ("lr/unet", values.unet_lr),
            ("grad_norm", values.grad_norm),
            ("time/step_seconds", Some(values.seconds)),
        ];
        let present: Vec<(&str, f64)> =
            all.into_iter().filter_map(|(tag, value)| Some((tag, value?))).collect();
        self.events.scalars(step, &present)
    }

    /// Logs the end of epoch `epoch` (from 1); the reference counts epochs on this curve.
    pub fn epoch(&mut self, epoch: usize, average_loss: f64) -> Result<()> {
        self.events.scalars(epoch, &[("loss/epoch_average", average_loss)])
    }
}

/// `logging_dir/<prefix><date and time>/<tracker>`, the time in UTC.
fn log_dir(options: &Options, started_at: f64) -> Option<PathBuf> {
    let [year, month, day, hour, minute, second] = civil_time(started_at as i64);
    let prefix = options.log_prefix.as_deref().unwrap_or_default();
    let run = format!("{prefix}{year:04}{month:02}{day:02}{hour:02}{minute:02}{second:02}");
    let tracker = options.log_tracker_name.as_deref().unwrap_or("network_train");
    Some(options.logging_dir.as_ref()?.join(run).join(tracker))
}

/// Writes one event file.
#[derive(Debug)]
pub struct EventWriter {
    file: BufWriter<File>,
    path: PathBuf,
}

impl EventWriter {
    /// Makes the folder and a new event file in it, named as TensorBoard expects.
    pub fn create(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot make the log folder: `{}`", dir.display()))?;
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = if host.trim().is_empty() { "localhost" } else { host.trim() };
        let stem =
            format!("events.out.tfevents.{:010}.{host}.{}", now() as u64, std::process::id());
        // Two logs of one process within a second would otherwise share a file.
        for number in 0u32.. {
            let path = dir.join(format!("{stem}.{number}"));
            match File::options().write(true).create_new(true).open(&path) {
                Err(fault) if fault.kind() == std::io::ErrorKind::AlreadyExists => {}
                opened => {
                    let file = opened.with_context(|| {
                        format!("cannot make the log file: `{}`", path.display())
                    })?;
                    let mut writer = EventWriter { file: BufWriter::new(file), path };
                    writer.write_event(0, Message::new().bytes(3, b"brain.Event:2"))?;
                    return Ok(writer);
                }
            }
        }
        anyhow::bail!("no free name for a log file: `{}`", dir.display())
    }

    /// Logs numbers under their tags for one step.
    pub fn scalars(&mut self, step: usize, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Message::new();
        for (tag, value) in values {
            let entry = Message::new().bytes(1, tag.as_bytes()).float(2, *value as f32);
            summary = summary.bytes(1, &entry.0);
        }
        self.write_event(step, Message::new().bytes(5, &summary.0))
    }

    /// Logs a text, which TensorBoard shows as Markdown.
    pub fn text(&mut self, tag: &str, step: usize, text: &str) -> Result<()> {
        const DT_STRING: u64 = 7;
        let plugin = Message::new().bytes(1, b"text");
        let shape = Message::new().bytes(2, &Message::new().varint(1, 1).0);
        let tensor =
            Message::new().varint(1, DT_STRING).bytes(2, &shape.0).bytes(8, text.as_bytes());
        let value = Message::new()
            .bytes(1, format!("{tag}/text_summary").as_bytes())
            .bytes(8, &tensor.0)
            .bytes(9, &Message::new().bytes(1, &plugin.0).0);
        self.write_event(step, Message::new().bytes(5, &Message::new().bytes(1, &value.0).0))
    }

    /// Writes an event with the time of now and flushes it.
    fn write_event(&mut self, step: usize, what: Message) -> Result<()> {
        let mut event = Message::new().double(1, now());
        if step > 0 {
            event = event.varint(2, step as u64);
        }
        event.0.extend_from_slice(&what.0);
        let record = frame(&event.0);
        self.file
            .write_all(&record)
            .and_then(|()| self.file.flush())
            .with_context(|| format!("cannot write the log file: `{}`", self.path.display()))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// Fields of a protobuf message, in the order of the calls.
struct Message(Vec<u8>);

impl Message {
    fn new() -> Self {
        Message(Vec::new())
    }

    fn push_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, field: u64, wire_type: u64) {
        self.push_varint(field << 3 | wire_type);
    }

    fn varint(mut self, field: u64, value: u64) -> Self {
        self.key(field, 0);
        self.push_varint(value);
        self
    }

    fn double(mut self, field: u64, value: f64) -> Self {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn float(mut self, field: u64, value: f32) -> Self {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.key(field, 2);
        self.push_varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }
}

/// A record: length, masked CRC of the length, data, masked CRC of the data.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(data);
    record.extend_from_slice(&masked_crc(data).to_le_bytes());
    record
}

/// CRC-32C, rotated and offset so that a CRC over data that holds CRCs stays a good check.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78). The `crc32fast` crate has the other one.
fn crc32c(data: &[u8]) -> u32 {
    !data
        .iter()
        .fold(!0u32, |crc, byte| CRC_TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ crc >> 8)
}

/// The CRC of every single byte.
const CRC_TABLE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(case: &str) -> Self {
            let name = format!("lorarun-events-{}-{case}", std::process::id());
            Folder(std::env::temp_dir().join(name))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// Takes the records of a file apart, checking both checksums.
    fn records(path: &Path) -> Vec<Vec<u8>> {
        let bytes = std::fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(12);
            let length = u64::from_le_bytes(head[..8].try_into().unwrap()) as usize;
            assert_eq!(masked_crc(&head[..8]).to_le_bytes(), head[8..]);
            let (data, tail) = tail.split_at(length);
            assert_eq!(masked_crc(data).to_le_bytes(), tail[..4]);
            found.push(data.to_vec());
            rest = &tail[4..];
        }
        found
    }

    fn holds(record: &[u8], part: &[u8]) -> bool {
        record.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn checksum_is_castagnolis() {
        // The check value of the CRC catalogue, and vectors of RFC 3720.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn records_read_back() {
        let folder = Folder::new("back");
        let options = Options {
            logging_dir: Some(folder.0.clone()),
            log_prefix: Some("p-".into()),
            log_config: true,
            seed: Some(7),
            ..Options::default()
        };
        let mut log = RunLog::open(&options, 1795364356.4).unwrap().unwrap();
        let values = StepLog {
            loss: Some(0.25),
            average_loss: 0.5,
            text_encoder_lr: None,
            unet_lr: Some(1e-4),
            grad_norm: Some(2.0),
            seconds: 0.1,
        };
        log.step(300, &values).unwrap();
        log.epoch(1, 0.5).unwrap();
        let dir = folder.0.join("p-20261122161916/network_train");
        assert_eq!(log.path().parent().unwrap(), dir);
        let records = records(log.path());
        assert_eq!(records.len(), 4);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        assert!(holds(&records[1], b"config/text_summary") && holds(&records[1], b"seed = 7"));
        // Field 2 is the step: 300 as a varint. Then tag and little-endian float of a scalar.
        assert_eq!(records[2][9..12], [0x10, 0xac, 0x02]);
        assert!(holds(&records[2], b"loss/current\x15\x00\x00\x80\x3e"));
        assert!(holds(&records[2], b"lr/unet") && !holds(&records[2], b"lr/textencoder"));
        assert!(holds(&records[3], b"loss/epoch_average"));
    }

    #[test]
    fn no_folder_no_log() {
        assert!(RunLog::open(&Options::default(), 0.0).unwrap().is_none());
    }

    #[test]
    fn writers_never_share_a_file() {
        let folder = Folder::new("share");
        let first = EventWriter::create(&folder.0).unwrap();
        let second = EventWriter::create(&folder.0).unwrap();
        assert_ne!(first.path, second.path);
        let blocked = folder.0.join("file");
        std::fs::write(&blocked, "").unwrap();
        let message = EventWriter::create(&blocked).unwrap_err().to_string();
        assert!(message.starts_with("cannot make the log folder"), "{message}");
    }
}
