//! The only place that speaks netlink: `Events` delivers notifications,
//! `Netlink` answers questions and changes the kernel's state, both in terms of
//! `crate::kernel`. Nothing is decided or remembered here. Called by the
//! controller (events, snapshot, routes, refresh) and by the CLI (`vni add`,
//! `port add`, `fdb add`).

mod codec;
mod decode;
mod error;
mod events;
mod fdb;
mod filters;
mod link;
mod manage;
mod netdev;
mod request;
mod socket;
mod vlan;

#[cfg(test)]
mod tests;

pub use error::{Explanation, NetlinkError};
pub use events::Events;
pub use fdb::FdbWrite;
pub use manage::VxlanSpec;
pub use request::Netlink;
