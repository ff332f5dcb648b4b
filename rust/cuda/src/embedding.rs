//! Rows of a 4-bit table: what [`halfbyte::quant::blockwise4`] dequantizes them to, bit for bit.

use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::{BlockSize, element_count, packed_len};

use super::blockwise4::quant_type_parameter;
use super::driver::{Device, Stream};
use super::kernels::{self, Kernel};
use super::launch::{Variant, parameters};
use super::memory::{Memory, Scales, block_shift};

const TILE: u64 = kernels::embedding_4bit::TILE as u64;
/// The most columns: the kernel has 32 bits for a place in a row and a tile behind it.
const MOST_COLUMNS: usize = 1 << 30;

/// A quantized matrix `[rows][columns]`, row-major; its blocks run on from row to row.
#[derive(Debug, Clone, Copy)]
pub struct Table<'a> {
    /// The codes, uint8.
    pub packed: &'a Memory,
    /// The scales.
    pub scales: &'a Scales,
    /// How many rows there are to choose from.
    pub rows: usize,
    /// Values of a row.
    pub columns: usize,
    /// The codebook.
    pub quant_type: QuantType,
    /// Values that share a scale.
    pub blocksize: BlockSize,
}

/// What kernels take for the indices.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct IndicesParameter {
    address: u64,
    size: u32,
    rows: i64,
}

fn kernel(dtype: DType, nested: bool, variant: Variant) -> &'static Kernel {
    match (variant, dtype, nested) {
        (Variant::Fast, DType::Bf16, false) => &kernels::EMBEDDING_4BIT_BF16,
        (Variant::Fast, DType::Bf16, true) => &kernels::EMBEDDING_4BIT_BF16_NESTED,
        (Variant::Fast, DType::F16, false) => &kernels::EMBEDDING_4BIT_F16,
        (Variant::Fast, DType::F16, true) => &kernels::EMBEDDING_4BIT_F16_NESTED,
        (Variant::Fast, _, false) => &kernels::EMBEDDING_4BIT_F32,
        (Variant::Fast, _, true) => &kernels::EMBEDDING_4BIT_F32_NESTED,
        (Variant::Reference, DType::Bf16, false) => &kernels::EMBEDDING_4BIT_REFERENCE_BF16,
        (Variant::Reference, DType::Bf16, true) => &kernels::EMBEDDING_4BIT_REFERENCE_BF16_NESTED,
        (Variant::Reference, DType::F16, false) => &kernels::EMBEDDING_4BIT_REFERENCE_F16,
        (Variant::Reference, DType::F16, true) => &kernels::EMBEDDING_4BIT_REFERENCE_F16_NESTED,
        (Variant::Reference, _, false) => &kernels::EMBEDDING_4BIT_REFERENCE_F32,
        (Variant::Reference, _, true) => &kernels::EMBEDDING_4BIT_REFERENCE_F32_NESTED,
    }
}

/// Writes row `indices[i]` of the table to row `i` of `out`, `[indices.count()][columns]`.
///
/// Of an index below 0, or not below `rows`, the row is NaN: the device does not wait to be asked about its indices, and
/// a kernel that failed would take the process's context with it.
///
/// # Errors
/// [`Error::Argument`] for a dtype or a length that does not fit, and for more than 2^30 columns; [`Error::Cuda`] when the
/// launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernel has ended on `stream`, and is not written by others; `out`
/// is neither read nor written by others, and shares nothing with the inputs. The stream is of this device.
pub unsafe fn embedding(
    device: &Device,
    stream: Stream,
    indices: &Memory,
    table: &Table<'_>,
    out: &Memory,
    variant: Variant,
) -> Result<()> {
    let Table { packed, scales, rows, columns, quant_type, blocksize } = *table;
    let size = |argument, rows: usize| {
        element_count(&[rows, columns])
            .filter(|&count| i64::try_from(count).is_ok())
            .ok_or_else(|| Error::argument(argument, format!("{rows} x {columns}"), "less than 2^63 elements"))
    };
    if columns > MOST_COLUMNS {
        return Err(Error::argument("columns", columns, format!("at most {MOST_COLUMNS}")));
    }
    indices.of(&[DType::I64, DType::I32])?;
    let n = size("indices", indices.count())?;
    let values = size("rows", rows)?;
    out.of(&[DType::F16, DType::Bf16, DType::F32])?.long(n, "one row for each index")?;
    packed.of(&[DType::U8])?.long(packed_len(values), "two codes to a byte")?;
    let scales_parameter = scales.parameter(values, blocksize)?;
    let kernel = kernel(out.dtype(), scales.is_nested(), variant);
    let blocks = match variant {
        Variant::Fast => (n as u64).div_ceil(TILE),
        Variant::Reference => (n as u64).div_ceil(u64::from(kernel.threads)),
    };
    let indices =
        IndicesParameter { address: indices.address(), size: indices.dtype().size() as u32, rows: rows as i64 };
    let (packed, out, n, columns) = (packed.address(), out.address(), n as i64, columns as u32);
    let (shift, quant_type) = (block_shift(blocksize), quant_type_parameter(quant_type));
    let parameters = parameters![indices, packed, scales_parameter, out, n, columns, shift, quant_type];
    // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
    unsafe { device.launch(stream, kernel, blocks, 0, parameters) }
}
