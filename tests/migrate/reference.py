"""Small models as the authors' code writes them, and what that code computes, written anew from its description."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

LAYERS, HEADS, HIDDEN, FFN, VOCABULARY = 3, 4, 32, 48, 60
SIZES = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "num_labels": 3,
}


def random_model(base: str = "bert", seed: int = 0) -> nn.Module:
    """A dense model with weights large enough that differences show."""
    torch.manual_seed(seed)
    made: nn.Module = (
        BertForSequenceClassification(BertConfig(**SIZES))
        if base == "bert"
        else RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=1))
    )
    for param in made.parameters():
        nn.init.normal_(param, std=0.2)
    return made.eval()


def batch(padding: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(5, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[2:, 7:] = 0
    return {"input_ids": ids.where(mask == 1, padding), "attention_mask": mask}


def write_folder(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], **tensors: Any) -> Path:
    """A folder as `save_pretrained` of transformers 4.17 left it, and other files that torch saved."""
    import json

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(dict(state), folder / "pytorch_model.bin")
    for name, value in tensors.items():
        torch.save(value, folder / f"{name}.pt")
    return folder


def cofi_config(base: str = "bert") -> dict[str, Any]:
    """As theirs: of the dense model, whatever its weights are, under the name of their class."""
    config = random_model(base).config.to_dict()
    name = {"bert": "Bert", "roberta": "Roberta"}[base]
    return {
        **{key: value for key, value in config.items() if key not in ("dtype", "transformers_version")},
        "architectures": [f"CoFi{name}ForSequenceClassification"],
        "do_layer_distill": True,
        "finetuning_task": "mnli",
        "pruned_heads": {"0": [1, 2]},
    }


def cofi_masks(seed: int, *, soft: bool) -> dict[str, Tensor]:
    """Masks in their shapes; soft ones scale what they keep. One attention, one FFN and a whole layer are off."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        kept = (torch.rand(shape, generator=generator) > 0.4).float()
        return kept * (0.5 + 0.5 * torch.rand(shape, generator=generator)) if soft else kept

    masks = {
        "head_z": draw(LAYERS, 1, HEADS, 1, 1),
        "head_layer_z": draw(LAYERS).clamp(0.6, 0.9) if soft else torch.ones(LAYERS),
        "intermediate_z": draw(LAYERS, 1, 1, FFN),
        "mlp_z": draw(LAYERS).clamp(0.6, 0.9) if soft else torch.ones(LAYERS),
        "hidden_z": draw(HIDDEN),
    }
    masks["head_z"][:, :, 0] = 1
    masks["head_layer_z"][1] = masks["mlp_z"][1] = masks["mlp_z"][2] = 0
    return masks


def _live_norm(x: Tensor, weight: Tensor, bias: Tensor, live: Tensor, eps: float) -> Tensor:
    """LayerNorm over the hidden dimensions that are left, the others as they were."""
    normed = F.layer_norm(x[..., live], [int(live.sum())], weight[live], bias[live], eps)
    out = x.clone()
    out[..., live] = normed
    return out


