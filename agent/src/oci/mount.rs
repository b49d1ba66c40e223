//! Mounts and their options, as `mount(8)` writes them.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount as Entry;
use rustix::mount::{MountFlags, MountPropagationFlags};

use super::mapping::Mappings;
use crate::error::Error;
use crate::sys::MountAttributes;

/// Flags that rustix does not name.
const POSIX_ACL: MountFlags = MountFlags::from_bits_retain(libc::MS_POSIXACL as u32);
const I_VERSION: MountFlags = MountFlags::from_bits_retain(libc::MS_I_VERSION as u32);

/// A mount of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where, in the container.
    pub destination: PathBuf,
    /// What.
    pub kind: Kind,
    /// How.
    pub options: Options,
    /// How identities of its file system appear in it, if not as they are.
    pub mappings: Option<Mappings>,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file or directory of the guest.
    Bind { source: PathBuf, recursive: bool },
    /// The container's control group.
    Cgroup,
    /// A file system.
    Filesystem { kind: String, source: String },
}

/// The options of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// For `mount(2)`.
    pub flags: MountFlags,
    /// The same flags and their opposites, as far as `mount_setattr(2)` has them, for one mount.
    pub attributes: MountAttributes,
    /// For the mount and all below it (`rro`, `rnosuid`, …).
    pub recursive: MountAttributes,
    /// In their order.
    pub propagation: Vec<MountPropagationFlags>,
    /// What the file system itself reads, in order.
    pub data: Vec<String>,
    /// Whether a tmpfs begins with a copy of what it covers.
    pub copy_up: bool,
    /// Whether identities are mapped, and if so, whether those of all mounts below, too.
    pub id_mapped: Option<bool>,
    bind: Option<bool>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            flags: MountFlags::empty(),
            attributes: MountAttributes::default(),
            recursive: MountAttributes::default(),
            propagation: Vec::new(),
            data: Vec::new(),
            copy_up: false,
            id_mapped: None,
            bind: None,
        }
    }
}

impl Mount {
    /// Reads an entry. `idmap` or `ridmap` without mappings takes those of the container's user namespace (`own`).
    pub fn new(entry: &Entry, own: &Mappings) -> Result<Self, Error> {
        if entry.destination().as_os_str().is_empty() {
            return Err(Error::InvalidArgument(
                "mounts: one has no destination".into(),
            ));
        }
        // Relative ones are deprecated, not forbidden.
        let destination = Path::new("/").join(entry.destination());
        let name = || format!("mounts: {}", destination.display());
        let options = entry.options().iter().flatten().map(String::as_str);
        let options = Options::parse(options)
            .map_err(|option| super::refused(&format!("{}: option {option}", name())))?;
        let source = entry.source().clone().unwrap_or_default();
        let kind = match (entry.typ().as_deref().unwrap_or_default(), options.bind) {
            ("bind", recursive) => Kind::Bind {
                source,
                recursive: recursive.unwrap_or(false),
            },
            (_, Some(recursive)) => Kind::Bind { source, recursive },
            ("", None) => {
                return Err(Error::InvalidArgument(format!("{}: no type", name())));
            }
            ("cgroup" | "cgroup2", None) => Kind::Cgroup,
            (kind, None) => Kind::Filesystem {
                kind: kind.to_owned(),
                source: source.into_os_string().into_string().map_err(|source| {
                    Error::InvalidArgument(format!("{}: source {source:?} is not UTF-8", name()))
                })?,
            },
        };
        if let Kind::Bind { source, .. } = &kind {
            if !source.has_root() {
                return Err(Error::InvalidArgument(format!(
                    "{}: the source {} is not absolute",
                    name(),
                    source.display()
                )));
            }
            if let Some(option) = options.data.first() {
                return Err(super::refused(&format!("{}: option {option}", name())));
            }
        }
        let mut mappings = Mappings::new(entry.uid_mappings(), entry.gid_mappings());
        if mappings.are_empty() == (true, true) && options.id_mapped.is_some() {
            mappings = own.clone();
        }
        let mappings = match (mappings.are_empty(), options.id_mapped) {
            ((true, true), None) => None,
            _ if !matches!(kind, Kind::Bind { .. }) => {
                return Err(super::refused(&format!(
                    "{}: mapped identities of a mount that is no bind",
                    name()
                )));
            }
            ((false, false), _) => Some(mappings),
            ((true, true), Some(_)) => {
                return Err(Error::InvalidArgument(format!(
                    "{}: to map the identities of a mount, uidMappings and gidMappings are needed, or a user namespace",
                    name()
                )));
            }
            _ => {
                return Err(Error::InvalidArgument(format!(
                    "{}: it has only one of uidMappings and gidMappings: give it both",
                    name()
                )));
            }
        };
        Ok(Self {
            destination,
            kind,
            options,
            mappings,
        })
    }
}

