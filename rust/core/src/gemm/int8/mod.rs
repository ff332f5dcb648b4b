//! Products with a weight of 8-bit rows: LLM.int8().
//!
//! # What is rounded, and when
//! - Activations are rounded to 11 significant bits (those of 16 bits have no more), and quantized to codes row by row, as
//!   [`crate::quant::int8_rowwise`] says; with a threshold, without the columns that have outliers.
//! - Codes are multiplied and added up as integers: exactly, as long as the sum fits 32 bits.
//! - Sums are made into values as `finish` says: a few float32 operations in a fixed order, rounded once to the type of the
//!   result.
//!
//! So the bits of a result depend on neither the path nor the number of threads. [`linear_backward`] alone is a product of
//! floats, with the bounds of [`crate::gemm`].
//!
//! # How
//! Few rows of activations are multiplied with the weight's codes in registers (`direct`), many with a tile of them in the
//! second-level cache (`blocked`). Nothing as large as the result is kept besides it.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod backward;
mod blocked;
mod codes;
mod direct;
mod finish;
mod kernel;
mod path;
mod scalar;
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code, reason = "no tiles here"))]
mod tiled;

use self::activations::Activations;
#[cfg(target_arch = "x86_64")]
use self::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use self::avx512::{Avx512, Vnni};
use self::codes::Codes;
use self::finish::{Finish, SharedSums, To};
use self::kernel::Kernel;
pub use self::path::Path;
use self::scalar::Scalar;
use self::tiled::Tiled;
use super::blocked::scalar::Scalar as FloatScalar;
use super::blocked::tiled::Tiled as FloatTiled;
use super::blocked::{self as float_blocked};
use super::compute::Compute;
use super::floats::{Floats, FloatsMut};
use super::matrix::Matrix;
use super::out::{MOST_COLS, Out};
use super::path::Path as FloatPath;
#[cfg(test)]
use super::tests::emulated;
use super::tiles::SIDE;
use super::workers::Workers;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::x86::amx::Hardware;
#[cfg(target_arch = "x86_64")]
use super::x86::{
    avx2::Avx2 as FloatAvx2,
    avx512::{Avx512 as FloatAvx512, Avx512Bf16},
};
use crate::error::{Error, Result};
use crate::geometry::check_length;

/// So many products of two codes, of magnitude 127 at most, have a sum that fits 32 bits.
pub const MOST_COLUMNS: usize = i32::MAX as usize / (127 * 127);

/// Multiplications that one thread does in the time it takes to wake another: tens of microseconds.
const SERIAL_WORK: usize = 1 << 20;

/// A weight: codes `[rows, cols]`, row-major, and a scale for each row.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    codes: &'a [i8],
    scales: &'a [f32],
    rows: usize,
    cols: usize,
}

impl<'a> Weight<'a> {
    /// Checks the lengths.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are `rows * cols` codes and `rows` scales.
    pub fn new(codes: &'a [i8], scales: &'a [f32], rows: usize, cols: usize) -> Result<Self> {
        check_length("codes", codes.len(), area("codes", rows, cols)?, "rows x columns")?;
        check_length("scales", scales.len(), rows, "one scale per row")?;
        Ok(Self { codes, scales, rows, cols })
    }

    fn matrix(&self) -> Codes<'a> {
        Codes { codes: self.codes, rows: self.rows, cols: self.cols, pitch: self.cols }
    }
}

/// `out[m, n] = x[m, k] · weight[n, k]ᵀ + bias[n]`, all row-major, with `x` quantized; values of at least `threshold`, where
/// that is above 0, and their columns are not. The module's description is the contract.
///
/// # Errors
/// [`Error::Argument`] unless the lengths of `x`, `bias` and `out` are those of `m` rows, `threshold` is at least 0 and `k`
/// at most [`MOST_COLUMNS`], and when this machine lacks the path.
#[allow(clippy::too_many_arguments, reason = "a product has that many")]
pub fn linear(
    path: Path,
    workers: Workers<'_>,
    m: usize,
    x: Floats<'_>,
    weight: &Weight<'_>,
    bias: Option<Floats<'_>>,
    threshold: f32,
    out: FloatsMut<'_>,
) -> Result<()> {
    let path = path.checked()?;
    let (n, k) = (weight.rows, weight.cols);
    check_length("x", x.len(), area("x", m, k)?, "rows of the weight's columns")?;
    check_length("out", out.len(), area("out", m, n)?, "rows of the weight's rows")?;
    check_columns(k)?;
    if threshold.is_nan() || threshold < 0.0 {
        return Err(Error::argument("threshold", threshold, "a number of at least 0 (0 turns it off)"));
    }
    let bias = wide_bias(bias, n)?;
    if m == 0 || n == 0 {
        return Ok(());
    }
    let workers = workers.for_work(m.saturating_mul(n).saturating_mul(k), SERIAL_WORK);
    let x = Activations::new(path.simd(), x, [m, k], threshold, workers);
    let to = To::Values {
        simd: path.simd(),
        row_scales: x.scales(),
        column_scales: weight.scales,
        bias: bias.as_deref(),
        outliers: x.outliers(),
        out: out.share(),
    };
    product(path, x.codes(), weight.matrix(), &Finish { cols: n, to }, workers);
    Ok(())
}

