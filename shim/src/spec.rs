//! A container's `config.json`: what the shim reads in it, and what the guest is given of it.
//!
//! The parts that the shim has no business with (the seccomp filter is most of the text) are never parsed here and go on as they came, fields
//! that this version does not know included: it is the agent that carries them out or refuses them.

mod devices;
mod resources;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use bulkhead_agent::protocol::namespace_of;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Root};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};

use crate::backing::{self, Backing};
use crate::hooks::{Hooks, Stage, Subject};
use crate::rootfs::binds::Bind;

use resources::{for_host, guest_resources};

/// Settings of the kernel and their values (`linux.sysctl`).
pub type Sysctls = HashMap<String, String>;
pub use resources::{resources, resources_for_guest};

/// Why a container's specification cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("config.json: {field}: {source}")]
    Json {
        field: &'static str,
        source: serde_json::Error,
    },
    #[error(
        "the network namespace of the host was asked for, which a microVM cannot be in; give the container a network of its own"
    )]
    HostNetwork,
    #[error(
        "linux.namespaces has two entries of type {}: remove one", format!("{:?}", .0).to_lowercase()
    )]
    TwoNamespaces(LinuxNamespaceType),
    #[error(
        "linux.namespaces: {} is no namespace of this microVM: a container can share those of its own pod's containers only", .0.display()
    )]
    ForeignNamespace(PathBuf),
    #[error(
        "linux.namespaces: {} is not the network of this microVM, which has one only: give the container that of the microVM's first, or none (an entry without a path), or a microVM of its own", .0.display()
    )]
    ForeignNetwork(PathBuf),
    #[error(
        "linux.devices: {} is block device {major}:{minor}, and a microVM cannot reach the host's: remove it, or allow the container all devices (as --privileged does), which makes nodes for the machine's own", path.display()
    )]
    BlockDevice {
        path: PathBuf,
        major: i64,
        minor: i64,
    },
    #[error(
        "domainname is {0:?}: the machine of a pod has no domain name; give it to a container with a UTS namespace of its own"
    )]
    SandboxDomain(String),
    #[error(transparent)]
    Backing(#[from] backing::Error),
}

/// Fields of a JSON object, each as its text.
type Object<'a> = BTreeMap<String, Cow<'a, RawValue>>;

/// A `config.json`.
#[derive(Debug)]
pub struct Spec<'a> {
    fields: Object<'a>,
    linux: Object<'a>,
}

/// Fields of a process that name objects of the host's security modules: they confine it against the host's kernel, which it never meets.
const HOST_LABELS: [&str; 2] = ["apparmorProfile", "selinuxLabel"];

impl<'a> Spec<'a> {
    /// Reads the text of a `config.json`.
    pub fn parse(json: &'a [u8]) -> Result<Self, Error> {
        let fields = object("", json)?;
        let linux = match fields.get("linux") {
            Some(Cow::Borrowed(linux)) => object("linux", linux.get().as_bytes())?,
            _ => Object::new(),
        };
        Ok(Self { fields, linux })
    }

    /// The annotations; empty if there are none.
    pub fn annotations(&self) -> Result<HashMap<String, String>, Error> {
        Ok(part(&self.fields, "annotations")?.unwrap_or_default())
    }

    /// The host name; empty if there is none.
    pub fn hostname(&self) -> Result<String, Error> {
        Ok(part(&self.fields, "hostname")?.unwrap_or_default())
    }

    /// Refuses what the sandbox of a pod cannot have. Its text never reaches the guest, so the agent cannot do so.
    pub fn check_sandbox(&self) -> Result<(), Error> {
        let name: String = part(&self.fields, "domainname")?.unwrap_or_default();
        if name.is_empty() {
            return Ok(());
        }
        Err(Error::SandboxDomain(name))
    }

    /// The root file system.
    pub fn root(&self) -> Result<Root, Error> {
        Ok(part(&self.fields, "root")?.unwrap_or_default())
    }

    /// The control group; empty if none is named.
    pub fn cgroups_path(&self) -> Result<String, Error> {
        Ok(part(&self.linux, "cgroupsPath")?.unwrap_or_default())
    }

    /// The settings of the kernel, and those among them that wait until there is a network: if it `comes_later`, those of its interfaces.
    pub fn sysctls(&self, comes_later: bool) -> Result<[Sysctls; 2], Error> {
        let all: Sysctls = part(&self.linux, "sysctl")?.unwrap_or_default();
        let (late, now) = all
            .into_iter()
            .partition(|(key, _)| comes_later && is_of_interface(key));
        Ok([now, late])
    }

