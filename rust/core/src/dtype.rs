//! The types of elements: their names in torch and numpy, their sizes, and the floats that are quantized.

use bytemuck::Pod;
use half::{bf16, f16};

/// The type of the elements of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// Packed codes, and codes of 8 bits.
    U8,
    /// Codes of 8-bit rows.
    I8,
    /// Indices.
    I32,
    /// Indices.
    I64,
    /// IEEE half precision.
    F16,
    /// The upper half of a float32.
    Bf16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
}

impl DType {
    /// Every type.
    pub const ALL: [Self; 8] = [Self::U8, Self::I8, Self::I32, Self::I64, Self::F16, Self::Bf16, Self::F32, Self::F64];

    /// The types that are quantized and dequantized.
    pub const FLOATS: [Self; 3] = [Self::F16, Self::Bf16, Self::F32];

    /// The name in torch and numpy.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::U8 => "uint8",
            Self::I8 => "int8",
            Self::I32 => "int32",
            Self::I64 => "int64",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
        }
    }

    /// Bytes of an element, and its alignment.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::I32 | Self::F32 => 4,
            Self::I64 | Self::F64 => 8,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// The bits of the nearest bfloat16, ties to even; NaN stays NaN. Without a branch, so that loops of it are fast.
#[inline]
pub(crate) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let quiet = bits | 0x0040_0000;
    ((if value.is_nan() { quiet } else { rounded }) >> 16) as u16
}

/// The value of bfloat16 bits.
#[inline]
pub(crate) fn f32_of(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A value of an unquantized tensor: `f32`, [`half::f16`] or [`half::bf16`], and nothing else.
pub trait Element: sealed::Sealed + Pod + Default + PartialEq + std::fmt::Debug + Send + Sync {
    /// The type.
    const DTYPE: DType;

    /// The same value as float32; exact for every type.
    fn to_f32(self) -> f32;

    /// The nearest value of this type, ties to even; too large becomes infinite.
    fn from_f32(value: f32) -> Self;

    /// Whether the value is neither NaN nor infinite.
    fn is_finite(self) -> bool;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

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
    const DTYPE: DType = DType::F16;

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
    const DTYPE: DType = DType::Bf16;

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
