//! Two questions to rtnetlink that have to be asked at the moment of attaching:
//! what runs on the XDP hook, and are there tc filters. Everything else about
//! links comes from `netlink`. Used by `dataplane` only.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use super::sys::TcHook;

const NLMSG_HEADER_LEN: usize = 16;
/// `struct ifinfomsg`; `struct tcmsg` is longer by 4.
const IFINFOMSG_LEN: usize = 16;
const TCMSG_LEN: usize = 20;

const IFLA_MTU: u16 = 4;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_XDP_PROG_ID: u16 = 4;
const IFLA_XDP_DRV_PROG_ID: u16 = 5;
const IFLA_XDP_SKB_PROG_ID: u16 = 6;
const IFLA_XDP_HW_PROG_ID: u16 = 7;
const TCA_KIND: u16 = 1;

/// Parents of the filters of a clsact qdisc (pkt_sched.h); an ingress qdisc
/// answers to the first as well.
const PARENT_INGRESS: u32 = 0xffff_fff2;
const PARENT_EGRESS: u32 = 0xffff_fff3;

/// XDP as the device shows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct XdpState {
    pub mtu: u32,
    /// XDP_ATTACHED_* (if_link.h); 0: none.
    pub attached: u8,
    /// A program on it, any mode; 0: none.
    pub program_id: u32,
}

/// ENODEV where the device is not in this thread's network namespace.
pub fn xdp_state(ifindex: u32) -> io::Result<XdpState> {
    let mut body = [0u8; IFINFOMSG_LEN];
    body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    let mut state = XdpState::default();
    request(libc::RTM_GETLINK, 0, &body, |kind, payload| {
        if kind == libc::RTM_NEWLINK {
            state = parse_link(payload);
        }
    })?;
    Ok(state)
}

fn parse_link(payload: &[u8]) -> XdpState {
    let mut state = XdpState::default();
    for (kind, value) in attributes(payload.get(IFINFOMSG_LEN..).unwrap_or_default()) {
        match kind {
            IFLA_MTU => state.mtu = number(value),
            IFLA_XDP => {
                for (kind, value) in attributes(value) {
                    match kind {
                        IFLA_XDP_ATTACHED => state.attached = value.first().copied().unwrap_or(0),
                        IFLA_XDP_PROG_ID | IFLA_XDP_DRV_PROG_ID | IFLA_XDP_SKB_PROG_ID
                        | IFLA_XDP_HW_PROG_ID => state.program_id = number(value),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    state
}

/// Kind ("bpf", "flower", ...) of a filter on the device, if there is one.
pub fn tc_filter(ifindex: u32, hook: TcHook) -> io::Result<Option<String>> {
    let parent = match hook {
        TcHook::Ingress => PARENT_INGRESS,
        TcHook::Egress => PARENT_EGRESS,
    };
    let mut body = [0u8; TCMSG_LEN];
    body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    body[12..16].copy_from_slice(&parent.to_ne_bytes());
    let mut found = None;
    request(
        libc::RTM_GETTFILTER,
        libc::NLM_F_DUMP,
        &body,
        |kind, payload| {
            if kind == libc::RTM_NEWTFILTER && found.is_none() {
                found = Some(parse_filter(payload));
            }
        },
    )?;
    Ok(found)
}

fn parse_filter(payload: &[u8]) -> String {
    attributes(payload.get(TCMSG_LEN..).unwrap_or_default())
        .find(|(kind, _)| *kind == TCA_KIND)
        .map(|(_, value)| {
            String::from_utf8_lossy(value)
                .trim_end_matches('\0')
                .to_owned()
        })
        .unwrap_or_default()
}

fn number(value: &[u8]) -> u32 {
    value
        .first_chunk()
        .map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

/// Type (without flag bits) and value of each `struct nlattr`; stops at the
/// first that does not fit.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(half(rest, 0)?);
        let kind = half(rest, 2)? & 0x3fff;
        let value = rest.get(4..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// One request and its answers, on a socket of its own: the socket belongs to
/// the network namespace of the calling thread.
fn request(
    kind: u16,
    flags: i32,
    body: &[u8],
    mut answer: impl FnMut(u16, &[u8]),
) -> io::Result<()> {
    // SAFETY: plain system call.
    let socket = unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_ROUTE,
        )
    };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };

    let mut message = Vec::with_capacity(NLMSG_HEADER_LEN + body.len());
    message.extend_from_slice(&((NLMSG_HEADER_LEN + body.len()) as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    message.extend_from_slice(&1u32.to_ne_bytes());
    message.extend_from_slice(&0u32.to_ne_bytes());
    message.extend_from_slice(body);
    // SAFETY: reads `message` only.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            message.as_ptr().cast(),
            message.len(),
            0,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }

    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        // SAFETY: writes at most the buffer's length.
        let got = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
            )
        };
        if got < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        if read_answers(&buffer[..got as usize], &mut answer)? {
            return Ok(());
        }
    }
}

/// True at the end of the answers.
fn read_answers(mut rest: &[u8], answer: &mut impl FnMut(u16, &[u8])) -> io::Result<bool> {
    while rest.len() >= NLMSG_HEADER_LEN {
        let len = number(rest) as usize;
        let (Some(kind), Some(flags)) = (half(rest, 4), half(rest, 6)) else {
            break;
        };
        let Some(payload) = rest.get(NLMSG_HEADER_LEN..len) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        match i32::from(kind) {
            // A dump ends with its status, as a single request does with an error.
            libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                return match number(payload) as i32 {
                    0 => Ok(true),
                    errno => Err(io::Error::from_raw_os_error(-errno)),
                };
            }
            _ => answer(kind, payload),
        }
        if i32::from(flags) & libc::NLM_F_MULTI == 0 {
            return Ok(true);
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn link_message() -> Vec<u8> {
        let mut nested = attribute(IFLA_XDP_ATTACHED, &[1]);
        nested.extend(attribute(IFLA_XDP_PROG_ID, &77u32.to_ne_bytes()));
        let mut message = vec![0; IFINFOMSG_LEN];
        message.extend(attribute(3, b"uplink\0"));
        message.extend(attribute(IFLA_MTU, &1500u32.to_ne_bytes()));
        message.extend(attribute(IFLA_XDP | 0x8000, &nested));
        message
    }

    #[test]
    fn xdp_program_and_mtu_are_read_from_a_link_message() {
        let state = parse_link(&link_message());
        assert_eq!(
            state,
            XdpState {
                mtu: 1500,
                attached: 1,
                program_id: 77
            }
        );
    }

    #[test]
    fn truncated_messages_are_read_without_a_panic() {
        let message = link_message();
        for len in 0..message.len() {
            assert_eq!(parse_link(&message[..len]).program_id, 0, "{len} bytes");
            parse_filter(&message[..len]);
        }
    }

    #[test]
    fn filter_kind_is_read_from_a_filter_message() {
        let mut message = vec![0; TCMSG_LEN];
        message.extend(attribute(TCA_KIND, b"flower\0"));
        assert_eq!(parse_filter(&message), "flower");
    }
}
