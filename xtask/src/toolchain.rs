//! Finds, or makes, what builds eBPF: a compiler with its own library source
//! (`core` is built for the BPF target) and bpf-linker on the same LLVM. Way 1
//! is the project's rustup toolchain, way 2 Debian's compiler for its web
//! browsers. `setup` makes, `build` and `lint` use.

use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::run::{Step, capture, cargo, has, workspace};
use crate::setup::install_packages;

const LINKER_VERSION: &str = "0.13.0";
/// LLVM versions that bpf-linker of this version has a feature for.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
/// rustup has no time limit of its own that helps where a firewall eats packets.
const RUSTUP_SECONDS: &str = "300";
/// Debian's compiler, beside rustup's.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Rustup,
    Debian,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rustup => "the rustup toolchain (way 1)",
            Self::Debian => "Debian's rustc-web (way 2)",
        })
    }
}

/// How eBPF is built on this machine.
#[derive(Debug)]
pub struct Toolchain {
    pub way: Way,
    pub linker: PathBuf,
    /// LLVM of compiler and linker.
    pub llvm_major: u32,
}

impl Toolchain {
    /// cargo with the compiler of this toolchain.
    pub fn cargo(&self, verb: &str) -> Command {
        match self.way {
            Way::Rustup => cargo("cargo", verb),
            Way::Debian => {
                let mut command = cargo(DEBIAN_CARGO, verb);
                command.env("RUSTC", DEBIAN_RUSTC).env_remove("CARGO");
                command
            }
        }
    }
}

/// A compiler that could do it, if a linker is built on its LLVM.
struct Compiler {
    way: Way,
    /// `rustc -vV`: a change of anything in it asks for a new linker.
    version: String,
    llvm_major: u32,
    /// Shared library that the compiler itself uses.
    llvm: PathBuf,
}

impl Compiler {
    /// Error: what is missing, in words.
    fn look(way: Way) -> Result<Self> {
        let rustc = match way {
            Way::Rustup => "rustc",
            Way::Debian => DEBIAN_RUSTC,
        };
        if way == Way::Debian {
            ensure!(Path::new(DEBIAN_RUSTC).is_file(), "no {DEBIAN_RUSTC}");
            ensure!(Path::new(DEBIAN_CARGO).is_file(), "no {DEBIAN_CARGO}");
        }
        let ask =
            |words: &[&str]| capture(Command::new(rustc).args(words).current_dir(workspace()));
        let sysroot = PathBuf::from(ask(&["--print", "sysroot"])?);
        let version = ask(&["-vV"])?;
        ensure!(
            sysroot.join("lib/rustlib/src/rust/library/core").is_dir(),
            "{} has no library source (rust-src)",
            sysroot.display()
        );
        let (major, minor) = llvm_version(&version)
            .with_context(|| format!("the rustc of {} has no LLVM", sysroot.display()))?;
        ensure!(
            LINKER_LLVM.contains(&major),
            "bpf-linker {LINKER_VERSION} has no support for LLVM {major} of the compiler in {} (it \
             has LLVM {} to {})",
            sysroot.display(),
            LINKER_LLVM.start(),
            LINKER_LLVM.end()
        );
        let directories = [
            sysroot.join("lib"),
            PathBuf::from("/usr/lib/x86_64-linux-gnu"),
            PathBuf::from(format!("/usr/lib/llvm-{major}/lib")),
        ];
        let llvm = directories
            .iter()
            .find_map(|dir| find_llvm(dir, major, minor))
            .with_context(|| format!("no libLLVM.so.{major}.{minor} of {}", sysroot.display()))?;
        Ok(Self {
            way,
            version,
            llvm_major: major,
            llvm,
        })
    }

    /// What the linker that fits was built from.
    fn stamp(&self) -> String {
        format!(
            "bpf-linker {LINKER_VERSION}\n{}\n{}\n",
            self.llvm.display(),
            self.version
        )
    }

    fn find_linker(&self) -> Option<Toolchain> {
        let linker = tools().join("bin/bpf-linker");
        let stamp = fs::read_to_string(stamp_path()).ok()?;
        (linker.is_file() && stamp == self.stamp()).then_some(Toolchain {
            way: self.way,
            linker,
            llvm_major: self.llvm_major,
        })
    }

    /// bpf-linker on exactly this LLVM. The one it takes by default is another,
    /// which breaks on the first memset.
    fn build_linker(&self) -> Result<Toolchain> {
        let step = Step::start(format!(
            "bpf-linker {LINKER_VERSION} on LLVM {} of {}, one or two minutes",
            self.llvm_major, self.way
        ))?;
        // Its build looks for a directory with lib/libLLVM.so; the program later for the library's
        // own name.
        let prefix = tools().join("llvm");
        let lib = prefix.join("lib");
        let _ = fs::remove_dir_all(&prefix);
        fs::create_dir_all(&lib).with_context(|| lib.display().to_string())?;
        symlink(&self.llvm, lib.join("libLLVM.so"))?;
        if let Some(name) = self.llvm.file_name() {
            symlink(&self.llvm, lib.join(name))?;
        }
        let mut install = cargo("cargo", "install");
        install
            .args(["bpf-linker", "--version", &format!("={LINKER_VERSION}")])
            .args(["--locked", "--force", "--no-default-features", "--features"])
            .arg(format!("llvm-{}", self.llvm_major))
            .arg("--root")
            .arg(tools())
            .env("LLVM_PREFIX", &prefix)
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        step.run(&mut install)?;
        fs::write(stamp_path(), self.stamp())?;
        step.done();
        self.find_linker().context("bpf-linker was not installed")
    }
}

