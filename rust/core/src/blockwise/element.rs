//! The floating-point types that are quantized and dequantized.

use half::{bf16, f16};

/// What the SIMD paths need of a type. Nobody outside can name it, so [`Element`] is sealed.
#[cfg(target_arch = "x86_64")]
pub trait Paths: super::avx2::Avx2Element + super::avx512::Avx512Element {}
/// Nobody outside can name it, so [`Element`] is sealed.
#[cfg(not(target_arch = "x86_64"))]
pub trait Paths {}

impl Paths for f32 {}
impl Paths for f16 {}
impl Paths for bf16 {}

/// A value of an unquantized tensor: `f32`, [`half::f16`] or [`half::bf16`].
pub trait Element: Paths + Copy + Default + PartialEq + std::fmt::Debug + Send + Sync + 'static {
    /// The type's name in torch and numpy.
    const DTYPE: &'static str;

    /// The same value as float32; exact for every type.
    fn to_f32(self) -> f32;

    /// The nearest value of this type, ties to even; too large becomes infinite.
    fn from_f32(value: f32) -> Self;

    /// Whether the value is neither NaN nor infinite.
    fn is_finite(self) -> bool;
}

impl Element for f32 {
    const DTYPE: &'static str = "float32";

    #[inline]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline]
    fn is_finite(self) -> bool {
        f32::is_finite(self)
    }
}

impl Element for f16 {
    const DTYPE: &'static str = "float16";

    #[inline]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }

    #[inline]
    fn is_finite(self) -> bool {
        f16::is_finite(self)
    }
}

impl Element for bf16 {
    const DTYPE: &'static str = "bfloat16";

    #[inline]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }

    #[inline]
    fn is_finite(self) -> bool {
        bf16::is_finite(self)
    }
}
