//! The AMX paths' tiles: the processor's own. Codes are looked up, and few rows multiplied, with AVX-512.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use crate::gemm::tiles::{ByteTiles, SIDE, Tiles};

/// AMX-TILE and AMX-BF16, or AMX-INT8.
pub struct Hardware;

/// Bits of EDX of leaf 7.
const AMX_BF16: u32 = 1 << 22;
const AMX_TILE: u32 = 1 << 24;
const AMX_INT8: u32 = 1 << 25;

/// Whether tiles can be used, and multiply pairs of bfloat16.
pub fn is_available() -> bool {
    features() & AMX_BF16 != 0
}

/// Whether tiles can be used, and multiply bytes.
pub fn multiplies_bytes() -> bool {
    features() & AMX_INT8 != 0
}

/// What the processor has of AMX, if the system lets this process use it: its registers are so large that Linux wants to
/// be asked (`ARCH_REQ_XCOMP_PERM`, since 5.16), for all threads of the process. From then on it asks for more room where
/// a thread gives signals a stack of their own.
fn features() -> u32 {
    static FEATURES: OnceLock<u32> = OnceLock::new();
    /// Linux: a request for the permission, and the number of the state component.
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    *FEATURES.get_or_init(|| {
        // SAFETY: every x86-64 processor has the instruction.
        #[allow(unused_unsafe, reason = "these functions are safe in newer compilers than the oldest supported one")]
        let found = unsafe { if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx } };
        if found & AMX_TILE == 0 {
            return 0;
        }
        // SAFETY: it grants something, and takes nothing away; a system that does not know it says so.
        let granted = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 };
        if granted { found } else { 0 }
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
pub struct Session(());

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: a session began, so there is AMX; nothing of this thread's is in the registers.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
    }
}

// The compiler uses no tile registers: what one of these leaves there, the next one finds.
impl Tiles for Hardware {
    type Session = Session;

    #[inline(always)]
    unsafe fn session() -> Session {
        // SAFETY: the caller's; a configuration of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly, preserves_flags)) }
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

impl ByteTiles for Hardware {
    #[inline(always)]
    unsafe fn multiply_bytes<const SUMS: usize, const A: usize, const B: usize>() {
        // SAFETY: the caller's.
        unsafe {
            asm!("tdpbssd tmm{}, tmm{}, tmm{}", const SUMS, const A, const B,
                options(nostack, nomem, preserves_flags));
        }
    }
}

const _: () = assert!(size_of::<Configuration>() == 64 && SIDE == 16);
