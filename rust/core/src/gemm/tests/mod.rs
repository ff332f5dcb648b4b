//! Every path against float64.

pub(super) mod emulated;

use half::{bf16, f16};
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

use super::*;
use crate::codebook::QuantType;
use crate::geometry::{BlockSize, packed_len};
use crate::quant::absmax::{self, Nested};
use crate::quant::blockwise4::quantize_serial;

/// Roughly normal numbers.
pub(super) fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..4).map(|_| uniform()).sum::<f32>()).collect()
}

/// Floats of one of the types, owned.
#[derive(Clone, Debug)]
pub(super) enum Owned {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Owned {
    pub fn new(values: &[f32], dtype: Compute) -> Self {
        match dtype {
            Compute::F32 => Self::F32(values.to_vec()),
            Compute::F16 => Self::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            Compute::Bf16 => Self::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
        }
    }

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

    pub fn values(&self) -> Vec<f32> {
        (0..self.floats().len()).map(|i| self.floats().get(i)).collect()
    }
}

pub(super) fn rounded(value: f32, dtype: Compute) -> f32 {
    match dtype {
        Compute::F32 => value,
        Compute::F16 => f16::from_f32(value).to_f32(),
        Compute::Bf16 => bf16::from_f32(value).to_f32(),
    }
}

/// A quantized weight and what it means.
pub(super) struct Packed {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    nested: Option<Nested>,
    quant_type: QuantType,
    blocksize: BlockSize,
    n: usize,
    k: usize,
}

impl Packed {
    pub fn new(n: usize, k: usize, quant_type: QuantType, blocksize: usize, nested: bool, seed: u64) -> Self {
        let blocksize = BlockSize::new(blocksize).unwrap();
        let mut packed = vec![0; packed_len(n * k)];
        let mut absmax = vec![0.0; blocksize.absmax_len(n * k)];
        let values: Vec<f32> = numbers(n * k, seed).into_iter().map(|v| v * 0.05).collect();
        let _ = quantize_serial(&values, quant_type, blocksize, &mut packed, &mut absmax).unwrap();
        let nested = nested.then(|| absmax::quantize_absmax(&absmax));
        if let Some(Nested { codes, absmax: absmax2, offset }) = &nested {
            absmax::dequantize_absmax(codes, absmax2, *offset, &mut absmax).unwrap();
        }
        Self { packed, absmax, nested, quant_type, blocksize, n, k }
    }

    pub fn weight(&self) -> Weight<'_> {
        let scales = match &self.nested {
            None => Scales::Plain(&self.absmax),
            Some(Nested { codes, absmax, offset }) => Scales::Nested { codes, absmax, offset: *offset },
        };
        Weight::new(&self.packed, scales, self.quant_type, self.blocksize, self.n, self.k).unwrap()
    }

    /// The exact float32 value of every weight.
    pub fn values(&self) -> Vec<f32> {
        let at = |i: usize| {
            let byte = self.packed[i / 2];
            let code = if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
            self.quant_type.values()[usize::from(code)] * self.absmax[i / self.blocksize.get()]
        };
        (0..self.n * self.k).map(at).collect()
    }
}

/// One product, forward or backward.
#[derive(Debug, Clone)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    quant_type: QuantType,
    blocksize: usize,
    nested: bool,
    input: Compute,
    output: Compute,
    compute: Compute,
    bias: Option<Compute>,
    backward: bool,
    seed: u64,
}

impl Case {
    fn run(&self, path: Path, workers: Workers<'_>) -> Owned {
        let (packed, input, bias) = self.operands();
        let cols = if self.backward { self.k } else { self.n };
        let mut out = Owned::new(&vec![f32::NAN; self.m * cols], self.output);
        let weight = packed.weight();
        if self.backward {
            linear_backward(path, workers, self.m, input.floats(), &weight, out.floats_mut(), self.compute).unwrap();
        } else {
            let bias = bias.as_ref().map(Owned::floats);
            linear(path, workers, self.m, input.floats(), &weight, bias, out.floats_mut(), self.compute).unwrap();
        }
        out
    }

    fn operands(&self) -> (Packed, Owned, Option<Owned>) {
        let packed = Packed::new(self.n, self.k, self.quant_type, self.blocksize, self.nested, self.seed);
        let depth = if self.backward { self.n } else { self.k };
        let input = Owned::new(&numbers(self.m * depth, self.seed ^ 1), self.input);
        let bias = self.bias.filter(|_| !self.backward).map(|dtype| Owned::new(&numbers(self.n, self.seed ^ 2), dtype));
        (packed, input, bias)
    }

