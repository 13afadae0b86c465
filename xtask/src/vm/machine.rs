//! One run of QEMU: boots, hands on what the guest prints, ends with the guest,
//! the time limit or Ctrl-C, whichever comes first.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::run::interrupted;

/// A guest that says nothing for so long hangs. Booting takes 5 to 20 seconds,
/// most on a busy machine.
const SILENCE: Duration = Duration::from_secs(180);
const MEMORY_MIB: u32 = 2048;
/// What costs time and is not looked at here is off, and so are watchdogs, which
/// would only say how busy this host is.
const KERNEL_OPTIONS: &str = "console=ttyS0 loglevel=5 panic=-1 mitigations=off nokaslr \
                              init_on_alloc=0 apparmor=0 audit=0 nowatchdog \
                              rcupdate.rcu_cpu_stall_suppress=1";
/// What init says last.
const STATUS: &str = "vm: exit status ";
/// Lines of the kernel's log that are shown where it matters.
const TAIL_LINES: usize = 30;
/// What a kernel says when the fault is its own, or our doing to it.
const FAULTS: &[&str] = &["BUG:", "kernel BUG", "Oops", "Kernel panic", "WARNING:"];

pub struct Machine {
    /// Of several; init takes its share of the work by it.
    pub number: usize,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// Where the kernel's messages go.
    pub log: PathBuf,
    /// Time for everything.
    pub limit: Duration,
}

enum End {
    Silent,
    Late,
    Interrupted,
}

impl Machine {
    /// Every line of the guest's work goes to `show`; its exit status.
    pub fn run(&self, mut show: impl FnMut(&str)) -> Result<i32> {
        let (reader, writer) = std::io::pipe()?;
        let mut command = self.qemu();
        command.stdout(writer.try_clone()?).stderr(writer);
        let mut child = command.spawn().context("cannot start QEMU")?;
        // It holds the writing ends; the pipe has to end with QEMU.
        drop(command);
        let process = child.id() as libc::pid_t;
        let heard = Mutex::new(Instant::now());
        let over = AtomicBool::new(false);
        let (status, end) = std::thread::scope(|scope| {
            let watch = scope.spawn(|| self.watch(process, &heard, &over));
            let mut status = None;
            for bytes in BufReader::new(reader).split(b'\n') {
                let Ok(bytes) = bytes else { break };
                if let Ok(mut heard) = heard.lock() {
                    *heard = Instant::now();
                }
                let text = String::from_utf8_lossy(&bytes);
                let line = text.trim_end_matches('\r');
                match line.strip_prefix(STATUS) {
                    Some(number) => status = number.trim().parse().ok(),
                    None => show(line),
                }
            }
            over.store(true, Ordering::Relaxed);
            (status, watch.join().unwrap_or(None))
        });
        child.wait()?;
        let faults = self.faults();
        match end {
            Some(End::Interrupted) => bail!("interrupted"),
            Some(End::Late) => bail!("not done within {:?}{faults}", self.limit),
            Some(End::Silent) => bail!("no word from it for {SILENCE:?}{faults}"),
            None => {}
        }
        let status = status.with_context(|| format!("it ended in the middle{}", self.tail()))?;
        if !faults.is_empty() {
            bail!("its kernel complains{faults}");
        }
        Ok(status)
    }

    fn qemu(&self) -> Command {
        let mut qemu = Command::new("qemu-system-x86_64");
        // Emulated even where /dev/kvm opens: inside other virtual machines that often does not
        // work, and then ends in a guest that hangs. Without cmpxchg16b, which older QEMUs emulate
        // wrongly: kernels crash while booting.
        qemu.args(["-accel", "tcg", "-machine", "pc", "-cpu", "qemu64,-cx16"])
            // One CPU is nearly twice as fast as two, which mostly wait for each other.
            .args(["-smp", "1", "-m", &MEMORY_MIB.to_string()])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-serial"])
            .arg(format!("file:{}", self.log.display()))
            .args(["-serial", "stdio", "-kernel"])
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            .arg("-append")
            .arg(format!("{KERNEL_OPTIONS} vtep.number={}", self.number))
            .stdin(Stdio::null())
            // Ctrl-C comes to us, and we end it.
            .process_group(0);
        // SAFETY: prctl with these arguments is a plain system call.
        unsafe {
            qemu.pre_exec(|| {
                // Not to be left alone when we are killed.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        qemu
    }

    /// Until `over`; kills QEMU when it is time, and says why.
    fn watch(
        &self,
        process: libc::pid_t,
        heard: &Mutex<Instant>,
        over: &AtomicBool,
    ) -> Option<End> {
        let start = Instant::now();
        let silent = || heard.lock().is_ok_and(|heard| heard.elapsed() > SILENCE);
        while !over.load(Ordering::Relaxed) {
            let end = match () {
                () if interrupted() => Some(End::Interrupted),
                () if start.elapsed() > self.limit => Some(End::Late),
                () if silent() => Some(End::Silent),
                () => None,
            };
            if end.is_some() {
                // SAFETY: a child that is not waited for before this thread has ended.
                unsafe { libc::kill(process, libc::SIGKILL) };
                return end;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        None
    }

    fn messages(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// The log from the first fault on; nothing if there is none.
    fn faults(&self) -> String {
        let text = self.messages();
        let lines: Vec<&str> = text.lines().collect();
        let fault = |line: &&str| FAULTS.iter().any(|word| line.contains(word));
        let first = lines.iter().position(fault);
        first.map_or_else(String::new, |first| {
            let end = lines.len().min(first + TAIL_LINES);
            self.excerpt(&lines[first..end])
        })
    }

    fn tail(&self) -> String {
        let text = self.messages();
        let lines: Vec<&str> = text.lines().collect();
        self.excerpt(&lines[lines.len().saturating_sub(TAIL_LINES)..])
    }

    fn excerpt(&self, lines: &[&str]) -> String {
        format!(
            "; from {}:\n{}",
            relative(&self.log).display(),
            lines.join("\n")
        )
    }
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix(crate::run::workspace()).unwrap_or(path)
}
