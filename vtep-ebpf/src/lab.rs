//! Programs of the laboratory, in an object of their own: the frame generator
//! of the benchmarks and demo, counting sinks, and the plain redirect that is
//! the ceiling of every comparison. Nothing here is part of the product.

#![no_std]
#![no_main]

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{Array, DevMapHash, PerCpuArray};
use aya_ebpf::programs::XdpContext;
use vtep_common::layout::Counter;

/// What the generator writes into each frame. Offsets from the frame's start;
/// 0 leaves that field as it is.
#[derive(Clone, Copy)]
#[repr(C)]
struct Plan {
    /// Frames alternate over this many values, at least 1.
    flows: u32,
    /// Device the frames are sent to.
    ifindex: u32,
    /// Last two bytes of a MAC, counted up with the flow.
    first_mac_at: u32,
    second_mac_at: u32,
    /// A UDP or TCP port, counted up with the flow.
    port_at: u32,
    pad: u32,
}

/// The generator's position, and what a sink received.
#[map]
static LAB_COUNT: PerCpuArray<Counter> = PerCpuArray::with_max_entries(2, 0);
#[map]
static LAB_PLAN: Array<Plan> = Array::with_max_entries(1, 0);
#[map]
static LAB_PORTS: DevMapHash = DevMapHash::with_max_entries(16, 0);

const GENERATED: u32 = 0;
const RECEIVED: u32 = 1;

/// Count a frame and say how many came before it.
#[inline(always)]
fn count(index: u32, bytes: usize) -> Option<u64> {
    let counter = LAB_COUNT.get_ptr_mut(index)?;
    // SAFETY: per-CPU element, not shared with an interrupting program.
    let counter = unsafe { &mut *counter };
    let before = counter.frames;
    counter.frames += 1;
    counter.bytes += bytes as u64;
    Some(before)
}

/// Write two bytes at a bounded, variable offset.
#[inline(always)]
fn put(ctx: &XdpContext, at: u32, value: u16) {
    if at == 0 || at > 256 {
        return;
    }
    let start = ctx.data() + at as usize;
    if start + 2 > ctx.data_end() {
        return;
    }
    // SAFETY: inside the frame, checked above.
    unsafe { (start as *mut [u8; 2]).write(value.to_be_bytes()) };
}

/// Run with live frames: each frame becomes one of `flows` and leaves.
#[xdp]
pub fn lab_generate(ctx: XdpContext) -> u32 {
    let Some(plan) = LAB_PLAN.get(0) else {
        return xdp_action::XDP_ABORTED;
    };
    let Some(number) = count(GENERATED, ctx.data_end() - ctx.data()) else {
        return xdp_action::XDP_ABORTED;
    };
    if plan.flows > 1 {
        let flow = (number % plan.flows as u64) as u16;
        put(&ctx, plan.first_mac_at, flow);
        put(&ctx, plan.second_mac_at, flow);
        put(&ctx, plan.port_at, flow);
    }
    LAB_PORTS
        .redirect(plan.ifindex, xdp_action::XDP_ABORTED as u64)
        .unwrap_or(xdp_action::XDP_ABORTED)
}

/// Count and drop.
#[xdp]
pub fn lab_sink(ctx: XdpContext) -> u32 {
    match count(RECEIVED, ctx.data_end() - ctx.data()) {
        Some(_) => xdp_action::XDP_DROP,
        None => xdp_action::XDP_ABORTED,
    }
}

/// Send everything to the device under key 0, untouched.
#[xdp]
pub fn lab_redirect(_ctx: XdpContext) -> u32 {
    LAB_PORTS
        .redirect(0, xdp_action::XDP_ABORTED as u64)
        .unwrap_or(xdp_action::XDP_ABORTED)
}

/// Do nothing, but make the driver poll: a veth only takes redirected frames
/// where its peer runs NAPI.
#[xdp]
pub fn lab_pass(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier refuses a program that can loop here.
    loop {}
}

// The kernel gives GPL-only helpers to programs that declare a compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
