"""From a foreign model to a compact folder, through the export that a run's own checkpoints go through."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

import dsprune
from dsprune.consolidate import FORMAT, ConsolidationReport, consolidate, render_manifest, without_weights
from dsprune.errors import ConfigError
from dsprune.files import first_line
from dsprune.migrate.cofi import read_cofi
from dsprune.migrate.dense import Dense, dense_model
from dsprune.migrate.foreign import Foreign, open_foreign
from dsprune.migrate.grain import embedding_rank, read_grain
from dsprune.migrate.mlpruning import read_blocks, read_mlpruning
from dsprune.run_folder import DESCRIPTION, FIGURES, MANIFEST, SELECTION, VERIFICATION
from dsprune.structure import BlockSelection, Selection

__all__ = ["METHODS", "Origin", "adopt"]

logger = logging.getLogger(__name__)
Reader = Callable[[Foreign, Dense], tuple[dict[str, Tensor], Selection]]
METHODS: Mapping[str, Reader] = {"cofi": read_cofi, "grain": read_grain, "mlpruning": read_mlpruning}
"""What reads the models of each method's authors."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
BATCH = (4, 16)
"""Examples and tokens that the masked and the compact model are compared on."""


@dataclass(frozen=True)
class Origin:
    """Where a foreign model is.

    Attributes:
        source: its folder, or its file of weights.
        config: config.json, where it is not in the folder.
        tokenizer: folder or hub id of its tokenizer; by default the model's folder, if there is one in it.
        labels: class names in the order of its outputs; by default those of its configuration.
        first_step: for MLPruning's second step, the folder of the first.
        block: then, rows and columns of a block.
    """

    source: str
    config: str | None = None
    tokenizer: str | None = None
    labels: tuple[str, ...] = ()
    first_step: str | None = None
    block: tuple[int, int] | None = None


def adopt(
    method: str,
    origin: Origin,
    out: str | Path,
    *,
    dtype: str = "float32",
    force: bool = False,
    head_multiple: int = 8,
    progress: bool = False,
) -> ConsolidationReport:
    """Make a compact folder of a model that the authors' own code pruned.

    Scales of masks are folded into the weights, what they remove is cut away, and the logits of the masked and of the
    written model are compared before anything has its final name.

    Args:
        method: key of `METHODS`.
        origin: where the model is.
        out: folder to write.
        dtype: of the written weights: float32, bfloat16 or float16.
        force: replace what is in `out`.
        head_multiple: heads of unequal size are padded, when they run, to a multiple of this.
        progress: show a progress bar.

    Raises:
        ConfigError: nothing there to read, or wrong options.
        ArchitectureError: a model that dsprune does not know.
        CheckpointError: damaged or unsafe files, masks that do not fit, or a result that differs.
        OutputError: `out` holds something, or cannot be written.
    """
    _check(method, origin)
    foreign = open_foreign(origin.source, origin.config)
    first = open_foreign(origin.first_step) if origin.first_step is not None else foreign
    rank = embedding_rank(foreign) if method == "grain" else None
    dense = dense_model(first, labels=origin.labels, embedding_rank=rank)
    tokenizer = _tokenizer(foreign, dense, origin.tokenizer)
    side = origin.block[0] if origin.block is not None else 1
    state, selection = read_mlpruning(first, dense, side=side) if side > 1 else METHODS[method](first, dense)
    options: dict[str, Any] = {"dtype": dtype, "force": force, "head_multiple": head_multiple}
    with tempfile.TemporaryDirectory(prefix="dsprune-import-") as scratch:
        step = Path(scratch)
        checkpoint = _checkpoint(step / "step-00000000", dense.config, state, selection, foreign, method, tokenizer)
        if origin.block is not None:
            consolidate(checkpoint, step / "first", verify_hashes=False, head_multiple=head_multiple)
            config = json.loads((step / "first" / "config.json").read_text(encoding="utf-8"))
            state, blocks = read_blocks(foreign, without_weights(config), origin.block)
            checkpoint = _checkpoint(step / "step-00000001", config, state, blocks, foreign, method, tokenizer)
        return consolidate(checkpoint, out, verify_hashes=False, progress=progress, **options)


def _check(method: str, origin: Origin) -> None:
    if method not in METHODS:
        raise ConfigError(f"no import from '{method}': there are {', '.join(METHODS)}")
    if (origin.first_step is None) != (origin.block is None):
        raise ConfigError("--first-step and --block belong together: both say what the second step began with")
    if origin.block is not None and method != "mlpruning":
        raise ConfigError(f"--first-step and --block: of MLPruning alone; '{method}' has one step")
    if origin.block is not None and min(origin.block) < 2:
        raise ConfigError(f"--block {origin.block[0]}x{origin.block[1]}: give at least 2x2")


def _tokenizer(foreign: Foreign, dense: Dense, source: str | None) -> PreTrainedTokenizerBase | None:
    """Of the model; None where none is given and none lies beside the weights."""
    if source is None and not any((foreign.folder / name).is_file() for name in TOKENIZER_FILES):
        logger.warning(
            "there is no tokenizer in %s, and none will be in the result: --tokenizer names one", foreign.folder
        )
        return None
    config = AutoConfig.for_model(**dense.config)
    try:
        # With the configuration in hand, theirs is not read, whose model type may be unknown here.
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source or str(foreign.folder), config=config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer in '{source or foreign.folder}': {first_line(error)}") from error
    return found


def _checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    selection: Selection | BlockSelection,
    foreign: Foreign,
    method: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Path:
    """What a stage-0 engine would have saved: weights, configuration, selection, and a batch to compare on."""
    (folder / "student").mkdir(parents=True)
    module = {f"model.{name}": tensor for name, tensor in state.items()}
    states: dict[str, Any] = {"module": module, "buffer_names": [], "optimizer": {"state": {}}, "param_shapes": None}
    torch.save(states, folder / "student" / "mp_rank_00_model_states.pt")
    (folder / DESCRIPTION).mkdir()
    (folder / DESCRIPTION / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / DESCRIPTION)
    selection.save(folder / SELECTION)
    save_file(_batch(config), folder / VERIFICATION)
    _write_facts(folder, foreign, method)
    return folder


def _batch(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Random tokens, the second half of the examples padded; the same in every import."""
    size, length = BATCH
    generator = torch.Generator().manual_seed(0)
    padding = int(config.get("pad_token_id") or 0)
    ids = torch.randint(int(config["vocab_size"]), (size, length), generator=generator)
    # Some families tell padding by the token.
    ids[ids == padding] = (padding + 1) % int(config["vocab_size"])
    mask = torch.ones_like(ids)
    mask[size // 2 :, length // 2 :] = 0
    return {"input_ids": ids.where(mask == 1, padding), "attention_mask": mask}


def _write_facts(checkpoint: Path, foreign: Foreign, method: str) -> None:
    """What the model card says, and the manifest, which comes last."""
    figures = {
        "dsprune": dsprune.__version__,
        "imported": True,
        "base_model": foreign.folder.resolve().name,
        "task": foreign.config.get("finetuning_task") or "its task",
    }
    (checkpoint / FIGURES).write_text(json.dumps(figures), encoding="utf-8")
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": ""}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    facts = {"format": FORMAT, "stage": "import", "step": 0, "method": method, "files": files}
    (checkpoint / MANIFEST).write_text(render_manifest(facts), encoding="utf-8")
