//! A distribution's kernel, fetched by apt and unpacked below target/vm, nothing
//! installed: with an apt state of its own, so that sources and lists of the
//! machine stay as they are.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::run::{Step, capture, workspace};
use crate::vm::cpio::Archive;
use crate::vm::modules::Modules;

/// Debian's kernel for virtual machines.
const PACKAGE: &str = "linux-image-cloud-amd64";
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What the tests make, and what the machine itself needs.
const MODULES: &[&str] = &[
    // Devices.
    "veth",
    "tun",
    "dummy",
    "bridge",
    "vxlan",
    "8021q",
    "vrf",
    "bonding",
    "macvlan",
    // Filters and queueing.
    "br_netfilter",
    "nf_tables",
    "nft_ct",
    "sch_ingress",
    "sch_netem",
    "cls_bpf",
    "cls_u32",
    "act_gact",
    "act_mirred",
    // Load.
    "pktgen",
];

/// Kernels there are tests for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Series {
    /// Has tcx.
    #[value(name = "6.12")]
    V6_12,
    /// Has none.
    #[value(name = "6.1")]
    V6_1,
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V6_12 => "6.12",
            Self::V6_1 => "6.1",
        })
    }
}

/// What a machine boots.
#[derive(Debug)]
pub struct Kernel {
    pub image: PathBuf,
    /// Archive with the modules and their order.
    pub modules: PathBuf,
}

/// The newest kernel of a series that the archive has when it is asked first.
pub fn get(series: Series) -> Result<Kernel> {
    let directory = workspace().join("target/vm").join(series.to_string());
    let root = directory.join("root");
    if !root.is_dir() {
        fetch(series, &directory, &root)
            .with_context(|| format!("kernel {series} for the virtual machine"))?;
    }
    let image = only_entry(&root.join("boot"), "vmlinuz-")?;
    let modules = directory.join("modules.cpio");
    let stamp = directory.join("modules.list");
    let list = MODULES.join("\n");
    if fs::read_to_string(&stamp).ok().as_deref() != Some(&list) {
        // Where /usr is merged, the package is not: it brings lib/modules itself.
        let from = only_entry(&root.join("lib/modules"), "")?;
        fs::write(&modules, pack_modules(&from)?)?;
        fs::write(&stamp, list)?;
    }
    Ok(Kernel { image, modules })
}

fn pack_modules(directory: &Path) -> Result<Vec<u8>> {
    let mut modules = Modules::of(directory)?;
    for name in MODULES {
        modules.add(name)?;
    }
    let mut archive = Archive::default();
    let mut order = String::new();
    for module in modules.chosen() {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.image);
        order += &format!("{}\n", module.name);
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive.finish())
}

/// The one entry whose name starts like this.
fn only_entry(directory: &Path, start: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let mut found = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with(start)
        });
    found
        .next()
        .with_context(|| format!("{}: no {start}*", directory.display()))
}

/// Into `root`, which is complete when it is there.
fn fetch(series: Series, directory: &Path, root: &Path) -> Result<()> {
    let step = Step::start(format!("Debian's kernel {series}, not installed"))?;
    let apt = Apt::new(&directory.join("apt"))?;
    step.run(apt.command("apt-get").arg("update"))?;
    let versions = capture(apt.command("apt-cache").args(["show", PACKAGE]))?;
    let package = newest(&versions, series)
        .with_context(|| format!("Debian's archive has no {PACKAGE} {series} for this release"))?;
    step.run(
        apt.command("apt-get")
            .args(["download", &package])
            .current_dir(directory),
    )?;
    let archive = only_entry(directory, &package)?;
    let unpacked = directory.join("root.new");
    let _ = fs::remove_dir_all(&unpacked);
    step.run(Command::new("dpkg").arg("-x").arg(&archive).arg(&unpacked))?;
    fs::rename(&unpacked, root)?;
    fs::remove_file(archive)?;
    fs::remove_dir_all(directory.join("apt"))?;
    step.done();
    Ok(())
}

/// The package with the kernel itself, from the descriptions of all versions of
/// [`PACKAGE`], newest first.
fn newest(descriptions: &str, series: Series) -> Option<String> {
    descriptions.split("\n\n").find_map(|description| {
        let field = |name: &str| description.lines().find_map(|line| line.strip_prefix(name));
        let version = field("Version: ")?;
        let depends = field("Depends: ")?.split_whitespace().next()?;
        version
            .strip_prefix(&series.to_string())
            .is_some_and(|rest| rest.starts_with('.'))
            .then(|| depends.to_owned())
    })
}

/// apt with the archive that the machine uses already, the release and its
/// backports, and nothing else.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(directory: &Path) -> Result<Self> {
        let (lists, cache) = (directory.join("lists"), directory.join("cache"));
        for path in [lists.join("partial"), cache.join("archives/partial")] {
            fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        }
        let release = fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
        let codename = release
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .context("/etc/os-release names no release")?;
        let archive = archive()?;
        let suites = [codename.to_owned(), format!("{codename}-backports")];
        let sources = suites.map(|s| format!("deb [signed-by={KEYS}] {archive} {s} main\n"));
        let list = directory.join("sources.list");
        fs::write(&list, sources.concat())?;
        let option = |name: &str, path: &Path| format!("-o{name}={}", path.display());
        Ok(Self {
            options: vec![
                option("Dir::Etc::SourceList", &list),
                option("Dir::Etc::SourceParts", Path::new("/dev/null")),
                option("Dir::State::Lists", &lists),
                option("Dir::Cache", &cache),
                // Its own user cannot write here.
                "-oAPT::Sandbox::User=root".to_owned(),
            ],
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }
}

/// Where this machine gets Debian's packages.
fn archive() -> Result<String> {
    let uris = capture(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    let is_debian = |uri: &&str| uri.trim_end_matches('/').ends_with("/debian");
    let uri = uris.lines().find(is_debian);
    let uri = uri.context("none of the apt sources of this machine is Debian's archive")?;
    ensure!(
        Path::new(KEYS).is_file(),
        "no {KEYS}: install debian-archive-keyring"
    );
    Ok(uri.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_package_of_the_series_is_taken() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.12.95-1~bpo12+1\n\
                    Depends: linux-image-6.12.95+deb12-cloud-amd64 (= 6.12.95-1~bpo12+1)\n\n\
                    Package: linux-image-cloud-amd64\nVersion: 6.1.176-1\n\
                    Depends: linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1)\n";
        assert_eq!(
            newest(text, Series::V6_12).as_deref(),
            Some("linux-image-6.12.95+deb12-cloud-amd64")
        );
        assert_eq!(
            newest(text, Series::V6_1).as_deref(),
            Some("linux-image-6.1.0-50-cloud-amd64")
        );
        assert_eq!(newest("", Series::V6_1), None);
    }
}
