//! Takes the eBPF object up into the program: from the directory named by
//! VTEP_EBPF_DIR, or where `cargo xtask build` leaves it. Without one the file is
//! empty, so that `cargo build` and `cargo test` work without the eBPF
//! toolchain; `vtep run` then says how to build it.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let default =
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/bpfel-unknown-none/release");
    let object = env::var_os("VTEP_EBPF_DIR")
        .map_or_else(default, PathBuf::from)
        .join("vtep");
    println!("cargo::rerun-if-env-changed=VTEP_EBPF_DIR");
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = fs::read(&object).unwrap_or_default();
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("vtep.o");
    if let Err(error) = fs::write(&out, bytes) {
        println!("cargo::error=cannot write {}: {error}", out.display());
    }
}
