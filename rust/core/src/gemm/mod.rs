//! Products with a packed weight: `x · Wᵀ` and `grad · W`, without a dense copy of the weight.
//!
//! # What is rounded, and when
//! The result that is approximated is that of `linear(x.to(compute), W.to(compute), bias)` with `W` dequantized.
//!
//! - Activations (and gradients) are rounded to the compute type first; that is exact when they have it already.
//! - Weights are `codebook[code] * scale` in float32, rounded to bfloat16 when [`Path::rounds_weights`] says so (bfloat16
//!   compute on AVX512-BF16 and AMX) and not at all otherwise: float16 compute, and bfloat16 compute on other paths, are
//!   more exact than the reference. In `direct` it is the codebook that is rounded, not the product with the scale: a
//!   relative error of at most 2⁻⁸ per weight either way. A single row of gradients meets exact weights.
//! - Products are added up in float32, in an order that depends on the shape and the path, and on neither the run nor
//!   the number of threads: the same bits every time. AVX512-BF16 and AMX round sums to nearest and take denormals for
//!   zero.
//! - The bias is added in float32, and the sum is rounded once, to the type of the result.
//!
//! So with `u = 2⁻²⁴` and `e = 2⁻⁸` (weights rounded) or 0, a result differs from the exact one (of rounded
//! activations) by at most `(e + (k + 8) u) · Σ |x·w|`, plus the rounding to the result's type; sums below 2⁻¹⁰⁰ aside.
//! A scale that is not finite makes the results it has a part in not finite.
//!
//! # How
//! Few rows of activations or gradients are multiplied with codes looked up in registers (`direct`), on AMX with codes
//! looked up for its tiles (`direct::tiles`); where codes begin in the middle of a byte or a block, activations with a row
//! of the weight decoded into the first-level cache; many rows with a tile of the weight decoded into the second-level
//! cache (`blocked`). A thread needs 1.1 MB at most, and the rounded activations of up to 512 rows are held once. Threads
//! share results, never a sum.

#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code, reason = "no tiles here"))]
mod blocked;
mod compute;
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code, reason = "no tiles here"))]
mod direct;
pub mod experts;
mod floats;
pub mod int8;
mod matrix;
mod out;
mod path;
mod scratch;
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code, reason = "no tiles here"))]
mod tiles;
mod weight;
mod workers;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::error::{Error, Result};
use crate::geometry::check_length;

use blocked::kernel::Kernel;
use blocked::scalar::Scalar;
use blocked::tiled::Tiled;
pub use compute::Compute;
use direct::Direct;
use direct::tiles::DecodesGroups;
pub use floats::{Floats, FloatsMut};
use matrix::Matrix;
use out::Out;
pub use path::Path;
#[cfg(test)]
use tests::emulated;
use tiles::{DIRECT_ROWS, SIDE, Tiles};
pub use weight::{Scales, Weight};
pub use workers::{Parallel, Workers};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use x86::amx::Hardware;
#[cfg(target_arch = "x86_64")]
use x86::{
    avx2::Avx2,
    avx512::{Avx512, Avx512Bf16},
    direct_avx2::DIRECT as DIRECT_AVX2,
    direct_avx512::{BF16 as DIRECT_BF16, F32 as DIRECT_F32},
};

/// Multiplications that one thread does in the time it takes to wake another: tens of microseconds.
const SERIAL_WORK: usize = 1 << 20;

/// `out[m, n] = x[m, k] · weight[n, k]ᵀ + bias[n]`, all row-major. The module's description is the contract.
///
/// # Errors
/// [`Error::Argument`] unless the lengths of `x`, `bias` and `out` are those of `m` rows, and when this machine lacks
/// the path.
#[allow(clippy::too_many_arguments, reason = "a product has that many")]
pub fn linear(
    path: Path,
    workers: Workers<'_>,
    m: usize,
    x: Floats<'_>,
    weight: &Weight<'_>,
    bias: Option<Floats<'_>>,
    out: FloatsMut<'_>,
    compute: Compute,
) -> Result<()> {
    let path = path.checked()?;
    let (n, k) = (weight.rows(), weight.cols());
    check_length("x", x.len(), area("x", m, k)?, "rows of the weight's columns")?;
    check_length("out", out.len(), area("out", m, n)?, "rows of the weight's rows")?;
    if let Some(bias) = bias {
        check_length("bias", bias.len(), n, "one per row of the weight")?;
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    let bias: Option<Vec<f32>> = bias.map(|bias| (0..n).map(|i| bias.get(i)).collect());
    let out = Out::all(out.share(), n, bias.as_deref());
    if k == 0 {
        zero(m, &out);
        return Ok(());
    }
    let x = Matrix { floats: x, cols: k, compute };
    let workers = workers.for_work(m.saturating_mul(n).saturating_mul(k), SERIAL_WORK);
    forward_on(path, x, m, weight, &out, workers);
    Ok(())
}

/// The columns of `x · weightᵀ` that `out` wants. The path is available, and neither `m` nor `k` is zero.
fn forward_on(path: Path, x: Matrix<'_>, m: usize, weight: &Weight<'_>, out: &Out<'_>, workers: Workers<'_>) {
    match (path, x.compute) {
        (Path::Scalar, _) => forward::<Scalar>(None, x, m, weight, out, workers),
        #[cfg(test)]
        (Path::Emulated, Compute::Bf16) => {
            forward_tiled::<emulated::Pairs, emulated::Emulated>(None, x, m, weight, out, workers)
        }
        #[cfg(test)]
        (Path::Emulated, _) => forward::<Scalar>(None, x, m, weight, out, workers),
        #[cfg(target_arch = "x86_64")]
        (Path::Avx2, _) => forward::<Avx2>(Some(DIRECT_AVX2), x, m, weight, out, workers),
        #[cfg(target_arch = "x86_64")]
        (Path::Avx512Bf16, Compute::Bf16) => forward::<Avx512Bf16>(Some(DIRECT_BF16), x, m, weight, out, workers),
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        (Path::Amx, Compute::Bf16) => {
            forward_tiled::<Avx512Bf16, Hardware>(Some(DIRECT_BF16), x, m, weight, out, workers)
        }
        #[cfg(target_arch = "x86_64")]
        (Path::Avx512 | Path::Avx512Bf16 | Path::Amx, _) => {
            forward::<Avx512>(Some(DIRECT_F32), x, m, weight, out, workers)
        }
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("{path} is not available here"),
    }
}

fn forward<K: Kernel>(
    direct: Option<Direct>,
    x: Matrix<'_>,
    m: usize,
    weight: &Weight<'_>,
    out: &Out<'_>,
    workers: Workers<'_>,
) {
    match direct {
        Some(direct) if m <= direct.rows && direct::takes(weight) => {
            direct::forward(direct, x, m, weight, out, workers);
        }
        _ if m <= K::FEW_ROWS => blocked::forward_few::<K>(x, m, weight, out, workers),
        _ => blocked::forward::<K>(x, m, weight, out, workers),
    }
}

/// Few rows by a path of their own; the others in panels of one tile or two.
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code, reason = "no tiles here"))]
fn forward_tiled<K: Kernel + DecodesGroups, T: Tiles>(
    direct: Option<Direct>,
    x: Matrix<'_>,
    m: usize,
    weight: &Weight<'_>,
    out: &Out<'_>,
    workers: Workers<'_>,
) {
    let direct = direct.map(|direct| Direct { rows: direct.rows.min(DIRECT_ROWS), ..direct });
    if m > SIDE {
        forward::<Tiled<K, T, 2>>(direct, x, m, weight, out, workers);
    } else if m > DIRECT_ROWS && direct::takes(weight) {
        direct::tiles::forward::<K, T>(x, m, weight, out, workers);
    } else {
        forward::<Tiled<K, T, 1>>(direct, x, m, weight, out, workers);
    }
}

