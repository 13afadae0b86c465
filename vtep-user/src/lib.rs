//! The vtep daemon and command line, as a library: `model` decides, `netlink`
//! and `dataplane` touch the kernel, `controller` connects them, `api` and
//! `cli` talk to people.

pub mod api;
pub mod cli;
pub mod config;
pub mod controller;
pub mod daemon;
pub mod dataplane;
pub mod fdb;
pub mod host;
pub mod instance;
pub mod kernel;
pub mod model;
pub mod netlink;
pub mod tables;
