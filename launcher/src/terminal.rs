//! A terminal between rank 0 and the user's: the rank draws its progress bar as on the real one, and
//! the launcher can copy what it says into a log file.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The two ends of a pseudo terminal.
pub struct Pair {
    /// The launcher's end: reads what was written on the other.
    pub ours: OwnedFd,
    /// The rank's end.
    pub theirs: OwnedFd,
}

/// Opens a pseudo terminal of the size of the launcher's stderr. It changes no byte on its way; the
/// real terminal does what terminals do with line ends.
pub fn open() -> io::Result<Pair> {
    let (mut ours, mut theirs) = (-1, -1);
    // SAFETY: two valid places for descriptors; no name, settings or size are passed.
    let done = unsafe {
        libc::openpty(
            &raw mut ours,
            &raw mut theirs,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just returned these descriptors and nobody else owns them.
    let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
    for end in [&ours, &theirs] {
        // SAFETY: sets a flag of a descriptor that is open.
        if unsafe { libc::fcntl(end.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: a zeroed termios is a valid place to write, and is only used once it was filled.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(theirs.as_raw_fd(), &raw mut settings) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::cfmakeraw(&raw mut settings);
        if libc::tcsetattr(theirs.as_raw_fd(), libc::TCSANOW, &raw const settings) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    copy_size(&ours);
    Ok(Pair { ours, theirs })
}

/// Gives the pseudo terminal the size of the launcher's stderr, if that is a terminal.
pub fn copy_size(ours: &OwnedFd) {
    // SAFETY: a zeroed winsize is a valid place to write; it is passed on only if it was filled.
    unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        if libc::ioctl(libc::STDERR_FILENO, libc::TIOCGWINSZ, &raw mut size) == 0 {
            libc::ioctl(ours.as_raw_fd(), libc::TIOCSWINSZ, &raw const size);
        }
    }
}

/// What remains of a line on a terminal: what was written after the last return to its start,
/// without escape sequences.
pub fn visible(line: &[u8]) -> Vec<u8> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let start = line.iter().rposition(|&byte| byte == b'\r').map_or(0, |at| at + 1);
    let mut text = Vec::new();
    let mut bytes = line[start..].iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte != 0x1b {
            text.push(byte);
        } else if bytes.next_if_eq(&b'[').is_some() {
            // Parameters, then one letter that ends the sequence.
            while bytes.next_if(|byte| !(0x40..=0x7e).contains(byte)).is_some() {}
            bytes.next();
        } else {
            bytes.next();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn bytes_pass_unchanged_and_the_other_end_is_a_terminal() {
        let pair = open().unwrap();
        let mut theirs = std::fs::File::from(pair.theirs);
        let mut ours = std::fs::File::from(pair.ours);
        assert!(std::io::IsTerminal::is_terminal(&theirs));
        theirs.write_all(b"a\nb\r").unwrap();
        let mut got = [0; 4];
        ours.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"a\nb\r");
        drop(theirs);
        assert!(!matches!(ours.read(&mut got), Ok(1..)));
    }

    #[test]
    fn only_what_remains_of_a_line_is_visible() {
        for (line, text) in [
            (&b"plain"[..], &b"plain"[..]),
            (b"10%\r20%\r30%", b"30%"),
            (b"10%\r\x1b[2K\x1b[1;32mdone\x1b[0m\r", b"done"),
            (b"", b""),
            (b"\x1b", b""),
            (b"\x1b[", b""),
        ] {
            assert_eq!(visible(line), text, "{line:?}");
        }
    }
}
