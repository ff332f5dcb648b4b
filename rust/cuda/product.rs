//! Products with a 4-bit weight that is not unpacked before.

use super::blockwise::quant_type_parameter;
use super::driver::{Device, Kernel, Stream};
use super::memory::{DType, Memory, Scales, block_shift};
use super::parameters;
use super::ptx::Module;
use crate::codebook::QuantType;
use crate::error::{Error, Result};
use crate::geometry::{BlockSize, packed_len};

/// `y[m][n] = x[m][k] · W[n][k]ᵀ + bias[n]`, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// `[m][k]`, of the type in which the product is made.
    pub x: &'a Memory,
    /// The codes of `W`, uint8.
    pub packed: &'a Memory,
    /// The scales of `W`.
    pub scales: &'a Scales,
    /// `[n]`, of the type of `x`.
    pub bias: Option<&'a Memory>,
    /// `[m][n]`, of the type of `x`.
    pub y: &'a Memory,
    /// Rows of `x`.
    pub m: usize,
    /// Rows of `W`.
    pub n: usize,
    /// Columns of both.
    pub k: usize,
    /// The codebook of `W`.
    pub quant_type: QuantType,
    /// Values of `W` that share a scale.
    pub blocksize: BlockSize,
}

/// The kernel that [`product`] used: its name begins with `decode` or `product`.
pub type KernelName = &'static str;

// Of kernels/product.cu.
const PRODUCT_THREADS: u32 = 256;
const PRODUCT_ELEMENTS: usize = 8;

// Of kernels/decode.cuh and its two users.
const DECODE_BLOCK: usize = 64;
const DECODE_ROWS: usize = 16;
const DECODE_COLUMNS: usize = 8;
const DECODE_FRAGMENTS: usize = 2;
const DECODE_WARPS: usize = 16;
const DECODE_CHUNK: usize = 4;
const DECODE_TABLE: usize = 256 * 256;
const DECODE_MAP: usize = 1024;
/// Partial sums of one column of a tile.
const DECODE_COLUMN: usize = 16 * 4;
const RING_WARPS: usize = 8;
const RING_FRAGMENTS: usize = 4;
/// Sums of eight columns of a warp for a step.
const RING_SUMS: usize = DECODE_ROWS * DECODE_COLUMNS * size_of::<f32>();
const RING_BARRIER: usize = 8;
/// What is on the way, of all warps.
const RING_AHEAD: usize = 64 * 1024;
/// Shared memory that the device keeps for itself, before the block's: the table of `decode_ring` begins at a multiple of
/// its size, whether or not there is such a part.
const RESERVED_SHARED: usize = 1024;

fn product_kernel(dtype: DType, nested: bool) -> Kernel {
    let name = match (dtype, nested) {
        (DType::Bf16, false) => "product_bf16",
        (DType::Bf16, true) => "product_bf16_nested",
        (DType::F16, false) => "product_f16",
        (DType::F16, true) => "product_f16_nested",
        (_, false) => "product_f32",
        (_, true) => "product_f32_nested",
    };
    Kernel { module: Module::Product, name, threads: PRODUCT_THREADS, large_shared: false }
}

/// What `DecodePlan` is to `decode`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    rows: i32,
    slots: i32,
    per_pass: i32,
}

/// What `RingPlan` is to `decode_ring`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RingPlan {
    rows: i32,
    log2_slots: i32,
    chunks: i32,
    per_pass: i32,
    log2_sharing: i32,
    ahead: i32,
}

/// What goes with a [`RingPlan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RingLaunch {
    plan: RingPlan,
    /// Whether it is one for several rounds.
    long: bool,
    blocks: u64,
    shared: u32,
}

#[derive(Debug, Clone, Copy)]
enum AnyPlan {
    Registers(Plan),
    Ring(RingPlan),
}

#[derive(Debug, Clone, Copy)]
struct Decode {
    kernel: Kernel,
    plan: AnyPlan,
    blocks: u64,
    shared: u32,
}

