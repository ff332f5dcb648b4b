"""The compiled core."""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Generic, Literal, TypeAlias, TypedDict, TypeVar, final, type_check_only

__all__ = [
    "CheckpointError",
    "CpuExperts",
    "CpuLinear",
    "CpuLinear8bit",
    "CudaExperts",
    "CudaLinear",
    "CudaLinear8",
    "DirectCalls",
    "Job",
    "NoCudaDriverError",
    "Plan",
    "Unchanged",
    "__version__",
    "codebook",
    "companions_of_quantized",
    "compress_absmax",
    "cpu_features",
    "cuda_compress_absmax",
    "cuda_compress_workspace",
    "cuda_dequantize_4bit",
    "cuda_dequantize_8bit",
    "cuda_dequantize_rows",
    "cuda_device",
    "cuda_device_count",
    "cuda_device_memory",
    "cuda_driver_version",
    "cuda_embedding_4bit",
    "cuda_expand_absmax",
    "cuda_expert_maps",
    "cuda_int8_matmul",
    "cuda_int8_workspace",
    "cuda_kernel_form",
    "cuda_kernel_ptx",
    "cuda_kernels",
    "cuda_lora_down",
    "cuda_lora_ranks",
    "cuda_lora_up",
    "cuda_matmul_4bit",
    "cuda_prepare",
    "cuda_quantize_4bit",
    "cuda_quantize_4bit_nested",
    "cuda_quantize_8bit",
    "cuda_quantize_rows",
    "cuda_quantize_rows_outliers",
    "dequantize_4bit",
    "dequantize_8bit",
    "dequantize_rows",
    "dynamic_map",
    "expand_absmax",
    "follow_threads",
    "get_threads",
    "inspect",
    "int8_matmul",
    "int8_path",
    "int8_scaled_mm",
    "is_conv1d",
    "is_staged",
    "match_components",
    "match_names",
    "matmul_path",
    "named_as_output",
    "plan_dequantize",
    "plan_quantize",
    "quant_map",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_rows",
    "quantize_rows_outliers",
    "read_tensors_of",
    "run_plan",
    "select",
    "set_threads",
    "simd",
    "skip_modules",
    "verify",
]

__version__: str

_Buffer: TypeAlias = tuple[int, int, str]
"""Address, number of elements, and dtype: "uint8", "int8", "float16", "bfloat16" or "float32". The caller keeps the
memory alive and to itself during the call. ValueError for a null or misaligned address, another dtype than the
function takes, a length that does not fit the others, and an output in the memory of another argument."""

def quantize_4bit(input: _Buffer, packed: _Buffer, absmax: _Buffer, quant_type: str, blocksize: int) -> bool:
    """Quantize `n` floats to `packed` uint8 [ceil(n / 2)] and `absmax` float32 [ceil(n / blocksize)].

    `quant_type` is "nf4" or "fp4", `blocksize` a power of two from 32 to 4096. False when the input holds NaN or an
    infinity. The GIL is released; results do not depend on the number of threads.
    """

def dequantize_4bit(packed: _Buffer, absmax: _Buffer, out: _Buffer, quant_type: str, blocksize: int) -> None:
    """Read the `n` values of `out` (float16, bfloat16 or float32) back: the way back of `quantize_4bit`."""

def quantize_8bit(input: _Buffer, map: _Buffer, codes: _Buffer, absmax: _Buffer, blocksize: int) -> None:
    """Quantize `n` float32 to `codes` uint8 [n] and `absmax` float32 [ceil(n / blocksize)].

    `map` is float32 [256], finite and ascending; the nearest value is taken, of two equally near the even code.
    """

def dequantize_8bit(codes: _Buffer, absmax: _Buffer, map: _Buffer, out: _Buffer, blocksize: int) -> None:
    """Read `n` float32 values back: `map[code] * absmax[block]`."""

def quantize_rows(input: _Buffer, codes: _Buffer, scales: _Buffer, rows: int, columns: int) -> None:
    """Quantize the rows of `input` [rows, columns] to `codes` int8 and `scales` float32 [rows], as LLM.int8() does.

    `input` is float16, bfloat16 or float32. The scale is the largest magnitude of a row, where NaN does not count; the
    code is `x * 127 / scale`, a float32 product and quotient, rounded to the nearest, ties to even; 0 of NaN and in a
    row of zeros. The GIL is released; results do not depend on the number of threads.
    """

def quantize_rows_outliers(
    input: _Buffer, codes: _Buffer, scales: _Buffer, outliers: _Buffer, rows: int, columns: int, threshold: float
) -> None:
    """`quantize_rows` without outliers, the values whose magnitude is at least `threshold`, a number above 0.

    They do not count for the scale of their row. A column with one, in any row, has codes 0 in all rows, and 1 in
    `outliers` uint8 [columns], others 0. NaN is none.
    """

