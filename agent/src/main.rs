//! `bulkhead-agent`: PID 1 of a Bulkhead guest.
//!
//! It must not end: when it does the kernel panics, and the VMM tells the host so, with these last words on the console.

use std::sync::Arc;

use bulkhead_agent::agent::Agent;
use bulkhead_agent::error::{Context, Error};
use bulkhead_agent::protocol::{AGENT_PORT, STREAM_PORT};
use bulkhead_agent::socket::{self, Socket};
use bulkhead_agent::streams::Streams;
use bulkhead_agent::{init, serve};

/// The host's vsock context identifier.
const HOST: u32 = 2;

fn main() {
    let error = match run() {
        Ok(never) => match never {},
        Err(error) => error,
    };
    eprintln!("bulkhead-agent: {error}");
    std::process::exit(1);
}

fn run() -> Result<std::convert::Infallible, Error> {
    if std::process::id() != 1 {
        return Err(Error::FailedPrecondition(
            "this is the first process of a Bulkhead guest, and does nothing elsewhere".into(),
        ));
    }
    init::protect().context(|| "protecting this process".into())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.context(|| "starting the runtime".into())?.block_on(async {
        let paths = init::prepare()?;
        let agent = Agent::new(paths)?;
        let listener = socket::listen(STREAM_PORT);
        let listener = listener.context(|| "listening for streams".into())?;
        let streams = agent.streams.clone();
        tokio::select! {
            error = accept(&listener, streams) => Err(error).context(|| "accepting streams".into()),
            error = serve::serve(agent, || socket::dial(HOST, AGENT_PORT)) => {
                Err(error).context(|| "serving the host".into())
            }
        }
    })
}

/// Takes streams. Returns only when it fails.
async fn accept(
    listener: &tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>,
    streams: Arc<Streams>,
) -> std::io::Error {
    loop {
        match socket::accept(listener).await.and_then(Socket::new) {
            Ok(stream) => drop(tokio::spawn(streams.clone().offer(stream))),
            Err(error) => return error,
        }
    }
}
