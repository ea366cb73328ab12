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

from __future__ import annotations

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


class Places(nn.Module):
    """Some places of a wider axis.

    The index tensor is a buffer that is not stored: there before the first forward, on the device of the model.

    Args:
        places: index of each in the wide axis, ascending.
        width: of the wide axis.
    """

    index: torch.Tensor

    def __init__(self, places: Sequence[int], width: int) -> None:
        super().__init__()
        self.places, self.width = list(places), width
        start = self.places[0] if self.places else 0
        self.start = start if self.places == list(range(start, start + len(self.places))) else None
        """Where they begin, if there is no gap between them."""
        # One that was made in inference could not serve training later.
        with torch.inference_mode(False):
            self.register_buffer("index", torch.tensor(self.places, dtype=torch.long), persistent=False)

    @property
    def is_all(self) -> bool:
        """Whether no place is left out."""
        return self.start == 0 and len(self.places) == self.width

    def fill(self) -> None:
        """Write the index again, where a loader has put empty memory in its place."""
        self.index = torch.tensor(self.places, dtype=torch.long, device=self.index.device)

    def extra_repr(self) -> str:
        return f"{len(self.places)} of {self.width}"


class Spread(Places):
    """Puts values at places of a wider last axis, zeros between; nothing where they fill it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_all:
            return x
        if self.start is not None:
            return nn.functional.pad(x, (self.start, self.width - self.start - len(self.places)))
        return x.new_zeros(*x.shape[:-1], self.width).index_copy(-1, self.index, x)


class Choice(Places):
    """Takes the values at some places of an axis."""

    def forward(self, x: torch.Tensor, axis: int = -1) -> torch.Tensor:
        if self.is_all:
            return x
        if self.start is not None:
            return x.narrow(axis, self.start, len(self.places))
        return x.index_select(axis, self.index)


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


class BlockLinear(nn.Module):
    """A linear [out, in] that stores some blocks of its weight; the others are zero.

    With gradients, in training and where nothing is known of the device, the blocks are scattered into a dense
    weight. In inference the weight that runs, dense or BSR, is made once and kept until the values change.

    Args:
        shape: out and in.
        block: rows and columns of a block. The last blocks may reach beyond the matrix: what they hold there is
            zero, has no influence and gets no gradient.
        kept: stored blocks.

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
        **options: Any,
    ) -> None:
        super().__init__()
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


def _mix(module: nn.Module, mixin: type) -> None:
    """Let a stock module be of a class of ours as well, in place: its own class, with the mixin's methods first."""
    module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]


@functools.cache
def _mixed(mixin: type, stock: type) -> type:
    # Who looks for a class by its name (device maps, checkpointing policies) finds the stock one.
    return type(stock.__name__, (mixin, stock), {"stock": stock, "mixin": mixin, "__module__": __name__})


def _remake(mixin: type, stock: type) -> Any:
    made = _mixed(mixin, stock)
    return made.__new__(made)  # type: ignore[call-overload]


class Mixed:
    """A stock module with methods of ours; copies and pickles name the two classes that it is made of."""

    stock: Any
    mixin: type

    def __reduce__(self) -> Any:
        return _remake, (self.mixin, self.stock), self.__dict__