def dequantize_rows(codes: _Buffer, scales: _Buffer, out: _Buffer, rows: int, columns: int) -> None:
    """Read rows back into float16, bfloat16 or float32 `out`: `code * scale * (1 / 127)`.

    Two float32 products, then one rounding to the dtype of `out`.
    """

@final
class CpuLinear:
    """Products with weights of one shape and kind: what does not change is checked once."""

    def __new__(
        cls,
        dtype: str,
        n: int,
        k: int,
        quant_type: str,
        blocksize: int,
        nested: bool,
        bias: str | None = None,
    ) -> CpuLinear:
        """Check the arguments once for all calls.

        `dtype` is the dtype of the input and the output: "float16", "bfloat16" or "float32". `bias` is the dtype of the
        bias, or None without one.
        """

    def forward(
        self,
        m: int,
        x: int,
        packed: int,
        absmax: int,
        absmax2: int,
        offset: int,
        bias: int,
        out: int,
        threads: int,
    ) -> None:
        """`out[m, n] = x[m, k] @ dequantized[n, k].T + bias[n]`, all row-major; no dense copy of the weight is made.

        All but `m` and `threads` are addresses: of float32 scales [ceil(n * k / blocksize)], or, when nested, of the
        codes of doubly quantized scales, their own scales and the offset, read as `expand_absmax` reads them; 0 where
        there is nothing. How much memory there is, the caller has checked; here null and misaligned addresses are
        refused, and an output in the memory of an input. Sums and the bias are float32, rounded once to `out`. Weights
        are rounded to bfloat16 when `matmul_path()` is "avx512bf16" or "amx" and `dtype` is "bfloat16", else they stay
        float32. At most `threads` threads work, the same bits with every number: those of torch's OpenMP runtime
        where there is one, else of a pool.
        """

    def backward(
        self,
        m: int,
        grad: int,
        packed: int,
        absmax: int,
        absmax2: int,
        offset: int,
        out: int,
        threads: int,
    ) -> None:
        """`out[m, k] = grad[m, n] @ dequantized[n, k]`: the gradient of `forward`'s `x`, under the same rules."""

@final
class CpuExperts:
    """Layers of 4-bit experts of one shape and kind: what does not change is checked once."""

    def __new__(
        cls,
        dtype: str,
        experts: int,
        hidden: int,
        intermediate: int,
        gated: bool,
        quant_type: str,
        blocksize: int,
        nested: bool,
    ) -> CpuExperts:
        """Check the arguments once for all calls.

        `dtype` is the dtype of activations, biases and results: "float16", "bfloat16" or "float32".
        """

    def forward(
        self,
        tokens: int,
        k: int,
        x: int,
        ids: int,
        weights: int,
        weights_dtype: str,
        table: int,
        up_bias: int,
        down_bias: int,
        activation: str,
        y: int,
        threads: int,
    ) -> None:
        """`y[t] = sum(weights[t, j] * down(act(gate(x[t])) * up(x[t])) for j)`, of experts `ids[t, j]`.

        All but `tokens`, `k`, names and `threads` are addresses: of `x` and `y` [tokens, hidden], int64 `ids` and
        `weights` [tokens, k], biases [experts, rows of gate and up] and [experts, hidden], or 0; and of the table,
        int64 [projections, experts, 4]: where the codes of each matrix are, its scales, and as for `CpuLinear` those of
        nested ones. Ids of no expert count nothing. What is between the projections is computed in float32 and rounded
        once; the sum is in float32, in the order of `j`. The same bits with every number of threads.
        """

@final
class Unchanged:
    """Entries of dictionaries as they were when this was made, and how many some dictionaries have."""

    def __new__(
        cls,
        entries: list[tuple[dict[str, Any], str, Any]],
        sizes: list[dict[str, Any]],
        bounds: list[tuple[int, int]],
    ) -> Unchanged:
        """Remember that each dictionary has this object under this name, and the sizes of others.

        Expert `i` has the part of both lists from `bounds[i]` to `bounds[i + 1]`; the rest belongs to all experts.
        """

    def holds(self, experts: list[int] | None = None) -> bool:
        """Whether all is as it was; with `experts`, what belongs to these and to all."""

def matmul_path() -> str:
    """The instructions that products use: "scalar", "avx2", "avx512", "avx512bf16" or "amx"."""

def compress_absmax(absmax: _Buffer, codes: _Buffer, absmax2: _Buffer) -> float:
    """Quantize `n` float32 scales to `codes` uint8 [n] and `absmax2` float32 [ceil(n / 256)]; gives the offset."""

def expand_absmax(codes: _Buffer, absmax2: _Buffer, offset: float, out: _Buffer) -> None:
    """Read `n` doubly quantized float32 scales: `map[code] * absmax2[block] + offset`."""

