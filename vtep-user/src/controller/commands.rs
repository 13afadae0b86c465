//! Requests of the control interface. Reads are answered at once from the
//! model; writes change the kernel and are answered when the maps hold the
//! result, so that a client can rely on it.

use std::time::{Duration, Instant};

use vtep_common::{MacAddr, Vni};

use crate::api::types::{FdbSpec, ResyncReport, Target, VniSpec, WriteMode};
use crate::api::values::{IfName, StationMac};
use crate::api::{ApiError, Command, Reply};
use crate::kernel::{FdbEntry, FdbTable, IfIndex, Link};
use crate::model::{SegmentRow, overhead_bytes};
use crate::netlink::{FdbWrite, NetlinkError, VxlanSpec};

use super::{Controller, ControllerError, rows};

/// How long the kernel and the maps may take.
const WAIT: Duration = Duration::from_secs(3);
/// How long a next hop may take to answer; without it the kernel carries the
/// frames, so the command is done all the same.
const RESOLVE: Duration = Duration::from_millis(500);
/// IFLA_IFALIAS of devices made by `vni add`: only these are removed again.
const MADE_BY_US: &str = "made by vtep";
/// A request that waits until the maps follow the kernel.
pub struct Pending {
    wanted: Wanted,
    reply: Reply<()>,
    since: Instant,
}

impl Pending {
    /// When to look again although nothing happened.
    pub fn wake_at(&self, now: Instant) -> Instant {
        let resolve = self.since + RESOLVE;
        if now < resolve {
            resolve
        } else {
            self.since + WAIT
        }
    }
}

/// What the maps shall hold.
#[derive(Debug)]
enum Wanted {
    Fdb {
        vni: Vni,
        mac: MacAddr,
        target: Target,
    },
    FdbGone {
        vni: Vni,
        mac: MacAddr,
    },
    Segment(Vni),
    SegmentGone(Vni),
    Port {
        name: IfName,
        vni: Vni,
    },
    PortGone(IfName),
}

impl Wanted {
    fn describe(&self) -> String {
        match self {
            Self::Fdb { vni, mac, .. } => {
                format!("entry {mac} of VNI {vni} did not reach the maps")
            }
            Self::FdbGone { vni, mac } => format!("entry {mac} of VNI {vni} is still in the maps"),
            Self::Segment(vni) => format!("VNI {vni} did not come up"),
            Self::SegmentGone(vni) => format!("VNI {vni} is still there"),
            Self::Port { name, vni } => format!("{name} did not become a port of VNI {vni}"),
            Self::PortGone(name) => format!("{name} is still a port"),
        }
    }
}

impl Controller {
    pub(super) async fn on_command(&mut self, command: Command) -> Result<(), ControllerError> {
        // What the client has seen happen before it asked counts.
        let events = self.events.take().await?;
        if !events.is_empty() {
            self.on_events(events).await?;
        }
        // An answer that cannot be delivered belongs to a client that has left.
        match command {
            Command::Status(reply) => drop(reply.send(Ok(self.status()))),
            Command::VniShow(reply) => drop(reply.send(Ok(self.vni_rows()))),
            Command::PortShow(reply) => drop(reply.send(Ok(self.port_rows()))),
            Command::FdbShow(filter, reply) => drop(reply.send(Ok(self.fdb_rows(filter)))),
            Command::RemoteShow(reply) => drop(reply.send(Ok(self.remote_rows()))),
            Command::Stats(reply) => drop(reply.send(self.stats())),
            Command::Resync(reply) => {
                let report = self.timed_resync().await?;
                drop(reply.send(Ok(report)));
            }
            Command::VniAdd(spec, reply) => {
                let result = self.vni_add(&spec).await;
                self.wait(result, Wanted::Segment(spec.vni), reply);
            }
            Command::VniDel(vni, reply) => {
                let result = self.vni_del(vni).await;
                self.wait(result, Wanted::SegmentGone(vni), reply);
            }
            Command::PortAdd(spec, reply) => {
                let result = self.port_add(&spec).await;
                let wanted = Wanted::Port {
                    name: spec.name,
                    vni: spec.vni,
                };
                self.wait(result, wanted, reply);
            }
            Command::PortDel(name, reply) => {
                let result = self.port_del(&name).await;
                self.wait(result, Wanted::PortGone(name), reply);
            }
            Command::FdbWrite(spec, mode, reply) => {
                let result = self.fdb_write(&spec, mode).await;
                let wanted = Wanted::Fdb {
                    vni: spec.vni,
                    mac: spec.mac.get(),
                    target: spec.location,
                };
                self.wait(result, wanted, reply);
            }
            Command::FdbDel(vni, mac, reply) => {
                let result = self.fdb_del(vni, mac).await;
                self.wait(
                    result,
                    Wanted::FdbGone {
                        vni,
                        mac: mac.get(),
                    },
                    reply,
                );
            }
            // Taken out of the queue by the loop, which ends with it.
            Command::Unload(reply) => drop(reply),
        }
        self.settle().await
    }

