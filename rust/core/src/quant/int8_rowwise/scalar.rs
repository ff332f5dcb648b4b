//! The definition, in loops that the compiler makes vectors of: each path compiles them with its instructions. No float32
//! operation of theirs is fused with another or done in another order, so all paths give the same bits.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::dtype::{DType, Element, bf16_bits, f32_of};

/// Values that are converted together: a few cache lines, and enough for every vector unit.
const CHUNK: usize = 256;

/// From here on a row is divided by 256 first, with its scale: the product with 127 could overflow.
pub const LARGE: f32 = f32::from_bits((127 + 120) << 23); // 2^120

/// 1.5 * 2^23: a float32 of this size has no fraction, so that adding it rounds to an integer, in the low bits.
const ROUNDER: f32 = 12_582_912.0;

const INFINITY: u32 = 0x7f80_0000;

/// How a path converts float16, of which the compiler knows nothing.
pub trait Halves {
    /// # Safety
    /// The machine has the path; both have one length.
    unsafe fn widen(from: &[f16], to: &mut [f32]);

    /// # Safety
    /// The machine has the path; both have one length.
    unsafe fn narrow(from: &[f32], to: &mut [f16]);
}

/// Conversions of every machine.
pub struct Plain;

impl Halves for Plain {
    unsafe fn widen(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    unsafe fn narrow(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }
}

/// The value, of float16's precision for `SHORT`: 11 significant bits, of two equally near values the even one, in float32's
/// range.
#[inline(always)]
fn rounded<const SHORT: bool>(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x0fff + (bits >> 13 & 1)) & !0x1fff;
    if !SHORT || bits & INFINITY == INFINITY { x } else { f32::from_bits(rounded) }
}

/// The values as float32, [`rounded`]; those of 16 bits have no more precision.
#[inline(always)]
unsafe fn widen<T: Element, H: Halves, const SHORT: bool>(from: &[T], to: &mut [f32]) {
    match T::DTYPE {
        // SAFETY: the caller's.
        DType::F16 => unsafe { H::widen(bytemuck::cast_slice(from), to) },
        DType::Bf16 => {
            let from: &[bf16] = bytemuck::cast_slice(from);
            to.iter_mut().zip(from).for_each(|(to, from)| *to = f32_of(from.to_bits()));
        }
        _ => {
            let from: &[f32] = bytemuck::cast_slice(from);
            to.iter_mut().zip(from).for_each(|(to, from)| *to = rounded::<SHORT>(*from));
        }
    }
}

/// Magnitudes whose largest are found side by side: enough for every vector unit.
const SIDE: usize = 64;

/// The bits of floats of some size. Those of magnitudes are in their order, which integers compare without the exceptions
/// of floats.
trait Bits: Copy + Ord + Default {
    /// Of the magnitude.
    fn magnitude(self) -> Self;
}

impl Bits for u16 {
    #[inline(always)]
    fn magnitude(self) -> Self {
        self & 0x7fff
    }
}

impl Bits for u32 {
    #[inline(always)]
    fn magnitude(self) -> Self {
        self & 0x7fff_ffff
    }
}

/// The bits of the largest magnitude that is no more than `most`; zero without one.
#[inline(always)]
fn largest_bits<B: Bits>(values: &[B], most: B) -> B {
    let mut side = [B::default(); SIDE];
    let (whole, rest) = values.as_chunks::<SIDE>();
    let counts = |bits: B| if bits.magnitude() > most { B::default() } else { bits.magnitude() };
    for values in whole {
        for i in 0..SIDE {
            side[i] = side[i].max(counts(values[i]));
        }
    }
    for i in 0..rest.len() {
        side[i] = side[i].max(counts(rest[i]));
    }
    let mut largest = B::default();
    for side in side {
        largest = largest.max(side);
    }
    largest
}

/// Marks the values whose magnitude is from `least` to `most`, and gives the largest below.
#[inline(always)]
fn mark<B: Bits>(values: &[B], least: B, most: B, marks: &mut [u8]) -> B {
    let mut side = [B::default(); SIDE];
    let (whole, rest) = values.as_chunks::<SIDE>();
    let (whole_marks, rest_marks) = marks.as_chunks_mut::<SIDE>();
    for (values, marks) in whole.iter().zip(whole_marks) {
        for i in 0..SIDE {
            let bits = values[i].magnitude();
            side[i] = side[i].max(if bits >= least { B::default() } else { bits });
            marks[i] |= u8::from(bits >= least && bits <= most);
        }
    }
    for i in 0..rest.len() {
        let bits = rest[i].magnitude();
        side[i] = side[i].max(if bits >= least { B::default() } else { bits });
        rest_marks[i] |= u8::from(bits >= least && bits <= most);
    }
    let mut largest = B::default();
    for side in side {
        largest = largest.max(side);
    }
    largest
}

/// The largest magnitude; NaN is passed over.
///
/// # Safety
/// The machine has the path of `H`, as for all of these.
#[inline(always)]
pub unsafe fn largest<T: Element, H: Halves, const SHORT: bool>(row: &[T]) -> f32 {
    match T::DTYPE {
        DType::F16 => f16::from_bits(largest_bits::<u16>(bytemuck::cast_slice(row), f16::INFINITY.to_bits())).to_f32(),
        DType::Bf16 => f32_of(largest_bits::<u16>(bytemuck::cast_slice(row), bf16::INFINITY.to_bits())),
        // Rounding keeps the order of magnitudes.
        _ => rounded::<SHORT>(f32::from_bits(largest_bits::<u32>(bytemuck::cast_slice(row), INFINITY))),
    }
}

