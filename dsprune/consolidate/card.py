"""The model card that lies in every compact folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["render_card"]


def _metrics(figures: Mapping[str, Any]) -> list[str]:
    measured: Mapping[str, float] = figures.get("metric") or {}
    dense: Mapping[str, float] = figures.get("dense") or {}
    if not measured:
        return []
    lines = ["", "| metric (evaluation split) | dense | this model |", "| --- | --- | --- |"]
    for name, value in measured.items():
        before = f"{dense[name]:.4f}" if name in dense else "-"
        lines.append(f"| {name} | {before} | {value:.4f} |")
    lines += [f"\nNote: {note}" for note in figures.get("notes", [])]
    if figures.get("stage") == "prune":
        lines += [
            "",
            "Measured on the masked model just before export, whose gates may differ slightly from the final ones.",
        ]
    return lines


def _layers(facts: Mapping[str, Any]) -> list[str]:
    dense = facts["dense"]
    heads = dense.get("num_groups", dense["num_heads"])
    lines = ["", "| layer | heads | FFN size |", "| --- | --- | --- |"]
    lines += [
        f"| {layer['source']} | {layer['heads']} / {heads} | {layer['ffn_dim']} / {dense['ffn_dim']} |"
        for layer in facts["layers"]
    ]
    lines += ["", f"Hidden size {facts['hidden']} of {dense['hidden']}. Layers that are not listed are gone."]
    return lines


def _loading(config: Mapping[str, Any], tokenizer: str | None) -> list[str]:
    remote = "auto_map" in config
    auto = [name for name in config.get("auto_map", {}) if name.startswith("AutoModelFor")]
    cls = auto[0] if auto else "AutoModel" if remote else config["architectures"][0]
    code = ["```python", f"from transformers import {', '.join(filter(None, (cls, tokenizer)))}", ""]
    if remote:
        code += ["# dsprune need not be installed; with `import dsprune` first, trust_remote_code is not needed."]
    flag = ", trust_remote_code=True" if remote else ""
    code.append(f'model = {cls}.from_pretrained("THIS_FOLDER"{flag})')
    if tokenizer is not None:
        # AutoTokenizer reads the model's configuration first, and without the flag asks whether to run its code.
        code.append(f'tokenizer = {tokenizer}.from_pretrained("THIS_FOLDER")')
    return ["", "## Loading", "", *code, "```"]


def _making(figures: Mapping[str, Any], method: str | None) -> str:
    version = figures.get("dsprune", "")
    if figures.get("imported"):
        return (
            f"A compact model, pruned by the code of the authors of `{method}`, cut and written by dsprune {version}."
        )
    return f"A compact model, made by structured pruning with dsprune {version} (method `{method}`)."


def _speedup(facts: Mapping[str, Any], counted: str) -> str:
    return (
        f"Asked for: {facts['asked']:g} times the dense model's speed, in {counted}; predicted "
        f"{facts['predicted']:.2f}, measured before export {facts['measured']:.2f}."
    )


def render_card(config: Mapping[str, Any], figures: Mapping[str, Any], *, tokenizer: str | None = None) -> str:
    """README.md of a compact model folder.

    Args:
        config: its config.json.
        figures: what the run measured; may be empty.
        tokenizer: class of its tokenizer, if there is one: it needs no code from the folder.
    """
    facts = config["dsprune"]
    counted = facts["parameters"]
    base, task = figures.get("base_model", "a dense model"), figures.get("task", "its task")
    lines = [
        "---",
        "library_name: transformers",
        "tags: [dsprune, pruning]",
        "---",
        "",
        f"# {base}, pruned for {task}",
        "",
        _making(figures, facts.get("method")),
        "",
        "| parameters | dense | this model | removed |",
        "| --- | --- | --- | --- |",
    ]
    for part in ("encoder", "total"):
        ours, dense = counted[part], counted[f"dense_{part}"]
        lines.append(f"| {part} | {dense:,} | {ours:,} | {1 - ours / dense:.2%} |")
    if "speedup" in figures:
        lines += ["", _speedup(figures["speedup"], figures["counted"])]
    elif "target" in figures:
        lines += ["", f"Asked for: {figures['target']:.1%} of {figures['counted']} removed."]
    return "\n".join([*lines, *_metrics(figures), *_layers(facts), *_loading(config, tokenizer), ""])
