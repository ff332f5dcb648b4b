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
//! looked up for its tiles (`direct_tiles`); where codes begin in the middle of a byte or a block, activations with a row
//! of the weight decoded into the first-level cache; many rows with a tile of the weight decoded into the second-level
//! cache (`blocked`). A thread needs 1.1 MB at most, and the rounded activations of up to 512 rows are held once. Threads
//! share results, never a sum.

#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code, reason = "no tiles here"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocked;
mod direct;
#[cfg(target_arch = "x86_64")]
mod direct_avx2;
#[cfg(target_arch = "x86_64")]
mod direct_bf16;
#[cfg(target_arch = "x86_64")]
mod direct_f32;
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code, reason = "no tiles here"))]
mod direct_tiles;
mod floats;
mod kernel;
mod pack;
mod path;
mod scratch;
mod weight;
mod workers;

use std::str::FromStr;

use crate::blockwise::check_length;
use crate::error::{Error, Result};

use amx::{DIRECT_ROWS, SIDE, Tiled, Tiles};
use blocked::Out;
use direct_tiles::DecodesGroups;
pub use floats::{Floats, FloatsMut};
use kernel::{Kernel, Scalar};
use pack::Matrix;
pub use path::Path;
#[cfg(test)]
use tests::emulated;
pub use weight::{Scales, Weight};
pub use workers::{Parallel, Workers};

/// Multiplications that one thread does in the time it takes to wake another: tens of microseconds.
const SERIAL_WORK: usize = 1 << 20;

/// The type that activations are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compute {
    /// float32
    F32,
    /// float16
    F16,
    /// bfloat16
    Bf16,
}

impl Compute {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The name in torch.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

impl FromStr for Compute {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|c| c.as_str() == name).ok_or_else(|| {
            let legal = Self::ALL.map(Self::as_str);
            Error::argument("compute_dtype", format!("{name:?}"), format!("one of {legal:?}"))
        })
    }
}

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
    let out = Out { values: out.share(), cols: n, bias: bias.as_deref() };
    if k == 0 {
        zero(m, &out);
        return Ok(());
    }
    let x = Matrix { floats: x, cols: k, compute };
    let workers = workers.for_work(m.saturating_mul(n).saturating_mul(k), SERIAL_WORK);
    match (path, compute) {
        (Path::Scalar, _) => forward::<Scalar>(x, m, weight, &out, workers),
        #[cfg(test)]
        (Path::Emulated, Compute::Bf16) => {
            forward_tiled::<emulated::Pairs, emulated::Emulated>(x, m, weight, &out, workers)
        }
        #[cfg(test)]
        (Path::Emulated, _) => forward::<Scalar>(x, m, weight, &out, workers),
        #[cfg(target_arch = "x86_64")]
        (Path::Avx2, _) => forward::<avx2::Avx2>(x, m, weight, &out, workers),
        #[cfg(target_arch = "x86_64")]
        (Path::Avx512Bf16, Compute::Bf16) => forward::<avx512::Avx512Bf16>(x, m, weight, &out, workers),
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        (Path::Amx, Compute::Bf16) => {
            forward_tiled::<avx512::Avx512Bf16, amx::hardware::Hardware>(x, m, weight, &out, workers)
        }
        #[cfg(target_arch = "x86_64")]
        (Path::Avx512 | Path::Avx512Bf16 | Path::Amx, _) => forward::<avx512::Avx512>(x, m, weight, &out, workers),
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("{path} is not available here"),
    }
    Ok(())
}

fn forward<K: Kernel>(x: Matrix<'_>, m: usize, weight: &Weight<'_>, out: &Out<'_>, workers: Workers<'_>) {
    match K::direct() {
        Some(direct) if m <= direct.rows && direct::takes(weight) => {
            direct::forward(direct, x, m, weight, out, workers);
        }
        _ if m <= K::FEW_ROWS => blocked::forward_few::<K>(x, m, weight, out, workers),
        _ => blocked::forward::<K>(x, m, weight, out, workers),
    }
}

/// Few rows by a path of their own; the others in panels of one tile or two.
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code, reason = "no tiles here"))]
fn forward_tiled<K: DecodesGroups, T: Tiles>(
    x: Matrix<'_>,
    m: usize,
    weight: &Weight<'_>,
    out: &Out<'_>,
    workers: Workers<'_>,
) {
    if m > SIDE {
        forward::<Tiled<K, T, 2>>(x, m, weight, out, workers);
    } else if m > DIRECT_ROWS && direct::takes(weight) {
        direct_tiles::forward::<K, T>(x, m, weight, out, workers);
    } else {
        forward::<Tiled<K, T, 1>>(x, m, weight, out, workers);
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
    let out = Out { values: out.share(), cols: k, bias: None };
    if n == 0 {
        zero(m, &out);
        return Ok(());
    }
    let grad = Matrix { floats: grad, cols: n, compute };
    let workers = workers.for_work(m.saturating_mul(n).saturating_mul(k), SERIAL_WORK);
    match (path, compute) {
        (Path::Scalar, _) => backward::<Scalar>(grad, m, weight, &out, workers),
        #[cfg(test)]
        (Path::Emulated, Compute::Bf16) => {
            backward::<Tiled<emulated::Pairs, emulated::Emulated, 2>>(grad, m, weight, &out, workers)
        }
        #[cfg(test)]
        (Path::Emulated, _) => backward::<Scalar>(grad, m, weight, &out, workers),
        #[cfg(target_arch = "x86_64")]
        (Path::Avx2, _) => backward::<avx2::Avx2>(grad, m, weight, &out, workers),
        #[cfg(target_arch = "x86_64")]
        (Path::Avx512Bf16, Compute::Bf16) => backward::<avx512::Avx512Bf16>(grad, m, weight, &out, workers),
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        (Path::Amx, Compute::Bf16) => {
            backward::<Tiled<avx512::Avx512Bf16, amx::hardware::Hardware, 2>>(grad, m, weight, &out, workers)
        }
        #[cfg(target_arch = "x86_64")]
        (Path::Avx512 | Path::Avx512Bf16 | Path::Amx, _) => backward::<avx512::Avx512>(grad, m, weight, &out, workers),
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("{path} is not available here"),
    }
    Ok(())
}

fn backward<K: Kernel>(grad: Matrix<'_>, m: usize, weight: &Weight<'_>, out: &Out<'_>, workers: Workers<'_>) {
    match K::direct() {
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
    rows.checked_mul(cols)
        .ok_or_else(|| Error::argument(argument, format!("[{rows}, {cols}]"), "a number of values that fits in memory"))
}

#[cfg(test)]
mod tests;
