//! Blockwise quantization to 4 bits and back: the arithmetic of [`halfbyte::quant::blockwise4`], bit for bit.

use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::Result;
use halfbyte::geometry::{BlockSize, NESTED_BLOCK_SIZE, packed_len};

use super::driver::{Device, Stream};
use super::kernels::{self, Kernel};
use super::launch::{Variant, parameters};
use super::memory::{Memory, Scales, block_shift};
use super::quantize_absmax::{QuantizedAbsmax, quantize_absmax_with_sums, write_sums};

const DEQUANTIZE_TILE: u64 = kernels::dequantize_blockwise4::TILE as u64;
const QUANTIZE_TILE: u64 = kernels::quantize_blockwise4::TILE as u64;

/// What `quant_type` is to a kernel.
pub(super) fn quant_type_parameter(quant_type: QuantType) -> u32 {
    match quant_type {
        QuantType::Nf4 => 0,
        QuantType::Fp4 => 1,
    }
}

fn dequantize_kernel(dtype: DType, nested: bool, variant: Variant) -> &'static Kernel {
    match (variant, dtype, nested) {
        (Variant::Fast, DType::Bf16, false) => &kernels::DEQUANTIZE_BLOCKWISE4_BF16,
        (Variant::Fast, DType::Bf16, true) => &kernels::DEQUANTIZE_BLOCKWISE4_BF16_NESTED,
        (Variant::Fast, DType::F16, false) => &kernels::DEQUANTIZE_BLOCKWISE4_F16,
        (Variant::Fast, DType::F16, true) => &kernels::DEQUANTIZE_BLOCKWISE4_F16_NESTED,
        (Variant::Fast, _, false) => &kernels::DEQUANTIZE_BLOCKWISE4_F32,
        (Variant::Fast, _, true) => &kernels::DEQUANTIZE_BLOCKWISE4_F32_NESTED,
        (Variant::Reference, DType::Bf16, false) => &kernels::DEQUANTIZE_BLOCKWISE4_REFERENCE_BF16,
        (Variant::Reference, DType::Bf16, true) => &kernels::DEQUANTIZE_BLOCKWISE4_REFERENCE_BF16_NESTED,
        (Variant::Reference, DType::F16, false) => &kernels::DEQUANTIZE_BLOCKWISE4_REFERENCE_F16,
        (Variant::Reference, DType::F16, true) => &kernels::DEQUANTIZE_BLOCKWISE4_REFERENCE_F16_NESTED,
        (Variant::Reference, _, false) => &kernels::DEQUANTIZE_BLOCKWISE4_REFERENCE_F32,
        (Variant::Reference, _, true) => &kernels::DEQUANTIZE_BLOCKWISE4_REFERENCE_F32_NESTED,
    }
}

/// Reads `out.count()` values back.
///
/// # Errors
/// [`halfbyte::Error::Argument`] for a dtype or a length that does not fit; [`halfbyte::Error::Cuda`] when the launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernel has ended on `stream`, and is not written by others; `out`
/// is neither read nor written by others, and shares nothing with the inputs. The stream is of this device.
#[allow(clippy::too_many_arguments)] // what the kernel needs, each with a type of its own
pub unsafe fn dequantize(
    device: &Device,
    stream: Stream,
    packed: &Memory,
    scales: &Scales,
    out: &Memory,
    quant_type: QuantType,
    blocksize: BlockSize,
    variant: Variant,
) -> Result<()> {
    let n = out.of(&DType::FLOATS)?.count();
    packed.of(&[DType::U8])?.long(packed_len(n), "two codes to a byte")?;
    let scales_parameter = scales.parameter(n, blocksize)?;
    let kernel = dequantize_kernel(out.dtype(), scales.is_nested(), variant);
    let blocks = match variant {
        Variant::Fast => (n as u64).div_ceil(DEQUANTIZE_TILE),
        Variant::Reference => (n as u64).div_ceil(u64::from(kernel.threads)),
    };
    let (packed, out, n) = (packed.address(), out.address(), n as i64);
    let (shift, quant_type) = (block_shift(blocksize), quant_type_parameter(quant_type));
    let parameters = parameters![packed, scales_parameter, out, n, shift, quant_type];
    // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
    unsafe { device.launch(stream, kernel, blocks, 0, parameters) }
}

