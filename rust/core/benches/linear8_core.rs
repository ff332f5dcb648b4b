//! Speed of products with weights of 8-bit rows, and of quantizing rows, on one thread unless told otherwise.
//!
//! `cargo bench -p halfbyte --bench linear8_core [-- [N K [THREADS]] [PATH]]` prints one row per path, threshold and number
//! of rows: the best of several runs over weights that are larger than the caches together, in milliseconds, 10^9
//! operations per second, and 10^9 bytes of codes per second. bfloat16 activations and results; with a threshold, 1 % of
//! the columns have outliers. Then rows to 8 bits and back, in 10^9 bytes of floats per second.

use std::hint::black_box;
use std::time::{Duration, Instant};

use half::{bf16, f16};
use halfbyte::dtype::Element;
use halfbyte::gemm::int8::{Path, Weight, linear, linear_backward};
use halfbyte::gemm::{self, Compute, Floats, FloatsMut, Workers};
use halfbyte::quant::int8_rowwise::{Precision, dequantize_rows_by, quantize_rows_by, quantize_rows_outliers};
use halfbyte::simd::Simd;
use rayon::ThreadPoolBuilder;

/// Bytes of codes that push each other out of the caches.
const CACHES: usize = 72 << 20;
const AT_LEAST: usize = 5;
const TIME: Duration = Duration::from_millis(300);

fn best(mut run: impl FnMut(usize)) -> f64 {
    run(0);
    let (start, mut best, mut calls) = (Instant::now(), f64::INFINITY, 1);
    while calls <= AT_LEAST || start.elapsed() < TIME {
        let call = Instant::now();
        run(calls);
        best = best.min(call.elapsed().as_secs_f64());
        calls += 1;
    }
    best
}

fn named(name: &str) -> bool {
    std::env::args().any(|argument| argument == name)
}

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let (n, k) = (numbers.first().copied().unwrap_or(4096), numbers.get(1).copied().unwrap_or(4096));
    let threads = numbers.get(2).copied().unwrap_or(1);
    let pool = ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    let workers = if threads == 1 { Workers::serial() } else { Workers::new(&pool, threads) };
    println!("{n} x {k}, {threads} threads\n");

    let code = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7] as i8;
    let weights: Vec<(Vec<i8>, Vec<f32>)> = (0..CACHES.div_ceil(n * k).max(2))
        .map(|seed| ((0..n * k).map(|i| code(i + seed)).collect(), (0..n).map(|i| 0.1 + i as f32 * 1e-4).collect()))
        .collect();
    let weight = |call: usize| {
        let (codes, scales) = &weights[call % weights.len()];
        Weight::new(codes, scales, n, k).expect("lengths agree")
    };
    let values = |m: usize, cols: usize| -> Vec<bf16> {
        let value = |i: usize| if i % cols % 100 == 7 { 9.0 } else { (i % 37) as f32 * 0.05 - 0.9 };
        (0..m * cols).map(|i| bf16::from_f32(value(i))).collect()
    };
    let report = |path: &str, what: &str, m: usize, seconds: f64| {
        println!(
            "{path:<11} {what:<10} {m:>5} {:>9.3} {:>9.1} {:>9.2}",
            seconds * 1e3,
            2.0 * (m * n * k) as f64 / seconds / 1e9,
            (n * k) as f64 / seconds / 1e9
        );
    };
    println!("{:<11} {:<10} {:>5} {:>9} {:>9} {:>9}", "path", "product", "rows", "ms", "Gop/s", "GB/s");
    let any = !Path::ALL.iter().any(|path| named(path.as_str()));
    for path in Path::available().filter(|path| any || named(path.as_str())) {
        for (what, threshold) in [("forward", 0.0), ("outliers", 6.0)] {
            for m in [1, 2, 4, 8, 16, 32, 128, 512] {
                if path == Path::Scalar && m > 4 {
                    continue;
                }
                let (x, mut out) = (values(m, k), vec![bf16::ZERO; m * n]);
                let seconds = best(|call| {
                    let (x, out) = (Floats::Bf16(black_box(&x)), FloatsMut::Bf16(black_box(&mut out)));
                    linear(path, workers, m, x, &weight(call), None, threshold, out).expect("lengths agree");
                });
                report(path.as_str(), what, m, seconds);
            }
        }
    }
    let any = !gemm::Path::ALL.iter().any(|path| named(path.as_str()));
    for path in gemm::Path::available().filter(|path| *path != gemm::Path::Scalar && (any || named(path.as_str()))) {
        for m in [1, 16, 128, 512] {
            let (grad, mut out) = (values(m, n), vec![bf16::ZERO; m * k]);
            let seconds = best(|call| {
                let (grad, out) = (Floats::Bf16(black_box(&grad)), FloatsMut::Bf16(black_box(&mut out)));
                linear_backward(path, workers, m, grad, &weight(call), out, Compute::Bf16).expect("lengths agree");
            });
            report(path.as_str(), "backward", m, seconds);
        }
    }

    println!("\n{:<11} {:<10} {:<20} {:>9}", "path", "dtype", "rows of 4096", "GB/s");
    pool.install(|| {
        rows::<bf16>();
        rows::<f16>();
        rows::<f32>();
    });
}

/// Rows to 8 bits and back.
fn rows<T: Element>() {
    let (rows, columns) = (4096, 4096);
    let shape = [rows, columns];
    let value = |i: usize| if i % columns % 100 == 7 { 9.0 } else { (i % 251) as f32 * 0.05 - 6.2 };
    let input: Vec<T> = (0..rows * columns).map(|i| T::from_f32(value(i))).collect();
    let (mut codes, mut scales, mut marks) = (vec![0; rows * columns], vec![0.0; rows], vec![0; columns]);
    let mut out = vec![T::default(); rows * columns];
    for simd in Simd::available().filter(|simd| *simd != Simd::Scalar) {
        let report = |what: &str, seconds: f64| {
            let speed = size_of_val(&*input) as f64 / seconds / 1e9;
            println!("{:<11} {:<10} {what:<20} {speed:>9.2}", simd.as_str(), T::DTYPE.as_str());
        };
        let input = black_box(&*input);
        report(
            "quantize",
            best(|_| quantize_rows_by(simd, input, rows, columns, &mut codes, &mut scales).expect("lengths agree")),
        );
        report(
            "quantize, outliers",
            best(|_| {
                let (full, codes, scales, marks) = (Precision::Full, &mut codes, &mut scales, &mut marks);
                quantize_rows_outliers(simd, input, full, 6.3, shape, codes, scales, marks).expect("lengths agree");
            }),
        );
        report(
            "dequantize",
            best(|_| dequantize_rows_by(simd, &codes, &scales, rows, columns, &mut out).expect("lengths agree")),
        );
    }
}
