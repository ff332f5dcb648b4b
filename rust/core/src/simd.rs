//! Which instructions to use: found out once, at run time.

use std::sync::OnceLock;

use crate::error::Result;

/// The environment variable that forces a path: `scalar`, `avx2` or `avx512`.
pub const SIMD_VARIABLE: &str = "HALFBYTE_SIMD";

/// Makes an enumeration of sets of instructions, slowest first, each with its name. Beside it stand `is_available`, and
/// `ARGUMENT`: what errors call that which asks for one.
macro_rules! instruction_sets {
    (
        $(#[$about:meta])*
        pub enum $set:ident {
            $($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+
        }
        $(for tests {
            $(#[doc = $test_doc:literal])+ $test:ident = $test_name:literal,
        })?
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $set {
            $($(#[doc = $doc])+ $variant,)+
            $(#[cfg(test)] $(#[doc = $test_doc])+ $test,)?
        }

        impl $set {
            /// Every path, slowest first.
            pub const ALL: &[Self] = &[$(Self::$variant,)+ $(#[cfg(test)] Self::$test,)?];

            #[doc = concat!("The name, one of:" $(, " `", $name, "`")+)]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                    $(#[cfg(test)] Self::$test => $test_name,)?
                }
            }

            /// The paths of this machine, slowest first.
            pub fn available() -> impl Iterator<Item = Self> {
                Self::ALL.iter().copied().filter(|path| path.is_available())
            }

            /// Checks that the machine has the instructions.
            pub(crate) fn checked(self) -> $crate::error::Result<Self> {
                if self.is_available() { Ok(self) } else { Err(Self::unavailable(self.as_str())) }
            }

            fn unavailable(name: &str) -> $crate::error::Error {
                let legal: Vec<_> = Self::available().map(|path| format!("{:?}", path.as_str())).collect();
                let expected = format!("one that this machine has ({})", legal.join(", "));
                $crate::error::Error::argument(Self::ARGUMENT, format!("{name:?}"), expected)
            }
        }

        impl std::fmt::Display for $set {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}
pub(crate) use instruction_sets;

instruction_sets! {
    /// A set of instructions that the arithmetic can be done with. All give the same bits.
    pub enum Simd {
        /// Plain Rust, on every machine.
        Scalar = "scalar",
        /// x86-64 with AVX2, FMA and F16C.
        Avx2 = "avx2",
        /// x86-64 with AVX-512 F, BW and VL as well.
        Avx512 = "avx512",
    }
}

impl Simd {
    const ARGUMENT: &'static str = SIMD_VARIABLE;

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

    /// The path in use: the fastest of this machine, or what `HALFBYTE_SIMD` says. Decided at the first call.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::error::Error::Argument) when `HALFBYTE_SIMD` holds something else than the name of an available path.
    pub fn active() -> Result<Self> {
        static ACTIVE: OnceLock<std::result::Result<Simd, String>> = OnceLock::new();
        let active = ACTIVE.get_or_init(|| match std::env::var_os(SIMD_VARIABLE) {
            None => Ok(Self::available().last().unwrap_or(Self::Scalar)),
            Some(value) => {
                let value = value.to_string_lossy().into_owned();
                Self::available().find(|simd| simd.as_str() == value).ok_or(value)
            }
        });
        active.as_ref().copied().map_err(|value| Self::unavailable(value))
    }

    /// Whether `HALFBYTE_SIMD` says exactly which instructions to use, so without those that products have on top of them.
    /// Decided at the first call.
    pub(crate) fn is_forced() -> bool {
        static FORCED: OnceLock<bool> = OnceLock::new();
        *FORCED.get_or_init(|| std::env::var_os(SIMD_VARIABLE).is_some())
    }
}
