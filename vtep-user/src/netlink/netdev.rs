//! Which devices take redirected frames, from the generic netlink family
//! "netdev" (Documentation/netlink/specs/netdev.yaml, Linux 6.3). A device
//! without `ndo_xdp_xmit`, or a veth whose other end does not poll, loses them
//! in silence: that has to be known before anything is sent there.

use std::collections::BTreeSet;
use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};

use super::codec::{attributes, frame, messages, text_of, u16_of, u32_of};
use super::error::NetlinkError;
use super::request::Netlink;
use super::socket::Request;
use crate::kernel::IfIndex;

/// Of the controller family (include/uapi/linux/genetlink.h).
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
/// `struct genlmsghdr`.
const GENL_HEADER_BYTES: usize = 4;

/// include/uapi/linux/netdev.h.
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETDEV_XDP_ACT_NDO_XMIT: u64 = 4;
const NOTIFICATIONS: &str = "mgmt";

/// Numbers that the kernel gave to the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Family {
    pub id: u16,
    /// Multicast group of changes.
    pub group: u32,
}

/// Ask for the family; `None` where the kernel has none. Waits for the answer,
/// which the kernel gives within the call.
pub(super) fn family() -> io::Result<Option<Family>> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    let mut body = vec![CTRL_CMD_GETFAMILY, 1, 0, 0];
    let name = b"netdev\0";
    body.extend(((name.len() + 4) as u16).to_ne_bytes());
    body.extend(CTRL_ATTR_FAMILY_NAME.to_ne_bytes());
    body.extend(name);
    let mut request = Vec::new();
    frame(
        GENL_ID_CTRL,
        NLM_F_REQUEST | NLM_F_ACK,
        1,
        &body,
        &mut request,
    );
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    Ok(messages(&answer)
        .find(|m| m.kind == GENL_ID_CTRL)
        .and_then(|m| read_family(m.body)))
}

fn read_family(body: &[u8]) -> Option<Family> {
    let (mut id, mut group) = (None, None);
    for (kind, value) in attributes(body.get(GENL_HEADER_BYTES..)?) {
        match kind {
            CTRL_ATTR_FAMILY_ID => id = u16_of(value),
            CTRL_ATTR_MCAST_GROUPS => {
                group = attributes(value).find_map(|(_, group)| {
                    let field = |wanted| {
                        attributes(group)
                            .find(|(kind, _)| *kind == wanted)
                            .map(|(_, value)| value)
                    };
                    let named = text_of(field(CTRL_ATTR_MCAST_GRP_NAME)?) == NOTIFICATIONS;
                    named
                        .then(|| u32_of(field(CTRL_ATTR_MCAST_GRP_ID)?))
                        .flatten()
                });
            }
            _ => {}
        }
    }
    Some(Family {
        id: id?,
        group: group?,
    })
}

impl Netlink {
    /// Devices of this network namespace that take redirected frames; `None`
    /// where the kernel does not tell.
    pub async fn redirect_targets(&self) -> Result<Option<BTreeSet<IfIndex>>, NetlinkError> {
        let Some((family, channel)) = &self.netdev else {
            return Ok(None);
        };
        let request = Request {
            kind: family.id,
            flags: NLM_F_DUMP,
            body: vec![NETDEV_CMD_DEV_GET, 1, 0, 0],
        };
        let mut targets = BTreeSet::new();
        channel
            .lock()
            .await
            .request(&request, |message| targets.extend(target(message.body)))
            .await
            .map_err(|failure| failure.during("read", "the XDP features of devices"))?;
        Ok(Some(targets))
    }
}

/// The device of a NETDEV_CMD_DEV_GET answer, if it takes redirected frames.
fn target(body: &[u8]) -> Option<IfIndex> {
    let (mut ifindex, mut features) = (None, 0);
    for (kind, value) in attributes(body.get(GENL_HEADER_BYTES..)?) {
        match kind {
            NETDEV_A_DEV_IFINDEX => ifindex = u32_of(value),
            NETDEV_A_DEV_XDP_FEATURES => {
                features = value
                    .first_chunk()
                    .map_or(0, |bytes| u64::from_ne_bytes(*bytes));
            }
            _ => {}
        }
    }
    ifindex.filter(|_| features & NETDEV_XDP_ACT_NDO_XMIT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn family_and_group_are_read() {
        let group = [
            attribute(CTRL_ATTR_MCAST_GRP_ID, &9u32.to_ne_bytes()),
            attribute(CTRL_ATTR_MCAST_GRP_NAME, b"mgmt\0"),
        ]
        .concat();
        let other = attribute(CTRL_ATTR_MCAST_GRP_NAME, b"page-pool\0");
        let groups = [attribute(1, &other), attribute(2, &group)].concat();
        let body = [
            vec![1, 2, 0, 0],
            attribute(CTRL_ATTR_FAMILY_ID, &0x1au16.to_ne_bytes()),
            attribute(CTRL_ATTR_MCAST_GROUPS, &groups),
        ]
        .concat();
        assert_eq!(read_family(&body), Some(Family { id: 0x1a, group: 9 }));
    }

    #[test]
    fn only_devices_with_xmit_are_targets() {
        let device = |features: u64| {
            [
                vec![1, 1, 0, 0],
                attribute(NETDEV_A_DEV_IFINDEX, &7u32.to_ne_bytes()),
                attribute(NETDEV_A_DEV_XDP_FEATURES, &features.to_ne_bytes()),
            ]
            .concat()
        };
        assert_eq!(target(&device(0x67)), Some(7));
        assert_eq!(target(&device(0x23 & !4)), None);
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            read_family(&bytes);
            target(&bytes);
        }
    }
}