/// As many parts of K, a power of two, as leave each warp most of a chunk.
fn parts_of_k(k: usize, warps: usize, chunk: usize) -> usize {
    let mut slots = warps;
    while slots > 1 && k / DECODE_BLOCK < slots * chunk * 3 / 4 {
        slots /= 2;
    }
    slots
}

/// How the work is divided, or `None` when shared memory has no room for one tile: the plan, the blocks of threads, and the
/// shared memory of each.
fn decode_plan(
    (m, n, k): (usize, usize, usize),
    multiprocessors: usize,
    shared_per_block: usize,
) -> Option<(Plan, u64, u32)> {
    let fragments = m.div_ceil(DECODE_COLUMNS);
    let slots = parts_of_k(k, DECODE_WARPS / fragments, DECODE_CHUNK * fragments);
    let rows = n.div_ceil(multiprocessors);
    let tiles = rows.div_ceil(DECODE_ROWS);
    let partial = slots * m * DECODE_COLUMN;
    let room = shared_per_block.checked_sub(DECODE_TABLE + DECODE_MAP)? / partial;
    if room == 0 {
        return None;
    }
    // Passes of equal length.
    let per_pass = tiles.div_ceil(tiles.div_ceil(room));
    let plan = Plan {
        rows: i32::try_from(rows).ok()?,
        slots: i32::try_from(slots).ok()?,
        per_pass: i32::try_from(per_pass).ok()?,
    };
    let shared = DECODE_TABLE + DECODE_MAP + per_pass * partial;
    Some((plan, n.div_ceil(rows) as u64, u32::try_from(shared).ok()?))
}

/// The same for `decode_ring`.
fn ring_plan(
    (m, n, k): (usize, usize, usize),
    nested: bool,
    multiprocessors: usize,
    shared_per_block: usize,
) -> Option<RingLaunch> {
    let fragments = m.div_ceil(DECODE_COLUMNS).next_power_of_two();
    // Blocks of a slot, and chunks of a round.
    let (slot, round) = match fragments {
        1 => (8, 2),
        2 => (8, 1),
        _ => (4, 1),
    };
    let values = slot * DECODE_BLOCK;
    // As few slots as leave no more chunks than the most do.
    let mut slots = RING_WARPS;
    while slots > 1 && k <= slots / 2 * values {
        slots /= 2;
    }
    let chunks = k.div_ceil(slots * values);
    let long = chunks > round || fragments > DECODE_FRAGMENTS;
    // With several rounds there is one stage more. What is before the table fits in front of the first place for it,
    // whichever that is.
    let stage = RING_WARPS * DECODE_ROWS * values / 2;
    let shared = 2 * DECODE_TABLE + RING_AHEAD + if long { stage } else { 0 };
    if shared > shared_per_block {
        return None;
    }
    let room = DECODE_TABLE - RESERVED_SHARED - DECODE_MAP;
    let steps_of = |rows: usize| rows.div_ceil(DECODE_ROWS * (RING_WARPS / slots));
    let step_sums = RING_WARPS * fragments * RING_SUMS;
    let mut rows = n.div_ceil(multiprocessors);
    // Whole tiles where that leaves few multiprocessors without work: fewer of them fetch x.
    let tiled = rows.next_multiple_of(DECODE_ROWS * (RING_WARPS / slots));
    if n.div_ceil(tiled) * 16 >= n.div_ceil(rows) * 15 {
        rows = tiled;
    }
    let mut sharing = 1;
    let per_pass = if long {
        // The sums of all steps have to fit: warps share places, then more blocks have fewer rows each.
        while steps_of(rows) * (RING_WARPS * RING_BARRIER + step_sums / sharing) > room {
            if sharing < slots {
                sharing *= 2;
            } else {
                rows = rows.div_ceil(2);
            }
        }
        steps_of(rows)
    } else {
        // Passes of equal length.
        let steps = steps_of(rows);
        steps.div_ceil(steps.div_ceil(room / step_sums))
    };
    // More would hold up x; measured on an H100, as were the parts.
    let (part, most) = if nested { (7, 64 << 10) } else { (5, 96 << 10) };
    let plan = RingPlan {
        rows: i32::try_from(rows).ok()?,
        log2_slots: slots.ilog2() as i32,
        chunks: i32::try_from(chunks).ok()?,
        per_pass: i32::try_from(per_pass).ok()?,
        log2_sharing: sharing.ilog2() as i32,
        ahead: ((rows * (k / 2) / part).min(most) / (k / 2)) as i32,
    };
    Some(RingLaunch { plan, long, blocks: n.div_ceil(rows) as u64, shared: u32::try_from(shared).ok()? })
}

