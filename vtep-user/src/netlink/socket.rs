//! Netlink sockets on tokio: `KernelSocket` moves datagrams, `Channel` pairs
//! requests with their answers. No message contents are understood here.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP,
};
use netlink_sys::{Socket, SocketAddr};
use std::os::fd::AsRawFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::codec::{HEADER_BYTES, Message, attributes, frame, messages, text_of, u32_of};
use super::error::{Explanation, Failure};

/// More than the kernel puts into one dump datagram (32 KiB) and into any
/// notification.
pub(super) const DATAGRAM_BYTES: usize = 64 * 1024;

/// NLM_F_CAPPED and NLM_F_ACK_TLVS of an NLMSG_ERROR (netlink.h); in a request
/// the same bits mean something else.
const CAPPED: u16 = 0x100;
const ACK_TLVS: u16 = 0x200;
/// NLMSGERR_ATTR_MSG.
const ATTR_MSG: u16 = 1;

/// A non-blocking netlink socket with one datagram of buffer.
pub(super) struct KernelSocket {
    fd: AsyncFd<Socket>,
    datagram: Vec<u8>,
}

impl KernelSocket {
    /// Opens, binds and joins `groups`, in the network namespace of the calling
    /// thread. `receive_bytes` is forced past the system limit where the process
    /// may do so (CAP_NET_ADMIN). Must be called inside a tokio runtime.
    pub fn open(protocol: isize, groups: &[u32], receive_bytes: u32) -> io::Result<Self> {
        Self::with_datagrams(protocol, groups, receive_bytes, DATAGRAM_BYTES)
    }

    fn with_datagrams(
        protocol: isize,
        groups: &[u32],
        receive_bytes: u32,
        datagram_bytes: usize,
    ) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.set_non_blocking(true)?;
        socket.bind_auto()?;
        force_receive_buffer(&socket, receive_bytes)?;
        // Kernels without these (before 4.12 and 4.20) still answer, less exactly.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        for &group in groups {
            match socket.add_membership(group) {
                // A group that came with a later kernel: this one has nothing to tell.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                joined => joined?,
            }
        }
        // SAFETY: `Socket` owns its descriptor, always reports that one, and closes
        // it only when dropped, which `AsyncFd` does after deregistering it.
        let fd = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        Ok(Self {
            fd,
            datagram: Vec::with_capacity(datagram_bytes),
        })
    }

    /// Hands bytes to the kernel, which works on them before this returns.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let kernel = SocketAddr::new(0, 0);
        self.fd.get_ref().send_to(bytes, &kernel, 0).map(|_| ())
    }

    /// Waits until something can be received. Cancel safe.
    pub async fn readable(&self) -> io::Result<()> {
        self.fd
            .readable()
            .await
            .map(|mut guard| guard.retain_ready())
    }

    /// Receives one datagram into `datagram()` without waiting; `false`: there is
    /// none. ENOBUFS means that notifications were lost.
    pub fn try_receive(&mut self) -> io::Result<bool> {
        loop {
            let socket = self.fd.get_ref();
            let mut received = receive(socket, &mut self.datagram);
            if would_block(&received) {
                // Once more under tokio's eyes, so that it waits from now on.
                let datagram = &mut self.datagram;
                received = self
                    .fd
                    .try_io(Interest::READABLE, |socket| receive(socket, datagram));
            }
            match received {
                Ok((length, _)) if length > self.datagram.len() => {
                    return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
                }
                Ok((_, sender)) if sender.port_number() == 0 => return Ok(true),
                // From another process, not from the kernel.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// What the last successful `try_receive` brought.
    pub fn datagram(&self) -> &[u8] {
        &self.datagram
    }

    async fn receive(&mut self) -> io::Result<()> {
        while !self.try_receive()? {
            self.readable().await?;
        }
        Ok(())
    }
}

fn receive(socket: &Socket, into: &mut Vec<u8>) -> io::Result<(usize, SocketAddr)> {
    into.clear();
    socket.recv_from(into, libc::MSG_DONTWAIT | libc::MSG_TRUNC)
}

fn would_block<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

fn force_receive_buffer(socket: &Socket, bytes: u32) -> io::Result<()> {
    let set = |option| {
        // SAFETY: the descriptor is open for the borrow of `socket`; the option
        // value is a u32 that outlives the call, given with its size.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const bytes).cast(),
                size_of::<u32>() as libc::socklen_t,
            )
        }
    };
    if set(libc::SO_RCVBUFFORCE) == 0 || set(libc::SO_RCVBUF) == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// How a request ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Completion {
    /// The kernel says that the table changed under the dump (NLM_F_DUMP_INTR).
    pub interrupted: bool,
}

/// One request at a time, answers matched by sequence number.
pub(super) struct Channel {
    protocol: isize,
    datagram_bytes: usize,
    socket: KernelSocket,
    sequence: u32,
    /// A request whose caller went away may have left answers, or a running
    /// dump that makes the kernel say EBUSY: start over with a new socket.
    unfinished: bool,
    outgoing: Vec<u8>,
}

/// One message of a request.
pub(super) struct Request {
    pub kind: u16,
    /// NLM_F_* beyond REQUEST and ACK.
    pub flags: u16,
    pub body: Vec<u8>,
}

/// Room for the answers to one batch.
const RECEIVE_BYTES: u32 = 1 << 20;

impl Channel {
    pub fn open(protocol: isize) -> io::Result<Self> {
        Self::with_datagrams(protocol, DATAGRAM_BYTES)
    }

