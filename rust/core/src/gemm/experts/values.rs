//! Floats in memory of our own, of the type of the activations.

use std::ops::Range;

use half::{bf16, f16};

use crate::gemm::compute::Compute;
use crate::gemm::floats::{Floats, FloatsMut};

/// Floats of one of the types.
#[derive(Debug)]
pub enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Values {
    pub fn floats(&self) -> Floats<'_> {
        match self {
            Self::F32(v) => Floats::F32(v),
            Self::F16(v) => Floats::F16(v),
            Self::Bf16(v) => Floats::Bf16(v),
        }
    }

    pub fn floats_mut(&mut self) -> FloatsMut<'_> {
        match self {
            Self::F32(v) => FloatsMut::F32(v),
            Self::F16(v) => FloatsMut::F16(v),
            Self::Bf16(v) => FloatsMut::Bf16(v),
        }
    }
}

impl<'a> Floats<'a> {
    /// The type to compute in: their own.
    pub(super) fn compute(self) -> Compute {
        match self {
            Self::F32(_) => Compute::F32,
            Self::F16(_) => Compute::F16,
            Self::Bf16(_) => Compute::Bf16,
        }
    }

    pub(super) fn slice(self, range: Range<usize>) -> Floats<'a> {
        match self {
            Self::F32(v) => Floats::F32(&v[range]),
            Self::F16(v) => Floats::F16(&v[range]),
            Self::Bf16(v) => Floats::Bf16(&v[range]),
        }
    }

    /// `len` zeros of the same type.
    pub(super) fn same(self, len: usize) -> Values {
        match self {
            Self::F32(_) => Values::F32(vec![0.0; len]),
            Self::F16(_) => Values::F16(vec![f16::ZERO; len]),
            Self::Bf16(_) => Values::Bf16(vec![bf16::ZERO; len]),
        }
    }

    /// The rows of the tokens of these slots, `k` slots being one token's and `cols` values one row.
    pub(super) fn gather(self, slots: &[u32], k: usize, cols: usize) -> Values {
        fn rows<T: Copy>(values: &[T], slots: &[u32], k: usize, cols: usize) -> Vec<T> {
            let mut rows = Vec::with_capacity(slots.len() * cols);
            for &slot in slots {
                let token = slot as usize / k;
                rows.extend_from_slice(&values[token * cols..(token + 1) * cols]);
            }
            rows
        }
        match self {
            Self::F32(v) => Values::F32(rows(v, slots, k, cols)),
            Self::F16(v) => Values::F16(rows(v, slots, k, cols)),
            Self::Bf16(v) => Values::Bf16(rows(v, slots, k, cols)),
        }
    }
}
