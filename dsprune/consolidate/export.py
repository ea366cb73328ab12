"""Consolidation: a committed checkpoint in, a Hugging Face folder out, in memory that a single tensor bounds."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dsprune.arch import family_for
from dsprune.consolidate import verify
from dsprune.consolidate.allocator import give_back
from dsprune.consolidate.compact import (
    BLOCK_PARTS,
    HEAD_MULTIPLE,
    block_config,
    compact_config,
    surviving,
    without_weights,
)
from dsprune.consolidate.manifest import check_files, find_checkpoint, read_manifest
from dsprune.consolidate.shards import ShardedTensors, open_shards
from dsprune.consolidate.side_files import read_table, write_side_files
from dsprune.consolidate.tied_heads import own_head_keys
from dsprune.consolidate.writer import SafetensorsStream
from dsprune.dtypes import DTYPES, torch_dtype
from dsprune.errors import CheckpointError, ConfigError, OutputError
from dsprune.run_folder import DESCRIPTION, SELECTION, VERIFICATION, StageName
from dsprune.structure import (
    BlockGating,
    BlockSelection,
    CostModel,
    Selection,
    Structure,
    analyze,
    analyze_blocks,
    attach_gates,
    compact_shape,
    cut,
    gate_shapes,
    to_blocks,
)

__all__ = ["ConsolidationReport", "consolidate", "open_checkpoint"]

logger = logging.getLogger(__name__)
INDICES = tuple(f".{part}" for part in BLOCK_PARTS[1:])
"""Tensors of block-sparse linears that say where blocks are; int32 whatever the weights are."""
PREFIX = "model."
"""What the engine puts before the model's own parameter names; other parameters serve distillation only."""


@dataclass(frozen=True)
class ConsolidationReport:
    """What was written.

    Attributes:
        out: the folder.
        parameters: counted in the written files.
        dense_parameters: of the dense model.
        encoder_sparsity: share of the encoder's parameters that is gone.
        total_sparsity: share of all parameters that is gone.
        difference: largest difference between masked and compact logits; None where nothing was cut.
        stock: whether a stock class loads it.
        seconds: wall time.
    """

    out: Path
    parameters: int
    dense_parameters: int
    encoder_sparsity: float
    total_sparsity: float
    difference: float | None
    stock: bool
    seconds: float

    def render(self) -> str:
        """A few lines for people."""
        how = "a stock class" if self.stock else "trust_remote_code=True, or `import dsprune` first"
        lines = [
            f"wrote {self.out} in {self.seconds:.1f} s; loads with {how}",
            f"parameters: {self.parameters:,} of {self.dense_parameters:,} "
            f"(sparsity: encoder {self.encoder_sparsity:.2%}, total {self.total_sparsity:.2%})",
        ]
        if self.difference is not None:
            lines.append(f"verified: masked and compact logits differ by at most {self.difference:.1e}")
        return "\n".join(lines)


def open_checkpoint(checkpoint: str | Path) -> ShardedTensors:
    """The weights of a committed checkpoint, read lazily; names as the engine has them."""
    return open_shards(Path(checkpoint) / "student")


def consolidate(
    source: str | Path,
    out: str | Path,
    *,
    stage: StageName = "prune",
    dtype: str = "float32",
    force: bool = False,
    verify_hashes: bool = True,
    head_multiple: int = HEAD_MULTIPLE,
    progress: bool = False,
) -> ConsolidationReport:
    """Turn a checkpoint into a model folder: fold, slice, stream, verify, rename.

    Args:
        source: a run folder or one checkpoint of it.
        out: folder to write.
        stage: of a run folder.
        dtype: of the written weights: float32, bfloat16 or float16.
        force: replace what is in `out`.
        verify_hashes: check the hash of every file that is read, not only its size.
        head_multiple: heads of unequal size are padded, when they run, to a multiple of this.
        progress: show a progress bar.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or of another model, or the result is
            not equal to what was trained.
        OutputError: `out` holds something, or cannot be written.
        ConfigError: unknown dtype, or a multiple below 1.
    """
    began = time.perf_counter()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}': there are {', '.join(DTYPES)}")
    if head_multiple < 1:
        raise ConfigError(f"heads cannot be padded to a multiple of {head_multiple}: give 1 or more")
    checkpoint = find_checkpoint(source, stage)
    manifest = read_manifest(checkpoint)
    check_files(checkpoint, manifest, hashes=verify_hashes)
    with _written_aside(Path(out), force=force) as scratch:
        export = _Export(checkpoint, manifest, scratch, torch_dtype(dtype), progress, head_multiple)
        difference = export.run()
    facts = export.facts["parameters"]
    return ConsolidationReport(
        out=Path(out),
        parameters=facts["total"],
        dense_parameters=facts["dense_total"],
        encoder_sparsity=1 - facts["encoder"] / facts["dense_encoder"],
        total_sparsity=1 - facts["total"] / facts["dense_total"],
        difference=difference,
        stock="auto_map" not in export.config,
        seconds=time.perf_counter() - began,
    )