/// `out[m, k] = grad[m, n] · weight[n, k]`, all row-major: the gradient of [`linear`]'s `x`. The module's description is
/// the contract.
///
/// # Errors
/// [`Error::Argument`] unless the lengths of `grad` and `out` are those of `m` rows, and when this machine lacks the
/// path.
pub fn linear_backward(
    path: Path,
    workers: Workers<'_>,
    m: usize,
    grad: Floats<'_>,
    weight: &Weight<'_>,
    out: FloatsMut<'_>,
    compute: Compute,
) -> Result<()> {
    let path = path.checked()?;
    let (n, k) = (weight.rows(), weight.cols());
    check_length("grad", grad.len(), area("grad", m, n)?, "rows of the weight's rows")?;
    check_length("out", out.len(), area("out", m, k)?, "rows of the weight's columns")?;
    if m == 0 || k == 0 {
        return Ok(());
    }
    let out = Out::all(out.share(), k, None);
    if n == 0 {
        zero(m, &out);
        return Ok(());
    }
    let grad = Matrix { floats: grad, cols: n, compute };
    let workers = workers.for_work(m.saturating_mul(n).saturating_mul(k), SERIAL_WORK);
    match (path, compute) {
        (Path::Scalar, _) => backward::<Scalar>(None, grad, m, weight, &out, workers),
        #[cfg(test)]
        (Path::Emulated, Compute::Bf16) => {
            backward::<Tiled<emulated::Pairs, emulated::Emulated, 2>>(None, grad, m, weight, &out, workers)
        }
        #[cfg(test)]
        (Path::Emulated, _) => backward::<Scalar>(None, grad, m, weight, &out, workers),
        #[cfg(target_arch = "x86_64")]
        (Path::Avx2, _) => backward::<Avx2>(Some(DIRECT_AVX2), grad, m, weight, &out, workers),
        #[cfg(target_arch = "x86_64")]
        (Path::Avx512Bf16, Compute::Bf16) => backward::<Avx512Bf16>(Some(DIRECT_BF16), grad, m, weight, &out, workers),
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        (Path::Amx, Compute::Bf16) => {
            backward::<Tiled<Avx512Bf16, Hardware, 2>>(Some(DIRECT_BF16), grad, m, weight, &out, workers)
        }
        #[cfg(target_arch = "x86_64")]
        (Path::Avx512 | Path::Avx512Bf16 | Path::Amx, _) => {
            backward::<Avx512>(Some(DIRECT_F32), grad, m, weight, &out, workers)
        }
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("{path} is not available here"),
    }
    Ok(())
}

fn backward<K: Kernel>(
    direct: Option<Direct>,
    grad: Matrix<'_>,
    m: usize,
    weight: &Weight<'_>,
    out: &Out<'_>,
    workers: Workers<'_>,
) {
    match direct {
        Some(direct) if m <= direct.backward_rows && direct::takes(weight) => {
            direct::backward(direct, grad, m, weight, out, workers);
        }
        _ => blocked::backward::<K>(grad, m, weight, out, workers),
    }
}

/// Sums of nothing.
fn zero(m: usize, out: &Out<'_>) {
    let mut row = vec![0.0; out.cols];
    for i in 0..m {
        row.fill(0.0);
        // SAFETY: there is one thread.
        unsafe { out.store(i, 0, &mut row) }
    }
}

fn area(argument: &'static str, rows: usize, cols: usize) -> Result<usize> {
    rows.checked_mul(cols).ok_or_else(|| {
        Error::argument(argument, format!("[{rows}, {cols}]"), "of a number of values that fits in memory")
    })
}

#[cfg(test)]
mod tests;
