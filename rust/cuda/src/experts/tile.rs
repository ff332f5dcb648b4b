//! Products for many slots of an expert (kernels/experts/tile_sm90a): which shapes they take, and how they divide the work.

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};

use super::layer::{ALIGNMENT, Activation, Choices, Experts, Matrices};
use super::route::Routed;
use crate::driver::{Device, Stream, TensorMap, TileType};
use crate::gemm::workspace::{self, Workspace as Sums};
use crate::kernels::{
    self, Kernel, experts_tile_sm90a_bf16_16 as source, experts_tile_sm90a_bf16_32 as source_32,
    experts_tile_sm90a_bf16_64 as source_64, experts_tile_sm90a_bf16_128 as source_128,
};
use crate::launch::parameters;
use crate::memory::block_shift;

/// What `Experts::takes` allows beyond is not for the copy engine.
const MOST_PITCH: usize = 1 << 40;
/// From so many slots of an expert on, on average, these products are faster than those for few slots.
const SLOTS: usize = 6;
/// With fewer slots they are faster if the chosen experts have so many bytes of codes for each multiprocessor. Measured on an H200,
/// with blocks of 64 and bfloat16, in microseconds, first by the products for few slots, then by these: 128 experts of 2048 x 768, 8 for each token, 6 tokens 58 and 59, 8 tokens
/// 69 and 68, 16 tokens 104 and 91; 60 of 2048 x 1408, 4 for each, 8 tokens 64 and 62; 32 of 2880 x 2880, 4 for each, 2 tokens 63
/// and 67, 4 tokens 103 and 97; 8 of 4096 x 14336, 2 for each, 1 token 85 and 80, 8 tokens 280 and 229.
const FEWEST_BYTES: f64 = 0.9e6;

/// Consumers of a block that have rows of their own, and so sums of their own.
const TEAMS: usize = 2;
/// Tiles of each block up to which blocks share all of them.
const FEW_TILES: usize = 8;

/// The forms of the kernel.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Slots of an expert, on average, up to which it is the fastest. With 8, 12, 16, 24, 32, 48, 64, 96, 128 and 256 slots a block
    /// of 128 experts of 2048 x 768 took, in microseconds on an H200, by tokens of a tile:
    /// 16: 132, 152, 187, 247, 298, 419, 554, 766, 1028, 1924; 32: 154, 158, 160, 177, 232, 320, 410, 559, 712, 1373;
    /// 64: 182, 186, 192, 214, 226, 241, 344, 476, 588, 1117; 128: 292, 298, 303, 317, 352, 358, 371, 403, 592, 1058.
    slots: usize,
    /// Tokens of a tile, and those that the copy engine brings at a time.
    tokens: usize,
    step: usize,
    /// Whether blocks can share tiles.
    shares: bool,
    /// The dynamic shared memory of a block.
    shared: usize,
    bf16: &'static Kernel,
    f16: &'static Kernel,
}

const FORMS: [Form; 4] = [
    Form {
        slots: 12,
        tokens: 16,
        step: 16,
        shares: true,
        shared: source::EXPERTSHAPE_16_BYTES,
        bf16: &kernels::EXPERTS_TILE_SM90A_BF16_16,
        f16: &kernels::EXPERTS_TILE_SM90A_F16_16,
    },
    Form {
        slots: 28,
        tokens: 32,
        step: source::STEP_TOKENS,
        shares: false,
        shared: source_32::EXPERTSHAPE_32_BYTES,
        bf16: &kernels::EXPERTS_TILE_SM90A_BF16_32,
        f16: &kernels::EXPERTS_TILE_SM90A_F16_32,
    },
    Form {
        slots: 72,
        tokens: 64,
        step: source::STEP_TOKENS,
        shares: false,
        shared: source_64::EXPERTSHAPE_64_BYTES,
        bf16: &kernels::EXPERTS_TILE_SM90A_BF16_64,
        f16: &kernels::EXPERTS_TILE_SM90A_F16_64,
    },
    Form {
        slots: usize::MAX,
        tokens: 128,
        step: source::STEP_TOKENS,
        shares: false,
        shared: source_128::EXPERTSHAPE_128_BYTES,
        bf16: &kernels::EXPERTS_TILE_SM90A_BF16_128,
        f16: &kernels::EXPERTS_TILE_SM90A_F16_128,
    },
];