    /// The limits, as the host reads them.
    pub fn resources(&self) -> Result<Option<LinuxResources>, Error> {
        Ok(part(&self.linux, "resources")?.map(for_host))
    }

    /// The namespaces: of no type more than one.
    fn namespaces(&self) -> Result<Vec<LinuxNamespace>, Error> {
        let namespaces: Vec<LinuxNamespace> = part(&self.linux, "namespaces")?.unwrap_or_default();
        let mut types = HashSet::new();
        match namespaces.iter().find(|entry| !types.insert(entry.typ())) {
            Some(second) => Err(Error::TwoNamespaces(second.typ())),
            None => Ok(namespaces),
        }
    }

    /// The network namespace on the host: one that is there, or a new one (`None`).
    ///
    /// # Errors
    ///
    /// A machine cannot be in the network of the host.
    pub fn network(&self) -> Result<Option<PathBuf>, Error> {
        let namespaces = self.namespaces()?;
        let network = |namespace: &&LinuxNamespace| namespace.typ() == LinuxNamespaceType::Network;
        let network = namespaces.iter().find(network).ok_or(Error::HostNetwork)?;
        let path = network.path().clone();
        Ok(path.filter(|path| !path.as_os_str().is_empty()))
    }

    /// The hooks that are programs of the host, and what they are told of a container and its bundle.
    pub fn hooks(&self, id: &str, bundle: &str) -> Result<Hooks, Error> {
        let Some(text) = self.fields.get("hooks") else {
            return Ok(Hooks::default());
        };
        let all = object("hooks", text.get().as_bytes())?;
        let mut programs = HashMap::new();
        for stage in Stage::ALL {
            if let Some(hooks) = part(&all, stage.name())? {
                programs.insert(stage.name(), hooks);
            }
        }
        let subject = Subject {
            oci_version: part(&self.fields, "ociVersion")?.unwrap_or_default(),
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            annotations: self.annotations()?,
        };
        Ok(Hooks { programs, subject })
    }

    /// What is bound of the host's files. A source that is no absolute path is one in the container's bundle.
    pub fn binds(&self, bundle: &Path) -> Result<Vec<Bind>, Error> {
        let mounts: Vec<Mount> = part(&self.fields, "mounts")?.unwrap_or_default();
        let mounts = mounts.iter().filter(|mount| is_of_host(mount));
        Ok(mounts
            .map(|mount| Bind {
                source: bundle.join(mount.source().as_deref().unwrap_or(Path::new(""))),
                destination: destination(mount),
                read_only: is_read_only(mount),
            })
            .collect())
    }

    /// The text for the guest: without what the host takes care of, and with mounts in the guest's terms: what is bound of the host's files is
    /// at these `places`, in the order of [`Self::binds`]. `owner` says which container a path of the host that stands for a namespace
    /// belongs to; none if that is the machine. The network is the machine's, unless the container has its `own_network`. The kernel's
    /// settings are these. Limits of the host's devices are those of the disks that `backing` says lie on them.
    ///
    /// # Errors
    ///
    /// What neither the host nor the guest can do is refused by name.
    pub fn for_guest(
        &self,
        places: Vec<PathBuf>,
        owner: impl Fn(&Path) -> Result<Option<String>, Error>,
        own_network: bool,
        sysctls: &Sysctls,
        backing: &Backing,
    ) -> Result<Vec<u8>, Error> {
        devices::check(&self.linux)?;
        let mut linux = self.linux.clone();
        linux.insert("sysctl".into(), to_text("sysctl", sysctls)?);
        let mut namespaces = self.namespaces()?;
        // Without an entry the network is the machine's. Namespaces of other kinds that have a path are too, as the agent takes it, unless
        // they are another container's.
        namespaces
            .retain(|namespace| own_network || namespace.typ() != LinuxNamespaceType::Network);
        for namespace in &mut namespaces {
            let shared = match namespace.typ() {
                LinuxNamespaceType::Cgroup
                | LinuxNamespaceType::Ipc
                | LinuxNamespaceType::Pid
                | LinuxNamespaceType::Uts => namespace.path().as_deref(),
                // The container's own, or refused by the agent.
                LinuxNamespaceType::Mount
                | LinuxNamespaceType::Network
                | LinuxNamespaceType::Time
                | LinuxNamespaceType::User => None,
            };
            let shared = shared.filter(|path| !path.as_os_str().is_empty());
            if let Some(container) = shared.map(&owner).transpose()?.flatten() {
                namespace.set_path(Some(namespace_of(&container).into()));
            }
        }
        let namespaces = to_text("namespaces", &namespaces)?;
        linux.insert("namespaces".into(), namespaces);
        linux.remove("mountLabel");
        if let Some(resources) = self.linux.get("resources") {
            let resources = guest_resources(resources.get().as_bytes(), backing)?;
            linux.insert("resources".into(), to_text("resources", &resources)?);
        }
        let mut fields = self.fields.clone();
        fields.insert("linux".into(), to_text("linux", &linux)?);
        if let Some(mounts) = part_borrowed::<Vec<&RawValue>>(&self.fields, "mounts")? {
            let mut places = places.into_iter();
            let mounts = mounts
                .into_iter()
                .map(|text| guest_mount(text, &mut places));
            let mounts = to_text("mounts", &mounts.collect::<Result<Vec<_>, _>>()?)?;
            fields.insert("mounts".into(), mounts);
        }
        if let Some(process) = self.fields.get("process") {
            let process = to_text("process", &unlabelled(process.get().as_bytes())?)?;
            fields.insert("process".into(), process);
        }
        serde_json::to_vec(&fields).map_err(json_error("config.json"))
    }
}

