//! The AMX path: products of tiles, 16 rows of 64 bytes each in registers of their own.
//!
//! A tile of the first operand has 16 rows of 16 words, one of the second 16 words of 16 lanes, and one of sums 16 rows of
//! 16 lanes: both operands lie in memory as the tiles want them, so that none is laid out anew. Codes are looked up, and
//! few rows multiplied, with AVX-512.

use std::marker::PhantomData;

use super::direct::Direct;
use super::kernel::{Kernel, Rows, Sums};
use super::weight::Run;

/// Rows of a tile, words of a row and lanes of a word.
pub(super) const SIDE: usize = 16;

/// The eight tile registers of a thread. Numbers of registers are below 8; strides are in words.
pub(super) trait Tiles {
    /// While one of these lives, the thread's registers are tiles of 16 rows of 64 bytes.
    type Session;

    /// # Safety
    /// The machine has AMX, and the process may use it.
    unsafe fn session() -> Self::Session;

    /// # Safety
    /// A session lives, as for all of these.
    unsafe fn zero<const TILE: usize>();

    /// # Safety
    /// All 16 rows are readable.
    unsafe fn load<const TILE: usize>(from: *const u32, stride: usize);

    /// # Safety
    /// All 16 rows are writable.
    unsafe fn store<const TILE: usize>(to: *mut f32, stride: usize);

    /// `SUMS[row][lane] += A[row][word] · B[word][lane]`, words being pairs of bfloat16 and sums float32.
    ///
    /// # Safety
    /// Nothing else.
    unsafe fn multiply<const SUMS: usize, const A: usize, const B: usize>();
}

/// Products by tiles `T`, all else by `K`. A panel has `GROUPS` times 16 lanes, one or two.
pub(super) struct Tiled<K, T, const GROUPS: usize>(PhantomData<(K, T)>);

impl<K: Kernel, T: Tiles, const GROUPS: usize> Kernel for Tiled<K, T, GROUPS> {
    const DEPTH: usize = 2;
    const LANES: usize = GROUPS * SIDE;
    const ROWS: usize = 2 * SIDE;
    const ROW_STEP: usize = SIDE;
    const TILE_ROWS: usize = 2 * SIDE * GROUPS;
    const FEW_ROWS: usize = DIRECT_ROWS;
    const WORDS_TOGETHER: bool = true;

    type Session = T::Session;

    unsafe fn session() -> T::Session {
        // SAFETY: the caller's.
        unsafe { T::session() }
    }

    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums) {
        debug_assert!(rows.word_stride == 1 && rows.count <= Self::ROWS);
        // SAFETY: the caller's.
        unsafe {
            if rows.count > SIDE {
                product::<T, GROUPS, true>(words, lanes, rows, sums);
            } else {
                product::<T, GROUPS, false>(words, lanes, rows, sums);
            }
        }
    }

    unsafe fn decode(run: &Run<'_>, out: *mut u8) {
        // SAFETY: the caller's.
        unsafe { K::decode(run, out) }
    }

    unsafe fn decode_pair(first: &Run<'_>, second: &Run<'_>, out: *mut u32, stride: usize) -> bool {
        // SAFETY: the caller's; panels of `K` are as wide.
        K::LANES == Self::LANES && unsafe { K::decode_pair(first, second, out, stride) }
    }

    unsafe fn dot(words: usize, a: *const u32, b: *const u32) -> f32 {
        // SAFETY: the caller's.
        unsafe { K::dot(words, a, b) }
    }

    unsafe fn weave(first: &[u32], second: &[u32], out: &mut [u32]) {
        // SAFETY: the caller's.
        unsafe { K::weave(first, second, out) }
    }

    fn direct() -> Option<Direct> {
        K::direct().map(|direct| Direct { rows: direct.rows.min(DIRECT_ROWS), ..direct })
    }
}

/// With more rows of activations tiles are faster than products in other registers.
pub(super) const DIRECT_ROWS: usize = 2;

