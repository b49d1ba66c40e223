//! The configuration: TOML, from `/etc/bulkhead/config.toml` or the file that containerd's runtime options name. Every key
//! has a default, and a host needs no file. What is not understood is an error: a misspelt key must not be a silent default.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_vmm::launch::{DEFAULT_UID_BASE, UID_RANGE};
use serde::Deserialize;

/// Where the configuration is looked for if nothing names another file.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.toml";

/// The most virtual processors of a machine.
pub const MAX_VCPUS: u8 = 32;

/// The least memory, in MiB, with which the guest comes up.
pub const MIN_MEMORY_MIB: u32 = 64;

/// The most bytes of additional kernel parameters: half of what x86 kernels take.
const MAX_KERNEL_PARAMS: usize = 1024;

/// The least `uid_base`: below are the identifiers of ordinary users and services.
const MIN_UID_BASE: u32 = 1 << 16;

/// Sizes in MiB from here on make no sense for a file on a host (16 TiB).
const MAX_SIZE_MIB: u64 = 1 << 24;

/// All settings.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The VMM's executable.
    pub vmm: PathBuf,
    /// The guest kernel, an ELF image.
    pub kernel: PathBuf,
    /// The guest's root image.
    pub image: PathBuf,
    /// Added to the guest kernel's command line.
    pub kernel_params: String,
    /// Virtual processors of a machine whose containers have no CPU limit, 1 to 32.
    pub default_vcpus: u8,
    /// Memory in MiB of a machine whose containers have no memory limit. Memory is taken from the host when the guest
    /// touches it, but the guest's kernel sets up 16 MiB of page descriptors for each GiB at every start.
    pub default_memory_mib: u32,
    /// How long a guest may take to come up, in seconds.
    pub boot_timeout_seconds: u32,
    /// The first of the 2^22 user and group identifiers of which each VMM takes one.
    pub uid_base: u32,
    /// Where the running shims keep what must not survive a reboot.
    pub state_dir: PathBuf,
    /// Where the images of container layers are kept.
    pub cache_dir: PathBuf,
    /// How large the images together may grow, in MiB, before those that nothing uses are removed.
    pub cache_size_mib: u64,
    /// Where the machines' scratch disks are made, with what their containers write.
    pub scratch_dir: PathBuf,
    /// Size of a scratch disk in MiB. It is sparse: it takes the space that containers fill.
    pub scratch_size_mib: u64,
    /// Whether guests may send from hardware and IP addresses that are not theirs.
    pub allow_foreign_sources: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vmm: "/usr/lib/bulkhead/bulkhead-vmm".into(),
            kernel: "/usr/lib/bulkhead/vmlinux".into(),
            image: "/usr/lib/bulkhead/rootfs.erofs".into(),
            kernel_params: String::new(),
            default_vcpus: 1,
            default_memory_mib: 512,
            boot_timeout_seconds: 60,
            uid_base: DEFAULT_UID_BASE,
            state_dir: "/run/bulkhead".into(),
            cache_dir: "/var/lib/bulkhead/layers".into(),
            cache_size_mib: 20 * 1024,
            scratch_dir: "/var/lib/bulkhead/scratch".into(),
            scratch_size_mib: 16 * 1024,
            allow_foreign_sources: false,
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}; correct the path in containerd's runtime options, or create the file", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// The text is no TOML, names an unknown key, or gives a key a value of the wrong type.
    #[error("the configuration {} is not valid: {}; correct or remove the line", path.display(), source.to_string().trim_end())]
    Syntax {
        path: PathBuf,
        source: toml::de::Error,
    },
    /// A value is out of its range.
    #[error("the configuration {} is not valid: {key} = {value}; {remedy}", path.display())]
    Value {
        path: PathBuf,
        key: &'static str,
        value: String,
        remedy: String,
    },
}

impl Config {
    /// Reads the file that was named, or else the one at [`DEFAULT_PATH`], which may be absent.
    pub fn load(named: Option<&Path>) -> Result<Self, Error> {
        let path = named.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path),
            Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => {
                Ok(Self::default())
            }
            Err(source) => Err(Error::Read {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Reads a configuration that came from `path`, which is for messages only.
    pub fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let config: Self = toml::from_str(text).map_err(|source| Error::Syntax {
            path: path.to_owned(),
            source,
        })?;
        config
            .check()
            .map_err(|(key, value, remedy)| Error::Value {
                path: path.to_owned(),
                key,
                value,
                remedy,
            })?;
        Ok(config)
    }

    /// How long a guest may take to come up.
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(self.boot_timeout_seconds.into())
    }

