//! `cargo xtask demo`: the main job on real frames. A router, three hosts in
//! subnets of their own, a VM that moves between two of them while a client on
//! the third talks to it. Everything is made, shown, measured and removed here.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use vtep_tests::daemon::Daemon;
use vtep_tests::frames::{Socket, ethernet, ipv4_udp, rarp, vxlan_with_checksum};
use vtep_tests::generator::{Generator, Plan, object};
use vtep_tests::lab::{Lab, Options, UPLINK};
use vtep_tests::streams::{Session, Stream, pin_to_cpu};
use vtep_tests::{complain, wait_until};

const UDP_PORT: u16 = 4789;
/// One measurement.
const TIME: Duration = Duration::from_millis(700);
/// Hosts: the VM's first, the VM's second, the client's.
const OLD: usize = 0;
const NEW: usize = 1;
const THIRD: usize = 2;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn main() {
    catch_signals();
    let start = Instant::now();
    match demo() {
        Ok(()) => say(&format!(
            "Done in {:.0} s; namespaces, programs and maps are removed.",
            start.elapsed().as_secs_f32()
        )),
        Err(error) => {
            complain(&format!("demo: {error:#}"));
            std::process::exit(1);
        }
    }
}

/// Ctrl-C ends the demo at its next step, so that everything is cleaned up.
fn catch_signals() {
    // SAFETY: a signal set on the stack; the mask is inherited by all threads.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    };
    std::thread::spawn(move || {
        let mut signal = 0;
        // SAFETY: waits for one of the blocked signals.
        while unsafe { libc::sigwait(&set, &mut signal) } == 0 {
            complain("\ndemo: interrupted, cleaning up");
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    });
}

/// Nobody reads any more: stop, and clean up.
fn say(text: &str) {
    if writeln!(std::io::stdout(), "{text}").is_err() {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
}

fn step(text: &str) -> Result<()> {
    ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
    say(&format!("\n== {text}"));
    Ok(())
}

fn indented(text: &str) {
    for line in text.lines() {
        say(&format!("   {line}"));
    }
}

fn demo() -> Result<()> {
    step("A router, three hosts in three subnets, kernel bridge + vxlan (VNI 100) on each")?;
    let mut lab = Lab::with(&Options {
        hosts: 3,
        ..Options::default()
    })?;
    let client = lab.add_vm(THIRD)?;
    let vm = lab.add_vm(OLD)?;
    for (number, host) in lab.hosts.iter().enumerate() {
        say(&format!(
            "   host {}: {}, gateway {}",
            number + 1,
            host.address,
            host.gateway
        ));
    }
    say(&format!(
        "   VM {} ({}) on host 1, client {} on host 3",
        lab.vms[vm].address, lab.vms[vm].mac, lab.vms[client].address
    ));
    lab.vms[client]
        .netns
        .run(&format!("ping -c 2 -i 0.2 -W 2 {}", lab.vms[vm].address))?;

    step("64-byte frames through the kernel, one core")?;
    let kernel = measure(&lab, client, vm)?;

    step("The accelerator starts on the running hosts: `vtep run`")?;
    let port = lab.vms[vm].port.clone();
    let daemons: Vec<Daemon> = [
        vec![port.as_str()],
        vec![port.as_str()],
        vec![lab.vms[client].port.as_str()],
    ]
    .iter()
    .zip(&lab.hosts)
    .map(|(ports, host)| Daemon::start(host, ports))
    .collect::<Result<_>>()?;
    for daemon in [&daemons[OLD], &daemons[THIRD]] {
        daemon.wait_accelerated(lab.vms[vm].mac)?;
        daemon.wait_accelerated(lab.vms[client].mac)?;
    }
    say("   host 3, `vtep status`:");
    indented(&daemons[THIRD].cli(&["status"])?);

    step("The same frames, accelerated")?;
    let fast = measure(&lab, client, vm)?;
    say(&format!(
        "   client's host (encapsulates): {:.2} times the kernel",
        fast[0] / kernel[0]
    ));
    say(&format!(
        "   VM's host (decapsulates):     {:.2} times the kernel",
        fast[1] / kernel[1]
    ));

    move_vm(&lab, &daemons, client, vm)?;
    step("Cleaning up")
}

/// Frames/s of the client's host towards the wire and of the VM's host from the
/// wire.
fn measure(lab: &Lab, client: usize, vm: usize) -> Result<[f64; 2]> {
    let (client, vm) = (&lab.vms[client], &lab.vms[vm]);
    let packet = ipv4_udp(
        client.address.octets(),
        vm.address.octets(),
        [1000, 2000],
        &[0x5a; 18],
    );
    let inner = ethernet(client.mac, vm.mac, 0x0800, &packet);
    let (third, old) = (&lab.hosts[THIRD], &lab.hosts[OLD]);
    let outer = vxlan_with_checksum(
        [old.gateway_mac, old.uplink_mac],
        [third.ipv4()?, old.ipv4()?],
        UDP_PORT,
        vtep_tests::lab::VNI,
        &inner,
    );
    let mut rates = [0.0; 2];
    let ways = [
        (
            "host 3, VM to wire",
            &client.netns,
            "eth0",
            &lab.router,
            "to3",
            inner.clone(),
        ),
        (
            "host 1, wire to VM",
            &lab.router,
            "to1",
            &vm.netns,
            "eth0",
            outer,
        ),
    ];
    for (rate, (what, from, inject, to, sink, frame)) in rates.iter_mut().zip(ways) {
        let ifindex = from.ifindex(inject)?;
        let mut generator = Generator::load(&object())?;
        from.enter(|| {
            generator.set_plan(Plan {
                ifindex,
                ..Plan::default()
            })
        })?;
        to.enter(|| generator.attach_sink(sink))?;
        let measured = std::thread::scope(|scope| {
            let run = scope.spawn(|| {
                pin_to_cpu(0);
                generator.run(&frame, TIME)
            });
            run.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        ensure!(
            measured.received_frames * 1000 >= measured.sent_frames * 999,
            "{what}: {} of {} frames arrived",
            measured.received_frames,
            measured.sent_frames
        );
        *rate = measured.rate();
        say(&format!("   {what}: {:.3} million frames/s", *rate / 1e6));
    }
    Ok(rates)
}

fn move_vm(lab: &Lab, daemons: &[Daemon], client: usize, vm: usize) -> Result<()> {
    step("A TCP session from the client to the VM; then the VM's NIC moves from host 1 to host 2")?;
    let mac = lab.vms[vm].mac;
    let session = Session::start(&lab.vms[client], &lab.vms[vm])?;
    let stream = Stream::start(&lab.vms[client], &lab.vms[vm], 10_000)?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
    say("   host 3, `vtep fdb show` before:");
    indented(&daemons[THIRD].cli(&["fdb", "show"])?);
    let before = session.round_trips();

    let announce = lab.vms[vm].netns.enter(|| Socket::open("eth0"))?;
    let start = Instant::now();
    lab.move_vm(vm, OLD, NEW)?;
    let moved = start.elapsed();
    // As a hypervisor does it: again and again, since the new bridge port may not forward yet.
    let remote = lab.hosts[NEW].address.to_string();
    wait_until(Duration::from_secs(5), "host 3 sends to host 2", || {
        announce.send(&rarp(mac))?;
        let row = daemons[THIRD].fdb(mac)?;
        Ok(row.is_some_and(|row| row["location"]["remote"] == remote.as_str()))
    })?;
    say("   host 3, `vtep fdb show` after:");
    indented(&daemons[THIRD].cli(&["fdb", "show"])?);
    daemons[NEW].wait_accelerated(mac).context("host 2")?;
    let later = session.round_trips();
    wait_until(Duration::from_secs(10), "the session goes on", || {
        Ok(session.round_trips() > later + 100)
    })?;

    let fast = daemons[NEW].frames("ingress-local")?;
    std::thread::sleep(Duration::from_millis(300));
    let fast = daemons[NEW].frames("ingress-local")? - fast;
    let (stream, session) = (stream.finish()?, session.finish()?);
    if session.round_trips <= before {
        bail!("the TCP session did not live on");
    }
    say(&format!(
        "   TCP session alive: {} round trips, {} of them before the move, longest wait {:.0} ms",
        session.round_trips,
        before,
        session.longest_gap.as_secs_f64() * 1e3
    ));
    say(&format!(
        "   10,000 frames/s stream: interrupted for {:.1} ms, {} of {} frames lost; moving the device itself took {:.1} ms",
        stream.longest_gap.as_secs_f64() * 1e3,
        stream.lost_frames,
        stream.sent_frames,
        moved.as_secs_f64() * 1e3
    ));
    say(&format!(
        "   host 2 took {fast} frames of the last 300 ms on the fast path ({UPLINK} -> {})",
        lab.vms[vm].port
    ));
    Ok(())
}
