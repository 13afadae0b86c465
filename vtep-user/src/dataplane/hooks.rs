//! Programs on devices: pinned links, named `<ifindex>-<hook>`. Attaching pins
//! at once, so that the link outlives this process; a new program goes into a
//! link in place. An uplink has two: XDP marks frames for the tcx program, so
//! that one comes first and goes last. Used by `dataplane` only.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use super::sys::{self, Kind, LinkInfo, TcHook};
use super::{DataplaneError, HookStatus, pins, rtnl};
use crate::kernel::IfIndex;
use crate::tables::{Hook, Program, XdpMode};

pub const INGRESS: &str = "vtep_ingress";
pub const EGRESS: &str = "vtep_egress";
pub const PORT: &str = "vtep_port";
pub const UPLINK: &str = "vtep_uplink";

/// The loaded programs.
pub struct Programs {
    pub ingress: OwnedFd,
    pub egress: OwnedFd,
    pub port: OwnedFd,
    pub uplink: OwnedFd,
}

impl Programs {
    fn get(&self, program: Program, hook: Hook) -> &OwnedFd {
        match (program, hook) {
            (Program::Ingress, _) => &self.ingress,
            (Program::Egress, Hook::Xdp(_)) => &self.egress,
            (Program::Egress, Hook::Tcx) => &self.port,
        }
    }

    pub fn all(&self) -> [&OwnedFd; 4] {
        [&self.ingress, &self.egress, &self.port, &self.uplink]
    }

    fn contain(&self, id: u32) -> bool {
        let info = |fd: &OwnedFd| sys::program_info(fd.as_fd());
        self.all()
            .into_iter()
            .any(|fd| info(fd).is_ok_and(|info| info.id == id))
    }
}

/// A link and its name in bpffs.
struct Link {
    fd: OwnedFd,
    path: PathBuf,
}

impl Link {
    /// The kernel's view; `None` once the device is gone.
    fn info(&self) -> Option<LinkInfo> {
        let info = sys::link_info(self.fd.as_fd()).ok()?;
        info.ifindex().is_some().then_some(info)
    }

    fn remove(&self) -> io::Result<()> {
        detach_and_unpin(&self.fd, &self.path)
    }
}

struct Attached {
    link: Link,
    program: Program,
    hook: Hook,
    /// The tcx program of an uplink.
    stack: Option<Link>,
}

/// The links of one instance.
pub struct Hooks {
    directory: PathBuf,
    programs: Programs,
    hooks: BTreeMap<IfIndex, Attached>,
}