/// What `ExpertsProduct` is to the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Product {
    offsets: u64,
    order: u64,
    table: u64,
    maps: u64,
    experts: i32,
    gate: i32,
    up: i32,
    n: i32,
    k: i32,
    block_shift: i32,
    nested: i32,
    activation: u32,
    pitch: i32,
    bias_pitch: i32,
    copies_scales: i32,
    shares: i32,
    permutes: i32,
}

/// The products of a call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    form: Form,
    kernel: &'static Kernel,
}

impl Tile {
    /// For so many slots with an activation, or with none that a kernel makes; `None` where the products for few slots are
    /// faster or alone.
    pub(super) fn new(
        experts: &Experts,
        slots: usize,
        matrices: &Matrices,
        activation: Option<Activation>,
    ) -> Option<Self> {
        let form = form_for(experts, slots)?;
        let kernel = if experts.dtype == DType::F16 { form.f16 } else { form.bf16 };
        let suits = suits(experts.device)
            && matrices.maps != 0
            && experts.hidden.max(experts.intermediate) * 2 < MOST_PITCH
            // Without a gate there are those that models have.
            && (experts.gated || matches!(activation, None | Some(Activation::Relu2)));
        suits.then_some(Self { form, kernel })
    }

    /// Gate and up, or up alone: `y[slots][intermediate]` in the order, without an activation `[slots][2 or 1][intermediate]`.
    /// `gathered`: `[slots][hidden]`, rows of x in the order, their columns in that of kernels/experts/permute.cuh; with an
    /// activation y is so as well.
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
        gathered: u64,
        routed: &Routed,
        y: u64,
    ) -> Result<&'static str> {
        let slots = choices.slots();
        let (n, k) = (experts.intermediate, experts.hidden);
        let projections = experts.projections();
        let joint = activation.is_some() || projections == 1;
        let (gate, up) = if experts.gated && joint { (0, 1) } else { (-1, 0) };
        let product = Product {
            gate,
            up,
            activation: kind(activation),
            pitch: (if activation.is_some() { n } else { projections * n }) as i32,
            bias_pitch: (projections * n) as i32,
            // What goes into the last matrices without anything in between.
            permutes: i32::from(activation.is_some()),
            ..product(experts, matrices, routed, (n, k))
        };
        // SAFETY: the caller's.
        unsafe { self.launch(experts, stream, slots, gathered, &product, matrices.up_bias, y, routed.sums) }?;
        if !joint {
            let behind = (n * 2) as u64;
            let bias = if matrices.up_bias == 0 { 0 } else { matrices.up_bias + behind };
            let product = Product { up: 1, ..product };
            // SAFETY: the caller's; what this one writes the one before does not.
            unsafe { self.launch(experts, stream, slots, gathered, &product, bias, y + behind, routed.sums) }?;
        }
        Ok(self.kernel.name)
    }

    /// Down: `y[slots][hidden]` as slots are numbered, from `x[slots][intermediate]` in the order, columns as `up` has them.
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
        let (n, k) = (experts.hidden, experts.intermediate);
        let product = Product {
            order: routed.order,
            up: experts.projections() as i32,
            ..product(experts, matrices, routed, (n, k))
        };
        // SAFETY: the caller's.
        unsafe { self.launch(experts, stream, choices.slots(), x, &product, matrices.down_bias, y, routed.sums) }?;
        Ok(self.kernel.name)
    }

    #[allow(clippy::too_many_arguments)] // what the kernel needs
    unsafe fn launch(
        &self,
        experts: &Experts,
        stream: Stream,
        slots: usize,
        x: u64,
        product: &Product,
        bias: u64,
        y: u64,
        shared: u64,
    ) -> Result<()> {
        let kind = if experts.dtype == DType::F16 { TileType::F16 } else { TileType::Bf16 };
        let map = TensorMap::new(kind, x, (slots, product.k as usize), (self.form.step, source::K_TILE))?;
        let shares = self.form.shares && shares(experts, self.form.tokens, slots, product);
        let (product, codebook) = (Product { shares: i32::from(shares), ..*product }, *experts.quant_type.values());
        let blocks = u64::from(experts.device.multiprocessors());
        let sums = Sums::new(shared, sums(experts, self.form.tokens));
        let parameters = parameters![map, product, codebook, bias, y, sums];
        // SAFETY: the kernel's parameters in its order; it waits before it touches what earlier ones write, the rest is the
        // caller's.
        unsafe { experts.device.launch_early(stream, self.kernel, blocks, self.form.shared as u32, parameters) }
    }
}

