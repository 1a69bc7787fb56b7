//! Hostile bytes for decoders: random ones and damaged messages, with the memory that reading them takes.

#![expect(unsafe_code, reason = "an allocator that counts passes everything on to the system's")]

use crate::Rng;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// How many bytes of memory a decoder may take for each byte of its input. A set of numbers takes most: a node of a tree for
/// one byte each.
pub const MEMORY_PER_BYTE_MAX: usize = 256;
/// How many bytes of memory it may take besides: what serde sets aside at most for a collection that says it is large, and
/// errors with their texts.
pub const MEMORY_BASE_MAX: usize = 1 << 20;

/// How many messages of one kind are drawn.
const SAMPLES_OF_A_KIND: usize = 8;

thread_local! {
    static TAKEN: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counting for each thread. A test binary that measures memory has it as its `global_allocator`.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountingAllocator;

fn count(bytes: isize) {
    // A thread that ends has no counters any more.
    let _ = TAKEN.try_with(|taken| {
        taken.set(taken.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(taken.get())));
    });
}

// SAFETY: every call is passed on unchanged to the system's allocator.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new: usize) -> *mut u8 {
        count(new.cast_signed() - layout.size().cast_signed());
        // SAFETY: the caller's promise is the same.
        unsafe { System.realloc(ptr, layout, new) }
    }
}

/// How many bytes this thread has at most in use during the call, beyond those that it had before.
fn most_bytes<T>(call: impl FnOnce() -> T) -> (T, usize) {
    let before = TAKEN.get();
    MOST.set(before);
    let value = call();
    (value, usize::try_from(MOST.get() - before).unwrap_or(0))
}

/// How a decoder took what it was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdicts {
    /// Read.
    pub taken: u32,
    /// Refused.
    pub refused: u32,
}

/// Damages a message: a few bits and bytes changed, bytes gone or added, numbers made large, the end cut off, a part
/// doubled.
pub fn damage(bytes: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..1 + rng.below(3) {
        let at = rng.below(bytes.len() as u64 + 1) as usize;
        match rng.below(8) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, rng.next_u64() as u8),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            // The largest numbers of one, two, five and ten bytes.
            3 => {
                let bytes_of_it = rng.pick(&[1, 2, 5, 10]).copied().unwrap_or(1);
                let end = bytes.len().min(at + 1);
                let large = (0..bytes_of_it).map(|i| if i + 1 == bytes_of_it { 1 } else { 0xff });
                bytes.splice(at..end, large);
            }
            4 => {
                let part = bytes.get(at..).unwrap_or_default().to_vec();
                let end = bytes.len();
                bytes.splice(end..end, part.into_iter().take(64));
            }
            5 if at < bytes.len() => {
                let bit = 1 << rng.below(8);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= bit;
                }
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = rng.next_u64() as u8;
                }
            }
        }
    }
}

/// Messages of every kind, drawn: bytes behind `before` and the byte that names the kind, which the decoder takes with
/// nothing left over. Small numbers, so that lists are short.
///
/// # Panics
/// If there is none of a kind, or if there is one of the kind after the last: a new kind is to be counted.
pub fn samples(
    before: &[u8],
    kinds: core::ops::Range<u8>,
    mut read: impl FnMut(&[u8]) -> bool,
) -> Vec<Vec<u8>> {
    let mut rng = Rng::new(u64::from(kinds.end));
    let mut draw = |kind: u8, tries: u32| {
        let mut found: Vec<Vec<u8>> = Vec::new();
        for _ in 0..tries {
            let mut bytes = [before, &[kind]].concat();
            while bytes.len() < before.len() + 80 && !read(&bytes) {
                bytes.push(if rng.below(2) == 0 { 0 } else { rng.below(6) as u8 });
            }
            if bytes.len() < before.len() + 80 && !found.contains(&bytes) {
                found.push(bytes);
            }
            if SAMPLES_OF_A_KIND <= found.len() {
                break;
            }
        }
        found
    };
    let mut all = Vec::new();
    for kind in kinds.clone() {
        let mut found = draw(kind, 50);
        if found.is_empty() {
            found = draw(kind, 20_000);
        }
        assert!(!found.is_empty(), "nothing of kind {kind} was drawn");
        all.extend(found);
    }
    assert!(draw(kinds.end, 500).is_empty(), "there is a kind {}", kinds.end);
    all
}

/// Gives a decoder each sample whole, damaged `rounds` times, and as many random inputs behind the first 0 to 3 bytes of
/// one. The decoder says whether it took the bytes; a whole sample it must take.
///
/// # Panics
/// If the decoder does, if it refuses a sample, or if it takes more memory than [`MEMORY_BASE_MAX`] and
/// [`MEMORY_PER_BYTE_MAX`] allow; and if the binary does not count memory.
pub fn hostile(samples: &[Vec<u8>], rounds: u32, mut read: impl FnMut(&[u8]) -> bool) -> Verdicts {
    let (_, counted) = most_bytes(|| std::hint::black_box(vec![1_u8; 4_000]).len());
    assert!(4_000 <= counted, "the test binary does not count memory");
    let mut rng = Rng::new(samples.len() as u64);
    let mut verdicts = Verdicts::default();
    let mut give = |bytes: &[u8]| {
        let (taken, most) = most_bytes(|| read(bytes));
        let limit = MEMORY_BASE_MAX + MEMORY_PER_BYTE_MAX * bytes.len();
        assert!(most <= limit, "{most} bytes of memory for {} bytes: {bytes:?}", bytes.len());
        taken
    };
    for sample in samples {
        assert!(give(sample), "a real one is refused: {sample:?}");
        for round in 0..2 * rounds {
            let mut bytes = sample.clone();
            if round < rounds {
                damage(&mut bytes, &mut rng);
            } else {
                bytes.truncate(rng.below(4) as usize);
                bytes.extend((0..rng.below(300)).map(|_| 0_u8));
                let kept = bytes.len().min(3);
                let small = rng.below(2) == 0;
                for byte in bytes.iter_mut().skip(kept) {
                    *byte = if small { rng.below(6) as u8 } else { rng.next_u64() as u8 };
                }
            }
            if give(&bytes) {
                verdicts.taken += 1;
            } else {
                verdicts.refused += 1;
            }
        }
    }
    verdicts
}