    /// Checks every value against float64 and the module's bound.
    fn check(&self, path: Path, found: &Owned) {
        let (packed, input, bias) = self.operands();
        let weights = packed.values();
        let input: Vec<f64> = input.values().iter().map(|&v| f64::from(rounded(v, self.compute))).collect();
        let bias = bias.map(|b| b.values());
        let (depth, cols) = if self.backward { (self.n, self.k) } else { (self.k, self.n) };
        let weight_error = if path.rounds_weights(self.compute) { 2f64.powi(-8) } else { 0.0 };
        let output_error = match self.output {
            Compute::F32 => 2f64.powi(-24),
            Compute::F16 => 2f64.powi(-11),
            Compute::Bf16 => 2f64.powi(-8),
        };
        let smallest = if self.output == Compute::F16 { 2f64.powi(-25) } else { 2f64.powi(-100) };
        for (i, found) in found.values().into_iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            let (mut exact, mut magnitude) = (0.0, 0.0);
            for p in 0..depth {
                let weight = if self.backward { p * self.k + col } else { col * self.k + p };
                let product = input[row * depth + p] * f64::from(weights[weight]);
                exact += product;
                magnitude += product.abs();
            }
            if let Some(bias) = &bias {
                exact += f64::from(bias[col]);
                magnitude += f64::from(bias[col]).abs();
            }
            let sum_error = (weight_error + (depth as f64 + 8.0) * 2f64.powi(-24)) * magnitude;
            let bound = sum_error + (exact.abs() + sum_error) * output_error + smallest;
            let error = (f64::from(found) - exact).abs();
            assert!(error <= bound, "{path}: [{row}, {col}] is {found}, not {exact}: {error:e} > {bound:e}\n{self:?}");
        }
    }
}

fn case(m: usize, n: usize, k: usize) -> Case {
    Case {
        m,
        n,
        k,
        quant_type: QuantType::Nf4,
        blocksize: 64,
        nested: false,
        input: Compute::Bf16,
        output: Compute::F32,
        compute: Compute::Bf16,
        bias: None,
        backward: false,
        seed: 7,
    }
}

/// Shapes around the sizes that the code treats apart: groups, chunks, panels, tiles, blocks of rows.
#[test]
fn sizes_at_the_edges() {
    let shapes = [
        (1, 1, 1),
        (1, 1, 64),
        (2, 3, 128),
        (3, 5, 192),
        (8, 33, 64),
        (9, 7, 320),
        (16, 97, 128),
        (17, 13, 64),
        (5, 4, 33),
        (8, 2, 1025),
        (9, 3, 1),
        (31, 6, 515),
        (32, 25, 513),
        (33, 12, 96),
        (65, 11, 100),
        (12, 515, 40),
        (1, 200, 576),
        (4, 40, 4160),
        (20, 130, 70),
        (513, 3, 65),
        (385, 9, 33),
        (13, 1030, 17),
        (2, 300, 257),
    ];
    for (m, n, k) in shapes {
        for compute in [Compute::Bf16, Compute::F32] {
            for backward in [false, true] {
                let case = Case { compute, backward, bias: Some(Compute::F32), ..case(m, n, k) };
                for path in Path::available() {
                    case.check(path, &case.run(path, Workers::serial()));
                }
            }
        }
    }
}

unsafe extern "C" fn alone_in_team(
    work: unsafe extern "C" fn(*mut std::ffi::c_void),
    data: *mut std::ffi::c_void,
    _threads: std::ffi::c_uint,
    _flags: std::ffi::c_uint,
) {
    // SAFETY: as OpenMP does.
    unsafe { work(data) }
}

#[test]
fn every_number_of_threads_gives_the_same_bits() {
    let pools: Vec<_> = [1, 2, 5].map(|n| ThreadPoolBuilder::new().num_threads(n).build().unwrap()).into();
    for (m, n, k) in [(1, 300, 4096), (7, 130, 2112), (7, 130, 2051), (40, 200, 1088), (40, 133, 771)] {
        for backward in [false, true] {
            let case = Case { backward, nested: true, ..case(m, n, k) };
            for path in Path::available() {
                let bits = |o: &Owned| o.values().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                let alone = bits(&case.run(path, Workers::serial()));
                // A runtime that gives fewer threads than it was asked for, as OpenMP does inside of itself.
                // SAFETY: `alone_in_team` calls its function once, and returns.
                let team = unsafe { Workers::open_mp(alone_in_team, 3) };
                assert_eq!(bits(&case.run(path, team)), alone, "{path} {case:?}");
                for pool in &pools {
                    let together = case.run(path, Workers::new(pool, pool.current_num_threads()));
                    assert_eq!(bits(&together), alone, "{path} {case:?}");
                }
            }
        }
    }
}

