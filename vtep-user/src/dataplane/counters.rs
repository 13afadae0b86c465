//! `STATS`: frames and bytes by segment and outcome, summed over the CPUs in
//! few system calls. Used by `dataplane` only.

use std::os::fd::{AsFd as _, OwnedFd};

use aya::maps::{Map, MapData, PerCpuArray};
use vtep_common::Outcome;
use vtep_common::layout::{Counter, SegmentId};

use super::{DataplaneError, clone_fd, map_error, sys, typed};

const SLOTS: usize = Outcome::SLOTS as usize;

/// Segments per system call.
const CHUNK: usize = 8;

/// Counters of one segment, by outcome number.
pub type SegmentCounters = [Counter; SLOTS];

pub struct Counters {
    map: PerCpuArray<MapData, Counter>,
    fd: OwnedFd,
    cpus: usize,
    /// Segments whose counters may be other than zero: numbers below this.
    used: usize,
}

impl Counters {
    /// Counters of adopted maps go on; `segments`: highest number there can be.
    pub fn new(map: Map, segments: u32) -> Result<Self, DataplaneError> {
        let mut this = Self {
            fd: clone_fd(&map)?,
            map: typed(map)?,
            cpus: aya::util::nr_cpus().map_err(|(path, e)| DataplaneError::kernel(path, e))?,
            used: segments as usize + 1,
        };
        this.used = this
            .read()?
            .iter()
            .rposition(|row| row.iter().any(|counter| counter.frames > 0))
            .map_or(1, |last| last + 1);
        Ok(this)
    }

    /// The programs may count for this segment from now on.
    pub fn note(&mut self, segment: SegmentId) {
        self.used = self.used.max(usize::from(segment) + 1);
    }

    /// Indexed by segment number.
    pub fn read(&self) -> Result<Vec<SegmentCounters>, DataplaneError> {
        let mut rows = vec![[Counter::default(); SLOTS]; self.used];
        let mut values = vec![Counter::default(); CHUNK.min(self.used) * SLOTS * self.cpus];
        for (chunk, rows) in rows.chunks_mut(CHUNK).enumerate() {
            let values = &mut values[..rows.len() * SLOTS * self.cpus];
            let start = (chunk * CHUNK * SLOTS) as u32;
            let batched = sys::read_percpu_array(self.fd.as_fd(), start, self.cpus, values)
                .map_err(|e| DataplaneError::kernel("read STATS", e))?;
            for (i, counter) in rows.as_flattened_mut().iter_mut().enumerate() {
                *counter = if batched {
                    sum(&values[i * self.cpus..][..self.cpus])
                } else {
                    let index = start + i as u32;
                    let per_cpu = self.map.get(&index, 0);
                    sum(&per_cpu.map_err(|e| map_error("read STATS", e))?)
                };
            }
        }
        Ok(rows)
    }
}

fn sum(per_cpu: &[Counter]) -> Counter {
    per_cpu.iter().fold(Counter::default(), |sum, c| Counter {
        frames: sum.frames.wrapping_add(c.frames),
        bytes: sum.bytes.wrapping_add(c.bytes),
    })
}
