//! Products with the vector units of x86-64.

#[cfg(target_os = "linux")]
pub mod amx;
pub mod avx2;
pub mod avx512;
pub mod direct_avx2;
pub mod direct_avx512;
