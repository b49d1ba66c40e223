//! `containerd-shim-bulkhead-v2`: the shim that containerd starts, one per pod.

use std::fmt::Display;
use std::io::{self, Read, Write};
use std::process::ExitCode;

use bulkhead_shim::args::{self, Action, Args, Invocation};
use bulkhead_shim::{bootstrap, delete, info, serve};

fn main() -> ExitCode {
    let invocation = match args::parse(std::env::args().skip(1)) {
        Ok(invocation) => invocation,
        Err(error) => return fail(&error),
    };
    match invocation {
        Invocation::Version => print(info::version().as_bytes()),
        Invocation::Info => {
            // Options may come in, which change nothing in the answer.
            let _ = io::stdin().lock().read_to_end(&mut Vec::new());
            answer(info::runtime_info())
        }
        Invocation::Action(Action::Start, args) => start(&args),
        Invocation::Action(Action::Delete, args) => answer(delete::delete(&args)),
        Invocation::Action(Action::Serve, args) => match serve::serve(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
    }
}

/// containerd reads standard output and error of `start` as one text: the address, or, if it fails, the reason.
fn start(args: &Args) -> ExitCode {
    match bootstrap::start(args) {
        Ok(reply) => print(&reply),
        Err(error) => {
            print(error.to_string().as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn answer<E: Display>(answer: Result<Vec<u8>, E>) -> ExitCode {
    match answer {
        Ok(bytes) => print(&bytes),
        Err(error) => fail(&error),
    }
}

fn print(bytes: &[u8]) -> ExitCode {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &dyn Display) -> ExitCode {
    // Nobody may be there to read it, and then the exit code has to do.
    let _ = writeln!(io::stderr(), "{error}");
    ExitCode::FAILURE
}
