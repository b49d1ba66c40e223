//! Debian packages, from the mirror that the host's apt uses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::NamedTempFile;

use crate::error::{Context, Error, Result};
use crate::{process, step};

/// The release that the node and the test images are made from, whatever the host's is: tests then mean the same
/// everywhere. (Debian 12: containerd 1.6, Linux 6.1.)
pub const SUITE: &str = "bookworm";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What is kept out of a root file system: documentation, translations, character sets.
const WITHOUT: [&str; 5] = [
    "/usr/lib/x86_64-linux-gnu/gconv",
    "/usr/share/doc",
    "/usr/share/info",
    "/usr/share/locale",
    "/usr/share/man",
];

/// Installs those of `packages` that are missing on the host.
pub fn install(packages: &[&str]) -> Result<()> {
    let script = source_directory().join("tests/install");
    step::run("packages", Command::new(script).args(packages)).map(drop)
}

/// The top of the source tree.
pub fn source_directory() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Makes a root file system of the packages `include` and those of mmdebstrap's `variant`, and hands it to `hooks`
/// (mmdebstrap's customize hooks); writes it to `output` as a tar archive, or nowhere if that is /dev/null.
pub fn mmdebstrap(
    name: &str,
    variant: &str,
    include: &str,
    hooks: &[String],
    output: &Path,
) -> Result<()> {
    let sources = temporary(&sources_list()?)?;
    let settings = temporary(&apt_settings()?)?;
    let mut command = Command::new("mmdebstrap");
    command
        .arg("--architectures=amd64")
        .arg(format!("--variant={variant}"))
        .arg(format!("--include={include}"))
        .arg(format!("--aptopt={}", settings.path().display()))
        .env("SOURCE_DATE_EPOCH", "0");
    for directory in WITHOUT {
        command.arg(format!("--dpkgopt=path-exclude={directory}/*"));
    }
    for hook in hooks {
        command.arg(format!("--customize-hook={hook}"));
    }
    command.arg(SUITE).arg(output).arg(sources.path());
    step::run_into(name, &mut command, Stdio::null()).map(drop)
}

/// Fetches a package of the host's own release into `directory` and returns the file's path.
pub fn download(package: &str, directory: &Path) -> Result<PathBuf> {
    // apt must know the package.
    Mirrors::find()?;
    let mut command = Command::new("apt-get");
    command
        .args([
            "--quiet",
            "-o",
            "APT::Sandbox::User=root",
            "download",
            package,
        ])
        .current_dir(directory);
    step::run(&format!("download {package}"), &mut command)?;
    let reading = || format!("read {}", directory.display());
    for entry in fs::read_dir(directory).or_cannot(reading())? {
        let path = entry.or_cannot(reading())?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            return Ok(path);
        }
    }
    Err(Error::Unfit(format!(
        "apt-get download {package} left no package in {}",
        directory.display()
    )))
}

/// The sources of [`SUITE`], on the mirrors that the host's apt is configured for.
fn sources_list() -> Result<String> {
    let mirrors = Mirrors::find()?;
    let mut list = format!(
        "deb [signed-by={KEYRING}] {} {SUITE} main\n",
        mirrors.debian
    );
    if let Some(security) = mirrors.security {
        list += &format!("deb [signed-by={KEYRING}] {security} {SUITE}-security main\n");
    }
    Ok(list)
}

/// The mirrors that the host's apt fetches from.
struct Mirrors {
    debian: String,
    security: Option<String>,
}

impl Mirrors {
    /// Asks apt, which knows the mirrors of the package lists that it has: it fetches them if it has none.
    fn find() -> Result<Self> {
        if let Some(mirrors) = Self::known()? {
            return Ok(mirrors);
        }
        let script = source_directory().join("tests/install");
        step::run("package lists", Command::new(script).arg("--update"))?;
        Self::known()?.ok_or_else(|| {
            Error::Unfit("apt knows no Debian mirror: check /etc/apt/sources.list.d".into())
        })
    }

    fn known() -> Result<Option<Self>> {
        let format = "$(LABEL)\t$(SITE)";
        let mut command = Command::new("apt-get");
        command.args(["indextargets", "--format", format, "Created-By: Packages"]);
        let text = process::output(&mut command)?;
        let site = |label| {
            text.lines()
                .filter_map(|line| line.split_once('\t'))
                .find(|(found, _)| *found == label)
                .map(|(_, site)| site.to_owned())
        };
        Ok(site("Debian").map(|debian| Self {
            debian,
            security: site("Debian-Security"),
        }))
    }
}

/// How the host's apt reaches its mirrors (proxies, certificates): mmdebstrap does not look there by itself.
fn apt_settings() -> Result<String> {
    let all = process::output(Command::new("apt-config").arg("dump"))?;
    Ok(all
        .lines()
        .filter(|line| line.starts_with("Acquire::http"))
        .map(|line| format!("{line}\n"))
        .collect())
}

fn temporary(content: &str) -> Result<NamedTempFile> {
    let file = NamedTempFile::new().or_cannot("create a temporary file")?;
    fs::write(file.path(), content).or_cannot("write a temporary file")?;
    Ok(file)
}
