//! Starts a machine as the shim does, and says in how many milliseconds its agent was there. Needs root.
//!
//! ```text
//! machine --vmm bulkhead-vmm --kernel vmlinux --image rootfs.erofs --repeat 5
//! ```

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bulkhead_shim::machine::{Error, Machine, MachineSpec};
use bulkhead_vmm::launch::{DEFAULT_UID_BASE, unique_uid};
use clap::Parser;

#[derive(Parser)]
struct Arguments {
    #[arg(long)]
    vmm: PathBuf,
    #[arg(long)]
    kernel: PathBuf,
    #[arg(long)]
    image: PathBuf,
    #[arg(
        long,
        default_value = "console=ttyS0 quiet root=/dev/vda rootfstype=erofs ro reboot=k panic=-1"
    )]
    cmdline: String,
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// Memory in MiB.
    #[arg(long, default_value_t = 128)]
    memory: u32,
    /// How many machines, one after the other.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let arguments = Arguments::parse();
    for _ in 0..arguments.repeat {
        let start = Instant::now();
        let machine = Machine::start(MachineSpec {
            vmm: arguments.vmm.clone(),
            kernel: arguments.kernel.clone(),
            image: arguments.image.clone(),
            uid: unique_uid(DEFAULT_UID_BASE)?,
            vcpus: arguments.vcpus,
            memory_mib: arguments.memory,
            cmdline: arguments.cmdline.clone(),
            disks: Vec::new(),
            boot_timeout: Duration::from_secs(60),
            allow_foreign_sources: false,
        })
        .await;
        match machine {
            Ok(machine) => {
                println!("agent after {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
                let start = Instant::now();
                let stopped = machine.stop().await;
                println!(
                    "stopped after {:.1} ms",
                    start.elapsed().as_secs_f64() * 1e3
                );
                for line in &stopped.console {
                    println!("console: {line}");
                }
            }
            Err(error) => {
                println!(
                    "failed after {:.1} ms: {error}",
                    start.elapsed().as_secs_f64() * 1e3
                );
                return Err(error);
            }
        }
    }
    Ok(())
}
