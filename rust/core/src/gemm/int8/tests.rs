//! Every path against the definition, bit for bit.

use half::{bf16, f16};
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

use super::*;
use crate::gemm::tests::Owned;
use crate::simd::Simd;

/// A number below 2^32, from another.
fn next(state: &mut u64) -> u32 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 32) as u32
}

/// Codes of all 256 values, the extremes among them more often.
fn codes(n: usize, seed: u64) -> Vec<i8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let code = |bits: u32| match bits % 8 {
        0 => -128,
        1 => 127,
        _ => (bits >> 8) as i8,
    };
    (0..n).map(|_| code(next(&mut state))).collect()
}

/// Numbers of very different sizes, in magnitude 8 at most but for one in `rare`.
fn numbers(n: usize, rare: u32, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            let (a, b) = (next(&mut state), next(&mut state));
            let small = (a as f32 / u32::MAX as f32 - 0.5) * 8.0;
            if b.is_multiple_of(rare) { small * 9.0 } else { small }
        })
        .collect()
}

fn sums([m, n, k]: [usize; 3], a: &[i8], b: &[i8]) -> Vec<i32> {
    let sum = |i: usize, j: usize| (0..k).map(|p| i64::from(a[i * k + p]) * i64::from(b[j * k + p])).sum::<i64>();
    (0..m * n).map(|at| sum(at / n, at % n) as i32).collect()
}

/// The type's nearest number.
fn stored(value: f32, dtype: Compute) -> f32 {
    match dtype {
        Compute::F32 => value,
        Compute::F16 => f16::from_f32(value).to_f32(),
        Compute::Bf16 => bf16::from_f32(value).to_f32(),
    }
}

/// 11 significant bits, in float64: exact where float64's range is more than float32's.
fn short(x: f32) -> f32 {
    if x == 0.0 || !x.is_finite() || x.is_subnormal() {
        let bits = x.to_bits();
        let rounded = (u64::from(bits) + 0x0fff + u64::from(bits >> 13 & 1)) & !0x1fff;
        return if x.is_finite() { f32::from_bits(rounded as u32) } else { x };
    }
    let unit = 2f64.powi(x.abs().log2().floor() as i32 - 10);
    let unit = if f64::from(x.abs()) < unit * 1024.0 { unit / 2.0 } else { unit };
    ((f64::from(x) / unit).round_ties_even() * unit) as f32
}

/// One linear layer.
#[derive(Debug, Clone)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    dtype: Compute,
    bias: Option<Compute>,
    threshold: f32,
    seed: u64,
}

struct Operands {
    x: Owned,
    codes: Vec<i8>,
    scales: Vec<f32>,
    bias: Option<Owned>,
}

impl Case {
    fn operands(&self) -> Operands {
        let mut x = numbers(self.m * self.k, 97, self.seed);
        if self.seed.is_multiple_of(3)
            && let [first, .., last] = &mut x[..]
        {
            (*first, *last) = (f32::NAN, f32::INFINITY);
        }
        Operands {
            x: Owned::new(&x, self.dtype),
            codes: codes(self.n * self.k, self.seed ^ 1),
            scales: numbers(self.n, 1000, self.seed ^ 2).iter().map(|s| s.abs() * 0.1).collect(),
            bias: self.bias.map(|dtype| Owned::new(&numbers(self.n, 1000, self.seed ^ 3), dtype)),
        }
    }

    fn run(&self, path: Path, workers: Workers<'_>) -> Vec<u32> {
        let Operands { x, codes, scales, bias } = self.operands();
        let weight = Weight::new(&codes, &scales, self.n, self.k).unwrap();
        let mut out = Owned::new(&vec![f32::NAN; self.m * self.n], self.dtype);
        let bias = bias.as_ref().map(Owned::floats);
        let (m, threshold) = (self.m, self.threshold);
        linear(path, workers, m, x.floats(), &weight, bias, threshold, out.floats_mut()).unwrap();
        out.values().into_iter().map(f32::to_bits).collect()
    }

    /// The contract, word for word.
    fn expected(&self) -> Vec<u32> {
        let Operands { x, codes, scales, bias } = self.operands();
        let (m, n, k) = (self.m, self.n, self.k);
        let (plain, bias) = (x.values(), bias.map(|bias| bias.values()));
        let x: Vec<f32> = plain.iter().map(|&x| short(x)).collect();
        let outlier = |v: f32| self.threshold > 0.0 && v.abs() >= self.threshold;
        let columns: Vec<usize> = (0..k).filter(|c| (0..m).any(|r| outlier(x[r * k + c]))).collect();
        let mut row_scales = vec![0.0f32; m];
        let mut row_codes = vec![0i8; m * k];
        for r in 0..m {
            let row = &x[r * k..][..k];
            let counts = row.iter().filter(|&&v| !v.is_nan() && !outlier(v));
            row_scales[r] = counts.fold(0.0, |scale, v| scale.max(v.abs()));
            for c in (0..k).filter(|c| !columns.contains(c)) {
                row_codes[r * k + c] = (row[c] * 127.0 / row_scales[r]).round_ties_even() as i8;
            }
        }
        let sums = sums([m, n, k], &row_codes, &codes);
        let value = |at: usize| {
            let (r, c) = (at / n, at % n);
            let mut v = sums[at] as f32 * (row_scales[r] * (1.0 / 127.0));
            if !columns.is_empty() {
                let mut sum = 0.0;
                columns.iter().for_each(|p| sum += plain[r * k + p] * f32::from(codes[c * k + p]));
                v += sum;
            }
            v *= scales[c] * (1.0 / 127.0);
            if let Some(bias) = &bias {
                v += bias[c];
            }
            stored(v, self.dtype).to_bits()
        };
        (0..m * n).map(value).collect()
    }

