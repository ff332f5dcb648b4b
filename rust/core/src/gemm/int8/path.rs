//! Which instructions a product of codes uses.

use std::fmt;
use std::sync::OnceLock;

use crate::error::{Error, Result};
use crate::simd::{SIMD_VARIABLE, Simd};

/// A set of instructions for products of 8-bit codes: those of [`Simd`], and products of bytes on top of AVX-512.
///
/// All give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// Plain Rust, on every machine.
    Scalar,
    /// x86-64 with AVX2.
    Avx2,
    /// x86-64 with AVX-512 F, BW and VL as well.
    Avx512,
    /// x86-64 with AVX512-VNNI as well.
    Vnni,
    /// x86-64 with AMX-TILE and AMX-INT8 as well, on Linux.
    Amx,
    /// The code of [`Self::Amx`] with tiles in plain Rust.
    #[cfg(test)]
    Emulated,
}

impl Path {
    /// Every path, slowest first.
    pub const ALL: &[Self] = &[
        Self::Scalar,
        Self::Avx2,
        Self::Avx512,
        Self::Vnni,
        Self::Amx,
        #[cfg(test)]
        Self::Emulated,
    ];

    /// The name: `scalar`, `avx2`, `avx512`, `vnni` or `amx`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Vnni => "vnni",
            Self::Amx => "amx",
            #[cfg(test)]
            Self::Emulated => "emulated",
        }
    }

    /// Whether this machine has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar | Self::Avx2 | Self::Avx512 => self.simd().is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => Simd::Avx512.is_available() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Vnni => false,
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx => Self::Vnni.is_available() && crate::gemm::x86::amx::multiplies_bytes(),
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
    /// name, so without those for bytes. Decided at the first call.
    ///
    /// # Errors
    /// [`Error::Argument`] when `HALFBYTE_SIMD` holds something else than the name of an available path.
    pub fn active() -> Result<Self> {
        static FOUND: OnceLock<Path> = OnceLock::new();
        let simd = Simd::active()?;
        let find = || {
            if std::env::var_os(SIMD_VARIABLE).is_none()
                && let Some(path) = [Self::Amx, Self::Vnni].into_iter().find(|path| path.is_available())
            {
                return path;
            }
            match simd {
                Simd::Scalar => Self::Scalar,
                Simd::Avx2 => Self::Avx2,
                Simd::Avx512 => Self::Avx512,
            }
        };
        Ok(*FOUND.get_or_init(find))
    }

    /// Checks that the machine has the instructions.
    pub(super) fn checked(self) -> Result<Self> {
        if self.is_available() {
            return Ok(self);
        }
        let legal: Vec<_> = Self::available().map(|path| format!("{:?}", path.as_str())).collect();
        let expected = format!("one that this machine has: {}", legal.join(", "));
        Err(Error::argument("path", format!("{:?}", self.as_str()), expected))
    }

    /// The instructions for all but the products.
    pub(super) const fn simd(self) -> Simd {
        match self {
            Self::Scalar => Simd::Scalar,
            Self::Avx2 => Simd::Avx2,
            Self::Avx512 | Self::Vnni | Self::Amx => Simd::Avx512,
            #[cfg(test)]
            Self::Emulated => Simd::Scalar,
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
