//! When the guest gets the network of its pod: as late as it can be, so that nothing is missed that is put into the network namespace
//! between Create and Start.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::Tasks;
use crate::annotations::Kind;
use crate::error::Error;
use crate::network;
use crate::process::Phase;
use crate::spec::Spec;

impl Tasks {
    /// Gives the guest what the network namespace of a container holds that is about to start, unless it is one of several in a pod,
    /// or something has started before.
    pub(super) async fn connect_network(&self, id: &str) -> Result<(), Error> {
        let found = self.with(id, |container| {
            let first = container.init.phase == Phase::Created && container.kind != Kind::Member;
            Ok(first.then(|| (container.bundle.clone(), container.pid)))
        })?;
        let Some((bundle, pid)) = found else {
            return Ok(());
        };
        let path = match named(Path::new(&bundle))? {
            Some(path) => path,
            None => format!("/proc/{pid}/ns/net").into(),
        };
        let namespace = File::open(&path).map_err(failed("open", path))?;
        self.sandbox.connect(namespace.into(), self.home()).await
    }

    /// Takes away what is left of the network on the host.
    pub(super) fn disconnect_network(&self) {
        if let Err(error) = network::disconnect(&self.home()) {
            log::warn!("something of the network stays: {error}");
        }
    }

    /// The bundle of the shim's first task.
    fn home(&self) -> PathBuf {
        let home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        home.bundle.clone()
    }
}

/// The network namespace that a bundle names; none if it is to have a new one.
fn named(bundle: &Path) -> Result<Option<PathBuf>, Error> {
    let path = bundle.join("config.json");
    let json = std::fs::read(&path).map_err(failed("read", path))?;
    Ok(Spec::parse(&json)?.network()?)
}

fn failed(operation: &'static str, path: PathBuf) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Io {
        operation,
        path,
        source,
    }
}
