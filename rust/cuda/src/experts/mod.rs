//! A block of experts with 4-bit weights: slots to experts, gate and up with the activation, down, and the weighted sum.
//!
//! A slot is one choice of a token's. Every launch knows which slots an expert has from device memory alone, so that nothing
//! waits for it and a graph can hold it.

mod chunks;
mod dequantize;
mod few;
mod layer;
mod route;
mod tile;
mod workspace;

use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::BlockSize;

use crate::driver::{Device, Stream};
use crate::kernels::experts_route;

use few::Few;
use layer::ALIGNMENT;
use route::Routed;
use tile::Tile;
use workspace::Workspace;

pub use layer::{Activation, Choices, Experts, Matrices, Weights};
pub use tile::maps;

/// The most experts of a block.
pub const MOST_EXPERTS: usize = experts_route::MOST_EXPERTS;

/// Hidden and intermediate sizes are multiples of this.
const SIZE_UNIT: usize = few::BLOCK;
const MOST_SIZE: usize = 1 << 17;
/// The most choices of a call.
const MOST_SLOTS: usize = 1 << 19;

impl Experts {
    /// # Errors
    /// [`Error::Argument`] for a dtype that is not of 16 bits.
    #[allow(clippy::too_many_arguments)] // what there is to know of the shape
    pub fn new(
        device: &'static Device,
        dtype: DType,
        experts: usize,
        (hidden, intermediate): (usize, usize),
        gated: bool,
        quant_type: QuantType,
        blocksize: BlockSize,
        nested: bool,
    ) -> Result<Self> {
        let legal = [DType::F16, DType::Bf16];
        if !legal.contains(&dtype) {
            return Err(Error::dtype("dtype", dtype.as_str(), &legal));
        }
        Ok(Self { device, dtype, experts, hidden, intermediate, gated, quant_type, blocksize, nested })
    }

    /// Whether `launch` takes so many tokens with so many choices each.
    pub fn takes(&self, tokens: usize, top_k: usize) -> bool {
        // The kernels count rows, a matrix's blocks and the tiles of all chunks in 32 bits.
        let size = |n: usize| (SIZE_UNIT..=MOST_SIZE).contains(&n) && n.is_multiple_of(SIZE_UNIT);
        let slots = tokens.checked_mul(top_k).filter(|slots| (1..=MOST_SLOTS).contains(slots));
        Few::suits(self.device)
            && (1..=MOST_EXPERTS).contains(&self.experts)
            && size(self.hidden)
            && size(self.intermediate)
            && self.blocksize.get() >= few::BLOCK
            && slots.is_some()
    }

    /// Bytes of the workspace of `launch`, which begins at a multiple of 256.
    ///
    /// # Errors
    /// [`Error::Argument`] for what [`Experts::takes`] refuses.
    pub fn workspace(&self, tokens: usize, top_k: usize) -> Result<usize> {
        self.parts(tokens, top_k).map(|parts| parts.bytes)
    }

    fn parts(&self, tokens: usize, top_k: usize) -> Result<Workspace> {
        if !self.takes(tokens, top_k) {
            let Self { experts, hidden, intermediate, blocksize, .. } = self;
            let blocksize = blocksize.get();
            let found = format!(
                "{tokens} with {top_k} choices each, of {experts} experts of {hidden} x {intermediate} in blocks of {blocksize}"
            );
            let expected = format!(
                "such that takes() is true: compute capability 8.0 or later, sizes that are multiples of {SIZE_UNIT} up to \
                 {MOST_SIZE}, blocks of {SIZE_UNIT} or more, at most {MOST_EXPERTS} experts and {MOST_SLOTS} choices in all"
            );
            return Err(Error::argument("tokens", found, expected));
        }
        let slots = tokens * top_k;
        Ok(Workspace::new(self, slots, tile::workspace(self, slots)))
    }

    fn projections(&self) -> usize {
        if self.gated { 2 } else { 1 }
    }

    /// Makes `y[token] = sum over j of weights[token][j] * expert(ids[token][j])(x[token])`; gives the names of the kernels of the
    /// two products.
    ///
    /// # Errors
    /// [`Error::Argument`] for what [`Experts::takes`] refuses, and for addresses that are not aligned; [`Error::Cuda`] when a
    /// launch fails.
    ///
    /// # Safety
    /// The memory is of this device, of these lengths, stays valid until the kernels have ended on `stream`, and is not written
    /// by others; y and the workspace are neither read nor written by others, and share nothing with each other or the inputs.
    /// Codes begin at multiples of 16 bytes. The stream is of this device.
    #[allow(clippy::too_many_arguments)] // what the kernels need, each with a type of its own
    pub unsafe fn launch(
        &self,
        stream: Stream,
        choices: &Choices,
        weights: Weights,
        matrices: &Matrices,
        activation: Activation,
        x: u64,
        workspace: u64,
        y: u64,
    ) -> Result<[&'static str; 2]> {
        let parts = self.parts(choices.tokens, choices.top_k)?;
        check([("x", x), ("y", y), ("workspace", workspace)])?;
        let hidden = workspace + parts.hidden as u64;
        // SAFETY: the caller's.
        unsafe {
            let up = self.first(stream, choices, matrices, Some(activation), x, workspace, &parts, hidden)?;
            let down =
                self.second(stream, choices, weights, matrices, Some(activation), hidden, workspace, &parts, y)?;
            Ok([up, down])
        }
    }