impl Hooks {
    /// Take over the links in `directory`: links without a device are removed,
    /// the others get the new programs, in place. Checks all before the first change.
    pub fn adopt(directory: PathBuf, programs: Programs) -> Result<Self, DataplaneError> {
        let mut here = Vec::new();
        let mut idle = Vec::new();
        let mut elsewhere = Vec::new();
        for path in pins::entries(&directory)? {
            let pinned = Pinned::open(path)?;
            match pinned.info.ifindex() {
                None => idle.push(pinned),
                Some(ifindex) if runs_here(ifindex, pinned.hook, pinned.info.program_id) => {
                    here.push((ifindex, pinned));
                }
                Some(_) => elsewhere.push(pinned),
            }
        }
        // A device that was moved away leaves one such link; all of them means
        // that this is the wrong place.
        if here.is_empty() && !elsewhere.is_empty() {
            let mut ifindexes: Vec<String> = elsewhere
                .iter()
                .filter_map(|pinned| Some(pinned.info.ifindex()?.to_string()))
                .collect();
            ifindexes.dedup();
            return Err(DataplaneError::OtherNamespace {
                path: directory,
                ifindexes: ifindexes.join(", "),
            });
        }
        for pinned in idle.into_iter().chain(elsewhere) {
            let path = &pinned.link.path;
            tracing::info!("{}: the device is gone, link removed", path.display());
            pinned.remove()?;
        }
        let mut this = Self {
            directory,
            programs,
            hooks: BTreeMap::new(),
        };
        let mut stacks = BTreeMap::new();
        for (ifindex, pinned) in here {
            let program = match pinned.program {
                Some(program) => this.programs.get(program, pinned.hook),
                None => &this.programs.uplink,
            };
            match sys::link_update(pinned.link.fd.as_fd(), program.as_fd()) {
                Ok(()) => match pinned.program {
                    Some(program) => {
                        let attached = Attached {
                            link: pinned.link,
                            program,
                            hook: pinned.hook,
                            stack: None,
                        };
                        this.hooks.insert(ifindex, attached);
                    }
                    None => drop(stacks.insert(ifindex, pinned)),
                },
                // The device went away just now.
                Err(e) if e.raw_os_error() == Some(libc::ENOLINK) => pinned.remove()?,
                Err(e) => {
                    let what = format!("replace the program of {}", pinned.link.path.display());
                    return Err(DataplaneError::kernel(what, e));
                }
            }
        }
        for (ifindex, pinned) in stacks {
            match this.hooks.get_mut(&ifindex) {
                Some(uplink) if uplink.program == Program::Ingress => {
                    uplink.stack = Some(pinned.link);
                }
                // A death between the two.
                _ => pinned.remove()?,
            }
        }
        Ok(this)
    }

    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// What the kernel has now.
    pub fn status(&self) -> BTreeMap<IfIndex, HookStatus> {
        self.hooks
            .iter()
            .filter_map(|(ifindex, hook)| {
                let info = hook.link.info()?;
                Some((
                    *ifindex,
                    HookStatus {
                        program: hook.program,
                        hook: hook.hook,
                        program_id: info.program_id,
                        link_id: info.id,
                    },
                ))
            })
            .collect()
    }

    /// The error is for people, without the name of the device.
    pub fn attach(&mut self, ifindex: IfIndex, program: Program, hook: Hook) -> Result<(), String> {
        if let Some(filter) = self
            .foreign_tc(ifindex)
            .map_err(|e| refusal(&e, hook, None))?
        {
            return Err(filter);
        }
        if let Some(attached) = self.hooks.get_mut(&ifindex) {
            if attached.hook == hook
                && attached.program == program
                && attached.link.info().is_some()
            {
                let fd = self.programs.get(program, hook).as_fd();
                return sys::link_update(attached.link.fd.as_fd(), fd)
                    .map_err(|e| refusal(&e, hook, None));
            }
            // Native and generic exclude each other; or the device is a new one.
            self.detach(ifindex)?;
        }
        let stack = match program {
            Program::Ingress if sys::has_tcx() => {
                Some(self.create(ifindex, &self.programs.uplink, Hook::Tcx)?)
            }
            _ => None,
        };
        match self.create(ifindex, self.programs.get(program, hook), hook) {
            Ok(link) => {
                let attached = Attached {
                    link,
                    program,
                    hook,
                    stack,
                };
                self.hooks.insert(ifindex, attached);
                Ok(())
            }
            Err(reason) => {
                if let Some(stack) = stack {
                    stack.remove().map_err(|e| removal(&e))?;
                }
                Err(reason)
            }
        }
    }

    fn create(&self, ifindex: IfIndex, program: &OwnedFd, hook: Hook) -> Result<Link, String> {
        let path = self
            .directory
            .join(format!("{ifindex}-{}", hook_name(hook)));
        let created = match hook {
            Hook::Tcx => sys::link_create_tcx(program.as_fd(), ifindex),
            Hook::Xdp(XdpMode::Native) => {
                sys::link_create_xdp(program.as_fd(), ifindex, sys::XDP_NATIVE)
            }
            Hook::Xdp(XdpMode::Generic) => {
                sys::link_create_xdp(program.as_fd(), ifindex, sys::XDP_GENERIC)
            }
        };
        let fd = created.map_err(|e| refusal(&e, hook, rtnl::xdp_state(ifindex).ok()))?;
        sys::pin(fd.as_fd(), &path)
            .map_err(|e| format!("{}: cannot be pinned: {e}", path.display()))?;
        Ok(Link { fd, path })
    }

