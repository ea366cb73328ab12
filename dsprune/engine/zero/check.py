"""What is wrong with a DeepSpeed configuration, what is to be said of it, and what of it DeepSpeed is given."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from dsprune.dtypes import PRECISIONS, Precision, torch_dtype
from dsprune.engine.zero.keys import ADAMW, ALIASES, KEYS, RATE, Honoured, Refused, Said, Section
from dsprune.engine.zero.refusals import in_words, pydantic_words
from dsprune.engine.zero.requirements import quiet_import
from dsprune.files import did_you_mean

__all__ = ["OFFLOADED", "find", "find_mistakes", "find_notes", "normal_form", "precision", "zero_stage"]

AUTO = "auto"
OFFLOADED = ("offload_optimizer", "offload_param")
"""What ZeRO can keep elsewhere than on the device."""
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
NEEDS_NVME = ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "fast_init")


def find(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """What stands at a dotted path; the default where nothing does."""
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def zero_stage(config: Mapping[str, Any]) -> int:
    """ZeRO stage of a checked configuration."""
    return int(find(config, "zero_optimization.stage", 0))


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """Dtype of the weights under a checked configuration."""
    return torch_dtype(precision(config))


def precision(config: Mapping[str, Any]) -> Precision:
    """Arithmetic that a checked configuration asks for; "auto" is off, as recipes ask for none."""
    for kind in ("fp16", "bf16"):
        if find(config, f"{kind}.enabled") is True:
            return kind  # type: ignore[return-value]
    return "fp32"


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is no section."""
    for key, value in config.items():
        path = ALIASES.get(f"{prefix}{key}", f"{prefix}{key}")
        if isinstance(KEYS.get(path), Section) and isinstance(value, Mapping):
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


# --- mistakes --------------------------------------------------------------------------------


