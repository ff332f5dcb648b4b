//! The experts of a layer against float64, and against themselves.

use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

use super::*;
use crate::codebook::QuantType;
use crate::gemm::compute::Compute;
use crate::gemm::tests::{Owned, Packed, numbers, rounded};

/// One layer, and what it is given.
#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    k: usize,
    experts: usize,
    hidden: usize,
    intermediate: usize,
    gated: bool,
    activation: Activation,
    biases: bool,
    quant_type: QuantType,
    blocksize: usize,
    nested: bool,
    dtype: Compute,
    seed: u64,
}

/// What a case is made of.
struct Parts {
    weights: Vec<[Option<Packed>; 3]>,
    ids: Vec<i64>,
    x: Owned,
    factors: Owned,
    up_bias: Owned,
    down_bias: Owned,
}

impl Case {
    fn width(&self) -> usize {
        self.intermediate * (1 + usize::from(self.gated))
    }

    fn parts(&self) -> Parts {
        let packed = |n, k, seed| Packed::new(n, k, self.quant_type, self.blocksize, self.nested, seed);
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        let weights = (0..self.experts as u64)
            .map(|expert| {
                let seed = self.seed + 3 * expert;
                [
                    self.gated.then(|| packed(intermediate, hidden, seed)),
                    Some(packed(intermediate, hidden, seed + 1)),
                    Some(packed(hidden, intermediate, seed + 2)),
                ]
            })
            .collect();
        // A few of no expert: those behind the last, and one that is negative.
        let any = numbers(self.tokens * self.k, self.seed + 1000);
        let ids =
            any.iter().map(|v| (v.abs() * 1e4) as i64 % (self.experts as i64 + 2) - i64::from(*v > 0.99)).collect();
        let floats = |n, seed, dtype| Owned::new(&numbers(n, self.seed + seed), dtype);
        Parts {
            weights,
            ids,
            x: floats(self.tokens * hidden, 2000, self.dtype),
            factors: floats(self.tokens * self.k, 3000, Compute::F32),
            up_bias: floats(self.experts * self.width(), 4000, self.dtype),
            down_bias: floats(self.experts * hidden, 5000, self.dtype),
        }
    }

