//! Memory that Python owns: the one place where an address becomes a slice.
//!
//! Python passes `(address, count, dtype)`; a [`Buffer`] is that value, checked as far as numbers can be checked.

use std::ops::Range;

use half::{bf16, f16};
use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};

/// The types of elements that the CPU takes from Python.
const TAKEN: [DType; 5] = [DType::U8, DType::I8, DType::F16, DType::Bf16, DType::F32];

/// What Python passes: the address, the number of elements, and the dtype's name.
pub type RawBuffer = (usize, usize, String);

/// A Rust type whose every bit pattern is a value, and its name.
pub trait Plain: Copy + 'static {
    const DTYPE: DType;
}

impl Plain for u8 {
    const DTYPE: DType = DType::U8;
}

impl Plain for i8 {
    const DTYPE: DType = DType::I8;
}

impl Plain for i32 {
    const DTYPE: DType = DType::I32;
}

impl Plain for i64 {
    const DTYPE: DType = DType::I64;
}

impl Plain for f16 {
    const DTYPE: DType = DType::F16;
}

impl Plain for bf16 {
    const DTYPE: DType = DType::Bf16;
}

impl Plain for f32 {
    const DTYPE: DType = DType::F32;
}

/// Checked memory of Python's: not null, aligned, within the address space.
#[derive(Debug)]
pub struct Buffer {
    argument: &'static str,
    address: usize,
    count: usize,
    dtype: DType,
}

impl Buffer {
    /// Checks what Python passed for `argument`.
    ///
    /// # Errors
    /// [`Error::Argument`] for an unknown dtype, a null or misaligned address, or an end beyond the address space.
    /// Without elements any address will do.
    pub fn new(argument: &'static str, (address, count, dtype): RawBuffer) -> Result<Self> {
        let Some(dtype) = TAKEN.into_iter().find(|d| d.as_str() == dtype) else {
            return Err(Error::dtype(argument, dtype, &TAKEN));
        };
        Self::of(argument, address, count, dtype)
    }

    /// The same, of a dtype that is known.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub fn of(argument: &'static str, address: usize, count: usize, dtype: DType) -> Result<Self> {
        let size = dtype.size();
        if count > 0 {
            if address == 0 {
                return Err(Error::argument(argument, "the null address", format!("memory of {count} elements")));
            }
            if !address.is_multiple_of(size) {
                let expected = format!("at an address that is a multiple of {size} ({})", dtype.as_str());
                return Err(Error::argument(argument, format!("{address:#x}"), expected));
            }
        }
        let bytes = count.checked_mul(size).filter(|&bytes| isize::try_from(bytes).is_ok());
        if bytes.and_then(|bytes| address.checked_add(bytes)).is_none() {
            let found = format!("{count} elements from {address:#x} on");
            return Err(Error::argument(argument, found, "memory within the address space"));
        }
        Ok(Self { argument, address, count, dtype })
    }

    /// The number of elements.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// That the dtype is not one of `legal`.
    pub fn wrong_dtype(&self, legal: &[DType]) -> Error {
        Error::dtype(self.argument, self.dtype.as_str(), legal)
    }

    /// Asks for pages of 2 MiB under a large output. A tensor that was just allocated gets its pages when they are first
    /// written: one fault for 4 KiB each costs ten times as much as the writing. It is a hint, and without effect on
    /// memory that has its pages.
    fn ask_for_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        {
            /// Size and alignment of a huge page on x86-64 and on arm64 with 4 KiB pages.
            const HUGE: usize = 2 << 20;
            let range = self.range();
            let (start, end) = (range.start.next_multiple_of(HUGE), range.end / HUGE * HUGE);
            if start < end {
                // SAFETY: the advice does not change what memory holds, and the range lies inside the caller's buffer.
                let _ = unsafe { rustix::mm::madvise(start as *mut _, end - start, rustix::mm::Advice::LinuxHugepage) };
            }
        }
    }

    fn range(&self) -> Range<usize> {
        self.address..self.address + self.count * self.dtype.size()
    }

    fn pointer<T: Plain>(&self) -> Result<*mut T> {
        if self.dtype != T::DTYPE {
            return Err(self.wrong_dtype(&[T::DTYPE]));
        }
        Ok(if self.count == 0 {
            std::ptr::NonNull::dangling().as_ptr()
        } else {
            std::ptr::with_exposed_provenance_mut(self.address)
        })
    }

    /// The elements, to read.
    ///
    /// # Errors
    /// [`Error::Argument`] when the dtype is not `T`'s.
    ///
    /// # Safety
    /// The memory is readable, stays so, and nobody writes to it, while the slice lives.
    pub unsafe fn slice<'a, T: Plain>(&self) -> Result<&'a [T]> {
        let pointer = self.pointer::<T>()?;
        // SAFETY: `new` checked address, alignment and size; the rest is the caller's.
        Ok(unsafe { std::slice::from_raw_parts(pointer, self.count) })
    }

    /// The elements, to write.
    ///
    /// # Errors
    /// [`Error::Argument`] when the dtype is not `T`'s.
    ///
    /// # Safety
    /// The memory is writable, stays so, and nobody else reads or writes it, while the slice lives: see
    /// [`check_disjoint`].
    pub unsafe fn slice_mut<'a, T: Plain>(&self) -> Result<&'a mut [T]> {
        self.ask_for_huge_pages();
        let pointer = self.pointer::<T>()?;
        // SAFETY: `new` checked address, alignment and size; the rest is the caller's.
        Ok(unsafe { std::slice::from_raw_parts_mut(pointer, self.count) })
    }
}

/// Checks that no output shares memory with an input or another output.
///
/// # Errors
/// [`Error::Argument`] that names the output.
pub fn check_disjoint(inputs: &[&Buffer], outputs: &[&Buffer]) -> Result<()> {
    for (i, output) in outputs.iter().enumerate() {
        for other in inputs.iter().chain(&outputs[..i]) {
            let (a, b) = (output.range(), other.range());
            if a.start.max(b.start) < a.end.min(b.end) {
                let found = format!("the memory of {}", other.argument);
                return Err(Error::argument(output.argument, found, "memory of its own"));
            }
        }
    }
    Ok(())
}