impl Product<'_> {
    /// Rows of `x` that one launch takes at most.
    const fn rows_at_once(ring: bool) -> usize {
        DECODE_COLUMNS * if ring { RING_FRAGMENTS } else { DECODE_FRAGMENTS }
    }

    /// `count` rows of `x` from `begin` on, and of `y`.
    fn rows(&self, begin: usize, count: usize) -> (Memory, Memory) {
        (self.x.part(begin * self.k, count * self.k), self.y.part(begin * self.n, count * self.n))
    }

    /// A launch for `m` rows.
    fn decode(&self, device: &Device, ring: bool, m: usize) -> Option<Decode> {
        let (n, k) = (self.n, self.k);
        let module = if ring { Module::DecodeRing } else { Module::Decode };
        let suits = module.image(device.capability()).is_some()
            && (1..=Self::rows_at_once(ring)).contains(&m)
            && n >= 1
            && i32::try_from(n).is_ok()
            && k >= DECODE_BLOCK
            && k.is_multiple_of(DECODE_BLOCK)
            && i32::try_from(k).is_ok()
            && self.blocksize.get() >= DECODE_BLOCK
            && self.x.is_aligned(16)
            && self.packed.is_aligned(if ring { 16 } else { 8 })
            && (!ring || self.suits_ring());
        if !suits {
            return None;
        }
        let (few, nested) = (m <= DECODE_COLUMNS, self.scales.is_nested());
        let (multiprocessors, shared_per_block) =
            (device.multiprocessors() as usize, device.shared_per_block() as usize);
        if ring {
            let RingLaunch { plan, long, blocks, shared } =
                ring_plan((m, n, k), nested, multiprocessors, shared_per_block)?;
            let name = match (self.x.dtype(), few, nested, long) {
                (DType::Bf16, _, false, _) if m > DECODE_COLUMNS * DECODE_FRAGMENTS => "decode_ring_long_bf16_32",
                (DType::Bf16, _, true, _) if m > DECODE_COLUMNS * DECODE_FRAGMENTS => "decode_ring_long_bf16_32_nested",
                (DType::F16, _, false, _) if m > DECODE_COLUMNS * DECODE_FRAGMENTS => "decode_ring_long_f16_32",
                (DType::F16, _, true, _) if m > DECODE_COLUMNS * DECODE_FRAGMENTS => "decode_ring_long_f16_32_nested",
                (DType::Bf16, true, false, false) => "decode_ring_bf16_8",
                (DType::Bf16, true, true, false) => "decode_ring_bf16_8_nested",
                (DType::Bf16, false, false, false) => "decode_ring_bf16_16",
                (DType::Bf16, false, true, false) => "decode_ring_bf16_16_nested",
                (DType::F16, true, false, false) => "decode_ring_f16_8",
                (DType::F16, true, true, false) => "decode_ring_f16_8_nested",
                (DType::F16, false, false, false) => "decode_ring_f16_16",
                (DType::F16, false, true, false) => "decode_ring_f16_16_nested",
                (DType::Bf16, true, false, true) => "decode_ring_long_bf16_8",
                (DType::Bf16, true, true, true) => "decode_ring_long_bf16_8_nested",
                (DType::Bf16, false, false, true) => "decode_ring_long_bf16_16",
                (DType::Bf16, false, true, true) => "decode_ring_long_bf16_16_nested",
                (DType::F16, true, false, true) => "decode_ring_long_f16_8",
                (DType::F16, true, true, true) => "decode_ring_long_f16_8_nested",
                (DType::F16, false, false, true) => "decode_ring_long_f16_16",
                (DType::F16, false, true, true) => "decode_ring_long_f16_16_nested",
                _ => return None,
            };
            let module = if long { Module::DecodeRingLong } else { module };
            let kernel = Kernel { module, name, threads: (RING_WARPS * 32) as u32, large_shared: true };
            return Some(Decode { kernel, plan: AnyPlan::Ring(plan), blocks, shared });
        }
        let name = match (self.x.dtype(), few, nested) {
            (DType::Bf16, true, false) => "decode_bf16_8",
            (DType::Bf16, true, true) => "decode_bf16_8_nested",
            (DType::Bf16, false, false) => "decode_bf16_16",
            (DType::Bf16, false, true) => "decode_bf16_16_nested",
            (DType::F16, true, false) => "decode_f16_8",
            (DType::F16, true, true) => "decode_f16_8_nested",
            (DType::F16, false, false) => "decode_f16_16",
            (DType::F16, false, true) => "decode_f16_16_nested",
            _ => return None,
        };
        let (plan, blocks, shared) = decode_plan((m, n, k), multiprocessors, shared_per_block)?;
        let threads = (DECODE_WARPS / m.div_ceil(DECODE_COLUMNS) * 32) as u32;
        let kernel = Kernel { module, name, threads, large_shared: true };
        Some(Decode { kernel, plan: AnyPlan::Registers(plan), blocks, shared })
    }

    /// Codes of scales are copied in words, the last one too: only the bytes that there are, but tools that watch memory
    /// see the word. Blocks are counted in 32 bits.
    fn suits_ring(&self) -> bool {
        let aligned = match self.scales {
            Scales::Plain(_) => true,
            Scales::Nested { codes, .. } => codes.is_aligned(4) && codes.count().is_multiple_of(4),
        };
        aligned && self.n.checked_mul(self.k / DECODE_BLOCK).is_some_and(|blocks| u32::try_from(blocks).is_ok())
    }

    fn check(&self) -> Result<usize> {
        let floats = [DType::F16, DType::Bf16, DType::F32];
        let dtype = self.x.of(&floats)?.dtype();
        let size = |argument, a: usize, b: usize| {
            a.checked_mul(b)
                .filter(|&count| i64::try_from(count).is_ok())
                .ok_or_else(|| Error::argument(argument, format!("{a} x {b}"), "less than 2^63 elements"))
        };
        self.x.long(size("x", self.m, self.k)?, "m x k")?;
        self.y.of(&[dtype])?.long(size("y", self.m, self.n)?, "m x n")?;
        let values = size("packed", self.n, self.k)?;
        self.packed.of(&[DType::U8])?.long(packed_len(values), "two codes to a byte")?;
        if let Some(bias) = self.bias {
            bias.of(&[dtype])?.long(self.n, "one per row of the weight")?;
        }
        Ok(values)
    }
}