/// Where the project keeps tools of its own.
fn tools() -> PathBuf {
    workspace().join("target/tools")
}

fn stamp_path() -> PathBuf {
    tools().join("bpf-linker.stamp")
}

/// Major and minor.
fn llvm_version(text: &str) -> Option<(u32, u32)> {
    let version = text
        .lines()
        .find_map(|l| l.strip_prefix("LLVM version: "))?;
    let mut numbers = version.split('.').map(|n| n.parse().unwrap_or(0));
    Some((numbers.next()?, numbers.next()?))
}

/// `libLLVM.so.22.1-rust-1.95.0-stable` (rustup) or `libLLVM.so.22.1` (Debian).
fn find_llvm(directory: &Path, major: u32, minor: u32) -> Option<PathBuf> {
    let start = format!("libLLVM.so.{major}.{minor}");
    let entries = fs::read_dir(directory).ok()?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.strip_prefix(&start)
                .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
        })
        .collect();
    found.sort();
    found.into_iter().next()
}

/// A toolchain that is ready; the error says, for both ways, what is missing.
pub fn find() -> Result<Toolchain> {
    let mut reasons = Vec::new();
    for way in [Way::Rustup, Way::Debian] {
        match Compiler::look(way) {
            Ok(compiler) => match compiler.find_linker() {
                Some(toolchain) => return Ok(toolchain),
                None => reasons.push(format!("{way}: no bpf-linker on its LLVM")),
            },
            Err(error) => reasons.push(format!("{way}: {error:#}")),
        }
    }
    bail!("{}", reasons.join("; "))
}

/// A toolchain, made where there is none. Says which way it took.
pub fn make() -> Result<Toolchain> {
    if let Ok(toolchain) = find() {
        return Ok(toolchain);
    }
    let first = match make_rustup() {
        Ok(toolchain) => return Ok(toolchain),
        Err(error) => error,
    };
    eprintln!("setup: the rustup toolchain cannot build eBPF, taking Debian's: {first:#}");
    make_debian().map_err(|second| {
        anyhow::anyhow!(
            "no way to build eBPF on this machine.\n  way 1, `rustup component add rust-src`: \
             {first:#}\n  way 2, Debian's rustc-web, cargo-web, rust-web-src: {second:#}\n  Repair \
             one of them, or build the objects on another machine and name their directory in \
             VTEP_EBPF_DIR"
        )
    })
}

fn make_rustup() -> Result<Toolchain> {
    if let Ok(compiler) = Compiler::look(Way::Rustup) {
        return compiler.build_linker();
    }
    ensure!(
        has("rustup"),
        "the compiler has no library source and there is no rustup to add it"
    );
    let step = Step::start("library source of the compiler (rustup component rust-src)")?;
    let mut rustup = Command::new("timeout");
    rustup
        .args([RUSTUP_SECONDS, "rustup", "component", "add", "rust-src"])
        .current_dir(workspace());
    step.run(&mut rustup)?;
    step.done();
    Compiler::look(Way::Rustup)?.build_linker()
}

fn make_debian() -> Result<Toolchain> {
    if Compiler::look(Way::Debian).is_err() {
        install_packages(&["rustc-web", "cargo-web", "rust-web-src"])?;
    }
    Compiler::look(Way::Debian)?.build_linker()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_version_is_read_from_what_the_compiler_says() {
        let text = "rustc 1.95.0 (59807616e 2026-04-14)\nbinary: rustc\nLLVM version: 22.1.2";
        assert_eq!(llvm_version(text), Some((22, 1)));
        assert_eq!(llvm_version("rustc 1.95.0"), None);
    }

    #[test]
    fn llvm_library_is_the_one_of_this_version() {
        let directory = std::env::temp_dir().join(format!("xtask-llvm-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("directory");
        for name in [
            "libLLVM.so.2",
            "libLLVM.so.22.10",
            "libLLVM.so.22.1-rust-1.95.0-stable",
        ] {
            fs::write(directory.join(name), "").expect("file");
        }
        let found = find_llvm(&directory, 22, 1);
        let other = find_llvm(&directory, 19, 1);
        fs::remove_dir_all(&directory).expect("clean up");
        assert_eq!(
            found,
            Some(directory.join("libLLVM.so.22.1-rust-1.95.0-stable"))
        );
        assert_eq!(other, None);
    }
}
