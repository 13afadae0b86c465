//! VLANs of bridge ports, and the VNIs of a single VXLAN device (`vnifilter`):
//! decoders over bytes, the dumps that read them, and membership for `vtep port add`. Notifications of both kinds
//! say what changed, not what is: they are answered with a dump of the device.

use std::collections::BTreeMap;

use netlink_packet_core::{NLA_F_NESTED, NLM_F_DUMP};

use super::codec::{array, attributes, index_of, u8_of, u16_of, u32_of};
use super::error::{Failure, NetlinkError, device as name_of};
use super::request::Netlink;
use super::socket::{Channel, Request};
use crate::kernel::{IfIndex, VlanRange, VniRange};

/// rtnetlink.h; not in libc.
pub(super) const RTM_NEWVLAN: u16 = 112;
pub(super) const RTM_DELVLAN: u16 = 113;
const RTM_GETVLAN: u16 = 114;
pub(super) const RTM_NEWTUNNEL: u16 = 120;
pub(super) const RTM_DELTUNNEL: u16 = 121;
const RTM_GETTUNNEL: u16 = 122;
pub(super) const RTNLGRP_BRVLAN: u32 = 33;
pub(super) const RTNLGRP_TUNNEL: u32 = 35;

/// `struct br_vlan_msg` (if_bridge.h) and `struct tunnel_msg` (if_link.h): family,
/// padding, interface index.
const HEADER_BYTES: usize = 8;

/// BRIDGE_VLANDB_*, BRIDGE_VLAN_INFO_* (if_bridge.h).
mod vlandb {
    pub const ENTRY: u16 = 1;
    pub const ENTRY_INFO: u16 = 1;
    pub const ENTRY_RANGE: u16 = 2;
    pub const ENTRY_STATE: u16 = 3;
    pub const ENTRY_TUNNEL_INFO: u16 = 4;
    pub const TINFO_ID: u16 = 1;

    pub const FLAG_PVID: u16 = 1 << 1;
    pub const FLAG_UNTAGGED: u16 = 1 << 2;
}

/// VXLAN_VNIFILTER_* (if_link.h).
mod vnifilter {
    pub const ENTRY: u16 = 1;
    pub const ENTRY_START: u16 = 1;
    pub const ENTRY_END: u16 = 2;
}

/// BR_STATE_FORWARDING: what a kernel that does not tell acts by.
const FORWARDING: u8 = 3;

/// The device a message of either kind is about.
pub(super) fn device(body: &[u8]) -> Option<IfIndex> {
    let header: [u8; HEADER_BYTES] = array(body)?;
    index_of(&header[4..])
}

/// The VLANs in an RTM_NEWVLAN; a long list comes in several messages.
pub(super) fn vlans(body: &[u8]) -> Option<(IfIndex, Vec<VlanRange>)> {
    let ifindex = device(body)?;
    let entries = attributes(&body[HEADER_BYTES..]).filter(|(kind, _)| *kind == vlandb::ENTRY);
    Some((
        ifindex,
        entries.filter_map(|(_, entry)| range(entry)).collect(),
    ))
}

fn range(entry: &[u8]) -> Option<VlanRange> {
    let (mut info, mut last, mut state, mut tunnel) = (None, None, FORWARDING, None);
    for (kind, value) in attributes(entry) {
        match kind {
            // `struct bridge_vlan_info`: flags, VLAN.
            vlandb::ENTRY_INFO => info = u16_of(value).zip(value.get(2..).and_then(u16_of)),
            vlandb::ENTRY_RANGE => last = u16_of(value),
            vlandb::ENTRY_STATE => state = u8_of(value).unwrap_or(FORWARDING),
            vlandb::ENTRY_TUNNEL_INFO => {
                let id = attributes(value).find(|(kind, _)| *kind == vlandb::TINFO_ID);
                tunnel = id.and_then(|(_, id)| u32_of(id));
            }
            _ => {}
        }
    }
    let (flags, first) = info?;
    Some(VlanRange {
        first,
        last: last.unwrap_or(first),
        pvid: flags & vlandb::FLAG_PVID != 0,
        untagged: flags & vlandb::FLAG_UNTAGGED != 0,
        state,
        tunnel,
    })
}

/// The VNIs in an RTM_NEWTUNNEL; a long list comes in several messages.
pub(super) fn vnis(body: &[u8]) -> Option<(IfIndex, Vec<VniRange>)> {
    let ifindex = device(body)?;
    let entries = attributes(&body[HEADER_BYTES..]).filter(|(kind, _)| *kind == vnifilter::ENTRY);
    let range = |entry| {
        let (mut first, mut last) = (None, None);
        for (kind, value) in attributes(entry) {
            match kind {
                vnifilter::ENTRY_START => first = u32_of(value),
                vnifilter::ENTRY_END => last = u32_of(value),
                _ => {}
            }
        }
        let first = first?;
        let last = last.unwrap_or(first);
        Some(VniRange { first, last })
    };
    Some((
        ifindex,
        entries.filter_map(|(_, entry)| range(entry)).collect(),
    ))
}