#[test]
fn nothing_at_all() {
    let bias = Case { bias: Some(Compute::F16), ..case(3, 4, 0) };
    for path in Path::available() {
        for (m, n, k) in [(0, 4, 64), (3, 0, 64), (3, 4, 0), (0, 0, 0)] {
            for backward in [false, true] {
                let case = Case { backward, ..case(m, n, k) };
                case.check(path, &case.run(path, Workers::serial()));
            }
        }
        bias.check(path, &bias.run(path, Workers::serial()));
    }
}

#[test]
fn scales_that_are_not_finite_show() {
    for path in Path::available() {
        for m in [1, 12, 40] {
            for scale in [f32::INFINITY, f32::NAN] {
                for k in [128, 100] {
                    let mut packed = Packed::new(3, k, QuantType::Nf4, 64, false, 5);
                    *packed.absmax.last_mut().unwrap() = scale; // in the last row alone
                    let x = vec![1.0; m * k];
                    let mut out = vec![0.0; m * 3];
                    let (floats, result) = (Floats::F32(&x), FloatsMut::F32(&mut out));
                    let serial = Workers::serial();
                    linear(path, serial, m, floats, &packed.weight(), None, result, Compute::Bf16).unwrap();
                    for row in out.chunks(3) {
                        assert!(row[0].is_finite() && row[1].is_finite() && !row[2].is_finite(), "{path} {m} {row:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let packed = Packed::new(4, 64, QuantType::Nf4, 64, false, 5);
    let weight = packed.weight();
    let mut out = [0.0; 8];
    let serial = Workers::serial();
    let bad = |x: &[f32], bias: Option<&[f32]>, out: &mut [f32]| {
        let (x, bias, out) = (Floats::F32(x), bias.map(Floats::F32), FloatsMut::F32(out));
        linear(Path::Scalar, serial, 2, x, &weight, bias, out, Compute::F32).unwrap_err().to_string()
    };
    assert_eq!(bad(&[0.0; 127], None, &mut out), "x must be 128 elements long (rows of the weight's columns), got 127");
    assert_eq!(bad(&[0.0; 128], None, &mut out[..7]), "out must be 8 elements long (rows of the weight's rows), got 7");
    assert_eq!(
        bad(&[0.0; 128], Some(&[0.0; 3]), &mut out),
        "bias must be 4 elements long (one per row of the weight), got 3"
    );
    let short = Weight::new(&packed.packed, Scales::Plain(&[1.0; 3]), QuantType::Nf4, packed.blocksize, 4, 64);
    assert_eq!(short.unwrap_err().to_string(), "absmax must be 4 elements long (one scale per block), got 3");
    assert!(Weight::new(&[], Scales::Plain(&[]), QuantType::Nf4, packed.blocksize, usize::MAX, 2).is_err());
    assert_eq!(
        "int8".parse::<Compute>().unwrap_err().to_string(),
        "compute_dtype must be one of [\"float32\", \"float16\", \"bfloat16\"], got \"int8\""
    );
}

fn any_compute() -> impl Strategy<Value = Compute> {
    prop::sample::select(Compute::ALL.to_vec())
}

prop_compose! {
    fn any_case()(
        m in prop_oneof![1usize..20, 20usize..70],
        n in 1usize..80,
        k in prop_oneof![1usize..300, (1usize..12).prop_map(|k| 32 * k), (1usize..6).prop_map(|k| 64 * k)],
        quant_type in prop::sample::select(QuantType::ALL.to_vec()),
        blocksize in prop::sample::select(crate::geometry::BLOCK_SIZES.to_vec()),
        nested in any::<bool>(),
        (input, output, compute, bias) in
            (any_compute(), any_compute(), any_compute(), prop::option::of(any_compute())),
        backward in any::<bool>(),
        seed in any::<u64>(),
    ) -> Case {
        Case { m, n, k, quant_type, blocksize, nested, input, output, compute, bias, backward, seed }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn within_the_bound_on_every_path(case in any_case()) {
        for path in Path::available() {
            case.check(path, &case.run(path, Workers::serial()));
        }
    }
}
