//! Blockwise quantization to 4 bits and back: the arithmetic of [`halfbyte::quant::blockwise4`], bit for bit.

use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::Result;
use halfbyte::geometry::{BlockSize, NESTED_BLOCK_SIZE, packed_len};

use super::driver::{Device, Kernel, Stream};
use super::launch::{Variant, parameters};
use super::memory::{Memory, Scales, block_shift};
use super::ptx::Module;
use super::quantize_absmax::{QuantizedAbsmax, quantize_absmax_with_sums, write_sums};

// Of kernels/dequantize.cu.
const DEQUANTIZE_THREADS: u32 = 256;
const DEQUANTIZE_TILE: u64 = 8192;

// Of kernels/quantize.cu.
const QUANTIZE_THREADS: u32 = 512;
const QUANTIZE_TILE: u64 = 16384;

/// What `quant_type` is to a kernel.
pub(super) fn quant_type_parameter(quant_type: QuantType) -> u32 {
    match quant_type {
        QuantType::Nf4 => 0,
        QuantType::Fp4 => 1,
    }
}

fn dequantize_kernel(dtype: DType, nested: bool, variant: Variant) -> Kernel {
    let name = match (variant, dtype, nested) {
        (Variant::Fast, DType::Bf16, false) => "dequantize_bf16",
        (Variant::Fast, DType::Bf16, true) => "dequantize_bf16_nested",
        (Variant::Fast, DType::F16, false) => "dequantize_f16",
        (Variant::Fast, DType::F16, true) => "dequantize_f16_nested",
        (Variant::Fast, _, false) => "dequantize_f32",
        (Variant::Fast, _, true) => "dequantize_f32_nested",
        (Variant::Reference, DType::Bf16, false) => "dequantize_reference_bf16",
        (Variant::Reference, DType::Bf16, true) => "dequantize_reference_bf16_nested",
        (Variant::Reference, DType::F16, false) => "dequantize_reference_f16",
        (Variant::Reference, DType::F16, true) => "dequantize_reference_f16_nested",
        (Variant::Reference, _, false) => "dequantize_reference_f32",
        (Variant::Reference, _, true) => "dequantize_reference_f32_nested",
    };
    Kernel { module: Module::Dequantize, name, threads: DEQUANTIZE_THREADS, large_shared: false }
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
        Variant::Reference => (n as u64).div_ceil(u64::from(DEQUANTIZE_THREADS)),
    };
    let (packed, out, n) = (packed.address(), out.address(), n as i64);
    let (shift, quant_type) = (block_shift(blocksize), quant_type_parameter(quant_type));
    let parameters = parameters![packed, scales_parameter, out, n, shift, quant_type];
    // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
    unsafe { device.launch(stream, &kernel, blocks, 0, parameters) }
}

fn quantize_kernel(dtype: DType, quant_type: QuantType, variant: Variant) -> Kernel {
    let name = match (variant, dtype, quant_type) {
        (Variant::Fast, DType::Bf16, QuantType::Nf4) => "quantize_bf16_nf4",
        (Variant::Fast, DType::Bf16, QuantType::Fp4) => "quantize_bf16_fp4",
        (Variant::Fast, DType::F16, QuantType::Nf4) => "quantize_f16_nf4",
        (Variant::Fast, DType::F16, QuantType::Fp4) => "quantize_f16_fp4",
        (Variant::Fast, _, QuantType::Nf4) => "quantize_f32_nf4",
        (Variant::Fast, _, QuantType::Fp4) => "quantize_f32_fp4",
        (Variant::Reference, DType::Bf16, QuantType::Nf4) => "quantize_reference_bf16_nf4",
        (Variant::Reference, DType::Bf16, QuantType::Fp4) => "quantize_reference_bf16_fp4",
        (Variant::Reference, DType::F16, QuantType::Nf4) => "quantize_reference_f16_nf4",
        (Variant::Reference, DType::F16, QuantType::Fp4) => "quantize_reference_f16_fp4",
        (Variant::Reference, _, QuantType::Nf4) => "quantize_reference_f32_nf4",
        (Variant::Reference, _, QuantType::Fp4) => "quantize_reference_f32_fp4",
    };
    Kernel { module: Module::Quantize, name, threads: QUANTIZE_THREADS, large_shared: false }
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
                device.launch_early(stream, &kernel, (values as u64).div_ceil(QUANTIZE_TILE), 0, parameters)
            }
            Variant::Reference => {
                let blocks = (blocksize.absmax_len(values) as u64).div_ceil(u64::from(QUANTIZE_THREADS));
                device.launch(stream, &kernel, blocks, 0, parameters![input, packed, absmax, n, shift])
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
        device.launch_early(stream, &kernel, grid, 0, parameters![input, packed, scales, sums, n, shift])?;
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