def codebook(quant_type: str) -> list[float]:
    """The value of each of the sixteen codes, as float32."""

def quant_map(quant_type: str) -> list[float]:
    """The codebook as it is stored beside a weight: without a negative zero."""

@final
class DirectCalls:
    """Decides which calls go straight to a device's kernels; everything is asked anew in each call."""

    def __new__(
        cls,
        *,
        plain_types: set[type],
        kernels: dict[str, ModuleType],
        transforms: tuple[Callable[[], object], ...],
        function_modes: Callable[[], object],
        forward_ad_level: tuple[object, str],
        is_grad_enabled: Callable[[], bool],
        empty: Callable[[tuple[int, ...], tuple[int, ...], Any], Any],
        get_num_threads: Callable[[], int],
        packed_weight: Callable[[tuple[Any, Any]], object],
    ) -> DirectCalls:
        """Keep the questions.

        `plain_types` are classes of tensors that have nothing to say about operations on them, and `kernels` those of
        each type of device. `transforms` and `function_modes` say yes, by anything true, where something listens,
        traces or transforms; `forward_ad_level` is an attribute, by its owner and its name, which is negative outside
        of forward-mode derivatives. `empty` makes a CPU tensor of sizes, strides and a dtype, and `packed_weight` one
        value of codes and their packing, for the kernels.
        """

    def transformed(self) -> bool:
        """Whether one of the transforms says yes, or forward-mode derivatives are taken."""

    def kernels(self, x: object, factor: object = None, *constants: object) -> ModuleType | None:
        """The kernels for a call with these tensors, or None where only torch's dispatcher does right.

        Derivatives may be taken with regard to `x` and `factor`; of the constants, the classes alone count.
        """

    def kernels_of(self, x: object, factor: object, codes: object, packing: tuple[object, ...]) -> ModuleType | None:
        """The same for a call with a packed weight, whose tensors are constants; `packing` is a `Packing`."""

    def linear_4bit(self, x: object, codes: object, packing: tuple[object, ...], bias: object) -> Any | None:
        """The product of `x` and a packed weight, or None where only torch's dispatcher does right.

        The `CpuLinear` that the memo of the packing has as `linear` makes the product, with whatever dtypes, where all
        tensors are contiguous, on the CPU, not empty, and of the dtype and the size that they should have, and where
        `read_tensors_of` gave True. Otherwise `linear_4bit` of the device's kernels makes it. How many threads work is
        asked for large products only, and those of the core become as many, as `follow_threads` makes them.
        """

def dynamic_map() -> list[float]:
    """The 256 values of the signed 8-bit dynamic map, ascending, as float32."""

def simd() -> str:
    """The instructions in use: "scalar", "avx2" or "avx512". The environment's HALFBYTE_SIMD forces one."""

def cpu_features() -> list[str]:
    """The processor's features that matter here."""

def read_tensors_of(cls: type) -> bool:
    """From now on, read tensors of this class and of those derived from it directly, by DLPack's C interface.

    False where the class has no such interface (torch before 2.10); `DirectCalls.linear_4bit` then leaves all products
    to the kernels that Python has.
    """

def set_threads(threads: int) -> None:
    """Use 1 to 4096 threads from now on."""

def follow_threads(threads: int) -> None:
    """Use as many threads as torch, whose number this is; one that `set_threads` was given stays until it changes."""

def get_threads() -> int:
    """The number of threads in use: at first RAYON_NUM_THREADS, or as many as the machine runs at once."""

def cuda_driver_version() -> tuple[int, int]:
    """The CUDA version that the NVIDIA driver supports. RuntimeError when there is no driver; starts nothing."""

def cuda_device_count() -> int:
    """The number of visible devices.

    RuntimeError in a build without kernels, without a driver, with one before CUDA 12.0, or after a fork.
    """

def cuda_device_memory(device: int) -> int:
    """Bytes of memory that a device has, of any compute capability. ValueError for an ordinal that is not there."""

def cuda_device(device: int) -> tuple[str, tuple[int, int], int, int]:
    """Name, compute capability, multiprocessors and bytes of shared memory per block of a device.

    ValueError for an ordinal that is not there, RuntimeError for a compute capability below 7.5.
    """

def cuda_kernels() -> list[str]:
    """The names of the kernels that this build has: none when it was built without NVIDIA's compilers.

    Those with "reference" in their names, and "floor_…", are for tests and benches; a wheel has none of them.
    """

def cuda_kernel_form(device: int) -> str:
    """The form in which kernels are loaded on a device: "cubin", or "ptx", which the driver compiles.

    `HALFBYTE_KERNELS` asks for one of them.
    """

def cuda_kernel_ptx(kernel: str, capability: tuple[int, int]) -> bytes:
    """The PTX of a kernel for devices of a compute capability. ValueError when this build has none."""

