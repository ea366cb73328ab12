# This file belongs to a compact model that dsprune made. It stands alone: it needs torch and transformers.
"""Compact transformers: the stock architectures, with sizes of their own in every layer.

`config.json` holds, under `dsprune`, the sizes of every layer and the family's layout. A model is
built as the stock class and its modules are then made smaller; a removed sublayer is bypassed and a
layer without sublayers is not there at all.

Attention heads that kept unequal numbers of query/key and value/output dimensions are packed: what their
linears give is placed among zeros, to one head size a layer, so that the stock attention runs all heads in
one call, and taken out of it again before the output linear. Zero query dimensions add nothing to a score,
zero value dimensions nothing to an output; the scale stays that of the dense head: attention that takes it from the
size of the heads that it is given gets queries that make up for it. Only what was kept is
stored and multiplied. Under rotary positions the pairs of dimensions that any head of a layer kept have one
place for all its heads, and turn at the speed that they had in the dense head.

Attention that adds to its scores what an embedding with a column for each head gives, one for all layers of a
stack: the first attention that is left holds that embedding, whole, every layer takes the columns of its own
heads and hands on all of them.

A sublayer that writes only some coordinates of the residual stream computes those rows alone, and
spreads them over the width with zeros between.

Block-sparse linears store the blocks that were kept. They run as dense weights, or through torch's own
block-sparse kernels where a measurement stored under `dsprune.calibration` says that those are faster.
"""

import copy
import functools
import importlib.util
import math
import pathlib
import platform
import re
import struct
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

FORMAT = 1
OWN_HEAD = "own_head"
"""Key of a configuration: the head has a weight of its own, though the class ties every head."""
HEADS = {
    "Model": "AutoModel",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "EncoderModel": "AutoModelForTextEncoding",
}
ENCODER_HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
DECODER_HEADS = ("Model", "ForSequenceClassification", "ForCausalLM")
FAMILIES = {
    "bert": ("Bert", ENCODER_HEADS),
    "roberta": ("Roberta", ENCODER_HEADS),
    "xlm-roberta": ("XLMRoberta", ENCODER_HEADS),
    "distilbert": ("DistilBert", ENCODER_HEADS),
    "electra": ("Electra", ENCODER_HEADS),
    "deberta-v2": ("DebertaV2", ENCODER_HEADS),
    "llama": ("Llama", DECODER_HEADS),
    "mistral": ("Mistral", DECODER_HEADS),
    "qwen2": ("Qwen2", DECODER_HEADS),
    "qwen3": ("Qwen3", DECODER_HEADS),
    "gpt2": ("GPT2", ("Model", "ForSequenceClassification", "LMHeadModel")),
    "t5": ("T5", ("Model", "EncoderModel", "ForConditionalGeneration")),
}
"""By model type: what class names begin with, and what they end with."""


class Bypass(nn.Module):
    """Stands where a removed sublayer's module stood and returns one of its arguments, or zero.

    Args:
        rule: "first", "second", "zero" or the name of a child that answers; then, where the module returns more than
            one thing, what else: "none", or the name of an argument that it hands on.
    """

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.what, *self.more = rule.split(", ")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = [*args, *kwargs.values()]
        if self.what == "zero":
            result = arguments[0].new_zeros(())
        elif hasattr(self, self.what):
            result = getattr(self, self.what)(arguments[0])
        else:
            result = arguments[("first", "second").index(self.what)]
        more = (None if name == "none" else kwargs.get(name) for name in self.more)
        return (result, *more) if self.more else result

    def extra_repr(self) -> str:
        return self.rule


def _index(places: list[int], device: torch.device) -> torch.Tensor:
    """Places as an index; one that was made in inference could not serve training later."""
    with torch.inference_mode(False):
        return torch.tensor(places, device=device)


class Spread(nn.Module):
    """Places values in a wider last axis, zeros between; nothing where they fill it.

    Args:
        places: index of each value in the wide axis, ascending.
        width: of the wide axis.
    """

    def __init__(self, places: list[int], width: int) -> None:
        super().__init__()
        self.places, self.width = places, width
        self._index: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.places) == self.width:
            return x
        if self._index is None or self._index.device != x.device:
            self._index = _index(self.places, x.device)
        return x.new_zeros(*x.shape[:-1], self.width).index_copy(-1, self._index, x)

    def extra_repr(self) -> str:
        return f"{len(self.places)} of {self.width}"


class Constant(nn.Module):
    """What is left of a linear without inputs: its bias, for every token."""

    def __init__(self, bias: nn.Parameter, spread: Spread) -> None:
        super().__init__()
        self.bias = bias
        self.spread = spread

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor = self.spread(self.bias)
        return bias.expand(*x.shape[:-1], -1)


