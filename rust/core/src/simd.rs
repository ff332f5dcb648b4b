//! Which instructions to use: found out once, at run time.

use std::fmt;
use std::sync::OnceLock;

use crate::error::{Error, Result};

/// The environment variable that forces a path: `scalar`, `avx2` or `avx512`.
pub const SIMD_VARIABLE: &str = "HALFBYTE_SIMD";

/// A set of instructions that the arithmetic can be done with. All give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Simd {
    /// Plain Rust, on every machine.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW and VL as well.
    Avx512,
}

impl Simd {
    /// Every path, slowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// The name: `scalar`, `avx2` or `avx512`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this machine has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && {
                    is_x86_feature_detected!("f16c")
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available() && is_x86_feature_detected!("avx512f") && {
                    is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl")
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The paths of this machine, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|simd| simd.is_available())
    }

    /// The path in use: the fastest of this machine, or what `HALFBYTE_SIMD` says. Decided at the first call.
    ///
    /// # Errors
    /// [`Error::Argument`] when `HALFBYTE_SIMD` holds something else than the name of an available path.
    pub fn active() -> Result<Self> {
        static ACTIVE: OnceLock<std::result::Result<Simd, String>> = OnceLock::new();
        let active = ACTIVE.get_or_init(|| match std::env::var_os(SIMD_VARIABLE) {
            None => Ok(Self::available().last().unwrap_or(Self::Scalar)),
            Some(value) => {
                let value = value.to_string_lossy().into_owned();
                Self::available().find(|simd| simd.as_str() == value).ok_or(value)
            }
        });
        active.as_ref().copied().map_err(|value| Self::unavailable(format!("{value:?}")))
    }

    /// Checks that the machine has the instructions.
    pub(crate) fn checked(self) -> Result<Self> {
        if self.is_available() { Ok(self) } else { Err(Self::unavailable(format!("{:?}", self.as_str()))) }
    }

    fn unavailable(value: String) -> Error {
        let legal: Vec<_> = Self::available().map(|simd| format!("{:?}", simd.as_str())).collect();
        Error::argument(SIMD_VARIABLE, value, format!("one that this machine has ({})", legal.join(", ")))
    }
}

impl fmt::Display for Simd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