class _Cofi:
    """CoFi's forward pass over named weights, dense or cut; what is missing is skipped."""

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        self.base = "roberta" if config["model_type"] == "roberta" else "bert"
        self.eps = config["layer_norm_eps"]
        self.state = state
        width = state[f"{self.base}.embeddings.word_embeddings.weight"].shape[1]
        ones = torch.ones
        self.head = masks.get("head_z", ones(LAYERS, HEADS)).reshape(LAYERS, HEADS)
        self.attn = masks.get("head_layer_z", ones(LAYERS))
        self.ffn = masks.get("mlp_z", ones(LAYERS))
        self.neurons = masks.get("intermediate_z", ones(LAYERS, FFN)).reshape(LAYERS, FFN)
        self.hidden = masks.get("hidden_z", ones(width))
        self.live = self.hidden != 0

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return _live_norm(x, weight, bias, self.live, self.eps) * self.hidden

    def _attention(self, layer: int, x: Tensor, mask: Tensor) -> Tensor:
        name, dims = f"{self.base}.encoder.layer.{layer}.attention", HIDDEN // HEADS
        if f"{name}.self.query.weight" not in self.state or self.attn[layer] == 0:
            return x
        query, key, value = (
            self._linear(f"{name}.self.{part}", x).unflatten(-1, (-1, dims)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(dims) + (1 - mask[:, None, None, :]) * -1e9
        context = scores.softmax(-1) @ value * self.head[layer, : query.shape[1], None, None]
        out = self._linear(f"{name}.output.dense", context.transpose(1, 2).flatten(2)) * self.attn[layer]
        return self._norm(f"{name}.output.LayerNorm", out * self.hidden + x)

    def _feed_forward(self, layer: int, x: Tensor) -> Tensor:
        name = f"{self.base}.encoder.layer.{layer}"
        if f"{name}.output.dense.weight" not in self.state or self.ffn[layer] == 0:
            return x
        inner = F.gelu(self._linear(f"{name}.intermediate.dense", x))
        inner = inner * self.neurons[layer, : inner.shape[-1]]
        out = self._linear(f"{name}.output.dense", inner) * self.ffn[layer]
        return self._norm(f"{name}.output.LayerNorm", out * self.hidden + x)

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask, table = attention_mask.float(), f"{self.base}.embeddings"
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        if self.base == "roberta":  # counted over real tokens, from the padding index on
            places = attention_mask.cumsum(1) * attention_mask + 1
        x = self.state[f"{table}.word_embeddings.weight"][input_ids]
        x = x + self.state[f"{table}.position_embeddings.weight"][places]
        x = x + self.state[f"{table}.token_type_embeddings.weight"][0]
        x = self._norm(f"{table}.LayerNorm", x * self.hidden)
        for layer in range(LAYERS):
            x = self._feed_forward(layer, self._attention(layer, x, mask))
        if self.base == "roberta":
            return self._linear("classifier.out_proj", torch.tanh(self._linear("classifier.dense", x[:, 0])))
        return self._linear("classifier", torch.tanh(self._linear("bert.pooler.dense", x[:, 0])))


def cofi_logits(
    config: Mapping[str, Any], state: Mapping[str, Tensor], masks: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> Tensor:
    """What CoFi's masked model (with masks), or its cut one (without), says: [examples, 3]."""
    return _Cofi(config, state, masks).logits(**inputs)


def cofi_cut(state: Mapping[str, Tensor], masks: Mapping[str, Tensor], base: str = "bert") -> dict[str, Tensor]:
    """Weights as their code cuts them by hard masks; of a removed sublayer the norm is left as it was."""
    hidden = masks["hidden_z"].nonzero().flatten()
    heads, neurons = masks["head_z"].reshape(LAYERS, HEADS), masks["intermediate_z"].reshape(LAYERS, FFN)
    cut = {}
    for name, tensor in state.items():
        if ".embeddings." in name:
            cut[name] = tensor.index_select(tensor.dim() - 1, hidden)
        elif name in (f"{base}.pooler.dense.weight", "classifier.dense.weight"):
            cut[name] = tensor.index_select(1, hidden)
        elif ".encoder.layer." not in name:
            cut[name] = tensor
        else:
            part = _cut_part(name, tensor, hidden, heads, neurons, masks)
            cut |= {} if part is None else {name: part}
    cut["layer_transformation.weight"] = torch.eye(HIDDEN)[:, hidden]
    cut["layer_transformation.bias"] = torch.zeros(HIDDEN)
    cut[f"{base}.embeddings.position_ids"] = torch.arange(40)[None]
    return cut


def _cut_part(
    name: str, tensor: Tensor, hidden: Tensor, heads: Tensor, neurons: Tensor, masks: Mapping[str, Tensor]
) -> Tensor | None:
    layer = int(name.split(".encoder.layer.")[1].partition(".")[0])
    attention = ".attention." in name
    alive = bool(masks["head_layer_z" if attention else "mlp_z"][layer] != 0)
    if "LayerNorm" in name:
        return tensor.index_select(0, hidden) if alive else tensor
    if not alive:
        return None
    units = heads[layer].repeat_interleave(HIDDEN // HEADS) if attention else neurons[layer]
    units = units.nonzero().flatten()
    if ".output.dense" in name:
        tensor = tensor.index_select(0, hidden)
        return tensor.index_select(1, units) if tensor.dim() == 2 else tensor
    tensor = tensor.index_select(0, units)
    return tensor.index_select(1, hidden) if tensor.dim() == 2 else tensor


def masked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights times the masks that torch keeps beside them."""
    return {
        name.removesuffix("_orig"): tensor * state[f"{name.removesuffix('_orig')}_mask"]
        if name.endswith("_orig")
        else tensor
        for name, tensor in state.items()
        if not name.endswith("_mask")
    }


def grain_state(state: Mapping[str, Tensor], seed: int, *, units: str = "dims", rank: int | None = None) -> Any:
    """A state as their pruners leave it: an attention and an FFN without units, ragged heads."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) > 0.5).float()

    dims = HIDDEN // HEADS
    whole = draw(LAYERS, HEADS).repeat_interleave(dims, 1)
    values = whole if units == "heads" else draw(LAYERS, HIDDEN)
    values[1] = 0
    heads = values.reshape(LAYERS, HEADS, dims).any(-1).repeat_interleave(dims, 1)
    queries, neurons = draw(LAYERS, HIDDEN) * heads, draw(LAYERS, FFN)
    neurons[2] = 0
    out = dict(state)

    def mask(name: str, value: Tensor) -> None:
        out[f"{name}_orig"] = out.pop(name)
        out[f"{name}_mask"] = value.expand_as(out[f"{name}_orig"])

    for layer in range(LAYERS):
        path = f"bert.encoder.layer.{layer}"
        mask(f"{path}.attention.output.dense.weight", values[layer][None, :])
        mask(f"{path}.output.dense.weight", neurons[layer][None, :])
        if units == "dims":
            for part, kept in (("query", queries), ("key", queries), ("value", values)):
                mask(f"{path}.attention.self.{part}.weight", kept[layer][:, None])
                mask(f"{path}.attention.self.{part}.bias", kept[layer])
    if rank is not None:
        out["bert.embeddings.word_embeddings.weight"] = torch.randn(VOCABULARY, rank, generator=generator) * 0.2
        out["bert.embeddings.proj.weight"] = torch.randn(HIDDEN, rank, generator=generator) * 0.2
    return out


def mlpruning_state(state: Mapping[str, Tensor], seed: int, thresholds: Mapping[str, float]) -> dict[str, Tensor]:
    """A state of their first step: scores and thresholds beside the weights, shared by query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    out = dict(state)
    for layer in range(LAYERS):
        path = f"bert.encoder.layer.{layer}"
        scores, theta = torch.randn(HEADS, 1, generator=generator), torch.tensor([thresholds["head"]])
        for part in ("query", "key", "value"):
            out[f"{path}.attention.self.{part}.head_mask_scores"] = scores
            out[f"{path}.attention.self.{part}.threshold_head"] = theta
        rows = {"attention.output.dense": HIDDEN, "intermediate.dense": FFN, "output.dense": HIDDEN}
        for name, size in rows.items():
            out[f"{path}.{name}.mask_scores"] = torch.randn(size, 1, generator=generator)
            out[f"{path}.{name}.threshold_row"] = torch.tensor([thresholds[name]])
    return out


def mlpruning_masked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that their masked linears multiply by."""

    def keep(scores: Tensor, theta: Tensor) -> Tensor:
        count = math.ceil(torch.sigmoid(theta).item() * scores.numel())
        kept = torch.zeros(scores.numel())
        kept[scores.flatten().topk(count).indices] = 1
        return kept

    out = {name: tensor for name, tensor in state.items() if "mask_scores" not in name and "threshold" not in name}
    for name in list(state):
        path, _, leaf = name.rpartition(".")
        if leaf not in ("mask_scores", "head_mask_scores"):
            continue
        theta = state[f"{path}.threshold_{'head' if leaf.startswith('head') else 'row'}"]
        kept = keep(state[name], theta)
        rows = kept.repeat_interleave(len(out[f"{path}.bias"]) // len(kept))
        out[f"{path}.weight"] = out[f"{path}.weight"] * rows[:, None]
        out[f"{path}.bias"] = out[f"{path}.bias"] * rows
    return out


def mlpruning_second(first: Mapping[str, Tensor], seed: int, block: tuple[int, int], theta: float) -> Any:
    """A state of their second step on top of a first, and the dense weights that it stands for."""
    generator = torch.Generator().manual_seed(seed)

    def keep(scores: Tensor, threshold: float, side: int = 1) -> Tensor:
        count = math.ceil(torch.sigmoid(torch.tensor(threshold)).item() * scores.numel())
        kept = torch.zeros(scores.numel(), dtype=torch.bool)
        kept[scores.flatten().topk(-(-count // side) * side).indices] = True
        return kept

    state, dense = {}, {}
    plain = {n: t for n, t in first.items() if "mask_scores" not in n and "threshold" not in n}
    for name, tensor in plain.items():
        state[name] = dense[name] = torch.randn(tensor.shape, generator=generator) * 0.2
    for layer in range(LAYERS):
        path = f"bert.encoder.layer.{layer}"
        places = ("attention.output.dense", "intermediate.dense", "output.dense")
        rows = {
            place: keep(first[f"{path}.{place}.mask_scores"], float(first[f"{path}.{place}.threshold_row"]), block[0])
            for place in places
        }
        query = f"{path}.attention.self.query"
        heads = keep(first[f"{query}.head_mask_scores"], float(first[f"{query}.threshold_head"]))
        heads = heads.repeat_interleave(HIDDEN // HEADS)
        rows |= {f"attention.self.{part}": heads for part in ("query", "key", "value")}
        columns = {"attention.output.dense": heads, "output.dense": rows["intermediate.dense"]}
        for place, kept in rows.items():
            name = f"{path}.{place}"
            inside = columns.get(place, torch.ones(HIDDEN, dtype=torch.bool))
            weight = torch.randn(int(kept.sum()), int(inside.sum()), generator=generator) * 0.2
            grid = (weight.shape[0] // block[0], weight.shape[1] // block[1])
            scores = torch.randn(grid[0] * grid[1], 1, 1, generator=generator)
            on = keep(scores, theta).view(grid).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            state |= {f"{name}.weight": weight, f"{name}.bias": state[f"{name}.bias"][kept]}
            state |= {f"{name}.block_mask_scores": scores, f"{name}.threshold_block": torch.tensor([theta])}
            full = torch.zeros(len(kept), len(inside))
            full[kept.nonzero(), inside.nonzero().T] = weight * on
            dense |= {f"{name}.weight": full, f"{name}.bias": dense[f"{name}.bias"] * kept}
    return state, dense