class Zeros(nn.Module):
    """What is left of a linear without outputs: zeros of the width that is expected."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


def _store_transposed(linear: nn.Linear) -> None:
    """Let a linear hold its weight [in, out], as `Conv1D` does."""
    weight = linear.weight
    linear.weight = nn.Parameter(
        torch.empty(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    )


class SpreadLinear(nn.Linear):
    """A linear [out, in] that computes only some rows of its output; the others are zero.

    Args:
        shape: out and in.
        spread: of the output.
        transposed: whether the weight is held as [in, out].
    """

    def __init__(self, shape: list[int], spread: Spread, *, transposed: bool = False, **options: Any) -> None:
        super().__init__(shape[1], shape[0], **options)
        self.spread, self.transposed = spread, transposed
        if transposed:
            _store_transposed(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        rows: torch.Tensor = self.spread(nn.functional.linear(x, weight, self.bias))
        return rows


class GatherLinear(nn.Linear):
    """A linear [out, in] that reads only some places of its input.

    Args:
        shape: out and in, as stored.
        places: index of each place that is read.
        width: of the input.
        spread: of the output, where only some of its rows are computed.
        transposed: whether the weight is held as [in, out].
    """

    def __init__(
        self,
        shape: list[int],
        places: list[int],
        width: int,
        spread: Spread | None = None,
        *,
        transposed: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(shape[1], shape[0], **options)
        self.places, self.width = places, width
        self.spread, self.transposed = spread, transposed
        if transposed:
            _store_transposed(self)
        self._index: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.places) < self.width:
            if self._index is None or self._index.device != x.device:
                self._index = _index(self.places, x.device)
            x = x.index_select(-1, self._index)
        y = nn.functional.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)
        return y if self.spread is None else self.spread(y)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {len(self.places)} of {self.width} inputs"


class BlockLinear(nn.Module):
    """A linear [out, in] that stores some blocks of its weight; the others are zero.

    With gradients, in training and where nothing is known of the device, the blocks are scattered into a dense
    weight. In inference the weight that runs, dense or BSR, is made once and kept until the values change.

    Args:
        shape: out and in.
        block: rows and columns of a block. The last blocks may reach beyond the matrix: what they hold there is
            zero, has no influence and gets no gradient.
        kept: stored blocks.
        spread: of the output, where only some of its rows are computed.

    Attributes:
        values: [kept, *block], block row after block row; None where no block is kept.
        row_pointers: int32 [block rows + 1]; block row r holds the blocks row_pointers[r] up to row_pointers[r + 1].
        columns: int32 [kept], the block column of each, ascending in a block row.
        bias: [out] or None.
        thresholds: density up to which BSR is faster, for each `place` that was measured.

    Raises:
        ValueError: more blocks than the matrix has.
    """

    values: Any
    row_pointers: torch.Tensor
    columns: torch.Tensor

    def __init__(
        self,
        shape: Sequence[int],
        block: Sequence[int],
        kept: int,
        *,
        bias: bool = True,
        spread: Spread | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.spread = spread
        self.out_features, self.in_features = (int(size) for size in shape)
        self.block = (int(block[0]), int(block[1]))
        self.grid = (-(-self.out_features // self.block[0]), -(-self.in_features // self.block[1]))
        self.kept = kept
        if kept > math.prod(self.grid):
            raise ValueError(f"{kept} blocks of {self.block} do not fit into {self.grid[0]} x {self.grid[1]} of them")
        self.bias = nn.Parameter(torch.zeros(self.out_features, **options)) if bias else None
        # A parameter without elements is more than ZeRO can partition.
        self.values = nn.Parameter(torch.zeros(kept, *self.block, **options)) if kept else None
        device = options.get("device")
        rows = torch.arange(self.grid[0] + 1, device=device, dtype=torch.int32)
        self.register_buffer("row_pointers", (rows * self.grid[1]).clamp(max=kept))
        self.register_buffer("columns", torch.arange(kept, device=device, dtype=torch.int32) % self.grid[1])
        self.thresholds: dict[tuple[str, int, str], float] = {}
        self._prepared: _Prepared | None = None

    @property
    def weight(self) -> Any:
        """What is stored of it, for those who ask a linear of which dtype it is; None where that is nothing."""
        return self.values

    @property
    def density(self) -> float:
        """Share of the blocks that is stored."""
        return self.kept / math.prod(self.grid)

    def to_dense(self) -> torch.Tensor:
        """The weight [out, in], where there are blocks; gradients reach what those hold inside the matrix."""
        (rows, columns), (height, width) = self.grid, self.block
        counts = self.row_pointers.diff()
        row = torch.arange(rows, device=counts.device).repeat_interleave(counts, output_size=self.kept)
        tiles: torch.Tensor = self.values.new_zeros(rows * columns, height, width)
        tiles = tiles.index_copy(0, row * columns + self.columns, self.values)
        weight = tiles.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)
        return weight[: self.out_features, : self.in_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._product(x)
        return y if self.spread is None else self.spread(y)  # type: ignore[no-any-return]

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """The stored rows of the output: [..., out]."""
        if self.values is None:
            empty = x.new_zeros(self.out_features) if self.bias is None else self.bias
            # A copy, as any linear makes: writing to a view would write to the bias.
            return empty.expand(*x.shape[:-1], -1).clone(memory_format=torch.contiguous_format)
        if self._is_transient(x):
            self._prepared = None
            return nn.functional.linear(x, self.to_dense(), self.bias)
        weight = self._prepare()
        if weight.layout is torch.strided:
            return nn.functional.linear(x, weight, self.bias)
        return _bsr_linear(x, weight, self.bias, self.out_features)

    def _is_transient(self, x: torch.Tensor) -> bool:
        """Whether the weight is made for this call alone, with gradients, and dense.

        In training no copy of a weight may stay behind, and none would be told when it is old: DeepSpeed writes
        to flat buffers that count no versions. But no step is without a forward that has gradients, which ends
        what inference has kept. Under ZeRO-3 the values themselves come and go.
        """
        return (
            self.training
            or torch.is_grad_enabled()
            or hasattr(self.values, "ds_id")
            or self.values.is_meta
            or torch.is_autocast_enabled(x.device.type)
            or torch.compiler.is_compiling()
        )

    def _prepare(self) -> torch.Tensor:
        """The weight to run, dense or BSR, made anew if it is not the one of these values."""
        values = self.values
        tensors = [values, self.row_pointers, self.columns]
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        key = (values.data_ptr(), values.device, values.dtype, torch.get_num_threads(), *versions)
        if self._prepared is None or not self._prepared.serves(values, key):
            # Tensors made in inference mode could not be used outside it later.
            with torch.inference_mode(False), torch.no_grad():
                sparse = self._pays() and has_kernel(values.device, values.dtype, self.block)
                self._prepared = _Prepared(values, key, self._to_bsr() if sparse else self.to_dense().contiguous())
        return self._prepared.weight

    def _pays(self) -> bool:
        """Whether BSR was measured to be faster here, at this density."""
        device, dtype = self.values.device, self.values.dtype
        known = self.thresholds.get(place(device, dtype))
        if known is None:
            reason = missing_kernel(device, dtype, self.block)
            if reason:
                _warn_once(f"block-sparse weights run dense: {reason}")
        return known is not None and self.density <= known

    def _to_bsr(self) -> torch.Tensor:
        """The weight as torch's BSR tensor of the blocks that the kernel takes, padded to whole blocks."""
        values, pointers, columns = self.values.detach(), self.row_pointers, self.columns
        side = kernel_side(self.block, values.device)
        if self.block != (side, side):
            values, pointers, columns = _split_blocks(values, pointers, columns, side)
        size = (self.grid[0] * self.block[0], self.grid[1] * self.block[1])
        return _bsr_tensor(pointers, columns, values, size)

    def forget(self) -> None:
        """Drop the weight that was made for inference."""
        self._prepared = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{size}, {self.kept} of {math.prod(self.grid)} blocks of {self.block[0]} x {self.block[1]}"


