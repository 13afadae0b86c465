//! The oracle as a tool: what `cargo xtask test --oracle` does, in a size for
//! every run, and whether it would notice.

use vtep_tests::corpus::{FAR, Grammar};
use vtep_tests::is_root;
use vtep_tests::lab::VXLAN;
use vtep_tests::oracle::{Bench, Plan, Summary, check};
use vtep_tests::twins::{Device, Tap};

#[test]
fn r42_a_hundred_thousand_generated_frames_equal_the_kernel() {
    if !is_root("r42_a_hundred_thousand_generated_frames_equal_the_kernel") {
        return;
    }
    let plan = Plan {
        frames: 100_000,
        seed: 0,
        device: None,
        only: None,
    };
    let line = check(&plan, &mut |_, _| ()).unwrap_or_else(|error| panic!("{error:#}"));
    println!("{line}");
}

/// One station is behind another remote for the kernel-only host: every frame to
/// it differs, is named, and no other is.
#[test]
fn the_oracle_notices_a_difference_and_names_its_frames() {
    if !is_root("the_oracle_notices_a_difference_and_names_its_frames") {
        return;
    }
    let mut bench = Bench::new(1, "default", &Device::default()).unwrap();
    let entry = format!("bridge fdb replace {FAR} dev {VXLAN} self static dst 198.51.100.2");
    bench.twins.kernel_only().run(&entry).unwrap();
    let mut summary = Summary::default();
    assert_eq!(Grammar::block(1), (Tap::A, true));
    bench.block(1, &mut summary).unwrap();
    assert!(summary.differences > 20, "{summary}");
    assert!(!summary.is_good());
    assert_eq!(summary.descriptions.len(), 20, "the rest is only counted");
    for text in &summary.descriptions {
        assert!(text.contains(&format!("> {FAR} ")), "{text}");
        assert!(text.contains("kernel-only host, at Wire: "), "{text}");
        assert!(text.contains("--seed 1 --device default --only "), "{text}");
    }
}

#[test]
fn the_oracle_fails_where_less_than_99_percent_are_fast() {
    let with = |fast| Summary {
        meant_fast: 1000,
        fast,
        ..Summary::default()
    };
    assert!(with(990).is_good());
    assert!(!with(989).is_good());
}
