//! The XDP programs. This file only turns an outcome into an action and counts
//! it: the way of a frame is in `ingress` (from the wire) and `egress` (from a
//! VM), packet access in `packet`, map access in `maps`.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod egress;
mod ingress;
mod maps;
mod packet;

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use aya_log_ebpf::debug;
use vtep_common::Outcome;
use vtep_common::layout::SegmentId;

use crate::packet::Packet;

/// Where a frame ended: what is counted, and decides the action.
pub struct Verdict {
    pub outcome: Outcome,
    /// 0 while the frame was not yet known to belong to a segment.
    pub segment: SegmentId,
    /// Inner frame where it took the fast path, else the frame as seen.
    pub bytes: u32,
}

#[xdp]
pub fn vtep_ingress(ctx: XdpContext) -> u32 {
    let mut packet = Packet::new(&ctx);
    let verdict = ingress::forward(&mut packet);
    finish(&ctx, verdict)
}

#[xdp]
pub fn vtep_egress(ctx: XdpContext) -> u32 {
    let mut packet = Packet::new(&ctx);
    let verdict = egress::forward(&mut packet);
    finish(&ctx, verdict)
}

/// The policy in one place: fast frames were redirected, the few that Linux
/// would drop as well are dropped, all others are the kernel's, unchanged.
#[inline(always)]
fn finish(ctx: &XdpContext, verdict: Verdict) -> u32 {
    maps::count(&verdict);
    match verdict.outcome {
        Outcome::IngressLocal | Outcome::EgressRemote | Outcome::EgressLocal => {
            xdp_action::XDP_REDIRECT
        }
        Outcome::IngressDropOwnSource => {
            debug!(
                ctx,
                "segment {}: frame from our own address dropped", verdict.segment
            );
            xdp_action::XDP_DROP
        }
        _ => xdp_action::XDP_PASS,
    }
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
