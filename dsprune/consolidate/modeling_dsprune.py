# This file belongs to a compact model that dsprune made. It stands alone: it needs torch and transformers.
"""Compact transformers: the stock architectures, with sizes of their own in every layer.

`config.json` holds, under `dsprune`, the sizes of every layer and the family's layout. A model is
built as the stock class and its modules are then made smaller; a removed sublayer is bypassed and a
layer without sublayers is not there at all.

Attention heads that kept unequal numbers of query/key and value/output dimensions are packed: their
weights are stored without padding and padded with zeros, when they are used, to one head size a layer,
so that the stock attention runs all heads in one call. Zero query dimensions add nothing to a score,
zero value dimensions nothing to an output; the scale stays that of the dense head.

A sublayer that writes only some coordinates of the residual stream computes those rows alone, and
spreads them over the width with zeros between.
"""

import copy
import math
from typing import Any

import torch
import transformers
from torch import nn

FORMAT = 1
FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert",
    "electra": "Electra",
}
HEADS = {
    "Model": "AutoModel",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}


class Bypass(nn.Module):
    """Stands where a removed sublayer's module stood and returns one of its arguments, or zero.

    Args:
        rule: "first", "second", "zero" or the name of a child that answers; with ", none" where the module also
            returns attention weights.
    """

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.what, _, self.more = rule.partition(", ")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = [*args, *kwargs.values()]
        if self.what == "zero":
            result = arguments[0].new_zeros(())
        elif hasattr(self, self.what):
            result = getattr(self, self.what)(arguments[0])
        else:
            result = arguments[("first", "second").index(self.what)]
        return (result, None) if self.more else result

    def extra_repr(self) -> str:
        return self.rule


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
            self._index = torch.tensor(self.places, device=x.device)
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


class SpreadLinear(nn.Linear):
    """A linear that computes only some rows of its output; the others are zero."""

    def __init__(self, shape: list[int], spread: Spread, **options: Any) -> None:
        super().__init__(shape[1], shape[0], **options)
        self.spread = spread

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.spread(super().forward(x))
        return rows


