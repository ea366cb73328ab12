"""How gates are chosen: one file a method, and the parts that methods are made of."""

from __future__ import annotations

from dsprune.config import Section
from dsprune.errors import ConfigError
from dsprune.files import did_you_mean
from dsprune.methods.base import AnyMethod, Method, Plan, load_state, state_of
from dsprune.methods.cofi import CoFi
from dsprune.methods.evidence import Evidence
from dsprune.methods.fisher import Fisher
from dsprune.methods.grain import Grain
from dsprune.methods.mlpruning import MLPruning
from dsprune.structure import Structure

__all__ = [
    "METHODS",
    "AnyMethod",
    "Evidence",
    "Method",
    "Plan",
    "load_state",
    "method_class",
    "method_options",
    "state_of",
]

METHODS: dict[str, type[Method[Structure]]] = {"cofi": CoFi, "fisher": Fisher, "grain": Grain, "mlpruning": MLPruning}


def method_class(name: str) -> type[Method[Structure]]:
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
