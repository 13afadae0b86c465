//! Keys and values of the BPF maps: plain integers and byte arrays, explicit
//! padding, layouts asserted. Integers are host order, byte arrays wire order.
//! `LAYOUT_VERSION` is part of the pin path: maps of another layout are never
//! adopted.

use crate::outcome::Outcome;
use crate::wire::{Ethernet, Ipv4, Ipv6, Udp};
use crate::{MacAddr, Vni};

/// Raise whenever a key, a value or the meaning of a bit changes.
pub const LAYOUT_VERSION: u32 = 2;

/// Number of a segment on this host, 1 and up; 0 counts frames of no segment.
pub type SegmentId = u16;

/// Key of `FDB`: segment and MAC in one integer, so that the program builds it
/// with one shift from an unaligned load.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct FdbKey(u64);

impl FdbKey {
    pub const fn new(segment: SegmentId, mac: MacAddr) -> Self {
        Self::from_bits(segment, mac.to_bits())
    }

    /// `mac_bits` as from [`MacAddr::to_bits`].
    #[inline(always)]
    pub const fn from_bits(segment: SegmentId, mac_bits: u64) -> Self {
        Self(((segment as u64) << 48) | mac_bits)
    }

    /// As stored in the table and in [`Port::first_key`].
    #[inline(always)]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// Inverse of [`FdbKey::word`].
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    pub const fn segment(self) -> SegmentId {
        (self.0 >> 48) as u16
    }

    pub const fn mac(self) -> MacAddr {
        MacAddr::from_bits(self.0)
    }
}

/// Value of `LOCATIONS`: where an endpoint is. One aligned 8-byte store moves it.
/// Bits 0-7 kind, 8-31 generation, 32-63 index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Location(pub u64);

/// What the index of a [`Location`] means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Left to the kernel: unresolved next hop, unaccelerated port, free slot.
    Kernel,
    /// A port of this host, by ifindex.
    Port(u32, Via),
    /// A slot of `REMOTES`.
    Remote(u32),
}

/// How frames from the wire reach a port. All frames of a flow go one way, so
/// that they keep their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Via {
    /// Redirected by XDP.
    Xdp,
    /// The owner uses offloads: TCP goes through the stack, where GRO merges
    /// it, and is redirected by the tcx program of the uplink; other frames are
    /// redirected by XDP.
    Gro,
    /// The device cannot take frames from XDP: all go through the stack.
    Stack,
    /// Known to be here, but frames for it are the kernel's.
    Kernel,
}

impl Location {
    pub const KIND_KERNEL: u8 = 0;
    pub const KIND_PORT: u8 = 1;
    pub const KIND_REMOTE: u8 = 2;
    pub const KIND_PORT_GRO: u8 = 3;
    pub const KIND_PORT_STACK: u8 = 4;
    pub const KIND_PORT_KERNEL: u8 = 5;
    pub const GENERATION_MAX: u32 = 0xff_ffff;

    /// Index 0 of `LOCATIONS` is never handed out: it always means "kernel".
    pub const NONE: u32 = 0;

    pub const fn new(place: Place, generation: u32) -> Self {
        let (kind, index) = match place {
            Place::Kernel => (Self::KIND_KERNEL, 0),
            Place::Port(ifindex, Via::Xdp) => (Self::KIND_PORT, ifindex),
            Place::Port(ifindex, Via::Gro) => (Self::KIND_PORT_GRO, ifindex),
            Place::Port(ifindex, Via::Stack) => (Self::KIND_PORT_STACK, ifindex),
            Place::Port(ifindex, Via::Kernel) => (Self::KIND_PORT_KERNEL, ifindex),
            Place::Remote(slot) => (Self::KIND_REMOTE, slot),
        };
        Self(
            kind as u64
                | (((generation & Self::GENERATION_MAX) as u64) << 8)
                | ((index as u64) << 32),
        )
    }

    #[inline(always)]
    pub const fn kind(self) -> u8 {
        self.0 as u8
    }