def find_mistakes(config: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with what a file says, a line each."""
    mistakes = _key_mistakes(config)
    if not mistakes:
        mistakes = [mistake for rule in RULES for mistake in rule(config)]
    return mistakes or _words_of_deepspeed(normal_form(config))


def _key_mistakes(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    mistakes = []
    for key, value in config.items():
        path = ALIASES.get(f"{prefix}{key}", f"{prefix}{key}")
        if path != f"{prefix}{key}" and path.removeprefix(prefix) in config:
            mistakes.append(f"'{prefix}{key}' is another name of '{path}', which is there as well: leave one out")
        elif path not in KEYS:
            mistakes.append(f"unknown key '{prefix}{key}'{_suggest(key, prefix)}")
        elif isinstance(KEYS[path], Section):
            is_object = isinstance(value, Mapping)
            mistakes += _key_mistakes(value, f"{path}.") if is_object else [_not_an_object(path, value)]
        else:
            mistakes += _value_mistakes(path, value)
    return mistakes


def _suggest(key: str, prefix: str) -> str:
    known = {path.removeprefix(prefix) for path in (*KEYS, *ALIASES) if path.startswith(prefix)}
    elsewhere = [path for path in KEYS if path.rpartition(".")[2] == key]
    otherwise = f"did you mean '{elsewhere[0]}'?" if elsewhere else ""
    hint = did_you_mean(key, (name for name in known if "." not in name), otherwise=otherwise)
    return f": {hint}" if hint else ""


def _not_an_object(path: str, value: Any) -> str:
    example = f', such as {{"enabled": {json.dumps(value)}}}' if isinstance(value, bool) else ""
    example = example if f"{path}.enabled" in KEYS else ""
    return f"'{path}' is {json.dumps(value)}, which is not an object: write one{example}, or leave it out"


def _value_mistakes(path: str, value: Any) -> list[str]:
    entry = KEYS[path]
    if isinstance(entry, Refused):
        return [] if is_harmless(entry, value) else [f"'{path}': {entry.why}"]
    assert isinstance(entry, Honoured | Said)
    if (value == AUTO and isinstance(entry, Honoured) and entry.auto) or entry.kind.fits(value):
        return []
    if value == AUTO:
        return [f"'{path}' is \"auto\", which nothing fills in: give {entry.kind.described}, or leave it out"]
    return [f"'{path}' is {json.dumps(value)}: give {entry.kind.described}"]


def is_harmless(entry: Refused, value: Any) -> bool:
    """Whether a refused key asks for nothing."""
    # In Python, true equals 1.
    return any(isinstance(value, bool) == isinstance(asks, bool) and value == asks for asks in entry.harmless)


def _both_precisions(config: Mapping[str, Any]) -> Iterator[str]:
    enabled = [kind for kind in ("bf16", "bfloat16", "fp16") if find(config, f"{kind}.enabled") is True]
    if len(enabled) > 1:
        yield f"{' and '.join(enabled)} are both enabled: choose one"


def _offloading(config: Mapping[str, Any]) -> Iterator[str]:
    stage = zero_stage(config)
    for part, least in zip(OFFLOADED, (1, 3), strict=True):
        device = find(config, f"zero_optimization.{part}.device", "none")
        # DeepSpeed passes over it below its stage, and takes "nvme" for "cpu" below stage 3.
        least = 3 if device == "nvme" else least
        if device != "none" and stage < least:
            yield (
                f"'zero_optimization.{part}.device' is \"{device}\", which works at ZeRO stage "
                f"{'3' if least == 3 else '1, 2 or 3'} and not at {stage}: take another stage, or leave it out"
            )


def _dtypes(config: Mapping[str, Any]) -> Iterator[str]:
    computed = precision(_renamed(config))
    kinds = {key: PRECISIONS[value.lower()] for key, value in config.get("data_types", {}).items() if _is_dtype(value)}
    if kinds.get("param_dtype", computed) != computed:
        yield (
            f"'data_types.param_dtype' is {kinds['param_dtype']} and the weights are {computed}: enable bf16 or fp16, "
            "or leave it out"
        )
    accumulated = kinds.get("grad_accum_dtype", computed)
    if accumulated not in (computed, "fp32"):
        yield f"'data_types.grad_accum_dtype' is {accumulated} and the weights are {computed}: write {computed} or fp32"
    if computed == "fp32" and {"buffer_dtype", "keep_in_fp32_modules"} & {*config.get("data_types", {})}:
        yield "'data_types': buffer_dtype and keep_in_fp32_modules are read in bf16 and fp16 alone: leave them out"


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in PRECISIONS


def _immediate(config: Mapping[str, Any]) -> Iterator[str]:
    if find(_renamed(config), "bf16.immediate_grad_update") is True:
        accumulated = find(config, "data_types.grad_accum_dtype", "")
        if zero_stage(config) != 1 or PRECISIONS.get(accumulated.lower()) != "fp32":
            yield (
                "'bf16.immediate_grad_update' is read at ZeRO stage 1 with data_types.grad_accum_dtype = \"fp32\" "
                "alone: leave it out"
            )


def _blocks(config: Mapping[str, Any]) -> Iterator[str]:
    """Without parameters DeepSpeed would take rates of its own."""
    for name, why in (("optimizer", ADAMW), ("scheduler", RATE)):
        if name in config and not find(config, f"{name}.params"):
            yield f"'{name}' has no params: write \"auto\" for each, or leave {name} out ({why})"


def _logs(config: Mapping[str, Any]) -> Iterator[str]:
    if find(config, "comms_logger.enabled") is True:
        shown = find(config, "comms_logger.verbose") is True and config.get("log_level") in ("debug", "info")
        if not shown:
            yield (
                "'comms_logger': DeepSpeed shows what it counts where verbose is true and log_level is \"info\": write "
                "both, or leave it out"
            )
    wanted = find(config, "tensorboard.enabled") is True
    if wanted and importlib.util.find_spec("tensorboard") is None:
        yield "'tensorboard': the package is not installed: pip install tensorboard, or leave it out"


RULES: tuple[Callable[[Mapping[str, Any]], Iterator[str]], ...] = (
    _both_precisions,
    _offloading,
    _dtypes,
    _immediate,
    _blocks,
    _logs,
)
"""What keys must not say together."""


def _words_of_deepspeed(config: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed's own reading of the values finds, section by section, then of all together."""
    quiet_import()
    from deepspeed.runtime.config import DeepSpeedConfig

    plain = {key: value for key, value in without_auto(config).items() if key not in BATCH_KEYS}
    mistakes: list[str] = []
    by_section: list[tuple[str, dict[str, Any]]] = [(key, {key: value}) for key, value in plain.items()]
    for section, content in (*by_section, ("", plain)):
        if mistakes and not section:
            break  # of all together, for what no section says alone
        try:
            DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **content})
        except Exception as error:  # whatever its parsers raise is about these values
            told = f"'{section}': " if section else ""
            mistakes += pydantic_words(error, section) or [f"{told}DeepSpeed refuses it: {in_words(error)}"]
    return list(dict.fromkeys(mistakes))


