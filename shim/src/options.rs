//! The runtime's options in a Create request: where the configuration is.

use protobuf::CodedInputStream;
use protobuf::rt::WireType;
use protobuf::well_known_types::any::Any;

/// What an administrator wrote into containerd's configuration for this runtime, or a client on its command line
/// (`runtimeoptions.v1.Options`).
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Path of the configuration file; empty for the one at the usual place.
    pub config_path: String,
    /// The configuration itself, in TOML; empty if there is a path, or nothing.
    pub config_body: String,
}

/// Options that this runtime does not understand.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "the runtime's options are a {0:?}; known are runtimeoptions.v1.Options (ConfigPath) and, ignored, containerd.runc.v1.Options"
    )]
    Type(String),
    #[error("the runtime's options do not decode: {0}")]
    Malformed(#[from] protobuf::Error),
}

const CONFIG_PATH: u32 = 2;
const CONFIG_BODY: u32 = 3;

impl Options {
    /// Reads the options of a request.
    pub fn parse(options: Option<&Any>) -> Result<Self, Error> {
        let Some(options) = options else {
            return Ok(Self::default());
        };
        match options.type_url.rsplit('/').next().unwrap_or_default() {
            "runtimeoptions.v1.Options" => Ok(Self::decode(&options.value)?),
            // Clients that know no other runtime send runc's; nothing in them concerns a machine.
            "" | "containerd.runc.v1.Options" => Ok(Self::default()),
            _ => Err(Error::Type(options.type_url.clone())),
        }
    }

    fn decode(bytes: &[u8]) -> Result<Self, protobuf::Error> {
        let mut decoded = Self::default();
        let mut input = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            let wire = WireType::new(tag & 7).unwrap_or(WireType::EndGroup);
            match (tag >> 3, wire) {
                (CONFIG_PATH, WireType::LengthDelimited) => {
                    decoded.config_path = input.read_string()?
                }
                (CONFIG_BODY, WireType::LengthDelimited) => {
                    decoded.config_body = input.read_string()?
                }
                (_, wire) => input.skip_field(wire)?,
            }
        }
        Ok(decoded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.into(),
            value: value.into(),
            ..Default::default()
        }
    }

    #[test]
    fn the_path_and_the_body_are_found() {
        let parse = |value: &[u8]| Options::parse(Some(&any("runtimeoptions.v1.Options", value)));
        let options = parse(b"\x0a\x01t\x12\x02/p\x1a\x03a=1\x20\x07").unwrap();
        assert_eq!(
            (options.config_path.as_str(), options.config_body.as_str()),
            ("/p", "a=1")
        );
        assert_eq!(parse(b"").unwrap(), Options::default());
        for malformed in [&b"\x12\x7fx"[..], b"\x12", b"\x12\x01\xff", b"\x07"] {
            assert!(parse(malformed).is_err(), "{malformed:?}");
        }
    }

    #[test]
    fn other_options_are_ignored_or_refused_by_name() {
        let runc = any("containerd.runc.v1.Options", b"\x18\x01");
        assert_eq!(Options::parse(Some(&runc)).unwrap(), Options::default());
        assert_eq!(Options::parse(None).unwrap(), Options::default());
        let other = any("io.other/x.Options", b"");
        assert!(
            matches!(Options::parse(Some(&other)), Err(Error::Type(t)) if t == "io.other/x.Options")
        );
    }
}
