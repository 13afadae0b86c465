//! F17: "ping works, TCP does not". Real TCP stacks behind every kind of port.

use std::net::IpAddr;

use vtep_tests::streams::{Session, connect, transfer};
use vtep_tests::wiretap::counter;

use super::{World, for_all_ports, v6};

for_all_ports! {
    f17_tcp_runs_both_ways_over_both_families: both_ways;
}

const BYTES: usize = 8 << 20;

fn both_ways(case: &super::Case) {
    let mut world = World::new(case);
    let session = Session::start(&world.lab.vms[0], &world.lab.vms[1]).unwrap();
    let [a, b] = world.vms();
    for address in [IpAddr::from(b.address), v6(b)] {
        let (near, far) = connect(&a.netns, &b.netns, address).unwrap();
        transfer(&near, &far, BYTES).unwrap();
        transfer(&far, &near, BYTES).unwrap();
    }
    for vm in [a, b] {
        let sent = counter(&vm.netns, "Tcp", "OutSegs").unwrap();
        let again = counter(&vm.netns, "Tcp", "RetransSegs").unwrap();
        assert!(
            again * 50 <= sent,
            "{again} of {sent} segments were repeated"
        );
    }
    world.assert_fast_tcp(case, 2 * BYTES);
    assert!(session.finish().unwrap().round_trips > 20);
}
