//! The netlink module against the real kernel. Every test has a network
//! namespace of its own, changes it with `ip`, `bridge` and `nft`, and expects
//! the facts built from a snapshot and events to be what these tools, and a
//! fresh snapshot, say.

#[path = "netlink_mirror/harness.rs"]
mod harness;

#[path = "netlink_mirror/fdb.rs"]
mod fdb;
#[path = "netlink_mirror/filters.rs"]
mod filters;
#[path = "netlink_mirror/links.rs"]
mod links;
#[path = "netlink_mirror/load.rs"]
mod load;
#[path = "netlink_mirror/manage.rs"]
mod manage;
#[path = "netlink_mirror/refresh.rs"]
mod refresh;
#[path = "netlink_mirror/routes.rs"]
mod routes;
#[path = "netlink_mirror/vlans.rs"]
mod vlans;
