//! The experts of a Mixture-of-Experts layer as one product: of the packed weights, those of the experts that a router
//! chose are read, each once, and two loops over (expert, rows of its weight) take the place of a product for each
//! projection of each expert.
//!
//! With `gate`, `up` and `down` the products of [`super::linear`], and slots being (token, place among its experts):
//!
//! 1. slots are sorted by expert, stably ([`route`]);
//! 2. of each slot `h = act(gate(x) + b) · (up(x) + b)`, or `act(up(x) + b)`: in float32, rounded once to the type of `x`;
//! 3. `down(h) + b`, rounded to the type of `x`;
//! 4. of each token the sum of `weight · down`, in float32 and in the order of its experts, rounded once.
//!
//! The same bits every time, whatever the number of threads; a token's result does not depend on the others' but for the
//! order of sums within a product, which is one for few rows and another for many.

mod activation;
mod route;
#[cfg(test)]
mod tests;
mod values;

use std::ops::Range;

pub use activation::Activation;
use route::{Group, Route};
use values::Values;

use super::floats::{Floats, FloatsMut, Shared};
use super::matrix::Matrix;
use super::out::Out;
use super::path::Path;
use super::weight::Weight;
use super::workers::Workers;
use super::{SERIAL_WORK, area, forward_on};
use crate::error::{Error, Result};
use crate::geometry::check_length;

/// Slots of an expert that are multiplied together, at most: what many rows are decoded for.
const SLOTS: usize = 512;

/// Values of one projection that a task holds, at most.
const HELD: usize = 1 << 17;

/// Rows of a weight in a task are a multiple of this.
const STEP: usize = 32;

/// Tasks for each thread, at least, where there is work for so many: a thread that is late does fewer.
const TASKS: usize = 16;

/// The projections of one expert.
#[derive(Debug, Clone, Copy)]
pub struct Expert<'a> {
    /// `[intermediate, hidden]`; None where the activation is that of the up projection alone.
    pub gate: Option<Weight<'a>>,
    /// `[intermediate, hidden]`.
    pub up: Weight<'a>,
    /// `[hidden, intermediate]`.
    pub down: Weight<'a>,
}

/// What all experts of a layer have in common.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// How many experts there are.
    pub experts: usize,
    /// Values of a token.
    pub hidden: usize,
    /// Values between the projections.
    pub intermediate: usize,
    /// Whether experts have a gate.
    pub gated: bool,
    /// What is between the projections.
    pub activation: Activation,
    /// `[experts, gate's and up's rows]`.
    pub up_bias: Option<Floats<'a>>,
    /// `[experts, hidden]`.
    pub down_bias: Option<Floats<'a>>,
}

/// Which tokens go to which experts.
#[derive(Debug, Clone, Copy)]
pub struct Choice<'a> {
    /// Tokens.
    pub tokens: usize,
    /// Experts of each.
    pub k: usize,
    /// `[tokens, k]`; a number of no expert means none.
    pub ids: &'a [i64],
    /// `[tokens, k]`: what an expert's result is multiplied with.
    pub weights: Floats<'a>,
}

/// `y[tokens, hidden]` of `x[tokens, hidden]`. The module's description is the contract.
///
/// # Errors
/// [`Error::Argument`] unless lengths and shapes fit each other, and when this machine lacks the path; and those of
/// `expert`, which is called once for each expert that is chosen.
pub fn experts<'w>(
    path: Path,
    workers: Workers<'_>,
    layer: &Layer<'_>,
    choice: &Choice<'_>,
    x: Floats<'_>,
    expert: impl Fn(usize) -> Result<Expert<'w>>,
    y: FloatsMut<'_>,
) -> Result<()> {
    let path = path.checked()?;
    let Choice { tokens, k, .. } = *choice;
    check(layer, choice, x, &y)?;
    if tokens == 0 || layer.hidden == 0 {
        return Ok(());
    }
    let route = Route::new(choice.ids, layer.experts);
    let mut chosen = Vec::with_capacity(route.groups.len());
    for group in &route.groups {
        let weights = expert(group.expert)?;
        check_expert(layer, &weights)?;
        chosen.push(weights);
    }
    let per_slot = layer.hidden.saturating_mul(layer.intermediate).saturating_mul(2 + usize::from(layer.gated));
    let workers = workers.for_work(per_slot.saturating_mul(route.order.len()), SERIAL_WORK);
    let call = Call { path, layer, route: &route, chosen: &chosen, workers };
    let rows = x.gather(&route.order, k, layer.hidden);
    let between = call.up(&rows);
    drop(rows);
    let made = call.down(&between);
    drop(between);
    sum(&route, choice, &made, layer.hidden, &y.share(), workers);
    Ok(())
}

