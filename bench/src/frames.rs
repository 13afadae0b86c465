//! The frames that are sent: plain UDP, and the same behind a VXLAN header.

use vtep_common::{MacAddr, checksum};

use crate::host::{LOCAL_IP, REMOTE_IP, ROUTER_MAC, UPLINK_MAC, VNI};

fn ipv4_udp(source: [u8; 4], destination: [u8; 4], ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0];
    ip.extend((28 + payload.len() as u16).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(source);
    ip.extend(destination);
    let sum = !checksum::bytes(&ip);
    ip[10..12].copy_from_slice(&sum.to_ne_bytes());
    ip.extend(ports[0].to_be_bytes());
    ip.extend(ports[1].to_be_bytes());
    ip.extend((8 + payload.len() as u16).to_be_bytes());
    ip.extend([0, 0]);
    ip.extend(payload);
    ip
}

fn ethernet(source: MacAddr, destination: MacAddr, packet: &[u8]) -> Vec<u8> {
    let mut frame = destination.0.to_vec();
    frame.extend(source.0);
    frame.extend([8, 0]);
    frame.extend(packet);
    frame
}

/// A UDP frame of `bytes` bytes without frame check sequence: "64 bytes" on the
/// wire are 60 here.
pub fn plain(source: MacAddr, destination: MacAddr, bytes: usize) -> Vec<u8> {
    let payload = vec![0x5a; bytes - 42];
    ethernet(
        source,
        destination,
        &ipv4_udp([10, 0, 0, 1], [10, 0, 0, 2], [1000, 2000], &payload),
    )
}

/// What [`encapsulated`] puts in front.
pub const OUTER_BYTES: u32 = 50;

/// `inner` as it comes from the remote. Linux peers send a UDP checksum by
/// default; frames that are changed later cannot have one.
pub fn encapsulated(inner: &[u8], checksum: bool) -> Vec<u8> {
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((VNI << 8).to_be_bytes());
    payload.extend(inner);
    let mut packet = ipv4_udp(REMOTE_IP, LOCAL_IP, [50_000, 4789], &payload);
    let length = packet.len() as u16 - 20;
    if !checksum {
        return ethernet(ROUTER_MAC, UPLINK_MAC, &packet);
    }
    let sum = checksum::udp_pseudo_v4(REMOTE_IP, LOCAL_IP, length)
        + checksum::bytes(&packet[20..]) as u64;
    let sum = !checksum::fold(sum);
    packet[26..28].copy_from_slice(&sum.to_ne_bytes());
    ethernet(ROUTER_MAC, UPLINK_MAC, &packet)
}
