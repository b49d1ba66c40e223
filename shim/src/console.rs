//! The guest's serial console, kept so that a failure can be explained: its last lines belong into the error.
//!
//! What arrives is the guest's, so hostile: the ring is bounded, and nothing leaves it that could control a terminal.

use std::collections::VecDeque;

/// How much output is kept, in bytes; older output is forgotten.
pub const CAPACITY: usize = 64 * 1024;

/// The most characters of one line that [`Console::tail`] returns.
const LINE_LIMIT: usize = 256;

/// How Linux begins to tell of its panic.
const PANIC: &str = "Kernel panic - not syncing";

/// The last [`CAPACITY`] bytes that the guest wrote. Grows with the output: a silent guest costs nothing.
#[derive(Debug, Default)]
pub struct Console {
    ring: VecDeque<u8>,
}

impl Console {
    /// Appends output, and forgets as much of the oldest as is too much.
    pub fn push(&mut self, output: &[u8]) {
        let output = &output[output.len().saturating_sub(CAPACITY)..];
        let excess = (self.ring.len() + output.len()).saturating_sub(CAPACITY);
        self.ring.drain(..excess);
        self.ring.extend(output);
    }

    /// The last `count` lines that are not empty, made [`printable`]; after a panic, as many from what the kernel says of it on,
    /// because the trace that follows may be longer.
    pub fn tail(&self, count: usize) -> Vec<String> {
        let (old, new) = self.ring.as_slices();
        let text = [old, new].concat();
        let lines = text
            .split(|&byte| byte == b'\n')
            .map(|line| printable(line, LINE_LIMIT));
        let mut lines: Vec<String> = lines.filter(|line| !line.is_empty()).collect();
        let last = lines.len().saturating_sub(count);
        let panic = lines.iter().position(|line| line.contains(PANIC));
        lines.drain(..panic.map_or(last, |panic| panic.min(last)));
        lines.truncate(count);
        lines
    }
}

/// The text of `bytes` without anything that could control a terminal or deceive a reader: escape sequences are left
/// out, other control and direction characters and bytes that are not UTF-8 are replaced. White space at the end is cut
/// off, and so is everything beyond `limit` characters.
pub fn printable(bytes: &[u8], limit: usize) -> String {
    // A character has at most four bytes, an escape sequence rarely more than ten.
    let bytes = &bytes[..bytes.len().min(limit.saturating_mul(16))];
    let lossy = String::from_utf8_lossy(bytes);
    let mut characters = lossy.trim_end().chars().peekable();
    let mut text = String::new();
    let mut length = 0;
    while let Some(character) = characters.next() {
        let shown = match character {
            '\u{1b}' => {
                if characters.next_if_eq(&'[').is_some() {
                    // ECMA-48: parameter and intermediate bytes, then one final byte.
                    while characters.next_if(|c| (' '..='?').contains(c)).is_some() {}
                    characters.next_if(|c| ('@'..='~').contains(c));
                }
                continue;
            }
            '\r' => continue,
            '\t' => ' ',
            c if c.is_control() || directs(c) => char::REPLACEMENT_CHARACTER,
            c => c,
        };
        if length == limit {
            text.push('…');
            break;
        }
        text.push(shown);
        length += 1;
    }
    text
}

/// Whether a character changes the direction of the text around it, or is invisible.
fn directs(character: char) -> bool {
    matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(output: &str) -> Console {
        let mut console = Console::default();
        console.push(output.as_bytes());
        console
    }

    #[test]
    fn the_tail_is_the_last_lines_in_order() {
        let console = console("one\r\n\r\ntwo\nthree\n");
        assert_eq!(console.tail(2), ["two", "three"]);
        assert_eq!(console.tail(9), ["one", "two", "three"]);
        assert!(console.tail(0).is_empty());
        assert!(Console::default().tail(9).is_empty());
    }

    #[test]
    fn a_panic_is_not_pushed_out_by_its_trace() {
        let panic = "[1.0] Kernel panic - not syncing: why";
        let long = console(&format!("before\n{panic}\r\n\na\nb\nc\n"));
        assert_eq!(long.tail(3), [panic, "a", "b"]);
        assert_eq!(long.tail(5), ["before", panic, "a", "b", "c"]);
        assert!(long.tail(0).is_empty());
    }

    #[test]
    fn an_unfinished_line_counts() {
        assert_eq!(console("one\npanic").tail(1), ["panic"]);
    }

    #[test]
    fn the_ring_is_bounded_and_keeps_the_newest() {
        let mut console = Console::default();
        for _ in 0..3 {
            console.push(&[b'a'; CAPACITY - 1]);
        }
        console.push(b"\nlast");
        assert_eq!(console.ring.len(), CAPACITY);
        assert_eq!(console.tail(1), ["last"]);
        console.push(&[b'b'; 2 * CAPACITY]);
        assert_eq!(console.ring.len(), CAPACITY);
    }

    #[test]
    fn nothing_controls_the_terminal() {
        for (raw, shown) in [
            (&b"\x1b[1;31mred\x1b[0m"[..], "red"),
            (b"\x1b]0;title\x07x", "]0;title\u{fffd}x"),
            (b"\x1b", ""),
            (b"\x1b[", ""),
            (b"a\tb\x08\x00", "a b\u{fffd}\u{fffd}"),
            (b"caf\xc3\xa9 \xff", "café \u{fffd}"),
            ("\u{9b}31m\u{202e}".as_bytes(), "\u{fffd}31m\u{fffd}"),
        ] {
            assert_eq!(printable(raw, 80), shown, "{raw:?}");
        }
    }

    #[test]
    fn a_long_line_is_cut() {
        assert_eq!(printable(&[b'x'; 9], 4), "xxxx…");
        assert_eq!(printable(b"xxxx", 4), "xxxx");
        let endless = printable(&b"\x1b[0m".repeat(CAPACITY), 4);
        assert_eq!(endless, "");
    }
}