def cuda_prepare(device: int) -> None:
    """Load every kernel that the device takes, so that no later call waits for that."""

def cuda_quantize_4bit(
    device: int,
    stream: int,
    input: _Buffer,
    packed: _Buffer,
    absmax: _Buffer,
    quant_type: str,
    blocksize: int,
    reference: bool = False,
) -> None:
    """Launch `quantize_4bit` on `stream` (torch's `cuda_stream`, 0 the default one) of `device`.

    As everywhere below: buffers are of that device, and stay allocated until the stream has come past the call; nothing
    is allocated or waited for. `reference` takes the plain kernel that defines the result.
    """

def cuda_dequantize_4bit(
    device: int,
    stream: int,
    packed: _Buffer,
    absmax: _Buffer,
    absmax2: _Buffer | None,
    offset: _Buffer | None,
    out: _Buffer,
    quant_type: str,
    blocksize: int,
    reference: bool = False,
) -> None:
    """Launch the way back.

    Nested scales: `absmax` uint8 codes, `absmax2` float32 [ceil(n / 256)], `offset` float32 [1].
    """

def cuda_compress_workspace(scales: int) -> int:
    """How many float64 `cuda_compress_absmax` and `cuda_quantize_4bit_nested` need for so many scales."""

def cuda_compress_absmax(
    device: int,
    stream: int,
    absmax: _Buffer,
    codes: _Buffer,
    absmax2: _Buffer,
    offset: _Buffer,
    workspace: _Buffer,
) -> None:
    """Launch `compress_absmax`; `offset` float32 [1] stays on the device. `workspace` may hold anything."""

def cuda_quantize_4bit_nested(
    device: int,
    stream: int,
    input: _Buffer,
    packed: _Buffer,
    absmax_scratch: _Buffer,
    codes: _Buffer,
    absmax2: _Buffer,
    offset: _Buffer,
    workspace: _Buffer,
    quant_type: str,
    blocksize: int,
) -> None:
    """Launch `cuda_quantize_4bit` and `cuda_compress_absmax` as one, which is faster.

    `absmax_scratch` is left with the float32 scales, one per block. `workspace` is float64, as many as
    `cuda_compress_workspace(scales)` says; it may hold anything, and belongs to this call until the stream has come
    past it: calls on other streams need workspaces of their own.
    """

@final
class CudaLinear:
    """Products `x · Wᵀ + bias` with weights of one shape and kind: what does not change is checked once."""

    def __new__(
        cls, device: int, dtype: str, n: int, k: int, quant_type: str, blocksize: int, nested: bool
    ) -> CudaLinear:
        """Check the kind. Kernels are loaded when one is first launched."""

    @property
    def rows_at_once(self) -> int:
        """Rows of `x` that one launch takes at most, where the kind is one for the matrix units."""

    @property
    def rows_without_workspace(self) -> int:
        """Rows of `x` up to which `launch` wants no workspace."""

    def workspace(self, m: int) -> int | None:
        """The bytes of the workspace that `launch` wants for `m` rows of `x`.

        None when dequantizing the weight and a dense product are faster. `x` and the packed weight must be aligned to
        16 bytes.
        """

    def launch(
        self,
        stream: int,
        m: int,
        x: int,
        packed: int,
        absmax: int,
        absmax2: int,
        offset: int,
        bias: int,
        y: int,
        workspace: int,
    ) -> None:
        """Launch one product of `m` rows of `x` on `stream`.

        All other arguments are addresses in device memory. `x`, `bias` and `y` have the dtype of the product. `absmax2`
        and `offset` are 0 unless the scales are nested; `bias` is 0 without one; `workspace` is 0 or has as many bytes
        as the method of that name says. The caller has checked the sizes.
        """

    def dgrad_workspace(self, m: int) -> int | None:
        """The bytes of the workspace that `dgrad` wants for `m` rows of `x`.

        None when dequantizing the weight and a dense product are faster. The gradient of `y` and the packed weight must
        be aligned to 16 bytes.
        """

    def dgrad(
        self,
        stream: int,
        m: int,
        dy: int,
        packed: int,
        absmax: int,
        absmax2: int,
        offset: int,
        dx: int,
        workspace: int,
    ) -> None:
        """Launch the gradient of `m` rows of `x` on `stream`: `dx [m, k] = dy [m, n] @ weight [n, k]`.

        float16 and bfloat16 on compute capability 9.0; n is a multiple of 8, k of 32. Addresses are as those of
        `launch`; `workspace` is 0 or has as many bytes as `dgrad_workspace` says.
        """

def cuda_expand_absmax(
    device: int,
    stream: int,
    codes: _Buffer,
    absmax2: _Buffer,
    offset: _Buffer,
    out: _Buffer,
    reference: bool = False,
) -> None:
    """Launch `expand_absmax`; `offset` is float32 [1] on the device."""

