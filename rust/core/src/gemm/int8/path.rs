//! Which instructions a product of codes uses.

use crate::gemm::path::on_top_of_avx512;
use crate::simd::{Simd, instruction_sets};

instruction_sets! {
    /// A set of instructions for products of 8-bit codes: those of [`Simd`], and products of bytes on top of AVX-512.
    ///
    /// All give the same bits.
    pub enum Path {
        /// Plain Rust, on every machine.
        Scalar = "scalar",
        /// x86-64 with AVX2.
        Avx2 = "avx2",
        /// x86-64 with AVX-512 F, BW and VL as well.
        Avx512 = "avx512",
        /// x86-64 with AVX512-VNNI as well.
        Vnni = "vnni",
        /// x86-64 with AMX-TILE and AMX-INT8 as well, on Linux.
        Amx = "amx",
    }
    for tests {
        /// The code of [`Self::Amx`] with tiles in plain Rust.
        Emulated = "emulated",
    }
}

on_top_of_avx512!(Path: Amx, Vnni);

impl Path {
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
}
