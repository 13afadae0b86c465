//! The vtep daemon and command line, as a library: `model` decides, `netlink`
//! and `dataplane` touch the kernel, `controller` connects them, `api` and
//! `cli` talk to people.

pub mod fdb;
pub mod kernel;
pub mod netlink;
pub mod tables;
