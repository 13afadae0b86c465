//! Lab tests: hosts with ordinary kernel bridges and VXLAN devices behind a
//! router, the real daemon in front of some of them.

mod control;
mod daemon;
mod evpn;
mod families;
mod generated;
mod guide;
mod headers;
mod kernel;
mod late;
mod life;
mod mirror;
mod moves;
mod offload;
mod oracle;
mod reasons;
mod strict;
mod traffic;
mod underlay;
mod vlans;
