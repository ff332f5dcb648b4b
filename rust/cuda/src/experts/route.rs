//! Before and behind the products: slots to experts (kernels/experts/experts_route.cu), rows of tokens brought together
//! (experts_gather.cu, experts_gather_few.cu), and the weighted sum (experts_sum.cu).

use halfbyte::dtype::DType;
use halfbyte::error::Result;

use super::layer::{Choices, Experts, Weights};
use super::workspace::Workspace;
use crate::driver::Stream;
use crate::kernels::{self, experts_gather, experts_gather_few, experts_route, experts_sum};
use crate::launch::parameters;

/// Where what `route` makes is; zeros where a product makes it itself.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Routed {
    pub offsets: u64,
    pub order: u64,
    pub chunks: u64,
    pub chunk_count: u64,
    /// What blocks of a product leave each other.
    pub sums: u64,
}

impl Routed {
    pub(super) fn new(workspace: u64, parts: &Workspace, nowhere: bool) -> Self {
        if nowhere {
            return Self::default();
        }
        let at = |offset: usize| workspace + offset as u64;
        Self {
            offsets: at(parts.offsets),
            order: at(parts.order),
            chunks: at(parts.chunks),
            chunk_count: at(parts.chunk_count),
            sums: at(parts.sums),
        }
    }
}

/// Sorts slots by expert, and lists chunks of up to `columns` slots.
///
/// # Safety
/// As [`Experts::launch`].
pub(super) unsafe fn route(
    experts: &Experts,
    stream: Stream,
    choices: &Choices,
    columns: usize,
    to: &Routed,
) -> Result<()> {
    let shared = (experts_route::WARPS * (experts.experts + 1) * size_of::<i32>()) as u32;
    let &Routed { offsets, order, chunks, chunk_count, .. } = to;
    let (ids, slots, columns) = (choices.ids, choices.slots() as i32, columns as i32);
    let count = experts.experts as i32;
    let parameters = parameters![ids, slots, count, columns, offsets, order, chunk_count, chunks];
    // SAFETY: the kernel's parameters in its order; it waits before it touches memory, the rest is the caller's.
    unsafe { experts.device.launch_early(stream, &kernels::EXPERTS_ROUTE, 1, shared, parameters) }
}

/// Sorts slots by expert, and brings the rows of x together in that order: `gathered[slots][hidden]`, their columns in that of
/// kernels/experts/permute.cuh. Chunks of up to `columns` slots are listed where slots are not few.
///
/// # Safety
/// As [`Experts::launch`].
pub(super) unsafe fn gather(
    experts: &Experts,
    stream: Stream,
    choices: &Choices,
    columns: usize,
    x: u64,
    to: &Routed,
    gathered: u64,
) -> Result<()> {
    let (slots, top_k, pieces) = (choices.slots(), choices.top_k as i32, (experts.hidden * 2 / 16) as i32);
    let blocks = slots.div_ceil(experts_gather::WARPS) as u64;
    let &Routed { offsets, order, .. } = to;
    if slots <= experts_gather_few::FEW {
        let (ids, slots, count) = (choices.ids, slots as i32, experts.experts as i32);
        let parameters = parameters![x, ids, slots, count, offsets, order, gathered, top_k, pieces];
        // SAFETY: the kernel's parameters in its order; it waits before it touches memory, the rest is the caller's.
        return unsafe { experts.device.launch_early(stream, &kernels::EXPERTS_GATHER_FEW, blocks, 0, parameters) };
    }
    let count = offsets + (experts.experts * size_of::<i32>()) as u64;
    let parameters = parameters![x, order, count, gathered, top_k, pieces];
    // SAFETY: as above.
    unsafe {
        route(experts, stream, choices, columns, to)?;
        experts.device.launch_early(stream, &kernels::EXPERTS_GATHER, blocks, 0, parameters)
    }
}

/// Rows of slots in the order, `rows[slots][intermediate]`, with their columns in that of kernels/experts/permute.cuh.
///
/// # Safety
/// As [`Experts::launch`].
pub(super) unsafe fn permute(
    experts: &Experts,
    stream: Stream,
    choices: &Choices,
    rows: u64,
    from: &Routed,
    to: u64,
) -> Result<()> {
    let (order, top_k, pieces) = (0_u64, 1_i32, (experts.intermediate * 2 / 16) as i32);
    let count = from.offsets + (experts.experts * size_of::<i32>()) as u64;
    let parameters = parameters![rows, order, count, to, top_k, pieces];
    let blocks = choices.slots().div_ceil(experts_gather::WARPS) as u64;
    // SAFETY: the kernel's parameters in its order; it waits before it touches memory, the rest is the caller's.
    unsafe { experts.device.launch_early(stream, &kernels::EXPERTS_GATHER, blocks, 0, parameters) }
}

/// Adds up what each token's choices came to, in their order.
///
/// # Safety
/// As [`Experts::launch`].
pub(super) unsafe fn sum(
    experts: &Experts,
    stream: Stream,
    choices: &Choices,
    weights: Weights,
    out: u64,
    y: u64,
) -> Result<()> {
    let kernel = match experts.dtype {
        DType::Bf16 => &kernels::EXPERTS_SUM_BF16,
        _ => &kernels::EXPERTS_SUM_F16,
    };
    let items = choices.tokens * (experts.hidden / experts_sum::PER_THREAD);
    let blocks = items.div_ceil(experts_sum::THREADS) as u64;
    let (ids, weights, wide) = (choices.ids, weights.address, u32::from(weights.dtype == DType::F32));
    let (tokens, top_k) = (choices.tokens as i64, choices.top_k as i32);
    let (count, columns) = (experts.experts as i32, experts.hidden as i32);
    let parameters = parameters![out, ids, weights, wide, y, tokens, top_k, count, columns];
    // SAFETY: the kernel's parameters in its order; it waits before it touches memory, the rest is the caller's.
    unsafe { experts.device.launch_early(stream, kernel, blocks, 0, parameters) }
}