/// Rows of `x` that one launch of the fastest kernel of a device takes at most, where the matrix units do it at all.
pub fn rows_at_once(device: &Device) -> usize {
    let ring = Module::DecodeRingLong.image(device.capability()).is_some()
        && ring_plan((DECODE_COLUMNS * RING_FRAGMENTS, 1, DECODE_BLOCK), false, 1, device.shared_per_block() as usize)
            .is_some();
    Product::rows_at_once(ring)
}

/// Which kernel makes a product.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Choice {
    /// The fastest that takes the arguments.
    #[default]
    Best,
    /// With the matrix units, the weight by way of shared memory.
    DecodeRing,
    /// With the matrix units, the weight by way of registers.
    Decode,
    /// The plain one.
    Plain,
}

impl Choice {
    const NAMES: [(&'static str, Self); 4] =
        [("best", Self::Best), ("decode_ring", Self::DecodeRing), ("decode", Self::Decode), ("plain", Self::Plain)];

    /// The kernels to try, best first.
    fn decoders(self) -> &'static [bool] {
        match self {
            Self::Best => &[true, false],
            Self::DecodeRing => &[true],
            Self::Decode => &[false],
            Self::Plain => &[],
        }
    }
}

impl std::str::FromStr for Choice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let legal = Self::NAMES.map(|(name, _)| name);
        let found = Self::NAMES.into_iter().find(|(n, _)| *n == name);
        found.map(|(_, c)| c).ok_or_else(|| Error::argument("kernel", format!("{name:?}"), format!("one of {legal:?}")))
    }
}