    #[inline(always)]
    pub const fn index(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Whether it is this port of this host, by whatever way.
    #[inline(always)]
    pub const fn is_at_port(self, ifindex: u32) -> bool {
        self.index() == ifindex
            && matches!(
                self.kind(),
                Self::KIND_PORT
                    | Self::KIND_PORT_GRO
                    | Self::KIND_PORT_STACK
                    | Self::KIND_PORT_KERNEL
            )
    }

    pub const fn generation(self) -> u32 {
        (self.0 >> 8) as u32 & Self::GENERATION_MAX
    }

    /// Unknown kinds read as [`Place::Kernel`]: pass when in doubt.
    pub const fn place(self) -> Place {
        match self.kind() {
            Self::KIND_PORT => Place::Port(self.index(), Via::Xdp),
            Self::KIND_PORT_GRO => Place::Port(self.index(), Via::Gro),
            Self::KIND_PORT_STACK => Place::Port(self.index(), Via::Stack),
            Self::KIND_PORT_KERNEL => Place::Port(self.index(), Via::Kernel),
            Self::KIND_REMOTE => Place::Remote(self.index()),
            _ => Place::Kernel,
        }
    }
}

/// Outer Ethernet, IPv4 and UDP header of a remote as stored in [`Remote`]:
/// lengths, checksums, source port and ECN bits are patched per frame.
pub const HEADER_V4_LEN: usize = size_of::<Ethernet>() + size_of::<Ipv4>() + size_of::<Udp>();
/// Same for IPv6.
pub const HEADER_V6_LEN: usize = size_of::<Ethernet>() + size_of::<Ipv6>() + size_of::<Udp>();

/// Value of `REMOTES`: everything about one way to one remote VTEP. 128 bytes;
/// an IPv4 remote needs the first 64 only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(8))]
pub struct Remote {
    /// Egress device.
    pub ifindex: u32,
    /// `REMOTE_*` bits.
    pub flags: u16,
    /// Folded sum (see `checksum`) of the IPv4 header with total length,
    /// identification, checksum and ECN bits zero; of an IPv6 header the
    /// addresses and the protocol number, as the UDP checksum counts them.
    pub ip_sum: u16,
    /// VNI the remote expects where it differs from the segment's (R14): the
    /// wire word (VNI, zero byte) as [`Segment::vni_word`]; 0: none.
    pub vni_word: u32,
    /// Smallest UDP source port.
    pub port_min: u16,
    /// Number of UDP source ports, at least 1.
    pub port_count: u16,
    /// Outer header in wire order; bytes beyond the header are zero.
    pub header: [u8; 112],
}

/// A UDP checksum is sent (the device's `udpcsum`, R5, or no
/// `udp6zerocsumtx`, R29).
pub const REMOTE_UDP_CHECKSUM: u16 = 1;
/// The header is an IPv6 one ([`HEADER_V6_LEN`]).
pub const REMOTE_V6: u16 = 2;
/// DSCP as in the inner IP header (`tos inherit`, R28); zero in the template.
pub const REMOTE_TOS_INHERIT: u16 = 4;
/// TTL or hop limit as in the inner IP header (`ttl inherit`); the template has
/// the one of frames without.
pub const REMOTE_TTL_INHERIT: u16 = 8;
/// DF as in the inner IPv4 header, and for IPv6 (`df inherit`, R34); not set in
/// the template.
pub const REMOTE_DF_INHERIT: u16 = 16;
/// Any of the above.
pub const REMOTE_INHERIT: u16 = REMOTE_TOS_INHERIT | REMOTE_TTL_INHERIT | REMOTE_DF_INHERIT;
/// The device names no range of source ports: where the kernel may send frames
/// of the same flow, [`Config::kernel_port_min`] counts.
pub const REMOTE_NO_PORT_RANGE: u16 = 32;

impl Remote {
    pub const EMPTY: Self = Self {
        ifindex: 0,
        flags: 0,
        ip_sum: 0,
        vni_word: 0,
        port_min: 0,
        port_count: 1,
        header: [0; 112],
    };

    /// Address of an IPv4 remote.
    #[inline(always)]
    pub fn destination_v4(&self) -> [u8; 4] {
        let h = &self.header;
        [h[30], h[31], h[32], h[33]]
    }

    /// Whether it is an IPv6 remote of this address.
    #[inline(always)]
    pub fn is_destination_v6(&self, address: &[u8; 16]) -> bool {
        let mut same = self.flags & REMOTE_V6 != 0;
        let mut i = 0;
        while i < 16 {
            same &= self.header[38 + i] == address[i];
            i += 1;
        }
        same
    }
}

/// VNI as the last four bytes of a VXLAN header, read as a native integer.
#[inline(always)]
pub const fn vni_word(vni: Vni) -> u32 {
    (vni.get() << 8).to_be()
}

/// Key of `PORTS`: a port and the VLAN of the frames on it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct PortKey(u64);

impl PortKey {
    /// `vlan` 0: frames without a tag.
    #[inline(always)]
    pub const fn new(ifindex: u32, vlan: u16) -> Self {
        Self(ifindex as u64 | ((vlan as u64) << 32))
    }

    pub const fn ifindex(self) -> u32 {
        self.0 as u32
    }

