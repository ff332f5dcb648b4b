//! The compiled kernels, as `kernels/build_ptx.py` wrote them, and which of them a device takes.

use super::driver::Capability;

/// One source file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Module {
    /// 4-bit codes to values.
    Dequantize,
    /// Values to 4-bit codes.
    Quantize,
    /// Scales to 8-bit codes.
    Nested,
    /// 8-bit codes to scales.
    Expand,
    /// Rows of a 4-bit table.
    Embedding,
    /// 8-bit codes to values.
    Dequantize8Bit,
    /// Values to 8-bit codes.
    Quantize8Bit,
    /// Rows to 8 bits and back.
    Rows,
    /// Products of any shape.
    Product,
    /// Products of a vector and codes of any table.
    Gemv,
    /// Products of few rows with the matrix units.
    Decode,
    /// The same with much shared memory.
    DecodeRing,
    /// And with many columns.
    DecodeRingLong,
}

impl Module {
    /// Every module.
    pub const ALL: [Self; 13] = [
        Self::Dequantize,
        Self::Quantize,
        Self::Nested,
        Self::Expand,
        Self::Embedding,
        Self::Dequantize8Bit,
        Self::Quantize8Bit,
        Self::Rows,
        Self::Product,
        Self::Gemv,
        Self::Decode,
        Self::DecodeRing,
        Self::DecodeRingLong,
    ];

    /// Compiled once for each of these virtual architectures, ascending: PTX that ends with a zero byte.
    fn images(self) -> &'static [(Capability, &'static str)] {
        macro_rules! image {
            ($name:literal) => {
                concat!(include_str!(concat!("../../kernels/ptx/", $name, ".ptx")), "\0")
            };
        }
        const TURING: Capability = Capability(7, 5);
        const AMPERE: Capability = Capability(8, 0);
        const HOPPER: Capability = Capability(9, 0);
        match self {
            Self::Dequantize => &[(TURING, image!("dequantize_75")), (AMPERE, image!("dequantize_80"))],
            Self::Quantize => &[(TURING, image!("quantize_75")), (HOPPER, image!("quantize_90"))],
            Self::Nested => &[(TURING, image!("nested_75")), (HOPPER, image!("nested_90"))],
            Self::Expand => &[(TURING, image!("expand_75"))],
            Self::Embedding => &[(TURING, image!("embedding_75")), (AMPERE, image!("embedding_80"))],
            Self::Dequantize8Bit => &[(TURING, image!("dequantize_8bit_75")), (AMPERE, image!("dequantize_8bit_80"))],
            Self::Quantize8Bit => &[(TURING, image!("quantize_8bit_75"))],
            Self::Rows => &[(TURING, image!("rows_75")), (AMPERE, image!("rows_80"))],
            Self::Product => &[(TURING, image!("product_75"))],
            Self::Gemv => &[(TURING, image!("gemv_75"))],
            Self::Decode => &[(AMPERE, image!("decode_80"))],
            Self::DecodeRing => &[(HOPPER, image!("decode_ring_90"))],
            Self::DecodeRingLong => &[(HOPPER, image!("decode_ring_long_90"))],
        }
    }

    /// The best image for a device, or `None` when the module needs a newer one.
    pub fn image(self, device: Capability) -> Option<&'static str> {
        self.images().iter().rev().find(|(needs, _)| *needs <= device).map(|(_, image)| *image)
    }
}
