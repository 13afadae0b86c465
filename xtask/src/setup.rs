//! `cargo xtask setup`: brings a bare Debian machine to the point where
//! everything builds and runs. Says what it does and which way it takes; does
//! nothing, quickly, where nothing is missing. `--check` changes nothing.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::run::{Step, as_root, can_be_root, has, is_root, quiet, root_path};
use crate::{build, toolchain};

/// Oldest kernel with everything the programs use.
const KERNEL_MIN: (u32, u32) = (5, 15);

/// Command that must be there, Debian package that brings it. A C compiler is
/// there: without one this program would not run.
const TOOLS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("tc", "iproute2"),
    ("ethtool", "ethtool"),
    ("tcpdump", "tcpdump"),
    ("iperf3", "iperf3"),
    ("nft", "nftables"),
    ("bpftool", "bpftool"),
    ("ping", "iputils-ping"),
    ("ps", "procps"),
];

/// Everything: to build, and to run as root.
pub fn run() -> Result<()> {
    kernel()?;
    let packages = missing_packages();
    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    if !is_bpffs_mounted()? {
        mount_bpffs()?;
    }
    network_devices()?;
    let way = match build::prebuilt() {
        Some(dir) => format!("comes from {} (VTEP_EBPF_DIR)", dir.display()),
        None => format!("is built with {}", toolchain::make()?.way),
    };
    eprintln!("setup: complete; eBPF {way}");
    Ok(())
}

/// What `run` would do, one line each; an error where something is missing.
pub fn check() -> Result<()> {
    let toolchain = match (build::prebuilt(), toolchain::find()) {
        (Some(dir), _) => Ok(format!("eBPF comes from {}", dir.display())),
        (None, Ok(toolchain)) => Ok(format!("eBPF is built with {}", toolchain.way)),
        (None, Err(reasons)) => Err(anyhow::anyhow!("eBPF toolchain: {reasons}")),
    };
    let packages = missing_packages();
    let packages = match packages.is_empty() {
        true => Ok("command-line tools".to_owned()),
        false => Err(anyhow::anyhow!("Debian packages: {}", packages.join(" "))),
    };
    let bpffs = is_bpffs_mounted().and_then(|mounted| {
        ensure!(mounted, "the BPF file system on /sys/fs/bpf");
        Ok("BPF file system".to_owned())
    });
    let ok = |text: &'static str| move |()| text.to_owned();
    let mut missing = 0;
    for step in [
        kernel().map(ok("kernel")),
        packages,
        bpffs,
        network_devices().map(ok("bridge, veth and vxlan devices")),
        toolchain,
    ] {
        match step {
            Ok(what) => println!("ok       {what}"),
            Err(error) => {
                missing += 1;
                println!("missing  {error:#}");
            }
        }
    }
    if missing > 0 {
        bail!("{missing} missing: `cargo xtask setup` brings what can be brought");
    }
    Ok(())
}

/// Version, BPF at all, and XDP as a program type.
fn kernel() -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let release = release.trim();
    let version = kernel_version(release);
    let (major, minor) = KERNEL_MIN;
    ensure!(
        version >= KERNEL_MIN,
        "Linux {release} is too old for the XDP programs: boot {major}.{minor} or newer"
    );
    load_empty_xdp().with_context(|| {
        format!(
            "Linux {release} does not load XDP programs: boot a kernel with CONFIG_BPF_SYSCALL \
             and CONFIG_NET, and in a container allow bpf(2)"
        )
    })?;
    let jit = fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").unwrap_or_default();
    if jit.trim() == "0" {
        eprintln!(
            "setup: the BPF JIT is off, so programs are interpreted: `sysctl \
             net.core.bpf_jit_enable=1` turns it on"
        );
    }
    Ok(())
}

fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// BPF_PROG_LOAD of `return XDP_PASS`. Only root can; for others "not permitted"
/// at least says that the call is there.
fn load_empty_xdp() -> std::io::Result<()> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_TYPE_XDP: u32 = 6;
    // r0 = 2 (XDP_PASS); exit. linux/bpf.h: struct bpf_insn.
    let program: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];
    let license = c"GPL";
    /// Head of union bpf_attr for BPF_PROG_LOAD.
    #[repr(C)]
    struct Load {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log: [u64; 3],
    }
    let load = Load {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log: [0; 3],
    };
    // SAFETY: the attribute and what it points to live for the call, sizes are right.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const load,
            size_of_val(&load),
        )
    };
    if fd >= 0 {
        // SAFETY: a descriptor we just got, used by nobody else.
        unsafe { libc::close(fd as i32) };
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EPERM) && !is_root() {
        return Ok(());
    }
    Err(error)
}

/// Make one device of every kind in a namespace of its own: that is what the
/// tests do, and the kernel loads its modules on the way.
fn network_devices() -> Result<()> {
    const SCRIPT: &str = "ip link add br0 type bridge &&
        ip link add a0 type veth peer name b0 &&
        ip tuntap add tap0 mode tap &&
        ip link add vxlan0 type vxlan id 1 local 127.0.0.1 dstport 4789";
    ensure!(
        has("ip"),
        "bridge, veth, tap and vxlan devices: not looked at, `ip` is missing"
    );
    let path = format!("PATH={}", root_path().display());
    quiet(as_root("unshare")?.args(["--net", "env", &path, "sh", "-c", SCRIPT])).context(
        "the kernel makes no network namespaces with bridge, veth, tap and vxlan devices: boot one \
         with CONFIG_NET_NS, CONFIG_BRIDGE, CONFIG_VETH, CONFIG_TUN and CONFIG_VXLAN, and in a \
         container allow CAP_SYS_ADMIN and pass /dev/net/tun",
    )?;
    Ok(())
}

fn missing_packages() -> Vec<&'static str> {
    let mut missing: Vec<&str> = TOOLS
        .iter()
        .filter(|(tool, _)| !has(tool))
        .map(|(_, package)| *package)
        .collect();
    missing.dedup();
    missing
}

/// `apt-get install`. Recommended packages are left out.
pub fn install_packages(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    ensure!(
        has("apt-get"),
        "missing, and this is no Debian: {names}; install what corresponds to these packages"
    );
    can_be_root().with_context(|| format!("install {names}"))?;
    let step = Step::start(format!("Debian packages {names}"))?;
    let apt = |words: &[&str]| -> Result<Command> {
        // Through `env`, because sudo drops variables.
        let mut command = as_root("env")?;
        command
            .args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"])
            .args(["-o", "DPkg::Lock::Timeout=300"])
            .args(words);
        Ok(command)
    };
    // One broken source among several is no reason to stop: what counts is the install.
    let update = step.run(&mut apt(&["update"])?);
    let install = step.run(apt(&["install", "--no-install-recommends"])?.args(packages));
    match (install, update) {
        (Ok(()), _) => step.done(),
        (Err(error), Ok(())) => return Err(error),
        (Err(error), Err(update)) => return Err(error.context(update)),
    }
    Ok(())
}

/// Pinned programs and maps live there.
fn is_bpffs_mounted() -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    Ok(mounts.lines().any(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        words.get(1) == Some(&"/sys/fs/bpf") && words.get(2) == Some(&"bpf")
    }))
}

fn mount_bpffs() -> Result<()> {
    quiet(as_root("mount")?.args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))
        .context("mount the BPF file system on /sys/fs/bpf")?;
    eprintln!("setup: mounted the BPF file system on /sys/fs/bpf");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_read_with_any_suffix() {
        assert_eq!(kernel_version("6.18.44-fc-v669"), (6, 18));
        assert_eq!(kernel_version("5.15.0-91-generic"), (5, 15));
        assert_eq!(kernel_version("6.1-rc3"), (6, 1));
        assert!(kernel_version("5.4.0") < KERNEL_MIN);
        assert!(kernel_version("10.0") > KERNEL_MIN);
    }
}
