//! Reads RTM_NEWLINK into a `Link`: device, kind with its options, bridge-port
//! flags, XDP attachment. Only complete messages become a `Link`; see `decode`
//! for the others.

use std::net::IpAddr;

use super::codec::{
    array, attributes, bool_of, index_of, ip_of, mac_of, text_of, u8_of, u16_be_of, u16_of,
    u32_be_of, u32_of, vni_of,
};
use crate::kernel::{Bridge, BridgePort, Link, LinkKind, Tun, VxlanDevice, XdpAttachment};
use vtep_common::Vni;

/// `struct ifinfomsg` (rtnetlink.h).
pub(super) const IFINFO_BYTES: usize = 16;

/// IFLA_* (include/uapi/linux/if_link.h).
mod ifla {
    pub const ADDRESS: u16 = 1;
    pub const IFNAME: u16 = 3;
    pub const MTU: u16 = 4;
    pub const MASTER: u16 = 10;
    pub const LINKINFO: u16 = 18;
    pub const AF_SPEC: u16 = 26;
    pub const XDP: u16 = 43;

    pub const INFO_KIND: u16 = 1;
    pub const INFO_DATA: u16 = 2;
    pub const INFO_SLAVE_KIND: u16 = 4;
    pub const INFO_SLAVE_DATA: u16 = 5;

    pub const INET6_CONF: u16 = 2;

    pub const XDP_ATTACHED: u16 = 2;
    pub const XDP_PROG_ID: u16 = 4;
    pub const XDP_DRV_PROG_ID: u16 = 5;
    pub const XDP_HW_PROG_ID: u16 = 7;

    pub const BR_AGEING_TIME: u16 = 4;
    pub const BR_VLAN_FILTERING: u16 = 7;
    pub const BR_VLAN_PROTOCOL: u16 = 8;
    pub const BR_NF_CALL_IPTABLES: u16 = 36;
    pub const BR_NF_CALL_ARPTABLES: u16 = 38;
    pub const BR_VLAN_DEFAULT_PVID: u16 = 39;
    pub const BR_MULTI_BOOLOPT: u16 = 46;

    pub const TUN_TYPE: u16 = 3;
    pub const TUN_VNET_HDR: u16 = 5;

    pub const BRPORT_STATE: u16 = 1;
    pub const BRPORT_HAIRPIN: u16 = 4;
    pub const BRPORT_LEARNING: u16 = 8;
    pub const BRPORT_UNICAST_FLOOD: u16 = 9;
    pub const BRPORT_PROXYARP: u16 = 10;
    pub const BRPORT_PROXYARP_WIFI: u16 = 12;
    pub const BRPORT_VLAN_TUNNEL: u16 = 29;
    pub const BRPORT_NEIGH_SUPPRESS: u16 = 32;
    pub const BRPORT_ISOLATED: u16 = 33;
    pub const BRPORT_BACKUP_PORT: u16 = 34;
    pub const BRPORT_LOCKED: u16 = 39;
    pub const BRPORT_MAB: u16 = 40;
    pub const BRPORT_NEIGH_VLAN_SUPPRESS: u16 = 43;
}

/// IFLA_VXLAN_*.
mod vxlan {
    pub const ID: u16 = 1;
    pub const GROUP: u16 = 2;
    pub const LINK: u16 = 3;
    pub const LOCAL: u16 = 4;
    pub const TTL: u16 = 5;
    pub const TOS: u16 = 6;
    pub const LEARNING: u16 = 7;
    pub const AGEING: u16 = 8;
    pub const PORT_RANGE: u16 = 10;
    pub const PROXY: u16 = 11;
    pub const RSC: u16 = 12;
    pub const L2MISS: u16 = 13;
    pub const L3MISS: u16 = 14;
    pub const PORT: u16 = 15;
    pub const GROUP6: u16 = 16;
    pub const LOCAL6: u16 = 17;
    pub const UDP_CSUM: u16 = 18;
    pub const UDP_ZERO_CSUM6_TX: u16 = 19;
    pub const UDP_ZERO_CSUM6_RX: u16 = 20;
    pub const REMCSUM_TX: u16 = 21;
    pub const REMCSUM_RX: u16 = 22;
    pub const GBP: u16 = 23;
    pub const COLLECT_METADATA: u16 = 25;
    pub const LABEL: u16 = 26;
    pub const GPE: u16 = 27;
    pub const TTL_INHERIT: u16 = 28;
    pub const DF: u16 = 29;
    pub const VNIFILTER: u16 = 30;
    pub const LABEL_POLICY: u16 = 32;
    pub const RESERVED_BITS: u16 = 33;
}