/// Whether a setting is one of a single network interface, which comes and goes with it (Linux, ip-sysctl.rst). Dots separate unless there
/// are slashes.
fn is_of_interface(key: &str) -> bool {
    let separator = if key.contains('/') { '/' } else { '.' };
    let parts: Vec<&str> = key.split(separator).collect();
    matches!(parts[..], ["net", _, "conf" | "neigh", name, ..] if !["all", "default", "lo"].contains(&name))
}

/// The text of an exec's process for the guest.
pub fn process_for_guest(json: &[u8]) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(&unlabelled(json)?).map_err(json_error("process"))
}

fn unlabelled(process: &[u8]) -> Result<Object<'_>, Error> {
    let mut process = object("process", process)?;
    for label in HOST_LABELS {
        process.remove(label);
    }
    Ok(process)
}

fn options(mount: &Mount) -> &[String] {
    mount.options().as_deref().unwrap_or_default()
}

/// Where it is mounted: below the root, if it is relative.
fn destination(mount: &Mount) -> PathBuf {
    Path::new("/").join(mount.destination())
}

fn is_bind(mount: &Mount) -> bool {
    let is_bind = |option: &String| option == "bind" || option == "rbind";
    mount.typ().as_deref() == Some("bind") || options(mount).iter().any(is_bind)
}

/// Whether it binds a file of the host.
fn is_of_host(mount: &Mount) -> bool {
    is_bind(mount) && shared_memory(mount).is_none()
}

/// The size in bytes of the host's tmpfs that is bound where programs expect memory to share. A guest has its own, as large.
fn shared_memory(mount: &Mount) -> Option<u64> {
    let source = mount.source().as_deref();
    // What is in a bundle is the container's, though bundles are on a tmpfs, too.
    let source = source.filter(|source| source.is_absolute());
    let source = source.filter(|_| destination(mount) == Path::new("/dev/shm"))?;
    let found = rustix::fs::statfs(source).ok()?;
    let size = found.f_blocks.checked_mul(found.f_bsize.try_into().ok()?)?;
    (found.f_type == TMPFS_MAGIC).then_some(size)
}

/// From `linux/magic.h`.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

fn is_read_only(mount: &Mount) -> bool {
    let said = options(mount).iter().rev();
    let mut said = said.filter_map(|option| match option.as_str() {
        "ro" | "rro" => Some(true),
        "rw" | "rrw" => Some(false),
        // The others say something else.
        _ => None,
    });
    said.next().unwrap_or(false)
}

