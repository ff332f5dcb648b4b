//! Which instructions a product uses.

use super::compute::Compute;
use crate::simd::{Simd, instruction_sets};

/// What paths of products have in common: they are those of [`Simd`], and some on top of AVX-512, fastest first here.
macro_rules! on_top_of_avx512 {
    ($path:ident: $($fast:ident),+) => {
        impl $path {
            const ARGUMENT: &'static str = "path";

            /// The path in use: the fastest of this machine. `HALFBYTE_SIMD=avx512` means exactly the instructions of that
            /// name, so without those on top of them. Decided at the first call.
            ///
            /// # Errors
            /// [`Error::Argument`](crate::error::Error::Argument) when `HALFBYTE_SIMD` holds something else than the name of
            /// an available path of [`Simd`].
            pub fn active() -> $crate::error::Result<Self> {
                let simd = Simd::active()?;
                // Looked at one by one: the system is asked for AMX only where it may be used.
                let mut fast = [$(Self::$fast),+].into_iter().filter(|path| path.is_available());
                Ok(match simd {
                    Simd::Scalar => Self::Scalar,
                    Simd::Avx2 => Self::Avx2,
                    Simd::Avx512 if Simd::is_forced() => Self::Avx512,
                    Simd::Avx512 => fast.next().unwrap_or(Self::Avx512),
                })
            }

            /// The instructions for all but the products.
            pub(crate) const fn simd(self) -> Simd {
                match self {
                    Self::Scalar => Simd::Scalar,
                    Self::Avx2 => Simd::Avx2,
                    Self::Avx512 $(| Self::$fast)+ => Simd::Avx512,
                    #[cfg(test)]
                    Self::Emulated => Simd::Scalar,
                }
            }
        }
    };
}
pub(super) use on_top_of_avx512;

instruction_sets! {
    /// A set of instructions for products: those of [`Simd`], and products of bfloat16 pairs on top of AVX-512.
    ///
    /// Paths differ in the last bits, unlike those of [`crate::quant`]: see the module's description for what each
    /// rounds.
    pub enum Path {
        /// Plain Rust, on every machine.
        Scalar = "scalar",
        /// x86-64 with AVX2, FMA and F16C.
        Avx2 = "avx2",
        /// x86-64 with AVX-512 F, BW and VL as well.
        Avx512 = "avx512",
        /// x86-64 with AVX512-BF16 as well.
        Avx512Bf16 = "avx512bf16",
        /// x86-64 with AMX-TILE and AMX-BF16 as well, on Linux.
        Amx = "amx",
    }
    for tests {
        /// The code of [`Self::Amx`] with tiles and look-ups in plain Rust.
        Emulated = "emulated",
    }
}

on_top_of_avx512!(Path: Amx, Avx512Bf16);

impl Path {
    /// Whether this machine has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar | Self::Avx2 | Self::Avx512 => self.simd().is_available(),
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

    /// Whether products in `compute` round weights to bfloat16 on this path.
    pub const fn rounds_weights(self, compute: Compute) -> bool {
        #[cfg(test)]
        if matches!((self, compute), (Self::Emulated, Compute::Bf16)) {
            return true;
        }
        matches!((self, compute), (Self::Avx512Bf16 | Self::Amx, Compute::Bf16))
    }
}
