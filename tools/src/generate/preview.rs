//! Pictures in the terminal: kitty's protocol and sixel, where one of them is known to be there.
//!
//! Told by the environment; a terminal that is not known is asked what it can (device attributes) and
//! has a fifth of a second to answer. Under tmux and screen only its answer counts.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsRawFd;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pictures::{Pixels, resize};

/// Bytes of a piece in kitty's protocol.
const PIECE: usize = 4096;
/// Larger pictures are shrunk for sixel.
const WIDEST: usize = 640;
/// How long a terminal may take to answer, in milliseconds.
const PATIENCE: i32 = 200;
/// Steps of each colour in sixel's palette.
const LEVELS: usize = 6;
/// An ordered dither, 4x4 (Bayer).
const DITHER: [[u16; 4]; 4] = [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]];

/// How a terminal takes pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Kitty,
    Sixel,
}

impl Protocol {
    /// What the terminal on stderr can; `None` if nothing is known, or stderr is no terminal.
    pub fn of_terminal() -> Option<Self> {
        if !std::io::stderr().is_terminal() {
            return None;
        }
        let told = told(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
        told.or_else(|| answer().as_deref().filter(|answer| has_sixel(answer)).map(|_| Self::Sixel))
    }

    /// Shows a picture, `png` its file, on stderr. A terminal that went away is not an error.
    pub fn show(self, picture: &Pixels, png: &[u8]) {
        let text = match self {
            Self::Kitty => kitty(png),
            Self::Sixel => sixel(picture),
        };
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// What the environment tells.
fn told(variable: impl Fn(&str) -> Option<String>) -> Option<Protocol> {
    let is = |name: &str, values: &[&str]| {
        variable(name).is_some_and(|value| values.iter().any(|known| value.contains(known)))
    };
    // These hand on the variables of the terminal that they run in, not its abilities.
    if variable("TMUX").is_some() || is("TERM", &["tmux", "screen"]) {
        return None;
    }
    let is_kitty = variable("KITTY_WINDOW_ID").is_some()
        || is("TERM", &["kitty", "ghostty"])
        || is("TERM_PROGRAM", &["WezTerm", "ghostty"])
        || variable("KONSOLE_VERSION").is_some();
    let is_sixel = is("TERM", &["sixel", "foot", "mlterm", "yaft", "contour"]);
    match (is_kitty, is_sixel) {
        (true, _) => Some(Protocol::Kitty),
        (_, true) => Some(Protocol::Sixel),
        _ => None,
    }
}

/// Whether a list of device attributes (`ESC [ ? 62 ; 4 ; 22 c`) has sixel.
fn has_sixel(answer: &str) -> bool {
    let Some(start) = answer.find("\u{1b}[?") else { return false };
    let list = &answer[start + 3..];
    list.split_once('c').is_some_and(|(list, _)| list.split(';').any(|number| number == "4"))
}

/// What the terminal says to the question for its device attributes.
fn answer() -> Option<String> {
    let mut terminal = OpenOptions::new().read(true).write(true).open("/dev/tty").ok()?;
    let _raw = Raw::set(&terminal)?;
    terminal.write_all(b"\x1b[c").ok()?;
    let mut answer = Vec::new();
    while !answer.contains(&b'c') && answer.len() < 256 && is_readable(&terminal) {
        let mut bytes = [0; 64];
        let count = terminal.read(&mut bytes).ok().filter(|count| *count > 0)?;
        answer.extend_from_slice(&bytes[..count]);
    }
    String::from_utf8(answer).ok()
}

/// Whether something comes from the terminal in time.
fn is_readable(terminal: &File) -> bool {
    let mut poll = libc::pollfd { fd: terminal.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry, whose descriptor is open.
    unsafe { libc::poll(&raw mut poll, 1, PATIENCE) == 1 }
}

/// A terminal that shows and gathers nothing of what it is sent, until dropped.
struct Raw {
    terminal: File,
    before: libc::termios,
}

impl Raw {
    fn set(terminal: &File) -> Option<Self> {
        let terminal = terminal.try_clone().ok()?;
        // SAFETY: zeros are a valid place to write, and are only read once they were filled.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: an open descriptor and a value that lives through the call.
        if unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut before) } != 0 {
            return None;
        }
        let mut raw = before;
        raw.c_lflag &= !(libc::ICANON | libc::ECHO);
        // SAFETY: as above; the settings were read from this terminal.
        let is_set =
            unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &raw const raw) };
        (is_set == 0).then_some(Self { terminal, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let (terminal, before) = (self.terminal.as_raw_fd(), &raw const self.before);
        // SAFETY: the descriptor is open, the settings were read from it.
        unsafe { libc::tcsetattr(terminal, libc::TCSANOW, before) };
    }
}

/// A PNG in kitty's protocol: base64 in pieces, each but the last marked by `m=1`.
fn kitty(png: &[u8]) -> String {
    let text = STANDARD.encode(png);
    let mut out = String::with_capacity(text.len() + text.len() / 256 + 64);
    let mut rest = text.as_str();
    let mut control = "f=100,a=T,";
    loop {
        let (piece, after) = rest.split_at(PIECE.min(rest.len()));
        let has_more = u8::from(!after.is_empty());
        out.push_str(&format!("\x1b_G{control}m={has_more};{piece}\x1b\\"));
        if after.is_empty() {
            return out;
        }
        (rest, control) = (after, "");
    }
}

/// A picture in sixel: a fixed palette of 216 colours, dithered.
fn sixel(picture: &Pixels) -> String {
    let shrunk = (picture.width > WIDEST)
        .then(|| resize(picture, WIDEST, (picture.height * WIDEST / picture.width).max(1), None));
    let picture = shrunk.as_ref().unwrap_or(picture);
    let (width, height) = (picture.width, picture.height);
    let colours: Vec<u8> = (0..width * height)
        .map(|at| {
            let dither = DITHER[at / width % 4][at % width % 4];
            let level = |value: u8| {
                ((u16::from(value) * (LEVELS as u16 - 1) + dither * 16 + 8) / 256) as usize
            };
            let rgb = &picture.data[at * picture.channels..];
            ((level(rgb[0]) * LEVELS + level(rgb[1])) * LEVELS + level(rgb[2])) as u8
        })
        .collect();
    let mut out = format!("\x1bP0;1q\"1;1;{width};{height}");
    let percent = |level: usize| level * 100 / (LEVELS - 1);
    for colour in 0..LEVELS.pow(3) {
        let [red, green, blue] =
            [colour / LEVELS / LEVELS, colour / LEVELS % LEVELS, colour % LEVELS].map(percent);
        out.push_str(&format!("#{colour};2;{red};{green};{blue}"));
    }
    for band in colours.chunks(width * 6) {
        let mut used: Vec<u8> = band.to_vec();
        used.sort_unstable();
        used.dedup();
        for colour in used {
            out.push_str(&format!("#{colour}"));
            push_line(&mut out, band, width, colour);
            out.push('$');
        }
        out.push('-');
    }
    out.push_str("\x1b\\");
    out
}

/// One colour of six rows: a letter for each column, runs of one letter as `!count letter`.
fn push_line(out: &mut String, band: &[u8], width: usize, colour: u8) {
    let letter = |column: usize| {
        let rows = band[column..].iter().step_by(width);
        let bits = rows.enumerate().filter(|(_, own)| **own == colour);
        char::from(63 + bits.map(|(row, _)| 1_u8 << row).sum::<u8>())
    };
    let mut column = 0;
    while column < width {
        let this = letter(column);
        let run = (column..width).take_while(|other| letter(*other) == this).count();
        match run {
            1..=3 => out.extend(std::iter::repeat_n(this, run)),
            _ => out.push_str(&format!("!{run}{this}")),
        }
        column += run;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_are_told_by_their_environment() {
        let told = |pairs: &[(&str, &str)]| {
            let find = |name: &str| pairs.iter().find(|(known, _)| *known == name);
            super::told(|name| find(name).map(|(_, value)| (*value).to_owned()))
        };
        assert_eq!(told(&[("TERM", "xterm-kitty")]), Some(Protocol::Kitty));
        assert_eq!(told(&[("KITTY_WINDOW_ID", "1")]), Some(Protocol::Kitty));
        assert_eq!(told(&[("KITTY_WINDOW_ID", "1"), ("TMUX", "x")]), None);
        assert_eq!(told(&[("TERM", "foot-extra")]), Some(Protocol::Sixel));
        assert_eq!(told(&[("TERM", "xterm-256color")]), None);
        assert!(has_sixel("\u{1b}[?62;4;22c"));
        assert!(!has_sixel("\u{1b}[?62;14;22c") && !has_sixel("4c") && !has_sixel("\u{1b}[?4"));
    }

    #[test]
    fn kitty_gets_the_file_in_pieces() {
        let png: Vec<u8> = (0..8000_u32).map(|i| (i * 7) as u8).collect();
        let text = kitty(&png);
        let pieces: Vec<&str> = text.split_terminator("\x1b\\").collect();
        assert_eq!(pieces.len(), 3);
        assert!(pieces[0].starts_with("\x1b_Gf=100,a=T,m=1;"));
        assert!(pieces[1].starts_with("\x1b_Gm=1;") && pieces[2].starts_with("\x1b_Gm=0;"));
        let data: String = pieces.iter().filter_map(|piece| piece.split(';').nth(1)).collect();
        assert_eq!(STANDARD.decode(data).expect("base64"), png);
    }

    /// Reads sixel back: the colour of each pixel as three percentages.
    fn read_sixel(text: &str, width: usize, height: usize) -> Vec<[usize; 3]> {
        let body = text.split_once("q\"").expect("a start").1.trim_end_matches("\x1b\\");
        let mut palette = vec![[0; 3]; 256];
        let mut pixels = vec![[999; 3]; width * height];
        let (mut colour, mut x, mut y) = (0, 0, 0);
        let bytes = body.as_bytes();
        // Behind the size.
        let mut at = body.find('#').expect("a palette");
        let number = |at: &mut usize| {
            let mut value = 0;
            while bytes[*at].is_ascii_digit() {
                value = value * 10 + usize::from(bytes[*at] - b'0');
                *at += 1;
            }
            value
        };
        while at < bytes.len() {
            let byte = bytes[at];
            at += 1;
            match byte {
                b'#' => {
                    colour = number(&mut at);
                    if bytes[at] == b';' {
                        let mut part = || {
                            at += 1;
                            number(&mut at)
                        };
                        part();
                        palette[colour] = [part(), part(), part()];
                    }
                }
                b'$' => x = 0,
                b'-' => (x, y) = (0, y + 6),
                _ => {
                    let run = if byte == b'!' { number(&mut at) } else { 1 };
                    let bits = if byte == b'!' { bytes[at] - 63 } else { byte - 63 };
                    at += usize::from(byte == b'!');
                    for _ in 0..run {
                        for row in (0..6).filter(|row| bits >> row & 1 == 1) {
                            pixels[(y + row) * width + x] = palette[colour];
                        }
                        x += 1;
                    }
                }
            }
        }
        pixels
    }

    #[test]
    fn sixel_shows_every_pixel_near_its_colour() {
        let (width, height) = (20, 15);
        let data: Vec<u8> = (0..width * height)
            .flat_map(|at| [(at % width * 13) as u8, (at / width * 17) as u8, 255])
            .collect();
        let picture = Pixels { width, height, channels: 3, data };
        let pixels = read_sixel(&sixel(&picture), width, height);
        for (at, (shown, rgb)) in pixels.iter().zip(picture.data.chunks(3)).enumerate() {
            for (shown, value) in shown.iter().zip(rgb) {
                let wanted = usize::from(*value) * 100 / 255;
                assert!(shown.abs_diff(wanted) <= 20, "{at}: {shown} for {wanted}");
            }
        }
    }
}
