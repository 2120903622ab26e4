//! The directory of a zip file in memory: where each stored entry's bytes lie.
//!
//! Only what torch writes: stored entries, zip64 included. Every number is checked against the
//! file's length; errors are the reason alone, the caller adds the file.

use std::collections::HashMap;
use std::ops::Range;

const END: [u8; 4] = *b"PK\x05\x06";
const END_64: [u8; 4] = *b"PK\x06\x06";
const LOCATOR_64: [u8; 4] = *b"PK\x06\x07";
const CENTRAL: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";
const END_SIZE: usize = 22;
const MAX_COMMENT: usize = 0xffff;

/// Byte range of every entry's content, by name.
pub(super) type Entries = HashMap<String, Range<usize>>;

/// Reads the directory of a whole zip file.
pub(super) fn read_directory(file: &[u8]) -> Result<Entries, String> {
    let directory = find_directory(file)?;
    let mut cursor = directory.start;
    let mut entries = Entries::new();
    while cursor < directory.end {
        let record = Record::read(file, cursor, directory.end)?;
        cursor = record.next;
        if record.name.ends_with('/') {
            continue;
        }
        let range = content_range(file, &record)?;
        if entries.insert(record.name.clone(), range).is_some() {
            return Err(format!("its zip directory lists an entry twice: `{}`", record.name));
        }
    }
    Ok(entries)
}

fn truncated(what: &str) -> String {
    format!("its zip structure ends inside {what}\nhint: the file is truncated, copy it again")
}

fn bytes_at<'a>(file: &'a [u8], at: usize, len: usize, what: &str) -> Result<&'a [u8], String> {
    at.checked_add(len).and_then(|end| file.get(at..end)).ok_or_else(|| truncated(what))
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u32_at(bytes, at) | (u32_at(bytes, at + 4) << 32)
}

fn to_usize(value: u64, what: &str) -> Result<usize, String> {
    usize::try_from(value).map_err(|_| format!("its zip {what} is impossible: {value}"))
}

/// The byte range of the central directory.
fn find_directory(file: &[u8]) -> Result<Range<usize>, String> {
    let lowest = file.len().saturating_sub(END_SIZE + MAX_COMMENT);
    let end_at = (lowest..=file.len().saturating_sub(END_SIZE))
        .rev()
        .find(|at| file.get(*at..*at + 4) == Some(&END))
        .ok_or("its zip directory is missing\nhint: the file is truncated, copy it again")?;
    let end = bytes_at(file, end_at, END_SIZE, "the end record")?;
    let mut size = u32_at(end, 12);
    let mut start = u32_at(end, 16);
    let locator_at = end_at.checked_sub(20);
    let locator = locator_at.map(|at| &file[at..end_at]).filter(|bytes| bytes[..4] == LOCATOR_64);
    if let Some(locator) = locator {
        let at = to_usize(u64_at(locator, 8), "zip64 offset")?;
        let end_64 = bytes_at(file, at, 56, "the zip64 end record")?;
        if end_64[..4] != END_64 {
            return Err("its zip64 end record is damaged".to_owned());
        }
        size = u64_at(end_64, 40);
        start = u64_at(end_64, 48);
    }
    let start = to_usize(start, "directory offset")?;
    let size = to_usize(size, "directory size")?;
    bytes_at(file, start, size, "the directory")?;
    Ok(start..start + size)
}

/// One record of the central directory.
struct Record {
    name: String,
    method: usize,
    flags: usize,
    stored_size: u64,
    size: u64,
    local_offset: u64,
    /// Where the next record starts.
    next: usize,
}

impl Record {
    fn read(file: &[u8], at: usize, end: usize) -> Result<Self, String> {
        let fixed = bytes_at(&file[..end], at, 46, "a directory record")?;
        if fixed[..4] != CENTRAL {
            return Err(format!("its zip directory is damaged at byte: {at}"));
        }
        let (name_len, extra_len, comment_len) =
            (u16_at(fixed, 28), u16_at(fixed, 30), u16_at(fixed, 32));
        let tail_len = name_len + extra_len + comment_len;
        let tail = bytes_at(&file[..end], at + 46, tail_len, "a directory record")?;
        let name = std::str::from_utf8(&tail[..name_len])
            .map_err(|_| format!("its zip directory has a name that is not UTF-8 at: {at}"))?;
        let mut record = Self {
            name: name.to_owned(),
            method: u16_at(fixed, 10),
            flags: u16_at(fixed, 8),
            stored_size: u32_at(fixed, 20),
            size: u32_at(fixed, 24),
            local_offset: u32_at(fixed, 42),
            next: at + 46 + tail_len,
        };
        record.apply_zip64(&tail[name_len..name_len + extra_len])?;
        Ok(record)
    }

    /// Replaces the saturated 32-bit fields by those of the zip64 extra field, in its order.
    fn apply_zip64(&mut self, mut extra: &[u8]) -> Result<(), String> {
        const SATURATED: u64 = 0xffff_ffff;
        let mut wide: &[u8] = &[];
        while extra.len() >= 4 {
            let (id, len) = (u16_at(extra, 0), u16_at(extra, 2));
            let Some(body) = extra.get(4..4 + len) else { break };
            if id == 1 {
                wide = body;
            }
            extra = &extra[4 + len..];
        }
        let mut values = wide.chunks_exact(8).map(|chunk| u64_at(chunk, 0));
        for field in [&mut self.size, &mut self.stored_size, &mut self.local_offset] {
            if *field == SATURATED {
                *field = values.next().ok_or_else(|| {
                    format!("its zip64 sizes are missing for entry: `{}`", self.name)
                })?;
            }
        }
        Ok(())
    }
}

fn content_range(file: &[u8], record: &Record) -> Result<Range<usize>, String> {
    let name = &record.name;
    if record.flags & 1 != 0 {
        return Err(format!("an entry of its zip is encrypted: `{name}`"));
    }
    if record.method != 0 || record.stored_size != record.size {
        return Err(format!(
            "an entry of its zip is compressed, torch stores them plain: `{name}`\nhint: load and \
             save it once with PyTorch"
        ));
    }
    let at = to_usize(record.local_offset, "entry offset")?;
    let local = bytes_at(file, at, 30, "an entry")?;
    if local[..4] != LOCAL {
        return Err(format!("its zip directory points to no entry: `{name}`"));
    }
    let start = at + 30 + u16_at(local, 26) + u16_at(local, 28);
    let size = to_usize(record.size, "entry size")?;
    bytes_at(file, start, size, &format!("entry `{name}`"))?;
    Ok(start..start + size)
}