fn quantize_kernel(dtype: DType, quant_type: QuantType, variant: Variant) -> &'static Kernel {
    match (variant, dtype, quant_type) {
        (Variant::Fast, DType::Bf16, QuantType::Nf4) => &kernels::QUANTIZE_BLOCKWISE4_BF16_NF4,
        (Variant::Fast, DType::Bf16, QuantType::Fp4) => &kernels::QUANTIZE_BLOCKWISE4_BF16_FP4,
        (Variant::Fast, DType::F16, QuantType::Nf4) => &kernels::QUANTIZE_BLOCKWISE4_F16_NF4,
        (Variant::Fast, DType::F16, QuantType::Fp4) => &kernels::QUANTIZE_BLOCKWISE4_F16_FP4,
        (Variant::Fast, _, QuantType::Nf4) => &kernels::QUANTIZE_BLOCKWISE4_F32_NF4,
        (Variant::Fast, _, QuantType::Fp4) => &kernels::QUANTIZE_BLOCKWISE4_F32_FP4,
        (Variant::Reference, DType::Bf16, QuantType::Nf4) => &kernels::QUANTIZE_BLOCKWISE4_REFERENCE_BF16_NF4,
        (Variant::Reference, DType::Bf16, QuantType::Fp4) => &kernels::QUANTIZE_BLOCKWISE4_REFERENCE_BF16_FP4,
        (Variant::Reference, DType::F16, QuantType::Nf4) => &kernels::QUANTIZE_BLOCKWISE4_REFERENCE_F16_NF4,
        (Variant::Reference, DType::F16, QuantType::Fp4) => &kernels::QUANTIZE_BLOCKWISE4_REFERENCE_F16_FP4,
        (Variant::Reference, _, QuantType::Nf4) => &kernels::QUANTIZE_BLOCKWISE4_REFERENCE_F32_NF4,
        (Variant::Reference, _, QuantType::Fp4) => &kernels::QUANTIZE_BLOCKWISE4_REFERENCE_F32_FP4,
    }
}

/// Quantizes `input` to 4 bits.
///
/// # Errors
/// As [`dequantize`].
///
/// # Safety
/// As [`dequantize`], the outputs being `packed` and `absmax`.
#[allow(clippy::too_many_arguments)] // what the kernel needs, each with a type of its own
pub unsafe fn quantize(
    device: &Device,
    stream: Stream,
    input: &Memory,
    packed: &Memory,
    absmax: &Memory,
    quant_type: QuantType,
    blocksize: BlockSize,
    variant: Variant,
) -> Result<()> {
    check_quantize(input, packed, absmax, blocksize)?;
    let (n, values) = (input.count() as i64, input.count());
    let kernel = quantize_kernel(input.dtype(), quant_type, variant);
    let (input, packed, absmax, shift) = (input.address(), packed.address(), absmax.address(), block_shift(blocksize));
    // SAFETY: the kernel's parameters in its order; lengths were checked, the fast kernel waits for those before it, the
    // rest is the caller's.
    unsafe {
        match variant {
            Variant::Fast => {
                let no_sums = 0u64;
                let parameters = parameters![input, packed, absmax, no_sums, n, shift];
                device.launch_early(stream, kernel, (values as u64).div_ceil(QUANTIZE_TILE), 0, parameters)
            }
            Variant::Reference => {
                let blocks = (blocksize.absmax_len(values) as u64).div_ceil(u64::from(kernel.threads));
                device.launch(stream, kernel, blocks, 0, parameters![input, packed, absmax, n, shift])
            }
        }
    }
}

/// Quantizes `input` to 4 bits and its scales to 8 bits: [`quantize`] and [`super::quantize_absmax`], in two launches for blocks
/// of 32 and 64 values, and three for larger ones. `absmax` is left with the float32 scales.
///
/// # Errors
/// As [`dequantize`].
///
/// # Safety
/// As [`dequantize`], the outputs being `packed`, `absmax` and the memory of `out`.
#[allow(clippy::too_many_arguments)] // what the kernels need, each with a type of its own
pub unsafe fn quantize_nested(
    device: &Device,
    stream: Stream,
    input: &Memory,
    packed: &Memory,
    absmax: &Memory,
    out: &QuantizedAbsmax,
    quant_type: QuantType,
    blocksize: BlockSize,
) -> Result<()> {
    check_quantize(input, packed, absmax, blocksize)?;
    out.check(absmax.count())?;
    let (grid, n) = ((input.count() as u64).div_ceil(QUANTIZE_TILE), input.count() as i64);
    let kernel = quantize_kernel(input.dtype(), quant_type, Variant::Fast);
    // Each tile has whole groups of scales, and writes their sums.
    let with_sums = blocksize.get() * NESTED_BLOCK_SIZE <= QUANTIZE_TILE as usize;
    let sums = if with_sums { out.workspace.address() } else { 0 };
    let (input, packed, scales, shift) = (input.address(), packed.address(), absmax.address(), block_shift(blocksize));
    // SAFETY: the kernels' parameters in their order; lengths were checked, those that start early wait, the rest is the
    // caller's.
    unsafe {
        device.launch_early(stream, kernel, grid, 0, parameters![input, packed, scales, sums, n, shift])?;
        if !with_sums {
            write_sums(device, stream, absmax, out)?;
        }
        quantize_absmax_with_sums(device, stream, absmax, out)
    }
}

fn check_quantize(input: &Memory, packed: &Memory, absmax: &Memory, blocksize: BlockSize) -> Result<()> {
    let n = input.of(&DType::FLOATS)?.count();
    packed.of(&[DType::U8])?.long(packed_len(n), "two codes to a byte")?;
    absmax.of(&[DType::F32])?.long(blocksize.absmax_len(n), "one scale per block")?;
    Ok(())
}
