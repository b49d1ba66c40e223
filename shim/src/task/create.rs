//! Making containers, and the machine for the first of them.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, PoisonError, Weak};

use bulkhead_agent::protocol::SPEC_TYPE_URL;
use bulkhead_vmm::launch::unique_uid;
use containerd_shim_protos::api::{CreateTaskRequest, Mount};
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use ttrpc::context::Context;

use super::Tasks;
use crate::annotations::Kind;
use crate::args::is_identifier;
use crate::backing::Backing;
use crate::cgroup;
use crate::config::Config;
use crate::container::Container;
use crate::disk::DiskFiles;
use crate::error::Error;
use crate::hooks::Stage;
use crate::machine::{self, CMDLINE, Machine, MachineSpec, Reason};
use crate::options::Options;
use crate::process::Process;
use crate::rootfs::binds::Binds;
use crate::rootfs::{self, Mounts, Rootfs};
use crate::sizing::{self, Host};
use crate::spec::{Spec, Sysctls};
use crate::state::{ProcessId, State, release_poststop};
use crate::streams::{Ends, Stdio, Streams};

/// What a container is made from.
struct Bundled<'a> {
    request: &'a CreateTaskRequest,
    config: &'a Config,
    spec: &'a Spec<'a>,
    annotations: &'a HashMap<String, String>,
    for_guest: Vec<u8>,
    sysctls: Sysctls,
    binds: Binds,
}

impl Tasks {
    /// Makes a container, and returns the number of the host's process that stands for it. If its client, which holds the other end of
    /// `client`, is gone by then, the container is deleted: containerd takes it for one that could not be made.
    pub(super) async fn create(
        self: &Arc<Self>,
        request: CreateTaskRequest,
        client: Weak<()>,
    ) -> Result<u32, Error> {
        check(&request)?;
        let reservation = self.reserve(&request.id)?;
        let bundle = PathBuf::from(&request.bundle);
        let path = bundle.join("config.json");
        let json = std::fs::read(&path).map_err(failed("read", path))?;
        let spec = Spec::parse(&json)?;
        let annotations = spec.annotations()?;
        let kind = Kind::of(&annotations)?;
        let config = load_config(request.options.as_ref(), &bundle)?;
        if kind == Kind::Member {
            self.sandbox.machine()?;
        }
        // What the guest cannot do is refused before there is one.
        let network = self.place(spec.network()?.as_deref())?;
        let comes_later = kind != Kind::Member && !network.is_own;
        let [sysctls, late_sysctls] = spec.sysctls(comes_later)?;
        let backing = backing(&config, &request);
        let (for_guest, binds) = match kind {
            Kind::Sandbox => {
                spec.check_sandbox()?;
                (Vec::new(), Binds::default())
            }
            Kind::Member | Kind::Single => {
                let binds = Binds::open(spec.binds(&bundle)?).map_err(rootfs::Error::from)?;
                let owner = |path: &Path| self.owner_of_namespace(path);
                let for_guest =
                    spec.for_guest(binds.in_guest(), owner, network.is_own, &sysctls, &backing)?;
                (for_guest, binds)
            }
        };
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let hooks = spec.hooks(&request.id, &request.bundle)?;
        if kind != Kind::Member {
            self.enter_cgroup(&spec.cgroups_path()?)?;
        }
        let (stand_in, namespace) = self.stand_in_for_init(&request.id, &network)?;
        let pid = stand_in.pid();
        let bundled = Bundled {
            request: &request,
            config: &config,
            spec: &spec,
            annotations: &annotations,
            for_guest,
            sysctls,
            binds,
        };
        release_poststop(&bundle);
        let made = async {
            for stage in [Stage::Prestart, Stage::CreateRuntime] {
                hooks.run(stage, Some(pid)).await?;
            }
            self.make(kind, bundled, &stdio).await
        };
        let (streams, slots) = match made.await {
            Ok(made) => made,
            Err(error) => {
                drop(stand_in);
                hooks.run_last().await;
                return Err(error);
            }
        };
        let mut init = Process::new(stdio, streams);
        init.represent(stand_in);
        let container = Container {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            kind,
            network: namespace,
            late_sysctls,
            hooks,
            backing,
            slots,
            init,
            execs: HashMap::new(),
            adding: HashSet::new(),
            drained: false,
            overdue: false,
            given_up: false,
            last_oom: None,
        };
        let id = request.id.clone();
        reservation.fill(container, |events| events.publish(&created(request, pid)));
        self.watch_stand_in(&id, "");
        if kind != Kind::Sandbox {
            self.watch(&id, "");
        }
        if client.strong_count() == 0 {
            log::warn!("container {id:?} is deleted: the client that wanted it did not wait");
            self.discard(&id).await?;
        }
        Ok(pid)
    }

