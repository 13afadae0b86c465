//! Changes forwarding entries, in the bridge's table and in the VXLAN device's,
//! and keeps entries that the fast path uses from ageing out there.

use netlink_packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::codec::NDA_NH_ID;
use super::decode::fdb_entry;
use super::error::{Failure, NetlinkError, device};
use super::request::{Netlink, encode};
use super::socket::{Answer, Request};
use crate::kernel::{FdbEntry, FdbTable, bits};

/// What to do with an entry that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdbWrite {
    /// Fail with EEXIST (`bridge fdb add`). The bridge does not look for an old
    /// entry where the new one is NTF_EXT_LEARNED, and takes its place.
    Add,
    /// Take its place (`bridge fdb replace`); not for all-zero entries, which
    /// can have several destinations.
    Replace,
    /// One more destination of a multicast or all-zero entry of a VXLAN device
    /// (`bridge fdb append`).
    Append,
}

/// Entries refreshed per question, small so that little time passes between
/// looking at an entry and touching it.
const REFRESH_BATCH: usize = 16;

/// States that do not age.
const FIXED: u16 = bits::NUD_PERMANENT | bits::NUD_NOARP;

impl Netlink {
    /// Writes an entry. `state` and `flags` are taken as they are, apart from the
    /// bits that choose the table.
    pub async fn fdb_write(&self, entry: &FdbEntry, how: FdbWrite) -> Result<(), NetlinkError> {
        let (operation, flags) = match how {
            FdbWrite::Add => ("add", NLM_F_CREATE | NLM_F_EXCL),
            FdbWrite::Replace => ("replace", NLM_F_CREATE | NLM_F_REPLACE),
            FdbWrite::Append => ("append", NLM_F_CREATE | NLM_F_APPEND),
        };
        let request = encode(&RouteNetlinkMessage::NewNeighbour(message(entry)), flags);
        self.change(&request, operation, entry).await
    }

    /// Removes an entry, or the one destination of it that `dst` names. ENOENT if
    /// there is none.
    pub async fn fdb_delete(&self, entry: &FdbEntry) -> Result<(), NetlinkError> {
        let request = encode(&RouteNetlinkMessage::DelNeighbour(message(entry)), 0);
        self.change(&request, "delete", entry).await
    }

    async fn change(
        &self,
        request: &Request,
        operation: &'static str,
        entry: &FdbEntry,
    ) -> Result<(), NetlinkError> {
        self.channel()
            .await
            .request(request, |_| {})
            .await
            .map(|_| ())
            .map_err(|failure| failure.during(operation, describe(entry)))
    }

    /// Keeps dynamic entries from ageing out, as traffic would (NTF_USE), and
    /// returns how many of them it touched. Entries that vanished, moved to
    /// another port or destination, or became static meanwhile are left alone.
    ///
    /// The kernel has no conditional refresh: for the bridge's table NTF_USE
    /// creates and moves entries like a received frame (br_fdb.c, __br_fdb_add),
    /// so each entry is looked at right before. A move within the fraction of a
    /// millisecond between the two would be undone; the entries are asked for in
    /// small batches to keep that time short.
    pub async fn fdb_refresh(&self, entries: &[FdbEntry]) -> Result<usize, NetlinkError> {
        let failed = |error| Failure::Socket(error).during("refresh", "forwarding entries");
        let mut touched = 0;
        for batch in entries.chunks(REFRESH_BATCH) {
            let questions: Vec<_> = batch.iter().map(question).collect();
            let mut channel = self.channel().await;
            let mut uses = Vec::with_capacity(batch.len());
            channel
                .batch(&questions, |position, answer| {
                    if let Answer::Data(message) = answer
                        && let Some(now) = fdb_entry(message.body)
                        && same_place(&batch[position], &now)
                    {
                        uses.push(touch(now));
                    }
                })
                .await
                .map_err(failed)?;
            touched += uses.len();
            channel
                .batch(&uses, |_, answer| {
                    // Vanished in between; any other refusal means the same for
                    // the caller: it was not refreshed.
                    touched -= usize::from(matches!(answer, Answer::Refused(..)));
                })
                .await
                .map_err(failed)?;
        }
        Ok(touched)
    }
}

/// RTM_GETNEIGH for one entry. The bridge answers with whatever port the address
/// is on.
fn question(entry: &FdbEntry) -> Request {
    let mut get = NeighbourMessage::default();
    get.header.family = AddressFamily::Bridge;
    get.attributes
        .push(NeighbourAttribute::LinkLayerAddress(entry.mac.0.to_vec()));
    match entry.table {
        FdbTable::Bridge => {
            get.header.flags = NeighbourFlags::Controller;
            let bridge = entry.bridge.unwrap_or(entry.ifindex);
            get.attributes.push(NeighbourAttribute::Controller(bridge));
            get.attributes
                .extend(entry.vlan.map(NeighbourAttribute::Vlan));
        }
        FdbTable::Vxlan => {
            get.header.flags = NeighbourFlags::Own;
            get.header.ifindex = entry.ifindex;
            let vni = entry
                .source_vni
                .map(|vni| NeighbourAttribute::Vni(vni.get()));
            get.attributes.extend(vni);
        }
    }
    encode(&RouteNetlinkMessage::GetNeighbour(get), 0)
}

