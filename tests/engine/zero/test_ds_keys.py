"""The table of DeepSpeed's keys is whole, and every key in it is honoured, said, or refused in one line."""

import json

import pytest

from dsprune.engine.zero.config import check_ds_config
from dsprune.engine.zero.keys import ALIASES, KEYS, Honoured, Refused, Said, Section, refusal
from dsprune.errors import ConfigError
from tests.engine.zero.ds_schema import keys_of_an_engine, known_keys
from tests.helpers.world import run_world

PATHS = {kind: [path for path, entry in KEYS.items() if isinstance(entry, kind)] for kind in (Honoured, Said, Refused)}
SECTIONS = [path for path, entry in KEYS.items() if isinstance(entry, Section)]
ODD = "an odd value"


def _first_name(path):
    """A path with its section, or itself, under the first name."""
    for alias, name in ALIASES.items():
        if path == alias or path.startswith(f"{alias}."):
            return name + path.removeprefix(alias)
    return path


def _missing(known):
    return sorted(path for path in map(_first_name, known) if path not in KEYS and refusal(path) is None)


def _at(path, value):
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def _mistakes(content):
    with pytest.raises(ConfigError) as caught:
        check_ds_config(content, "ds.json")
    return caught.value.mistakes


def test_every_key_that_deepspeed_reads_is_in_the_table():
    known = known_keys()
    assert _missing(known) == []
    # What is asked of DeepSpeed must be of some use: these are from models, models in models, parsers and lists.
    assert {
        "zero_optimization.offload_optimizer.pipeline_read",
        "zero_optimization.stage3_max_live_parameters",
        "timers.throughput.enabled",
        "checkpoint.writer.io_buffer_size",
        "flops_profiler.top_modules",
        "aio.queue_depth",
        "torch_autocast.dtype",
        "data_efficiency.data_routing.random_ltd.enabled",
        "amp",
    } <= known


@pytest.mark.dist
def test_every_key_that_a_starting_engine_reads_is_in_the_table():
    found = run_world(keys_of_an_engine, 1)[0]
    assert "sequence_parallel_size" in found
    assert _missing(found) == []


def test_a_key_that_a_new_release_brings_is_found(monkeypatch):
    from deepspeed.runtime import config

    read = config.get_dump_state
    monkeypatch.setattr(config, "get_dump_state", lambda keys: keys.get("brand_new") or read(keys))
    assert _missing(known_keys()) == ["brand_new"]


def test_nothing_in_the_table_is_made_up():
    """Keys that are not DeepSpeed's own, each with the reason why it is there."""
    known = {_first_name(path) for path in known_keys()}
    ours = {path for path in PATHS[Honoured] + PATHS[Said] + PATHS[Refused] if path not in known}
    parameters = {path for path in ours if path.startswith(("optimizer.params.", "scheduler.params."))}
    removed = {
        f"zero_optimization.{key}"
        for key in ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")
    }
    read_by_engines = {"sequence_parallel_size", "data_parallel_size"}
    in_old_files = {"seed"}
    assert ours == parameters | removed | read_by_engines | in_old_files


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_a_misspelt_key_is_an_error_wherever_it_stands(section):
    prefix = f"{section}." if section else ""
    key = next(path for path in KEYS if path.startswith(prefix) and "." not in path.removeprefix(prefix))
    key = key.removeprefix(prefix)
    misspelt = key[:-2] + key[-1]
    (mistake,) = _mistakes(_at(f"{prefix}{misspelt}", True))
    assert mistake.startswith(f"ds.json: unknown key '{prefix}{misspelt}': did you mean '")


@pytest.mark.parametrize("path", PATHS[Refused])
def test_a_refused_key_is_told_with_the_reason(path):
    (mistake,) = _mistakes(_at(path, ODD))
    assert mistake == f"ds.json: '{path}': {KEYS[path].why}"
    assert "\n" not in mistake
    assert len(mistake) < 200


@pytest.mark.parametrize("path", PATHS[Refused])
def test_a_refused_key_that_asks_for_nothing_is_let_pass_and_taken_out(path):
    for value in KEYS[path].harmless:
        content = _at(path, value)
        if "optimizer" in content:
            content["optimizer"].setdefault("params", {"lr": "auto"})
        config = check_ds_config(content, "ds.json")
        section, _, key = path.rpartition(".")
        inner = config
        for part in filter(None, section.split(".")):
            inner = inner.get(part, {})
        assert key not in inner


def _misfits():
    for path in PATHS[Honoured] + PATHS[Said]:
        entry = KEYS[path]
        for value in (None, "false", "auto", {"enabled": True}, [None]):
            filled_in = value == "auto" and isinstance(entry, Honoured) and entry.auto
            if not entry.kind.fits(value) and not filled_in:
                yield pytest.param(path, value, id=f"{path} {json.dumps(value)}")


@pytest.mark.parametrize(("path", "value"), [*_misfits()])
def test_a_value_of_the_wrong_kind_is_told_by_its_key(path, value):
    (mistake,) = _mistakes(_at(path, value))
    assert mistake.startswith(f"ds.json: '{path}' is {json.dumps(value)}")
    assert KEYS[path].kind.described in mistake


@pytest.mark.parametrize("value", [None, True, False, "auto", 3, []], ids=json.dumps)
@pytest.mark.parametrize("path", SECTIONS)
def test_a_section_that_is_no_object_is_told(path, value):
    (mistake,) = _mistakes(_at(path, value))
    assert mistake.startswith(f"ds.json: '{path}' is {json.dumps(value)}, which is not an object")


def test_second_names_mean_the_first_ones():
    config = check_ds_config({"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 3}}, "ds.json")
    assert config["bf16"] == {"enabled": True}
    zero = check_ds_config({"zero_optimization": {"stage": 3, "max_live_parameters": 7}}, "ds.json")
    assert zero["zero_optimization"] == {"stage": 3, "stage3_max_live_parameters": 7}
    both = {"zero_optimization": {"stage3_max_live_parameters": 7, "max_live_parameters": 8}}
    assert "another name of" in _mistakes(both)[0]


def test_all_mistakes_are_told_at_once():
    content = {"amp": {"enabled": True}, "bf16": {"enabld": True}, "seed": 1, "zero_optimization": {"stage": "2"}}
    assert len(_mistakes(content)) == 4