    /// Makes a container in its machine, which is started if it is not there, and returns its streams at work and the slots of its disks.
    async fn make(
        self: &Arc<Self>,
        kind: Kind,
        bundled: Bundled<'_>,
        stdio: &Stdio,
    ) -> Result<(Option<Streams>, Vec<u8>), Error> {
        let Bundled {
            request,
            config,
            spec,
            annotations,
            for_guest,
            sysctls,
            binds,
        } = bundled;
        if kind == Kind::Sandbox {
            self.boot(config, spec, annotations, Vec::new()).await?;
            // The pod's settings: it has no process in the guest that would make them.
            self.sandbox.set(sysctls).await?;
            return Ok((None, Vec::new()));
        }
        let ends = Ends::open(stdio, &self.owner(&request.id)).await?;
        let files = rootfs::prepare(config, &request.id, root(request, spec)?, binds);
        let (files, slots) = if kind == Kind::Single {
            self.boot_for(config, spec, annotations, files).await?
        } else {
            let (disks, mounts) = files.await?.into_parts();
            (mounts, self.sandbox.attach(disks).await?)
        };
        let created = async {
            let (vmm, resources) = (self.sandbox.machine()?.pid(), spec.resources()?);
            self.affinity.set(&request.id, vmm, resources.as_ref())?;
            self.create_in_guest(request, for_guest, ends, files.at(&slots))
                .await
        };
        match created.await {
            Ok(streams) => Ok((Some(streams), slots)),
            Err(error) => {
                self.sandbox.detach(&slots).await;
                Err(error)
            }
        }
    }

    /// Starts the machine for a container, with its files, and returns them and the slots of their disks.
    ///
    /// Files that are at hand are there when the machine boots, which spares the guest a scan of its bus. Images that have to be built
    /// are built while it boots.
    async fn boot_for(
        self: &Arc<Self>,
        config: &Config,
        spec: &Spec<'_>,
        annotations: &HashMap<String, String>,
        files: impl Future<Output = Result<Rootfs, rootfs::Error>>,
    ) -> Result<(Mounts, Vec<u8>), Error> {
        let mut files = pin!(files);
        let at_hand = tokio::select! {
            biased;
            files = &mut files => Some(files?.into_parts()),
            () = std::future::ready(()) => None,
        };
        if let Some((disks, mounts)) = at_hand {
            let slots = self.boot(config, spec, annotations, disks).await?;
            return Ok((mounts, slots));
        }
        let boot = self.boot(config, spec, annotations, Vec::new());
        let (_, files) = tokio::try_join!(boot, async { Ok(files.await?) })?;
        let (disks, mounts) = files.into_parts();
        Ok((mounts, self.sandbox.attach(disks).await?))
    }

    /// Starts the machine, unless it runs (containers without a pod may share one), and returns the slots of these disks.
    async fn boot(
        self: &Arc<Self>,
        config: &Config,
        spec: &Spec<'_>,
        annotations: &HashMap<String, String>,
        mut disks: Vec<DiskFiles>,
    ) -> Result<Vec<u8>, Error> {
        let mut is_new = false;
        let machine_spec = async {
            is_new = true;
            let resources = spec.resources()?;
            let size = sizing::size(annotations, resources.as_ref(), config, Host::read()?)?;
            disks.insert(0, rootfs::scratch(config).await?);
            let mut cmdline = CMDLINE.to_owned();
            if !config.kernel_params.is_empty() {
                cmdline.push(' ');
                cmdline.push_str(&config.kernel_params);
            }
            Ok(MachineSpec {
                vmm: config.vmm.clone(),
                kernel: config.kernel.clone(),
                image: config.image.clone(),
                uid: unique_uid(config.uid_base).map_err(machine::Error::from)?,
                vcpus: size.vcpus,
                memory_mib: size.memory_mib,
                cmdline,
                disks: std::mem::take(&mut disks),
                boot_timeout: config.boot_timeout(),
                allow_foreign_sources: config.allow_foreign_sources,
            })
        };
        let machine = self.sandbox.boot(machine_spec, spec.hostname()?).await?;
        if is_new {
            self.watch_machine(machine);
            // The first is the scratch disk.
            return Ok(machine.disk_slots().iter().skip(1).copied().collect());
        }
        self.sandbox.attach(disks).await
    }