    fn layer<'a>(&self, parts: &'a Parts) -> Layer<'a> {
        Layer {
            experts: self.experts,
            hidden: self.hidden,
            intermediate: self.intermediate,
            gated: self.gated,
            activation: self.activation,
            up_bias: self.biases.then(|| parts.up_bias.floats()),
            down_bias: self.biases.then(|| parts.down_bias.floats()),
        }
    }

    fn run(&self, path: Path, workers: Workers<'_>, parts: &Parts) -> Vec<f32> {
        let mut y = Owned::new(&vec![f32::NAN; self.tokens * self.hidden], self.dtype);
        let choice = Choice { tokens: self.tokens, k: self.k, ids: &parts.ids, weights: parts.factors.floats() };
        let expert = |id: usize| {
            let [gate, up, down] = &parts.weights[id];
            let up = up.as_ref().unwrap().weight();
            Ok(Expert { gate: gate.as_ref().map(Packed::weight), up, down: down.as_ref().unwrap().weight() })
        };
        experts(path, workers, &self.layer(parts), &choice, parts.x.floats(), expert, y.floats_mut()).unwrap();
        y.values()
    }

    /// Slowly, in float64 but for the roundings that the contract names; and the size of the terms of each sum.
    fn reference(&self, parts: &Parts) -> Vec<(f64, f64)> {
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        let product = |weight: &Packed, x: &[f32]| -> Vec<(f64, f64)> {
            let row = |row: &[f32]| {
                let terms = row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
            };
            weight.values().chunks_exact(x.len()).map(row).collect()
        };
        let bias = |values: &Owned, at: usize| if self.biases { f64::from(values.floats().get(at)) } else { 0.0 };
        let x = parts.x.values();
        let mut all = Vec::new();
        for token in 0..self.tokens {
            let mut total = vec![(0.0, 0.0); hidden];
            for slot in token * self.k..(token + 1) * self.k {
                let Some([gate, up, down]) = usize::try_from(parts.ids[slot]).ok().and_then(|id| parts.weights.get(id))
                else {
                    continue;
                };
                let id = parts.ids[slot] as usize;
                let x = &x[token * hidden..(token + 1) * hidden];
                let up = product(up.as_ref().unwrap(), x);
                let gate = gate.as_ref().map(|gate| product(gate, x));
                let first = id * self.width();
                // How far float32 sums may be from those of float64 goes through the activation, which no more than
                // doubles it.
                let mut size = 0.0f64;
                let between: Vec<f32> = (0..intermediate)
                    .map(|i| {
                        let right = (up[i].0 + bias(&parts.up_bias, first + self.width() - intermediate + i)) as f32;
                        let mut made = [right];
                        if let Some(gate) = &gate {
                            let left = (gate[i].0 + bias(&parts.up_bias, first + i)) as f32;
                            self.activation.gated(&[left], &mut made);
                            size = size.max((gate[i].1 + 1.0) * (f64::from(right.abs()) + 1.0));
                            size = size.max((up[i].1 + 1.0) * (f64::from(left.abs()) + 1.0));
                        } else {
                            self.activation.plain(&mut made);
                            size = size.max((up[i].1 + 1.0) * (f64::from(right.abs()) + 1.0));
                        }
                        rounded(made[0], self.dtype)
                    })
                    .collect();
                let factor = f64::from(parts.factors.floats().get(slot));
                for (row, (sum, of)) in product(down.as_ref().unwrap(), &between).into_iter().enumerate() {
                    let value = sum + bias(&parts.down_bias, id * hidden + row);
                    total[row].0 += factor * f64::from(rounded(value as f32, self.dtype));
                    total[row].1 += factor.abs() * (of + value.abs() + size * 1e-2);
                }
            }
            all.extend(total);
        }
        all
    }

    /// How far a result may be from the reference, in parts of the size of its terms.
    fn tolerance(&self, path: Path) -> f64 {
        let unit = match self.dtype {
            Compute::F32 => 2f64.powi(-24) * 40.0,
            Compute::F16 => 2f64.powi(-11) * 4.0,
            Compute::Bf16 => 2f64.powi(-8) * 4.0,
        };
        unit + if path.rounds_weights(self.dtype) { 2f64.powi(-7) } else { 0.0 }
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (0usize..24, 1usize..5, 1usize..7, 1usize..4, 1usize..4, any::<[bool; 3]>());
    let kind = (
        prop::sample::select(Activation::ALL.to_vec()),
        any::<[bool; 3]>(),
        prop::sample::select(vec![QuantType::Nf4, QuantType::Fp4]),
        prop::sample::select(vec![32usize, 64, 128]),
        prop::sample::select(Compute::ALL.to_vec()),
        0u64..1000,
    );
    (sizes, kind).prop_map(
        |((tokens, k, experts, h, i, odd), (activation, flags, quant_type, blocksize, dtype, seed))| {
            let [gated, biases, nested] = flags;
            let width = |blocks: usize, odd| if odd { blocks * 64 - 7 } else { blocks * 64 };
            Case {
                tokens,
                k,
                experts,
                hidden: width(h, odd[0] && odd[1]),
                intermediate: width(i, odd[2] && odd[1]),
                gated: gated || activation.needs_gate(),
                activation,
                biases,
                quant_type,
                blocksize,
                nested,
                dtype,
                seed,
            }
        },
    )
}

fn fits(case: &Case, path: Path, found: &[f32], expected: &[(f64, f64)]) {
    let tolerance = case.tolerance(path);
    for (at, (found, (expected, size))) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(*found) - expected).abs();
        assert!(
            difference <= tolerance * (size + expected.abs()) + 1e-30,
            "{path}: value {at} is {found}, expected {expected} within {tolerance} of {size}: {case:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn experts_are_those_of_float64(case in cases()) {
        let parts = case.parts();
        let expected = case.reference(&parts);
        for path in Path::available() {
            fits(&case, path, &case.run(path, Workers::serial(), &parts), &expected);
        }
    }
}

