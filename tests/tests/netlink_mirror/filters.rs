//! Packet filters on the way of bridged frames (R41).

use vtep_user::kernel::Filters;

use crate::harness::*;

fn sorted(mut filters: Filters) -> Filters {
    filters.bridge_chains.sort();
    filters.ip_chains.sort();
    filters
}

async fn filters(mirror: &Mirror) -> Filters {
    sorted(mirror.netlink.filters().await.expect("filters"))
}

#[test]
fn the_switches_are_those_of_this_namespace() {
    in_namespace(|| async {
        let mirror = Mirror::start().await;
        let set = |values: [u8; 3]| {
            for (table, value) in ["iptables", "ip6tables", "arptables"].iter().zip(values) {
                sh(&format!(
                    "sysctl -qw net.bridge.bridge-nf-call-{table}={value}"
                ));
            }
        };
        set([0, 0, 0]);
        assert!(!filters(&mirror).await.bridge_nf_call);
        for values in [[1, 0, 0], [0, 1, 0], [0, 0, 1]] {
            set(values);
            assert!(filters(&mirror).await.bridge_nf_call, "{values:?}");
        }
        set([0, 0, 0]);
        // Another namespace's switch is not ours.
        std::thread::spawn(|| {
            enter_fresh_namespace();
            sh("sysctl -qw net.bridge.bridge-nf-call-iptables=1");
        })
        .join()
        .unwrap();
        assert!(!filters(&mirror).await.bridge_nf_call);
    });
}

#[test]
fn chains_count_once_they_have_a_rule_or_drop_by_policy() {
    in_namespace(|| async {
        sh("ip link add va type veth peer name vb");
        let mirror = Mirror::start().await;
        assert_eq!(
            filters(&mirror).await,
            Filters {
                bridge_nf_call: filters(&mirror).await.bridge_nf_call,
                ..Filters::default()
            }
        );
        // Empty and accepting: harmless. Chains without a hook: never on the way.
        sh("nft 'add table bridge b
            add chain bridge b forward { type filter hook forward priority 0; }
            add chain bridge b other
            add rule bridge b other drop
            add table netdev n
            add chain netdev n in { type filter hook ingress device va priority 0; }
            add table inet i
            add chain inet i input { type filter hook input priority 0; }
            add chain inet i in { type filter hook ingress device va priority 0; }
            add table ip v4
            add chain ip v4 nat { type nat hook postrouting priority 100; }
            add table ip6 v6
            add chain ip6 v6 forward { type filter hook forward priority 0; }
            add table arp a
            add chain arp a input { type filter hook input priority 0; }'");
        let none = filters(&mirror).await;
        assert!(
            none.bridge_chains.is_empty() && none.ip_chains.is_empty(),
            "{none:?}"
        );
        sh("nft 'add rule bridge b forward jump other
            add rule netdev n in counter
            add rule inet i input accept
            add rule inet i in accept
            add rule ip v4 nat masquerade
            add chain ip6 v6 forward { policy drop; }
            add rule arp a input accept'");
        let some = filters(&mirror).await;
        assert_eq!(some.bridge_chains, ["b/forward", "i/in", "n/in"]);
        assert_eq!(
            some.ip_chains,
            ["a/input", "i/input", "v4/nat", "v6/forward"]
        );
        assert_eq!(
            sorted(mirror.netlink.snapshot().await.unwrap().filters),
            some
        );
        sh("nft flush ruleset");
        let none = filters(&mirror).await;
        assert!(
            none.bridge_chains.is_empty() && none.ip_chains.is_empty(),
            "{none:?}"
        );
    });
}

#[test]
fn every_change_of_nftables_is_announced() {
    in_namespace(|| async {
        let mut mirror = Mirror::start().await;
        for script in [
            "nft add table bridge b",
            "nft 'add chain bridge b forward { type filter hook forward priority 0; }'",
            "nft add rule bridge b forward drop",
            "nft 'add chain bridge b forward { policy drop; }'",
            "nft flush chain bridge b forward",
            "nft delete table bridge b",
        ] {
            let before = mirror.filters_changed;
            sh(script);
            mirror.until(script, |m| m.filters_changed > before).await;
        }
    });
}

#[test]
fn legacy_tables_count_as_soon_as_they_exist() {
    in_namespace(|| async {
        let mirror = Mirror::start().await;
        assert!(filters(&mirror).await.ip_chains.is_empty());
        // What iptables-legacy does first: ask for the table, which registers it.
        // SAFETY: a socket call without pointers.
        let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW) };
        assert!(socket >= 0, "{}", std::io::Error::last_os_error());
        const IPT_SO_GET_INFO: libc::c_int = 64;
        let mut info = [0u8; 84];
        info[..6].copy_from_slice(b"filter");
        let mut length = info.len() as libc::socklen_t;
        // SAFETY: `info` is a struct ipt_getinfo of `length` bytes; both outlive the
        // call, and the descriptor is ours.
        let asked = unsafe {
            let asked = libc::getsockopt(
                socket,
                libc::IPPROTO_IP,
                IPT_SO_GET_INFO,
                info.as_mut_ptr().cast(),
                &raw mut length,
            );
            libc::close(socket);
            asked
        };
        assert_eq!(asked, 0, "{}", std::io::Error::last_os_error());
        assert_eq!(filters(&mirror).await.ip_chains, ["iptables/filter"]);
    });
}