def cuda_embedding_4bit(
    device: int,
    stream: int,
    indices: _Buffer,
    packed: _Buffer,
    absmax: _Buffer,
    absmax2: _Buffer | None,
    offset: _Buffer | None,
    out: _Buffer,
    rows: int,
    columns: int,
    quant_type: str,
    blocksize: int,
    reference: bool = False,
) -> None:
    """Launch `out[i] = table[indices[i]]` for the packed table [rows, columns]: the bits of `cuda_dequantize_4bit`.

    `indices` is int64 or int32; `out` is float16, bfloat16 or float32 [indices, columns]. An index below 0, or not
    below `rows`, makes NaN of its row: that is no error, and nothing waits to find out. Fast when `columns` is a
    multiple of 8, `packed` aligned to 4 bytes and `out` to 16.
    """

def cuda_quantize_8bit(
    device: int,
    stream: int,
    input: _Buffer,
    code: _Buffer,
    codes: _Buffer,
    absmax: _Buffer,
    blocksize: int,
    reference: bool = False,
) -> None:
    """Launch `quantize_8bit` for float16, bfloat16 or float32 `input`, with the map `code` float32 [256].

    `code` must be finite and ascending, which is not checked: else codes mean nothing. `blocksize` is any number from 1
    on; the powers of two from 32 to 4096 are fast. With others a NaN counts: it is the scale of its block, whose codes
    are then 0.
    """

def cuda_dequantize_8bit(
    device: int,
    stream: int,
    codes: _Buffer,
    absmax: _Buffer,
    code: _Buffer,
    out: _Buffer,
    blocksize: int,
    reference: bool = False,
) -> None:
    """Launch the way back, to float16, bfloat16 or float32; any `blocksize` from 1 on, multiples of 8 being fast."""

def cuda_expert_maps(device: int, codes: list[int], scales: list[int] | None, rows: int, columns: int) -> bytes:
    """What the copy engine has to know of matrices `[rows][columns]`: 256 bytes for each.

    `codes` are addresses of packed codes, and `scales` those of float32 scales of blocks of 64; None where scales are
    others.
    """

@final
class CudaExperts:
    """Blocks of experts with 4-bit weights of one shape.

    `table` is an int64 tensor `[gate, up and down, or up and down][experts][4]`: addresses of codes, which are
    multiples of 16, of absmax, and when nested of absmax2 and the offset, else 0. `maps` is of `cuda_expert_maps` for
    each of the matrices in that order, on the device; with 0, the kernels for few tokens do everything.
    """

    def __new__(
        cls,
        device: int,
        dtype: str,
        experts: int,
        hidden: int,
        intermediate: int,
        gated: bool,
        quant_type: str,
        blocksize: int,
        nested: bool,
    ) -> CudaExperts:
        """For one device. Kernels are loaded when one is first launched."""

    def takes(self, tokens: int, k: int) -> bool:
        """Whether the other methods take so many tokens with so many choices each."""

    def workspace(self, tokens: int, k: int) -> int:
        """Bytes of the workspace, which begins at a multiple of 256."""

    def launch(
        self,
        stream: int,
        tokens: int,
        k: int,
        x: int,
        ids: int,
        weights: int,
        weights_dtype: str,
        table: int,
        maps: int,
        up_bias: int,
        down_bias: int,
        activation: str,
        workspace: int,
        y: int,
    ) -> str:
        """Make `y` of `x`; gives the names of the two products' kernels. All others are addresses; 0 is no bias.

        `activation` is "silu", "gelu", "gelu_tanh", "relu2" or "clamped_swiglu". `ids` is int64, others than those of
        experts being none; `dtype` is "float16" or "bfloat16", `weights_dtype` that or "float32".
        """

    def up(
        self,
        stream: int,
        tokens: int,
        k: int,
        x: int,
        ids: int,
        table: int,
        maps: int,
        up_bias: int,
        workspace: int,
        products: int,
    ) -> str:
        """Make `products`, `[tokens * k][2 or 1][intermediate]` by expert: for an activation of one's own."""

    def down(
        self,
        stream: int,
        tokens: int,
        k: int,
        hidden: int,
        ids: int,
        weights: int,
        weights_dtype: str,
        table: int,
        maps: int,
        down_bias: int,
        workspace: int,
        y: int,
    ) -> str:
        """Make `y` of `hidden`, `[tokens * k][intermediate]`, with the workspace that `up` had."""

    def dequantize(self, stream: int, table: int, projection: int, ends: int, out: int) -> None:
        """Make the values of matrices of one projection, `[experts][rows][columns]`, of those experts that have slots.

        `ends` is int32 `[experts]`: where an expert's slots end in an order by experts. Other matrices stay as they
        are.
        """