fn large() -> Case {
    Case {
        tokens: 560,
        k: 4,
        experts: 2,
        hidden: 64,
        intermediate: 96,
        gated: true,
        activation: Activation::Silu,
        biases: true,
        quant_type: QuantType::Nf4,
        blocksize: 64,
        nested: true,
        dtype: Compute::Bf16,
        seed: 7,
    }
}

#[test]
fn many_tokens_come_in_parts_and_threads_change_no_bit() {
    // Work for more than one thread, and more slots of an expert than are multiplied together.
    let case = large();
    let parts = case.parts();
    let expected = case.reference(&parts);
    let pool = ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for path in Path::available() {
        let found = case.run(path, Workers::serial(), &parts);
        fits(&case, path, &found, &expected);
        assert_eq!(found, case.run(path, Workers::new(&pool, 3), &parts), "{path}");
    }
}

#[test]
fn experts_that_no_token_chose_are_not_asked_for() {
    let case = Case { tokens: 1, k: 2, ..large() };
    let mut parts = case.parts();
    parts.ids = vec![1, 9];
    let mut y = Owned::new(&vec![f32::NAN; case.hidden], case.dtype);
    let choice = Choice { tokens: 1, k: 2, ids: &parts.ids, weights: parts.factors.floats() };
    let asked = std::cell::RefCell::new(Vec::new());
    let expert = |id: usize| {
        asked.borrow_mut().push(id);
        let [gate, up, down] = &parts.weights[id];
        let up = up.as_ref().unwrap().weight();
        Ok(Expert { gate: gate.as_ref().map(Packed::weight), up, down: down.as_ref().unwrap().weight() })
    };
    let serial = Workers::serial();
    experts(Path::Scalar, serial, &case.layer(&parts), &choice, parts.x.floats(), expert, y.floats_mut()).unwrap();
    assert_eq!(*asked.borrow(), [1]);
    parts.ids = vec![7, -1];
    assert!(case.run(Path::Scalar, serial, &parts).iter().all(|v| *v == 0.0));
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let case = Case { tokens: 3, ..large() };
    let parts = case.parts();
    let choice = Choice { tokens: 3, k: 4, ids: &parts.ids, weights: parts.factors.floats() };
    let message = |layer: Layer<'_>, choice: Choice<'_>, swapped: bool, x: &Owned| {
        let mut y = Owned::new(&vec![0.0; 3 * 64], case.dtype);
        let expert = |id: usize| {
            let [gate, up, down] = &parts.weights[id];
            let (up, down) = (up.as_ref().unwrap().weight(), down.as_ref().unwrap().weight());
            let (up, down) = if swapped { (down, up) } else { (up, down) };
            Ok(Expert { gate: gate.as_ref().map(Packed::weight), up, down })
        };
        experts(Path::Scalar, Workers::serial(), &layer, &choice, x.floats(), expert, y.floats_mut())
            .unwrap_err()
            .to_string()
    };
    let layer = case.layer(&parts);
    assert!(message(layer, Choice { ids: &parts.ids[1..], ..choice }, false, &parts.x).starts_with("ids"));
    let few = Owned::new(&[0.0; 2], Compute::F32);
    assert!(message(layer, Choice { weights: few.floats(), ..choice }, false, &parts.x).starts_with("weights"));
    assert!(message(layer, choice, false, &few).starts_with('x'));
    assert!(message(Layer { up_bias: Some(few.floats()), ..layer }, choice, false, &parts.x).starts_with("up_bias"));
    assert!(
        message(Layer { down_bias: Some(few.floats()), ..layer }, choice, false, &parts.x).starts_with("down_bias")
    );
    assert!(message(layer, choice, true, &parts.x).starts_with("expert"));
    let ungated = Layer { gated: false, up_bias: None, activation: Activation::ClampedSwiglu, ..layer };
    assert!(message(ungated, choice, false, &parts.x).starts_with("activation"));
}
