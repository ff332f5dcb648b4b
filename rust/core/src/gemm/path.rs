//! Which instructions a product uses.

use std::fmt;
use std::sync::OnceLock;

use super::compute::Compute;
use crate::error::{Error, Result};
use crate::simd::{SIMD_VARIABLE, Simd};

/// A set of instructions for products: those of [`Simd`], and products of bfloat16 pairs on top of AVX-512.
///
/// Paths differ in the last bits, unlike those of [`crate::quant`]: see the module's description for what each
/// rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// Plain Rust, on every machine.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW and VL as well.
    Avx512,
    /// x86-64 with AVX512-BF16 as well.
    Avx512Bf16,
    /// x86-64 with AMX-TILE and AMX-BF16 as well, on Linux.
    Amx,
    /// The code of [`Self::Amx`] with tiles and look-ups in plain Rust.
    #[cfg(test)]
    Emulated,
}

impl Path {
    /// Every path, slowest first.
    pub const ALL: &[Self] = &[
        Self::Scalar,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Amx,
        #[cfg(test)]
        Self::Emulated,
    ];

    /// The name: `scalar`, `avx2`, `avx512`, `avx512bf16` or `amx`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
            #[cfg(test)]
            Self::Emulated => "emulated",
        }
    }

    /// Whether this machine has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => Simd::Scalar.is_available(),
            Self::Avx2 => Simd::Avx2.is_available(),
            Self::Avx512 => Simd::Avx512.is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Simd::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512Bf16 => false,
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx => Self::Avx512Bf16.is_available() && super::x86::amx::is_available(),
            #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
            Self::Amx => false,
            #[cfg(test)]
            Self::Emulated => true,
        }
    }

    /// The paths of this machine, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(|path| path.is_available())
    }

    /// The path in use: the fastest of this machine. `HALFBYTE_SIMD=avx512` means exactly the instructions of that
    /// name, so without those for bfloat16. Decided at the first call.
    ///
    /// # Errors
    /// [`Error::Argument`] when `HALFBYTE_SIMD` holds something else than the name of an available path.
    pub fn active() -> Result<Self> {
        static FORCED: OnceLock<bool> = OnceLock::new();
        let simd = Simd::active()?;
        let forced = *FORCED.get_or_init(|| std::env::var_os(SIMD_VARIABLE).is_some());
        Ok(match simd {
            Simd::Scalar => Self::Scalar,
            Simd::Avx2 => Self::Avx2,
            Simd::Avx512 if !forced && Self::Amx.is_available() => Self::Amx,
            Simd::Avx512 if !forced && Self::Avx512Bf16.is_available() => Self::Avx512Bf16,
            Simd::Avx512 => Self::Avx512,
        })
    }

    /// Checks that the machine has the instructions.
    pub(super) fn checked(self) -> Result<Self> {
        if self.is_available() {
            return Ok(self);
        }
        let legal: Vec<_> = Self::available().map(|path| format!("{:?}", path.as_str())).collect();
        let expected = format!("one that this machine has ({})", legal.join(", "));
        Err(Error::argument("path", format!("{:?}", self.as_str()), expected))
    }

    /// Whether products in `compute` round weights to bfloat16 on this path.
    pub const fn rounds_weights(self, compute: Compute) -> bool {
        #[cfg(test)]
        if matches!((self, compute), (Self::Emulated, Compute::Bf16)) {
            return true;
        }
        matches!((self, compute), (Self::Avx512Bf16 | Self::Amx, Compute::Bf16))
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