@final
class CudaLinear8:
    """Products `x · Wᵀ + bias` with 8-bit weights of one shape, `x` quantized on the way."""

    def __new__(cls, device: int, n: int, k: int) -> CudaLinear8:
        """For one device. Kernels are loaded when one is first launched."""

    def workspace(self, m: int) -> int:
        """Bytes of the workspace of `launch`, which begins at a multiple of 256."""

    def launch(
        self,
        stream: int,
        m: int,
        dtype: str,
        x: int,
        codes: int,
        scales: int,
        bias: int,
        bias_dtype: str,
        threshold: float,
        workspace: int,
        y: int,
        kernel: str = "best",
    ) -> str:
        """Make one product of `m` rows; gives the name of its kernel. All others are addresses; 0 is no bias."""

def cuda_lora_ranks(device: int) -> int:
    """The largest rank that `cuda_lora_down` and `cuda_lora_up` have kernels for on a device; 0 if it has none."""

def cuda_lora_down(
    device: int,
    stream: int,
    dtype: str,
    x: int,
    x_is_float: bool,
    factor: int,
    factor_is_float: bool,
    cast: int,
    h: int,
    rows: int,
    columns: int,
    rank: int,
) -> None:
    """Launch `h [rows, rank] = x [rows, columns] @ factor.T` in `dtype`, "float16" or "bfloat16".

    Addresses: of `x` and `factor [rank, columns]`, float32 or of that dtype; of `cast`, or 0, which becomes `x` in that
    dtype where it is float32.
    """

def cuda_lora_up(
    device: int,
    stream: int,
    dtype: str,
    y: int,
    y_is_float: bool,
    h: int,
    factor: int,
    factor_is_float: bool,
    transposed: bool,
    scaling: float,
    out: int,
    out_is_float: bool,
    turned: int,
    rows: int,
    columns: int,
    rank: int,
) -> None:
    """Launch `out = y [rows, columns] + scaling * h [rows, rank] @ factor`.

    `out` may be `y`; a `y` of 0 stands for zeros. Addresses: of `y`, `factor` and `out`, float32 or of `dtype`, that of
    `h`. The factor is as for `cuda_lora_down`, or with `transposed` the other way round; `turned`, or 0, becomes the
    factor as for `cuda_lora_down`, in `dtype`.
    """

def cuda_int8_workspace(device: int, rows: int, columns: int) -> int:
    """Bytes of the workspace of `cuda_quantize_rows_outliers`, which begins at a multiple of 256."""

def cuda_quantize_rows_outliers(
    device: int,
    stream: int,
    input: _Buffer,
    codes: _Buffer,
    scales: _Buffer,
    outliers: _Buffer,
    workspace: _Buffer,
    rows: int,
    columns: int,
    threshold: float,
) -> None:
    """Launch `quantize_rows_outliers`; `outliers` is uint8."""

def cuda_int8_matmul(
    device: int,
    stream: int,
    a: _Buffer,
    b: _Buffer,
    row_scales: _Buffer | None,
    column_scales: _Buffer | None,
    bias: _Buffer | None,
    y: _Buffer,
    m: int,
    n: int,
    k: int,
    kernel: str = "best",
) -> str:
    """Launch the product of codes: int32 sums, or with scales what they stand for; gives the name of the kernel."""

def cuda_quantize_rows(
    device: int,
    stream: int,
    input: _Buffer,
    codes: _Buffer,
    scales: _Buffer,
    rows: int,
    columns: int,
    reference: bool = False,
) -> None:
    """Launch `quantize_rows`."""

def cuda_dequantize_rows(
    device: int,
    stream: int,
    codes: _Buffer,
    scales: _Buffer,
    out: _Buffer,
    rows: int,
    columns: int,
    reference: bool = False,
) -> None:
    """Launch `dequantize_rows`."""

def cuda_matmul_4bit(
    device: int,
    stream: int,
    x: _Buffer,
    packed: _Buffer,
    absmax: _Buffer,
    absmax2: _Buffer | None,
    offset: _Buffer | None,
    bias: _Buffer | None,
    y: _Buffer,
    m: int,
    n: int,
    k: int,
    quant_type: str,
    blocksize: int,
    kernel: str = "best",
    workspace: _Buffer | None = None,
) -> str:
    """Launch `y [m, n] = x [m, k] @ weight [n, k].T + bias [n]`; gives the name of the (first) kernel.

    "gemm_4bit_small_m_..." are for few rows: float16 and bfloat16, k a multiple of 64, blocksize >= 64, x and packed
    aligned to 16 bytes, compute capability 8.0, and float16 on 7.5; launched for 16 or 32 rows of x each.
    "gemm_4bit_tile_..." and "gemm_4bit_block_sums_..." are for more, the latter for up to 64 on compute capability 9.0;
    `workspace`, of as many bytes as `CudaLinear.workspace` says, lets them be faster. "gemm_4bit_simt_..." takes
    everything, slowly. `kernel` insists on "small_m_sm90", "small_m_sm80", "small_m_sm75", "tile_sm90a", "tile_sm80",
    "tile_sm75" or "simt"; ValueError when that one does not take the arguments.
    """

