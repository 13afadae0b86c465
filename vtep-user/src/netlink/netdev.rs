//! The kernel's word on which devices take frames that XDP redirects to them
//! (generic netlink family "netdev", since Linux 6.3). A veth takes them only
//! while its peer polls, drops them otherwise, and says so nowhere else.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_ERROR};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};

use super::codec::{
    Message, array, attributes, frame, index_of, messages, text_of, u8_of, u16_of, u32_of,
};
use super::socket::Request;
use crate::kernel::{Event, IfIndex};

/// `struct genlmsghdr` (genetlink.h).
const GENLMSG_BYTES: usize = 4;
/// GENL_ID_CTRL, CTRL_CMD_* and CTRL_ATTR_* (genetlink.h).
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const GROUPS: u16 = 7;
const GROUP_NAME: u16 = 1;
const GROUP_ID: u16 = 2;
/// NETDEV_CMD_* and NETDEV_A_DEV_* (netdev.h).
const DEV_GET: u8 = 1;
const DEV_ADDED: u8 = 2;
const DEV_CHANGED: u8 = 4;
const DEV_IFINDEX: u16 = 1;
const DEV_XDP_FEATURES: u16 = 3;
/// NETDEV_XDP_ACT_NDO_XMIT.
const TAKES_REDIRECTS: u64 = 4;

/// Numbers the kernel gave the family at boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Family {
    pub id: u16,
    /// Group "mgmt": devices that come, change and go.
    pub group: u32,
}

impl Family {
    /// `None` where the kernel does not have it.
    pub fn find() -> io::Result<Option<Self>> {
        let mut socket = match Socket::new(NETLINK_GENERIC) {
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(None),
            socket => socket?,
        };
        socket.bind_auto()?;
        let mut request = Vec::new();
        let body = [
            &[GET_FAMILY, 1, 0, 0, 11, 0, FAMILY_NAME as u8, 0][..],
            b"netdev\0\0",
        ];
        frame(CONTROL, NLM_F_REQUEST, 1, &body.concat(), &mut request);
        socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
        // The kernel has answered before the request returned.
        let mut answer = Vec::with_capacity(16 * 1024);
        socket.recv_from(&mut answer, 0)?;
        let message = messages(&answer).next();
        Ok(message.and_then(|message| family(&message)))
    }
}

fn family(message: &Message<'_>) -> Option<Family> {
    if message.kind == NLMSG_ERROR {
        return None;
    }
    let (mut id, mut group) = (None, None);
    for (kind, value) in attributes(message.body.get(GENLMSG_BYTES..)?) {
        match kind {
            FAMILY_ID => id = u16_of(value),
            GROUPS => {
                for (_, entry) in attributes(value) {
                    let find = |wanted| attributes(entry).find(|(kind, _)| *kind == wanted);
                    if find(GROUP_NAME).is_some_and(|(_, name)| text_of(name) == "mgmt") {
                        group = find(GROUP_ID).and_then(|(_, number)| u32_of(number));
                    }
                }
            }
            _ => {}
        }
    }
    Some(Family {
        id: id?,
        group: group?,
    })
}

/// Asks for all devices of the network namespace.
pub(super) fn all_devices(family: Family) -> Request {
    Request {
        kind: family.id,
        flags: NLM_F_DUMP,
        body: vec![DEV_GET, 1, 0, 0],
    }
}

/// A device as an answer or a notification has it, and whether it takes
/// redirected frames.
pub(super) fn device(message: &Message<'_>, family: Family) -> Option<(IfIndex, bool)> {
    let known = [DEV_GET, DEV_ADDED, DEV_CHANGED];
    if message.kind != family.id || !known.contains(&u8_of(message.body)?) {
        return None;
    }
    let (mut ifindex, mut features) = (None, None);
    for (kind, value) in attributes(message.body.get(GENLMSG_BYTES..)?) {
        match kind {
            DEV_IFINDEX => ifindex = index_of(value),
            DEV_XDP_FEATURES => features = array(value).map(u64::from_ne_bytes),
            _ => {}
        }
    }
    Some((ifindex?, features? & TAKES_REDIRECTS != 0))
}

/// The same as an event.
pub(super) fn event(message: &Message<'_>, family: Family) -> Option<Event> {
    let (ifindex, takes) = device(message, family)?;
    Some(Event::TakesRedirects { ifindex, takes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FAMILY: Family = Family { id: 40, group: 9 };

    #[test]
    fn this_kernel_is_asked() {
        // Every kernel answers; since 6.3 with numbers.
        if let Some(family) = Family::find().unwrap() {
            assert!(family.id > CONTROL && family.group > 0, "{family:?}");
        }
    }

    #[test]
    fn the_bit_that_counts_is_read() {
        let mut body = vec![DEV_CHANGED, 1, 0, 0, 8, 0, 1, 0, 5, 0, 0, 0, 12, 0, 3, 0];
        body.extend(0b100_0111u64.to_ne_bytes());
        let event = |kind, body: &[u8]| {
            let message = Message {
                kind,
                flags: 0,
                sequence: 0,
                body,
            };
            event(&message, FAMILY)
        };
        let takes = |takes| Some(Event::TakesRedirects { ifindex: 5, takes });
        assert_eq!(event(40, &body), takes(true));
        body[16] = 0b11;
        assert_eq!(event(40, &body), takes(false));
        assert_eq!(event(41, &body), None);
        body[0] = 3;
        assert_eq!(event(40, &body), None, "gone");
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(kind: u16, body: Vec<u8>) {
            let message = Message { kind, flags: 0, sequence: 0, body: &body };
            event(&message, Family { id: kind, group: 1 });
            family(&message);
        }
    }
}
