//! Archives for the kernel's initramfs ("newc", Documentation/driver-api/
//! early-userspace/buffer-format.rst). Written here, so that neither `cpio` nor
//! root is needed. Several can simply be put one after the other.

use std::collections::BTreeSet;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    names: BTreeSet<String>,
}

impl Archive {
    /// A file and the directories above it. The first of a name stays.
    pub fn file(&mut self, path: &str, permissions: u32, data: &[u8]) {
        self.entry(path, FILE | permissions, data, (0, 0));
    }

    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, &[], (0, 0));
    }

    pub fn link(&mut self, path: &str, target: &str) {
        self.entry(path, LINK, target.as_bytes(), (0, 0));
    }

    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE, &[], (major, minor));
    }

    pub fn has(&self, path: &str) -> bool {
        self.names.contains(path.trim_start_matches('/'))
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.write("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8], device: (u32, u32)) {
        let name = path.trim_start_matches('/');
        if self.has(name) {
            return;
        }
        if let Some(above) = Path::new(name).parent().and_then(Path::to_str)
            && !above.is_empty()
        {
            self.directory(above);
        }
        self.names.insert(name.to_owned());
        self.write(name, mode, data, device);
    }

    fn write(&mut self, name: &str, mode: u32, data: &[u8], (major, minor): (u32, u32)) {
        self.entries += 1;
        let (data_length, name_length) = (data.len() as u32, name.len() as u32 + 1);
        // inode, mode, uid, gid, links, mtime, size, device of the file system (2), device (2),
        // name with its zero byte, checksum.
        self.bytes.extend_from_slice(b"070701");
        for field in [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            data_length,
            0,
            0,
            major,
            minor,
            name_length,
            0,
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (name, mode, data) of every entry.
    fn entries(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let number = |field: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * field..14 + 8 * field]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            assert_eq!(&bytes[..6], b"070701");
            let (mode, size, name_length) = (number(1), number(6) as usize, number(11) as usize);
            let data = (110 + name_length).next_multiple_of(4);
            found.push((
                String::from_utf8(bytes[110..110 + name_length - 1].to_vec()).unwrap(),
                mode,
                bytes[data..data + size].to_vec(),
            ));
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
        found
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_once() {
        let mut archive = Archive::default();
        archive.file("/usr/bin/a", 0o755, b"12345");
        archive.file("usr/bin/b", 0o644, b"");
        archive.file("/usr/bin/a", 0o600, b"another");
        archive.link("/init", "bin/busybox");
        let entry = |name: &str, mode, data: &[u8]| (name.to_owned(), mode, data.to_vec());
        assert_eq!(
            entries(&archive.finish()),
            [
                entry("usr", 0o040_755, b""),
                entry("usr/bin", 0o040_755, b""),
                entry("usr/bin/a", 0o100_755, b"12345"),
                entry("usr/bin/b", 0o100_644, b""),
                entry("init", 0o120_777, b"bin/busybox"),
                entry("TRAILER!!!", 0, b""),
            ]
        );
    }
}
