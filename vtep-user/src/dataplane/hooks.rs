//! XDP on devices: pinned links, named `<ifindex>-<mode>`. Attaching pins at
//! once, so that the link outlives this process; a new program goes into a link
//! in place. Used by `dataplane` only.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use super::sys::{self, Kind, LinkInfo, TcHook};
use super::{DataplaneError, HookStatus, pins, rtnl};
use crate::kernel::IfIndex;
use crate::tables::{Program, XdpMode};

pub const INGRESS: &str = "vtep_ingress";
pub const EGRESS: &str = "vtep_egress";

/// The loaded programs.
pub struct Programs {
    pub ingress: OwnedFd,
    pub egress: OwnedFd,
}

impl Programs {
    fn get(&self, program: Program) -> &OwnedFd {
        match program {
            Program::Ingress => &self.ingress,
            Program::Egress => &self.egress,
        }
    }
}

struct Hook {
    link: OwnedFd,
    program: Program,
    mode: XdpMode,
    path: PathBuf,
}

impl Hook {
    /// The kernel's view; `None` once the device is gone.
    fn info(&self) -> Option<LinkInfo> {
        let info = sys::link_info(self.link.as_fd()).ok()?;
        info.ifindex().is_some().then_some(info)
    }
}

/// The links of one instance.
pub struct Hooks {
    directory: PathBuf,
    programs: Programs,
    hooks: BTreeMap<IfIndex, Hook>,
}

impl Hooks {
    /// Take over the links in `directory`: links without a device are removed,
    /// the others get the new programs, in place. Checks all before the first change.
    pub fn adopt(directory: PathBuf, programs: Programs) -> Result<Self, DataplaneError> {
        let mut hooks = BTreeMap::new();
        let mut idle = Vec::new();
        let mut elsewhere = Vec::new();
        for path in pins::entries(&directory)? {
            let pinned = Pinned::open(path)?;
            match pinned.info.ifindex() {
                None => idle.push(pinned),
                Some(ifindex) if runs_here(ifindex, pinned.info.program_id) => {
                    hooks.insert(ifindex, pinned);
                }
                Some(_) => elsewhere.push(pinned),
            }
        }
        // A device that was moved away leaves one such link; all of them means
        // that this is the wrong place.
        if hooks.is_empty() && !elsewhere.is_empty() {
            let ifindexes: Vec<String> = elsewhere
                .iter()
                .filter_map(|pinned| Some(pinned.info.ifindex()?.to_string()))
                .collect();
            return Err(DataplaneError::OtherNamespace {
                path: directory,
                ifindexes: ifindexes.join(", "),
            });
        }
        for pinned in idle.into_iter().chain(elsewhere) {
            let path = &pinned.path;
            tracing::info!("{}: the device is gone, link removed", path.display());
            detach_and_unpin(&pinned.link, path)
                .map_err(|e| DataplaneError::kernel(format!("remove {}", path.display()), e))?;
        }
        let mut adopted = BTreeMap::new();
        for (ifindex, pinned) in hooks {
            match sys::link_update(pinned.link.as_fd(), programs.get(pinned.program).as_fd()) {
                Ok(()) => {
                    adopted.insert(ifindex, pinned.into_hook());
                }
                // The device went away just now.
                Err(e) if e.raw_os_error() == Some(libc::ENOLINK) => {
                    let path = &pinned.path;
                    detach_and_unpin(&pinned.link, path).map_err(|e| {
                        DataplaneError::kernel(format!("remove {}", path.display()), e)
                    })?;
                }
                Err(e) => {
                    let what = format!("replace the program of {}", pinned.path.display());
                    return Err(DataplaneError::kernel(what, e));
                }
            }
        }
        Ok(Self {
            directory,
            programs,
            hooks: adopted,
        })
    }

    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// What the kernel has now.
    pub fn status(&self) -> BTreeMap<IfIndex, HookStatus> {
        self.hooks
            .iter()
            .filter_map(|(ifindex, hook)| {
                let info = hook.info()?;
                Some((
                    *ifindex,
                    HookStatus {
                        program: hook.program,
                        mode: hook.mode,
                        program_id: info.program_id,
                        link_id: info.id,
                    },
                ))
            })
            .collect()
    }

    /// The error is for people, without the name of the device.
    pub fn attach(
        &mut self,
        ifindex: IfIndex,
        program: Program,
        mode: XdpMode,
    ) -> Result<(), String> {
        if let Some(filter) = foreign_tc(ifindex).map_err(|e| refusal(&e, mode, None))? {
            return Err(filter);
        }
        if let Some(hook) = self.hooks.get_mut(&ifindex) {
            if hook.mode == mode && hook.info().is_some() {
                sys::link_update(hook.link.as_fd(), self.programs.get(program).as_fd())
                    .map_err(|e| refusal(&e, mode, None))?;
                hook.program = program;
                return Ok(());
            }
            // Native and generic exclude each other; or the device is a new one.
            self.detach(ifindex)?;
        }
        let path = self
            .directory
            .join(format!("{ifindex}-{}", mode_name(mode)));
        let flags = match mode {
            XdpMode::Native => sys::XDP_NATIVE,
            XdpMode::Generic => sys::XDP_GENERIC,
        };
        let program_fd = self.programs.get(program).as_fd();
        let link = sys::link_create_xdp(program_fd, ifindex, flags)
            .map_err(|e| refusal(&e, mode, rtnl::xdp_state(ifindex).ok()))?;
        sys::pin(link.as_fd(), &path)
            .map_err(|e| format!("{}: cannot be pinned: {e}", path.display()))?;
        self.hooks.insert(
            ifindex,
            Hook {
                link,
                program,
                mode,
                path,
            },
        );
        Ok(())
    }