/// Makes the product; gives the name of the kernel that it used (first).
///
/// The matrix units take float16 and bfloat16 on devices of compute capability 8.0 and later, when `k` is a multiple of 64,
/// the block size at least 64, and `x` and `packed` aligned to 16 bytes; with [`rows_at_once`] rows of `x` in a launch, of
/// which there are as many as it takes. There each weight is its codebook value rounded to the type of `x`, and the scale is
/// applied in float32 to the sums of a block. Everything else goes to a plain kernel: correct, and slow for many rows.
///
/// The result is the same from run to run on one device; sums are float32.
///
/// # Errors
/// [`Error::Argument`] for a dtype or a length that does not fit, and when the kernel chosen does not take the arguments;
/// [`Error::Cuda`] when the launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernel has ended on `stream`, and is not written by others; `y` is
/// neither read nor written by others, and shares nothing with the inputs. The stream is of this device.
pub unsafe fn product(device: &Device, stream: Stream, product: &Product<'_>, choice: Choice) -> Result<KernelName> {
    let values = product.check()?;
    let scales = product.scales.parameter(values, product.blocksize)?;
    let bias = product.bias.map_or(0, Memory::address);
    let shift = block_shift(product.blocksize);
    let quant_type = quant_type_parameter(product.quant_type);
    let packed = product.packed.address();
    let (m, n, k) = (product.m, product.n, product.k);
    for &ring in choice.decoders() {
        let at_once = Product::rows_at_once(ring);
        let Some(first) = product.decode(device, ring, m.min(at_once)) else {
            continue;
        };
        for begin in (0..m).step_by(at_once) {
            let count = at_once.min(m - begin);
            // What suits some rows suits fewer.
            let decode = if begin == 0 { Some(first) } else { product.decode(device, ring, count) };
            let Some(Decode { kernel, plan, blocks, shared }) = decode else {
                return Err(Error::argument("m", m, format!("rows that {} takes", first.kernel.name)));
            };
            let (x, y) = product.rows(begin, count);
            let (x, y) = (x.address(), y.address());
            let (m, n, k) = (count as i32, n as i32, k as i32);
            // SAFETY: the kernel's parameters in its order; lengths and alignment were checked, the one that starts early
            // waits, the rest is the caller's.
            unsafe {
                match plan {
                    AnyPlan::Registers(plan) => {
                        let parameters = parameters![x, packed, scales, bias, y, m, n, k, shift, quant_type, plan];
                        device.launch(stream, &kernel, blocks, shared, parameters)
                    }
                    AnyPlan::Ring(plan) => {
                        let parameters = parameters![x, packed, scales, bias, y, m, n, k, shift, quant_type, plan];
                        device.launch_early(stream, &kernel, blocks, shared, parameters)
                    }
                }
            }?;
        }
        return Ok(first.kernel.name);
    }
    if matches!(choice, Choice::Decode | Choice::DecodeRing) {
        let expected = "\"best\", because this kernel does not take these arguments on this device";
        return Err(Error::argument("kernel", format!("{choice:?}"), expected));
    }
    let kernel = product_kernel(product.x.dtype(), product.scales.is_nested());
    let blocks = (m * n).div_ceil(PRODUCT_ELEMENTS) as u64;
    let (x, y) = (product.x.address(), product.y.address());
    let (m, n, k) = (m as i64, n as i64, k as i64);
    let parameters = parameters![x, packed, scales, bias, y, m, n, k, shift, quant_type];
    // SAFETY: as above.
    unsafe { device.launch(stream, &kernel, blocks, 0, parameters) }?;
    Ok(kernel.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: [usize; 7] = [1, 3, 8, 9, 16, 17, 32];
    const N: [usize; 8] = [1, 7, 16, 100, 4096, 5120, 14336, 128_256];
    const K: [usize; 8] = [64, 128, 320, 1024, 4096, 5120, 14336, 28672];

    fn shapes() -> impl Iterator<Item = (usize, usize, usize)> {
        M.into_iter().flat_map(|m| N.into_iter().flat_map(move |n| K.into_iter().map(move |k| (m, n, k))))
    }

    #[test]
    fn every_row_and_every_block_has_a_warp() {
        for (multiprocessors, shared) in [(108, 166_912), (82, 101_376), (1, 101_376)] {
            for (m, n, k) in shapes().filter(|&(m, ..)| m <= Product::rows_at_once(false)) {
                let (plan, blocks, bytes) = decode_plan((m, n, k), multiprocessors, shared).unwrap();
                let (rows, slots) = (plan.rows as usize, plan.slots as usize);
                assert!(blocks as usize * rows >= n && (blocks as usize - 1) * rows < n, "{m} {n} {k}");
                assert!(blocks as usize <= multiprocessors);
                assert!(slots.is_power_of_two() && slots * DECODE_BLOCK <= k);
                assert!(slots * m.div_ceil(DECODE_COLUMNS) <= DECODE_WARPS);
                assert!(plan.per_pass >= 1 && bytes as usize <= shared);
            }
        }
    }

    #[test]
    fn every_row_and_every_block_has_a_warp_and_a_place_in_the_ring() {
        for ((m, n, k), nested) in shapes().flat_map(|shape| [(shape, false), (shape, true)]) {
            let RingLaunch { plan, long, blocks, shared } = ring_plan((m, n, k), nested, 132, 232_448).unwrap();
            let (rows, slots, chunks) = (plan.rows as usize, 1 << plan.log2_slots, plan.chunks as usize);
            assert!(blocks as usize * rows >= n && (blocks as usize - 1) * rows < n, "{m} {n} {k}");
            assert!(blocks <= 132 || long, "{m} {n} {k}: {blocks} blocks");
            assert!(slots <= RING_WARPS);
            // No chunk is without blocks, and none are left.
            let fragments = [1, 2, 4].into_iter().find(|f| m <= f * DECODE_COLUMNS).unwrap();
            let chunk = slots * if fragments == 4 { 4 } else { 8 } * DECODE_BLOCK;
            assert!(chunks * chunk >= k && (chunks - 1) * chunk < k, "{m} {n} {k}");
            assert_eq!(long, chunks > if fragments == 1 { 2 } else { 1 } || fragments == 4);
            let steps = rows.div_ceil(DECODE_ROWS * (RING_WARPS / slots));
            let (per_pass, sharing) = (plan.per_pass as usize, 1 << plan.log2_sharing);
            assert!(if long {
                per_pass == steps && sharing <= slots
            } else {
                (1..=steps).contains(&per_pass) && sharing == 1
            });
            let barriers = if long { per_pass * RING_WARPS * RING_BARRIER } else { 0 };
            let sums = per_pass * RING_WARPS / sharing * fragments * RING_SUMS;
            assert!(RESERVED_SHARED + barriers + DECODE_MAP + sums <= DECODE_TABLE, "{m} {n} {k}");
            assert!((0..=plan.rows).contains(&plan.ahead));
            assert!(shared as usize <= 232_448);
        }
    }

    #[test]
    fn shared_memory_without_room() {
        assert_eq!(decode_plan((16, 4096, 4096), 40, 65536), None);
        assert_eq!(ring_plan((1, 4096, 4096), false, 108, 166_912), None);
    }
}