def _sweep(out: Path) -> None:
    """Put right what an export that was killed left beside `out`: half a folder, or `out` between two renames."""
    for path in out.parent.glob(f".{out.name}.*-*"):
        kind, _, pid = path.name.removeprefix(f".{out.name}.").partition("-")
        if kind not in ("tmp", "old") or not pid.isdigit() or Path(f"/proc/{pid}").exists():
            continue
        if kind == "old" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path)


@contextmanager
def _written_aside(out: Path, *, force: bool) -> Iterator[Path]:
    """A sibling folder to write into, renamed to `out` at the end and removed on failure."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: choose another folder")
    if out.exists() and any(out.iterdir()) and not force:
        raise OutputError(f"{out} is not empty: choose another folder, or use --force")
    scratch = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        scratch.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write to {out.parent}: {error.strerror}") from error
    try:
        yield scratch
        if out.exists():
            retired = out.with_name(f".{out.name}.old-{os.getpid()}")
            out.rename(retired)
            scratch.rename(out)
            shutil.rmtree(retired)
        else:
            scratch.rename(out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _block_names(name: str, sparse: Mapping[str, Tensor]) -> list[str]:
    """What a parameter is written as: itself, or the parts of a block-sparse weight."""
    if name not in sparse:
        return [name]
    path = name.removesuffix(".weight")
    return [f"{path}.{part}" for part in BLOCK_PARTS]


class _Export:
    """One consolidation; holds paths and shapes, never weights."""

    def __init__(
        self,
        checkpoint: Path,
        manifest: dict[str, Any],
        scratch: Path,
        dtype: torch.dtype,
        progress: bool,
        head_multiple: int,
    ) -> None:
        self.checkpoint = checkpoint
        self.manifest = manifest
        self.scratch = scratch
        self.dtype = dtype
        self.progress = progress
        self.head_multiple = head_multiple
        self.weights = open_checkpoint(checkpoint)
        self.trained = read_table(checkpoint / DESCRIPTION / "config.json")
        self.model = self._build()
        if self._has_own_head():
            self.trained |= own_head_keys(self.trained["model_type"])
            self.model = self._build()
        # Asked now: a model whose weights are streamed through it ties none any more.
        self.outputs = self._said_of_outputs()
        self._check_names()

    def _build(self) -> Any:
        try:
            return without_weights(self.trained)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.checkpoint / DESCRIPTION}/config.json does not describe a model: {error}"
            ) from error

    def _has_own_head(self) -> bool:
        """Whether a weight that the configuration takes for another one was trained apart: what is live is right."""
        stored = {param: PREFIX + name for name, param in self.model.named_parameters()}
        for name, param in self.model.named_parameters(remove_duplicate=False):
            ours, first = PREFIX + name, stored[param]
            if ours in self.weights and first in self.weights and not self.weights.same(ours, first):
                return True
        return False

    def _said_of_outputs(self) -> dict[str, Any]:
        """What is said of a head with weights of its own, even where it is what the class takes for granted."""
        family = family_for(self.trained["model_type"].removeprefix("dsprune_"))
        own = self.model.get_output_embeddings() is not None and not verify.tied_names(self.model)
        return {"tie_word_embeddings": False} if own and family.scaled_head is None else {}

    def _read(self, name: str) -> Tensor:
        return self.weights.read(f"{PREFIX}{name}")

    def _check_names(self) -> None:
        """See that the shards hold this model and no other."""
        tied = verify.tied_names(self.model)
        ours = {name: tuple(param.shape) for name, param in self.model.named_parameters()}
        theirs = {
            name.removeprefix(PREFIX): self.weights.shape(name)
            for name in self.weights.names()
            if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in tied
        }
        wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if wrong:
            raise CheckpointError(
                f"{self.checkpoint} holds the weights of another model than its config.json: {wrong[0]} is "
                f"{theirs.get(wrong[0], 'missing')} there and {ours.get(wrong[0], 'missing')} here"
            )

    def run(self) -> float | None:
        """Write everything; returns the largest difference of logits, or None where nothing was cut."""
        selection = self.checkpoint / SELECTION
        difference: float | None
        if selection.exists() and BlockSelection.is_at(selection):
            difference = self._run_blocks(BlockSelection.load(selection))
        elif selection.exists():
            difference = self._run_cut(Selection.load(selection))
        else:
            difference = None
            self._run_plain()
        self._verify_trained()
        config = {**self.config, **self.outputs, "dtype": str(self.dtype).removeprefix("torch.")}
        write_side_files(self.checkpoint, self.scratch, config)
        return difference

    # --- weights ----------------------------------------------------------------------------

    def _write(self, tensors: Iterator[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]]) -> None:
        indices = {name: torch.int32 for name in shapes if name.endswith(INDICES)}
        with SafetensorsStream(self.scratch, shapes, self.dtype, dtypes=indices) as stream:
            for name, tensor in self._bar(tensors, len(shapes)):
                tensor = tensor.to(indices.get(name, self.dtype))
                if not bool(tensor.isfinite().all()):
                    raise CheckpointError(
                        f"{self.checkpoint}: '{name}' holds values that are not finite in {self.dtype}"
                    )
                stream.write(name, tensor)
                del tensor
                give_back()

    def _bar(self, items: Iterator[tuple[str, Tensor]], total: int) -> Iterator[tuple[str, Tensor]]:
        if not self.progress:
            return items
        from tqdm import tqdm

        return iter(tqdm(items, total=total, desc="consolidate", unit="tensor"))

    def _run_cut(self, selection: Selection) -> float:
        structure = analyze(self.model)
        self._check_selection(structure, selection)
        self.config = compact_config(
            self.trained,
            structure,
            selection,
            method=self.manifest.get("method"),
            head_multiple=self.head_multiple,
        )
        self.facts = self.config["dsprune"]
        params = dict(surviving(structure, selection))
        shapes = {name: compact_shape(param, selection) for name, param in params.items()}
        self._check_count(structure, selection, shapes)
        self._write(((name, cut(p, self._read(p.name), selection)) for name, p in params.items()), shapes)
        return self._verify_cut(structure, selection)

    def _check_selection(self, structure: Structure, selection: Selection) -> None:
        ours = gate_shapes(structure.sizes)
        theirs = {kind: tuple(gate.shape) for kind, gate in selection.gates.items()}
        # A selection from before poolers had gates lacks those.
        wrong = [kind for kind, shape in ours.items() if theirs.get(kind, shape) != shape]
        if wrong:
            raise CheckpointError(
                f"{self.checkpoint} holds the selection of another model: gate '{wrong[0]}' has shape "
                f"{theirs[wrong[0]]} and the model needs {ours[wrong[0]]}"
            )

    def _check_count(self, structure: Structure, selection: Selection, shapes: dict[str, tuple[int, ...]]) -> None:
        counted = int(CostModel(structure, empty=selection.empty).parameters(selection.hard(), of="total"))
        written = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
        assert counted == written, f"counted {counted} parameters, about to write {written}"

    def _run_blocks(self, selection: BlockSelection) -> float:
        structure = analyze_blocks(self.model, selection.block)
        shapes = structure.gate_shapes
        wrong = [
            path for path in shapes.keys() | selection.masks.keys() if path not in shapes or path not in selection.masks
        ]
        if wrong:
            raise CheckpointError(f"{self.checkpoint} holds the blocks of another model: {wrong[0]} is not in both")
        self.config = block_config(self.trained, structure, selection)
        self.facts = self.config["dsprune"]
        compact = without_weights(self.config)
        written = sum(param.numel() for param in compact.parameters())
        assert self.facts["parameters"]["total"] == written, (
            f"counted otherwise than {written}, the parameters to write"
        )
        sparse = {f"{path}.weight": mask for path, mask in selection.masks.items() if not mask.all()}
        names = {name: tuple(tensor.shape) for name, tensor in compact.state_dict().items()}
        order = [new for name, _ in self.model.named_parameters() for new in _block_names(name, sparse)]
        self._write(self._block_tensors(sparse, selection.block), {name: names[name] for name in order})
        gating = BlockGating(self.model, structure)
        gating.set(selection.masks)
        return self._verify(lambda logits: logits)

    def _block_tensors(self, sparse: dict[str, Tensor], block: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
        for name, _ in self.model.named_parameters():
            tensor = self._read(name)
            if name in sparse:
                yield from zip(_block_names(name, sparse), to_blocks(tensor, sparse[name], block), strict=True)
            else:
                yield name, tensor

    def _run_plain(self) -> None:
        self.config = dict(self.trained)
        self.facts = self.config.get("dsprune") or self._dense_facts()
        names = [name for name, _ in self.model.named_parameters()]
        shapes = {name: self.weights.shape(f"{PREFIX}{name}") for name in names}
        self._write(((name, self._read(name)) for name in names), shapes)
        self._verify(lambda logits: logits)

    def _dense_facts(self) -> dict[str, Any]:
        cost = CostModel(analyze(self.model))
        counts = {part: cost.dense(part) for part in ("encoder", "total")}  # type: ignore[arg-type]
        return {"parameters": {**counts, **{f"dense_{part}": count for part, count in counts.items()}}}

    # --- verification -----------------------------------------------------------------------

    def _batch(self) -> dict[str, Tensor]:
        path = self.checkpoint / VERIFICATION
        if not path.exists():
            raise CheckpointError(f"{path} is missing: nothing to verify the logits on")
        try:
            return load_file(str(path))
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def _written_logits(self, batch: dict[str, Tensor]) -> Tensor:
        model = without_weights(self.config)
        reader = verify.SafetensorsReader(self.scratch)
        missing = (model.state_dict().keys() - verify.tied_names(model)) ^ reader.names()
        if missing:
            raise CheckpointError(f"written and expected parameters differ: {', '.join(sorted(missing)[:3])}")
        for name in [name for name, _ in model.named_buffers() if name in reader.names()]:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, reader(name))
        verify.stream_weights(model, reader)
        return verify.logits(model, batch)

    def _verify_cut(self, structure: Structure, selection: Selection) -> float:
        """Masked dense model against the compact one that was written, both in fp32."""
        gating = attach_gates(self.model, structure, empty=selection.empty)
        gating.set(selection.gates)
        hidden = selection.kept(structure.hidden)
        # A bare encoder hands out the residual stream itself.
        return self._verify(lambda masked: masked if structure.has_head else masked[..., hidden])

    def _verify(self, kept: Callable[[Tensor], Tensor]) -> float:
        """The gated model against the written one; `kept` picks what of the first the second still has."""
        batch = self._batch()
        verify.stream_weights(self.model, self._read)
        masked = kept(verify.logits(self.model, batch))
        written = self._written_logits(batch)
        exact = self.dtype is torch.float32
        difference = verify.compare(
            written, masked, "masked and compact model", tolerance=verify.TOLERANCE if exact else None
        )
        if not exact:
            logger.warning("written in %s: logits differ from fp32 by up to %.1e", self.dtype, difference)
        return difference

    def _verify_trained(self) -> None:
        """What was written against what the live engine said, which owes nothing to the files of the checkpoint."""
        trained = verify.recorded(self.checkpoint)
        if trained is None:
            logger.warning("%s does not say what its model answered: compared with its weights alone", self.checkpoint)
            return
        written = verify.sample(self._written_logits(verify.shortened(self._batch())))
        exact = self.dtype is torch.float32 and self.manifest.get("precision", "fp32") == "fp32"
        verify.compare_trained(written, trained, "fp32" if exact else "half")