const ARPHRD_ETHER: u16 = 1;
const ETH_P_8021AD: u16 = 0x88a8;
/// BR_BOOLOPT_MST_ENABLE (if_bridge.h).
const BOOLOPT_MST: u32 = 1 << 2;
/// `struct vxlanhdr` with everything set but the I flag and the VNI: what an
/// ordinary device ignores on receipt (vxlan_core.c, VXLAN_RESERVED_BITS).
const DEFAULT_RESERVED_BITS: [u8; 8] = [0xf7, 0xff, 0xff, 0xff, 0, 0, 0, 0xff];
/// Bridge times are in clock_t: 1/100 s (USER_HZ), on every architecture Linux
/// still supports with a fixed user-visible rate.
const MS_PER_CLOCK: u64 = 10;

/// A complete RTM_NEWLINK of family AF_UNSPEC; `None` if it is cut short or one
/// of the partial kind (wireless events carry neither name nor MTU).
pub(super) fn link(body: &[u8]) -> Option<Link> {
    let header: [u8; IFINFO_BYTES] = array(body)?;
    let ethernet = u16_of(&header[2..]) == Some(ARPHRD_ETHER);
    let flags = u32_of(&header[8..])?;
    let (mut name, mut mtu) = (None, None);
    let mut link = Link {
        ifindex: index_of(&header[4..])?,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: flags & libc::IFF_UP as u32 != 0,
        loopback: flags & libc::IFF_LOOPBACK as u32 != 0,
        master: None,
        kind: LinkKind::Plain,
        bridge_port: None,
        xdp: None,
        hop_limit_v6: None,
    };
    for (kind, value) in attributes(&body[IFINFO_BYTES..]) {
        match kind {
            ifla::IFNAME => name = Some(text_of(value)),
            ifla::MTU => mtu = u32_of(value),
            ifla::ADDRESS if ethernet => link.mac = mac_of(value),
            ifla::MASTER => link.master = index_of(value),
            ifla::LINKINFO => (link.kind, link.bridge_port) = link_info(value),
            ifla::XDP => link.xdp = xdp(value),
            ifla::AF_SPEC => link.hop_limit_v6 = hop_limit_v6(value),
            _ => {}
        }
    }
    link.name = name?;
    link.mtu = mtu?;
    Some(link)
}

fn link_info(bytes: &[u8]) -> (LinkKind, Option<BridgePort>) {
    let (mut kind, mut data, mut slave_kind, mut slave_data) = (None, &[][..], None, &[][..]);
    for (attribute, value) in attributes(bytes) {
        match attribute {
            ifla::INFO_KIND => kind = Some(text_of(value)),
            ifla::INFO_DATA => data = value,
            ifla::INFO_SLAVE_KIND => slave_kind = Some(text_of(value)),
            ifla::INFO_SLAVE_DATA => slave_data = value,
            _ => {}
        }
    }
    let link_kind = match kind.as_deref() {
        None => LinkKind::Plain,
        Some("bridge") => LinkKind::Bridge(bridge(data)),
        Some("vxlan") => match vxlan_device(data) {
            Some(device) => LinkKind::Vxlan(Box::new(device)),
            None => LinkKind::Other("vxlan".to_owned()),
        },
        Some("veth") => LinkKind::Veth,
        Some("tun") => LinkKind::Tun(tun(data)),
        Some(other) => LinkKind::Other(other.to_owned()),
    };
    let port = (slave_kind.as_deref() == Some("bridge")).then(|| bridge_port(slave_data));
    (link_kind, port)
}