/// The modes of access time, of which a mount has one.
const ACCESS_TIME: MountFlags = MountFlags::NOATIME
    .union(MountFlags::RELATIME)
    .union(MountFlags::STRICTATIME);

/// What an option changes: flags of `mount(2)`, and attributes of `mount_setattr(2)`.
struct Flag {
    flags: MountFlags,
    attributes: u64,
}

const fn flag(flags: MountFlags, attributes: u64) -> Option<Flag> {
    Some(Flag { flags, attributes })
}

/// The flag that an option sets.
fn set(option: &str) -> Option<Flag> {
    match option {
        "ro" => flag(MountFlags::RDONLY, libc::MOUNT_ATTR_RDONLY),
        "nosuid" => flag(MountFlags::NOSUID, libc::MOUNT_ATTR_NOSUID),
        "nodev" => flag(MountFlags::NODEV, libc::MOUNT_ATTR_NODEV),
        "noexec" => flag(MountFlags::NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        "nodiratime" => flag(MountFlags::NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => flag(MountFlags::NOSYMFOLLOW, libc::MOUNT_ATTR_NOSYMFOLLOW),
        "noatime" => flag(MountFlags::NOATIME, libc::MOUNT_ATTR_NOATIME),
        "strictatime" => flag(MountFlags::STRICTATIME, libc::MOUNT_ATTR_STRICTATIME),
        "relatime" => flag(MountFlags::RELATIME, libc::MOUNT_ATTR_RELATIME),
        _ => None,
    }
}

/// The flag that an option clears.
fn clear(option: &str) -> Option<Flag> {
    match option {
        "rw" => set("ro"),
        "suid" => set("nosuid"),
        "dev" => set("nodev"),
        "exec" => set("noexec"),
        "diratime" => set("nodiratime"),
        "symfollow" => set("nosymfollow"),
        "atime" => set("noatime"),
        "norelatime" => set("relatime"),
        "nostrictatime" => set("strictatime"),
        _ => None,
    }
}

/// Options that belong to the whole file system, which a bind mount cannot have.
fn superblock(option: &str) -> Option<(MountFlags, bool)> {
    match option {
        "sync" => Some((MountFlags::SYNCHRONOUS, true)),
        "async" => Some((MountFlags::SYNCHRONOUS, false)),
        "dirsync" => Some((MountFlags::DIRSYNC, true)),
        "lazytime" => Some((MountFlags::LAZYTIME, true)),
        "nolazytime" => Some((MountFlags::LAZYTIME, false)),
        "mand" => Some((MountFlags::PERMIT_MANDATORY_FILE_LOCKING, true)),
        "nomand" => Some((MountFlags::PERMIT_MANDATORY_FILE_LOCKING, false)),
        "silent" => Some((MountFlags::SILENT, true)),
        "loud" => Some((MountFlags::SILENT, false)),
        "acl" => Some((POSIX_ACL, true)),
        "noacl" => Some((POSIX_ACL, false)),
        "iversion" => Some((I_VERSION, true)),
        "noiversion" => Some((I_VERSION, false)),
        _ => None,
    }
}

fn propagation(option: &str) -> Option<MountPropagationFlags> {
    Some(match option {
        "private" => MountPropagationFlags::PRIVATE,
        "rprivate" => MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "rslave" => MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        "shared" => MountPropagationFlags::SHARED,
        "rshared" => MountPropagationFlags::SHARED | MountPropagationFlags::REC,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        "runbindable" => MountPropagationFlags::UNBINDABLE | MountPropagationFlags::REC,
        _ => return None,
    })
}

/// Reads a `linux.rootfsPropagation`.
pub fn parse_propagation(name: &str) -> Result<MountPropagationFlags, Error> {
    propagation(name).ok_or_else(|| {
        Error::InvalidArgument(format!(
            "linux.rootfsPropagation is {name:?}: expected private, slave, shared or unbindable, or one of them with an r before it"
        ))
    })
}

impl MountAttributes {
    fn set(&mut self, attributes: u64) {
        self.change(attributes);
        self.set |= attributes;
    }

    fn clear(&mut self, attributes: u64) {
        self.change(attributes);
        self.clear |= attributes;
    }

    /// The access time modes are one field of several bits: to change it is to clear the whole of it.
    fn change(&mut self, attributes: u64) {
        const ATIME: u64 = libc::MOUNT_ATTR__ATIME;
        let field = if attributes == libc::MOUNT_ATTR_RELATIME || attributes & ATIME != 0 {
            self.clear |= ATIME;
            ATIME
        } else {
            self.clear &= !attributes;
            attributes
        };
        self.set &= !field;
    }
}

impl Options {
    /// Reads options; the error is one that this runtime does not do.
    pub fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Self, &'a str> {
        let mut parsed = Self::default();
        for option in options {
            if let Some(flag) = set(option) {
                if flag.flags.intersects(ACCESS_TIME) {
                    parsed.flags &= !ACCESS_TIME;
                }
                parsed.flags |= flag.flags;
                parsed.attributes.set(flag.attributes);
            } else if let Some(flag) = clear(option) {
                parsed.flags &= !flag.flags;
                parsed.attributes.clear(flag.attributes);
            } else if let Some(propagation) = propagation(option) {
                parsed.propagation.push(propagation);
            } else if let Some((flag, set)) = superblock(option) {
                parsed.flags.set(flag, set);
            } else if let Some(flag) = option.strip_prefix('r').and_then(set) {
                parsed.recursive.set(flag.attributes);
            } else if let Some(flag) = option.strip_prefix('r').and_then(clear) {
                parsed.recursive.clear(flag.attributes);
            } else {
                match option {
                    "bind" => parsed.bind = Some(parsed.bind.unwrap_or(false)),
                    "rbind" => parsed.bind = Some(true),
                    "tmpcopyup" => parsed.copy_up = true,
                    "defaults" => {}
                    "idmap" => parsed.id_mapped = Some(false),
                    "ridmap" => parsed.id_mapped = Some(true),
                    "remount" => return Err(option),
                    data => parsed.data.push(data.to_owned()),
                }
            }
        }
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn mount(json: &str) -> Result<Mount, Error> {
        Mount::new(&serde_json::from_str(json).unwrap(), &Mappings::default())
    }

    #[test]
    fn identities_are_mapped_as_the_containers_own_if_nothing_else_is_said() {
        let map = |inside, outside| {
            let json = json!([{"containerID": inside, "hostID": outside, "size": 1}]);
            serde_json::from_value(json).unwrap()
        };
        let own = Mappings::new(&map(0, 1), &map(0, 2));
        let mut entry =
            json!({"destination": "/x", "type": "bind", "source": "/y", "options": ["ridmap"]});
        let mapped = |entry: &Value| {
            let entry = serde_json::from_value(entry.clone()).unwrap();
            Mount::new(&entry, &own).unwrap().mappings
        };
        assert_eq!(mapped(&entry).as_ref(), Some(&own));
        entry["uidMappings"] = json!([{"containerID": 5, "hostID": 6, "size": 1}]);
        entry["gidMappings"] = entry["uidMappings"].clone();
        assert_eq!(mapped(&entry), Some(Mappings::new(&map(5, 6), &map(5, 6))));
        let plain = json!({"destination": "/x", "type": "bind", "source": "/y"});
        assert_eq!(mapped(&plain), None);
    }

    #[test]
    fn a_tmpfs_has_flags_and_data() {
        let mount = mount(
            r#"{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]}"#,
        )
        .unwrap();
        assert_eq!(
            mount.options.flags,
            MountFlags::NOSUID | MountFlags::STRICTATIME
        );
        assert_eq!(mount.options.data, ["mode=755", "size=65536k"]);
        assert!(matches!(mount.kind, Kind::Filesystem { kind, .. } if kind == "tmpfs"));
    }

    #[test]
    fn a_relative_destination_is_below_the_root() {
        let mount = mount(r#"{"destination":"run/x","type":"tmpfs"}"#).unwrap();
        assert_eq!(mount.destination, Path::new("/run/x"));
    }

    #[test]
    fn options_of_a_whole_file_system_are_flags() {
        let parsed = |options: &[&str]| {
            let options = Options::parse(options.iter().copied()).unwrap();
            assert!(options.data.is_empty(), "{options:?}");
            options.flags.bits()
        };
        let both = (libc::MS_POSIXACL | libc::MS_I_VERSION) as u32;
        assert_eq!(parsed(&["acl", "iversion"]), both);
        assert_eq!(parsed(&["acl", "iversion", "noacl", "noiversion"]), 0);
        let bind = r#"{"destination":"/x","type":"bind","source":"/y","options":["bind","acl","noacl","iversion","noiversion","sync"]}"#;
        assert!(mount(bind).is_ok());
    }

    #[test]
    fn a_bind_has_attributes() {
        let mount = mount(
            r#"{"destination":"/x","type":"none","source":"/y","options":["rbind","rro","nosuid","exec","rprivate"]}"#,
        )
        .unwrap();
        assert_eq!(
            mount.kind,
            Kind::Bind {
                source: "/y".into(),
                recursive: true
            }
        );
        assert_eq!(mount.options.attributes.set, libc::MOUNT_ATTR_NOSUID);
        assert_eq!(mount.options.attributes.clear, libc::MOUNT_ATTR_NOEXEC);
        assert_eq!(mount.options.recursive.set, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(
            mount.options.propagation,
            [MountPropagationFlags::PRIVATE | MountPropagationFlags::REC]
        );
    }

    #[test]
    fn the_last_of_two_opposites_wins() {
        let options = Options::parse(["ro", "rw", "dev", "nodev", "noatime", "relatime"]).unwrap();
        assert_eq!(options.flags, MountFlags::NODEV | MountFlags::RELATIME);
        assert_eq!(
            options.attributes,
            MountAttributes {
                set: libc::MOUNT_ATTR_NODEV,
                clear: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR__ATIME,
            }
        );
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let own = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
        let own = serde_json::from_value(own).unwrap();
        let (none, own) = (Mappings::default(), Mappings::new(&own, &own));
        for (own, bad, why) in [
            (&none, r#"{"destination":"","type":"tmpfs"}"#, "destination"),
            (&none, r#"{"destination":"/x"}"#, "no type"),
            (
                &none,
                r#"{"destination":"/x","type":"bind","source":"relative"}"#,
                "absolute",
            ),
            (
                &none,
                r#"{"destination":"/x","type":"bind","source":"/y","options":["size=1"]}"#,
                "size=1",
            ),
            (
                &none,
                r#"{"destination":"/x","type":"bind","source":"/y","options":["bind","idmap"]}"#,
                "a user namespace",
            ),
            (
                &own,
                r#"{"destination":"/x","type":"bind","source":"/y","options":["idmap"],"uidMappings":[{"containerID":0,"hostID":1,"size":1}]}"#,
                "give it both",
            ),
            (
                &none,
                r#"{"destination":"/x","type":"tmpfs","uidMappings":[{"containerID":0,"hostID":1,"size":1}],"gidMappings":[{"containerID":0,"hostID":1,"size":1}]}"#,
                "no bind",
            ),
            (
                &own,
                r#"{"destination":"/x","type":"tmpfs","options":["idmap"]}"#,
                "mapped identities",
            ),
        ] {
            match Mount::new(&serde_json::from_str(bad).unwrap(), own) {
                Err(Error::InvalidArgument(text)) => assert!(text.contains(why), "{bad}: {text}"),
                other => panic!("{bad}: {other:?}"),
            }
        }
    }
}
