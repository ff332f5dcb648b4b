//! Speed of the 4-bit arithmetic on this machine, from memory to memory.
//!
//! `cargo bench -p halfbyte --bench blockwise_core [-- MEBIBYTES]` prints one row per path, type and operation: the best of
//! several runs, in gigabytes of *unquantized* values per second, on one thread and on all, beside the speed of
//! copying those values in the same run.

use std::hint::black_box;
use std::time::Instant;

use half::{bf16, f16};
use halfbyte::codebook::QuantType;
use halfbyte::dtype::Element;
use halfbyte::geometry::{BlockSize, packed_len};
use halfbyte::quant::blockwise4::{dequantize, dequantize_serial_with, quantize, quantize_serial_with};
use halfbyte::simd::Simd;
use rayon::prelude::*;

/// Runs of one measurement: at least these, and more of small sizes.
const RUNS: usize = 7;
const TOTAL: usize = 2 << 30;

fn best(bytes: usize, mut run: impl FnMut()) -> f64 {
    run();
    let times = (0..RUNS.max(TOTAL / bytes)).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    bytes as f64 / times.fold(f64::INFINITY, f64::min) / 1e9
}

/// Roughly normal weights.
fn weights<T: Element>(n: usize) -> Vec<T> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let period: Vec<T> = (0..1 << 20).map(|_| T::from_f32((0..6).map(|_| uniform()).sum::<f32>() * 0.03)).collect();
    period.into_iter().cycle().take(n).collect()
}

fn measure<T: Element>(bytes: usize, quant_types: &[QuantType]) {
    let n = bytes / size_of::<T>();
    let size = BlockSize::DEFAULT;
    let input: Vec<T> = weights(n);
    let mut out = vec![T::from_f32(1.0); n];
    let mut packed = vec![1u8; packed_len(n)];
    let mut absmax = vec![1.0f32; size.absmax_len(n)];
    let dtype = T::DTYPE;

    let one = best(bytes, || black_box(&mut out).copy_from_slice(black_box(&input)));
    let all = best(bytes, || {
        let tasks = (out.par_chunks_mut(1 << 16), input.par_chunks(1 << 16)).into_par_iter();
        tasks.for_each(|(out, input)| black_box(out).copy_from_slice(black_box(input)));
    });
    println!("{:<8} {dtype:<9} {:<4} {:<10} {one:>8.2} {all:>8.2}", "-", "-", "memcpy");
    let row = |simd: Simd, quant_type: QuantType, what: &str, one: f64, all: Option<f64>| {
        let all = all.map_or(String::from("-"), |all| format!("{all:.2}"));
        println!("{simd:<8} {dtype:<9} {quant_type:<4} {what:<10} {one:>8.2} {all:>8}");
    };
    for &quant_type in quant_types {
        for simd in Simd::available() {
            let is_active = Simd::active().is_ok_and(|active| active == simd);
            let one = best(bytes, || {
                let _ = quantize_serial_with(simd, &input, quant_type, size, &mut packed, &mut absmax).unwrap();
            });
            let all = is_active.then(|| {
                best(bytes, || {
                    let _ = quantize(&input, quant_type, size, &mut packed, &mut absmax).unwrap();
                })
            });
            row(simd, quant_type, "quantize", one, all);
            let one = best(bytes, || {
                dequantize_serial_with(simd, &packed, &absmax, quant_type, size, black_box(&mut out)).unwrap();
            });
            let all = is_active
                .then(|| best(bytes, || dequantize(&packed, &absmax, quant_type, size, black_box(&mut out)).unwrap()));
            row(simd, quant_type, "dequantize", one, all);
        }
    }
}

fn main() {
    let mebibytes = std::env::args().skip(1).find_map(|a| a.parse::<usize>().ok()).unwrap_or(256);
    let bytes = mebibytes << 20;
    println!("{mebibytes} MiB of values, blocks of 64, best of at least {RUNS}; GB/s of values");
    println!(
        "{:<8} {:<9} {:<4} {:<10} {:>8} {:>8}",
        "path",
        "dtype",
        "type",
        "op",
        "1 thread",
        rayon::current_num_threads()
    );
    measure::<bf16>(bytes, &QuantType::ALL);
    measure::<f16>(bytes, &[QuantType::Nf4]);
    measure::<f32>(bytes, &[QuantType::Nf4]);
}
