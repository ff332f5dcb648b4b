//! The compiled kernels, as `kernels/build_ptx.py` wrote them, and which of them a device takes.

use super::capability::Capability;

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
    /// Products of more rows, 64 at a time, in bfloat16.
    GemmBf16x64,
    /// Products of more rows, 128 at a time, in bfloat16.
    GemmBf16x128,
    /// Products of more rows, 192 at a time, in bfloat16.
    GemmBf16x192,
    /// Products of more rows, 256 at a time, in bfloat16.
    GemmBf16x256,
    /// Products of more rows, 64 at a time, in float16.
    GemmF16x64,
    /// Products of more rows, 128 at a time, in float16.
    GemmF16x128,
    /// Products of more rows, 192 at a time, in float16.
    GemmF16x192,
    /// Products of more rows, 256 at a time, in float16.
    GemmF16x256,
}

impl Module {
    /// Every module.
    pub const ALL: [Self; 21] = [
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
        Self::GemmBf16x64,
        Self::GemmBf16x128,
        Self::GemmBf16x192,
        Self::GemmBf16x256,
        Self::GemmF16x64,
        Self::GemmF16x128,
        Self::GemmF16x192,
        Self::GemmF16x256,
    ];

    /// Compiled once for each of these virtual architectures, ascending: PTX that ends with a zero byte.
    fn images(self) -> &'static [(Capability, &'static str)] {
        macro_rules! image {
            ($name:literal) => {
                concat!(include_str!(concat!("../../../kernels/ptx/", $name, ".ptx")), "\0")
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
            Self::GemmBf16x64 => &[(HOPPER, image!("gemm_bf16_64_90a"))],
            Self::GemmBf16x128 => &[(HOPPER, image!("gemm_bf16_128_90a"))],
            Self::GemmBf16x192 => &[(HOPPER, image!("gemm_bf16_192_90a"))],
            Self::GemmBf16x256 => &[(HOPPER, image!("gemm_bf16_256_90a"))],
            Self::GemmF16x64 => &[(HOPPER, image!("gemm_f16_64_90a"))],
            Self::GemmF16x128 => &[(HOPPER, image!("gemm_f16_128_90a"))],
            Self::GemmF16x192 => &[(HOPPER, image!("gemm_f16_192_90a"))],
            Self::GemmF16x256 => &[(HOPPER, image!("gemm_f16_256_90a"))],
        }
    }

    /// Whether its images are for their capability alone, not for later ones: those with warpgroup products are.
    fn is_exact(self) -> bool {
        matches!(
            self,
            Self::GemmBf16x64
                | Self::GemmBf16x128
                | Self::GemmBf16x192
                | Self::GemmBf16x256
                | Self::GemmF16x64
                | Self::GemmF16x128
                | Self::GemmF16x192
                | Self::GemmF16x256
        )
    }

    /// The best image for a device, or `None` when the module needs another one.
    pub fn image(self, device: Capability) -> Option<&'static str> {
        let suits = |needs: Capability| if self.is_exact() { needs == device } else { needs <= device };
        self.images().iter().rev().find(|(needs, _)| suits(*needs)).map(|(_, image)| *image)
    }
}
