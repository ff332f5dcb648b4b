//! Products for few slots of an expert (kernels/experts/experts_few.cuh): how they divide the work.

use halfbyte::dtype::DType;
use halfbyte::error::Result;

use super::chunks::{COLUMNS, most_chunks};
use super::layer::{Activation, Choices, Experts, Matrices};
use super::route::Routed;
use crate::blockwise4::quant_type_parameter;
use crate::driver::{Device, Stream};
use crate::kernels::{self, Kernel, experts_few as source};
use crate::launch::parameters;
use crate::memory::block_shift;

pub(super) const BLOCK: usize = source::BLOCK;
/// Addresses of a matrix in the table.
const MATRIX_BYTES: u64 = 32;
/// What is in shared memory besides partial sums, and behind it the rows of each column of a segment.
const FIXED: usize = source::LANE_TABLE_BYTES
    + source::MAP_BYTES
    + source::ROUTE_BYTES
    + source::PART_BYTES
    + source::SEGMENTS * source::SEGMENT_BYTES;
/// Bytes of each matrix of a segment that are fetched to the second level before they are asked for.
const AHEAD: i32 = 16 << 10;
/// What `Experts` is to the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Job {
    matrices: u64,
    x: u64,
    bias: u64,
    y: u64,
    ids: u64,
    order: u64,
    chunks: u64,
    chunk_count: u64,
    slots: i32,
    top_k: i32,
    experts: i32,
    n: i32,
    k: i32,
    projections: i32,
    gathers: u32,
    activation: u32,
    block_shift: i32,
    quant_type: u32,
    plan: Plan,
}

/// The last members of `Experts`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    k_slices: i32,
    per_pass: i32,
    unit: i32,
    ahead: i32,
}

/// How a product divides the work, of no more than `chunks` chunks: the plan, the blocks of threads, and the shared memory of each.
fn divide(
    (n, k): (usize, usize),
    projections: usize,
    chunks: usize,
    multiprocessors: usize,
    shared_per_block: usize,
) -> (Plan, u64, u32) {
    let (warps, k_tile) = (source::WARPS, source::K_TILE);
    // As many parts of K as leave each warp most of a k-tile.
    let mut k_slices = warps;
    while k_slices > 1 && k / BLOCK < k_slices * k_tile * 3 / 4 {
        k_slices /= 2;
    }
    let groups = warps / k_slices;
    let of_tile = k_slices * COLUMNS * source::ROWS * size_of::<f32>();
    let tiles = n / source::ROWS * projections;
    // A unit has a tile for each group, where a matrix is a whole number of units.
    let mut unit = groups.max(projections);
    while !tiles.is_multiple_of(unit) {
        unit /= 2;
    }
    let fixed = FIXED + source::SEGMENTS * COLUMNS * size_of::<i32>();
    let room = (shared_per_block - fixed) / 2 / of_tile;
    let whole = groups.max(projections);
    let per_pass = (room / whole * whole).min(tiles.next_multiple_of(whole));
    let units = chunks * (tiles / unit);
    let shared = fixed + 2 * per_pass * of_tile;
    let plan = Plan { k_slices: k_slices as i32, per_pass: per_pass as i32, unit: unit as i32, ahead: AHEAD };
    (plan, units.min(multiprocessors) as u64, shared as u32)
}

/// The products of a call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Few {
    kernel: &'static Kernel,
}

impl Few {
    /// Whether a device has them.
    pub(super) fn suits(device: &Device) -> bool {
        kernels::EXPERTS_FEW_BF16.suits(device.capability())
            && kernels::EXPERTS_SUM_BF16.suits(device.capability())
            && device.shared_per_block() as usize >= FIXED + (16 << 10)
    }

    pub(super) fn new(experts: &Experts) -> Self {
        let kernel = match (experts.dtype, experts.nested) {
            (DType::Bf16, false) => &kernels::EXPERTS_FEW_BF16,
            (DType::Bf16, true) => &kernels::EXPERTS_FEW_BF16_NESTED,
            (_, false) => &kernels::EXPERTS_FEW_F16,
            (_, true) => &kernels::EXPERTS_FEW_F16_NESTED,
        };
        Self { kernel }
    }

    /// Whether every block sorts the slots itself.
    #[allow(clippy::unused_self)] // a question about this product
    pub(super) fn routes_itself(&self, slots: usize) -> bool {
        slots <= source::FEW_SLOTS
    }