    /// Makes the products of gate and up, or of up alone, for each slot: `products[slots][2 or 1][intermediate]`, slots in the
    /// order that [`Experts::down`] wants. Gives the name of the kernel.
    ///
    /// # Errors
    /// As [`Experts::launch`].
    ///
    /// # Safety
    /// As [`Experts::launch`].
    pub unsafe fn up(
        &self,
        stream: Stream,
        choices: &Choices,
        matrices: &Matrices,
        x: u64,
        workspace: u64,
        products: u64,
    ) -> Result<&'static str> {
        let parts = self.parts(choices.tokens, choices.top_k)?;
        check([("x", x), ("products", products), ("workspace", workspace)])?;
        // SAFETY: the caller's.
        unsafe { self.first(stream, choices, matrices, None, x, workspace, &parts, products) }
    }

    /// The rest, from what an activation made of the products of [`Experts::up`], `hidden[slots][intermediate]`, with the same
    /// choices and the same workspace, in between untouched. Gives the name of the product's kernel.
    ///
    /// # Errors
    /// As [`Experts::launch`].
    ///
    /// # Safety
    /// As [`Experts::launch`].
    #[allow(clippy::too_many_arguments)] // as `launch`
    pub unsafe fn down(
        &self,
        stream: Stream,
        choices: &Choices,
        weights: Weights,
        matrices: &Matrices,
        hidden: u64,
        workspace: u64,
        y: u64,
    ) -> Result<&'static str> {
        let parts = self.parts(choices.tokens, choices.top_k)?;
        check([("hidden", hidden), ("y", y), ("workspace", workspace)])?;
        // SAFETY: the caller's.
        unsafe { self.second(stream, choices, weights, matrices, None, hidden, workspace, &parts, y) }
    }

    /// Makes the values of matrices of one projection, of those experts that have slots: `out[experts][rows][columns]`, in the dtype
    /// of x. `ends` is int32 `[experts]`: where an expert's slots end in an order by experts.
    ///
    /// # Errors
    /// [`Error::Argument`] for a projection that there is not, and for addresses that are not aligned; [`Error::Cuda`] when the
    /// launch fails.
    ///
    /// # Safety
    /// As [`Experts::launch`].
    pub unsafe fn dequantize(
        &self,
        stream: Stream,
        matrices: &Matrices,
        projection: usize,
        ends: u64,
        out: u64,
    ) -> Result<()> {
        let projections = self.projections() + 1;
        if projection >= projections {
            return Err(Error::argument("projection", projection, format!("less than {projections}")));
        }
        check([("table", matrices.table), ("ends", ends), ("out", out)])?;
        // SAFETY: the caller's.
        unsafe { dequantize::dequantize(self, stream, matrices, projection, ends, out) }
    }

    /// Slots to experts, where the product wants that, and gate and up.
    #[allow(clippy::too_many_arguments)] // as `launch`
    unsafe fn first(
        &self,
        stream: Stream,
        choices: &Choices,
        matrices: &Matrices,
        activation: Option<Activation>,
        x: u64,
        workspace: u64,
        parts: &Workspace,
        y: u64,
    ) -> Result<&'static str> {
        if let Some(tile) = Tile::new(self, choices.slots(), matrices, activation) {
            let routed = Routed::new(workspace, parts, false);
            // What comes out of the last matrices comes after this.
            let gathered = workspace + parts.out as u64;
            // SAFETY: the caller's.
            return unsafe {
                route::gather(self, stream, choices, chunks::COLUMNS, x, &routed, gathered)?;
                tile.up(self, stream, choices, matrices, activation, gathered, &routed, y)
            };
        }
        let few = Few::new(self);
        let routed = Routed::new(workspace, parts, few.routes_itself(choices.slots()));
        if !few.routes_itself(choices.slots()) {
            // SAFETY: the caller's.
            unsafe { route::route(self, stream, choices, chunks::COLUMNS, &routed) }?;
        }
        // SAFETY: the caller's.
        unsafe { few.up(self, stream, choices, matrices, activation, x, &routed, y) }
    }

    /// Down, and the sum, after `first` with the same activation.
    #[allow(clippy::too_many_arguments)] // as `launch`
    unsafe fn second(
        &self,
        stream: Stream,
        choices: &Choices,
        weights: Weights,
        matrices: &Matrices,
        activation: Option<Activation>,
        hidden: u64,
        workspace: u64,
        parts: &Workspace,
        y: u64,
    ) -> Result<&'static str> {
        let legal = [DType::F32, self.dtype];
        if !legal.contains(&weights.dtype) {
            return Err(Error::dtype("weights_dtype", weights.dtype.as_str(), &legal));
        }
        let few = Few::new(self);
        let tile = Tile::new(self, choices.slots(), matrices, activation);
        let routed = Routed::new(workspace, parts, tile.is_none() && few.routes_itself(choices.slots()));
        let out = workspace + parts.out as u64;
        // SAFETY: the caller's.
        unsafe {
            let name = match tile {
                Some(tile) => {
                    let permuted = workspace + parts.hidden as u64;
                    if activation.is_none() {
                        route::permute(self, stream, choices, hidden, &routed, permuted)?;
                    }
                    tile.down(self, stream, choices, matrices, permuted, &routed, out)?
                }
                None => few.down(self, stream, choices, matrices, hidden, &routed, out)?,
            };
            route::sum(self, stream, choices, weights, out, y)?;
            Ok(name)
        }
    }
}

fn check(addresses: [(&'static str, u64); 3]) -> Result<()> {
    for (argument, address) in addresses {
        if address == 0 || !address.is_multiple_of(ALIGNMENT) {
            let expected = format!("an address that is a multiple of {ALIGNMENT}, not 0");
            return Err(Error::argument(argument, format!("{address:#x}"), expected));
        }
    }
    Ok(())
}