    /// A channel whose dumps come in pieces of at most `datagram_bytes`, at least
    /// 8 KiB: the kernel makes them as large as the reader's buffer.
    pub fn with_datagrams(protocol: isize, datagram_bytes: usize) -> io::Result<Self> {
        let socket = KernelSocket::with_datagrams(protocol, &[], RECEIVE_BYTES, datagram_bytes)?;
        Ok(Self {
            protocol,
            datagram_bytes,
            socket,
            sequence: 0,
            unfinished: false,
            outgoing: Vec::new(),
        })
    }

    /// Sends one request and calls `each` for every message of the answer.
    pub async fn request(
        &mut self,
        request: &Request,
        mut each: impl FnMut(Message<'_>),
    ) -> Result<Completion, Failure> {
        let mut outcome = Ok(Completion { interrupted: false });
        self.batch(std::slice::from_ref(request), |_, answer| match answer {
            Answer::Data(message) => {
                if message.flags & NLM_F_DUMP_INTR != 0
                    && let Ok(completion) = &mut outcome
                {
                    completion.interrupted = true;
                }
                each(message);
            }
            Answer::Interrupted => outcome = Ok(Completion { interrupted: true }),
            Answer::Refused(error, explanation) => {
                outcome = Err(Failure::Refused(error, explanation));
            }
        })
        .await?;
        outcome
    }

    /// Sends up to a few hundred requests in one datagram, and calls `each` with
    /// the request's position for every message and every error that comes back.
    /// Fails only if the socket does.
    pub async fn batch(
        &mut self,
        requests: &[Request],
        mut each: impl FnMut(usize, Answer<'_>),
    ) -> io::Result<()> {
        if requests.is_empty() {
            return Ok(());
        }
        if self.unfinished {
            *self = Self::with_datagrams(self.protocol, self.datagram_bytes)?;
        }
        let first = self.sequence.wrapping_add(1);
        self.outgoing.clear();
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            // A dump ends with NLMSG_DONE; the kernel does not acknowledge it too.
            let flags = NLM_F_REQUEST | NLM_F_ACK | request.flags;
            frame(
                request.kind,
                flags,
                self.sequence,
                &request.body,
                &mut self.outgoing,
            );
        }
        self.unfinished = true;
        self.socket.send(&self.outgoing)?;
        let mut open = requests.len();
        while open > 0 {
            self.socket.receive().await?;
            for message in messages(self.socket.datagram()) {
                let position = message.sequence.wrapping_sub(first) as usize;
                if position >= requests.len() {
                    continue;
                }
                match message.kind {
                    NLMSG_NOOP => {}
                    NLMSG_ERROR | NLMSG_DONE => {
                        open = open.saturating_sub(1);
                        if message.flags & NLM_F_DUMP_INTR != 0 {
                            each(position, Answer::Interrupted);
                        }
                        if let Some((error, explanation)) = refusal(&message) {
                            each(position, Answer::Refused(error, explanation));
                        }
                    }
                    _ => each(position, Answer::Data(message)),
                }
            }
            if open > 0 {
                // A long dump must not keep the other tasks of this thread waiting.
                tokio::task::yield_now().await;
            }
        }
        self.unfinished = false;
        Ok(())
    }
}

/// Part of the answer to one request of a batch.
pub(super) enum Answer<'a> {
    Data(Message<'a>),
    /// The end of a dump that was not consistent.
    Interrupted,
    Refused(io::Error, Explanation),
}

/// The error in an NLMSG_ERROR or NLMSG_DONE; `None` is success.
fn refusal(message: &Message<'_>) -> Option<(io::Error, Explanation)> {
    let code = u32_of(message.body)
        .map(|code| code as i32)
        .filter(|&code| code < 0)?;
    let rest = &message.body[4..];
    let tlvs = match message.kind {
        // The header of the refused request comes first, its body only if
        // uncapped.
        NLMSG_ERROR if message.flags & ACK_TLVS != 0 => {
            let request = match message.flags & CAPPED {
                0 => u32_of(rest).unwrap_or(0) as usize,
                _ => HEADER_BYTES,
            };
            rest.get((request.saturating_add(3)) & !3..)
                .unwrap_or_default()
        }
        NLMSG_DONE if message.flags & ACK_TLVS != 0 => rest,
        _ => &[],
    };
    let text = attributes(tlvs)
        .find(|&(kind, _)| kind == ATTR_MSG)
        .map(|(_, text)| text_of(text));
    let error = io::Error::from_raw_os_error(code.checked_neg().unwrap_or(libc::EIO));
    Some((error, Explanation(text)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(flags: u16, body: &[u8]) -> Option<(Option<i32>, Option<String>)> {
        let message = Message {
            kind: NLMSG_ERROR,
            flags,
            sequence: 1,
            body,
        };
        refusal(&message).map(|(error, text)| (error.raw_os_error(), text.0))
    }

    #[test]
    fn an_acknowledgement_is_no_refusal() {
        assert_eq!(error(CAPPED, &[0; 20]), None);
    }

    #[test]
    fn the_kernels_explanation_is_found_behind_a_capped_and_a_full_request() {
        let text = [8, 0, 1, 0, b'n', b'o', 0, 0];
        let mut capped = (-17i32).to_ne_bytes().to_vec();
        capped.extend_from_slice(&[0; HEADER_BYTES]);
        capped.extend_from_slice(&text);
        let expected = Some((Some(17), Some("no".to_owned())));
        assert_eq!(error(CAPPED | ACK_TLVS, &capped), expected);

        let mut full = (-17i32).to_ne_bytes().to_vec();
        full.extend_from_slice(&22u32.to_ne_bytes());
        full.extend_from_slice(&[0; 20]);
        full.extend_from_slice(&text);
        assert_eq!(error(ACK_TLVS, &full), expected);
    }

    proptest! {
        #[test]
        fn any_error_body_is_taken(kind in 2u16..4, flags: u16, body: Vec<u8>) {
            refusal(&Message { kind, flags, sequence: 0, body: &body });
        }
    }
}
