//! The kernel's driver as oracle: two hosts that are alike, one accelerated. The
//! same frames go into both, in both directions, and what comes out on the wire
//! and at the VMs must be equal.

use vtep_tests::corpus;
use vtep_tests::is_root;
use vtep_tests::twins::{Device, Tap, Twins};

/// Frames beside those of the tables, per direction.
const GENERATED: usize = 2000;

fn compare(test: &str, device: &Device, seed: u64) {
    if !is_root(test) {
        return;
    }
    let start = std::time::Instant::now();
    let mut twins = Twins::new(device).unwrap();
    eprintln!("set up in {:?}", start.elapsed());
    let egress = corpus::egress(&twins.world, seed, GENERATED);
    let ingress = corpus::ingress(&twins.world, seed + 1, GENERATED);
    for (tap, cases) in [(Tap::A, egress), (Tap::Wire, ingress)] {
        let report = twins.run(tap, &cases).unwrap();
        assert!(report.frames > GENERATED);
        println!(
            "{test}, from {tap:?}: {} frames, {} of {} fast, out {:?}, {:?}",
            report.frames, report.fast, report.expected_fast, report.out, report.outcomes
        );
    }
    let fdb = twins.compare_fdb().unwrap();
    println!(
        "{test}: {} FDB entries alike in {:?}",
        fdb.len(),
        start.elapsed()
    );
}

#[test]
fn default_device_equals_the_kernel() {
    compare("default_device_equals_the_kernel", &Device::default(), 1);
}