    /// Gate and up, or up alone: `y[slots][intermediate]` in the order, without an activation `[slots][2 or 1][intermediate]`.
    ///
    /// # Safety
    /// As [`Experts::launch`].
    #[allow(clippy::too_many_arguments)] // what the kernel needs
    pub(super) unsafe fn up(
        &self,
        experts: &Experts,
        stream: Stream,
        choices: &Choices,
        matrices: &Matrices,
        activation: Option<Activation>,
        x: u64,
        routed: &Routed,
        y: u64,
    ) -> Result<&'static str> {
        let activation = match activation {
            None => source::ACTIVATION_NONE,
            Some(Activation::Silu) => source::ACTIVATION_SILU,
            Some(Activation::Gelu) => source::ACTIVATION_GELU,
            Some(Activation::GeluTanh) => source::ACTIVATION_GELU_TANH,
            Some(Activation::Relu2) => source::ACTIVATION_RELU2,
            Some(Activation::ClampedSwiglu) => source::ACTIVATION_CLAMPED_SWIGLU,
        };
        let job = Job {
            matrices: matrices.table,
            x,
            bias: matrices.up_bias,
            y,
            n: experts.intermediate as i32,
            k: experts.hidden as i32,
            projections: experts.projections() as i32,
            gathers: 1,
            activation: activation as u32,
            ..job(experts, choices, routed)
        };
        // SAFETY: the caller's.
        unsafe { self.launch(experts, stream, choices, job) }
    }

    /// Down: `y[slots][hidden]` as slots are numbered, from `x[slots][intermediate]` in the order.
    ///
    /// # Safety
    /// As [`Experts::launch`].
    #[allow(clippy::too_many_arguments)] // what the kernel needs
    pub(super) unsafe fn down(
        &self,
        experts: &Experts,
        stream: Stream,
        choices: &Choices,
        matrices: &Matrices,
        x: u64,
        routed: &Routed,
        y: u64,
    ) -> Result<&'static str> {
        let before = (experts.projections() * experts.experts) as u64;
        let job = Job {
            matrices: matrices.table + before * MATRIX_BYTES,
            x,
            bias: matrices.down_bias,
            y,
            n: experts.hidden as i32,
            k: experts.intermediate as i32,
            projections: 1,
            ..job(experts, choices, routed)
        };
        // SAFETY: the caller's.
        unsafe { self.launch(experts, stream, choices, job) }
    }

    unsafe fn launch(&self, experts: &Experts, stream: Stream, choices: &Choices, job: Job) -> Result<&'static str> {
        let device = experts.device;
        let (plan, blocks, shared) = divide(
            (job.n as usize, job.k as usize),
            job.projections as usize,
            most_chunks(experts.experts, choices.slots()),
            device.multiprocessors() as usize,
            device.shared_per_block() as usize,
        );
        let job = Job { plan, ..job };
        // SAFETY: the kernel's parameter; `up` waits before it touches memory, `down` before it touches what `up` writes, and
        // starts when `up` has waited; the rest is the caller's.
        unsafe { device.launch_early(stream, self.kernel, blocks, shared, parameters![job]) }?;
        Ok(self.kernel.name)
    }
}

fn job(experts: &Experts, choices: &Choices, routed: &Routed) -> Job {
    Job {
        matrices: 0,
        x: 0,
        bias: 0,
        y: 0,
        ids: choices.ids,
        order: routed.order,
        chunks: routed.chunks,
        chunk_count: routed.chunk_count,
        slots: choices.slots() as i32,
        top_k: choices.top_k as i32,
        experts: experts.experts as i32,
        n: 0,
        k: 0,
        projections: 1,
        gathers: 0,
        activation: source::ACTIVATION_NONE as u32,
        block_shift: block_shift(experts.blocksize),
        quant_type: quant_type_parameter(experts.quant_type),
        plan: Plan { k_slices: 1, per_pass: 1, unit: 1, ahead: 0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_and_every_block_has_a_warp() {
        for (multiprocessors, memory) in [(132, 232_448), (108, 166_912), (82, 101_376)] {
            for (n, k) in [(768, 2048), (2048, 768), (1408, 2048), (2880, 2880), (64, 64), (14336, 4096), (4096, 14336)]
            {
                for (projections, chunks) in [(1, 1), (2, 8), (1, 200), (2, 16)] {
                    let (plan, blocks, shared) = divide((n, k), projections, chunks, multiprocessors, memory);
                    let words = format!("{n} {k} {projections} {chunks} {plan:?} {blocks} {shared}");
                    let tiles = n / source::ROWS * projections;
                    let (unit, per_pass) = (plan.unit as usize, plan.per_pass as usize);
                    assert!(tiles.is_multiple_of(unit) && unit.is_multiple_of(projections), "{words}");
                    assert!(per_pass >= 1 && per_pass.is_multiple_of(projections), "{words}");
                    let k_slices = plan.k_slices as usize;
                    assert!(k_slices.is_power_of_two() && k_slices * BLOCK <= k, "{words}");
                    assert!(k_slices <= source::WARPS, "{words}");
                    assert!((1..=multiprocessors as u64).contains(&blocks), "{words}");
                    assert!(shared as usize <= memory, "{words}");
                }
            }
        }
    }
}
