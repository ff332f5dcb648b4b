//! What the copy engine has to know of a matrix.

use cudarc::driver::sys;
use halfbyte::error::Result;

use super::library::driver_error;

/// The elements of a matrix that the copy engine reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TileType {
    /// Bytes.
    U8,
    /// Half precision.
    F16,
    /// The upper half of a float32.
    Bf16,
    /// Single precision.
    F32,
}

/// A matrix in device memory as the copy engine knows it, and the boxes that it copies: `TensorMap` of `kernels/common/wgmma.cuh`.
#[repr(transparent)]
#[derive(Debug, Clone, Copy)]
pub struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// Of a row-major matrix at `address`, a multiple of 16 as are the bytes of a row; `size` and `tile` are rows and
    /// columns. The 16-byte pieces of a row of a box are swizzled within 64 or 128 bytes when it has as many.
    ///
    /// # Errors
    /// [`Error::Cuda`] in the driver's words.
    pub fn new(kind: TileType, address: u64, size: (usize, usize), tile: (usize, usize)) -> Result<Self> {
        let (data, bytes) = match kind {
            TileType::U8 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
            TileType::F16 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2),
            TileType::F32 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4),
            TileType::Bf16 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2),
        };
        let swizzle = match tile.1 * bytes {
            128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            _ => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        let dimensions = [size.1 as u64, size.0 as u64];
        let pitches = [(size.1 * bytes) as u64];
        let (tile, strides) = ([tile.1 as u32, tile.0 as u32], [1_u32; 2]);
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: writes the map, and reads arrays of as many elements as it has dimensions, and one less; the address is
        // kept, not followed.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                data,
                2,
                std::ptr::with_exposed_provenance_mut(address as usize),
                dimensions.as_ptr(),
                pitches.as_ptr(),
                tile.as_ptr(),
                strides.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|error| {
            driver_error(format!("a matrix of {} x {}", size.0, size.1), "cuTensorMapEncodeTiled", error)
        })?;
        Ok(Self(map))
    }

    /// As it lies in memory, for a kernel that reads it from there.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.opaque.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }
}