    /// Finds a value out of range: its key, itself, and what would be in range.
    fn check(&self) -> Result<(), (&'static str, String, String)> {
        let numbers = [
            (
                "default_vcpus",
                self.default_vcpus.into(),
                1,
                MAX_VCPUS.into(),
            ),
            (
                "default_memory_mib",
                self.default_memory_mib.into(),
                MIN_MEMORY_MIB.into(),
                MAX_SIZE_MIB,
            ),
            (
                "boot_timeout_seconds",
                self.boot_timeout_seconds.into(),
                1,
                3600,
            ),
            (
                "uid_base",
                self.uid_base.into(),
                MIN_UID_BASE.into(),
                (u32::MAX - UID_RANGE).into(),
            ),
            ("cache_size_mib", self.cache_size_mib, 64, MAX_SIZE_MIB),
            ("scratch_size_mib", self.scratch_size_mib, 64, MAX_SIZE_MIB),
        ];
        for (key, value, least, most) in numbers {
            if !(least..=most).contains(&value) {
                return Err((
                    key,
                    value.to_string(),
                    format!("it must be {least} to {most}"),
                ));
            }
        }
        let paths = [
            ("vmm", &self.vmm),
            ("kernel", &self.kernel),
            ("image", &self.image),
            ("state_dir", &self.state_dir),
            ("cache_dir", &self.cache_dir),
            ("scratch_dir", &self.scratch_dir),
        ];
        for (key, path) in paths {
            if !path.is_absolute() {
                return Err((
                    key,
                    format!("{path:?}"),
                    "it must be an absolute path".to_owned(),
                ));
            }
        }
        let parameters = &self.kernel_params;
        if parameters.len() > MAX_KERNEL_PARAMS
            || !parameters.bytes().all(|b| (b' '..=b'~').contains(&b))
        {
            return Err((
                "kernel_params",
                format!("{parameters:?}"),
                format!("it must be at most {MAX_KERNEL_PARAMS} printable ASCII characters"),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Error> {
        Config::parse(text, Path::new("/etc/x.toml"))
    }

    #[test]
    fn nothing_set_is_the_default_and_valid() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn the_sample_has_every_key_with_its_default() {
        let sample = include_str!("../../docs/config.toml");
        assert_eq!(parse(sample).unwrap(), Config::default());
        // The error names all keys that there are.
        let error = parse("x = 1").unwrap_err().to_string();
        let keys: Vec<&str> = error.split('`').skip(3).step_by(2).collect();
        assert_eq!(keys.len(), 14);
        for key in keys {
            assert!(sample.contains(&format!("\n{key} = ")), "{key}");
        }
    }

    #[test]
    fn every_key_can_be_set() {
        let config = parse(
            r#"
            vmm = "/a/vmm"
            kernel = "/a/kernel"
            image = "/a/image"
            kernel_params = "quiet loglevel=3"
            default_vcpus = 32
            default_memory_mib = 64
            boot_timeout_seconds = 5
            uid_base = 65536
            state_dir = "/a/state"
            cache_dir = "/a/cache"
            cache_size_mib = 64
            scratch_dir = "/a/scratch"
            scratch_size_mib = 64
            allow_foreign_sources = true
            "#,
        )
        .unwrap();
        assert_eq!(config.kernel, Path::new("/a/kernel"));
        assert_eq!(config.default_vcpus, 32);
        assert_eq!(config.boot_timeout(), Duration::from_secs(5));
        assert!(config.allow_foreign_sources);
    }

    #[test]
    fn what_is_wrong_is_named_with_file_key_and_remedy() {
        for (text, parts) in [
            ("kernal = \"/x\"", ["unknown field `kernal`", "`kernel`"]),
            (
                "default_vcpus = \"two\"",
                ["default_vcpus = \"two\"", "expected u8"],
            ),
            (
                "default_vcpus = 300",
                ["default_vcpus = 300", "expected u8"],
            ),
            (
                "default_vcpus = 33",
                ["default_vcpus = 33", "it must be 1 to 32"],
            ),
            (
                "default_vcpus = 0",
                ["default_vcpus = 0", "it must be 1 to 32"],
            ),
            (
                "default_memory_mib = 63",
                ["default_memory_mib = 63", "it must be 64 to"],
            ),
            (
                "boot_timeout_seconds = 0",
                ["boot_timeout_seconds = 0", "1 to 3600"],
            ),
            ("uid_base = 0", ["uid_base = 0", "it must be 65536 to"]),
            (
                "uid_base = 4294967295",
                ["uid_base = 4294967295", "it must be"],
            ),
            (
                "cache_size_mib = 1",
                ["cache_size_mib = 1", "it must be 64 to"],
            ),
            (
                "scratch_size_mib = 99999999",
                ["scratch_size_mib = 99999999", "it must be"],
            ),
            (
                "image = \"rootfs\"",
                ["image = \"rootfs\"", "absolute path"],
            ),
            (
                "kernel_params = \"a\\nb\"",
                ["kernel_params = \"a\\nb\"", "printable ASCII"],
            ),
            (
                "allow_foreign_sources = \"off\"",
                ["allow_foreign_sources = \"off\"", "expected a boolean"],
            ),
            ("default_vcpus", ["line 1", "expected"]),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(
                error.starts_with("the configuration /etc/x.toml is not valid: "),
                "{error}"
            );
            for part in parts {
                assert!(error.contains(part), "{text}: {error}");
            }
        }
    }

    #[test]
    fn only_the_file_that_nothing_names_may_be_absent() {
        let missing = Path::new("/nonexistent/config.toml");
        let error = Config::load(Some(missing)).unwrap_err().to_string();
        assert!(
            error.contains("/nonexistent/config.toml: No such file"),
            "{error}"
        );
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        std::fs::write(&path, "default_memory_mib = 256").unwrap();
        assert_eq!(Config::load(Some(&path)).unwrap().default_memory_mib, 256);
    }
}
