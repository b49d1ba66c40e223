//! Which network a container is in, and when the guest gets that of its pod: as late as it can be, so that nothing is missed that is put
//! into the network namespace between Create and Start.
//!
//! A machine has one network, and the first container decides which. Later ones are in it if they name its namespace, or have one of their
//! own in the guest, with nothing in it but the loopback interface, if they name none.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, PoisonError};

use tokio::task::JoinHandle;

use super::Tasks;
use crate::annotations::Kind;
use crate::error::Error;
use crate::network;
use crate::process::Phase;
use crate::spec;

/// What the machine has its network from, and how many containers are being created that rely on it.
#[derive(Debug, Default)]
pub(super) struct MachineNetwork {
    source: Source,
    placements: usize,
}

/// The network namespace of the host whose contents are the machine's network.
#[derive(Debug, Default)]
enum Source {
    /// That of the first container, which has not come yet.
    #[default]
    Undecided,
    /// A new one, which nobody can name yet.
    New,
    /// This one. It stays for as long as it is here, so that no other is taken for it.
    Namespace(Arc<OwnedFd>),
}

/// Where a container is that is being created. If there is no machine when the last of these is dropped, the next container is the first
/// again.
#[derive(Debug)]
pub(super) struct Placement<'a> {
    /// Its network namespace on the host, if that is there already.
    pub(super) namespace: Option<Arc<OwnedFd>>,
    /// Whether it has a network namespace of its own in the guest.
    pub(super) is_own: bool,
    tasks: &'a Tasks,
}

impl Placement<'_> {
    /// Notes the namespace that was made for want of one.
    pub(super) fn made(&self, namespace: &Arc<OwnedFd>) {
        if !self.is_own {
            self.tasks.machine_network().source = Source::Namespace(Arc::clone(namespace));
        }
    }
}

impl Drop for Placement<'_> {
    fn drop(&mut self) {
        let mut network = self.tasks.machine_network();
        network.placements -= 1;
        if network.placements == 0 && !self.tasks.sandbox.exists() {
            network.source = Source::Undecided;
        }
    }
}

impl MachineNetwork {
    /// Whether a namespace is the machine's, by whatever name it was found. One that cannot be looked at is not.
    fn is(&self, namespace: &Arc<OwnedFd>) -> bool {
        let Source::Namespace(own) = &self.source else {
            return false;
        };
        let identity = |namespace: &OwnedFd| {
            let found = rustix::fs::fstat(namespace).ok()?;
            Some((found.st_dev, found.st_ino))
        };
        let same = || identity(own).is_some_and(|own| identity(namespace) == Some(own));
        Arc::ptr_eq(own, namespace) || same()
    }
}

impl Tasks {
    /// Finds out where a container is whose network namespace has this path; without one it wants a new one.
    ///
    /// # Errors
    ///
    /// There is no such namespace, or it is another than the machine's, which cannot be in two.
    pub(super) fn place(&self, path: Option<&Path>) -> Result<Placement<'_>, Error> {
        let namespace = path.map(open).transpose()?;
        let mut network = self.machine_network();
        let is_own = match (&network.source, path, &namespace) {
            (Source::Undecided, _, first) => {
                network.source = first.clone().map_or(Source::New, Source::Namespace);
                false
            }
            (_, Some(path), Some(namespace)) if !network.is(namespace) => {
                return Err(spec::Error::ForeignNetwork(path.to_owned()).into());
            }
            _ => namespace.is_none(),
        };
        network.placements += 1;
        Ok(Placement {
            namespace,
            is_own,
            tasks: self,
        })
    }

    fn machine_network(&self) -> MutexGuard<'_, MachineNetwork> {
        self.network.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest what the network namespace of a container holds that is about to start, unless it is one of several in a pod,
    /// or in another network than the machine's, or something has started before.
    pub(super) async fn connect_network(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let found = self.with(id, |container| {
            let first = container.init.phase == Phase::Created
                && container.kind != Kind::Member
                && self.machine_network().is(&container.network);
            let settings = &container.late_sysctls;
            Ok(first.then(|| (Arc::clone(&container.network), settings.clone())))
        })?;
        let Some((namespace, settings)) = found else {
            return Ok(());
        };
        let namespace = namespace.try_clone().map_err(Error::StandIn)?;
        if let Some(follower) = self.sandbox.connect(namespace, self.home()).await? {
            let tasks = Arc::clone(self);
            let following = tokio::spawn(async move { follower.run(&tasks.sandbox).await });
            *self.following() = Some(following);
        }
        self.sandbox.set(settings).await
    }

    /// Takes away what is left of the network on the host. The machine has ended.
    pub(super) async fn disconnect_network(&self) {
        let following = self.following().take();
        if let Some(following) = following {
            // It ends with the machine. If it has failed, there is nothing to wait for.
            let _ = following.await;
        }
        if let Err(error) = network::disconnect(&self.home()) {
            log::warn!("something of the network stays: {error}");
        }
    }

    fn following(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.following
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The bundle of the shim's first task.
    fn home(&self) -> PathBuf {
        let home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        home.bundle.clone()
    }
}