fn bridge(data: &[u8]) -> Bridge {
    let mut bridge = Bridge {
        vlan_filtering: false,
        default_pvid: 0,
        service_vlans: false,
        mst: false,
        ageing_ms: 0,
        nf_call: false,
    };
    for (kind, value) in attributes(data) {
        match kind {
            ifla::BR_VLAN_FILTERING => bridge.vlan_filtering = bool_of(value),
            ifla::BR_VLAN_PROTOCOL => bridge.service_vlans = u16_be_of(value) == Some(ETH_P_8021AD),
            ifla::BR_VLAN_DEFAULT_PVID => bridge.default_pvid = u16_of(value).unwrap_or(0),
            // `struct br_boolopt_multi`: values, then which of them the kernel knows.
            ifla::BR_MULTI_BOOLOPT => {
                bridge.mst = u32_of(value).is_some_and(|options| options & BOOLOPT_MST != 0);
            }
            ifla::BR_AGEING_TIME => {
                bridge.ageing_ms = u64::from(u32_of(value).unwrap_or(0)) * MS_PER_CLOCK;
            }
            ifla::BR_NF_CALL_IPTABLES..=ifla::BR_NF_CALL_ARPTABLES => {
                bridge.nf_call |= bool_of(value);
            }
            _ => {}
        }
    }
    bridge
}

fn tun(data: &[u8]) -> Tun {
    let mut tun = Tun {
        tap: false,
        vnet_hdr: false,
    };
    for (kind, value) in attributes(data) {
        match kind {
            ifla::TUN_TYPE => tun.tap = u8_of(value) == Some(libc::IFF_TAP as u8),
            ifla::TUN_VNET_HDR => tun.vnet_hdr = bool_of(value),
            _ => {}
        }
    }
    tun
}

fn bridge_port(data: &[u8]) -> BridgePort {
    let mut port = BridgePort {
        state: 0,
        learning: false,
        unicast_flood: false,
        hairpin: false,
        isolated: false,
        locked: false,
        mab: false,
        neigh_suppress: false,
        neigh_vlan_suppress: false,
        vlan_tunnel: false,
        proxy_arp: false,
        backup_port: None,
    };
    for (kind, value) in attributes(data) {
        let on = bool_of(value);
        match kind {
            ifla::BRPORT_STATE => port.state = u8_of(value).unwrap_or(0),
            ifla::BRPORT_HAIRPIN => port.hairpin = on,
            ifla::BRPORT_LEARNING => port.learning = on,
            ifla::BRPORT_UNICAST_FLOOD => port.unicast_flood = on,
            ifla::BRPORT_PROXYARP | ifla::BRPORT_PROXYARP_WIFI => port.proxy_arp |= on,
            ifla::BRPORT_VLAN_TUNNEL => port.vlan_tunnel = on,
            ifla::BRPORT_NEIGH_SUPPRESS => port.neigh_suppress = on,
            ifla::BRPORT_ISOLATED => port.isolated = on,
            ifla::BRPORT_BACKUP_PORT => port.backup_port = index_of(value),
            ifla::BRPORT_LOCKED => port.locked = on,
            ifla::BRPORT_MAB => port.mab = on,
            ifla::BRPORT_NEIGH_VLAN_SUPPRESS => port.neigh_vlan_suppress = on,
            _ => {}
        }
    }
    port
}