    /// Nothing to do where nothing is attached.
    pub fn detach(&mut self, ifindex: IfIndex) -> Result<(), String> {
        if let Some(hook) = self.hooks.get(&ifindex) {
            hook.link.remove().map_err(|e| removal(&e))?;
            if let Some(stack) = &hook.stack {
                stack.remove().map_err(|e| removal(&e))?;
            }
            self.hooks.remove(&ifindex);
        }
        Ok(())
    }

    /// A tc program or filter on the device, which frames that are redirected
    /// would not see (R41). In words, as a reason not to accelerate.
    pub fn foreign_tc(&self, ifindex: IfIndex) -> io::Result<Option<String>> {
        for (hook, name) in [(TcHook::Ingress, "ingress"), (TcHook::Egress, "egress")] {
            let mut programs = sys::tcx_programs(ifindex, hook)?.into_iter();
            if let Some(id) = programs.find(|id| !self.programs.contain(*id)) {
                return Ok(Some(format!(
                    "tc program of somebody else (tcx {name}, id {id})"
                )));
            }
            if let Some(kind) = rtnl::tc_filter(ifindex, hook)? {
                return Ok(Some(format!(
                    "tc filter of somebody else (clsact {name}, {kind})"
                )));
            }
        }
        Ok(None)
    }
}

/// A link found in the directory.
struct Pinned {
    link: Link,
    info: LinkInfo,
    /// `None`: the tcx program of an uplink.
    program: Option<Program>,
    hook: Hook,
}

impl Pinned {
    fn open(path: PathBuf) -> Result<Self, DataplaneError> {
        let failed = |e| DataplaneError::kernel(format!("open {}", path.display()), e);
        let foreign = |reason: &str| DataplaneError::ForeignLink {
            path: path.clone(),
            reason: reason.to_owned(),
        };
        let fd = sys::open_pin(&path).map_err(failed)?;
        if sys::kind(fd.as_fd()) != Kind::Link {
            return Err(foreign("not a link"));
        }
        let hook = parse_hook(&path).ok_or_else(|| foreign("unknown name"))?;
        let info = sys::link_info(fd.as_fd()).map_err(failed)?;
        let program = sys::program_by_id(info.program_id)
            .and_then(|program| sys::program_info(program.as_fd()))
            .map_err(failed)?
            .name();
        let program = match program.as_str() {
            INGRESS => Some(Program::Ingress),
            EGRESS | PORT => Some(Program::Egress),
            UPLINK => None,
            other => return Err(foreign(&format!("runs program {other}"))),
        };
        Ok(Self {
            link: Link { fd, path },
            info,
            program,
            hook,
        })
    }

    fn remove(&self) -> Result<(), DataplaneError> {
        let path = &self.link.path;
        self.link
            .remove()
            .map_err(|e| DataplaneError::kernel(format!("remove {}", path.display()), e))
    }
}

/// Whether the device of this number, in this network namespace, runs the program.
pub fn runs_here(ifindex: IfIndex, hook: Hook, program_id: u32) -> bool {
    match hook {
        Hook::Xdp(_) => rtnl::xdp_state(ifindex).is_ok_and(|state| state.program_id == program_id),
        Hook::Tcx => sys::tcx_programs(ifindex, TcHook::Ingress)
            .is_ok_and(|programs| programs.contains(&program_id)),
    }
}

