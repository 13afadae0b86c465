//! An array map in this process's memory (BPF_F_MMAPABLE): a store is seen by
//! the programs at once, with no system call. Used by `dataplane` only.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::Pod;

/// `T` is a multiple of 8 bytes and aligned to them, so that elements lie without
/// gaps (the kernel rounds them up to 8).
pub struct MmapArray<T> {
    words: NonNull<AtomicU64>,
    entries: u32,
    element: PhantomData<T>,
}

// SAFETY: shared memory that is only touched through atomics.
unsafe impl<T> Send for MmapArray<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for MmapArray<T> {}

impl<T: Pod> MmapArray<T> {
    const WORDS: usize = {
        assert!(align_of::<T>().is_multiple_of(8) && size_of::<T>().is_multiple_of(8));
        size_of::<T>() / 8
    };

    /// `map` must hold `entries` values of `T` (checked when it was opened).
    pub fn new(map: BorrowedFd<'_>, entries: u32) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::len_bytes(entries),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            words: NonNull::new(address.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?,
            entries,
            element: PhantomData,
        })
    }

    const fn len_bytes(entries: u32) -> usize {
        entries as usize * Self::WORDS * 8
    }

    /// First element.
    pub const fn base(&self) -> NonNull<T> {
        self.words.cast()
    }

    pub const fn entries(&self) -> u32 {
        self.entries
    }

    fn element(&self, index: u32) -> Option<&[AtomicU64]> {
        if index >= self.entries {
            return None;
        }
        // SAFETY: inside the mapping, which lives as long as `self`; the other
        // side writes whole words at most.
        Some(unsafe {
            let first = self.words.as_ptr().add(index as usize * Self::WORDS);
            std::slice::from_raw_parts(first, Self::WORDS)
        })
    }

    pub fn load(&self, index: u32) -> Option<T> {
        let words = self.element(index)?;
        let mut value = MaybeUninit::<T>::uninit();
        let target = value.as_mut_ptr().cast::<u64>();
        for (i, word) in words.iter().enumerate() {
            // SAFETY: `T` is `WORDS` aligned words.
            unsafe { target.add(i).write(word.load(Ordering::Acquire)) };
        }
        // SAFETY: all words were written; any bits are a valid `Pod`.
        Some(unsafe { value.assume_init() })
    }

    /// Word by word, each after everything stored before. A value of one word
    /// appears at once; a longer one must not be in use. False: no such element.
    #[must_use]
    pub fn store(&self, index: u32, value: &T) -> bool {
        let Some(words) = self.element(index) else {
            return false;
        };
        let source = std::ptr::from_ref(value).cast::<u64>();
        for (i, word) in words.iter().enumerate() {
            // SAFETY: `T` is `WORDS` aligned, initialised words.
            word.store(unsafe { source.add(i).read() }, Ordering::Release);
        }
        true
    }
}

impl<T> Drop for MmapArray<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; elements have no gaps.
        unsafe {
            libc::munmap(
                self.words.as_ptr().cast(),
                self.entries as usize * size_of::<T>(),
            )
        };
    }
}