fn same_place(known: &FdbEntry, now: &FdbEntry) -> bool {
    known.ifindex == now.ifindex
        && known.dst == now.dst
        && known.vni == now.vni
        && known.udp_port == now.udp_port
        && known.nexthop_id == now.nexthop_id
        && now.state & FIXED == 0
}

/// RTM_NEWNEIGH with NTF_USE and without NLM_F_CREATE: a VXLAN device answers
/// ENOENT if the entry vanished. Everything else is as the kernel has it, for
/// the device would take over what differs.
fn touch(mut now: FdbEntry) -> Request {
    now.flags |= bits::NTF_USE;
    // The only state of a dynamic entry that is accepted.
    now.state = bits::NUD_REACHABLE;
    encode(&RouteNetlinkMessage::NewNeighbour(message(&now)), 0)
}

fn message(entry: &FdbEntry) -> NeighbourMessage {
    let table = match entry.table {
        // The bridge's own addresses are addressed as its `self` entries.
        FdbTable::Bridge if entry.bridge == Some(entry.ifindex) => bits::NTF_SELF,
        FdbTable::Bridge => bits::NTF_MASTER,
        FdbTable::Vxlan => bits::NTF_SELF,
    };
    let flags = entry.flags & !(bits::NTF_SELF | bits::NTF_MASTER) | table;
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = entry.ifindex;
    message.header.state = NeighbourState::from(entry.state);
    message.header.flags = NeighbourFlags::from_bits_retain(flags);
    let attributes = &mut message.attributes;
    attributes.push(NeighbourAttribute::LinkLayerAddress(entry.mac.0.to_vec()));
    attributes.extend(entry.vlan.map(NeighbourAttribute::Vlan));
    attributes.extend(
        entry
            .dst
            .map(|dst| NeighbourAttribute::Destination(dst.into())),
    );
    attributes.extend(entry.udp_port.map(NeighbourAttribute::Port));
    attributes.extend(entry.vni.map(|vni| NeighbourAttribute::Vni(vni.get())));
    attributes.extend(
        entry
            .source_vni
            .map(|vni| NeighbourAttribute::SourceVni(vni.get())),
    );
    attributes.extend(entry.via.map(NeighbourAttribute::IfIndex));
    attributes.extend(entry.nexthop_id.map(|id| {
        NeighbourAttribute::Other(DefaultNla::new(NDA_NH_ID, id.to_ne_bytes().to_vec()))
    }));
    message
}

fn describe(entry: &FdbEntry) -> String {
    let table = match entry.table {
        FdbTable::Bridge => "bridge",
        FdbTable::Vxlan => "vxlan",
    };
    let mut text = format!("{table} entry {} on {}", entry.mac, device(entry.ifindex));
    if let Some(vlan) = entry.vlan {
        text.push_str(&format!(" vlan {vlan}"));
    }
    if let Some(dst) = entry.dst {
        text.push_str(&format!(" dst {dst}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use vtep_common::{MacAddr, Vni};

    fn full() -> FdbEntry {
        FdbEntry {
            table: FdbTable::Vxlan,
            ifindex: 7,
            bridge: None,
            mac: MacAddr([0, 1, 2, 3, 4, 5]),
            vlan: None,
            dst: Some([192, 0, 2, 1].into()),
            udp_port: Some(4789),
            vni: Vni::new(77),
            source_vni: Vni::new(5),
            via: Some(3),
            nexthop_id: Some(12),
            state: bits::NUD_NOARP | bits::NUD_REACHABLE,
            flags: bits::NTF_SELF | bits::NTF_EXT_LEARNED,
        }
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        // As the kernel dumps it: plus NDA_CACHEINFO.
        let with_cache_info = |entry: &FdbEntry| {
            let mut body = encode(&RouteNetlinkMessage::NewNeighbour(message(entry)), 0).body;
            body.extend_from_slice(&[20, 0, libc::NDA_CACHEINFO as u8, 0]);
            body.extend_from_slice(&[0; 16]);
            body
        };
        assert_eq!(fdb_entry(&with_cache_info(&full())), Some(full()));
        let v6 = FdbEntry {
            dst: Some("2001:db8::1".parse().unwrap()),
            ..full()
        };
        assert_eq!(fdb_entry(&with_cache_info(&v6)), Some(v6));
    }

    #[test]
    fn an_entry_elsewhere_or_static_by_now_is_not_refreshed() {
        let known = FdbEntry {
            state: bits::NUD_REACHABLE,
            ..full()
        };
        assert!(same_place(&known, &known));
        assert!(!same_place(
            &known,
            &FdbEntry {
                ifindex: 8,
                ..known.clone()
            }
        ));
        assert!(!same_place(
            &known,
            &FdbEntry {
                dst: None,
                ..known.clone()
            }
        ));
        assert!(!same_place(
            &known,
            &FdbEntry {
                state: bits::NUD_PERMANENT,
                ..known.clone()
            }
        ));
    }
}
