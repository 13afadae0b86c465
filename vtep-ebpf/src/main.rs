//! The programs: XDP and tcx, on uplinks and on ports. This file only turns an
//! outcome into an action and counts it: the way of a frame is in `ingress`
//! (from the wire) and `egress` (from a VM), what differs between the hooks in
//! `xdp` and `skb`, packet access in `packet`, map access in `maps`.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod egress;
mod ingress;
mod maps;
mod packet;
mod skb;
mod xdp;

use aya_ebpf::bindings::{
    tcx_action_base::{TCX_DROP, TCX_NEXT},
    xdp_action,
};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use aya_log_ebpf::debug;
use vtep_common::Outcome;
use vtep_common::layout::SegmentId;

use crate::skb::SkbPacket;
use crate::xdp::XdpPacket;

/// Where a frame ended: what is counted, and decides the action.
pub struct Verdict {
    pub outcome: Outcome,
    /// 0 while the frame was not yet known to belong to a segment.
    pub segment: SegmentId,
    /// Inner frame where it took the fast path, else the frame as seen.
    pub bytes: u32,
}

/// On an uplink: from the wire.
#[xdp(frags)]
pub fn vtep_ingress(ctx: XdpContext) -> u32 {
    let verdict = ingress::forward(&mut XdpPacket::new(&ctx));
    finish(&ctx, &verdict)
}

/// On a port whose owner sends plain frames.
#[xdp]
pub fn vtep_egress(ctx: XdpContext) -> u32 {
    let (verdict, _) = egress::forward(&mut XdpPacket::new(&ctx));
    finish(&ctx, &verdict)
}

/// The policy in one place: fast frames were redirected or are on their way
/// through the stack, the few that Linux would drop as well are dropped, all
/// others are the kernel's, unchanged.
#[inline(always)]
fn finish(ctx: &XdpContext, verdict: &Verdict) -> u32 {
    maps::count(verdict);
    match verdict.outcome {
        Outcome::IngressLocal | Outcome::EgressRemote | Outcome::EgressLocal => {
            xdp_action::XDP_REDIRECT
        }
        Outcome::IngressDropOwnSource | Outcome::IngressDropUnknownPeer => {
            debug!(
                ctx,
                "segment {}: frame from our own address or a stranger dropped", verdict.segment
            );
            xdp_action::XDP_DROP
        }
        _ => xdp_action::XDP_PASS,
    }
}

/// On a port whose owner uses offloads.
#[classifier]
pub fn vtep_port(ctx: TcContext) -> i32 {
    let mut packet = SkbPacket::new(&ctx);
    packet.pull_headers();
    let (verdict, target) = egress::forward(&mut packet);
    maps::count(&verdict);
    match verdict.outcome {
        Outcome::EgressRemote | Outcome::EgressLocal => redirect(target),
        Outcome::EgressDropNoMemory => TCX_DROP,
        _ => TCX_NEXT,
    }
}

/// On an uplink: the second half of the way of frames that XDP has stripped,
/// counted and marked. All others are somebody else's.
#[classifier]
pub fn vtep_uplink(ctx: TcContext) -> i32 {
    // One after the other: most frames have no mark, and pay for nothing else.
    let Some(mark) = SkbPacket::new(&ctx).mark() else {
        return TCX_NEXT;
    };
    match maps::config() {
        Some(config) if mark.cookie == config.cookie => redirect(mark.ifindex),
        _ => TCX_NEXT,
    }
}

/// To the sending side of a device.
#[inline(always)]
fn redirect(ifindex: u32) -> i32 {
    // SAFETY: only notes the device; what it returns is the action to return.
    unsafe { bpf_redirect(ifindex, 0) as i32 }
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