/// Whether a device has them.
fn suits(device: &Device) -> bool {
    kernels::EXPERTS_TILE_SM90A_BF16_32.suits(device.capability())
        && kernels::EXPERTS_GATHER.suits(device.capability())
        && FORMS.iter().all(|form| form.shared <= device.shared_per_block() as usize)
}

/// The fastest form for so many slots, or `None` where the products for few slots are faster.
fn form_for(experts: &Experts, slots: usize) -> Option<Form> {
    let codes = (experts.projections() + 1) * experts.hidden * experts.intermediate / 2;
    fastest(experts.experts, codes, slots, experts.device.multiprocessors() as usize)
}

/// The same for so many experts, each with so many bytes of codes.
fn fastest(experts: usize, codes: usize, slots: usize, multiprocessors: usize) -> Option<Form> {
    let of_each = slots / experts;
    // Of the experts those that are chosen, if each choice may be any of them.
    let chosen = experts as f64 * (1.0 - (1.0 - 1.0 / experts as f64).powi(slots as i32));
    let few = of_each < SLOTS && chosen * (codes as f64) < FEWEST_BYTES * multiprocessors as f64;
    if few { None } else { FORMS.into_iter().find(|form| of_each <= form.slots) }
}

fn kind(activation: Option<Activation>) -> u32 {
    (match activation {
        None => source::ACTIVATION_NONE,
        Some(Activation::Silu) => source::ACTIVATION_SILU,
        Some(Activation::Gelu) => source::ACTIVATION_GELU,
        Some(Activation::GeluTanh) => source::ACTIVATION_GELU_TANH,
        Some(Activation::Relu2) => source::ACTIVATION_RELU2,
        Some(Activation::ClampedSwiglu) => source::ACTIVATION_CLAMPED_SWIGLU,
    }) as u32
}

fn product(experts: &Experts, matrices: &Matrices, routed: &Routed, (n, k): (usize, usize)) -> Product {
    Product {
        offsets: routed.offsets,
        order: 0,
        table: matrices.table,
        maps: matrices.maps,
        experts: experts.experts as i32,
        gate: -1,
        up: 0,
        n: n as i32,
        k: k as i32,
        block_shift: block_shift(experts.blocksize),
        nested: i32::from(experts.nested),
        activation: source::ACTIVATION_NONE as u32,
        pitch: n as i32,
        bias_pitch: n as i32,
        copies_scales: i32::from(copies_scales(experts, k)),
        shares: 0,
        permutes: 0,
    }
}

/// Bytes of the sums that blocks leave each other.
fn sums(experts: &Experts, tokens: usize) -> usize {
    experts.device.multiprocessors() as usize * source::QUARTERS * source::QUARTER_ROWS * tokens * size_of::<f32>()
}

/// The memory that products of so many slots want for these.
pub(super) fn workspace(experts: &Experts, slots: usize) -> usize {
    match form_for(experts, slots).filter(|form| form.shares && suits(experts.device)) {
        Some(form) => workspace::bytes(sums(experts, form.tokens), TEAMS * experts.device.multiprocessors() as usize),
        None => 0,
    }
}

/// Whether blocks share tiles: where there may be so few that with whole ones some would have much more to do than others.
fn shares(experts: &Experts, tokens: usize, slots: usize, product: &Product) -> bool {
    let of_tile = source::QUARTER_ROWS * if product.gate < 0 { source::QUARTERS } else { source::QUARTERS / 2 };
    let row_tiles = (product.n as usize).div_ceil(of_tile);
    let most = (slots.min(experts.experts) + slots / tokens) * row_tiles;
    let (stages, blocks) = ((product.k as usize).div_ceil(source::SCALES_K), experts.device.multiprocessors() as usize);
    // The kernel counts in 32 bits.
    let counts =
        most.checked_mul(stages).and_then(|all| all.checked_mul(blocks)).is_some_and(|all| u32::try_from(all).is_ok());
    counts && most < FEW_TILES * blocks
}

