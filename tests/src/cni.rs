//! Networks as a container manager has them made: by CNI's plugins, for a network namespace of the pod's own.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use rustix::mount::{UnmountFlags, unmount};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::error::{Context, Error, Result};
use crate::process;

/// Where Debian puts CNI's plugins.
pub const PLUGINS: &str = "/usr/lib/cni";

/// The version of CNI that networks are described in.
const VERSION: &str = "1.0.0";

/// A network namespace, with what plugins have made for it. It disappears with this.
#[derive(Debug)]
pub struct Pod {
    directory: TempDir,
    /// The calls of plugins that are to be undone.
    calls: Vec<PluginCall>,
}

/// One plugin's work for one interface.
#[derive(Debug)]
struct PluginCall {
    interface: String,
    config: Value,
}

impl Pod {
    /// A namespace in which there is the loopback interface and nothing else.
    pub fn new() -> Result<Self> {
        let directory = tempfile::tempdir().or_cannot("create a temporary directory")?;
        let pod = Self {
            directory,
            calls: Vec::new(),
        };
        let path = pod.path();
        File::create(&path).or_cannot(format!("create {}", path.display()))?;
        let mut unshare = Command::new("unshare");
        unshare.arg(format!("--net={}", path.display()));
        process::output(unshare.args(["ip", "link", "set", "lo", "up"]))?;
        // Addresses are in use at once, and not when nobody else is found to have them.
        pod.run(&["sysctl", "--quiet", "net.ipv6.conf.default.accept_dad=0"])?;
        Ok(pod)
    }

    /// The namespace's name.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("net")
    }

    /// The options by which `ctr run` puts a container into it.
    pub fn options(&self) -> [String; 2] {
        let network = format!("network:{}", self.path().display());
        ["--with-ns".into(), network]
    }

    /// Has a chain of plugins make an interface, and returns the last one's result.
    pub fn attach(&mut self, interface: &str, network: &str, plugins: &[Value]) -> Result<Value> {
        let mut result = Value::Null;
        for plugin in plugins {
            let mut config = plugin.clone();
            config["cniVersion"] = VERSION.into();
            config["name"] = network.into();
            if !result.is_null() {
                config["prevResult"] = result;
            }
            let call = PluginCall {
                interface: interface.into(),
                config,
            };
            let text = self.call("ADD", &call)?;
            result = serde_json::from_str(&text).unwrap_or_default();
            self.calls.push(call);
        }
        // As a container manager does, so that each plugin finds everything again.
        let last = json!({"prevResult": result});
        for call in self.calls.iter_mut().rev().take(plugins.len()) {
            call.config["prevResult"] = last["prevResult"].clone();
        }
        Ok(result)
    }

    /// Runs a program of the host's in the namespace, and returns its output.
    pub fn run(&self, command: &[&str]) -> Result<String> {
        let mut nsenter = Command::new("nsenter");
        nsenter.arg(format!("--net={}", self.path().display()));
        process::output(nsenter.args(command))
    }

    /// Does something in the namespace: sockets that it makes stay there.
    pub fn within<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T> {
        let path = self.path();
        let namespace = File::open(&path).or_cannot(format!("open {}", path.display()))?;
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), network)
                    .or_cannot(format!("enter {}", path.display()))?;
                Ok(act())
            });
            let died = |_| Error::Unfit("what was done in a network namespace failed".into());
            thread.join().map_err(died)?
        })
    }

    /// Has the plugins take everything away again.
    pub fn remove(mut self) -> Result<()> {
        self.clear()
    }

    fn clear(&mut self) -> Result<()> {
        let mut result = Ok(());
        while let Some(call) = self.calls.pop() {
            result = result.and(self.call("DEL", &call).map(drop));
            // The plugin leaves its bridge, whose addresses would be in the way of the next one with the same network.
            if let Some(bridge) = call.config["bridge"].as_str() {
                let mut ip = Command::new("ip");
                result = result.and(process::output(ip.args(["link", "delete", bridge])).map(drop));
            }
        }
        let path = self.path();
        // It is removed once.
        if path.exists() {
            let unmounted = unmount(&path, UnmountFlags::DETACH);
            let unmounted = unmounted.or_cannot(format!("unmount {}", path.display()));
            let removed = std::fs::remove_file(&path);
            let removed = removed.or_cannot(format!("remove {}", path.display()));
            result = result.and(unmounted).and(removed);
        }
        result
    }

    /// Calls a plugin (CNI, section 2).
    fn call(&self, what: &str, call: &PluginCall) -> Result<String> {
        let kind = call.config["type"].as_str().unwrap_or_default();
        let id = self.directory.path().file_name().unwrap_or_default();
        let failed = |cause: String| Error::Unfit(format!("CNI's {kind} failed ({what}): {cause}"));
        let mut plugin = Command::new(Path::new(PLUGINS).join(kind))
            .env("CNI_COMMAND", what)
            .env("CNI_CONTAINERID", id.to_string_lossy().replace('.', ""))
            .env("CNI_NETNS", self.path())
            .env("CNI_IFNAME", &call.interface)
            .env("CNI_PATH", PLUGINS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        if let Some(mut stdin) = plugin.stdin.take() {
            let config = call.config.to_string();
            let written = stdin.write_all(config.as_bytes());
            written.map_err(|error| failed(error.to_string()))?;
        }
        let output = plugin.wait_with_output();
        let output = output.map_err(|error| failed(error.to_string()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        Err(failed(format!("{text}{errors}")))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            eprintln!("{error}");
        }
    }
}
