//! The command line, as containerd writes it: flags in the style of Go's `flag` package (`-id x`, `--id x` and `-id=x` are
//! the same), then the action.

use std::path::PathBuf;

/// What the process was started to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Invocation {
    /// `-v`: print the version.
    Version,
    /// `-info`: describe the runtime.
    Info,
    /// An action on a task.
    Action(Action, Args),
}

/// The last word of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Have a shim listen for the task and print its address.
    Start,
    /// Clean up after a task whose shim does not answer.
    Delete,
    /// Be that shim: `start` runs this binary again, with the listening socket as standard input.
    Serve,
}

/// The flags of an action.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Args {
    /// The containerd namespace.
    pub namespace: String,
    /// The address of containerd's gRPC API; empty under CRI-O.
    pub address: String,
    /// The containerd binary; unused, but it comes on every command line.
    pub publish_binary: String,
    /// The task's identifier.
    pub id: String,
    /// The bundle's directory; without it, the current directory.
    pub bundle: Option<PathBuf>,
    /// Whether debug messages are wanted in the log.
    pub debug: bool,
}

/// A command line that containerd would not write.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error(
        "unknown flag {0:?}; known are -namespace, -address, -publish-binary, -id, -bundle, -debug, -info and -v"
    )]
    UnknownFlag(String),
    #[error("flag -{0} needs a value")]
    MissingValue(&'static str),
    #[error("flag -{flag} is true or false, not {value:?}")]
    NotBoolean { flag: &'static str, value: String },
    #[error(
        "unknown action {0:?}; known are start and delete. This program is run by containerd: try `ctr run --runtime io.containerd.bulkhead.v2`"
    )]
    UnknownAction(String),
    #[error("unexpected argument {0:?} after the action")]
    Trailing(String),
    #[error(
        "flag -{flag}: {value:?} is no identifier: letters, digits and single '.', '_' or '-' between them, at most {MAX_IDENTIFIER}"
    )]
    NotIdentifier { flag: &'static str, value: String },
}

/// The longest identifier that containerd hands out.
const MAX_IDENTIFIER: usize = 76;

/// Reads the words of a command line, the program's name left out.
pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Invocation, Error> {
    let mut words = words.into_iter();
    let mut args = Args::default();
    let (mut version, mut info) = (false, false);
    let action = loop {
        let Some(word) = words.next() else {
            break None;
        };
        let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            break Some(word);
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let mut text = |flag: &'static str| {
            value
                .clone()
                .or_else(|| words.next())
                .ok_or(Error::MissingValue(flag))
        };
        match name {
            "namespace" => args.namespace = text("namespace")?,
            "address" => args.address = text("address")?,
            "publish-binary" => args.publish_binary = text("publish-binary")?,
            "id" => args.id = text("id")?,
            "bundle" => args.bundle = Some(text("bundle")?.into()),
            "debug" => args.debug = boolean("debug", value)?,
            "info" => info = boolean("info", value)?,
            "v" => version = boolean("v", value)?,
            _ => return Err(Error::UnknownFlag(word)),
        }
    };
    if version {
        return Ok(Invocation::Version);
    }
    if info {
        return Ok(Invocation::Info);
    }
    let action = match action.as_deref() {
        Some("start") => Action::Start,
        Some("delete") => Action::Delete,
        Some("serve") => Action::Serve,
        other => return Err(Error::UnknownAction(other.unwrap_or_default().to_owned())),
    };
    if let Some(word) = words.next() {
        return Err(Error::Trailing(word));
    }
    for (flag, value) in [("namespace", &args.namespace), ("id", &args.id)] {
        if !is_identifier(value) {
            return Err(Error::NotIdentifier {
                flag,
                value: value.clone(),
            });
        }
    }
    Ok(Invocation::Action(action, args))
}

/// Whether containerd would accept this as a namespace or a container's identifier. Such a name is safe as a file name.
pub fn is_identifier(value: &str) -> bool {
    value.len() <= MAX_IDENTIFIER
        && value
            .split(['.', '_', '-'])
            .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()))
}

fn boolean(flag: &'static str, value: Option<String>) -> Result<bool, Error> {
    match value.as_deref() {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(value) => Err(Error::NotBoolean {
            flag,
            value: value.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Result<Invocation, Error> {
        parse(line.split(' ').filter(|w| !w.is_empty()).map(String::from))
    }

    #[test]
    fn the_lines_that_containerd_writes() {
        let start = "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id abc -debug start";
        let expected = Args {
            namespace: "k8s.io".into(),
            address: "/run/containerd/containerd.sock".into(),
            publish_binary: "/usr/bin/containerd".into(),
            id: "abc".into(),
            bundle: None,
            debug: true,
        };
        assert_eq!(
            words(start),
            Ok(Invocation::Action(Action::Start, expected.clone()))
        );
        let delete = "--namespace=k8s.io -address=/run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id abc -bundle /run/b -debug=false delete";
        assert_eq!(
            words(delete),
            Ok(Invocation::Action(
                Action::Delete,
                Args {
                    bundle: Some("/run/b".into()),
                    debug: false,
                    ..expected
                }
            ))
        );
        // CRI-O has no containerd to name.
        let line = ["-namespace", "default", "-address", "", "-id", "a", "start"];
        assert!(matches!(
            parse(line.map(String::from)),
            Ok(Invocation::Action(Action::Start, Args { address, .. })) if address.is_empty()
        ));
        assert_eq!(words("-v"), Ok(Invocation::Version));
        assert_eq!(words("-info"), Ok(Invocation::Info));
    }

    #[test]
    fn every_other_line_is_an_error_that_names_the_word() {
        for (line, expected) in [
            ("", Error::UnknownAction("".into())),
            (
                "-id a -namespace n stop",
                Error::UnknownAction("stop".into()),
            ),
            ("-socket x start", Error::UnknownFlag("-socket".into())),
            ("-id", Error::MissingValue("id")),
            (
                "-debug=maybe start",
                Error::NotBoolean {
                    flag: "debug",
                    value: "maybe".into(),
                },
            ),
            (
                "-namespace n -id ../../etc start",
                Error::NotIdentifier {
                    flag: "id",
                    value: "../../etc".into(),
                },
            ),
            (
                "-id a start",
                Error::NotIdentifier {
                    flag: "namespace",
                    value: "".into(),
                },
            ),
            (
                "-id a -namespace n start now",
                Error::Trailing("now".into()),
            ),
        ] {
            assert_eq!(words(line), Err(expected), "{line:?}");
        }
    }

    #[test]
    fn identifiers_are_safe_file_names() {
        for good in ["a", "k8s.io", "a-b_c.d", &"x".repeat(76)] {
            assert!(is_identifier(good), "{good:?}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "-a",
            "a..b",
            "a\0",
            "ä",
            &"x".repeat(77),
        ] {
            assert!(!is_identifier(bad), "{bad:?}");
        }
    }
}