/// Whether the copy engine may bring scales for `k` columns: four blocks of a row are 16 bytes, and rows begin at multiples of
/// that.
fn copies_scales(experts: &Experts, k: usize) -> bool {
    !experts.nested && experts.blocksize.get() == source::K_TILE && k.is_multiple_of(source::SCALES_K)
}

/// What the copy engine has to know of matrices of `rows` by `columns` with codes at these addresses, and of their scales, float32
/// of blocks of 64, or of none: [`Matrices::maps`], 256 bytes for each. Those of scales that it cannot read are zero.
///
/// # Errors
/// [`Error::Argument`] for an address of codes that is not a multiple of 16, no columns that rows of whole 16 bytes have, or
/// another number of scales than codes.
pub fn maps(codes: &[u64], scales: Option<&[u64]>, rows: usize, columns: usize) -> Result<Vec<u8>> {
    if rows == 0 || columns == 0 || !columns.is_multiple_of(32) {
        return Err(Error::argument(
            "columns",
            format!("{rows} x {columns}"),
            "a multiple of 32, and some rows".to_owned(),
        ));
    }
    if let Some(scales) = scales.filter(|scales| scales.len() != codes.len()) {
        return Err(Error::argument("scales", scales.len(), format!("{}, as there are codes", codes.len())));
    }
    let mut bytes = Vec::with_capacity(2 * codes.len() * size_of::<TensorMap>());
    for (i, &address) in codes.iter().enumerate() {
        if address == 0 || !address.is_multiple_of(ALIGNMENT) {
            let expected = format!("addresses that are multiples of {}, not 0", ALIGNMENT);
            return Err(Error::argument("codes", format!("{address:#x}"), expected));
        }
        let tile = (source::QUARTER_ROWS, source::BOX_BYTES);
        bytes.extend(TensorMap::new(TileType::U8, address, (rows, columns / 2), tile)?.to_bytes());
        let scales = scales.map_or(0, |scales| scales[i]);
        if scales != 0 && scales.is_multiple_of(ALIGNMENT) && columns.is_multiple_of(source::SCALES_K) {
            let (size, tile) = ((rows, columns / source::K_TILE), (source::QUARTER_ROWS, source::SCALES_K_TILES));
            bytes.extend(TensorMap::new(TileType::F32, scales, size, tile)?.to_bytes());
        } else {
            bytes.extend([0; size_of::<TensorMap>()]);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_slots_have_wider_tiles() {
        let tokens = |slots: usize| fastest(128, 3 * 2048 * 768 / 2, 128 * slots, 132).map(|form| form.tokens);
        assert_eq!([1, 12, 13, 28, 29, 72, 73, 1000].map(tokens), [16, 16, 32, 32, 64, 64, 128, 128].map(Some));
    }

    #[test]
    fn few_bytes_are_for_the_other_products() {
        let wide = |experts: usize, hidden: usize, intermediate: usize, slots: usize| {
            fastest(experts, 3 * hidden * intermediate / 2, slots, 132).is_some()
        };
        // As measured: 128 experts of 2048 x 768 with 8 choices for each token, 60 of 2048 x 1408 with 4, 8 of 4096 x 14336 with 2.
        assert_eq!([1, 4, 8, 16].map(|tokens| wide(128, 2048, 768, 8 * tokens)), [false, false, true, true]);
        assert_eq!([2, 4, 16].map(|tokens| wide(60, 2048, 1408, 4 * tokens)), [false, false, true]);
        assert!(wide(8, 4096, 14336, 2));
        // Small experts, of which each has many slots.
        assert!(!wide(8, 128, 256, 8 * SLOTS - 1) && wide(8, 128, 256, 8 * SLOTS));
    }

    #[test]
    fn shared_memory_is_what_a_block_may_have() {
        let bytes = FORMS.map(|form| form.shared);
        assert!(bytes.iter().all(|&bytes| bytes <= 232_448), "{bytes:?}");
        let of = |tokens: usize, x: usize, stages: usize| {
            let codes = stages * (256 * 128 + 4 * 256 * 4);
            x * 128 * tokens + codes + 65536 + 2 * 8192 + 8 * tokens + 1024 + 16 * (stages + x)
        };
        assert_eq!(bytes, [of(16, 8, 3), of(32, 8, 3), of(64, 4, 2), of(128, 4, 2)]);
    }
}