class _Prepared:
    """The weight that a `BlockLinear` runs; given up as soon as the values that it was made of are."""

    def __init__(self, values: torch.Tensor, key: tuple[Any, ...], weight: torch.Tensor) -> None:
        self.key, self.weight = key, weight
        # Whoever streams weights puts new values in place of the old: by then their copy must be gone.
        self.source = weakref.ref(values, self._give_up)

    def _give_up(self, _: Any) -> None:
        del self.weight

    def serves(self, values: torch.Tensor, key: tuple[Any, ...]) -> bool:
        return self.source() is values and self.key == key


BSR_CHUNK = 256
"""Tokens that MKL multiplies at a time: what it reads and writes for more of them leaves the cache."""


def _bsr_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: int) -> torch.Tensor:
    """`linear` with a BSR weight whose size is padded to whole blocks.

    `functional.linear` takes BSR weights too, but multiplies by the transposed weight, which in MKL is several
    times slower than this.
    """
    rows, inside = weight.shape
    flat = x.reshape(-1, x.shape[-1])
    tokens, step = len(flat), BSR_CHUNK
    if x.device.type == "cuda":
        # The Triton kernel wants whole blocks of tokens as well.
        step = max(1, tokens + -tokens % weight.values().shape[-1])
        flat = nn.functional.pad(flat, (0, 0, 0, step - tokens))
    if inside != x.shape[-1]:
        flat = nn.functional.pad(flat, (0, inside - x.shape[-1]))
    column = x.new_zeros(rows, 1)
    if bias is not None:
        column[:out, 0] = bias
    result = x.new_empty(tokens, out)
    for start in range(0, tokens, step):
        part, target = flat[start : start + step], result[start : start + step]
        product = torch.addmm(column.expand(-1, len(part)), weight, part.t())
        target.copy_(product.t()[: len(target), :out])
    return result.view(*x.shape[:-1], out)


