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

/// Put in the UDP checksum.
fn finish(packet: &mut [u8], source: [u8; 4], destination: [u8; 4]) {
    let length = packet.len() as u16 - 20;
    let sum = checksum::udp_pseudo_v4(source, destination, length)
        + u64::from(checksum::bytes(&packet[20..]));
    packet[26..28].copy_from_slice(&(!checksum::fold(sum)).to_ne_bytes());
}

/// A UDP frame of `bytes` bytes without frame check sequence: "64 bytes" on the
/// wire are 60 here. Frames that are changed later cannot have a checksum.
pub fn plain(source: MacAddr, destination: MacAddr, bytes: usize, checksum: bool) -> Vec<u8> {
    let (from, to) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let mut packet = ipv4_udp(from, to, [1000, 2000], &vec![0x5a; bytes - 42]);
    if checksum {
        finish(&mut packet, from, to);
    }
    ethernet(source, destination, &packet)
}

/// What [`encapsulated`] puts in front.
pub const OUTER_BYTES: u32 = 50;

/// `inner` as it comes from the remote. Linux peers send a UDP checksum by
/// default; as for [`plain`].
pub fn encapsulated(inner: &[u8], checksum: bool) -> Vec<u8> {
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((VNI << 8).to_be_bytes());
    payload.extend(inner);
    let mut packet = ipv4_udp(REMOTE_IP, LOCAL_IP, [50_000, 4789], &payload);
    if checksum {
        finish(&mut packet, REMOTE_IP, LOCAL_IP);
    }
    ethernet(ROUTER_MAC, UPLINK_MAC, &packet)
}