/// `None` without a valid VNI. Options that an older kernel does not report keep
/// the value that kernel acts by.
fn vxlan_device(data: &[u8]) -> Option<VxlanDevice> {
    let mut vni = None;
    let mut device = VxlanDevice {
        vni: Vni::new(0)?,
        local: None,
        group: None,
        link: None,
        udp_port: 0,
        source_ports: (0, 0),
        learning: false,
        ageing_s: 0,
        ttl: 0,
        ttl_inherit: false,
        tos: 0,
        df: 0,
        udp_checksum: false,
        udp6_zero_checksum_tx: false,
        udp6_zero_checksum_rx: false,
        flow_label: 0,
        collect_metadata: false,
        vnifilter: false,
        foreign_options: Vec::new(),
    };
    for (kind, value) in attributes(data) {
        let on = bool_of(value);
        match kind {
            vxlan::ID => vni = vni_of(value),
            vxlan::GROUP | vxlan::GROUP6 => device.group = specified(value),
            vxlan::LOCAL | vxlan::LOCAL6 => device.local = specified(value),
            vxlan::LINK => device.link = index_of(value),
            vxlan::TTL => device.ttl = u8_of(value).unwrap_or(0),
            vxlan::TOS => device.tos = u8_of(value).unwrap_or(0),
            vxlan::LEARNING => device.learning = on,
            vxlan::AGEING => device.ageing_s = u32_of(value).unwrap_or(0),
            vxlan::PORT => device.udp_port = u16_be_of(value).unwrap_or(0),
            vxlan::PORT_RANGE => {
                let bounds = (u16_be_of(value), value.get(2..).and_then(u16_be_of));
                if let (Some(low), Some(high)) = bounds {
                    device.source_ports = (low, high);
                }
            }
            vxlan::UDP_CSUM => device.udp_checksum = on,
            vxlan::UDP_ZERO_CSUM6_TX => device.udp6_zero_checksum_tx = on,
            vxlan::UDP_ZERO_CSUM6_RX => device.udp6_zero_checksum_rx = on,
            vxlan::LABEL => device.flow_label = u32_be_of(value).unwrap_or(0),
            vxlan::COLLECT_METADATA => device.collect_metadata = on,
            vxlan::TTL_INHERIT => device.ttl_inherit = on,
            vxlan::DF => device.df = u8_of(value).unwrap_or(0),
            vxlan::VNIFILTER => device.vnifilter = on,
            _ => {
                if let Some(name) = foreign_option(kind, value)
                    && !device.foreign_options.contains(&name)
                {
                    device.foreign_options.push(name);
                }
            }
        }
    }
    device.vni = vni?;
    Some(device)
}

/// The name of an option that is on and is not mirrored.
fn foreign_option(kind: u16, value: &[u8]) -> Option<&'static str> {
    let (name, on) = match kind {
        // Flags: present is on.
        vxlan::GBP => ("gbp", true),
        vxlan::GPE => ("gpe", true),
        vxlan::REMCSUM_TX => ("remcsumtx", bool_of(value)),
        vxlan::REMCSUM_RX => ("remcsumrx", bool_of(value)),
        vxlan::PROXY => ("proxy", bool_of(value)),
        vxlan::RSC => ("rsc", bool_of(value)),
        vxlan::L2MISS => ("l2miss", bool_of(value)),
        vxlan::L3MISS => ("l3miss", bool_of(value)),
        vxlan::RESERVED_BITS => ("reserved_bits", value != DEFAULT_RESERVED_BITS),
        vxlan::LABEL_POLICY => ("flowlabel inherit", value.iter().any(|&b| b != 0)),
        _ => return None,
    };
    on.then_some(name)
}

/// The kernel writes "any" for an address that is not set.
fn specified(value: &[u8]) -> Option<IpAddr> {
    ip_of(value).filter(|address| !address.is_unspecified())
}

/// IFLA_AF_SPEC of an AF_UNSPEC message: the families' own settings. IPv6 sends
/// its sysctls as an array of integers (addrconf.c, ipv6_store_devconf).
fn hop_limit_v6(bytes: &[u8]) -> Option<u8> {
    /// DEVCONF_HOPLIMIT (include/uapi/linux/ipv6.h).
    const HOP_LIMIT: usize = 1;
    let (_, family) = attributes(bytes).find(|&(kind, _)| kind == libc::AF_INET6 as u16)?;
    let (_, settings) = attributes(family).find(|&(kind, _)| kind == ifla::INET6_CONF)?;
    u32_of(settings.get(4 * HOP_LIMIT..)?)?.try_into().ok()
}

fn xdp(bytes: &[u8]) -> Option<XdpAttachment> {
    let (mut mode, mut program, mut fallback) = (0, None, None);
    for (kind, value) in attributes(bytes) {
        match kind {
            ifla::XDP_ATTACHED => mode = u8_of(value).unwrap_or(0),
            ifla::XDP_PROG_ID => program = u32_of(value),
            // With several programs (mode 4) each stands under its own mode.
            ifla::XDP_DRV_PROG_ID..=ifla::XDP_HW_PROG_ID => fallback = fallback.or(u32_of(value)),
            _ => {}
        }
    }
    (mode != 0).then(|| XdpAttachment {
        mode,
        program_id: program.or(fallback).unwrap_or(0),
    })
}