fn check(layer: &Layer<'_>, choice: &Choice<'_>, x: Floats<'_>, y: &FloatsMut<'_>) -> Result<()> {
    let slots = area("ids", choice.tokens, choice.k)?;
    let values = area("x", choice.tokens, layer.hidden)?;
    area("x", slots, layer.hidden.max(layer.intermediate))?;
    check_length("ids", choice.ids.len(), slots, "tokens times experts of each")?;
    check_length("weights", choice.weights.len(), slots, "tokens times experts of each")?;
    check_length("x", x.len(), values, "tokens times hidden values")?;
    check_length("y", y.len(), values, "tokens times hidden values")?;
    let ups = area("up_bias", layer.experts, layer.intermediate * (1 + usize::from(layer.gated)))?;
    if let Some(bias) = layer.up_bias {
        check_length("up_bias", bias.len(), ups, "one per row of the gates and up projections")?;
    }
    if let Some(bias) = layer.down_bias {
        let downs = area("down_bias", layer.experts, layer.hidden)?;
        check_length("down_bias", bias.len(), downs, "one per row of the down projections")?;
    }
    if layer.activation.needs_gate() && !layer.gated {
        return Err(Error::argument("activation", layer.activation.as_str(), "one of experts without a gate"));
    }
    Ok(())
}

fn check_expert(layer: &Layer<'_>, expert: &Expert<'_>) -> Result<()> {
    let (hidden, intermediate) = (layer.hidden, layer.intermediate);
    let ups = [expert.gate.as_ref(), Some(&expert.up)];
    let fits = expert.gate.is_some() == layer.gated
        && ups.into_iter().flatten().all(|weight| (weight.rows(), weight.cols()) == (intermediate, hidden))
        && (expert.down.rows(), expert.down.cols()) == (hidden, intermediate);
    if fits {
        return Ok(());
    }
    let expected = format!("[{intermediate}, {hidden}], and [{hidden}, {intermediate}] for the down projection");
    Err(Error::argument("expert", "weights of other shapes", expected))
}

/// What both loops work with.
struct Call<'a, 'w> {
    path: Path,
    layer: &'a Layer<'a>,
    route: &'a Route,
    chosen: &'a [Expert<'w>],
    workers: Workers<'a>,
}

/// Slots of one expert, and rows of its weight.
struct Task<'a, 'w> {
    expert: &'a Expert<'w>,
    id: usize,
    slots: Range<usize>,
    rows: Range<usize>,
}