/// The VLANs of one device, none where it is no bridge port; `None` where the
/// device is gone or the kernel has no VLAN filtering.
pub(super) async fn vlans_of(
    channel: &mut Channel,
    ifindex: IfIndex,
) -> Result<Option<Vec<VlanRange>>, NetlinkError> {
    let all = read(channel, RTM_GETVLAN, ifindex, vlans).await;
    one(all, ifindex, "VLANs")
}

/// The VNIs of one device; `None` where it is gone or the kernel has no `vnifilter`.
pub(super) async fn vnis_of(
    channel: &mut Channel,
    ifindex: IfIndex,
) -> Result<Option<Vec<VniRange>>, NetlinkError> {
    let all = read(channel, RTM_GETTUNNEL, ifindex, vnis).await;
    one(all, ifindex, "VNIs")
}

pub(super) async fn all_vlans(
    channel: &mut Channel,
) -> Result<BTreeMap<IfIndex, Vec<VlanRange>>, NetlinkError> {
    let all = read(channel, RTM_GETVLAN, 0, vlans).await;
    every(all, "VLANs of bridge ports")
}

pub(super) async fn all_vnis(
    channel: &mut Channel,
) -> Result<BTreeMap<IfIndex, Vec<VniRange>>, NetlinkError> {
    let all = read(channel, RTM_GETTUNNEL, 0, vnis).await;
    every(all, "VNIs of VXLAN devices")
}

impl Netlink {
    /// Makes a VLAN that of a bridge port's untagged frames.
    pub async fn vlan_join(&self, port: IfIndex, vlan: u16) -> Result<(), NetlinkError> {
        let flags = vlandb::FLAG_PVID | vlandb::FLAG_UNTAGGED;
        let request = membership(RTM_NEWVLAN, port, flags, vlan);
        self.change_vlan(&request, "add", vlan, port).await
    }

    /// Takes a bridge port out of a VLAN; ENOENT if it is not in it.
    pub async fn vlan_leave(&self, port: IfIndex, vlan: u16) -> Result<(), NetlinkError> {
        let request = membership(RTM_DELVLAN, port, 0, vlan);
        self.change_vlan(&request, "remove", vlan, port).await
    }

    async fn change_vlan(
        &self,
        request: &Request,
        operation: &'static str,
        vlan: u16,
        port: IfIndex,
    ) -> Result<(), NetlinkError> {
        let done = self.channel().await.request(request, |_| {}).await;
        let object = || format!("VLAN {vlan} of {}", name_of(port));
        done.map(|_| ())
            .map_err(|failure| failure.during(operation, object()))
    }
}

fn header(ifindex: IfIndex) -> Vec<u8> {
    let mut body = vec![libc::AF_BRIDGE as u8, 0, 0, 0];
    body.extend(ifindex.to_ne_bytes());
    body
}

fn membership(kind: u16, port: IfIndex, vlan_flags: u16, vlan: u16) -> Request {
    let mut body = header(port);
    for word in [
        12,
        vlandb::ENTRY | NLA_F_NESTED,
        8,
        vlandb::ENTRY_INFO,
        vlan_flags,
        vlan,
    ] {
        body.extend(word.to_ne_bytes());
    }
    let flags = 0;
    Request { kind, flags, body }
}

type Found<T> = BTreeMap<IfIndex, Vec<T>>;
type Decode<T> = fn(&[u8]) -> Option<(IfIndex, Vec<T>)>;

/// Dumps one device, or all for 0.
async fn read<T>(
    channel: &mut Channel,
    kind: u16,
    ifindex: IfIndex,
    decode: Decode<T>,
) -> Result<Found<T>, Failure> {
    let request = Request {
        kind,
        flags: NLM_F_DUMP,
        body: header(ifindex),
    };
    let mut found = Found::new();
    channel
        .request(&request, |message| {
            if let Some((ifindex, ranges)) = decode(message.body) {
                found.entry(ifindex).or_default().extend(ranges);
            }
        })
        .await?;
    Ok(found)
}

fn one<T>(
    all: Result<Found<T>, Failure>,
    ifindex: IfIndex,
    what: &str,
) -> Result<Option<Vec<T>>, NetlinkError> {
    match all {
        Ok(mut found) => Ok(Some(found.remove(&ifindex).unwrap_or_default())),
        Err(failure) => match failure.errno() {
            // No bridge port (any more), or no `vnifilter`.
            Some(libc::EINVAL) => Ok(Some(Vec::new())),
            Some(libc::ENODEV | libc::EOPNOTSUPP) => Ok(None),
            _ => Err(failure.during("read", format!("the {what} of {}", name_of(ifindex)))),
        },
    }
}

fn every<T>(all: Result<Found<T>, Failure>, what: &'static str) -> Result<Found<T>, NetlinkError> {
    match all {
        Err(failure) if failure.errno() == Some(libc::EOPNOTSUPP) => Ok(Found::new()),
        all => all.map_err(|failure| failure.during("read", what)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_membership_that_is_asked_for_reads_back() {
        let request = membership(RTM_NEWVLAN, 7, vlandb::FLAG_PVID, 10);
        let expected = VlanRange {
            first: 10,
            last: 10,
            pvid: true,
            untagged: false,
            state: FORWARDING,
            tunnel: None,
        };
        assert_eq!(vlans(&request.body), Some((7, vec![expected])));
    }
}
