//! `serve`: the shim itself, from the first task's Create to the last one's Delete.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::args::Args;
use crate::bootstrap::inherited_listener;
use crate::events::Publisher;
use crate::logging;
use crate::task::{Tasks, services};

/// How long containerd may take for the last events. It gives Shutdown three seconds in all.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// How long the answer to the last request may take to leave.
const ANSWER_PATIENCE: Duration = Duration::from_millis(500);

/// The environment variable with the address of containerd's ttrpc API; empty under CRI-O, which takes no events.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// Serves the socket that is standard input until a client shuts the shim down, or a signal does.
pub fn serve(args: &Args) -> io::Result<()> {
    let (listener, socket) = inherited_listener()?;
    let bundle = std::env::current_dir()?;
    logging::init(&bundle.join("log"), &args.id, args.debug);
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
    // It was started as /proc/self/exe, and would be called "exe". A name has 15 characters.
    let _ = rustix::thread::set_name(c"containerd-shim");
    // Without a session of its own it would get the signals of whoever started containerd by hand. It fails only for a process that
    // leads a group already, which is as good.
    let _ = nix::unistd::setsid();
    if let Err(error) = outlive_containerd() {
        log::warn!("the kernel's choice when memory runs out is not adjusted: {error}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let served = runtime.block_on(run(args, listener, &socket, bundle));
    if let Err(error) = &served {
        log::error!("the shim ends: {error}");
    }
    served
}

async fn run(
    args: &Args,
    listener: UnixListener,
    socket: &Path,
    bundle: PathBuf,
) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let address = std::env::var(TTRPC_ADDRESS).unwrap_or_default();
    let events = Publisher::new(&args.namespace, &address);
    let tasks = Tasks::new(&args.namespace, events.clone(), bundle, socket.to_owned())?;
    let mut server = Server::new()
        .add_listener(Listener::try_from(listener)?)
        .register_service(services(tasks.clone()));
    server.start().await.map_err(io::Error::other)?;
    let why = tokio::select! {
        () = tasks.closed() => "it has no tasks any more",
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    log::info!("the shim ends: {why}");
    // From now on a `start` for the same group makes a new shim.
    if let Err(error) = std::fs::remove_file(socket) {
        log::warn!("the socket stays: {error}");
    }
    tasks.finish().await;
    if tokio::time::timeout(FLUSH_PATIENCE, events.flushed())
        .await
        .is_err()
    {
        log::error!("events are lost: containerd did not take them in {FLUSH_PATIENCE:?}");
    }
    let answered = tokio::time::timeout(ANSWER_PATIENCE, server.shutdown()).await;
    log::debug!("the last answer is on its way: {}", answered.is_ok());
    Ok(())
}

/// When memory runs out, the kernel shall choose this process before containerd, whose adjustment it has inherited.
fn outlive_containerd() -> io::Result<()> {
    const FILE: &str = "/proc/self/oom_score_adj";
    const LARGEST: i32 = 1000;
    let text = std::fs::read_to_string(FILE)?;
    let adjustment: i32 = text.trim().parse().map_err(io::Error::other)?;
    std::fs::write(FILE, (adjustment + 1).min(LARGEST).to_string())
}
