//! Finds packet filters that frames pass on the kernel's path (R41): the
//! br_netfilter switches, nftables base chains (nfnetlink), legacy tables.
//! Which of them matter where is decided elsewhere.

use std::fs;
use std::path::Path;

use netlink_packet_core::NLM_F_DUMP;

use super::codec::{attributes, text_of, u8_of, u32_be_of};
use super::error::NetlinkError;
use super::request::Netlink;
use super::socket::Request;
use crate::kernel::Filters;

/// NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN, and the answer's type.
const GET_CHAIN: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8 | libc::NFT_MSG_GETCHAIN as u16;
const NEW_CHAIN: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8 | libc::NFT_MSG_NEWCHAIN as u16;
/// `struct nfgenmsg`.
const NFGENMSG_BYTES: usize = 4;

/// NFTA_* (include/uapi/linux/netfilter/nf_tables.h); integers are big-endian.
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_USE: u16 = 6;
const HOOK_HOOKNUM: u16 = 1;

/// NFPROTO_* (include/uapi/linux/netfilter.h).
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_ARP: u8 = 3;
const NFPROTO_NETDEV: u8 = 5;
const NFPROTO_BRIDGE: u8 = 7;
const NFPROTO_IPV6: u8 = 10;
/// Of family inet, this hook sits on a device like family netdev does.
const NF_INET_INGRESS: u32 = 5;
const NF_ACCEPT: u32 = 1;

const BRIDGE_NF_CALL: [&str; 3] = [
    "/proc/sys/net/bridge/bridge-nf-call-iptables",
    "/proc/sys/net/bridge/bridge-nf-call-ip6tables",
    "/proc/sys/net/bridge/bridge-nf-call-arptables",
];
/// Names of registered legacy tables, one per line.
const LEGACY: [(&str, &str); 3] = [
    ("/proc/thread-self/net/ip_tables_names", "iptables"),
    ("/proc/thread-self/net/ip6_tables_names", "ip6tables"),
    ("/proc/thread-self/net/arp_tables_names", "arptables"),
];
/// Legacy ebtables has no list of tables per namespace; its table modules are
/// loaded when a table is first used.
const EBTABLES_MODULES: [(&str, &str); 3] = [
    ("ebtable_filter", "filter"),
    ("ebtable_nat", "nat"),
    ("ebtable_broute", "broute"),
];

impl Netlink {
    /// Reads the filters of the calling thread's network namespace. The switches
    /// and the legacy tables send no notification when they change.
    pub async fn filters(&self) -> Result<Filters, NetlinkError> {
        let mut filters = Filters {
            bridge_nf_call: BRIDGE_NF_CALL.iter().any(|path| read(path).trim() == "1"),
            ..Filters::default()
        };
        if let Some(channel) = &self.netfilter {
            let request = Request {
                kind: GET_CHAIN,
                flags: NLM_F_DUMP,
                body: vec![libc::AF_UNSPEC as u8, 0, 0, 0],
            };
            let mut channel = channel.lock().await;
            for _ in 0..4 {
                filters.bridge_chains.clear();
                filters.ip_chains.clear();
                let asked = channel
                    .request(&request, |message| {
                        if message.kind == NEW_CHAIN {
                            sort_in(base_chain(message.body), &mut filters);
                        }
                    })
                    .await;
                match asked {
                    Ok(completion) if completion.interrupted => {}
                    Ok(_) => break,
                    // EINVAL, EOPNOTSUPP: a kernel without nftables.
                    Err(failure)
                        if matches!(failure.errno(), Some(libc::EINVAL | libc::EOPNOTSUPP)) =>
                    {
                        break;
                    }
                    Err(failure) => return Err(failure.during("read", "nftables chains")),
                }
            }
        }
        for (path, tool) in LEGACY {
            filters
                .ip_chains
                .extend(read(path).lines().map(|table| format!("{tool}/{table}")));
        }
        filters
            .bridge_chains
            .extend(ebtables(&read("/proc/modules")));
        Ok(filters)
    }
}

