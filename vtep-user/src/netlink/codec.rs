//! Framing that every netlink protocol shares: messages in a datagram,
//! attributes in a message, values in an attribute. Total on any input: what is
//! cut short ends the iteration, nothing panics. netlink-packet-route is used
//! for writing only: its decoder refuses a whole message for one attribute of
//! an unexpected size, and a mirror must not lose facts.

use std::net::IpAddr;

use netlink_packet_core::NLA_TYPE_MASK;
use vtep_common::{MacAddr, Vni};

/// `struct nlmsghdr` (include/uapi/linux/netlink.h).
pub(super) const HEADER_BYTES: usize = 16;

/// neighbour.h; not in libc.
pub(super) const NDA_NH_ID: u16 = 13;

/// One netlink message inside a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub kind: u16,
    /// NLM_F_*.
    pub flags: u16,
    pub sequence: u32,
    /// Everything behind `struct nlmsghdr`.
    pub body: &'a [u8],
}

/// The messages of a datagram, up to the first one that is cut short.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(array(rest)?) as usize;
        let message = rest.get(..length)?;
        let body = message.get(HEADER_BYTES..)?;
        rest = rest.get(align4(length)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes(array(&message[4..])?),
            flags: u16::from_ne_bytes(array(&message[6..])?),
            sequence: u32::from_ne_bytes(array(&message[8..])?),
            body,
        })
    })
}

/// The attributes of a message body or of a nested attribute: type without the
/// nesting and byte-order bits, and value.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(array(rest)?));
        let kind = u16::from_ne_bytes(array(rest.get(2..)?)?) & NLA_TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(align4(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The first `N` bytes.
pub(super) fn array<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.first_chunk().copied()
}

pub(super) fn u8_of(value: &[u8]) -> Option<u8> {
    value.first().copied()
}

/// Host byte order.
pub(super) fn u16_of(value: &[u8]) -> Option<u16> {
    array(value).map(u16::from_ne_bytes)
}

/// Network byte order.
pub(super) fn u16_be_of(value: &[u8]) -> Option<u16> {
    array(value).map(u16::from_be_bytes)
}

/// Host byte order.
pub(super) fn u32_of(value: &[u8]) -> Option<u32> {
    array(value).map(u32::from_ne_bytes)
}

/// Network byte order.
pub(super) fn u32_be_of(value: &[u8]) -> Option<u32> {
    array(value).map(u32::from_be_bytes)
}

/// An on/off attribute as the kernel dumps it: one byte.
pub(super) fn bool_of(value: &[u8]) -> bool {
    value.first().is_some_and(|&byte| byte != 0)
}

/// Text up to the terminating zero.
pub(super) fn text_of(value: &[u8]) -> String {
    let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// An interface index; 0 means none.
pub(super) fn index_of(value: &[u8]) -> Option<u32> {
    u32_of(value).filter(|&index| index != 0)
}

/// An Ethernet address: exactly six bytes.
pub(super) fn mac_of(value: &[u8]) -> Option<MacAddr> {
    value.try_into().ok().map(MacAddr)
}

/// An IP address, its family told by the length as in AF_BRIDGE messages.
pub(super) fn ip_of(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => array::<4>(value).map(IpAddr::from),
        16 => array::<16>(value).map(IpAddr::from),
        _ => None,
    }
}

pub(super) fn vni_of(value: &[u8]) -> Option<Vni> {
    u32_of(value).and_then(Vni::new)
}

/// Appends one message, padded so that another may follow.
pub(super) fn frame(kind: u16, flags: u16, sequence: u32, body: &[u8], into: &mut Vec<u8>) {
    let length = (HEADER_BYTES + body.len()) as u32;
    into.extend_from_slice(&length.to_ne_bytes());
    into.extend_from_slice(&kind.to_ne_bytes());
    into.extend_from_slice(&flags.to_ne_bytes());
    into.extend_from_slice(&sequence.to_ne_bytes());
    // nlmsg_pid: the kernel fills it in.
    into.extend_from_slice(&[0; 4]);
    into.extend_from_slice(body);
    into.resize(align4(into.len()), 0);
}

fn align4(length: usize) -> usize {
    length.saturating_add(3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn framed_messages_are_read_back_in_order() {
        let mut bytes = Vec::new();
        frame(16, 5, 7, &[1, 2, 3, 4], &mut bytes);
        frame(17, 0, 8, &[9, 9, 9], &mut bytes);
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].kind, all[0].flags, all[0].sequence), (16, 5, 7));
        assert_eq!(all[0].body, [1, 2, 3, 4]);
        assert_eq!((all[1].kind, all[1].body), (17, &[9u8, 9, 9][..]));
    }

    #[test]
    fn a_message_that_is_cut_short_ends_the_datagram() {
        let mut bytes = Vec::new();
        frame(16, 0, 1, &[0; 8], &mut bytes);
        for length in 0..bytes.len() {
            assert_eq!(messages(&bytes[..length]).count(), 0, "{length}");
        }
        // A length below the header's own would never advance.
        bytes[0] = 15;
        assert_eq!(messages(&bytes).count(), 0);
    }

    #[test]
    fn attributes_lose_flag_bits_and_stop_at_nonsense() {
        let bytes = [
            6, 0, 5, 0x80, 1, 2, 0, 0, // nested bit set, padded
            4, 0, 7, 0, // empty
            3, 0, 1, 0, // shorter than its own header
            5, 0, 9, 0, 1, 0, 0, 0,
        ];
        let all: Vec<_> = attributes(&bytes).collect();
        assert_eq!(all, [(5, &[1u8, 2][..]), (7, &[][..])]);
    }

    #[test]
    fn values_of_the_wrong_size_are_none() {
        assert_eq!(u32_of(&[1, 2, 3]), None);
        assert_eq!(mac_of(&[0; 8]), None);
        assert_eq!(ip_of(&[0; 5]), None);
        assert_eq!(index_of(&[0; 4]), None);
        assert_eq!(vni_of(&(1u32 << 24).to_ne_bytes()), None);
        assert_eq!(text_of(b"br0\0junk"), "br0");
        assert_eq!(u16_be_of(&[0x12, 0xb5]), Some(4789));
    }
}