/// Brings one mount into the guest's terms. What is bound of the host's files is at the next of `places`.
fn guest_mount<'a>(
    text: &'a RawValue,
    places: &mut impl Iterator<Item = PathBuf>,
) -> Result<Cow<'a, RawValue>, Error> {
    let mut mount: Mount = serde_json::from_str(text.get()).map_err(json_error("mounts"))?;
    if !is_bind(&mount) {
        return Ok(Cow::Borrowed(text));
    }
    if let Some(size) = shared_memory(&mount) {
        let size = format!("size={size}");
        let access = if is_read_only(&mount) { "ro" } else { "rw" };
        let options = ["nosuid", "noexec", "nodev", "mode=1777", &size, access];
        mount
            .set_typ(Some("tmpfs".into()))
            .set_source(Some("shm".into()))
            .set_options(Some(options.map(String::from).into()));
    } else {
        mount.set_source(places.next());
    }
    to_text("mounts", &mount)
}

fn object<'a>(field: &'static str, json: &'a [u8]) -> Result<Object<'a>, Error> {
    let fields: BTreeMap<String, &'a RawValue> =
        serde_json::from_slice(json).map_err(json_error(field))?;
    Ok(fields
        .into_iter()
        .map(|(name, value)| (name, Cow::Borrowed(value)))
        .collect())
}

fn part<T: DeserializeOwned>(object: &Object<'_>, field: &'static str) -> Result<Option<T>, Error> {
    part_borrowed(object, field)
}

fn part_borrowed<'o, T: serde::Deserialize<'o>>(
    object: &'o Object<'_>,
    field: &'static str,
) -> Result<Option<T>, Error> {
    match object.get(field) {
        Some(text) => serde_json::from_str(text.get()).map_err(json_error(field)),
        None => Ok(None),
    }
}

