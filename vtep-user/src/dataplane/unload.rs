//! Remove a data path: with or without a daemon, of any layout version, any
//! number of times. Detaches first, then looks whether everything is gone.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::pins::{self, Pins};
use super::sys::{self, Kind};
use super::{DataplaneError, hooks};
use crate::kernel::IfIndex;
use crate::tables::Hook;

/// The kernel frees programs and maps after RCU grace periods.
const FREED_WITHIN: Duration = Duration::from_secs(2);

/// What `unload` did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unloaded {
    /// Devices that were detached.
    pub detached: Vec<IfIndex>,
    /// Links whose device was gone already.
    pub idle_links: usize,
    /// Names of the maps that were unpinned.
    pub maps: Vec<String>,
    /// Directories of layout versions that were removed.
    pub layouts: Vec<PathBuf>,
    /// What still exists, in words: something else holds it.
    pub remaining: Vec<String>,
}

/// An object that has to disappear.
enum Object {
    Map { id: u32, name: String },
    Program { id: u32, name: String },
}

impl Object {
    fn exists(&self) -> bool {
        match self {
            Self::Map { id, .. } => sys::map_by_id(*id).is_ok(),
            Self::Program { id, .. } => sys::program_by_id(*id).is_ok(),
        }
    }

    fn text(&self) -> String {
        let (kind, id, name) = match self {
            Self::Map { id, name } => ("map", id, name),
            Self::Program { id, name } => ("program", id, name),
        };
        format!("{kind} {name} (id {id}) is held by another process: is a vtep still running?")
    }
}

pub fn unload(instance: &Path) -> Result<Unloaded, DataplaneError> {
    let pins = Pins::new(instance)?;
    let mut report = Unloaded::default();
    let mut objects = Vec::new();
    for layout in pins.layouts()? {
        let mut files = Vec::new();
        let mut directories = vec![layout.clone()];
        collect(&layout, &mut files, &mut directories)?;
        let opened = files
            .into_iter()
            .map(|path| {
                let fd = sys::open_pin(&path)
                    .map_err(|e| DataplaneError::kernel(format!("open {}", path.display()), e))?;
                Ok((sys::kind(fd.as_fd()), fd, path))
            })
            .collect::<Result<Vec<(Kind, OwnedFd, PathBuf)>, DataplaneError>>()?;
        // Nothing may run any more when the first map loses its name. XDP goes
        // before the tcx program that finishes what it began.
        let mut links: Vec<_> = opened
            .iter()
            .filter(|(kind, ..)| *kind == Kind::Link)
            .collect();
        links.sort_by_key(|(.., path)| hooks::parse_hook(path) == Some(Hook::Tcx));
        for (_, fd, path) in links {
            remove_link(fd, path, &mut report, &mut objects)?;
        }
        for (kind, fd, path) in opened.iter().filter(|(kind, ..)| *kind != Kind::Link) {
            if *kind == Kind::Map {
                let info = sys::map_info(fd.as_fd()).map_err(|e| failed(path, e))?;
                report.maps.push(info.name());
                objects.push(Object::Map {
                    id: info.id,
                    name: info.name(),
                });
            }
            fs::remove_file(path).map_err(|e| failed(path, e))?;
        }
        for directory in directories.iter().rev() {
            fs::remove_dir(directory).map_err(|e| failed(directory, e))?;
        }
        report.layouts.push(layout);
    }
    // Not ours alone: what else lies in it stays.
    match fs::remove_dir(pins.instance()) {
        Err(e) if !matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTEMPTY)) => {
            return Err(failed(pins.instance(), e));
        }
        _ => {}
    }
    let deadline = Instant::now() + FREED_WITHIN;
    objects.retain(Object::exists);
    while !objects.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
        objects.retain(Object::exists);
    }
    report.remaining.extend(objects.iter().map(Object::text));
    report.maps.sort();
    Ok(report)
}

fn remove_link(
    link: &OwnedFd,
    path: &Path,
    report: &mut Unloaded,
    objects: &mut Vec<Object>,
) -> Result<(), DataplaneError> {
    let info = sys::link_info(link.as_fd()).map_err(|e| failed(path, e))?;
    if let Ok(program) = sys::program_by_id(info.program_id)
        && let Ok(program) = sys::program_info(program.as_fd())
        && !objects
            .iter()
            .any(|object| matches!(object, Object::Program { id, .. } if *id == program.id))
    {
        objects.push(Object::Program {
            id: program.id,
            name: program.name(),
        });
    }
    hooks::detach_and_unpin(link, path).map_err(|e| failed(path, e))?;
    let Some(ifindex) = info.ifindex() else {
        report.idle_links += 1;
        return Ok(());
    };
    if !report.detached.contains(&ifindex) {
        report.detached.push(ifindex);
    }
    // In another network namespace the number may mean another device, which
    // then runs another program.
    let hook = hooks::parse_hook(path);
    if hook.is_some_and(|hook| hooks::runs_here(ifindex, hook, info.program_id)) {
        report.remaining.push(format!(
            "the program on ifindex {ifindex} (id {}) is still attached",
            info.program_id
        ));
    }
    Ok(())
}

/// Files and directories below `directory`, parents first.
fn collect(
    directory: &Path,
    files: &mut Vec<PathBuf>,
    directories: &mut Vec<PathBuf>,
) -> Result<(), DataplaneError> {
    for path in pins::entries(directory)? {
        if path.is_dir() {
            directories.push(path.clone());
            collect(&path, files, directories)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

fn failed(path: &Path, error: std::io::Error) -> DataplaneError {
    DataplaneError::kernel(format!("remove {}", path.display()), error)
}