    /// That all paths agree with the contract; of NaN, that it is one.
    fn check(&self, workers: Workers<'_>) {
        let expected = self.expected();
        for path in Path::available() {
            let found = self.run(path, workers);
            for (at, (&a, &b)) in found.iter().zip(&expected).enumerate() {
                let (a, b) = (f32::from_bits(a), f32::from_bits(b));
                assert!(
                    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
                    "{path}: {at} is {a}, not {b}: {self:?}"
                );
            }
        }
    }
}

/// Around the sizes that the code treats apart: words, steps, chunks, panels, tiles, blocks of rows.
const SHAPES: [[usize; 3]; 22] = [
    [1, 1, 1],
    [1, 1, 31],
    [2, 3, 33],
    [3, 5, 64],
    [4, 7, 63],
    [5, 2, 130],
    [8, 33, 128],
    [9, 7, 65],
    [9, 50, 320],
    [16, 49, 127],
    [17, 13, 2],
    [31, 6, 515],
    [32, 25, 513],
    [33, 12, 96],
    [65, 11, 100],
    [513, 3, 5],
    [12, 97, 7],
    [2, 3, 4160],
    [9, 3, 2049],
    [10, 4, 4097],
    [1, 70, 4101],
    [20, 100, 9],
];

#[test]
fn sums_are_exact() {
    for [m, n, k] in SHAPES {
        let (a, b) = (codes(m * k, 5), codes(n * k, 6));
        let expected = sums([m, n, k], &a, &b);
        for path in Path::available() {
            let mut out = vec![77; m * n];
            matmul(path, Workers::serial(), [m, n, k], &a, &b, &mut out).unwrap();
            assert_eq!(out, expected, "{path} {m} {n} {k}");
        }
    }
}

#[test]
fn extreme_codes_do_not_saturate() {
    for k in [64, 1000, 131_071] {
        for (first, second) in [(-128, -128), (-128, 127), (127, 127), (-128, -127)] {
            for m in [1, 9, 20] {
                let (a, b) = (vec![first; m * k], vec![second; 3 * k]);
                let expected = vec![i32::from(first) * i32::from(second) * k as i32; m * 3];
                for path in Path::available().filter(|&path| k < 2000 || path.simd() != Simd::Scalar) {
                    let mut out = vec![77; m * 3];
                    matmul(path, Workers::serial(), [m, 3, k], &a, &b, &mut out).unwrap();
                    assert_eq!(out, expected, "{path} {m} {k}");
                }
            }
        }
    }
}

#[test]
fn layers_of_all_sizes() {
    for (seed, [m, n, k]) in SHAPES.into_iter().enumerate() {
        for threshold in [0.0, 6.0] {
            for dtype in Compute::ALL {
                let bias = (seed % 2 == 0).then_some(dtype);
                Case { m, n, k, dtype, bias, threshold, seed: seed as u64 }.check(Workers::serial());
            }
        }
    }
}