class HeadBias(nn.Module):
    """Gives attention what its own heads add to their scores, and hands on what it was given for all heads.

    Args:
        spec: `bias` of the sublayer: the argument, and where a table makes it the method that reads the table.
            Without a table nothing is handed on, and each layer begins anew.
        heads: which of the dense heads are left.
        dense: how many there were.
    """

    def __init__(self, spec: dict[str, str], heads: list[int], dense: int) -> None:
        super().__init__()
        self.argument, self.compute = spec["argument"], spec["compute"] if "table" in spec else None
        self.choice = Choice(heads, dense)

    def before(self, view: View, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of attention, those of its own heads in place of what holds for all."""
        given = kwargs.get(self.argument) if self.compute else None
        return {**kwargs, self.argument: None if given is None else self.choose(view, given)}

    def choose(self, view: View, whole: torch.Tensor) -> torch.Tensor:
        view.whole_bias = whole
        chosen: torch.Tensor = self.choice(whole, axis=1)
        return chosen


class Packing(nn.Module):
    """What stands between a module and its linears: where they read and write, in what the stock forward expects.

    The linears themselves keep their names, and have the shapes of their weights.

    Attributes:
        absent: width of what a linear without weights gives, by name: zeros.
        factors: by name, what the output of a linear is multiplied by.
        rotary: the dimensions of the rotations that attention is given that its heads kept.
        bias: what attention's own heads add to their scores.
    """

    rotary: Choice | None
    bias: HeadBias | None

    def __init__(self) -> None:
        super().__init__()
        self.absent: dict[str, int] = {}
        self.factors: dict[str, float] = {}
        self.rotary = self.bias = None

    def reads(self, name: str, choice: Choice) -> None:
        """Let a linear have some places of its input only."""
        self.add_module(f"{name}_input", choice)

    def writes(self, name: str, spread: Spread) -> None:
        """Put what a linear gives at places of what is expected of it."""
        self.add_module(f"{name}_output", spread)

    def holds(self, name: str) -> bool:
        """Whether anything stands between the module and this linear."""
        own = self._modules
        return name in self.absent or name in self.factors or f"{name}_input" in own or f"{name}_output" in own

    def call(self, linear: Any, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the stock forward expects of a linear; of one that is absent, `linear` is None."""
        if name in self.absent:
            return x.new_zeros(*x.shape[:-1], self.absent[name])
        choice, spread = self._modules.get(f"{name}_input"), self._modules.get(f"{name}_output")
        y: torch.Tensor = linear(x if choice is None else choice(x))
        return self.scaled(name, y if spread is None else spread(y))

    def scaled(self, name: str, y: torch.Tensor) -> torch.Tensor:
        return y * self.factors[name] if name in self.factors else y


class SeenLinear:
    """A linear as the stock forward sees it: it gives and takes what that expects, and is the linear in all else."""

    def __init__(self, linear: Any, name: str, packing: Packing) -> None:
        self._linear, self._name, self._packing = linear, name, packing

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._packing.call(self._linear, self._name, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._linear, name)


class View:
    """A module as its stock forward sees it in one call: with linears that give and take what it expects."""

    def __init__(self, module: Any, packing: Packing) -> None:
        self._module, self._packing = module, packing
        self.whole_bias: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        module, packing = self._module, self._packing
        if packing.holds(name):
            return SeenLinear(module._modules.get(name), name, packing)
        value = getattr(module, name)
        if getattr(value, "__self__", None) is not module:
            return value
        method = functools.partial(value.__func__, self)
        bias = packing.bias
        return method if bias is None or name != bias.compute else lambda *a, **k: bias.choose(self, method(*a, **k))


class Packed(Mixed):
    """A stock module whose linears are smaller than its forward expects."""

    packing: Packing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        packing = self.packing
        view = View(self, packing)
        if packing.rotary is not None:
            rotations = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = tuple(packing.rotary(part) for part in rotations)
        if packing.bias is None:
            return self.stock.forward(view, *args, **kwargs)
        result, _, *more = self.stock.forward(view, *args, **packing.bias.before(view, kwargs))
        return (result, view.whole_bias, *more)


def _is_serving(module: nn.Module, x: Any) -> bool:
    """Whether a module may run its weights otherwise than by calling its children: in inference, if nobody looks on."""
    return (
        not module.training
        and not torch.is_grad_enabled()
        # Not a fake, traced or quantized one.
        and type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        and not torch.is_autocast_enabled(x.device.type)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _is_untouched(module: nn.Module) -> bool:
    """Whether a module has its own forward, and nobody listens to it.

    The hooks with which transformers collects outputs do not count: sdpa attention has no maps to give, and hidden
    states are those of whole layers.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks):
            return False
    return "forward" not in module.__dict__


def _is_plain(module: Any) -> bool:
    """Whether a module is a linear and no more than that: not one that a tool has wrapped, quantized or listens to."""
    if type(module) is not nn.Linear or not _is_untouched(module):
        return False
    weight = module._parameters["weight"]
    # Under ZeRO-3 it is not there before the linear is called.
    return type(weight) is nn.Parameter and not hasattr(weight, "ds_id")


ONE_DNN_WORK = 1 << 20
"""Multiply-adds from which oneDNN's linear is faster than torch's own, which takes less time to call."""


@functools.cache
def _one_dnn() -> Any:
    """oneDNN's linear, which does what follows it as well, as torch's compiler calls it; None where there is none.

    On the CPUs that MKL is not made for it is twice as fast as `functional.linear`.
    """
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):  # type: ignore[no-untyped-call]
        return None
    with torch.inference_mode(False), torch.no_grad():
        x, weight, bias = torch.linspace(-1, 1, 24).view(4, 6), torch.linspace(2, -2, 18).view(3, 6), torch.ones(3)
        expected = nn.functional.linear(x, weight, bias)
        try:
            operator = torch.ops.mkldnn._linear_pointwise
            given = [
                operator.default(x, weight, bias, "gelu", [], "none"),
                operator.binary(x, expected, weight, bias, "add"),
            ]
        # No part of torch's public face: another version may have it otherwise, or not at all.
        except (AttributeError, RuntimeError, TypeError) as error:
            _warn_once(f"linears run without oneDNN, which is slower on some CPUs: {str(error).partition(chr(10))[0]}")
            return None
        right = zip(given, (nn.functional.gelu(expected), expected + expected), strict=True)
        return operator if all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in right) else None


def _fused_name(activation: Any) -> tuple[str, str] | None:
    """What oneDNN calls an activation; None where it has none that is equal to it."""
    if type(activation).__name__ == "GELUActivation" and activation.act is nn.functional.gelu:
        return "gelu", "none"
    return ("relu", "") if type(activation) is nn.ReLU else None


def _product(x: torch.Tensor, weight: torch.Tensor) -> Any:
    """oneDNN's linear where it pays for these, else None."""
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32 or x.device.type != "cpu":
        return None
    if x.numel() * weight.shape[0] < ONE_DNN_WORK or not torch.backends.mkldnn.enabled:  # type: ignore[attr-defined]
        return None
    return _one_dnn()


def _linear(linear: Any, x: torch.Tensor, activation: Any = None, residual: torch.Tensor | None = None) -> torch.Tensor:
    """A linear, then an activation or an addition, in one call where there is one; for inference.

    Args:
        linear: any module in the place of one.
        x: [..., in].
        activation: module that follows it.
        residual: [..., out], added to what it gives.
    """
    plain = _is_plain(linear)
    weight, bias = (linear._parameters["weight"], linear._parameters["bias"]) if plain else (None, None)
    operator = _product(x, weight) if plain else None  # type: ignore[arg-type]
    fused = None if activation is None else _fused_name(activation)
    if operator is not None and residual is not None:
        return operator.binary(x, residual, weight, bias, "add")  # type: ignore[no-any-return]
    if operator is not None:
        y = operator.default(x, weight, bias, *((fused[0], [], fused[1]) if fused else ("none", [], "")))
    else:
        y = nn.functional.linear(x, weight, bias) if plain else linear(x)  # type: ignore[arg-type]
    if activation is not None and (operator is None or fused is None):
        y = activation(y)
    return y if residual is None else y + residual  # type: ignore[no-any-return]


MERGED_WEIGHTS = 1 << 17
MERGED_TOKENS = 1 << 10
"""Linears of one input run as one product where their weights are so few, or the tokens so many, that putting the
weights side by side costs less than the calls that it saves. It is done in each call: what is kept would be wrong once
somebody writes to the weights."""


class Merge(Places):
    """Linears that read one input, as one product in inference.

    Args:
        names: of the linears in the module that holds them.
        sizes: what each gives.
        spreads: where that stands in what is expected of it, if that is wider.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], spreads: Sequence[Spread | None]) -> None:
        self.names, total = tuple(names), sum(sizes)
        self.widths = [spread.width if spread else size for spread, size in zip(spreads, sizes, strict=True)]
        self.is_padded = any(spreads)
        columns: list[int] = []
        start = 0
        for size, spread, width in zip(sizes, spreads, self.widths, strict=True):
            # After the last column stands one of zeros.
            part = [total] * width
            for i, place in enumerate(spread.places if spread else range(size)):
                part[place] = start + i
            columns, start = columns + part, start + size
        super().__init__(columns, total + 1)

    def pays(self, linears: Sequence[Any], x: torch.Tensor) -> bool:
        """Whether these are linears that may be merged, and one product of them takes less time than they do."""
        if not all(map(_is_plain, linears)):
            return False
        weights, biases = (
            sum(linear.weight.numel() for linear in linears),
            {linear.bias is None for linear in linears},
        )
        tokens = x.numel() // x.shape[-1]
        return len(biases) == 1 and (weights <= MERGED_WEIGHTS or tokens >= MERGED_TOKENS)

    def forward(self, linears: Sequence[Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        if self.is_padded:
            weights.append(x.new_zeros(1, x.shape[-1]))
            biases.append(None if biases[0] is None else x.new_zeros(1))
        weight, bias = torch.cat(weights), None if biases[0] is None else torch.cat(biases)
        operator = _product(x, weight)
        y = (
            nn.functional.linear(x, weight, bias)
            if operator is None
            else operator.default(x, weight, bias, "none", [], "")
        )
        return (y.index_select(-1, self.index) if self.is_padded else y).split(self.widths, -1)  # type: ignore[no-any-return]


Path = tuple[str, ...]
"""Names of modules, each inside the one before."""


def _at(root: Any, path: Path) -> Any:
    """The module at a path; None where there is none."""
    for name in path:
        root = root._modules.get(name) if root is not None else None
    return root


class Parts:
    """Where the parts of a post-norm layer are.

    Attributes:
        attention, ffn: what a sublayer computes before its output: names are paths in the layer; None where it has no
            units left.
        outputs: paths of the output linear and the norm of each sublayer; None where it is not there.
        watched: paths of modules that a fused layer does not call, and the names of their classes.
    """

    def __init__(self, layer: nn.Module, stack: dict[str, Any], running: dict[str, bool]) -> None:
        split = {path: tuple(path.split(".")) for path in stack["layer"]}
        reads = {path: axes[0] for path, axes in stack["layer"].items() if axes[1:] == ["hidden"]}
        query = stack["attention"]["query"]
        key = next(path for path, axis in reads.items() if axis == "qk_dim" and path != query)
        value = next(path for path, axis in reads.items() if axis == "vo_dim")
        up = next(path for path, axis in reads.items() if axis == "ffn_dim")
        self.attention = tuple(split[path] for path in (query, key, value)) if running["attention"] else None
        self.ffn = split[up] if running["ffn"] else None
        self.activation: Path | None = None
        if self.ffn is not None:
            owner = layer.get_submodule(up.rpartition(".")[0])
            named = next(name for name in ("intermediate_act_fn", "activation") if hasattr(owner, name))
            self.activation = (*self.ffn[:-1], named)
        self.outputs = {
            name: (split[stack[name]["output"]], split[stack[name]["norm"]])
            for name in running
            if _find(layer, stack[name]["output"]) is not None
        }
        called = {*split, ".".join(self.activation or ())}
        self.watched = [
            (tuple(path.split(".")), type(module).__name__)
            for path, module in layer.named_modules()
            if path and path not in called and "packing" not in path.split(".") and "merge" not in path.split(".")
        ]


class PostNormLayer(Mixed):
    """A post-norm encoder layer that in inference computes in few calls what its modules compute in many.

    It is for the sdpa attention; with any other, in training and under a compiler it is the stock layer.
    """

    parts: Parts

    def forward(self: Any, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not self._is_fused(hidden_states, args, kwargs):
            return self.stock.forward(self, hidden_states, attention_mask, *args, **kwargs)
        parts: Parts = self.parts
        x = hidden_states
        for sublayer, (output, norm) in parts.outputs.items():
            if sublayer == "ffn":
                inner = x if parts.ffn is None else _linear(_at(self, parts.ffn), x, _at(self, parts.activation))  # type: ignore[arg-type]
            else:
                inner = x if parts.attention is None else self._attend(x, attention_mask)
            x = _at(self, norm)(self._write(output, inner, x))
        return x

    def _is_fused(self: Any, x: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether nothing is asked of the layer that only the stock one gives, and nobody listens inside it."""
        if not _is_serving(self, x) or any(argument is not None for argument in args):
            return False
        if any(value is not None and value is not False and name != "position_ids" for name, value in kwargs.items()):
            return False
        watched = ((_at(self, path), name) for path, name in self.parts.watched)
        if not all(type(module).__name__ == name and _is_untouched(module) for module, name in watched):
            return False
        attention = self.parts.attention
        return attention is None or _at(self, attention[0][:-1]).config._attn_implementation == "sdpa"

    def _attend(self: Any, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Contexts of all heads, side by side: [batch, length, heads * size]."""
        paths = self.parts.attention
        owner = _at(self, paths[0][:-1])
        names = [path[-1] for path in paths]
        linears = [owner._modules.get(name) for name in names]
        merge, packing = owner._modules.get("merge"), owner._modules.get("packing")
        if merge is not None and merge.pays(linears, x):
            given = merge(linears, x)
        elif packing is not None:
            given = [packing.call(linear, name, x) for linear, name in zip(linears, names, strict=True)]
        else:
            given = [_linear(linear, x) for linear in linears]
        shape = (*x.shape[:-1], -1, owner.attention_head_size)
        query, key, value = (part.view(shape).transpose(1, 2) for part in given)
        context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=owner.scaling)
        return context.transpose(1, 2).flatten(2)

    def _write(self: Any, path: Path, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The residual stream with what an output linear adds to it."""
        owner, name = _at(self, path[:-1]), path[-1]
        linear, packing = owner._modules[name], owner._modules.get("packing")
        if packing is None:
            return _linear(linear, x, residual=residual)
        choice, spread = packing._modules.get(f"{name}_input"), packing._modules.get(f"{name}_output")
        x = x if choice is None else choice(x)
        return _linear(linear, x, residual=residual) if spread is None else spread(_linear(linear, x)) + residual


class PostNormEncoder(Mixed):
    """A stack of post-norm layers; in inference the mask of scores is made once for all of them."""

    def forward(self: Any, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dtype is torch.bool:
            if _is_serving(self, hidden_states):
                # What each attention would make of it.
                shape = torch.zeros_like(attention_mask, dtype=hidden_states.dtype)
                attention_mask = shape.masked_fill_(~attention_mask, -math.inf)
        return self.stock.forward(self, hidden_states, attention_mask, *args, **kwargs)


def _fuse_layers(encoder: Any, layers: Any, stack: dict[str, Any], facts: dict[str, Any]) -> None:
    """Let the layers of a post-norm encoder run in few calls."""
    _mix(encoder, PostNormEncoder)
    for layer, sizes in zip(layers, _layers_of(stack, facts), strict=True):
        parts = Parts(layer, stack, {"attention": sizes["heads"] > 0, "ffn": sizes["ffn_dim"] > 0})
        _mix(layer, PostNormLayer)
        layer.parts = parts
        if parts.attention is None:
            continue
        owner = _at(layer, parts.attention[0][:-1])
        linears = {path[-1]: _at(layer, path) for path in parts.attention}
        if all(type(linear) is nn.Linear for linear in linears.values()):
            packing = owner._modules.get("packing")
            spreads = [packing and packing._modules.get(f"{name}_output") for name in linears]
            owner.merge = Merge(tuple(linears), [_dense_shape(linear)[0] for linear in linears.values()], spreads)


ENCODER_CHUNK = 1 << 19
"""Values of the residual stream that an encoder computes at a time on a thread of a CPU, whose caches then hold what
they are made of and what becomes of them."""


def _sequences_at_once(model: Any, args: Any, inputs: dict[str, Any]) -> int | None:
    """How many sequences an encoder should compute at a time; None where it must take all together."""
    x = args[0] if args else inputs.get("input_ids", inputs.get("inputs_embeds"))
    if x is None or not _is_serving(model, x) or x.device.type != "cpu" or x.dim() < 2:
        return None
    if getattr(model.config, "is_decoder", False) or len(args) > 1:
        return None
    if any(inputs.get(name) is not None for name in ("labels", "start_positions", "end_positions")):
        return None
    step = ENCODER_CHUNK * torch.get_num_threads() // max(1, x.shape[1] * model.config.hidden_size)
    # Whoever listens would be told of a part of the batch at a time.
    if len(x) <= max(1, step) or not all(map(_is_untouched, model.modules())):
        return None
    return -(-len(x) // -(-len(x) // max(1, step)))  # type: ignore[no-any-return]


def _joined(parts: Sequence[Any]) -> Any:
    """Outputs for parts of a batch as one."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return type(first)(**{name: _joined([part[name] for part in parts]) for name in first})
    return type(first)(map(_joined, zip(*parts, strict=True)))


def _in_parts(stock: Any) -> Any:
    """The forward of an encoder that in inference on a CPU takes a large batch in parts."""

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = _sequences_at_once(self, args, kwargs)
        if step is None:
            return stock(self, *args, **kwargs)
        size = len(args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds")))  # type: ignore[arg-type]

        def part(value: Any, start: int) -> Any:
            whole = not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) != size
            return value if whole else value[start : start + step]

        outputs = [
            stock(self, *(part(value, i) for value in args), **{name: part(value, i) for name, value in kwargs.items()})
            for i in range(0, size, step)
        ]
        return _joined(outputs)

    return forward


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


def _ones(text: str, width: int) -> list[int]:
    """Which bits of a hexadecimal number are set, the first the most significant."""
    return [i for i, bit in enumerate(f"{int(text, 16):0{width}b}") if bit == "1"]


def _like(module: Any) -> tuple[list[int], dict[str, Any]]:
    """Out and in of a linear, and the options to make another like it."""
    shape = _dense_shape(module)
    options = {"bias": module.bias is not None, "device": module.weight.device, "dtype": module.weight.dtype}
    return (shape[::-1] if isinstance(module, Conv1D) else shape), options


def _owner(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a linear, and the linear's name there."""
    parent, _, name = path.rpartition(".")
    return layer.get_submodule(parent), name


def _packing_of(owner: nn.Module) -> Packing:
    """What stands between a module and its linears; made where there is nothing yet."""
    if not isinstance(owner, Packed):
        _mix(owner, Packed)
        owner.packing = Packing()
    packing: Packing = owner.packing  # type: ignore[assignment]
    return packing


def _pack(layer: nn.Module, weights: dict[str, list[str]], spec: dict[str, Any], layout: HeadLayout) -> None:
    """Let the linears of attention give and take heads of one size, where heads are not of that size anyway."""
    for path, axes in weights.items():
        axis = next((i for i, name in enumerate(axes) if name.split(" + ")[0] in layout.places), None)
        if axis is None or _find(layer, path) is None:
            continue
        places, width = layout.axis(axes[axis].split(" + "), per_head=path in (spec["query"], spec["output"]))
        if places == list(range(width)):
            continue
        owner, name = _owner(layer, path)
        if not places:
            delattr(owner, name)
            _packing_of(owner).absent[name] = width
        elif axis == 0:
            _packing_of(owner).writes(name, Spread(places, width))
        else:
            _packing_of(owner).reads(name, Choice(places, width))
    if layout.pairs:
        dims = [turn * layout.dense // 2 + pair for turn in (0, 1) for pair in layout.pairs]
        _packing_of(_owner(layer, spec["query"])[0]).rotary = Choice(dims, layout.dense)


def _query_factor(size: int, dense: int, products: int) -> float:
    """Makes up for attention that divides scores by the root of the size of its heads.

    Args:
        size: of the heads that attention is given.
        dense: size whose root the scores are to be divided by.
        products: what attention multiplies a size by before it takes the root, in fp32.
    """
    return _single(math.sqrt(size * products)) / _single(math.sqrt(dense * products))


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
            if path and _find(layer, path) is not None:
                owner, name = _owner(layer, path)
                _packing_of(owner).factors[name] = _query_factor(layout.size, layout.dense, 1 + sum(listed))


def _rows(sizes: dict[str, Any], kind: str, hidden: int) -> Spread:
    """Which coordinates of the residual stream a sublayer writes."""
    text = sizes.get(f"{kind}_rows")
    return Spread(list(range(hidden)) if text is None else _ones(text, hidden), hidden)


def _make_block_sparse(layer: nn.Module, path: str, block: list[int], kept: int) -> None:
    linear: Any = layer.get_submodule(path)
    if type(linear) is not nn.Linear:
        raise ValueError(f"{path} is a {type(linear).__name__}: only a plain linear can be block-sparse")
    shape, options = _like(linear)
    _replace(layer, path, BlockLinear(shape, block, kept, **options))


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
        if not spread.is_all:
            _resize(layer, spec["output"], ["rows", "-"], {"rows": len(spread.places)})
            owner, linear = _owner(layer, spec["output"])
            _packing_of(owner).writes(linear, spread)
        if name in layouts:
            layout = layouts[name]
            _pack(layer, _weights_of(stack, name), spec, layout)
            _tell_sizes(layer, spec, {"heads": own["heads"] * layout.copies, "head_dim": layout.size})
            if spec.get("bias") and "kept_heads" in own:
                packing = _packing_of(_owner(layer, spec["query"])[0])
                packing.bias = HeadBias(spec["bias"], own["kept_heads"], facts["dense"]["num_heads"])
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
        # A linear without weights is taken out, not made.
        if 0 not in (_width(axis, kept) for axis in axes):
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
        if len(layers) and not family.get("pre_norm", False) and "positions" not in family:
            _fuse_layers(base.get_submodule(stack["layers"].rpartition(".")[0]), layers, stack, facts)
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

    def initialize_weights(self) -> None:
        """Beside what stock modules do: indices, which loaders take for buffers that are yet to be made."""
        super().initialize_weights()  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, Places):
                module.fill()


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


def _make_model(model_type: str, head: str, config_class: Any) -> Any:
    stem, heads = FAMILIES[model_type]
    stock = getattr(transformers, f"{stem}{head}")
    members = {"config_class": config_class, "_auto_class": HEADS[head], "__doc__": f"Compact {stock.__name__}."}
    if heads == ENCODER_HEADS:
        members["forward"] = _in_parts(stock.forward)
    return type(f"Compact{stem}{head}", (CompactMixin, stock), members)


CONFIGS: dict[str, Any] = {}
MODELS: dict[tuple[str, str], Any] = {}
for _model_type, (_stem, _heads) in FAMILIES.items():
    CONFIGS[_model_type] = _make_config(_model_type, _stem)
    globals()[CONFIGS[_model_type].__name__] = CONFIGS[_model_type]
    for _head in _heads:
        MODELS[_model_type, _head] = _make_model(_model_type, _head, CONFIGS[_model_type])
        globals()[MODELS[_model_type, _head].__name__] = MODELS[_model_type, _head]


def register() -> None:
    """Let the Auto classes of transformers load compact folders without `trust_remote_code`."""
    for model_type, config_class in CONFIGS.items():
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for head in FAMILIES[model_type][1]:
            auto_class = getattr(transformers, HEADS[head])
            auto_class.register(config_class, MODELS[model_type, head], exist_ok=True)
