//! Memory of one thread's part of a product, and memory that threads fill together.

use std::cell::RefCell;

/// A cache line. Vectors that straddle two are loaded at half the speed.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Words that begin on a cache line.
#[derive(Default)]
pub(super) struct Words(Vec<Line>);

impl Words {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        Self(bytemuck::allocation::zeroed_vec(len.div_ceil(16)))
    }

    /// Room for `len` words, whose contents may be anything.
    pub fn at_least(&mut self, len: usize) -> &mut [u32] {
        let lines = len.div_ceil(16);
        if self.0.len() < lines {
            self.0 = bytemuck::allocation::zeroed_vec(lines);
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    pub fn as_slice(&self) -> &[u32] {
        bytemuck::cast_slice(&self.0)
    }

    pub fn as_mut_slice(&mut self) -> &mut [u32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// What a thread keeps from one task to the next and from one product to the next: the size of a tile.
#[derive(Default)]
pub(super) struct Scratch {
    /// A part of the weight, decoded.
    pub tile: Words,
    /// Sums of a part of the result.
    pub sums: Words,
    /// Nested scales of two rows, expanded.
    pub scales: [Vec<f32>; 2],
}

impl Scratch {
    /// Lends this thread's.
    pub fn with<R>(work: impl FnOnce(&mut Self) -> R) -> R {
        thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
        SCRATCH.with_borrow_mut(work)
    }
}

/// Words that several threads write, each its own part.
pub(super) struct SharedWords<'a> {
    pointer: *mut u32,
    len: usize,
    memory: std::marker::PhantomData<&'a mut [u32]>,
}

// SAFETY: the memory is borrowed mutably for 'a, and `part` asks its callers for disjoint parts.
unsafe impl Sync for SharedWords<'_> {}

impl<'a> SharedWords<'a> {
    pub fn new(words: &'a mut Words) -> Self {
        let words = words.as_mut_slice();
        Self { pointer: words.as_mut_ptr(), len: words.len(), memory: std::marker::PhantomData }
    }

    /// # Safety
    /// No two parts that live at the same time overlap.
    #[allow(clippy::mut_from_ref, reason = "the caller sees to it that parts are disjoint")]
    pub unsafe fn part(&self, start: usize, len: usize) -> &mut [u32] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "a part beyond its memory");
        // SAFETY: within the memory, and nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), len) }
    }
}