    /// Nothing to do where nothing is attached.
    pub fn detach(&mut self, ifindex: IfIndex) -> Result<(), String> {
        if let Some(hook) = self.hooks.get(&ifindex) {
            detach_and_unpin(&hook.link, &hook.path)
                .map_err(|e| format!("the link cannot be removed: {e}"))?;
            self.hooks.remove(&ifindex);
        }
        Ok(())
    }
}

/// A link found in the directory.
struct Pinned {
    link: OwnedFd,
    info: LinkInfo,
    program: Program,
    mode: XdpMode,
    path: PathBuf,
}

impl Pinned {
    fn open(path: PathBuf) -> Result<Self, DataplaneError> {
        let failed = |e| DataplaneError::kernel(format!("open {}", path.display()), e);
        let foreign = |reason: &str| DataplaneError::ForeignLink {
            path: path.clone(),
            reason: reason.to_owned(),
        };
        let link = sys::open_pin(&path).map_err(failed)?;
        if sys::kind(link.as_fd()) != Kind::Link {
            return Err(foreign("not a link"));
        }
        let mode = parse_mode(&path).ok_or_else(|| foreign("unknown name"))?;
        let info = sys::link_info(link.as_fd()).map_err(failed)?;
        let program = sys::program_by_id(info.program_id)
            .and_then(|program| sys::program_info(program.as_fd()))
            .map_err(failed)?
            .name();
        let program = match program.as_str() {
            INGRESS => Program::Ingress,
            EGRESS => Program::Egress,
            other => return Err(foreign(&format!("runs program {other}"))),
        };
        Ok(Self {
            link,
            info,
            program,
            mode,
            path,
        })
    }

    fn into_hook(self) -> Hook {
        Hook {
            link: self.link,
            program: self.program,
            mode: self.mode,
            path: self.path,
        }
    }
}

/// Whether the device of this number, in this network namespace, runs the program.
fn runs_here(ifindex: IfIndex, program_id: u32) -> bool {
    rtnl::xdp_state(ifindex).is_ok_and(|state| state.program_id == program_id)
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

/// A tc program or filter on the device, which frames that are redirected would
/// not see (R41). In words, as a reason not to accelerate.
pub fn foreign_tc(ifindex: IfIndex) -> io::Result<Option<String>> {
    for (hook, name) in [(TcHook::Ingress, "ingress"), (TcHook::Egress, "egress")] {
        if let Some(id) = sys::tcx_program(ifindex, hook)? {
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

fn mode_name(mode: XdpMode) -> &'static str {
    match mode {
        XdpMode::Native => "native",
        XdpMode::Generic => "generic",
    }
}

fn parse_mode(path: &Path) -> Option<XdpMode> {
    let (ifindex, mode) = path.file_name()?.to_str()?.split_once('-')?;
    ifindex.parse::<IfIndex>().ok()?;
    match mode {
        "native" => Some(XdpMode::Native),
        "generic" => Some(XdpMode::Generic),
        _ => None,
    }
}

/// Why the kernel did not attach, in words. The kernel's own text goes to a
/// tracepoint only (bpf_xdp_link_attach_failed), so the usual causes are named.
fn refusal(error: &io::Error, mode: XdpMode, device: Option<rtnl::XdpState>) -> String {
    let errno = error.raw_os_error().unwrap_or(0);
    let device = device.unwrap_or_default();
    let mtu = device.mtu;
    match (errno, mode) {
        (libc::EBUSY | libc::EEXIST, _) if device.program_id != 0 => {
            format!("another XDP program is attached (id {})", device.program_id)
        }
        (libc::EEXIST, _) => "a device on top of it runs an XDP program".to_owned(),
        (libc::ENODEV, _) => "no such device".to_owned(),
        (libc::EOPNOTSUPP, XdpMode::Native) => {
            "the driver has no native XDP, or an offload (LRO, GRO_HW) excludes it: switch that \
             off, or ask for generic XDP, which is slow"
                .to_owned()
        }
        (libc::ERANGE, _) => format!(
            "the MTU is too large for XDP in this driver: lower it (here {mtu}; of a veth, the \
             peer's MTU counts)"
        ),
        (libc::EINVAL, XdpMode::Native) => format!(
            "the driver refuses XDP with its present settings: MTU {mtu}, number of queues or an \
             offload ({error})"
        ),
        (libc::ENOMEM | libc::ENOSPC, XdpMode::Native) => {
            format!("the driver has no queues or memory left for XDP ({error})")
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(errno: i32, mode: XdpMode, program_id: u32) -> String {
        let device = rtnl::XdpState {
            mtu: 9000,
            attached: 1,
            program_id,
        };
        refusal(&io::Error::from_raw_os_error(errno), mode, Some(device))
    }

    #[test]
    fn refusals_name_cause_and_remedy() {
        let native = XdpMode::Native;
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
        for mode in [XdpMode::Native, XdpMode::Generic] {
            let path = PathBuf::from(format!("links/7-{}", mode_name(mode)));
            assert_eq!(parse_mode(&path), Some(mode));
        }
        for name in ["7", "eth0-native", "7-skb", "-native", "7-native-x"] {
            assert_eq!(parse_mode(Path::new(name)), None, "{name}");
        }
    }
}