def without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that are still "auto"."""
    return {
        key: without_auto(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value != AUTO or key == "keep_in_fp32_modules"
    }


# --- what DeepSpeed is given -----------------------------------------------------------------


def _renamed(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The same under first names."""
    renamed = {}
    for key, value in config.items():
        path = ALIASES.get(f"{prefix}{key}", f"{prefix}{key}")
        renamed[path.removeprefix(prefix)] = _renamed(value, f"{path}.") if isinstance(value, Mapping) else value
    return renamed


def normal_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a file DeepSpeed is given: under first names, without what the recipe decides or nobody reads.

    "auto" is left for the batch, the clipping and what depends on the width of the model.
    """
    kept = _kept(_renamed(config))
    for kind in ("bf16", "fp16"):
        if find(kept, f"{kind}.enabled") == AUTO:
            kept[kind]["enabled"] = False  # recipes ask for no precision, as a Trainer's arguments do not by default
    if kept.get("steps_per_print") == AUTO:
        del kept["steps_per_print"]
    if find(kept, "comms_logger.enabled") is not True:
        kept.pop("comms_logger", None)  # DeepSpeed counts wherever the section is there
    for block in ("optimizer", "scheduler"):
        kept.pop(block, None)
    return kept


def _kept(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        entry = KEYS.get(path)
        if isinstance(entry, Said | Refused):
            continue
        kept[key] = _kept(value, f"{path}.") if isinstance(entry, Section) and isinstance(value, Mapping) else value
    return kept


# --- notes -----------------------------------------------------------------------------------


def find_notes(config: Mapping[str, Any], *, teacher: bool) -> list[str]:
    """What is to be said of a file without mistakes: keys that have nothing to decide.

    Args:
        config: as the file has it.
        teacher: it is for an engine that only runs forward.
    """
    given = dict(leaves(config))
    entries = {path: KEYS[path] for path in given}
    stage = zero_stage(config)
    notes = [f"{path}: {entry.why}" for path, entry in entries.items() if isinstance(entry, Said)]
    honoured = {path: entry for path, entry in entries.items() if isinstance(entry, Honoured)}
    idle = [path for path, entry in honoured.items() if teacher and entry.training and given[path] != AUTO]
    if idle:
        notes.append(f"a teacher has no gradients, optimizer or checkpoints: not used are {', '.join(idle)}")
    elsewhere = [path for path, entry in honoured.items() if stage not in entry.stages and path not in idle]
    elsewhere += [path for path in honoured if path not in elsewhere and path not in idle and _lacks_nvme(path, config)]
    if elsewhere:
        notes.append(f"not used at ZeRO stage {stage} with this offloading: {', '.join(elsewhere)}")
    for path in ("dump_state", "steps_per_print"):
        asked = given.get(path) not in (None, False, AUTO)
        if asked and path not in idle and config.get("log_level") not in ("debug", "info"):
            notes.append(f'{path}: DeepSpeed prints it where log_level is "info"')
    return notes


def _lacks_nvme(path: str, config: Mapping[str, Any]) -> bool:
    """Whether a key is about NVMe, and nothing is offloaded to it."""
    section, _, key = path.rpartition(".")
    if section == "aio":
        return all(find(config, f"zero_optimization.{part}.device") != "nvme" for part in OFFLOADED)
    return key in NEEDS_NVME and find(config, f"{section}.device") != "nvme"
