//! `vtep port add` and `del`: membership of a bridge, and the choice of hook,
//! which is remembered beside the socket. Called by `commands`.

use std::path::PathBuf;

use crate::api::ApiError;
use crate::api::types::{PortHook, PortSpec};
use crate::api::values::IfName;
use crate::instance::Instance;
use crate::kernel::{Bridge, IfIndex, LinkKind};
use crate::netlink::NetlinkError;

use super::commands::refused;
use super::{Controller, rows};

impl Controller {
    pub(super) async fn port_add(&mut self, spec: &PortSpec) -> Result<(), ApiError> {
        let segment = self.segment(spec.vni)?;
        let Some(bridge) = segment.bridge else {
            return Err(ApiError::conflict(format!(
                "VNI {}: {} is in no bridge: add it with `ip link set {} master BRIDGE`",
                spec.vni, segment.vxlan_name, segment.vxlan_name
            )));
        };
        let link = self.device(spec.name.as_str()).await?;
        if matches!(link.kind, LinkKind::Vxlan(_) | LinkKind::Bridge(_)) || link.loopback {
            return Err(ApiError::bad_request(format!(
                "{} cannot be a port: name the host's end of a tap or veth",
                spec.name
            )));
        }
        if let Some(use_of_host) = self.model.use_of_host(link.ifindex) {
            return Err(ApiError::conflict(format!(
                "{} {use_of_host}: a port belongs to a VM alone, name the host's end of a tap or veth",
                spec.name
            )));
        }
        let name = spec.name.as_str();
        let before = self.port_choices.get(name).copied();
        // A port may have other VLANs, which are not ours to take.
        if let Some(vlan) = segment.vlan
            && link.master == Some(bridge)
            && !self.model.port(name).iter().any(|p| p.vni == spec.vni)
        {
            return Err(ApiError::conflict(format!(
                "VNI {} is VLAN {vlan} of the bridge, and {name} is in others: add it with `bridge \
                 vlan add dev {name} vid {vlan} pvid untagged`",
                spec.vni
            )));
        }
        let join = match link.master {
            Some(master) if master != bridge => {
                let name = self
                    .model
                    .link(master)
                    .map_or("another device", |l| &l.name);
                return Err(ApiError::conflict(format!(
                    "{} belongs to {name} already: release it with `ip link set {} nomaster` first",
                    spec.name, spec.name
                )));
            }
            Some(_) => false,
            None => true,
        };
        // Known before the port is, so that it is never decided without.
        self.choose_hook(name, Some(spec.hook))?;
        let join = join.then_some((bridge, segment.vlan));
        let result = self.plug(link.ifindex, join).await;
        if result.is_err() {
            self.choose_hook(name, before)?;
        }
        result
    }

    async fn plug(
        &self,
        ifindex: IfIndex,
        join: Option<(IfIndex, Option<u16>)>,
    ) -> Result<(), ApiError> {
        let plugged = match join {
            Some((bridge, vlan)) => self.join(ifindex, bridge, vlan).await,
            None => Ok(()),
        };
        let up = match plugged {
            Ok(()) => self.netlink.set_up(ifindex, true).await,
            refused => refused,
        };
        if up.is_err()
            && join.is_some()
            && let Err(error) = self.netlink.set_master(ifindex, None).await
        {
            tracing::warn!("cannot undo: {error}");
        }
        up.map_err(refused)
    }

    /// Becomes a port of a bridge, and a member of that VLAN alone: down meanwhile, so
    /// that no frame is of the bridge's default VLAN.
    async fn join(
        &self,
        ifindex: IfIndex,
        bridge: IfIndex,
        vlan: Option<u16>,
    ) -> Result<(), NetlinkError> {
        let netlink = &self.netlink;
        let Some(vlan) = vlan else {
            return netlink.set_master(ifindex, Some(bridge)).await;
        };
        netlink.set_up(ifindex, false).await?;
        netlink.set_master(ifindex, Some(bridge)).await?;
        netlink.vlan_join(ifindex, vlan).await?;
        let default = self.model.link(bridge).map(|link| &link.kind);
        match default {
            Some(LinkKind::Bridge(Bridge { default_pvid, .. }))
                if *default_pvid != 0 && *default_pvid != vlan =>
            {
                netlink.vlan_leave(ifindex, *default_pvid).await
            }
            _ => Ok(()),
        }
    }

    pub(super) async fn port_del(&mut self, name: &IfName) -> Result<(), ApiError> {
        let Some(port) = self.model.port(name.as_str()).into_iter().next() else {
            return Err(ApiError::not_found(format!(
                "{name} is no port of any VNI: see `vtep port show`"
            )));
        };
        self.netlink
            .set_master(port.ifindex, None)
            .await
            .map_err(refused)?;
        self.choose_hook(name.as_str(), None)
    }

    /// Remember a choice made by hand as long as the machine runs: beside the
    /// socket, because devices do not live longer either.
    pub(super) fn choose_hook(
        &mut self,
        name: &str,
        hook: Option<PortHook>,
    ) -> Result<(), ApiError> {
        match hook {
            None | Some(PortHook::Auto) => self.port_choices.remove(name),
            Some(hook) => self.port_choices.insert(name.to_owned(), hook),
        };
        let configured = self.configured_hook(name);
        self.model
            .set_hook(name, rows::hook_choice(hook.unwrap_or(configured)));
        self.save_port_choices()
            .map_err(|error| ApiError::internal(format!("cannot keep the choice of hook: {error}")))
    }

    fn configured_hook(&self, name: &str) -> PortHook {
        let ports = &self.options.config.ports;
        ports
            .iter()
            .find(|(n, _)| n.as_str() == name)
            .map_or(PortHook::Auto, |(_, port)| port.hook)
    }

    fn save_port_choices(&self) -> std::io::Result<()> {
        let path = port_choices_path(&self.options.instance);
        // Written aside first: a daemon killed here must find the old or the new list.
        let new = path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(&self.port_choices)?)?;
        std::fs::rename(new, path)
    }

    pub(super) fn load_port_choices(&mut self) {
        let path = port_choices_path(&self.options.instance);
        match std::fs::read(&path).map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(choices)) => self.port_choices = choices,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Ok(Err(error)) => tracing::warn!("{}: {error}: ignored", path.display()),
            Err(error) => tracing::warn!("{}: {error}: ignored", path.display()),
        }
        for (name, hook) in &self.port_choices {
            self.model.set_hook(name, rows::hook_choice(*hook));
        }
    }
}

fn port_choices_path(instance: &Instance) -> PathBuf {
    instance
        .run_dir()
        .join(format!("{}.ports", instance.name()))
}

pub fn forget_port_choices(instance: &Instance) {
    let path = port_choices_path(instance);
    if let Err(error) = std::fs::remove_file(&path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("{}: {error}", path.display());
    }
}
