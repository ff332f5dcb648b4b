//! Speed of products on a packed weight, on one thread unless told otherwise.
//!
//! `cargo bench -p halfbyte --bench linear_core [-- [N K [THREADS]] [PATH] [nested]]` prints one row per path, direction and
//! number of rows: the best of several runs over weights that are larger than the caches together, in milliseconds,
//! 10^9 floating-point operations per second, and 10^9 bytes of codes per second. bfloat16 activations and results, bfloat16
//! compute, NF4, blocks of 64; with `nested` the scales are quantized too.

use std::hint::black_box;
use std::time::{Duration, Instant};

use half::bf16;
use halfbyte::codebook::QuantType;
use halfbyte::gemm::{Compute, Floats, FloatsMut, Path, Scales, Weight, Workers, linear, linear_backward};
use halfbyte::geometry::BlockSize;
use halfbyte::quant::absmax::{self, Nested};
use rayon::ThreadPoolBuilder;

/// Bytes of codes that push each other out of the caches.
const CACHES: usize = 72 << 20;
const AT_LEAST: usize = 5;
const TIME: Duration = Duration::from_millis(400);

struct Codes {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    nested: Option<Nested>,
}

impl Codes {
    fn weight(&self, n: usize, k: usize) -> Weight<'_> {
        let scales = match &self.nested {
            None => Scales::Plain(&self.absmax),
            Some(Nested { codes, absmax, offset }) => Scales::Nested { codes, absmax, offset: *offset },
        };
        Weight::new(&self.packed, scales, QuantType::Nf4, BlockSize::DEFAULT, n, k).expect("lengths agree")
    }
}

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

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let (n, k) = (numbers.first().copied().unwrap_or(4096), numbers.get(1).copied().unwrap_or(4096));
    let threads = numbers.get(2).copied().unwrap_or(1);
    let pool = ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    let workers = if threads == 1 { Workers::serial() } else { Workers::new(&pool, threads) };

    let bytes = (n * k).div_ceil(2);
    let quantized_scales = std::env::args().any(|argument| argument == "nested");
    let codes: Vec<Codes> = (0..CACHES.div_ceil(bytes).max(1))
        .map(|seed| {
            let packed =
                (0..bytes).map(|i| ((i + seed) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]).collect();
            let absmax: Vec<f32> =
                (0..BlockSize::DEFAULT.absmax_len(n * k)).map(|i| 0.02 + (i % 7) as f32 * 0.01).collect();
            let nested = quantized_scales.then(|| absmax::quantize_absmax(&absmax));
            Codes { packed, absmax, nested }
        })
        .collect();
    let scales = if quantized_scales { "nested" } else { "float32" };
    println!("{n} x {k}, {threads} threads, {scales} scales\n");
    println!("{:<11} {:<9} {:>5} {:>9} {:>9} {:>9}", "path", "direction", "rows", "ms", "GFLOP/s", "GB/s");
    let named = |path: &Path| std::env::args().any(|argument| argument == path.as_str());
    let any = !Path::ALL.iter().any(named);
    for path in Path::available().filter(|path| any || named(path)) {
        for (direction, depth, cols) in [("forward", k, n), ("backward", n, k)] {
            for m in [1, 2, 4, 8, 16, 32, 64, 128, 512] {
                if path == Path::Scalar && m > 16 {
                    continue;
                }
                let x: Vec<bf16> = (0..m * depth).map(|i| bf16::from_f32((i % 37) as f32 * 0.05 - 0.9)).collect();
                let mut out = vec![bf16::ZERO; m * cols];
                let seconds = best(|call| {
                    let weight = codes[call % codes.len()].weight(n, k);
                    let (x, out) = (Floats::Bf16(black_box(&x)), FloatsMut::Bf16(black_box(&mut out)));
                    let done = match direction {
                        "forward" => linear(path, workers, m, x, &weight, None, out, Compute::Bf16),
                        _ => linear_backward(path, workers, m, x, &weight, out, Compute::Bf16),
                    };
                    done.expect("lengths agree");
                });
                println!(
                    "{path:<11} {direction:<9} {m:>5} {:>9.3} {:>9.1} {:>9.2}",
                    seconds * 1e3,
                    2.0 * (m * n * k) as f64 / seconds / 1e9,
                    bytes as f64 / seconds / 1e9
                );
            }
        }
    }
}