/// `out[m, n] = a[m, k] · b[n, k]ᵀ`, exactly; all row-major.
///
/// # Errors
/// [`Error::Argument`] unless the lengths are those of the `shape` `[m, n, k]` and `k` is at most [`MOST_COLUMNS`], and when
/// this machine lacks the path.
pub fn matmul(
    path: Path,
    workers: Workers<'_>,
    [m, n, k]: [usize; 3],
    a: &[i8],
    b: &[i8],
    out: &mut [i32],
) -> Result<()> {
    let path = path.checked()?;
    let (a, b) = factors([m, n, k], a, b)?;
    check_length("out", out.len(), area("out", m, n)?, "rows of a by rows of b")?;
    let workers = workers.for_work(m.saturating_mul(n).saturating_mul(k), SERIAL_WORK);
    let finish = Finish { cols: n, to: To::Sums(SharedSums::new(out)) };
    product(path, a, b, &finish, workers);
    Ok(())
}

/// What the sums of [`matmul`] stand for, with a scale for each row of `a` and of `b`, plus the bias.
///
/// # Errors
/// As [`matmul`], and unless there is a scale for each row of `a` and of `b`, and a bias, if any, for each row of `b`.
#[allow(clippy::too_many_arguments, reason = "a product has that many")]
pub fn scaled(
    path: Path,
    workers: Workers<'_>,
    [m, n, k]: [usize; 3],
    a: &[i8],
    b: &[i8],
    row_scales: &[f32],
    column_scales: &[f32],
    bias: Option<Floats<'_>>,
    out: FloatsMut<'_>,
) -> Result<()> {
    let path = path.checked()?;
    let (a, b) = factors([m, n, k], a, b)?;
    check_length("out", out.len(), area("out", m, n)?, "rows of a by rows of b")?;
    check_length("row_scales", row_scales.len(), m, "one per row of a")?;
    check_length("column_scales", column_scales.len(), n, "one per row of b")?;
    let bias = wide_bias(bias, n)?;
    let workers = workers.for_work(m.saturating_mul(n).saturating_mul(k), SERIAL_WORK);
    let to = To::Values {
        simd: path.simd(),
        row_scales,
        column_scales,
        bias: bias.as_deref(),
        outliers: None,
        out: out.share(),
    };
    product(path, a, b, &Finish { cols: n, to }, workers);
    Ok(())
}

