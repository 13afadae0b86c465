//! Lab tests: hosts with ordinary kernel bridges and VXLAN devices behind a
//! router, the real daemon in front of some of them.

mod kernel;
mod life;
mod oracle;
mod traffic;