class CheckpointError(ValueError):
    """The input is wrong: a checkpoint that is broken, or unsuitable for what was asked."""

class NoCudaDriverError(RuntimeError):
    """The machine has no NVIDIA driver."""

# What crosses as a dict. The keys are the fields of the Rust structs, in their order.

_TensorPlanData = TypedDict(
    "_TensorPlanData",
    {
        "name": str,
        "shape": list[int],
        "from": str,
        "to": str,
        "bytes_in": int,
        "bytes_out": int,
        "reason": str,
        "shard": str,
    },
)

@type_check_only
class ShardData(TypedDict):
    file: str
    bytes: int
    tensors: int

@type_check_only
class FileData(TypedDict):
    file: str
    bytes: int

@type_check_only
class LeftOutData(TypedDict):
    file: str
    reason: str

@type_check_only
class TotalsData(TypedDict):
    tensors: int
    quantized_tensors: int
    weights: int
    quantized_weights: int
    bytes_in: int
    bytes_out: int
    bits_per_weight: float

@type_check_only
class TypeData(TypedDict):
    type: str
    tensors: int
    weights: int
    bytes_in: int
    bytes_out: int

@type_check_only
class PlanData(TypedDict):
    operation: Literal["quantize", "dequantize"]
    source: str
    architecture: str | None
    known_architecture: bool
    notes: list[str]
    tensors: list[_TensorPlanData]
    shards: list[ShardData]
    copies: list[FileData]
    left_out: list[LeftOutData]
    skip_modules: list[str] | None
    model_dtype: str | None
    types: list[TypeData]
    totals: TotalsData

@type_check_only
class SelectedData(TypedDict):
    """What transformers has chosen: names of tensors, and which of them are stored `[in, out]`."""

    tensors: Sequence[str]
    conv1d: Sequence[str] | None

@type_check_only
class RunData(TypedDict):
    destination: str
    shards: list[FileData]
    resumed_shards: int
    already_complete: bool
    seconds: float

@type_check_only
class ComparisonData(TypedDict):
    name: str
    status: str
    kind: str
    shape: list[int]
    rmse: float | None
    max_error: float | None
    differing_bytes: int | None
    detail: str

@type_check_only
class VerifyData(TypedDict):
    a: str
    b: str
    tensors: list[ComparisonData]
    notes: list[str]

@type_check_only
class InspectedFile(TypedDict):
    file: str | None
    bytes: int
    tensors: int
    metadata: dict[str, str]

@type_check_only
class InspectedWeight(TypedDict):
    name: str
    quant_type: str
    blocksize: int | None
    nested: bool
    dtype: str | None
    shape: list[int]
    storage: str | None
    bytes: int
    bits_per_weight: float
    file: str | None

@type_check_only
class InspectedTensor(TypedDict):
    name: str
    dtype: str
    shape: list[int]
    bytes: int
    file: str | None

@type_check_only
class InspectedKind(TypedDict):
    kind: str
    tensors: int
    weights: int
    bytes: int

@type_check_only
class InspectedTotals(TypedDict):
    weights: int
    bytes: int
    quantized_tensors: int
    bits_per_weight: float

@type_check_only
class InspectData(TypedDict):
    path: str
    files: list[InspectedFile]
    weights: list[InspectedWeight]
    tensors: list[InspectedTensor]
    groups: list[InspectedKind]
    totals: InspectedTotals
    notes: list[str]

@type_check_only
class DecisionData(TypedDict):
    quant_type: str | None
    transpose: bool
    reason: str

@type_check_only
class SelectionData(TypedDict):
    decisions: list[DecisionData]
    architecture: str | None
    known: bool
    notes: list[str]
    skip_modules: list[str] | None

@type_check_only
class MatchData(TypedDict):
    """Positions of the first rule and the first skip name that match, and what that rule asks for (None: to keep)."""

    rule: int | None
    quant_type: str | None
    skip: int | None

_Report = TypeVar("_Report", covariant=True)

@final
class Plan:
    """What a run would do, from headers and config alone: no weight is read."""

    def report(self) -> PlanData:
        """The whole plan."""

    def options(self) -> dict[str, Any]:
        """All that decided about it, as the core has read it."""