/// `out[m, k] = grad[m, n] · weight[n, k]`, all row-major: the gradient of [`linear`]'s `x`. The weight's values are rounded
/// to `compute`, which `grad` has or is rounded to.
///
/// # Errors
/// [`Error::Argument`] unless the lengths of `grad` and `out` are those of `m` rows, and when this machine lacks the
/// path.
pub fn linear_backward(
    path: FloatPath,
    workers: Workers<'_>,
    m: usize,
    grad: Floats<'_>,
    weight: &Weight<'_>,
    out: FloatsMut<'_>,
    compute: Compute,
) -> Result<()> {
    let path = path.checked()?;
    let (n, k) = (weight.rows, weight.cols);
    check_length("grad", grad.len(), area("grad", m, n)?, "rows of the weight's rows")?;
    check_length("out", out.len(), area("out", m, k)?, "rows of the weight's columns")?;
    if m == 0 || k == 0 {
        return Ok(());
    }
    let out = Out::all(out.share(), k, None);
    if n == 0 {
        super::zero(m, &out);
        return Ok(());
    }
    let grad = Matrix { floats: grad, cols: n, compute };
    let workers = workers.for_work(m.saturating_mul(n).saturating_mul(k), SERIAL_WORK);
    let weight = &backward::Rows { simd: path.simd(), codes: weight.matrix(), scales: weight.scales, compute };
    match (path, compute) {
        (FloatPath::Scalar, _) => float_blocked::backward::<FloatScalar>(grad, m, weight, &out, workers),
        #[cfg(test)]
        (FloatPath::Emulated, Compute::Bf16) => {
            float_blocked::backward::<FloatTiled<emulated::Pairs, emulated::Emulated, 2>>(
                grad, m, weight, &out, workers,
            );
        }
        #[cfg(test)]
        (FloatPath::Emulated, _) => float_blocked::backward::<FloatScalar>(grad, m, weight, &out, workers),
        #[cfg(target_arch = "x86_64")]
        (FloatPath::Avx2, _) => float_blocked::backward::<FloatAvx2>(grad, m, weight, &out, workers),
        #[cfg(target_arch = "x86_64")]
        (FloatPath::Avx512Bf16, Compute::Bf16) => {
            float_blocked::backward::<Avx512Bf16>(grad, m, weight, &out, workers);
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        (FloatPath::Amx, Compute::Bf16) => {
            float_blocked::backward::<FloatTiled<Avx512Bf16, Hardware, 2>>(grad, m, weight, &out, workers);
        }
        #[cfg(target_arch = "x86_64")]
        (FloatPath::Avx512 | FloatPath::Avx512Bf16 | FloatPath::Amx, _) => {
            float_blocked::backward::<FloatAvx512>(grad, m, weight, &out, workers);
        }
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("{path} is not available here"),
    }
    Ok(())
}

fn product(path: Path, a: Codes<'_>, b: Codes<'_>, finish: &Finish<'_>, workers: Workers<'_>) {
    if a.rows == 0 || b.rows == 0 {
        return;
    }
    if a.cols == 0 {
        return zero(a.rows, b.rows, finish);
    }
    match path {
        Path::Scalar => forward::<Scalar>(a, b, finish, workers),
        #[cfg(test)]
        Path::Emulated if a.rows > SIDE => {
            forward::<Tiled<Scalar, emulated::Emulated, 2>>(a, b, finish, workers);
        }
        #[cfg(test)]
        Path::Emulated => forward::<Tiled<Scalar, emulated::Emulated, 1>>(a, b, finish, workers),
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 => forward::<Avx2>(a, b, finish, workers),
        #[cfg(target_arch = "x86_64")]
        Path::Avx512 => forward::<Avx512>(a, b, finish, workers),
        #[cfg(target_arch = "x86_64")]
        Path::Vnni => forward::<Vnni>(a, b, finish, workers),
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Path::Amx if a.rows > SIDE => forward::<Tiled<Vnni, Hardware, 2>>(a, b, finish, workers),
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Path::Amx => forward::<Tiled<Vnni, Hardware, 1>>(a, b, finish, workers),
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        _ => unreachable!("{path} is not available here"),
    }
}

fn forward<K: Kernel>(a: Codes<'_>, b: Codes<'_>, finish: &Finish<'_>, workers: Workers<'_>) {
    if a.rows <= K::FEW_ROWS {
        direct::forward::<K>(a, b, finish, workers);
    } else {
        blocked::forward::<K>(a, b, finish, workers);
    }
}

/// Sums of nothing.
fn zero(m: usize, n: usize, finish: &Finish<'_>) {
    for row in 0..m {
        for col in (0..n).step_by(MOST_COLS) {
            let mut sums = [0; MOST_COLS];
            // SAFETY: there is one thread.
            unsafe { finish.store(row, col, &mut sums[..MOST_COLS.min(n - col)], 0, None) }
        }
    }
}

fn wide_bias(bias: Option<Floats<'_>>, n: usize) -> Result<Option<Vec<f32>>> {
    let Some(bias) = bias else {
        return Ok(None);
    };
    check_length("bias", bias.len(), n, "one per row of the weight")?;
    Ok(Some((0..n).map(|i| bias.get(i)).collect()))
}

fn factors<'a>([m, n, k]: [usize; 3], a: &'a [i8], b: &'a [i8]) -> Result<(Codes<'a>, Codes<'a>)> {
    check_length("a", a.len(), area("a", m, k)?, "rows x columns")?;
    check_length("b", b.len(), area("b", n, k)?, "rows x columns")?;
    check_columns(k)?;
    Ok((Codes { codes: a, rows: m, cols: k, pitch: k }, Codes { codes: b, rows: n, cols: k, pitch: k }))
}

fn check_columns(k: usize) -> Result<()> {
    if k <= MOST_COLUMNS {
        return Ok(());
    }
    Err(Error::argument("k", k, format!("at most {MOST_COLUMNS} columns, the sum of whose products fits 32 bits")))
}

fn area(argument: &'static str, rows: usize, cols: usize) -> Result<usize> {
    rows.checked_mul(cols)
        .ok_or_else(|| Error::argument(argument, format!("[{rows}, {cols}]"), "a number of values that fits in memory"))
}

#[cfg(test)]
mod tests;
