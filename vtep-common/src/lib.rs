//! What the eBPF programs and user space must agree on, and nothing else:
//! addresses, wire headers, encapsulation and decapsulation code, map layouts
//! and outcomes. Pure: no I/O, no clock, no allocation, no panics on any input.
//! Called by `vtep-ebpf` (in XDP) and by `vtep-user` (model, templates); tested
//! by plain `cargo test`.

#![cfg_attr(not(any(test, feature = "user")), no_std)]

pub mod addr;
pub mod checksum;
pub mod decap;
pub mod ecn;
pub mod encap;
pub mod fdb;
pub mod flow;
pub mod layout;
pub mod lco;
pub mod outcome;
pub mod wire;

pub use addr::{MacAddr, Vni};
pub use outcome::{Fate, Outcome};