    fn wait(&mut self, result: Result<(), ApiError>, wanted: Wanted, reply: Reply<()>) {
        match result {
            Ok(()) => {
                self.pending.push(Pending {
                    wanted,
                    reply,
                    since: Instant::now(),
                });
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    /// Answer what is done, and what took too long.
    pub(super) fn answer_pending(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let now = Instant::now();
        for pending in std::mem::take(&mut self.pending) {
            let impatient = now >= pending.since + RESOLVE;
            if self.holds(&pending.wanted, impatient) {
                drop(pending.reply.send(Ok(())));
            } else if now >= pending.since + WAIT {
                let text = format!(
                    "{} within {} s: see `vtep status` and the daemon's log",
                    pending.wanted.describe(),
                    WAIT.as_secs()
                );
                drop(pending.reply.send(Err(ApiError::timeout(text))));
            } else {
                self.pending.push(pending);
            }
        }
    }

    /// `impatient`: also without a next hop.
    fn holds(&self, wanted: &Wanted, impatient: bool) -> bool {
        match wanted {
            Wanted::Fdb { vni, mac, target } => self.fdb_row(*vni, *mac).is_some_and(|row| {
                rows::points_to(&row, target)
                    && (row.accelerated || impatient || !self.model.is_resolving(*vni, *mac))
            }),
            Wanted::FdbGone { vni, mac } => self.fdb_row(*vni, *mac).is_none(),
            Wanted::Segment(vni) => self.model.segment(*vni).is_some_and(|s| s.bridge.is_some()),
            Wanted::SegmentGone(vni) => self.model.segment(*vni).is_none(),
            Wanted::Port { name, vni } => self
                .model
                .port(name.as_str())
                .into_iter()
                .find(|port| port.vni == *vni)
                .and_then(|port| self.model.link(port.ifindex))
                .is_some_and(|link| link.up),
            Wanted::PortGone(name) => self.model.port(name.as_str()).is_empty(),
        }
    }

    async fn timed_resync(&mut self) -> Result<ResyncReport, ControllerError> {
        let start = Instant::now();
        let before = self.counts.updates;
        self.resync().await?;
        Ok(ResyncReport {
            fdb_entries: self.model.counters().kernel_fdb_entries,
            updates: self.counts.updates - before,
            duration_ms: start.elapsed().as_millis() as u64,
        })
    }

    pub(super) fn segment(&self, vni: Vni) -> Result<SegmentRow, ApiError> {
        self.model.segment(vni).ok_or_else(|| {
            ApiError::not_found(format!(
                "there is no VNI {vni} here: make it with `vtep vni add {vni}`"
            ))
        })
    }

    pub(super) async fn device(&self, name: &str) -> Result<Link, ApiError> {
        let link = self.netlink.link_by_name(name).await.map_err(refused)?;
        link.ok_or_else(|| {
            ApiError::not_found(format!(
                "there is no device {name}: see `ip link` for the names"
            ))
        })
    }

    /// Bridge and VXLAN device, up and connected. What was made is removed again
    /// when a later step fails.
    async fn vni_add(&mut self, spec: &VniSpec) -> Result<(), ApiError> {
        spec.check()
            .map_err(|error| ApiError::bad_request(error.to_string()))?;
        if let Some(segment) = self.model.segment(spec.vni) {
            return Err(ApiError::conflict(format!(
                "VNI {} exists already on device {}: remove it with `vtep vni del {}` first",
                spec.vni, segment.vxlan_name, spec.vni
            )));
        }
        for name in [spec.bridge_name(), spec.vxlan_name()] {
            if self
                .netlink
                .link_by_name(&name)
                .await
                .map_err(refused)?
                .is_some()
            {
                return Err(ApiError::conflict(format!(
                    "device {name} exists already: choose other names with --bridge and --vxlan"
                )));
            }
        }
        let link = match &spec.dev {
            Some(name) => Some(self.device(name.as_str()).await?),
            None => None,
        };
        let mut made = Vec::new();
        let result = self.make_segment(spec, link.as_ref(), &mut made).await;
        if result.is_err() {
            for ifindex in made.into_iter().rev() {
                if let Err(error) = self.netlink.delete_link(ifindex).await {
                    tracing::warn!("cannot undo: {error}");
                }
            }
        }
        result
    }

    async fn make_segment(
        &self,
        spec: &VniSpec,
        link: Option<&Link>,
        made: &mut Vec<IfIndex>,
    ) -> Result<(), ApiError> {
        let netlink = &self.netlink;
        let (local, underlay_mtu) = self.tunnel_source(spec, link).await?;
        let v6 = local.is_some_and(|local| local.is_ipv6());
        let overhead = overhead_bytes(v6);
        let room = underlay_mtu.map(|mtu| mtu.saturating_sub(overhead));
        // The kernel would take less without a word (vxlan_core.c, vxlan_config_apply).
        let largest = room.unwrap_or(u32::from(u16::MAX) - overhead);
        if let Some(mtu) = spec.mtu.filter(|mtu| *mtu > largest) {
            return Err(ApiError::bad_request(format!(
                "MTU {mtu} of VNI {} is too large: the underlay leaves {largest} bytes",
                spec.vni
            )));
        }
        let mtu = spec.mtu.or(room);
        let vxlan = netlink
            .create_vxlan(&VxlanSpec {
                name: spec.vxlan_name(),
                vni: spec.vni,
                local,
                udp_port: spec.udp_port,
                learning: spec.learning,
                link: link.map(|link| link.ifindex),
                mtu,
                ageing_s: None,
            })
            .await
            .map_err(refused)?;
        made.push(vxlan);
        let bridge = netlink
            .create_bridge(&spec.bridge_name(), mtu)
            .await
            .map_err(refused)?;
        made.push(bridge);
        for ifindex in [vxlan, bridge] {
            netlink
                .set_alias(ifindex, MADE_BY_US)
                .await
                .map_err(refused)?;
        }
        netlink
            .set_master(vxlan, Some(bridge))
            .await
            .map_err(refused)?;
        for remote in &spec.remotes {
            let entry = FdbEntry {
                dst: Some(remote.get()),
                ..FdbEntry::new(FdbTable::Vxlan, vxlan, MacAddr::ZERO)
            };
            netlink
                .fdb_write(&entry, FdbWrite::Append)
                .await
                .map_err(refused)?;
        }
        for ifindex in [vxlan, bridge] {
            netlink.set_up(ifindex, true).await.map_err(refused)?;
        }
        Ok(())
    }

    /// Local address and MTU of the underlay, as far as they are known.
    async fn tunnel_source(
        &self,
        spec: &VniSpec,
        link: Option<&Link>,
    ) -> Result<(Option<std::net::IpAddr>, Option<u32>), ApiError> {
        let local = spec.local.map(|ip| ip.get());
        let mtu = link.map(|link| link.mtu);
        let Some(remote) = spec.remotes.first() else {
            return Ok((local, mtu));
        };
        let route = self
            .netlink
            .route(remote.get(), link.map(|link| link.ifindex), local)
            .await
            .map_err(refused)?;
        let Some(route) = route else {
            if local.is_none() && link.is_none() {
                return Err(ApiError::bad_request(format!(
                    "there is no route to remote {remote}: name the tunnel's source with --local"
                )));
            }
            return Ok((local, mtu));
        };
        let device_mtu = self.model.link(route.ifindex).map(|link| link.mtu);
        Ok((local.or(route.source), mtu.or(device_mtu)))
    }

    async fn vni_del(&mut self, vni: Vni) -> Result<(), ApiError> {
        let segment = self.segment(vni)?;
        let ours = |alias: Option<String>| alias.as_deref() == Some(MADE_BY_US);
        let vxlan = segment.vxlan;
        if let (Some(_), Some(vlan)) = (segment.source_vni, segment.vlan) {
            let name = &segment.vxlan_name;
            return Err(ApiError::conflict(format!(
                "VNI {vni} shares {name} with others: remove it with `bridge vlan del dev {name} \
                 vid {vlan}` if you are sure"
            )));
        }
        if !ours(self.netlink.alias(vxlan).await.map_err(refused)?) {
            return Err(ApiError::conflict(format!(
                "{} was not made by `vtep vni add`: remove it with `ip link del {}` if you are sure",
                segment.vxlan_name, segment.vxlan_name
            )));
        }
        let ports = self.model.ports().into_iter();
        let ports: Vec<String> = ports.filter(|p| p.vni == vni).map(|p| p.name).collect();
        self.netlink.delete_link(vxlan).await.map_err(refused)?;
        if let Some(bridge) = segment.bridge
            && ours(self.netlink.alias(bridge).await.map_err(refused)?)
        {
            self.netlink.delete_link(bridge).await.map_err(refused)?;
            for name in ports {
                self.choose_hook(&name, None)?;
            }
        }
        Ok(())
    }

    async fn fdb_write(&mut self, spec: &FdbSpec, mode: WriteMode) -> Result<(), ApiError> {
        let segment = self.segment(spec.vni)?;
        let mac = spec.mac.get();
        if self.model.is_of_host(spec.vni, mac) {
            return Err(ApiError::conflict(format!(
                "{mac} is the address of a device of this host: name the MAC of a VM"
            )));
        }
        // What was only learned gives way to what somebody says.
        if mode == WriteMode::Add
            && self.fdb_row(spec.vni, mac).is_some()
            && !self.model.is_learned(spec.vni, mac)
        {
            return Err(ApiError::conflict(format!(
                "{mac} exists already in VNI {}: use `vtep fdb replace`",
                spec.vni
            )));
        }
        match &spec.location {
            Target::Remote { remote } => {
                let remote = remote.get();
                if segment
                    .local
                    .is_some_and(|local| local.is_ipv4() != remote.is_ipv4())
                {
                    return Err(ApiError::bad_request(format!(
                        "{remote} is of another IP family than VNI {} ({}): a tunnel has one",
                        spec.vni, segment.vxlan_name
                    )));
                }
                // An entry with a nexthop takes no address: the kernel says yes and
                // does nothing (vxlan_core.c, vxlan_fdb_replace).
                if self.model.has_nexthop(spec.vni, mac) {
                    self.forget_tunnel(&segment, mac).await?;
                }
                // The VXLAN device first: the bridge must not send where no remote is known.
                let tunnel = FdbEntry {
                    dst: Some(remote),
                    ..tunnel_entry(&segment, mac)
                };
                self.netlink
                    .fdb_write(&tunnel, FdbWrite::Replace)
                    .await
                    .map_err(refused)?;
                let bridged = bridge_entry(&segment, segment.vxlan, mac);
                self.netlink
                    .fdb_write(&bridged, FdbWrite::Replace)
                    .await
                    .map_err(refused)?;
            }
            Target::Local { port } => {
                let rows = self.model.port(port.as_str());
                let Some(row) = rows.iter().find(|row| row.vni == spec.vni) else {
                    return Err(ApiError::not_found(format!(
                        "{port} is no port of VNI {}: add it with `vtep port add {port} --vni {}`",
                        spec.vni, spec.vni
                    )));
                };
                let bridged = bridge_entry(&segment, row.ifindex, mac);
                self.netlink
                    .fdb_write(&bridged, FdbWrite::Replace)
                    .await
                    .map_err(refused)?;
                self.forget_tunnel(&segment, mac).await?;
            }
        }
        self.model.mark_api(spec.vni, mac, true);
        Ok(())
    }

    async fn fdb_del(&mut self, vni: Vni, mac: StationMac) -> Result<(), ApiError> {
        let segment = self.segment(vni)?;
        let mac = mac.get();
        if self.fdb_row(vni, mac).is_none() {
            return Err(ApiError::not_found(format!(
                "there is no {mac} in VNI {vni}"
            )));
        }
        if let Some(ifindex) = self.model.bridge_port_of(vni, mac) {
            let bridged = bridge_entry(&segment, ifindex, mac);
            gone(self.netlink.fdb_delete(&bridged).await)?;
        }
        self.forget_tunnel(&segment, mac).await?;
        self.model.mark_api(vni, mac, false);
        Ok(())
    }

    /// Remove what the VXLAN device knows of a MAC, if anything.
    async fn forget_tunnel(&self, segment: &SegmentRow, mac: MacAddr) -> Result<(), ApiError> {
        gone(self.netlink.fdb_delete(&tunnel_entry(segment, mac)).await)
    }
}

/// Without a VLAN the kernel would take it for all VLANs of the port.
fn bridge_entry(segment: &SegmentRow, port: IfIndex, mac: MacAddr) -> FdbEntry {
    FdbEntry {
        vlan: segment.vlan,
        ..FdbEntry::new(FdbTable::Bridge, port, mac)
    }
}

fn tunnel_entry(segment: &SegmentRow, mac: MacAddr) -> FdbEntry {
    FdbEntry {
        source_vni: segment.source_vni,
        ..FdbEntry::new(FdbTable::Vxlan, segment.vxlan, mac)
    }
}

/// The kernel said no.
pub(super) fn refused(error: NetlinkError) -> ApiError {
    ApiError::internal(error.to_string())
}

/// Deleting what is not there is done.
fn gone(result: Result<(), NetlinkError>) -> Result<(), ApiError> {
    match result {
        Err(error) if error.errno() != Some(libc::ENOENT) => Err(refused(error)),
        _ => Ok(()),
    }
}
