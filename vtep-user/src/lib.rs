//! The vtep daemon and command line, as a library: `model` decides, `netlink`
//! and `dataplane` touch the kernel, `controller` connects them, `api` and
//! `cli` talk to people.

pub mod dataplane;
pub mod kernel;
pub mod tables;