impl<'w> Call<'_, 'w> {
    /// Calls `work` for parts of the slots of each expert with parts of the `rows` rows of a projection.
    fn for_each(&self, rows: usize, work: impl Fn(&Task<'_, 'w>) + Sync) {
        let blocks = |group: &Group| group.slots.len().div_ceil(SLOTS);
        let units: usize = self.route.groups.iter().map(blocks).sum();
        if units == 0 {
            return;
        }
        let pieces = (TASKS * self.workers.threads()).div_ceil(units);
        let mut parts = Vec::new();
        for (at, group) in self.route.groups.iter().enumerate() {
            for start in group.slots.clone().step_by(SLOTS) {
                let slots = start..group.slots.end.min(start + SLOTS);
                let most = (HELD / slots.len() / STEP * STEP).max(STEP);
                let step = rows.div_ceil(pieces).next_multiple_of(STEP).min(most);
                parts.extend((0..rows).step_by(step).map(|row| (at, slots.clone(), row..rows.min(row + step))));
            }
        }
        self.workers.for_each(parts.len(), |part| {
            let (at, slots, rows) = parts[part].clone();
            work(&Task { expert: &self.chosen[at], id: self.route.groups[at].expert, slots, rows });
        });
    }

    /// What is between the projections: `[slots, intermediate]`.
    fn up(&self, rows: &Values) -> Values {
        let Layer { hidden, intermediate, gated, activation, up_bias, .. } = *self.layer;
        let mut between = rows.floats().same(self.route.order.len() * intermediate);
        let out = between.floats_mut().share();
        let width = intermediate * (1 + usize::from(gated));
        self.for_each(intermediate, |task| {
            let count = task.slots.len() * task.rows.len();
            let mut made = vec![0.0f32; count * (1 + usize::from(gated))];
            let (up, gate) = made.split_at_mut(count);
            let first_bias = task.id * width;
            self.product(rows, hidden, task, &task.expert.up, up);
            add_bias(up_bias, first_bias + width - intermediate + task.rows.start, task.rows.len(), up);
            if let Some(weight) = &task.expert.gate {
                self.product(rows, hidden, task, weight, gate);
                add_bias(up_bias, first_bias + task.rows.start, task.rows.len(), gate);
                activation.gated(gate, up);
            } else {
                activation.plain(up);
            }
            for (slot, values) in task.slots.clone().zip(up.chunks_exact(task.rows.len())) {
                // SAFETY: this task alone has these slots and rows of the weight.
                unsafe { out.store(slot * intermediate + task.rows.start, values) }
            }
        });
        between
    }

    /// The results of the down projections: `[slots, hidden]`.
    fn down(&self, between: &Values) -> Values {
        let Layer { hidden, intermediate, down_bias, .. } = *self.layer;
        let mut made = between.floats().same(self.route.order.len() * hidden);
        let out = made.floats_mut().share();
        self.for_each(hidden, |task| {
            let mut values = vec![0.0f32; task.slots.len() * task.rows.len()];
            self.product(between, intermediate, task, &task.expert.down, &mut values);
            add_bias(down_bias, task.id * hidden + task.rows.start, task.rows.len(), &mut values);
            for (slot, values) in task.slots.clone().zip(values.chunks_exact(task.rows.len())) {
                // SAFETY: this task alone has these slots and rows of the weight.
                unsafe { out.store(slot * hidden + task.rows.start, values) }
            }
        });
        made
    }

    /// The products of a task's slots with its rows of `weight`: `[slots][rows]`.
    fn product(&self, x: &Values, cols: usize, task: &Task<'_, '_>, weight: &Weight<'_>, out: &mut [f32]) {
        if cols == 0 {
            return;
        }
        let compute = x.floats().compute();
        let floats = x.floats().slice(task.slots.start * cols..task.slots.end * cols);
        let values = FloatsMut::F32(out).share();
        let out = Out { values, cols: task.rows.len(), bias: None, first: 0, wanted: task.rows.clone() };
        let x = Matrix { floats, cols, compute };
        forward_on(self.path, x, task.slots.len(), weight, &out, Workers::serial());
    }
}

/// Adds `count` values of a bias, from `at` on, to each row of `values`.
fn add_bias(bias: Option<Floats<'_>>, at: usize, count: usize, values: &mut [f32]) {
    let Some(bias) = bias else { return };
    let bias: Vec<f32> = (at..at + count).map(|i| bias.get(i)).collect();
    for row in values.chunks_exact_mut(count) {
        row.iter_mut().zip(&bias).for_each(|(value, bias)| *value += bias);
    }
}

/// Of each token the weighted sum of its slots.
fn sum(route: &Route, choice: &Choice<'_>, made: &Values, hidden: usize, y: &Shared<'_>, workers: Workers<'_>) {
    let places = route.places(choice.ids.len());
    let made = made.floats();
    let together = choice.tokens.div_ceil(4 * workers.threads()).max(4);
    workers.for_each(choice.tokens.div_ceil(together), |task| {
        let mut total = vec![0.0f32; hidden];
        let mut row = vec![0.0f32; hidden];
        for token in task * together..choice.tokens.min((task + 1) * together) {
            total.fill(0.0);
            for slot in token * choice.k..(token + 1) * choice.k {
                let Some(place) = places[slot] else { continue };
                made.to_f32(place as usize * hidden..(place as usize + 1) * hidden, made.compute(), &mut row);
                let weight = choice.weights.get(slot);
                total.iter_mut().zip(&row).for_each(|(total, value)| *total += weight * value);
            }
            // SAFETY: this task alone has these tokens.
            unsafe { y.store(token * hidden, &total) }
        }
    });
}