/// The text of a file, empty if it cannot be read: the feature is not there.
fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn ebtables(modules: &str) -> Vec<String> {
    let loaded = |name: &str| {
        modules
            .lines()
            .any(|line| line.split(' ').next() == Some(name))
    };
    EBTABLES_MODULES
        .iter()
        .filter(|(module, _)| loaded(module))
        .map(|(_, table)| format!("ebtables/{table}"))
        .collect()
}

/// A base chain that can stop or change a packet.
#[derive(Debug, PartialEq, Eq)]
struct BaseChain {
    family: u8,
    /// "table/chain".
    name: String,
    hook: u32,
}

fn sort_in(chain: Option<BaseChain>, filters: &mut Filters) {
    let Some(chain) = chain else { return };
    match chain.family {
        NFPROTO_BRIDGE | NFPROTO_NETDEV => filters.bridge_chains.push(chain.name),
        NFPROTO_INET if chain.hook == NF_INET_INGRESS => filters.bridge_chains.push(chain.name),
        NFPROTO_INET | NFPROTO_IPV4 | NFPROTO_IPV6 | NFPROTO_ARP => {
            filters.ip_chains.push(chain.name);
        }
        _ => {}
    }
}

/// Reads NFT_MSG_NEWCHAIN; `None` for ordinary chains (no hook) and for base
/// chains that accept everything: policy accept and no rule. NFTA_CHAIN_USE
/// counts rules and jumps, and nothing can jump to a base chain.
fn base_chain(body: &[u8]) -> Option<BaseChain> {
    let family = u8_of(body)?;
    let (mut table, mut name, mut hook) = (None, None, None);
    let (mut rules, mut policy) = (0, NF_ACCEPT);
    for (kind, value) in attributes(body.get(NFGENMSG_BYTES..)?) {
        match kind {
            CHAIN_TABLE => table = Some(text_of(value)),
            CHAIN_NAME => name = Some(text_of(value)),
            CHAIN_HOOK => {
                let number = attributes(value).find(|&(kind, _)| kind == HOOK_HOOKNUM);
                hook = number.and_then(|(_, number)| u32_be_of(number));
            }
            CHAIN_USE => rules = u32_be_of(value).unwrap_or(1),
            CHAIN_POLICY => policy = u32_be_of(value).unwrap_or(0),
            _ => {}
        }
    }
    let hook = hook?;
    if rules == 0 && policy == NF_ACCEPT {
        return None;
    }
    Some(BaseChain {
        family,
        name: format!("{}/{}", table?, name?),
        hook,
    })
}

#[cfg(test)]
mod tests {
    use super::super::codec::messages;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_loaded_ebtables_tables_count() {
        let modules =
            "ebtable_filter 12288 1 - Live 0x0\nebtables 45056 1 ebtable_filter, Live 0x0\n";
        assert_eq!(ebtables(modules), ["ebtables/filter"]);
        assert!(ebtables("xebtable_nat 1 0 - Live 0x0\n").is_empty());
    }

    #[test]
    fn recorded_chains_count_if_they_can_stop_a_packet() {
        let read = |name: &str| {
            let bytes = super::super::tests::captured(name);
            let body = messages(&bytes).next().expect("a message").body;
            base_chain(body)
        };
        let forward = read("chain-forward").expect("policy drop and a rule");
        assert_eq!(
            (forward.family, forward.name.as_str()),
            (NFPROTO_BRIDGE, "b/forward")
        );
        assert_eq!(read("chain-other"), None, "no hook");
        assert_eq!(read("chain-harmless"), None, "accepts, no rule");
        let ingress = read("chain-in").expect("a rule");
        assert_eq!(
            (ingress.family, ingress.hook),
            (NFPROTO_INET, NF_INET_INGRESS)
        );
        let mut filters = Filters::default();
        for chain in [forward, ingress] {
            sort_in(Some(chain), &mut filters);
        }
        assert_eq!(filters.bridge_chains, ["b/forward", "i/in"]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(body: Vec<u8>) {
            base_chain(&body);
        }
    }
}
