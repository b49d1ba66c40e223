//! The annotations of `config.json` by which a Kubernetes runtime tells a pod's sandbox from its containers.

use std::collections::HashMap;

/// containerd's CRI plugin: the identifier of the pod's sandbox.
pub const CRI_SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// CRI-O: the identifier of the pod's sandbox.
pub const CRIO_SANDBOX_ID: &str = "io.kubernetes.cri-o.SandboxID";

/// The keys that hold a container's type: containerd's CRI plugin, CRI-O.
const TYPES: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// What a task is to the microVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The pause container of a pod: its life is the machine's, and it runs nothing itself.
    Sandbox,
    /// A container of a pod, in the machine of the pod's sandbox.
    Member,
    /// A container without a pod: the machine is there for it, and for others that containerd's client groups with it.
    Single,
}

/// A container type that is neither `sandbox` nor `container`.
#[derive(Debug, thiserror::Error)]
#[error("annotation {key} is {value:?}; known are \"sandbox\" and \"container\"")]
pub struct UnknownKind {
    key: &'static str,
    value: String,
}

impl Kind {
    /// Reads the kind of a task from its annotations.
    pub fn of(annotations: &HashMap<String, String>) -> Result<Self, UnknownKind> {
        for key in TYPES {
            match annotations.get(key).map(String::as_str) {
                None => {}
                Some("sandbox") => return Ok(Self::Sandbox),
                Some("container") => return Ok(Self::Member),
                Some(value) => {
                    return Err(UnknownKind {
                        key,
                        value: value.to_owned(),
                    });
                }
            }
        }
        Ok(Self::Single)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        let of = |key: &str, value: &str| Kind::of(&HashMap::from([(key.into(), value.into())]));
        assert_eq!(Kind::of(&HashMap::new()).unwrap(), Kind::Single);
        assert_eq!(of("a", "sandbox").unwrap(), Kind::Single);
        for key in TYPES {
            assert_eq!(of(key, "sandbox").unwrap(), Kind::Sandbox);
            assert_eq!(of(key, "container").unwrap(), Kind::Member);
            assert!(of(key, "pod").unwrap_err().to_string().contains(key));
        }
    }
}