fn to_text(field: &'static str, value: &impl Serialize) -> Result<Cow<'static, RawValue>, Error> {
    to_raw_value(value)
        .map(Cow::Owned)
        .map_err(json_error(field))
}

fn json_error(field: &'static str) -> impl Fn(serde_json::Error) -> Error {
    move |source| Error::Json { field, source }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "hostname": "h",
            "root": {"path": "rootfs", "readonly": true},
            "annotations": {"a": "b"},
            "process": {"args": ["sh"], "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "x", "newField": {"x": [1]}},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind", "ro"]},
            ],
            "linux": {
                "mountLabel": "y",
                "sysctl": {"kernel.msgmax": "1"},
                "cgroupsPath": "/default/c1",
                "namespaces": [{"type": "network", "path": "/run/netns/x"}, {"type": "pid"}, {"type": "mount"}],
                "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "newField": 1e300},
            },
        })
    }

    fn guest(config: &Value) -> Result<Value, Error> {
        guest_in(false, config)
    }

    fn guest_in(own_network: bool, config: &Value) -> Result<Value, Error> {
        let text = config.to_string();
        let places = vec!["/there".into()];
        let owner = |path: &Path| {
            let name = path.to_str().unwrap();
            Ok(name.strip_prefix("/ns/of/").map(str::to_owned))
        };
        let spec = Spec::parse(text.as_bytes())?;
        let [sysctls, _] = spec.sysctls(!own_network)?;
        let guest = spec.for_guest(places, owner, own_network, &sysctls, &Backing::default())?;

        Ok(serde_json::from_slice(&guest).unwrap())
    }

    #[test]
    fn the_host_reads_its_parts() {
        let text = config().to_string();
        let spec = Spec::parse(text.as_bytes()).unwrap();
        assert_eq!(spec.hostname().unwrap(), "h");
        assert_eq!(spec.annotations().unwrap()["a"], "b");
        assert_eq!(spec.root().unwrap().path(), Path::new("rootfs"));
        assert!(spec.resources().unwrap().is_none());
        let [now, late] = spec.sysctls(true).unwrap();
        assert_eq!((now["kernel.msgmax"].as_str(), late.len()), ("1", 0));
        assert_eq!(spec.cgroups_path().unwrap(), "/default/c1");
        let empty = Spec::parse(b"{}").unwrap();
        assert!(empty.annotations().unwrap().is_empty() && empty.hostname().unwrap().is_empty());
    }

    #[test]
    fn the_guest_gets_the_rest_unchanged() {
        let config = config();
        let guest = guest(&config).unwrap();
        assert_eq!(
            guest["linux"]["namespaces"],
            json!([{"type": "pid"}, {"type": "mount"}])
        );
        assert_eq!(guest["linux"]["mountLabel"], Value::Null);
        assert_eq!(guest["linux"]["seccomp"], config["linux"]["seccomp"]);
        assert_eq!(
            guest["process"],
            json!({"args": ["sh"], "newField": {"x": [1]}})
        );
        assert_eq!(guest["mounts"][0]["type"], "proc");
        let shared = &guest["mounts"][1];
        assert_eq!(shared["type"], "tmpfs");
        let size = rustix::fs::statfs("/dev/shm").unwrap();
        let size = format!("size={}", size.f_blocks * size.f_bsize as u64);
        let options = shared["options"].as_array().unwrap();
        assert!(options.contains(&json!(size)) && options.contains(&json!("ro")));
        assert_eq!(guest["annotations"], config["annotations"]);
    }

    #[test]
    fn the_host_reads_networks_and_hooks() {
        let mut config = config();
        let network = |config: &Value| {
            let text = config.to_string();
            let network = Spec::parse(text.as_bytes()).unwrap().network();
            network.unwrap()
        };
        assert_eq!(network(&config), Some("/run/netns/x".into()));
        for new in [
            json!({"type": "network"}),
            json!({"type": "network", "path": ""}),
        ] {
            config["linux"]["namespaces"][0] = new;
            assert_eq!(network(&config), None);
        }
        config["hooks"] = json!({
            "poststop": [{"path": "/a"}, {"path": "/b", "timeout": 3}],
            "startContainer": [{"path": "/x"}],
        });
        let text = config.to_string();
        let hooks = Spec::parse(text.as_bytes())
            .unwrap()
            .hooks("c1", "/bundle")
            .unwrap();
        assert_eq!(hooks.programs.len(), 1);
        assert_eq!(hooks.programs["poststop"][1].timeout(), Some(3));
        assert_eq!(hooks.subject.oci_version, "1.2.0");
        assert_eq!(hooks.subject.annotations["a"], "b");
        // They are the host's as they are: the guest does not read them.
        assert!(guest(&config).is_ok());
    }

    #[test]
    fn settings_of_interfaces_wait_for_them() {
        let mut config = config();
        let early = json!({"net.ipv4.conf.all.tag": "1", "net/ipv4/neigh/lo/retrans_time_ms": "2", "net.core.somaxconn": "3"});
        let late = json!({"net.ipv4.conf.eth0.tag": "4", "net/ipv6/conf/eth0.1/mtu": "1400"});
        let mut all = early.clone();
        all.as_object_mut()
            .unwrap()
            .extend(late.as_object().unwrap().clone());
        config["linux"]["sysctl"] = all.clone();
        let text = config.to_string();
        let spec = Spec::parse(text.as_bytes()).unwrap();
        assert_eq!(json!(spec.sysctls(true).unwrap()), json!([early, late]));
        assert_eq!(json!(spec.sysctls(false).unwrap()), json!([all, {}]));
        assert_eq!(guest(&config).unwrap()["linux"]["sysctl"], early);
        assert_eq!(guest_in(true, &config).unwrap()["linux"]["sysctl"], all);
    }

    #[test]
    fn a_network_of_its_own_is_the_guests_business() {
        let mut config = config();
        config["linux"]["namespaces"] = json!([{"type": "network"}, {"type": "mount"}]);
        let own = guest_in(true, &config).unwrap();
        assert_eq!(own["linux"]["namespaces"], config["linux"]["namespaces"]);
        let machines = guest(&config).unwrap();
        assert_eq!(machines["linux"]["namespaces"], json!([{"type": "mount"}]));
    }

    #[test]
    fn namespaces_of_other_containers_are_named_by_them() {
        let mut shared = config();
        shared["linux"]["namespaces"] = json!([
            {"type": "mount"}, {"type": "pid", "path": "/ns/of/c2"}, {"type": "ipc", "path": "/run/ipc"}, {"type": "user", "path": "/ns/of/c2"}, {"type": "uts", "path": ""},
        ]);
        let guest = guest(&shared).unwrap();
        let namespaces = &guest["linux"]["namespaces"];
        assert_eq!(namespaces[1]["path"], "container:c2");
        for unchanged in [0, 2, 3] {
            let before = &shared["linux"]["namespaces"][unchanged];
            assert_eq!(&namespaces[unchanged], before);
        }
    }

    #[test]
    fn binds_have_other_sources_in_the_guest() {
        let mut mount = config();
        mount["mounts"][0] =
            json!({"destination": "/mnt", "source": "/data", "options": ["rbind", "rw", "ro"]});
        let text = mount.to_string();
        let binds = |text: &str| Spec::parse(text.as_bytes())?.binds(Path::new("/bundle"));
        let expected = |source: &str, destination: &str| Bind {
            source: source.into(),
            destination: destination.into(),
            read_only: true,
        };
        assert_eq!(binds(&text).unwrap(), [expected("/data", "/mnt")]);
        // Those of the bundle, wherever the shim is.
        let mut relative = mount.clone();
        relative["mounts"][0]["source"] = json!("data/file");
        relative["mounts"][1]["source"] = json!("shm");
        relative["mounts"][0]["destination"] = json!("mnt");
        assert_eq!(
            binds(&relative.to_string()).unwrap(),
            [
                expected("/bundle/data/file", "/mnt"),
                expected("/bundle/shm", "/dev/shm")
            ]
        );
        let guest = guest(&mount).unwrap();
        assert_eq!(guest["mounts"][0]["source"], "/there");
        assert_eq!(guest["mounts"][0]["options"], mount["mounts"][0]["options"]);
    }

    #[test]
    fn only_a_tmpfs_becomes_memory_to_share() {
        let mut config = config();
        config["mounts"][1]["destination"] = json!("dev/shm");
        assert_eq!(guest(&config).unwrap()["mounts"][1]["source"], "shm");
        config["mounts"][1]["source"] = json!("/etc");
        assert_eq!(guest(&config).unwrap()["mounts"][1]["source"], "/there");
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        let mut host = config();
        host["linux"]["namespaces"] = json!([{"type": "mount"}]);
        let text = host.to_string();
        let network = Spec::parse(text.as_bytes()).unwrap().network();
        assert!(matches!(network, Err(Error::HostNetwork)));
        for kind in [
            "network", "mount", "pid", "ipc", "uts", "user", "cgroup", "time",
        ] {
            let mut twice = config();
            twice["linux"]["namespaces"] =
                json!([{"type": "network"}, {"type": kind, "path": "/x"}, {"type": kind}]);
            let text = twice.to_string();
            let refused = Spec::parse(text.as_bytes()).unwrap().network().unwrap_err();
            assert!(matches!(refused, Error::TwoNamespaces(_)), "{refused}");
            assert!(refused.to_string().contains(kind), "{refused}");
            assert!(matches!(guest(&twice), Err(Error::TwoNamespaces(_))));
        }
        let sandbox = |text: &str| Spec::parse(text.as_bytes()).unwrap().check_sandbox();
        let refused = sandbox(r#"{"hostname":"h","domainname":"d"}"#).unwrap_err();
        assert!(refused.to_string().contains("domainname"), "{refused}");
        let code = crate::error::Error::from(refused).code();
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(sandbox(r#"{"hostname":"h","domainname":""}"#).is_ok());
        let mut broken = config();
        broken["mounts"] = json!("x");
        assert!(matches!(
            guest(&broken),
            Err(Error::Json {
                field: "mounts",
                ..
            })
        ));
        assert!(Spec::parse(b"[]").is_err());
        let mut disk = config();
        disk["linux"]["devices"] =
            json!([{"path": "/dev/disk", "type": "b", "major": 8, "minor": 0}]);
        let refused = guest(&disk);
        assert!(matches!(refused, Err(Error::BlockDevice { .. })));
    }

    #[test]
    fn limits_are_in_the_guests_terms() {
        let mut limited = config();
        limited["linux"]["resources"] =
            json!({"cpu": {"cpus": "4-7", "quota": 5}, "unified": {"cpuset.cpus": "2"}});
        let expected = json!({"cpu": {"quota": 5}, "unified": {}});
        assert_eq!(guest(&limited).unwrap()["linux"]["resources"], expected);
        let text = limited.to_string();
        let resources = Spec::parse(text.as_bytes()).unwrap().resources().unwrap();
        let cpu = resources.unwrap().cpu().clone().unwrap();
        assert_eq!(cpu.cpus().as_deref(), Some("2"));
    }

    #[test]
    fn an_exec_loses_its_labels_only() {
        let process = br#"{"args":["ls"],"apparmorProfile":"p","cwd":"/"}"#;
        let guest: Value = serde_json::from_slice(&process_for_guest(process).unwrap()).unwrap();
        assert_eq!(guest, json!({"args": ["ls"], "cwd": "/"}));
        assert!(process_for_guest(b"").is_err());
    }
}