@final
class CpuLinear8bit:
    """Products with 8-bit weights of one shape: what does not change is checked once."""

    def __new__(cls, dtype: str, n: int, k: int, bias: str | None = None) -> CpuLinear8bit:
        """Check the arguments once for all calls.

        `dtype` is the dtype of the input and the output: "float16", "bfloat16" or "float32". `bias` is the dtype of the
        bias, or None without one.
        """

    def forward(
        self, m: int, x: int, codes: int, scales: int, bias: int, threshold: float, out: int, threads: int
    ) -> None:
        """`out [m, n] = x [m, k] @ weight [n, k].T + bias [n]`, with the rows of `x` quantized too.

        All arguments but `m`, `threshold` and `threads` are addresses, `bias` 0 without one. Values of at least
        `threshold`, where that is not 0, and their columns are multiplied as they are. ValueError for more than 133,144
        columns. The same bits on every machine and with every number of threads.
        """

    def backward(self, m: int, grad: int, codes: int, scales: int, out: int, threads: int) -> None:
        """`out [m, k] = grad [m, n] @ weight [n, k]`, with the weight's values rounded to `dtype`."""

def int8_matmul(m: int, n: int, k: int, a: int, b: int, out: int, threads: int) -> None:
    """`out [m, n] = a [m, k] @ b [n, k].T`, int8 to int32, exactly; the last four are addresses and the threads."""

def int8_scaled_mm(
    shape: tuple[int, int, int],
    a: int,
    b: int,
    row_scales: _Buffer,
    column_scales: _Buffer,
    bias: _Buffer | None,
    out: _Buffer,
    threads: int,
) -> None:
    """`int8_matmul` of the shape [m, n, k], scaled to what codes stand for, plus bias; `a` and `b` are addresses."""

def int8_path() -> str:
    """The instructions that products of 8-bit codes use: "scalar", "avx2", "avx512", "vnni" or "amx"."""

@final
class Job(Generic[_Report]):
    """Work on threads of its own."""

    def wait(self, seconds: float) -> bool:
        """Wait at most this long, without the GIL. True when the work has ended."""

    def progress(self) -> tuple[int, int, str]:
        """Bytes done, bytes in all, and what is being worked on."""

    def cancel(self) -> None:
        """Stop soon: `result` then raises KeyboardInterrupt."""

    def result(self) -> _Report:
        """The report, once; raises what went wrong."""

def plan_quantize(
    source: str, config_json: str | None, options: Mapping[str, Any], selected: SelectedData | None = None
) -> Plan:
    """Decide what becomes of every tensor of the checkpoint in the folder `source`.

    `options` are the fields of `QuantizeOptions`; `selected` is given where they say that transformers decides.
    """

def plan_dequantize(source: str, config_json: str | None, options: Mapping[str, Any]) -> Plan:
    """The way back: every quantized weight to a float dtype. `options` are the fields of `DequantizeOptions`."""

def run_plan(
    plan: Plan,
    destination: str,
    mode: Literal["new", "overwrite", "resume"],
    config_text: str | None,
    threads: int,
    fsync: bool,
) -> Job[RunData]:
    """Carry the plan out."""

def is_staged(destination: str, file: str) -> bool:
    """Whether a run into `destination` that has not ended, or was interrupted, has completed an output file."""

def verify(a: str, b: str, config_a: str | None, config_b: str | None, threads: int) -> Job[VerifyData]:
    """Compare every quantized tensor of `b` with a fresh quantization of `a`, or with `a` when that is quantized.

    `config_a` and `config_b` are the texts of their config.json.
    """

def inspect(path: str, config: str | None) -> InspectData:
    """What a folder or a file holds; `config` is the text of its config.json."""

def select(
    config_json: str | None,
    tensors: Sequence[tuple[str, Sequence[int], str]],
    options: Mapping[str, Any],
    selected: SelectedData | None = None,
) -> SelectionData:
    """The selection alone: name, shape and dtype of every tensor in, decisions with reasons out."""

def match_names(tensors: Sequence[str], rules: Sequence[str], skip: Sequence[str]) -> list[MatchData]:
    """Which rule and which skip name match each tensor of a model in memory."""

def match_components(modules: Sequence[str], keys: Sequence[str]) -> list[bool]:
    """Whether the components of each module's path hold those of a key, one after the other."""

def named_as_output(modules: Sequence[str]) -> list[bool]:
    """Whether each module is an output embedding by its name."""

def companions_of_quantized(tensors: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The tensors that stand beside weights that are quantized already: name and method of each.

    Args:
        tensors: Name and dtype of all tensors of a checkpoint, dtypes named as in safetensors headers.
    """

def skip_modules(converted: Sequence[str], kept: Sequence[str]) -> list[str] | None:
    """`llm_int8_skip_modules` with which a loader converts the first list and keeps the second; None: its defaults."""

def is_conv1d(config_json: str, name: str) -> bool:
    """Whether this weight is stored `[in, out]`, as those of transformers' `Conv1D` are."""