def _bsr_tensor(pointers: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, size: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse BSR tensor support is in beta")
        # The kernels trust the indices; those of a damaged file would make them read anywhere.
        return torch.sparse_bsr_tensor(pointers, columns, values, size=size, check_invariants=True)


def _split_blocks(
    values: torch.Tensor, pointers: torch.Tensor, columns: torch.Tensor, side: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same matrix in square blocks of `side`, a divisor of both sides of a block."""
    kept, height, width = values.shape
    tall, wide = height // side, width // side
    row = torch.arange(len(pointers) - 1, device=values.device).repeat_interleave(pointers.diff())
    down, across = torch.arange(tall, device=values.device), torch.arange(wide, device=values.device)
    rows = (row[:, None, None] * tall + down[:, None]).expand(-1, -1, wide).flatten()
    places = (columns[:, None, None] * wide + across).expand(-1, tall, -1).flatten()
    # Blocks stand ascending in their row already, so that a stable sort by the new row leaves them so.
    order = rows.argsort(stable=True)
    tiles = values.view(kept, tall, side, wide, side).transpose(2, 3).reshape(-1, side, side)
    counts = rows.bincount(minlength=tall * (len(pointers) - 1))
    return tiles[order], nn.functional.pad(counts.cumsum(0), (1, 0)).int(), places[order].int()


def kernel_side(block: Sequence[int], device: torch.device) -> int:
    """Side of the square blocks that run: MKL takes any squares, the GPU kernels squares of a power of two."""
    side = math.gcd(*block)
    return side & -side if device.type == "cuda" else side


@functools.cache
def missing_kernel(device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Why torch has no block-sparse product for these, as far as can be told without trying; None if it has."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
            return "this torch is built without MKL"
        return None if dtype in (torch.float32, torch.float64) else f"MKL has no block-sparse product in {name}"
    if device.type != "cuda":
        return f"torch has no block-sparse product on {device.type}"
    if kernel_side(block, device) < 16:
        return f"the GPU kernels want blocks of 16, 32, 64, ... and not {block[0]} x {block[1]}"
    if dtype in (torch.float16, torch.bfloat16) and importlib.util.find_spec("triton") is None:
        return f"the GPU kernels for {name} need Triton, which is not installed"
    return None


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> bool:
    """Whether torch's block-sparse product works here, tried on a small one. Warns where it does not."""
    reason = missing_kernel(device, dtype, block) or _try_kernel(device, dtype, kernel_side(block, device))
    if reason:
        _warn_once(f"block-sparse weights run dense: {reason}")
    return not reason


def _try_kernel(device: torch.device, dtype: torch.dtype, side: int) -> str | None:
    """What is wrong with the product of three blocks out of four; None if nothing is."""
    pointers, columns = torch.tensor([[0, 2, 3], [0, 1, 1]], dtype=torch.int32, device=device).unbind()
    values = torch.linspace(-1, 1, 3 * side * side, device=device).to(dtype).view(3, side, side)
    x = torch.linspace(1, -1, 2 * side * (side + 3), device=device).to(dtype).view(side + 3, 2 * side)
    weight = _bsr_tensor(pointers, columns, values, (2 * side, 2 * side))
    expected = nn.functional.linear(x, weight.to_dense()).float()
    try:
        given = _bsr_linear(x, weight, None, 2 * side).float()
    # A kernel that cannot be compiled raises whatever its compiler does.
    except Exception as error:
        return f"torch's product of blocks of {side} on {device} fails with {type(error).__name__}: {error}"
    if torch.allclose(given, expected, rtol=0, atol=0.02 * float(expected.abs().max())):
        return None
    return f"torch's product of blocks of {side} on {device} is wrong"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@functools.cache
def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = pathlib.Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def place(device: torch.device, dtype: torch.dtype) -> tuple[str, int, str]:
    """What a measurement holds for: the device, torch's threads (0 on a GPU) and the dtype, by name."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return device_name(device), threads, str(dtype).removeprefix("torch.")


def shape_class(out: int, inside: int) -> str:
    """Matrices of about the same size have one measurement: both sides to the nearest power of two."""
    return "x".join(str(2 ** round(math.log2(size))) for size in (out, inside))


def use_calibration(model: nn.Module, table: Sequence[dict[str, Any]]) -> None:
    """Tell the block-sparse linears of a model up to which density BSR is faster, and where.

    Args:
        table: `dsprune.calibration` of a config.json. A measurement has `device`, `threads`, `dtype`, `block` and
            `thresholds`, a density for each shape class.
    """
    for module in model.modules():
        if isinstance(module, BlockLinear):
            own = shape_class(module.out_features, module.in_features)
            module.thresholds = {
                (entry["device"], entry["threads"], entry["dtype"]): entry["thresholds"][own]
                for entry in table
                if tuple(entry["block"]) == module.block and own in entry["thresholds"]
            }
            module.forget()


class FactoredEmbedding(nn.Module):
    """A word embedding as a narrow table and a projection to the model's width."""

    def __init__(self, dense: nn.Embedding, rank: int) -> None:
        super().__init__()
        shape = getattr(dense.weight, "ds_shape", dense.weight.shape)
        options: Any = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        self.num_embeddings, self.embedding_dim = int(shape[0]), int(shape[1])
        self.table = nn.Embedding(shape[0], rank, padding_idx=dense.padding_idx, **options)
        self.projection = nn.Linear(rank, shape[1], bias=False, **options)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.projection(self.table(input_ids))
        return projected


def _dense_shape(module: Any) -> list[int]:
    # A model that is loaded straight into ZeRO-3 partitions keeps its shapes in `ds_shape`.
    return list(getattr(module.weight, "ds_shape", module.weight.shape))


def _resized(module: Any, sizes: list[int | None]) -> nn.Module:
    """A new module of the same kind; `sizes` are those of the weight's axes, None where they stay."""
    shape = [old if new is None else new for old, new in zip(_dense_shape(module), sizes, strict=True)]
    options = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of a sublayer that is gone
            return nn.Linear(shape[1], shape[0], bias=module.bias is not None, **options)
    if isinstance(module, Conv1D):
        convolution: nn.Module = Conv1D(shape[1], shape[0])
        return convolution.to(**options)
    if isinstance(module, nn.Embedding):
        return nn.Embedding(shape[0], shape[1], padding_idx=module.padding_idx, **options)
    if isinstance(module, nn.LayerNorm):
        return nn.LayerNorm(shape, eps=module.eps, **options)
    rms_norm: nn.Module = type(module)(shape[0], eps=module.variance_epsilon)
    return rms_norm.to(**options)


def _width(axis: str, widths: dict[str, int]) -> int | None:
    """New width of an axis, the parts of a shared one together; None where it stays."""
    parts = [widths.get(part) for part in axis.split(" + ")]
    return None if None in parts else sum(part for part in parts if part is not None)


def _resize(root: nn.Module, path: str, axes: list[str], widths: dict[str, int]) -> None:
    module = _find(root, path)
    sizes = [_width(axis, widths) for axis in axes]
    if module is not None and any(size is not None for size in sizes):
        _replace(root, path, _resized(module, sizes[::-1] if isinstance(module, Conv1D) else sizes))


def _find(root: nn.Module, path: str) -> nn.Module | None:
    """A module that a configuration may leave out; None where it does."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _stand_in(layer: nn.Module, path: str, rule: str) -> None:
    """Put a `Bypass` where a module was; a child that the rule names stays."""
    bypass = Bypass(rule)
    if bypass.what not in ("first", "second", "zero"):
        setattr(bypass, bypass.what, layer.get_submodule(path).get_submodule(bypass.what))
    _replace(layer, path, bypass)


class HeadLayout:
    """Where the dimensions that the heads of a layer kept stand once the heads are padded to one size.

    Attributes:
        size: of every head; `dense` is what it was.
        places: for `qk_dim` and `vo_dim`, head by head (or group by group), place of each kept dimension in a head.
        pairs: under rotary positions, the dense pair at each place of half a head; empty where heads are as before.
        copies: query heads that share one key and value head.

    Args:
        sizes: of the attention.
        facts: of the model.
    """

    def __init__(self, sizes: dict[str, Any], facts: dict[str, Any]) -> None:
        dense, count, dims = facts["dense"], sizes["heads"], facts["head_dim"]
        self.dense = dims
        self.copies = dense["num_heads"] // dense.get("num_groups", dense["num_heads"])
        rotary = facts["family"].get("rotary", False)
        queries = sizes.get("qk_dims", [dims] * count)
        values = sizes.get("vo_dims", [dims] * count)
        kept = [_ones(text, dims // 2) for text in sizes["qk_pairs"]] if "qk_pairs" in sizes else []
        union = sorted(set().union(*kept)) if kept else list(range(dims // 2)) if rotary else []
        needed = max([2 * len(union) if any(queries) else 0, *(queries if not rotary else []), *values], default=dims)
        ragged = count > 0 and any(number != dims for number in queries + values)
        multiple = math.lcm(facts["head_multiple"], 2 if rotary else 1)
        self.size = -(-max(needed, 1) // multiple) * multiple if ragged else dims
        half, place = self.size // 2, {pair: i for i, pair in enumerate(union)}
        if rotary:
            pairs = kept or [union if number else [] for number in queries]
            query_places = [[turn * half + place[pair] for turn in (0, 1) for pair in one] for one in pairs]
        else:
            query_places = [list(range(number)) for number in queries]
        self.places = {"qk_dim": query_places, "vo_dim": [list(range(number)) for number in values]}
        moved = rotary and (len(union), self.size) != (dims // 2, dims)
        self.pairs = [*union, *([0] * (half - len(union)))] if moved else []

    def axis(self, kinds: list[str], *, per_head: bool) -> tuple[list[int], int]:
        """Places of an axis' entries once padded, and its padded width; `per_head` where all heads have their own."""
        copies, places, start = self.copies if per_head else 1, [], 0
        for kind in kinds:
            for head in self.places[kind]:
                for _ in range(copies):
                    places += [start + place for place in head]
                    start += self.size
        return places, start

    def widths(self) -> dict[str, int]:
        """Entries of each kind of one head of every group."""
        return {kind: sum(map(len, heads)) for kind, heads in self.places.items()}


class RotaryChoice:
    """Hands attention the rotations of the pairs that its heads kept; a forward pre-hook.

    Args:
        pairs: the dense pair at each place of half a head.
        head_dim: of the dense head.
    """

    def __init__(self, pairs: list[int], head_dim: int) -> None:
        self.dims = [turn * head_dim // 2 + pair for turn in (0, 1) for pair in pairs]
        self._index: torch.Tensor | None = None

    def __call__(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        rotations = kwargs["position_embeddings"]
        if self._index is None or self._index.device != rotations[0].device:
            self._index = _index(self.dims, rotations[0].device)
        chosen = tuple(part.index_select(-1, self._index) for part in rotations)
        return args, {**kwargs, "position_embeddings": chosen}


class HeadBias:
    """Gives attention what its own heads add to their scores, and hands on what it was given for all heads.

    Args:
        attention: the module; this listens to its calls.
        spec: `bias` of the sublayer: the argument, and where a table makes it the method that reads the table.
            Without a table nothing is handed on, and each layer begins anew.
        heads: which of the dense heads are left.
    """

    def __init__(self, attention: Any, spec: dict[str, str], heads: list[int]) -> None:
        self.argument, self.heads, self.shared = spec["argument"], heads, "table" in spec
        self._index: torch.Tensor | None = None
        self._whole: torch.Tensor | None = None
        attention.register_forward_pre_hook(self._before, with_kwargs=True)
        attention.register_forward_hook(self._after)
        if self.shared:
            setattr(attention, spec["compute"], functools.partial(self._computed, getattr(attention, spec["compute"])))

    def _choose(self, whole: torch.Tensor) -> torch.Tensor:
        self._whole = whole
        if self._index is None or self._index.device != whole.device:
            self._index = _index(self.heads, whole.device)
        return whole.index_select(1, self._index)

    def _computed(self, compute: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._choose(compute(*args, **kwargs))

    def _before(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get(self.argument) if self.shared else None
        return args, {**kwargs, self.argument: None if given is None else self._choose(given)}

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        result, _, *more = output
        whole, self._whole = self._whole, None
        return (result, whole, *more)


def _ones(text: str, width: int) -> list[int]:
    """Which bits of a hexadecimal number are set, the first the most significant."""
    return [i for i, bit in enumerate(f"{int(text, 16):0{width}b}") if bit == "1"]


def _like(module: Any) -> tuple[list[int], dict[str, Any]]:
    """Out and in of a linear, and the options to make another like it."""
    transposed = isinstance(module, Conv1D) or getattr(module, "transposed", False)
    shape = _dense_shape(module)
    options = {"bias": module.bias is not None, "device": module.weight.device, "dtype": module.weight.dtype}
    return (shape[::-1], {**options, "transposed": True}) if transposed else (shape, options)


def _pack(layer: nn.Module, weights: dict[str, list[str]], spec: dict[str, Any], layout: HeadLayout) -> None:
    """Let the linears of attention give and take heads of one size, where heads are not of that size anyway."""
    for path, axes in weights.items():
        axis = next((i for i, name in enumerate(axes) if name.split(" + ")[0] in layout.places), None)
        if axis is None:
            continue
        places, width = layout.axis(axes[axis].split(" + "), per_head=path in (spec["query"], spec["output"]))
        module: Any = _find(layer, path)
        if module is None:
            continue
        if not places:
            _replace(layer, path, Zeros(width))
        elif places != list(range(width)):
            shape, options = _like(module)
            packed: nn.Module = (
                SpreadLinear(shape, Spread(places, width), **options)
                if axis == 0
                else GatherLinear(shape, places, width, getattr(module, "spread", None), **options)
            )
            _replace(layer, path, packed)
    if layout.pairs:
        owner = layer.get_submodule(spec["query"].rpartition(".")[0])
        owner.register_forward_pre_hook(RotaryChoice(layout.pairs, layout.dense), with_kwargs=True)


class QueryScale:
    """Makes up for attention that divides scores by the root of the size of its heads; a forward hook of its queries.

    Args:
        size: of the heads that attention is given.
        dense: size whose root the scores are to be divided by.
        products: what attention multiplies a size by before it takes the root, in fp32.
    """

    def __init__(self, size: int, dense: int, products: int) -> None:
        self.factor = _single(math.sqrt(size * products)) / _single(math.sqrt(dense * products))

    def __call__(self, _module: nn.Module, _args: Any, queries: torch.Tensor) -> torch.Tensor:
        return queries * self.factor


def _single(number: float) -> float:
    """A number rounded to fp32."""
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return float(rounded)


def _keep_scales(layers: Any, stack: dict[str, Any], facts: dict[str, Any], config: Any) -> None:
    """Divide scores by what the dense heads had them divided by, where attention looks at the size of its heads."""
    if not stack["attention"].get("scales_by_size", False):
        return
    positions = stack.get("positions", {})
    listed = [
        entry in (getattr(config, name, None) or ())
        for name, entries in positions.get("products", {}).items()
        for entry in entries
    ]
    for layer, sizes in zip(layers, _layers_of(stack, facts), strict=True):
        layout = HeadLayout(sizes, facts)
        if sizes["heads"] == 0 or layout.size == layout.dense:
            continue
        for path in (stack["attention"]["query"], positions.get("query", "")):
            queries = _find(layer, path) if path else None
            if queries is not None:
                queries.register_forward_hook(QueryScale(layout.size, layout.dense, 1 + sum(listed)))


def _rows(sizes: dict[str, Any], kind: str, hidden: int) -> Spread:
    """Which coordinates of the residual stream a sublayer writes."""
    text = sizes.get(f"{kind}_rows")
    return Spread(list(range(hidden)) if text is None else _ones(text, hidden), hidden)


def _make_block_sparse(layer: nn.Module, path: str, block: list[int], kept: int) -> None:
    linear: Any = layer.get_submodule(path)
    if type(linear) not in (nn.Linear, SpreadLinear):
        raise ValueError(f"{path} is a {type(linear).__name__}: only a plain linear can be block-sparse")
    shape, options = _like(linear)
    _replace(layer, path, BlockLinear(shape, block, kept, spread=getattr(linear, "spread", None), **options))


def _stacks(family: dict[str, Any]) -> list[dict[str, Any]]:
    """The stacks of layers; a family with one has the keys of the stack at its top."""
    if "stacks" in family:
        return [{"name": name, **stack} for name, stack in family["stacks"].items()]
    return [{"name": None, "count": "num_layers", "sublayers": ["attention", "ffn"], **family}]


def _layers_of(stack: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Sizes of the layers of a stack."""
    return [sizes for sizes in facts["layers"] if sizes.get("stack") == stack["name"]]


def _sizes_of(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    """Sizes of one sublayer of a layer: in a table of its own, or beside the others."""
    own: dict[str, Any] = sizes.get(name, sizes)
    return own


def _weights_of(stack: dict[str, Any], name: str) -> dict[str, list[str]]:
    """Modules of a layer that may belong to a sublayer, and their axes."""
    root = stack[name].get("root", "")
    return {path: axes for path, axes in stack["layer"].items() if path.startswith(root)}


def _shrink_layer(layer: nn.Module, stack: dict[str, Any], sizes: dict[str, Any], facts: dict[str, Any]) -> None:
    """Give one layer its own sizes."""
    attentions = [name for name in stack["sublayers"] if "query" in stack[name]]
    layouts = {name: HeadLayout(_sizes_of(sizes, name), facts) for name in attentions}
    _resize_layer(layer, stack, layouts, {"hidden": facts["hidden"], "ffn_dim": sizes["ffn_dim"]})
    for name in stack["sublayers"]:
        spec, own, kind = stack[name], _sizes_of(sizes, name), "attn" if name in layouts else "ffn"
        spread = _rows(own, kind, facts["hidden"])
        if own["heads" if name in layouts else "ffn_dim"] == 0:
            _empty_sublayer(layer, spec, facts["empty"], spread)
            continue
        if len(spread.places) < spread.width:
            (_, columns), options = _like(layer.get_submodule(spec["output"]))
            _replace(layer, spec["output"], SpreadLinear([len(spread.places), columns], spread, **options))
        if name in layouts:
            layout = layouts[name]
            _pack(layer, _weights_of(stack, name), spec, layout)
            _tell_sizes(layer, spec, {"heads": own["heads"] * layout.copies, "head_dim": layout.size})
            if spec.get("bias") and "kept_heads" in own:
                HeadBias(layer.get_submodule(spec["query"].rpartition(".")[0]), spec["bias"], own["kept_heads"])
    for path, stored in sizes.get("blocks", {}).items():
        _make_block_sparse(layer, path, stored["block"], stored["kept"])


def _resize_layer(
    layer: nn.Module, stack: dict[str, Any], layouts: dict[str, HeadLayout], widths: dict[str, int]
) -> None:
    """Cut the weights of one layer down to the units that are left."""
    for path, axes in stack["layer"].items():
        kept = dict(widths)
        for name, layout in layouts.items():
            if path not in _weights_of(stack, name):
                continue
            kept |= layout.widths()
            if path == stack[name]["query"]:
                kept["qk_dim"] *= layout.copies
            if path == stack[name]["output"]:
                kept["vo_dim"] *= layout.copies
        _resize(layer, path, axes, kept)


def _tell_sizes(layer: nn.Module, spec: dict[str, Any], known: dict[str, int]) -> None:
    """Set the sizes that modules of attention keep for themselves."""
    for path, attributes in spec.get("cached", {}).items():
        for name, formula in attributes.items():
            factors = [known[factor] for factor in formula.split(" * ")]
            setattr(layer.get_submodule(path), name, math.prod(factors))


def _empty_sublayer(layer: nn.Module, spec: dict[str, Any], empty: str, spread: Spread) -> None:
    """Take out a sublayer without units: wholly, or down to its output bias if it has one."""
    _, options = _like(layer.get_submodule(spec["output"]))
    keeps_bias = empty == "bias" and options["bias"]
    if keeps_bias:
        bias = nn.Parameter(torch.empty(len(spread.places), device=options["device"], dtype=options["dtype"]))
        _replace(layer, spec["output"], Constant(bias, spread) if spread.places else Zeros(spread.width))
    for path, rule in spec["idle" if keeps_bias else "skip"].items():
        _stand_in(layer, path, rule)


def _number_caches(layers: Any, stack: dict[str, Any], sizes: list[dict[str, Any]]) -> None:
    """Give the attentions that are left consecutive places in the key/value cache, whose first one tells its length.

    Cross attention has a cache of its own.
    """
    for name in stack["sublayers"]:
        owner, place = stack[name].get("query", "").rpartition(".")[0], 0
        for layer, own in zip(layers, sizes, strict=True):
            if owner and _sizes_of(own, name)["heads"] > 0 and hasattr(layer.get_submodule(owner), "layer_idx"):
                layer.get_submodule(owner).layer_idx = place
                place += 1


def _move_tables(layers: Any, stack: dict[str, Any], sizes: list[dict[str, Any]]) -> None:
    """Put an embedding that attentions share, and that the first layer holds, where the first one is left."""
    for name in stack["sublayers"]:
        bias = stack[name].get("bias", {})
        users = [i for i, own in enumerate(sizes) if "table" in bias and _sizes_of(own, name)["heads"] > 0]
        if users and users[0] > 0:
            path, _, leaf = bias["table"].rpartition(".")
            old, new = (layers[i].get_submodule(path) for i in (0, users[0]))
            setattr(new, leaf, getattr(old, leaf))
            delattr(old, leaf)
            setattr(old, bias["flag"], False)
            setattr(new, bias["flag"], True)


def factor_embedding(model: Any, family: dict[str, Any], rank: int) -> None:
    """Make the word embedding of a model a `FactoredEmbedding`, of no particular value."""
    base = getattr(model, family["base"], model)
    dense = base.get_submodule(family["word_embeddings"])
    _replace(base, family["word_embeddings"], FactoredEmbedding(dense, rank))


def _shrink_around(model: Any, base: Any, family: dict[str, Any], facts: dict[str, Any]) -> None:
    """Give embeddings, final norm, pooler and head the width of the residual stream."""
    projection = family.get("embedding_projection")
    widths: dict[str, int] = {name: facts[name] for name in ("hidden", "pooler") if name in facts}
    if projection is None or _find(base, projection) is None:
        widths["embedding"] = facts["hidden"]
    for path, axes in family["embeddings"].items():
        _resize(base, path, axes, widths)
    if facts.get("embedding_rank"):
        factor_embedding(model, family, facts["embedding_rank"])
    for stack in _stacks(family):
        for path, axes in ((stack.get("embedding"), ["-", "hidden"]), (stack.get("final_norm"), ["hidden"])):
            if path and hasattr(base, path.split(".")[0]):
                _resize(base, path, axes, widths)
    for path, axes in family.get("pooler", {}).items():
        if getattr(base, path.split(".")[0], None) is not None:
            _resize(base, path, axes, widths)
    for path, axes in _head_of(model, family).items():
        _resize(model, path, axes, widths)


def _head_of(model: Any, family: dict[str, Any]) -> dict[str, list[str]]:
    """The modules of a model's head, and their axes; a bare model has none."""
    if family["base"] and not hasattr(model, family["base"]):
        return {}
    heads: dict[str, dict[str, list[str]]] = family["heads"]
    return next((table for kind, table in heads.items() if type(model).__name__.endswith(kind)), {})


def shrink(model: Any, facts: dict[str, Any]) -> None:
    """Make a stock model, built on the dense sizes, as small as `facts` (the `dsprune` table) say."""
    family = facts["family"]
    base = getattr(model, family["base"], model)
    _shrink_around(model, base, family, facts)
    for stack in _stacks(family):
        sizes = _layers_of(stack, facts)
        layers: Any = base.get_submodule(stack["layers"]) if hasattr(base, stack["layers"].split(".")[0]) else []
        _move_tables(layers, stack, sizes)
        for layer, own in zip(layers, sizes, strict=True):
            _shrink_layer(layer, stack, own, facts)
        _number_caches(layers, stack, sizes)
        _keep_scales(layers, stack, facts, model.config)
    use_calibration(base, facts.get("calibration", ()))


def dense_view(config: Any) -> Any:
    """The stock configuration with the dense model's sizes, which the stock constructors check, and the layers left."""
    facts = config.dsprune
    view = copy.deepcopy(config)
    # Some constructors look up the class of the base model by that of the configuration.
    view.__class__ = next(base for base in type(config).__mro__ if base.__module__.startswith("transformers."))
    counts = {stack["count"]: len(_layers_of(stack, facts)) for stack in _stacks(facts["family"])}
    sizes = {**facts["dense"], **counts}
    for ours, theirs in facts["family"]["sizes"].items():
        setattr(view, theirs, sizes[ours])
    return view


def tied_weights(cls: Any, family: dict[str, Any], config: Any) -> dict[str, str]:
    """What a class ties to what; a head with a weight of its own keeps it, though the class may tie every head."""
    tied: dict[str, str] = cls._tied_weights_keys or {}
    if getattr(config, family.get("scaled_head", ""), True) and not getattr(config, OWN_HEAD, False):
        return tied
    heads = {f"{path}.weight" for table in family["heads"].values() for path in table}
    return {path: source for path, source in tied.items() if path not in heads}


class CompactMixin:
    """Builds the stock model, then shrinks it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        facts = getattr(config, "dsprune", None)
        if not facts or facts.get("format") != FORMAT:
            raise ValueError(f"{type(self).__name__} needs a config.json with a `dsprune` table of format {FORMAT}")
        view = dense_view(config)
        self._tied_weights_keys = tied_weights(type(self), facts["family"], view)
        super().__init__(view, *args, **kwargs)
        shrink(self, facts)
        # The new modules are no longer those that the stock constructor tied.
        self.tie_weights()
        # The stock constructor chose the attention implementation, on the view.
        config._attn_implementation = view._attn_implementation
        for module in self.modules():
            # Others are copies for a part of the model, and say things that hold for that part alone.
            if getattr(module, "config", None) is view:
                module.config = config


class CompactConfigMixin:
    """A stock configuration that says how many layers the decoder of an encoder-decoder has.

    `transformers` makes the key/value cache from it, and takes the number of encoder layers, of which more may be gone.
    """

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        text = super().get_text_config(decoder=decoder, encoder=encoder)
        key = getattr(self, "dsprune", {}).get("family", {}).get("sizes", {}).get("num_decoder_layers")
        if decoder and key and text is not self:
            text.num_hidden_layers = getattr(self, key)
        return text


def _make_config(model_type: str, stem: str) -> Any:
    stock = getattr(transformers, f"{stem}Config")
    name = f"Compact{stem}Config"
    # Sizes of layers stand under `dsprune`: what stock sizes must be to each other does not hold here.
    members = {"model_type": f"dsprune_{model_type}", "_auto_class": "AutoConfig", "validate": lambda self: None}
    return type(name, (CompactConfigMixin, stock), {**members, "__module__": __name__})


def _make_model(stem: str, head: str, auto_class: str, config_class: Any) -> Any:
    stock = getattr(transformers, f"{stem}{head}")
    return type(
        f"Compact{stem}{head}",
        (CompactMixin, stock),
        {"config_class": config_class, "_auto_class": auto_class, "__doc__": f"Compact {stock.__name__}."},
    )


CONFIGS: dict[str, Any] = {}
MODELS: dict[tuple[str, str], Any] = {}
for _model_type, (_stem, _heads) in FAMILIES.items():
    CONFIGS[_model_type] = _make_config(_model_type, _stem)
    globals()[CONFIGS[_model_type].__name__] = CONFIGS[_model_type]
    for _head in _heads:
        MODELS[_model_type, _head] = _make_model(_stem, _head, HEADS[_head], CONFIGS[_model_type])
        globals()[MODELS[_model_type, _head].__name__] = MODELS[_model_type, _head]


def register() -> None:
    """Let the Auto classes of transformers load compact folders without `trust_remote_code`."""
    for model_type, config_class in CONFIGS.items():
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for head in FAMILIES[model_type][1]:
            auto_class = getattr(transformers, HEADS[head])
            auto_class.register(config_class, MODELS[model_type, head], exist_ok=True)
