//! The scales of 4-bit weights beside each other.

use bytemuck::cast_slice;

use super::sides::Sides;
use crate::checkpoint::cast::floats;
use crate::checkpoint::reader::Checkpoint;
use crate::checkpoint::weights::WeightSource;
use crate::codebook::dynamic_map;
use crate::error::Result;
use crate::geometry::NESTED_BLOCK_SIZE;
use crate::quant::absmax::{self, Nested};

/// How far from the nearest 8-bit code a scale's code may lie, as a share of the block's largest: bitsandbytes looks the
/// code up in a table of 2^16 steps on a CPU.
const CODE_SLACK: f32 = 1.0 / 16384.0;

/// How far two means of the same scales may lie apart, relative to them: the order of the sum is up to the writer.
const MEAN_SLACK: f32 = 1.0 / 1_048_576.0;

/// How the scales of a 4-bit weight stand to what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scales {
    /// The same bytes.
    Same,
    /// Doubly quantized by the same rule, rounded another way.
    Rounded,
    /// Neither.
    Different,
}

impl Sides<'_> {
    /// The stored scales of `b` beside those of a fresh quantization.
    pub(super) fn scales_as_fresh(&self, b: &WeightSource, fresh: &[f32]) -> Result<Scales> {
        if !tables_as_defined(self.b, b)? {
            return Ok(Scales::Different);
        }
        let Some(stored) = read_nested(self.b, b)? else {
            let same = self.b.read(b.absmax)? == cast_slice::<f32, u8>(fresh);
            return Ok(if same { Scales::Same } else { Scales::Different });
        };
        Ok(nested_beside_exact(&stored, fresh))
    }

    /// The scales of two 4-bit weights beside each other.
    pub(super) fn scales_of_both(&self, a: &WeightSource, b: &WeightSource) -> Result<Scales> {
        if a.state.dtype != b.state.dtype || !tables_as_defined(self.a, a)? || !tables_as_defined(self.b, b)? {
            return Ok(Scales::Different);
        }
        Ok(match (read_nested(self.a, a)?, read_nested(self.b, b)?) {
            (Some(x), Some(y)) => nested_beside_nested(&x, &y),
            // One of them is singly quantized: the other is no more than a rounding of it.
            (None, Some(y)) => nested_beside_exact(&y, &floats(&self.a.read(a.absmax)?)).at_most_rounded(),
            (Some(x), None) => nested_beside_exact(&x, &floats(&self.b.read(b.absmax)?)).at_most_rounded(),
            (None, None) if self.a.read(a.absmax)? == self.b.read(b.absmax)? => Scales::Same,
            (None, None) => Scales::Different,
        })
    }
}

impl Scales {
    fn at_most_rounded(self) -> Self {
        if self == Self::Same { Self::Rounded } else { self }
    }
}

/// Whether the tables that a weight brings along are those of the format, whatever the sign of their zeros.
fn tables_as_defined(side: &Checkpoint, weight: &WeightSource) -> Result<bool> {
    if let Some(map) = weight.quant_map
        && floats(&side.read(map)?) != weight.state.quant_type.quant_map()
    {
        return Ok(false);
    }
    match weight.nested {
        Some((_, map)) => Ok(floats(&side.read(map)?) == dynamic_map()),
        None => Ok(true),
    }
}

/// The doubly quantized scales of a weight, as stored; `None` when it has single ones.
fn read_nested(side: &Checkpoint, weight: &WeightSource) -> Result<Option<Nested>> {
    let Some((absmax, _)) = weight.nested else { return Ok(None) };
    let offset = weight.state.nested_offset.unwrap_or(0.0);
    Ok(Some(Nested { codes: side.read(weight.absmax)?, absmax: floats(&side.read(absmax)?), offset }))
}

/// Doubly quantized scales beside the scales that they stand for.
fn nested_beside_exact(stored: &Nested, exact: &[f32]) -> Scales {
    let fresh = absmax::quantize_absmax(exact);
    if same_nested(stored, &fresh) {
        return Scales::Same;
    }
    let map = dynamic_map();
    let blocks = exact.chunks(NESTED_BLOCK_SIZE).zip(stored.codes.chunks(NESTED_BLOCK_SIZE));
    let near =
        blocks.zip(fresh.codes.chunks(NESTED_BLOCK_SIZE)).zip(&fresh.absmax).all(|(((exact, at), best), &max)| {
            let slack = CODE_SLACK + MEAN_SLACK * fresh.offset.abs() / max;
            exact.iter().zip(at).zip(best).all(|((&exact, &at), &best)| {
                let scaled = (exact - fresh.offset) / max;
                let distance = |code: u8| (map[usize::from(code)] - scaled).abs();
                at == best || distance(at) <= distance(best) + slack
            })
        });
    if near && near_statistics(stored, &fresh) { Scales::Rounded } else { Scales::Different }
}

/// Two sets of doubly quantized scales, of which nobody knows what they stood for: codes next to each other may.
fn nested_beside_nested(x: &Nested, y: &Nested) -> Scales {
    if same_nested(x, y) {
        return Scales::Same;
    }
    let map = dynamic_map();
    let near =
        x.codes.iter().zip(&y.codes).all(|(&x, &y)| {
            x.abs_diff(y) <= 1 || (map[usize::from(x)] - map[usize::from(y)]).abs() <= 2.0 * CODE_SLACK
        });
    if near && x.codes.len() == y.codes.len() && near_statistics(x, y) { Scales::Rounded } else { Scales::Different }
}

fn same_nested(x: &Nested, y: &Nested) -> bool {
    x.offset.to_bits() == y.offset.to_bits()
        && x.codes == y.codes
        && cast_slice::<f32, u8>(&x.absmax) == cast_slice::<f32, u8>(&y.absmax)
}

/// Whether the means, and what is left of the largest scales without them, differ by rounding only.
fn near_statistics(x: &Nested, y: &Nested) -> bool {
    // An infinity is near nothing but itself.
    let near = |a: f32, b: f32| {
        let size = a.abs().max(x.offset.abs());
        a == b || size.is_finite() && (a - b).abs() <= MEAN_SLACK * size
    };
    near(x.offset, y.offset)
        && x.absmax.len() == y.absmax.len()
        && x.absmax.iter().zip(&y.absmax).all(|(&x, &y)| near(x, y))
}