/// The block product of one or two tiles of rows. Sums are tiles 0 to 3, rows 4 and 5, lanes 6 and 7.
///
/// # Safety
/// As [`Kernel::product`].
#[inline(always)]
unsafe fn product<T: Tiles, const GROUPS: usize, const TWO: bool>(
    words: usize,
    lanes: *const u32,
    rows: Rows,
    sums: Sums,
) {
    let second = SIDE * sums.stride;
    // SAFETY: the caller's; of the last words, which are no whole tile, there are copies.
    unsafe {
        if sums.first {
            T::zero::<0>();
            T::zero::<1>();
            T::zero::<2>();
            T::zero::<3>();
        } else {
            T::load::<0>(sums.at.cast(), sums.stride);
            if GROUPS == 2 {
                T::load::<1>(sums.at.add(SIDE).cast(), sums.stride);
            }
            if TWO {
                T::load::<2>(sums.at.add(second).cast(), sums.stride);
            }
            if TWO && GROUPS == 2 {
                T::load::<3>(sums.at.add(second + SIDE).cast(), sums.stride);
            }
        }
        let whole = words - words % SIDE;
        for p in (0..whole).step_by(SIDE) {
            let row = rows.words.add(p);
            step::<T, GROUPS, TWO>(lanes.add(p * GROUPS * SIDE), row, rows.row_stride);
        }
        if whole < words {
            let mut last_lanes = [[0u32; 2 * SIDE]; SIDE];
            let mut last_rows = [[0u32; SIDE]; 2 * SIDE];
            for p in whole..words {
                let word = lanes.add(p * GROUPS * SIDE);
                let to = last_lanes.as_mut_ptr().cast::<u32>().add((p - whole) * GROUPS * SIDE);
                std::ptr::copy_nonoverlapping(word, to, GROUPS * SIDE);
            }
            for (i, row) in last_rows.iter_mut().enumerate().take(if TWO { 2 * SIDE } else { SIDE }) {
                let words_of_row = rows.words.add(i * rows.row_stride + whole);
                std::ptr::copy_nonoverlapping(words_of_row, row.as_mut_ptr(), words - whole);
            }
            step::<T, GROUPS, TWO>(last_lanes.as_ptr().cast(), last_rows.as_ptr().cast(), SIDE);
        }
        T::store::<0>(sums.at, sums.stride);
        if GROUPS == 2 {
            T::store::<1>(sums.at.add(SIDE), sums.stride);
        }
        if TWO {
            T::store::<2>(sums.at.add(second), sums.stride);
        }
        if TWO && GROUPS == 2 {
            T::store::<3>(sums.at.add(second + SIDE), sums.stride);
        }
    }
}

/// The products of 16 words.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn step<T: Tiles, const GROUPS: usize, const TWO: bool>(lanes: *const u32, rows: *const u32, row_stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        T::load::<6>(lanes, GROUPS * SIDE);
        T::load::<4>(rows, row_stride);
        T::multiply::<0, 4, 6>();
        if GROUPS == 2 {
            T::load::<7>(lanes.add(SIDE), GROUPS * SIDE);
            T::multiply::<1, 4, 7>();
        }
        if TWO {
            T::load::<5>(rows.add(SIDE * row_stride), row_stride);
            T::multiply::<2, 5, 6>();
        }
        if TWO && GROUPS == 2 {
            T::multiply::<3, 5, 7>();
        }
    }
}

/// The processor's own.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) mod hardware {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    use std::sync::OnceLock;

    use super::SIDE;

    /// AMX-TILE and AMX-BF16.
    pub(in super::super) struct Hardware;

    /// Whether the processor has both, and the system lets this process use them: its registers are so large that Linux
    /// wants to be asked (`ARCH_REQ_XCOMP_PERM`, since 5.16), for all threads of the process. From then on it asks for more
    /// room where a thread gives signals a stack of their own.
    pub(in super::super) fn is_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        /// Bits of EDX of leaf 7.
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        /// Linux: a request for the permission, and the number of the state component.
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        *AVAILABLE.get_or_init(|| {
            let needed = AMX_BF16 | AMX_TILE;
            // SAFETY: every x86-64 processor has the instruction.
            #[allow(
                unused_unsafe,
                reason = "these functions are safe in newer compilers than the oldest supported one"
            )]
            let found = unsafe { if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx } };
            if found & needed != needed {
                return false;
            }
            // SAFETY: it grants something, and takes nothing away; a system that does not know it says so.
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
        })
    }

    /// The shapes of the tiles, as the processor reads them.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIGURATION: Configuration = Configuration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// Gives the registers back when it goes: a thread that has tiles takes longer to be switched.
    pub(in super::super) struct Session(());

    impl Drop for Session {
        fn drop(&mut self) {
            // SAFETY: a session began, so there is AMX; nothing of this thread's is in the registers.
            unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
        }
    }

    // The compiler uses no tile registers: what one of these leaves there, the next one finds.
    impl super::Tiles for Hardware {
        type Session = Session;

        #[inline(always)]
        unsafe fn session() -> Session {
            // SAFETY: the caller's; a configuration of palette 1.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly, preserves_flags))
            }
            Session(())
        }

        #[inline(always)]
        unsafe fn zero<const TILE: usize>() {
            // SAFETY: the caller's.
            unsafe { asm!("tilezero tmm{}", const TILE, options(nostack, nomem, preserves_flags)) }
        }

        #[inline(always)]
        unsafe fn load<const TILE: usize>(from: *const u32, stride: usize) {
            // SAFETY: the caller's.
            unsafe {
                asm!("tileloadd tmm{}, [{} + {}]", const TILE, in(reg) from, in(reg) stride * size_of::<u32>(),
                    options(nostack, readonly, preserves_flags));
            }
        }

        #[inline(always)]
        unsafe fn store<const TILE: usize>(to: *mut f32, stride: usize) {
            // SAFETY: the caller's.
            unsafe {
                asm!("tilestored [{} + {}], tmm{}", in(reg) to, in(reg) stride * size_of::<f32>(), const TILE,
                    options(nostack, preserves_flags));
            }
        }

        #[inline(always)]
        unsafe fn multiply<const SUMS: usize, const A: usize, const B: usize>() {
            // SAFETY: the caller's.
            unsafe {
                asm!("tdpbf16ps tmm{}, tmm{}, tmm{}", const SUMS, const A, const B,
                    options(nostack, nomem, preserves_flags));
            }
        }
    }

    const _: () = assert!(size_of::<Configuration>() == 64 && SIDE == 16);
}