fn open(path: &Path) -> Result<Arc<OwnedFd>, Error> {
    let opened = File::open(path).map_err(|source| Error::Io {
        operation: "open the network namespace",
        path: path.to_owned(),
        source,
    });
    Ok(Arc::new(opened?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Publisher;

    fn tasks() -> Arc<Tasks> {
        let nowhere = PathBuf::from("/nonexistent");
        Tasks::new("n", Publisher::to_nobody(), nowhere.clone(), nowhere).unwrap()
    }

    /// What can be told apart as namespaces can.
    fn namespaces() -> (tempfile::TempDir, [PathBuf; 3]) {
        let directory = tempfile::tempdir().unwrap();
        let [one, same, other] = ["one", "same", "other"].map(|name| directory.path().join(name));
        std::fs::write(&one, "").unwrap();
        std::fs::hard_link(&one, &same).unwrap();
        std::fs::write(&other, "").unwrap();
        (directory, [one, same, other])
    }

    #[tokio::test]
    async fn later_containers_are_in_the_first_ones_network_or_in_their_own() {
        let tasks = tasks();
        let (_directory, [one, same, other]) = namespaces();
        let first = tasks.place(Some(&one)).unwrap();
        assert!(!first.is_own);
        assert!(!tasks.place(Some(&same)).unwrap().is_own);
        let own = tasks.place(None).unwrap();
        assert!(own.is_own && own.namespace.is_none());
        let refused = tasks.place(Some(&other)).unwrap_err();
        assert_eq!(refused.code(), ttrpc::Code::INVALID_ARGUMENT);
        let path = other.display().to_string();
        assert!(refused.to_string().contains(&path), "{refused}");
    }

    #[tokio::test]
    async fn a_new_network_is_the_machines_once_it_is_made() {
        let tasks = tasks();
        let (_directory, [one, same, _]) = namespaces();
        let first = tasks.place(None).unwrap();
        assert!(!first.is_own);
        // Nobody can know its name yet.
        assert!(tasks.place(Some(&one)).is_err());
        first.made(&open(&one).unwrap());
        assert!(!tasks.place(Some(&same)).unwrap().is_own);
        let later = tasks.place(None).unwrap();
        assert!(later.is_own);
        // What is made for another is its own.
        later.made(&open(&same).unwrap());
        assert!(tasks.machine_network().is(&open(&one).unwrap()));
    }

    #[tokio::test]
    async fn the_first_one_decides_for_those_that_come_while_it_fails() {
        let tasks = tasks();
        let (_directory, [one, same, other]) = namespaces();
        let first = tasks.place(Some(&one)).unwrap();
        let second = tasks.place(Some(&same)).unwrap();
        drop(first);
        assert!(tasks.place(Some(&other)).is_err());
        assert!(tasks.machine_network().is(&open(&one).unwrap()));
        drop(second);
        assert!(tasks.place(Some(&other)).is_ok());
    }

    #[tokio::test]
    async fn without_a_machine_the_next_container_is_the_first() {
        let tasks = tasks();
        let (_directory, [one, _, other]) = namespaces();
        drop(tasks.place(Some(&one)).unwrap());
        assert!(!tasks.place(Some(&other)).unwrap().is_own);
        assert!(!tasks.place(None).unwrap().is_own);
        assert!(tasks.place(Some(&other.join("none"))).is_err());
    }
}
