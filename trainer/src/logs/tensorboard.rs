//! TensorBoard logs: event files with scalars and text, readable by TensorBoard as they grow.
//!
//! An event file is a sequence of records (length, masked CRC-32C of the length, data, masked
//! CRC-32C of the data), each holding one protobuf `Event`. The few fields needed are encoded by
//! hand; field numbers are those of tensorflow's `event.proto` and `summary.proto`.
//! Rank 0 writes alone. Each call is flushed, so a killed run keeps every finished step.

use super::protobuf::{Message, now};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

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

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Says that the run goes on at `step`: TensorBoard forgets what older files of the folder hold
    /// from there on.
    pub fn restart(&mut self, step: usize) -> Result<()> {
        const START: u64 = 1;
        self.write_event(step, Message::new().bytes(7, &Message::new().varint(1, START).0))
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

    /// Logs a picture: the bytes of a PNG file of `[width, height]` RGB pixels.
    pub fn image(
        &mut self,
        tag: &str,
        step: usize,
        [width, height]: [usize; 2],
        png: &[u8],
    ) -> Result<()> {
        const RGB: u64 = 3;
        let image = Message::new()
            .varint(1, height as u64)
            .varint(2, width as u64)
            .varint(3, RGB)
            .bytes(4, png);
        let value = Message::new().text(1, tag).message(4, &image);
        self.write_event(step, Message::new().bytes(5, &Message::new().message(1, &value).0))
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
        let mut events = EventWriter::create(&folder.0).unwrap();
        events.text("config", 0, "seed = 7").unwrap();
        events.scalars(300, &[("loss/current", 0.25), ("lr/unet", 1e-4)]).unwrap();
        events.restart(301).unwrap();
        let records = records(events.path());
        assert_eq!(records.len(), 4);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        assert!(holds(&records[1], b"config/text_summary") && holds(&records[1], b"seed = 7"));
        // Field 2 is the step: 300 as a varint. Then tag and little-endian float of a scalar.
        assert_eq!(records[2][9..12], [0x10, 0xac, 0x02]);
        assert!(holds(&records[2], b"loss/current\x15\x00\x00\x80\x3e"));
        assert!(holds(&records[2], b"lr/unet"));
        // Field 7 is the session log, whose field 1 is the status.
        assert_eq!(records[3][9..], [0x10, 0xad, 0x02, 0x3a, 0x02, 0x08, 0x01]);
    }

    #[test]
    fn pictures_are_image_summaries() {
        let folder = Folder::new("image");
        let mut events = EventWriter::create(&folder.0).unwrap();
        events.image("sample_0", 4, [64, 8], b"PNG").unwrap();
        let records = records(events.path());
        // Value: tag, then the image: height, width, three colours, the file.
        let expected = b"\x0a\x08sample_0\x22\x0b\x08\x08\x10\x40\x18\x03\x22\x03PNG";
        assert!(holds(&records[1], expected), "{:?}", records[1]);
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
