//! The closed list of what can happen to a frame (R42). Numbers are stored in
//! maps and metrics: append only, never renumber. Names are kebab-case and the
//! same in counters, command line and documentation.

macro_rules! outcomes {
    ($( $(#[$doc:meta])* $variant:ident = $number:literal, $name:literal; )*) => {
        /// Where a frame ended. `*Pass*`: handed to the kernel, unchanged.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        pub enum Outcome {
            $( $(#[$doc])* $variant = $number, )*
        }

        impl Outcome {
            /// Every outcome, in numerical order.
            pub const ALL: &'static [Self] = &[$( Self::$variant, )*];

            /// The kebab-case name used in every interface.
            pub const fn name(self) -> &'static str {
                match self {
                    $( Self::$variant => $name, )*
                }
            }
        }
    };
}

outcomes! {
    /// Decapsulated and redirected to a local port.
    IngressLocal = 1, "ingress-local";
    /// Not IPv4 UDP to a mirrored VXLAN port.
    IngressPassNotVxlan = 2, "ingress-pass-not-vxlan";
    /// Outer destination MAC is not an uplink's.
    IngressPassOtherMac = 3, "ingress-pass-other-mac";
    /// Outer IPv4 header carries options.
    IngressPassIpOptions = 4, "ingress-pass-ip-options";
    /// Outer IPv4 fragment (R6).
    IngressPassFragment = 5, "ingress-pass-fragment";
    /// Lengths that disagree, trailing bytes, or a wrong IPv4 header checksum.
    IngressPassMalformed = 6, "ingress-pass-malformed";
    /// Outer UDP checksum present but not right, or not finished yet (R5).
    IngressPassChecksum = 7, "ingress-pass-checksum";
    /// VXLAN flags or reserved bits other than the I flag alone (R1).
    IngressPassFlags = 8, "ingress-pass-flags";
    /// VNI that is not accelerated here (R2).
    IngressPassUnknownVni = 9, "ingress-pass-unknown-vni";
    /// Addressed to an address that is not this VTEP's.
    IngressPassOtherAddress = 10, "ingress-pass-other-address";
    /// Outer source is this VTEP itself (R12).
    IngressDropOwnSource = 11, "ingress-drop-own-source";
    /// Outer ECN mark that has to be merged into the inner header (R27).
    IngressPassEcn = 12, "ingress-pass-ecn";
    /// Inner broadcast or multicast (R8).
    IngressPassMulticast = 13, "ingress-pass-multicast";
    /// Inner frame the bridge must see: VLAN tag, ARP, RARP, neighbour discovery (R9, R21).
    IngressPassInnerType = 14, "ingress-pass-inner-type";
    /// Learning is on and the inner source is unknown or came from elsewhere (R7).
    IngressPassLearn = 15, "ingress-pass-learn";
    /// Inner destination not in the FDB (R8).
    IngressPassUnknownDestination = 16, "ingress-pass-unknown-destination";
    /// Inner destination is behind another remote: split horizon (R11).
    IngressPassRemoteDestination = 17, "ingress-pass-remote-destination";
    /// Inner destination is at a port that is left to the kernel.
    IngressPassKernelDestination = 18, "ingress-pass-kernel-destination";
    /// Inner frame larger than the segment's ports accept (R31).
    IngressPassTooLong = 19, "ingress-pass-too-long";
    /// The redirect target is not in the device map.
    IngressPassNoTarget = 20, "ingress-pass-no-target";
    /// The driver did not let the header be moved.
    IngressPassNoHeadroom = 21, "ingress-pass-no-headroom";
    /// Decapsulated and handed to the stack, which merges (GRO) and redirects it to a local port.
    IngressLocalStack = 22, "ingress-local-stack";
    /// From an address that is no remote of the segment, in strict mode (R10).
    IngressDropUnknownPeer = 23, "ingress-drop-unknown-peer";
    /// Larger than the driver's first buffer (MTU 9000): what the program would have to read lies elsewhere.
    IngressPassFrags = 24, "ingress-pass-frags";

    /// Encapsulated and redirected to an uplink.
    EgressRemote = 32, "egress-remote";
    /// Redirected to another local port.
    EgressLocal = 33, "egress-local";
    /// Shorter than an Ethernet or IP header.
    EgressPassMalformed = 34, "egress-pass-malformed";
    /// The port is not configured (yet, or any more).
    EgressPassUnconfigured = 35, "egress-pass-unconfigured";
    /// Broadcast or multicast (R8).
    EgressPassMulticast = 36, "egress-pass-multicast";
    /// Frame the bridge must see: VLAN tag, ARP, RARP, neighbour discovery (R9, R21).
    EgressPassInnerType = 37, "egress-pass-inner-type";
    /// Source MAC not known at this port (R7).
    EgressPassUnknownSource = 38, "egress-pass-unknown-source";
    /// Destination not in the FDB (R8).
    EgressPassUnknownDestination = 39, "egress-pass-unknown-destination";
    /// Destination is behind the port it came from.
    EgressPassSamePort = 40, "egress-pass-same-port";
    /// Destination is left to the kernel: unresolved next hop, unaccelerated port.
    EgressPassKernelDestination = 41, "egress-pass-kernel-destination";
    /// Does not fit the tunnel or the target port (R31).
    EgressPassTooLong = 42, "egress-pass-too-long";
    /// The redirect target is not in the device map.
    EgressPassNoTarget = 43, "egress-pass-no-target";
    /// The driver did not give room for the outer header.
    EgressPassNoHeadroom = 44, "egress-pass-no-headroom";
    /// GSO superframe to a device that sends UDP checksums: only the kernel can have them made at segmentation.
    EgressPassGso = 45, "egress-pass-gso";
    /// The outer UDP checksum cannot be derived: inner checksum absent, wrong, or still to be made by somebody below.
    EgressPassChecksum = 46, "egress-pass-checksum";
    /// Lost half way: no memory to write the outer header.
    EgressDropNoMemory = 47, "egress-drop-no-memory";
}

impl Outcome {
    /// Stride of the counters: outcome numbers stay below this.
    pub const SLOTS: u32 = 64;

    /// Whether it is an outcome of frames from the wire (as opposed to a port).
    pub const fn is_ingress(self) -> bool {
        (self as u32) < 32
    }

    /// Whether the frame took the fast path (as opposed to passed or dropped).
    pub const fn is_fast(self) -> bool {
        matches!(self.fate(), Fate::Fast)
    }

    pub const fn fate(self) -> Fate {
        match self {
            Self::IngressLocal | Self::IngressLocalStack => Fate::Fast,
            Self::EgressRemote | Self::EgressLocal => Fate::Fast,
            Self::IngressDropOwnSource
            | Self::IngressDropUnknownPeer
            | Self::EgressDropNoMemory => Fate::Dropped,
            _ => Fate::Passed,
        }
    }
}

/// What an outcome comes down to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    Fast,
    /// Handed to the kernel, unchanged.
    Passed,
    Dropped,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r42_numbers_and_names_are_unique_and_fit_the_counters() {
        for (i, a) in Outcome::ALL.iter().enumerate() {
            assert!((*a as u32) < Outcome::SLOTS);
            assert!(*a as u32 != 0, "0 is reserved");
            assert_eq!(a.is_ingress(), a.name().starts_with("ingress-"));
            let fate = match a.name() {
                name if name.contains("-pass-") => Fate::Passed,
                name if name.contains("-drop-") => Fate::Dropped,
                _ => Fate::Fast,
            };
            assert_eq!(a.fate(), fate, "{a:?}");
            assert!(
                a.name()
                    .bytes()
                    .all(|c| c.is_ascii_lowercase() || c == b'-')
            );
            for b in &Outcome::ALL[..i] {
                assert!((*b as u8) < (*a as u8), "{a:?} is out of order");
                assert_ne!(a.name(), b.name());
            }
        }
    }
}
