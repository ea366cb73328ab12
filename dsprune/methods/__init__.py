"""How gates are chosen: one file a method, and the parts that methods are made of."""

from __future__ import annotations

from dsprune.config import Section
from dsprune.errors import ConfigError
from dsprune.files import did_you_mean
from dsprune.methods.base import GateSignal, Method, Plan
from dsprune.methods.cofi import CoFi
from dsprune.methods.grain import Grain
from dsprune.methods.mlpruning import MLPruning

__all__ = ["METHODS", "GateSignal", "Method", "Plan", "method_class", "method_options"]

METHODS: dict[str, type[Method]] = {"cofi": CoFi, "grain": Grain, "mlpruning": MLPruning}


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ConfigError: unknown method.
    """
    if name not in METHODS:
        hint = did_you_mean(name, METHODS, otherwise=f"there is {', '.join(METHODS)}")
        raise ConfigError(f"method.name = '{name}': no such method; {hint}")
    return METHODS[name]


def method_options(name: str) -> type[Section]:
    """The class of a method's options, for `load_config`."""
    return method_class(name).Options