    /// Moves the shim, and so the machine, into the pod's control group. What is left of it if the shim is killed is written down first.
    fn enter_cgroup(&self, cgroups_path: &str) -> Result<(), Error> {
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        if home.stay.is_some() {
            return Ok(());
        }
        let directory = cgroup::directory(cgroups_path)?;
        let state = State {
            shim: ProcessId::of(std::process::id() as i32)
                .map_err(failed("identify", "/proc/self"))?,
            socket: home.socket.clone(),
            cgroup: directory.clone(),
        };
        state
            .write(&home.bundle)
            .map_err(failed("write the shim's state into", &home.bundle))?;
        if let Some(directory) = directory {
            home.stay = Some(cgroup::enter(&directory)?);
        }
        Ok(())
    }

    /// Waits for the machine's end, and for what its kernel tells, as long as it runs.
    fn watch_machine(self: &Arc<Self>, machine: &Machine) {
        let stopped = machine.stopped();
        let tasks = Arc::clone(self);
        tokio::spawn(async move {
            let stopped = stopped.await;
            match stopped.reason {
                Reason::Requested => log::info!("the microVM is stopped"),
                _ => log::error!("the microVM ended: {stopped}"),
            }
            tasks.machine_ended();
        });
        let tasks = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                match tasks.sandbox.next_oom().await {
                    Ok(id) => tasks.out_of_memory(&id),
                    Err(Error::Disconnected(_)) => {}
                    Err(Error::Machine(_)) => return,
                    Err(error) => return log::error!("want of memory will not be told: {error}"),
                }
            }
        });
    }

    /// Brings a container's streams to the guest, and has it made there.
    async fn create_in_guest(
        &self,
        request: &CreateTaskRequest,
        spec: Vec<u8>,
        ends: Ends,
        rootfs: Vec<Mount>,
    ) -> Result<Streams, Error> {
        let (streams, names) = self.sandbox.copy(ends).await?;
        let request = CreateTaskRequest {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs,
            terminal: request.terminal,
            stdin: names.stdin,
            stdout: names.stdout,
            stderr: names.stderr,
            options: MessageField::some(Any {
                type_url: SPEC_TYPE_URL.into(),
                value: spec,
                ..Default::default()
            }),
            ..Default::default()
        };
        self.sandbox
            .ask(|agent| async move { agent.create(Context::default(), &request).await })
            .await?;
        Ok(streams)
    }
}

fn check(request: &CreateTaskRequest) -> Result<(), Error> {
    if !is_identifier(&request.id) {
        return Err(Error::Invalid {
            field: "id",
            value: request.id.clone(),
            problem: "no identifier",
        });
    }
    if !request.checkpoint.is_empty() {
        return Err(Error::Unsupported("restoring a microVM's container"));
    }
    Ok(())
}

/// The configuration that the options name, or the one at the usual place.
fn load_config(options: Option<&Any>, bundle: &Path) -> Result<Config, Error> {
    let options = Options::parse(options)?;
    if !options.config_body.is_empty() && options.config_path.is_empty() {
        return Ok(Config::parse(
            &options.config_body,
            &bundle.join("options"),
        )?);
    }
    let path = Some(Path::new(&options.config_path)).filter(|path| !path.as_os_str().is_empty());
    Ok(Config::load(path)?)
}

/// Where the disks of a container will be: what is attached as it is lies where it is, all other layers in the cache.
fn backing(config: &Config, request: &CreateTaskRequest) -> Backing {
    let attached = |mount: &&Mount| matches!(mount.type_.as_str(), "erofs" | "ext4" | "xfs");
    let attached = request.rootfs.iter().filter(attached);
    let mut layers: Vec<_> = attached.map(|mount| PathBuf::from(&mount.source)).collect();
    if layers.is_empty() {
        layers.push(config.cache_dir.clone());
    }
    Backing {
        scratch: config.scratch_dir.clone(),
        layers,
    }
}

/// The mounts that make the root file system: those of the request, or else the directory that the specification names, where whoever
/// called has mounted it.
fn root(request: &CreateTaskRequest, spec: &Spec<'_>) -> Result<Vec<Mount>, Error> {
    if !request.rootfs.is_empty() {
        return Ok(request.rootfs.clone());
    }
    let path = Path::new(&request.bundle).join(spec.root()?.path());
    let source = path
        .into_os_string()
        .into_string()
        .map_err(|path| Error::Invalid {
            field: "root.path",
            value: path.to_string_lossy().into_owned(),
            problem: "no UTF-8",
        })?;
    Ok(vec![Mount {
        type_: "bind".into(),
        source,
        options: vec!["rbind".into()],
        ..Default::default()
    }])
}

fn created(request: CreateTaskRequest, pid: u32) -> TaskCreate {
    TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: MessageField::some(TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..Default::default()
        }),
        checkpoint: request.checkpoint,
        pid,
        ..Default::default()
    }
}

fn failed(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io {
        operation,
        path,
        source,
    }
}