#[test]
fn every_number_of_threads_gives_the_same_bits() {
    let pools: Vec<_> = [2, 5].map(|n| ThreadPoolBuilder::new().num_threads(n).build().unwrap()).into();
    for [m, n, k] in [[1, 150, 2112], [7, 70, 1027], [20, 133, 515]] {
        for threshold in [0.0, 6.0] {
            let case = Case { m, n, k, dtype: Compute::Bf16, bias: None, threshold, seed: 5 };
            for path in Path::available() {
                let alone = case.run(path, Workers::serial());
                for pool in &pools {
                    assert_eq!(
                        case.run(path, Workers::new(pool, pool.current_num_threads())),
                        alone,
                        "{path} {case:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn nothing_at_all() {
    for [m, n, k] in [[0, 3, 5], [2, 0, 5], [2, 3, 0], [0, 0, 0], [9, 70, 0]] {
        for threshold in [0.0, 6.0] {
            for bias in [None, Some(Compute::F16)] {
                Case { m, n, k, dtype: Compute::F32, bias, threshold, seed: 5 }.check(Workers::serial());
            }
        }
    }
}

#[test]
fn values_of_sums_are_those_of_the_layer() {
    for [m, n, k] in SHAPES {
        let (a, b) = (codes(m * k, 5), codes(n * k, 6));
        let (rows, columns) = (numbers(m, 9, 7), numbers(n, 9, 8));
        let bias = numbers(n, 9, 9);
        let sums = sums([m, n, k], &a, &b);
        for path in Path::available() {
            let mut out = vec![bf16::ZERO; m * n];
            let (bias_, result) = (Some(Floats::F32(&bias)), FloatsMut::Bf16(&mut out));
            scaled(path, Workers::serial(), [m, n, k], &a, &b, &rows, &columns, bias_, result).unwrap();
            for (at, value) in out.into_iter().enumerate() {
                let v = sums[at] as f32 * (rows[at / n] * (1.0 / 127.0)) * (columns[at % n] * (1.0 / 127.0));
                assert_eq!(value, bf16::from_f32(v + bias[at % n]), "{path} {m} {n} {k} {at}");
            }
        }
    }
}

#[test]
fn wrong_calls_are_errors() {
    let text = |k: usize, threshold: f32, bias: usize, out: usize| {
        let (codes, scales, x) = (vec![0; 2 * k], [1.0; 2], vec![0.0; 3 * k]);
        let weight = Weight::new(&codes, &scales, 2, k).unwrap();
        let (bias, mut out) = (vec![0.0; bias], vec![0.0; out]);
        let (x, bias, out) = (Floats::F32(&x), Some(Floats::F32(&bias)), FloatsMut::F32(&mut out));
        linear(Path::Scalar, Workers::serial(), 3, x, &weight, bias, threshold, out).map_err(|error| error.to_string())
    };
    assert_eq!(text(4, 0.0, 2, 6), Ok(()));
    assert_eq!(text(4, -1.0, 2, 6).unwrap_err(), "threshold must be a number of at least 0 (0 turns it off), got -1");
    assert!(text(4, f32::NAN, 2, 6).is_err());
    assert_eq!(text(4, 0.0, 3, 6).unwrap_err(), "bias must be 2 elements long (one per row of the weight), got 3");
    assert_eq!(text(4, 0.0, 2, 5).unwrap_err(), "out must be 6 elements long (rows of the weight's rows), got 5");
    assert_eq!(
        text(133_145, 0.0, 2, 6).unwrap_err(),
        "k must be at most 133144 columns, the sum of whose products fits 32 bits, got 133145"
    );
    assert_eq!(
        Weight::new(&[0; 8], &[1.0], 2, 4).unwrap_err().to_string(),
        "scales must be 2 elements long (one scale per row), got 1"
    );
}

/// The gradient of a layer against float64.
fn check_backward([m, n, k]: [usize; 3], dtype: Compute, seed: u64) {
    let (codes, grad) = (codes(n * k, seed), Owned::new(&numbers(m * n, 1000, seed ^ 1), dtype));
    let scales: Vec<f32> = numbers(n, 1000, seed ^ 2).iter().map(|s| s.abs() * 0.1).collect();
    let weight = Weight::new(&codes, &scales, n, k).unwrap();
    let weights: Vec<f64> =
        (0..n * k).map(|at| f64::from(stored(f32::from(codes[at]) * scales[at / k] * (1.0 / 127.0), dtype))).collect();
    let grads: Vec<f64> = grad.values().into_iter().map(f64::from).collect();
    for path in FloatPath::available() {
        let mut out = vec![f32::NAN; m * k];
        linear_backward(path, Workers::serial(), m, grad.floats(), &weight, FloatsMut::F32(&mut out), dtype).unwrap();
        for (at, found) in out.into_iter().enumerate() {
            let products = (0..n).map(|p| grads[at / k * n + p] * weights[p * k + at % k]);
            let (exact, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
            let error = (f64::from(found) - exact).abs();
            assert!(error <= (n as f64 + 8.0) * 2f64.powi(-24) * size + 1e-30, "{path} {m} {n} {k}: {found} {exact}");
        }
    }
}

#[test]
fn gradients_of_all_sizes() {
    for (seed, [m, k, n]) in SHAPES.into_iter().enumerate() {
        for dtype in Compute::ALL {
            check_backward([m, n, k], dtype, seed as u64);
        }
    }
    for [m, n, k] in [[0, 3, 5], [2, 0, 5], [2, 3, 0]] {
        check_backward([m, n, k], Compute::Bf16, 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn layers_are_as_defined(
        m in prop_oneof![1usize..12, 12usize..40],
        n in 1usize..70,
        k in 1usize..300,
        dtype in prop::sample::select(Compute::ALL.to_vec()),
        bias in prop::option::of(prop::sample::select(Compute::ALL.to_vec())),
        threshold in prop::sample::select(vec![0.0f32, 1e-30, 3.0, 6.0, 30.0, f32::INFINITY]),
        seed in any::<u64>(),
    ) {
        Case { m, n, k, dtype, bias, threshold, seed }.check(Workers::serial());
    }
}
