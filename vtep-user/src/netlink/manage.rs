//! Makes and changes network devices for `vtep vni add` and `vtep port add`.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVxlan};
use vtep_common::Vni;

use super::codec::{attributes, text_of};
use super::error::{Failure, NetlinkError, device};
use super::link::{IFINFO_BYTES, link};
use super::request::{Netlink, encode, link_by_index};
use crate::kernel::{IfIndex, Link};

const IFLA_IFALIAS: u16 = 20;

/// A VXLAN device to be made; what is not named is the kernel's default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanSpec {
    pub name: String,
    pub vni: Vni,
    /// Outer source address.
    pub local: Option<IpAddr>,
    /// UDP destination port.
    pub udp_port: u16,
    pub learning: bool,
    /// Underlay device.
    pub link: Option<IfIndex>,
    /// Bytes; without it, that of `link` less the encapsulation.
    pub mtu: Option<u32>,
    /// Lifetime of an idle learned entry, seconds.
    pub ageing_s: Option<u32>,
}

impl Netlink {
    /// Makes a bridge, down.
    pub async fn create_bridge(
        &self,
        name: &str,
        mtu: Option<u32>,
    ) -> Result<IfIndex, NetlinkError> {
        let mut builder = LinkMessageBuilder::<LinkBridge>::new(name);
        if let Some(mtu) = mtu {
            builder = builder.mtu(mtu);
        }
        self.create(name, builder.build(), format!("bridge {name}"))
            .await
    }

    /// Makes a VXLAN device, down and in no bridge.
    pub async fn create_vxlan(&self, spec: &VxlanSpec) -> Result<IfIndex, NetlinkError> {
        let mut builder = LinkMessageBuilder::<LinkVxlan>::new(&spec.name)
            .id(spec.vni.get())
            .port(spec.udp_port)
            .learning(spec.learning);
        builder = match spec.local {
            Some(IpAddr::V4(local)) => builder.local(local),
            Some(IpAddr::V6(local)) => builder.local6(local),
            None => builder,
        };
        if let Some(link) = spec.link {
            builder = builder.dev(link);
        }
        if let Some(mtu) = spec.mtu {
            builder = builder.mtu(mtu);
        }
        if let Some(ageing_s) = spec.ageing_s {
            builder = builder.ageing(ageing_s);
        }
        let object = format!("vxlan device {}", spec.name);
        self.create(&spec.name, builder.build(), object).await
    }

    async fn create(
        &self,
        name: &str,
        message: LinkMessage,
        object: String,
    ) -> Result<IfIndex, NetlinkError> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.link_request(
            RouteNetlinkMessage::NewLink(message),
            flags,
            "create",
            object.clone(),
        )
        .await?;
        match self.link_by_name(name).await? {
            Some(link) => Ok(link.ifindex),
            None => Err(Failure::refused(libc::ENODEV).during("find", object)),
        }
    }

    /// Puts a link into a bridge, or takes it out of the one it is in.
    pub async fn set_master(
        &self,
        ifindex: IfIndex,
        bridge: Option<IfIndex>,
    ) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(ifindex)
            .controller(bridge.unwrap_or(0))
            .build();
        let object = match bridge {
            Some(bridge) => format!("{} to bridge {}", device(ifindex), device(bridge)),
            None => format!("{} from its bridge", device(ifindex)),
        };
        let operation = if bridge.is_some() { "add" } else { "remove" };
        self.set(message, operation, object).await
    }

    /// Sets a link up or down.
    pub async fn set_up(&self, ifindex: IfIndex, up: bool) -> Result<(), NetlinkError> {
        let builder = LinkUnspec::new_with_index(ifindex);
        let message = if up { builder.up() } else { builder.down() }.build();
        let operation = if up { "set up" } else { "set down" };
        self.set(message, operation, device(ifindex)).await
    }

    /// Bytes behind the Ethernet header.
    pub async fn set_mtu(&self, ifindex: IfIndex, mtu: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(ifindex).mtu(mtu).build();
        self.set(
            message,
            "set the MTU of",
            format!("{} to {mtu}", device(ifindex)),
        )
        .await
    }

    /// Attaches a note to a link (IFLA_IFALIAS), at most 255 bytes.
    pub async fn set_alias(&self, ifindex: IfIndex, alias: &str) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(ifindex).alias(alias).build();
        self.set(message, "set the alias of", device(ifindex)).await
    }

    /// The note attached to a link; `None` without one or without such a link.
    pub async fn alias(&self, ifindex: IfIndex) -> Result<Option<String>, NetlinkError> {
        let mut alias = None;
        let asked = self
            .channel()
            .await
            .request(&link_by_index(ifindex), |message| {
                let body = message.body.get(IFINFO_BYTES..).unwrap_or_default();
                let found = attributes(body).find(|&(kind, _)| kind == IFLA_IFALIAS);
                alias = found.map(|(_, text)| text_of(text));
            })
            .await;
        match asked {
            Err(failure) if failure.errno() == Some(libc::ENODEV) => Ok(None),
            Err(failure) => Err(failure.during("read", device(ifindex))),
            Ok(_) => Ok(alias),
        }
    }

    /// Removes a device. ENODEV if there is none, EOPNOTSUPP for hardware.
    pub async fn delete_link(&self, ifindex: IfIndex) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(ifindex).build();
        let message = RouteNetlinkMessage::DelLink(message);
        self.link_request(message, 0, "delete", device(ifindex))
            .await
    }

    /// One link by its name; `None` if there is none.
    pub async fn link_by_name(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let mut get = LinkMessage::default();
        get.attributes.push(LinkAttribute::IfName(name.to_owned()));
        get.attributes
            .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let request = encode(&RouteNetlinkMessage::GetLink(get), 0);
        let mut found = None;
        let asked = self
            .channel()
            .await
            .request(&request, |message| found = link(message.body))
            .await;
        match asked {
            Err(failure) if failure.errno() == Some(libc::ENODEV) => Ok(None),
            Err(failure) => Err(failure.during("read", format!("link {name}"))),
            Ok(_) => Ok(found),
        }
    }

    async fn set(
        &self,
        message: LinkMessage,
        operation: &'static str,
        object: String,
    ) -> Result<(), NetlinkError> {
        self.link_request(RouteNetlinkMessage::SetLink(message), 0, operation, object)
            .await
    }

    async fn link_request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        operation: &'static str,
        object: String,
    ) -> Result<(), NetlinkError> {
        self.channel()
            .await
            .request(&encode(&message, flags), |_| {})
            .await
            .map(|_| ())
            .map_err(|failure| failure.during(operation, object))
    }
}
