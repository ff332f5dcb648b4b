//! Device memory as numbers that were checked.

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::{BlockSize, NESTED_BLOCK_SIZE};

/// Elements in device memory: not null, aligned, within the address space. Whether the memory exists only the caller
/// knows.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    argument: &'static str,
    address: u64,
    count: usize,
    dtype: DType,
}

impl Memory {
    /// Checks what was passed for `argument`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a null or misaligned address, and an end beyond the address space. Without elements any
    /// address will do.
    pub fn new(argument: &'static str, address: usize, count: usize, dtype: DType) -> Result<Self> {
        let size = dtype.size();
        if count > 0 && address == 0 {
            return Err(Error::argument(argument, "the null address", format!("memory of {count} elements")));
        }
        if count > 0 && !address.is_multiple_of(size) {
            let expected = format!("at an address that is a multiple of {size} ({})", dtype.as_str());
            return Err(Error::argument(argument, format!("{address:#x}"), expected));
        }
        let bytes = count.checked_mul(size).filter(|&bytes| isize::try_from(bytes).is_ok());
        if bytes.and_then(|bytes| address.checked_add(bytes)).is_none() {
            let found = format!("{count} elements from {address:#x} on");
            return Err(Error::argument(argument, found, "memory within the address space"));
        }
        Ok(Self { argument, address: address as u64, count, dtype })
    }

    /// The first element's address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The number of elements.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Checks the type.
    ///
    /// # Errors
    /// [`Error::Argument`] that lists the legal types.
    pub fn of(&self, legal: &[DType]) -> Result<&Self> {
        if legal.contains(&self.dtype) {
            return Ok(self);
        }
        Err(Error::dtype(self.argument, self.dtype.as_str(), legal))
    }

    /// Checks the number of elements.
    ///
    /// # Errors
    /// [`Error::Argument`] that says why.
    pub fn long(&self, expected: usize, why: &str) -> Result<&Self> {
        if self.count == expected {
            return Ok(self);
        }
        Err(Error::argument(self.argument, self.count, format!("{expected} elements long ({why})")))
    }

    /// `count` elements from `begin` on, which there are.
    pub(super) fn part(&self, begin: usize, count: usize) -> Self {
        debug_assert!(begin + count <= self.count, "{begin} + {count} of {}", self.count);
        Self { address: self.address + (begin * self.dtype.size()) as u64, count, ..*self }
    }

    /// Whether the first element's address is a multiple of so many bytes.
    pub fn is_aligned(&self, bytes: u64) -> bool {
        self.address.is_multiple_of(bytes)
    }
}

/// The scales of one tensor.
#[derive(Debug, Clone, Copy)]
pub enum Scales {
    /// One float32 for each block.
    Plain(Memory),
    /// One 8-bit code for each block.
    Nested {
        /// uint8, one for each block.
        codes: Memory,
        /// float32, one for 256 codes.
        absmax2: Memory,
        /// float32, one.
        offset: Memory,
    },
}

/// What kernels take for [`Scales`].
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ScalesParameter {
    absmax: u64,
    codes: u64,
    absmax2: u64,
    offset: u64,
}

impl Scales {
    /// Whether there are two levels.
    pub fn is_nested(&self) -> bool {
        matches!(self, Self::Nested { .. })
    }

    pub(super) fn parameter(&self, values: usize, blocksize: BlockSize) -> Result<ScalesParameter> {
        let blocks = blocksize.absmax_len(values);
        match self {
            Self::Plain(absmax) => {
                absmax.of(&[DType::F32])?.long(blocks, "one scale per block")?;
                Ok(ScalesParameter { absmax: absmax.address(), ..ScalesParameter::default() })
            }
            Self::Nested { codes, absmax2, offset } => {
                codes.of(&[DType::U8])?.long(blocks, "one code per block")?;
                absmax2.of(&[DType::F32])?.long(blocks.div_ceil(NESTED_BLOCK_SIZE), "one scale per 256 codes")?;
                offset.of(&[DType::F32])?.long(1, "one offset")?;
                Ok(ScalesParameter {
                    absmax: 0,
                    codes: codes.address(),
                    absmax2: absmax2.address(),
                    offset: offset.address(),
                })
            }
        }
    }
}

/// log2 of the block size.
pub(super) fn block_shift(blocksize: BlockSize) -> i32 {
    blocksize.get().ilog2() as i32
}
/// The elements of a matrix that `argument` is.
pub(crate) fn elements(argument: &'static str, rows: usize, columns: usize) -> Result<usize> {
    rows.checked_mul(columns)
        .filter(|&count| i64::try_from(count).is_ok())
        .ok_or_else(|| Error::argument(argument, format!("{rows} x {columns}"), "of less than 2^63 elements"))
}