/// The largest magnitude below `threshold`; the columns of others, which are outliers, are marked with 1. NaN is neither.
///
/// # Safety
/// As [`largest`].
#[inline(always)]
pub unsafe fn largest_below<T: Element, H: Halves, const SHORT: bool>(
    row: &[T],
    threshold: f32,
    marks: &mut [u8],
) -> f32 {
    match T::DTYPE {
        DType::F16 => {
            let nearest = f16::from_f32(threshold);
            let least = nearest.to_bits() + u16::from(nearest.to_f32() < threshold);
            f16::from_bits(mark(bytemuck::cast_slice(row), least, f16::INFINITY.to_bits(), marks)).to_f32()
        }
        DType::Bf16 => {
            let nearest = bf16_bits(threshold);
            let least = nearest + u16::from(f32_of(nearest) < threshold);
            f32_of(mark(bytemuck::cast_slice(row), least, bf16::INFINITY.to_bits(), marks))
        }
        _ => {
            let mut buffer = [0u32; CHUNK];
            let row: &[f32] = bytemuck::cast_slice(row);
            let mut largest = 0;
            for (chunk, marks) in row.chunks(CHUNK).zip(marks.chunks_mut(CHUNK)) {
                let bits = &mut buffer[..chunk.len()];
                for (bits, x) in bits.iter_mut().zip(chunk) {
                    *bits = rounded::<SHORT>(*x).to_bits();
                }
                largest = largest.max(mark(bits, threshold.to_bits(), INFINITY, marks));
            }
            f32::from_bits(largest)
        }
    }
}

/// The codes of a row with this scale.
///
/// # Safety
/// As [`largest`]; `codes` is as long as the row.
#[inline(always)]
pub unsafe fn encode<T: Element, H: Halves, const SHORT: bool>(row: &[T], scale: f32, codes: &mut [i8]) {
    let (factor, divisor) = if scale >= LARGE { (127.0 / 256.0, scale / 256.0) } else { (127.0, scale) };
    if T::DTYPE != DType::F16 {
        for (code, x) in codes.iter_mut().zip(row) {
            let x = if T::DTYPE == DType::Bf16 { x.to_f32() } else { rounded::<SHORT>(x.to_f32()) };
            *code = round_to_code(x * factor / divisor);
        }
        return;
    }
    let mut buffer = [0.0; CHUNK];
    for (chunk, codes) in row.chunks(CHUNK).zip(codes.chunks_mut(CHUNK)) {
        let values = &mut buffer[..chunk.len()];
        // SAFETY: the caller's.
        unsafe { widen::<T, H, SHORT>(chunk, values) };
        for (code, x) in codes.iter_mut().zip(values) {
            *code = round_to_code(*x * factor / divisor);
        }
    }
}

/// The nearest integer of a magnitude of at most 127.5, ties to even; 0 of NaN and infinity. Without a call, so that loops
/// become vectors.
#[inline(always)]
fn round_to_code(x: f32) -> i8 {
    let rounded = (x + ROUNDER).to_bits() as i8;
    if x.is_nan() { 0 } else { rounded }
}

/// Reads a row back.
///
/// # Safety
/// As [`largest`]; `out` is as long as the codes.
#[inline(always)]
pub unsafe fn read<T: Element, H: Halves>(codes: &[i8], scale: f32, out: &mut [T]) {
    let value = |code: i8| f32::from(code) * scale * (1.0 / 127.0);
    match T::DTYPE {
        DType::F16 => {
            let out: &mut [f16] = bytemuck::cast_slice_mut(out);
            let mut buffer = [0.0; CHUNK];
            for (codes, out) in codes.chunks(CHUNK).zip(out.chunks_mut(CHUNK)) {
                let values = &mut buffer[..codes.len()];
                values.iter_mut().zip(codes).for_each(|(v, &code)| *v = value(code));
                // SAFETY: the caller's.
                unsafe { H::narrow(values, out) }
            }
        }
        DType::Bf16 => {
            let out: &mut [bf16] = bytemuck::cast_slice_mut(out);
            out.iter_mut().zip(codes).for_each(|(v, &code)| *v = bf16::from_bits(bf16_bits(value(code))));
        }
        _ => {
            let out: &mut [f32] = bytemuck::cast_slice_mut(out);
            out.iter_mut().zip(codes).for_each(|(v, &code)| *v = value(code));
        }
    }
}

/// Reads a row back, with values rounded to `T` but as float32.
///
/// # Safety
/// As [`read`].
#[inline(always)]
pub unsafe fn read_rounded<T: Element, H: Halves>(codes: &[i8], scale: f32, out: &mut [f32]) {
    let mut buffer = [T::default(); CHUNK];
    for (codes, out) in codes.chunks(CHUNK).zip(out.chunks_mut(CHUNK)) {
        let rounded = &mut buffer[..codes.len()];
        // SAFETY: the caller's.
        unsafe {
            read::<T, H>(codes, scale, rounded);
            widen::<T, H, false>(rounded, out);
        }
    }
}
