//! The shim's log: lines on the `log` FIFO of its first bundle, which containerd copies into its own log.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use log::{LevelFilter, Log, Metadata, Record};

/// The longest line, newline included: a pipe takes this many bytes at once or not at all (`PIPE_BUF`).
const MAX_LINE: usize = 4096;

struct Fifo {
    file: File,
    id: String,
}

/// Sends the messages of the `log` crate to the FIFO at `path`, for the life of the process. Without a FIFO that somebody reads (CRI-O
/// has none) there is no log.
pub fn init(path: &Path, id: &str, debug: bool) {
    let Ok(file) = open(path) else {
        return;
    };
    let logger = Fifo {
        file,
        id: id.to_owned(),
    };
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(if debug {
            LevelFilter::Debug
        } else {
            LevelFilter::Info
        });
    }
}

fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.file_type().is_fifo() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(file)
}

impl Log for Fifo {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut line = format!(
            "level={} id={} msg={:?}",
            record.level().as_str().to_ascii_lowercase(),
            self.id,
            record.args().to_string()
        );
        truncate(&mut line, MAX_LINE - 1);
        line.push('\n');
        // Nobody waits for a log: a full or unread FIFO loses the line.
        let _ = (&self.file).write(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Shortens a text to at most `length` bytes, at a character's end.
pub fn truncate(text: &mut String, length: usize) {
    if text.len() > length {
        let mut end = length;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_message_is_one_line_on_the_fifo() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(open(&path).is_err(), "nobody reads");
        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        let logger = Fifo {
            file: open(&path).unwrap(),
            id: "c1".into(),
        };
        log::set_max_level(LevelFilter::Info);
        for text in ["two\nlines", &"ü".repeat(MAX_LINE)] {
            logger.log(
                &Record::builder()
                    .level(log::Level::Warn)
                    .args(format_args!("{text}"))
                    .build(),
            );
        }
        let mut bytes = vec![0; 3 * MAX_LINE];
        let length = reader.read(&mut bytes).unwrap();
        let text = std::str::from_utf8(&bytes[..length]).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], r#"level=warn id=c1 msg="two\nlines""#);
        assert_eq!(lines.len(), 2);
        assert!(lines[1].len() < MAX_LINE && lines[1].len() > MAX_LINE - 4);
    }
}