class PackedLinear(nn.Linear):
    """A linear whose rows or columns belong to heads of unequal size, padded with zeros when it is used.

    In inference the padded weights are kept from one call to the next, as long as the weights stay the same.

    Args:
        axis: 0 where the rows belong to heads, 1 where the columns do.
        counts: units of each head, in the order of the weight.
        size: units of each head once padded.
        spread: of the output, where only some of its rows are computed.
    """

    def __init__(
        self, shape: list[int], axis: int, counts: list[int], size: int, spread: Spread | None = None, **options: Any
    ) -> None:
        super().__init__(shape[1], shape[0], **options)
        self.spread = spread
        self.axis, self.size, self.heads = axis, size, len(counts)
        self.places = [head * size + unit for head, count in enumerate(counts) for unit in range(count)]
        self._kept: tuple[Any, tuple[torch.Tensor, torch.Tensor | None]] | None = None

    def _padded(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[axis] = self.heads * self.size
        return tensor.new_zeros(shape).index_copy(axis, torch.tensor(self.places, device=tensor.device), tensor)

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Padded weight and bias."""
        bias = self._padded(self.bias, 0) if self.bias is not None and self.axis == 0 else self.bias
        return self._padded(self.weight, self.axis), bias

    def _weights_for_inference(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        owned = [self.weight] if self.bias is None else [self.weight, self.bias]
        if any(tensor.is_inference() for tensor in owned):  # nothing tells when those change
            return self._weights()
        state = [(tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device) for tensor in owned]
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self._weights())
        return self._kept[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or torch.is_grad_enabled():
            self._kept = None
            y = nn.functional.linear(x, *self._weights())
        else:
            y = nn.functional.linear(x, *self._weights_for_inference())
        return y if self.spread is None else self.spread(y)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # copies pad for themselves

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {('rows', 'columns')[self.axis]} packed into {self.heads} heads of {self.size}"


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


def _resized(module: Any, sizes: list[int | None]) -> nn.Module:
    """A new module of the same kind; `sizes` are those of the weight's axes, None where they stay."""
    # A model that is loaded straight into ZeRO-3 partitions keeps its shapes in `ds_shape`.
    dense = getattr(module.weight, "ds_shape", module.weight.shape)
    shape = [old if new is None else new for old, new in zip(dense, sizes, strict=True)]
    options = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        return nn.Linear(shape[1], shape[0], bias=module.bias is not None, **options)
    if isinstance(module, nn.Embedding):
        return nn.Embedding(shape[0], shape[1], padding_idx=module.padding_idx, **options)
    return nn.LayerNorm(shape, eps=module.eps, **options)


def _resize(root: nn.Module, path: str, axes: list[str], widths: dict[str, int]) -> None:
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    if hasattr(owner, name):
        sizes = [widths.get(axis) for axis in axes]
        if any(size is not None for size in sizes):
            setattr(owner, name, _resized(getattr(owner, name), sizes))


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _stand_in(layer: nn.Module, path: str, rule: str) -> None:
    """Put a `Bypass` where a module was; a child that the rule names stays."""
    bypass = Bypass(rule)
    if bypass.what not in ("first", "second", "zero"):
        setattr(bypass, bypass.what, layer.get_submodule(path).get_submodule(bypass.what))
    _replace(layer, path, bypass)


def head_sizes(sizes: dict[str, Any], facts: dict[str, Any]) -> tuple[list[int], list[int], int]:
    """Query/key and value/output dimensions of each kept head of a layer, and the size all are padded to."""
    dense = [facts["head_dim"]] * sizes["heads"]
    query, value = sizes.get("qk_dims", dense), sizes.get("vo_dims", dense)
    if query == value == dense or not dense:
        return query, value, facts["head_dim"]
    multiple = facts["head_multiple"]
    return query, value, -(-max(query + value) // multiple) * multiple


def _like(module: Any) -> tuple[list[int], dict[str, Any]]:
    """Shape of a linear's weight, and the options to make another like it."""
    shape = list(getattr(module.weight, "ds_shape", module.weight.shape))
    return shape, {"bias": module.bias is not None, "device": module.weight.device, "dtype": module.weight.dtype}


def _pack(layer: nn.Module, family: dict[str, Any], heads: dict[str, list[int]], size: int) -> None:
    """Let the linears of attention pad their heads to one size, where they are not of that size anyway."""
    for path, axes in family["layer"].items():
        axis, kind = next(((i, name) for i, name in enumerate(axes) if name in heads), (0, None))
        if kind is None or all(count == size for count in heads[kind]):
            continue
        module: Any = layer.get_submodule(path)
        if sum(heads[kind]) == 0:
            _replace(layer, path, Zeros(len(heads[kind]) * size))
            continue
        shape, options = _like(module)
        _replace(layer, path, PackedLinear(shape, axis, heads[kind], size, getattr(module, "spread", None), **options))


def _rows(sizes: dict[str, Any], kind: str, hidden: int) -> Spread:
    """Which coordinates of the residual stream a sublayer writes."""
    text = sizes.get(f"{kind}_rows")
    bits = "1" * hidden if text is None else f"{int(text, 16):0{hidden}b}"
    return Spread([i for i, bit in enumerate(bits) if bit == "1"], hidden)


def _shrink_layer(layer: nn.Module, family: dict[str, Any], sizes: dict[str, Any], facts: dict[str, Any]) -> None:
    """Give one layer its own sizes."""
    query, value, head_size = head_sizes(sizes, facts)
    widths = {
        "hidden": facts["hidden"],
        "qk_dim": sum(query),
        "vo_dim": sum(value),
        "ffn_dim": sizes["ffn_dim"],
    }
    for path, axes in family["layer"].items():
        _resize(layer, path, axes, widths)
    for kind, count in (("attention", sizes["heads"]), ("ffn", sizes["ffn_dim"])):
        spec = family[kind]
        spread = _rows(sizes, "attn" if kind == "attention" else "ffn", facts["hidden"])
        if count == 0:
            _empty_sublayer(layer, spec, facts["empty"], spread)
            continue
        if len(spread.places) < spread.width:
            (_, columns), options = _like(layer.get_submodule(spec["output"]))
            _replace(layer, spec["output"], SpreadLinear([len(spread.places), columns], spread, **options))
        if kind == "attention":
            _pack(layer, family, {"qk_dim": query, "vo_dim": value}, head_size)
        known = {"heads": sizes["heads"], "head_dim": head_size}
        for path, attributes in spec.get("cached", {}).items():
            for name, formula in attributes.items():
                factors = [known[factor] for factor in formula.split(" * ")]
                setattr(layer.get_submodule(path), name, math.prod(factors))


def _empty_sublayer(layer: nn.Module, spec: dict[str, Any], empty: str, spread: Spread) -> None:
    """Take out a sublayer without units: wholly, or down to its output bias."""
    if empty == "bias":
        _, options = _like(layer.get_submodule(spec["output"]))
        bias = nn.Parameter(torch.empty(len(spread.places), device=options["device"], dtype=options["dtype"]))
        _replace(layer, spec["output"], Constant(bias, spread) if spread.places else Zeros(spread.width))
    for path, rule in spec["skip" if empty == "identity" else "idle"].items():
        _stand_in(layer, path, rule)


def factor_embedding(model: Any, family: dict[str, Any], rank: int) -> None:
    """Make the word embedding of a model a `FactoredEmbedding`, of no particular value."""
    base = getattr(model, family["base"], model)
    dense = base.get_submodule(family["word_embeddings"])
    _replace(base, family["word_embeddings"], FactoredEmbedding(dense, rank))


def shrink(model: Any, facts: dict[str, Any]) -> None:
    """Make a stock model, built on the dense sizes, as small as `facts` (the `dsprune` table) say."""
    family = facts["family"]
    base = getattr(model, family["base"], model)
    projection = family.get("embedding_projection")
    projected = projection is not None and hasattr(base, projection)
    widths = {"hidden": facts["hidden"]}
    if not projected:
        widths["embedding"] = facts["hidden"]
    for path, axes in family["embeddings"].items():
        _resize(base, path, axes, widths)
    if facts.get("embedding_rank"):
        factor_embedding(model, family, facts["embedding_rank"])
    for path, axes in family.get("pooler", {}).items():
        if getattr(base, path.split(".")[0], None) is not None:
            _resize(base, path, axes, widths)
    for layer, sizes in zip(base.get_submodule(family["layers"]), facts["layers"], strict=True):
        _shrink_layer(layer, family, sizes, facts)
    for kind, table in family["heads"].items():
        if base is not model and type(model).__name__.endswith(kind):
            for path, axes in table.items():
                _resize(model, path, axes, widths)


def dense_view(config: Any) -> Any:
    """The configuration with the dense model's sizes, which the stock constructors check, and the layers left."""
    facts = config.dsprune
    view = copy.deepcopy(config)
    sizes = {**facts["dense"], "num_layers": len(facts["layers"])}
    for ours, theirs in facts["family"]["sizes"].items():
        setattr(view, theirs, sizes[ours])
    return view


class CompactMixin:
    """Builds the stock model, then shrinks it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        facts = getattr(config, "dsprune", None)
        if not facts or facts.get("format") != FORMAT:
            raise ValueError(f"{type(self).__name__} needs a config.json with a `dsprune` table of format {FORMAT}")
        view = dense_view(config)
        super().__init__(view, *args, **kwargs)
        shrink(self, facts)
        # The stock constructor chose the attention implementation, on the view.
        config._attn_implementation = view._attn_implementation
        for module in self.modules():
            if getattr(module, "config", None) is view:
                module.config = config


def _make_config(model_type: str, stem: str) -> Any:
    stock = getattr(transformers, f"{stem}Config")
    name = f"Compact{stem}Config"
    return type(name, (stock,), {"model_type": f"dsprune_{model_type}", "_auto_class": "AutoConfig"})


def _make_model(stem: str, head: str, auto_class: str, config_class: Any) -> Any:
    stock = getattr(transformers, f"{stem}{head}")
    return type(
        f"Compact{stem}{head}",
        (CompactMixin, stock),
        {"config_class": config_class, "_auto_class": auto_class, "__doc__": f"Compact {stock.__name__}."},
    )


CONFIGS: dict[str, Any] = {}
MODELS: dict[tuple[str, str], Any] = {}
for _model_type, _stem in FAMILIES.items():
    CONFIGS[_model_type] = _make_config(_model_type, _stem)
    globals()[CONFIGS[_model_type].__name__] = CONFIGS[_model_type]
    for _head, _auto_class in HEADS.items():
        MODELS[_model_type, _head] = _make_model(_stem, _head, _auto_class, CONFIGS[_model_type])
        globals()[MODELS[_model_type, _head].__name__] = MODELS[_model_type, _head]


def register() -> None:
    """Let the Auto classes of transformers load compact folders without `trust_remote_code`."""
    for model_type, config_class in CONFIGS.items():
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for head, auto_class in HEADS.items():
            getattr(transformers, auto_class).register(config_class, MODELS[model_type, head], exist_ok=True)