    pub const fn vlan(self) -> u16 {
        (self.0 >> 32) as u16
    }
}

/// Value of `PORTS`: the segment that frames of a port belong to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(8))]
pub struct Port {
    /// FDB key (segment, MAC) of the first MAC seen behind the port, compared
    /// before any lookup; 0: none.
    pub first_key: u64,
    /// VNI of the segment, see [`vni_word`].
    pub vni_word: u32,
    pub segment: SegmentId,
    /// Largest frame the tunnel takes, Ethernet header included, bytes.
    pub tunnel_max_bytes: u16,
    /// Largest frame every accelerated port of the segment takes, bytes.
    pub local_max_bytes: u16,
    pub pad: [u8; 5],
    /// Epoch in which `first_key` last sent (see [`Config::epoch`]).
    pub epoch: u8,
}

/// Key of `VNIS`: which VXLAN device a frame is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct VniKey(pub u64);

impl VniKey {
    /// IPv4 underlay. `udp_port` in host order.
    pub const fn v4(vni: Vni, udp_port: u16) -> Self {
        Self::from_words(vni_word(vni), udp_port.to_be())
    }

    /// IPv6 underlay.
    pub const fn v6(vni: Vni, udp_port: u16) -> Self {
        Self::from_words_v6(vni_word(vni), udp_port.to_be())
    }

    /// From the words as they lie on the wire, read as native integers.
    #[inline(always)]
    pub const fn from_words(vni_word: u32, udp_port: u16) -> Self {
        Self(vni_word as u64 | ((udp_port as u64) << 32) | (4 << 48))
    }

    #[inline(always)]
    pub const fn from_words_v6(vni_word: u32, udp_port: u16) -> Self {
        Self(vni_word as u64 | ((udp_port as u64) << 32) | (6 << 48))
    }

    pub const fn is_v6(self) -> bool {
        self.0 >> 48 == 6
    }

    pub const fn vni(self) -> u32 {
        u32::from_be(self.0 as u32) >> 8
    }

    pub const fn udp_port(self) -> u16 {
        u16::from_be((self.0 >> 32) as u16)
    }
}

/// Value of `VNIS`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(4))]
pub struct Segment {
    /// Address the device receives on; IPv4 in the last four bytes, behind
    /// zeros.
    pub local: [u8; 16],
    pub id: SegmentId,
    /// `SEGMENT_*` bits.
    pub flags: u16,
    /// Largest inner frame that every accelerated port takes, Ethernet header
    /// included, bytes.
    pub local_max_bytes: u16,
    pub pad: [u8; 2],
}

impl Segment {
    /// Address of a device on an IPv4 underlay.
    #[inline(always)]
    pub const fn local_v4(&self) -> [u8; 4] {
        let [.., a, b, c, d] = self.local;
        [a, b, c, d]
    }
}

/// The kernel learns from frames: unknown or moved sources pass (R7).
pub const SEGMENT_LEARNING: u16 = 1;
/// Frames from an address that is not in `PEERS` are dropped (R10).
pub const SEGMENT_STRICT: u16 = 2;
/// IPv6 frames without a UDP checksum are accepted (`udp6zerocsumrx`, R30).
pub const SEGMENT_ZERO_CHECKSUM: u16 = 4;

/// An address as the 16 bytes of [`Segment::local`] and [`PeerKey`]; IPv4 in
/// the last four.
pub const fn address_v4(ip: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = ip;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d]
}

/// Key of `PEERS`: the addresses that a strict segment takes frames from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(C, align(4))]
pub struct PeerKey {
    /// As in [`Segment::local`].
    pub address: [u8; 16],
    pub segment: SegmentId,
    pub pad: [u8; 2],
}

/// Number of uplink MAC addresses the program compares against.
pub const UPLINKS_MAX: usize = 8;
/// Number of UDP ports of VXLAN devices the program compares against.
pub const UDP_PORTS_MAX: usize = 4;

/// The one element of `CONFIG`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(8))]
pub struct Config {
    /// Addresses of the uplinks, see [`MacAddr::to_bits`]; unused: all ones.
    pub uplink_macs: [u64; UPLINKS_MAX],
    /// UDP ports of the mirrored devices, wire order; unused: zero.
    pub udp_ports: [[u8; 2]; UDP_PORTS_MAX],
    /// Current epoch; entries that carried traffic in it are marked with it.
    pub epoch: u8,
    pub pad: [u8; 3],
    /// Number of buckets of the FDB minus one; a power of two minus one.
    pub fdb_mask: u32,
    /// Identifies this instance in the metadata of a frame, see [`Mark`].
    pub cookie: u32,
    /// Source ports of the kernel's driver where a device names no range
    /// (net.ipv4.ip_local_port_range).
    pub kernel_port_min: u16,
    /// At least 1.
    pub kernel_port_count: u16,
}

