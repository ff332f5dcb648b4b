//! One row, by the path that the caller has chosen.

use super::scalar::{self, Plain};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::dtype::Element;
use crate::simd::Simd;

/// How many bits of a value count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// All.
    Full,
    /// Those of float16: 11 significant bits, in the range of float32. Only float32 has more. Activations are rounded in
    /// this way, where bitsandbytes makes float16 of them.
    Half,
}

/// Calls a function of the path, with what it is generic over. The caller has checked that the machine has the path.
macro_rules! by_path {
    ($simd:expr, $function:ident::<$($generic:tt),*>, ($($argument:expr),*)) => {
        // SAFETY: the machine has the path.
        unsafe {
            match $simd {
                #[cfg(target_arch = "x86_64")]
                Simd::Avx2 => avx2::$function::<$($generic),*>($($argument),*),
                #[cfg(target_arch = "x86_64")]
                Simd::Avx512 => avx512::$function::<$($generic),*>($($argument),*),
                _ => by_path!(scalar $function::<$($generic),*>, ($($argument),*)),
            }
        }
    };
    (scalar $function:ident::<$t:tt>, $arguments:tt) => {
        scalar::$function::<$t, Plain>$arguments
    };
    (scalar $function:ident::<$t:tt, $short:tt>, $arguments:tt) => {
        scalar::$function::<$t, Plain, $short>$arguments
    };
}

/// The largest magnitude, NaN aside.
pub fn largest<T: Element>(simd: Simd, row: &[T], precision: Precision) -> f32 {
    match precision {
        Precision::Full => by_path!(simd, largest::<T, false>, (row)),
        Precision::Half => by_path!(simd, largest::<T, true>, (row)),
    }
}

/// The largest magnitude below `threshold`; the columns of others are marked with 1, and NaN is neither.
pub fn largest_below<T: Element>(simd: Simd, row: &[T], precision: Precision, threshold: f32, marks: &mut [u8]) -> f32 {
    let all = largest(simd, row, precision);
    if all < threshold {
        return all; // as in most rows: nothing to mark
    }
    match precision {
        Precision::Full => by_path!(simd, largest_below::<T, false>, (row, threshold, marks)),
        Precision::Half => by_path!(simd, largest_below::<T, true>, (row, threshold, marks)),
    }
}

/// The codes of a row with this scale; 0 in columns that are marked.
pub fn encode<T: Element>(
    simd: Simd,
    row: &[T],
    precision: Precision,
    scale: f32,
    marks: Option<&[u8]>,
    codes: &mut [i8],
) {
    assert_eq!(row.len(), codes.len());
    match precision {
        Precision::Full => by_path!(simd, encode::<T, false>, (row, scale, codes)),
        Precision::Half => by_path!(simd, encode::<T, true>, (row, scale, codes)),
    }
    if let Some(marks) = marks {
        for (code, mark) in codes.iter_mut().zip(marks) {
            *code &= mark.wrapping_sub(1) as i8;
        }
    }
}

/// Reads a row back.
pub fn read<T: Element>(simd: Simd, codes: &[i8], scale: f32, out: &mut [T]) {
    assert_eq!(codes.len(), out.len());
    by_path!(simd, read::<T>, (codes, scale, out));
}

/// Reads a row back, with values rounded to `T` but as float32.
pub fn read_rounded<T: Element>(simd: Simd, codes: &[i8], scale: f32, out: &mut [f32]) {
    assert_eq!(codes.len(), out.len());
    by_path!(simd, read_rounded::<T>, (codes, scale, out));
}