/// Detached first, so that a death before the unpin leaves an idle link, which
/// the next start removes.
pub fn detach_and_unpin(link: &OwnedFd, path: &Path) -> io::Result<()> {
    match sys::link_detach(link.as_fd()) {
        Ok(()) => {}
        // The device is gone, and the program with it.
        Err(_) if sys::link_info(link.as_fd()).is_ok_and(|info| info.ifindex().is_none()) => {}
        Err(e) => return Err(e),
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn removal(error: &io::Error) -> String {
    format!("the link cannot be removed: {error}")
}

fn hook_name(hook: Hook) -> &'static str {
    match hook {
        Hook::Xdp(XdpMode::Native) => "native",
        Hook::Xdp(XdpMode::Generic) => "generic",
        Hook::Tcx => "tcx",
    }
}

/// The hook that a link's name in bpffs tells.
pub fn parse_hook(path: &Path) -> Option<Hook> {
    let (ifindex, hook) = path.file_name()?.to_str()?.split_once('-')?;
    ifindex.parse::<IfIndex>().ok()?;
    let hooks = [
        Hook::Xdp(XdpMode::Native),
        Hook::Xdp(XdpMode::Generic),
        Hook::Tcx,
    ];
    hooks.into_iter().find(|known| hook_name(*known) == hook)
}

/// Why the kernel did not attach, in words. The kernel's own text goes to a
/// tracepoint only (bpf_xdp_link_attach_failed), so the usual causes are named.
fn refusal(error: &io::Error, hook: Hook, device: Option<rtnl::XdpState>) -> String {
    let errno = error.raw_os_error().unwrap_or(0);
    let device = device.unwrap_or_default();
    let mtu = device.mtu;
    match (errno, hook) {
        (libc::EBUSY | libc::EEXIST, _) if device.program_id != 0 => {
            format!("another XDP program is attached (id {})", device.program_id)
        }
        (libc::EEXIST, _) => "a device on top of it runs an XDP program".to_owned(),
        (libc::ENODEV, _) => "no such device".to_owned(),
        (libc::EINVAL, Hook::Tcx) => "the kernel has no tcx: it needs Linux 6.6".to_owned(),
        (libc::EOPNOTSUPP, Hook::Xdp(XdpMode::Native)) => {
            "the driver has no native XDP, or an offload (LRO, GRO_HW) excludes it: switch that \
             off, or ask for generic XDP, which is slow"
                .to_owned()
        }
        (libc::ERANGE, _) => format!(
            "the MTU is too large for XDP in this driver: lower it (here {mtu}; of a veth, the \
             peer's MTU counts)"
        ),
        (libc::EINVAL, Hook::Xdp(XdpMode::Native)) => format!(
            "the driver refuses XDP with its present settings: MTU {mtu}, number of queues or an \
             offload ({error})"
        ),
        (libc::ENOMEM | libc::ENOSPC, Hook::Xdp(XdpMode::Native)) => {
            format!("the driver has no queues or memory left for XDP ({error})")
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(errno: i32, hook: Hook, program_id: u32) -> String {
        let device = rtnl::XdpState {
            mtu: 9000,
            attached: 1,
            program_id,
        };
        refusal(&io::Error::from_raw_os_error(errno), hook, Some(device))
    }

    #[test]
    fn refusals_name_cause_and_remedy() {
        let native = Hook::Xdp(XdpMode::Native);
        for (errno, program_id, part) in [
            (libc::EBUSY, 12, "another XDP program is attached (id 12)"),
            (libc::EEXIST, 12, "another XDP program is attached (id 12)"),
            (libc::EEXIST, 0, "on top of it"),
            (libc::ENODEV, 0, "no such device"),
            (libc::EOPNOTSUPP, 0, "no native XDP"),
            (libc::ERANGE, 0, "here 9000"),
            (libc::EINVAL, 0, "MTU 9000"),
            (libc::EPERM, 0, "not permitted"),
        ] {
            let text = reason(errno, native, program_id);
            assert!(text.contains(part), "{errno}: {text}");
            assert!(!text.contains('\n'));
        }
    }

    #[test]
    fn names_of_links_are_parsed_strictly() {
        let xdp = [XdpMode::Native, XdpMode::Generic].map(Hook::Xdp);
        for hook in xdp.into_iter().chain([Hook::Tcx]) {
            let path = PathBuf::from(format!("links/7-{}", hook_name(hook)));
            assert_eq!(parse_hook(&path), Some(hook));
        }
        for name in ["7", "eth0-native", "7-skb", "-native", "7-native-x"] {
            assert_eq!(parse_hook(Path::new(name)), None, "{name}");
        }
    }
}
