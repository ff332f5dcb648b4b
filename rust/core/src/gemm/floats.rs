//! Activations, gradients, biases and results: lists of floats of one of three types.

use std::marker::PhantomData;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::compute::Compute;
use crate::dtype::{bf16_bits, f32_of};

/// Floats to read.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// float32
    F32(&'a [f32]),
    /// float16
    F16(&'a [f16]),
    /// bfloat16
    Bf16(&'a [bf16]),
}

impl Floats<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Values of `range`, rounded to `compute`, as float32.
    pub(super) fn to_f32(self, range: Range<usize>, compute: Compute, out: &mut [f32]) {
        match self {
            Self::F32(v) => out.copy_from_slice(&v[range]),
            Self::F16(v) => v[range].convert_to_f32_slice(out),
            Self::Bf16(v) => out.iter_mut().zip(&v[range]).for_each(|(o, v)| *o = f32_of(v.to_bits())),
        }
        match (self, compute) {
            (_, Compute::F32) | (Self::F16(_), Compute::F16) | (Self::Bf16(_), Compute::Bf16) => {}
            (_, Compute::Bf16) => out.iter_mut().for_each(|v| *v = f32_of(bf16_bits(*v))),
            (_, Compute::F16) => {
                let mut rounded = [f16::ZERO; 64];
                for part in out.chunks_mut(rounded.len()) {
                    let rounded = &mut rounded[..part.len()];
                    rounded.convert_from_f32_slice(part);
                    rounded.convert_to_f32_slice(part);
                }
            }
        }
    }

    /// Values of `range` as the bits of bfloat16.
    pub(super) fn to_bf16(self, range: Range<usize>, out: &mut [u16]) {
        match self {
            Self::F32(v) => out.iter_mut().zip(&v[range]).for_each(|(o, &v)| *o = bf16_bits(v)),
            Self::F16(v) => {
                let mut wide = [0.0; 64];
                for (out, v) in out.chunks_mut(wide.len()).zip(v[range].chunks(wide.len())) {
                    let wide = &mut wide[..v.len()];
                    v.convert_to_f32_slice(wide);
                    out.iter_mut().zip(wide).for_each(|(o, v)| *o = bf16_bits(*v));
                }
            }
            Self::Bf16(v) => out.copy_from_slice(bytemuck::cast_slice(&v[range])),
        }
    }

    /// One value as float32.
    pub(super) fn get(self, index: usize) -> f32 {
        match self {
            Self::F32(v) => v[index],
            Self::F16(v) => v[index].to_f32(),
            Self::Bf16(v) => v[index].to_f32(),
        }
    }
}

/// Floats to write.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// float32
    F32(&'a mut [f32]),
    /// float16
    F16(&'a mut [f16]),
    /// bfloat16
    Bf16(&'a mut [bf16]),
}

impl<'a> FloatsMut<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same memory, to be written by several threads.
    pub(super) fn share(self) -> Shared<'a> {
        let (pointer, len) = match self {
            Self::F32(v) => (Pointer::F32(v.as_mut_ptr()), v.len()),
            Self::F16(v) => (Pointer::F16(v.as_mut_ptr()), v.len()),
            Self::Bf16(v) => (Pointer::Bf16(v.as_mut_ptr()), v.len()),
        };
        Shared { pointer, len, memory: PhantomData }
    }
}

#[derive(Clone, Copy)]
enum Pointer {
    F32(*mut f32),
    F16(*mut f16),
    Bf16(*mut bf16),
}

/// Results that several threads write, each its own part.
pub(super) struct Shared<'a> {
    pointer: Pointer,
    len: usize,
    memory: PhantomData<&'a mut [f32]>,
}

// SAFETY: the memory is borrowed mutably for 'a, and `store` asks its callers to write disjoint parts.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl Shared<'_> {
    /// Rounds `values` to the type and writes them from `at` on.
    ///
    /// # Safety
    /// No other thread writes to these places meanwhile.
    pub unsafe fn store(&self, at: usize, values: &[f32]) {
        let end = at.checked_add(values.len());
        assert!(end.is_some_and(|end| end <= self.len), "a result beyond its memory");
        // SAFETY: within the memory, and nobody else's.
        unsafe {
            match self.pointer {
                Pointer::F32(p) => std::slice::from_raw_parts_mut(p.add(at), values.len()).copy_from_slice(values),
                Pointer::F16(p) => {
                    std::slice::from_raw_parts_mut(p.add(at), values.len()).convert_from_f32_slice(values);
                }
                Pointer::Bf16(p) => {
                    let out = std::slice::from_raw_parts_mut(p.add(at), values.len());
                    out.iter_mut().zip(values).for_each(|(o, &v)| *o = bf16::from_bits(bf16_bits(v)));
                }
            }
        }
    }
}
