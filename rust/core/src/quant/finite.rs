//! Whether what is quantized is finite.

use crate::dtype::Element;

/// Whether every value of a quantized list was finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Finite {
    /// Neither NaN nor infinity.
    AllFinite,
    /// At least one NaN or infinity; [`first_nonfinite`] finds it.
    HasNonFinite,
}

impl Finite {
    /// Of two lists together.
    pub fn and(self, other: Self) -> Self {
        if self == Self::AllFinite { other } else { self }
    }
}

/// The position and value of the first NaN or infinity.
pub fn first_nonfinite<T: Element>(values: &[T]) -> Option<(usize, f32)> {
    values.iter().position(|v| !v.is_finite()).map(|i| (i, values[i].to_f32()))
}
