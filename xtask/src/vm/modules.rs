//! Kernel modules by name, with what they depend on, in the order of loading.
//! Dependencies stand in the modules themselves (section `.modinfo`), so that
//! no `depmod` is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::run::quiet;

/// One module, ready for `insmod`.
#[derive(Debug)]
pub struct Module {
    pub name: String,
    pub image: Vec<u8>,
}

/// Modules of an unpacked kernel package.
pub struct Modules {
    paths: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    chosen: Vec<Module>,
}

impl Modules {
    /// All modules below `directory` (lib/modules/RELEASE).
    pub fn of(directory: &Path) -> Result<Self> {
        let mut paths = BTreeMap::new();
        find(directory, &mut paths)?;
        let list = directory.join("modules.builtin");
        let list = fs::read_to_string(&list).with_context(|| list.display().to_string())?;
        let builtin = list.lines().filter_map(|line| name(Path::new(line)));
        Ok(Self {
            paths,
            builtin: builtin.collect(),
            chosen: Vec::new(),
        })
    }

    /// Take a module and everything it depends on.
    pub fn add(&mut self, module: &str) -> Result<()> {
        let module = module.replace('-', "_");
        if self.builtin.contains(&module) || self.chosen.iter().any(|m| m.name == module) {
            return Ok(());
        }
        let path = self
            .paths
            .get(&module)
            .with_context(|| format!("the kernel has no module {module}"))?;
        let image = read(path)?;
        for other in dependencies(&image).with_context(|| path.display().to_string())? {
            self.add(&other)?;
        }
        self.chosen.push(Module {
            name: module,
            image,
        });
        Ok(())
    }

    /// What was taken, in the order of loading.
    pub fn chosen(self) -> Vec<Module> {
        self.chosen
    }
}

fn find(directory: &Path, paths: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, paths)?;
        } else if let Some(name) = name(&path) {
            paths.insert(name, path);
        }
    }
    Ok(())
}

/// `nf-tables.ko.xz` -> `nf_tables`.
fn name(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => Ok(quiet(Command::new("xz").args(["-dc", "--"]).arg(path))?.stdout),
        Some("ko") => fs::read(path).with_context(|| path.display().to_string()),
        _ => bail!("{}: compressed in an unknown way", path.display()),
    }
}

/// `depends=` of a module. Soft dependencies only make things faster, or are
/// names of algorithms.
fn dependencies(image: &[u8]) -> Result<Vec<String>> {
    let info = section(image, ".modinfo")?;
    let mut names = Vec::new();
    for field in info.split(|byte| *byte == 0) {
        let field = String::from_utf8_lossy(field);
        if let Some(list) = field.strip_prefix("depends=") {
            names.extend(list.split(',').map(str::to_owned));
        }
    }
    names.retain(|name| !name.is_empty());
    Ok(names)
}

/// A section of a 64-bit little-endian ELF file (elf.h: Elf64_Ehdr, Elf64_Shdr).
fn section<'a>(elf: &'a [u8], wanted: &str) -> Result<&'a [u8]> {
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "no 64-bit ELF file");
    let at = |offset: usize, length: usize| {
        let bytes = elf.get(offset..offset + length).context("ELF file cut")?;
        let number = bytes
            .iter()
            .rev()
            .fold(0, |sum, b| sum << 8 | u64::from(*b));
        anyhow::Ok(number as usize)
    };
    let (table, size) = (at(0x28, 8)?, at(0x3a, 2)?);
    let (count, names) = (at(0x3c, 2)?, at(0x3e, 2)?);
    let place = |index: usize| {
        let header = table + index * size;
        anyhow::Ok((at(header, 4)?, at(header + 0x18, 8)?, at(header + 0x20, 8)?))
    };
    let (_, names, _) = place(names)?;
    for index in 0..count {
        let (name, offset, length) = place(index)?;
        let name = elf.get(names + name..).context("ELF file cut")?;
        if name.starts_with(wanted.as_bytes()) && name.get(wanted.len()) == Some(&0) {
            return elf.get(offset..offset + length).context("ELF file cut");
        }
    }
    bail!("no section {wanted}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with the sections "" (names) and ".modinfo".
    fn elf(info: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0";
        let mut file = b"\x7fELF\x02\x01".to_vec();
        file.resize(0x40, 0);
        let names_at = file.len();
        file.extend_from_slice(names);
        let info_at = file.len();
        file.extend_from_slice(info);
        let table = file.len();
        for (name, offset, length) in [(0_u32, names_at, names.len()), (1, info_at, info.len())] {
            let mut header = [0; 0x40];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(length as u64).to_le_bytes());
            file.extend_from_slice(&header);
        }
        file[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        file[0x3a..0x40].copy_from_slice(&[0x40, 0, 2, 0, 0, 0]);
        file
    }

    #[test]
    fn dependencies_are_read_from_the_module() {
        let file = elf(b"license=GPL\0depends=stp,llc\0softdep=pre: crc32c\0\0");
        assert_eq!(dependencies(&file).unwrap(), ["stp", "llc"]);
        let file = elf(b"depends=\0");
        assert_eq!(dependencies(&file).unwrap(), [""; 0]);
    }

    #[test]
    fn cut_files_are_refused() {
        let file = elf(b"depends=stp\0");
        // What follows the size of the last section is not read.
        for length in 0..file.len() - 0x18 {
            assert!(dependencies(&file[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn names_of_modules_have_no_dashes() {
        let is = |path: &str| name(Path::new(path));
        assert_eq!(is("net/nf-tables.ko.xz").as_deref(), Some("nf_tables"));
        assert_eq!(is("modules.order"), None);
    }
}