impl Config {
    /// No uplink, no port: every frame passes.
    pub const EMPTY: Self = Self {
        uplink_macs: [u64::MAX; UPLINKS_MAX],
        udp_ports: [[0; 2]; UDP_PORTS_MAX],
        epoch: 0,
        pad: [0; 3],
        fdb_mask: 0,
        cookie: 0,
        kernel_port_min: 32768,
        kernel_port_count: 28231,
    };
}

/// Metadata in front of a stripped frame that goes through the stack: what the
/// uplink's tcx program reads. GRO merges frames of equal metadata only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(4))]
pub struct Mark {
    /// [`Config::cookie`]: other instances, and guests on the same kernel, must
    /// not act on it.
    pub cookie: u32,
    /// Port to redirect to.
    pub ifindex: u32,
}

/// Value of `STATS`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C, align(8))]
pub struct Counter {
    pub frames: u64,
    pub bytes: u64,
}

/// Index into `STATS`. Counters are kept per segment and outcome, so that one
/// increment serves both tables and nothing is counted twice.
#[inline(always)]
pub const fn stats_index(segment: SegmentId, outcome: Outcome) -> u32 {
    segment as u32 * Outcome::SLOTS + outcome as u32
}

const _: () = {
    assert!(size_of::<Remote>() == 128);
    assert!(core::mem::offset_of!(Remote, header) == 16);
    assert!(HEADER_V4_LEN == 42 && HEADER_V6_LEN == 62);
    assert!(size_of::<PortKey>() == 8 && size_of::<PeerKey>() == 20 && size_of::<Mark>() == 8);
    assert!(size_of::<Port>() == 24);
    assert!(core::mem::offset_of!(Port, epoch) == 23);
    assert!(size_of::<Segment>() == 24);
    assert!(size_of::<Config>() == 88);
    assert!(size_of::<Counter>() == 16);
};

#[cfg(feature = "user")]
mod pod {
    use super::{Config, Counter, Location, PeerKey, Port, PortKey, Remote, Segment, VniKey};
    use crate::fdb::Bucket;

    macro_rules! pod {
        ($($t:ty),*) => { $(
            // SAFETY: integers and byte arrays with explicit padding only.
            unsafe impl aya::Pod for $t {}
        )* };
    }
    pod!(
        Bucket, Config, Counter, Location, PeerKey, Port, PortKey, Remote, Segment, VniKey
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdb_key_and_value_keep_their_fields() {
        let mac = MacAddr([0x02, 1, 2, 3, 4, 5]);
        let key = FdbKey::new(0xabcd, mac);
        assert_eq!((key.segment(), key.mac()), (0xabcd, mac));
        let value = crate::fdb::Value::new(0xf_4567, 1, 0xfe);
        assert_eq!(
            (value.location(), value.flags(), value.epoch()),
            (0xf_4567, 1, 0xfe)
        );
        assert_eq!(value.0.to_le_bytes()[crate::fdb::Value::EPOCH_BYTE], 0xfe);
    }

    #[test]
    fn location_round_trips_and_unknown_kinds_pass() {
        let ports =
            [Via::Xdp, Via::Gro, Via::Stack, Via::Kernel].map(|via| Place::Port(70_000, via));
        for place in [Place::Kernel, Place::Remote(3)].into_iter().chain(ports) {
            let location = Location::new(place, 0x12_3456);
            assert_eq!(
                (location.place(), location.generation()),
                (place, 0x12_3456)
            );
            assert_eq!(
                location.is_at_port(70_000),
                matches!(place, Place::Port(..))
            );
            assert!(!location.is_at_port(3));
        }
        assert_eq!(Location(0xff).place(), Place::Kernel);
    }

    #[test]
    fn vni_key_is_built_from_wire_words() {
        let vni = Vni::new(0x01_0203).unwrap();
        let wire_vni = u32::from_ne_bytes([1, 2, 3, 0]);
        let wire_port = u16::from_ne_bytes([0x12, 0xb5]);
        let key = VniKey::from_words(wire_vni, wire_port);
        assert_eq!(key, VniKey::v4(vni, 4789));
        assert_eq!((key.vni(), key.udp_port()), (0x01_0203, 4789));
        let v6 = VniKey::from_words_v6(wire_vni, wire_port);
        assert_eq!(v6, VniKey::v6(vni, 4789));
        assert_ne!(v6, key);
        assert_eq!(
            (v6.vni(), v6.udp_port(), v6.is_v6()),
            (0x01_0203, 4789, true)
        );
    }
}
