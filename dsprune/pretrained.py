"""Where a pretrained model is, and what its configuration says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from dsprune.errors import ConfigError
from dsprune.files import first_line

__all__ = ["read_model_config", "resolve_source"]

PACKAGE_PREFIX = "package:"


def resolve_source(name: str) -> str:
    """A model source that `from_pretrained` understands.

    `package:NAME/SUBFOLDER` is a folder inside an installed Python package; anything else is passed
    through: a folder, or a hub id.

    Raises:
        ConfigError: the package or the folder is not there.
    """
    if name.startswith(PACKAGE_PREFIX):
        package, _, subfolder = name.removeprefix(PACKAGE_PREFIX).partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"model '{name}': package '{package}' is not installed (pip install {package.replace('_', '-')})"
            )
        name = str(Path(next(iter(spec.submodule_search_locations))) / subfolder)
    looks_local = name.startswith((".", "/", "~")) or Path(name).exists()
    if looks_local and not (Path(name) / "config.json").is_file():
        raise ConfigError(f"model folder '{name}' has no config.json")
    return name


def read_model_config(
    source: str, revision: str | None = None, *, what: str = "model", own_code: bool = False, **changes: Any
) -> PretrainedConfig:
    """The configuration of a model: the only place where dsprune reads one.

    Args:
        source: folder, hub id, `package:NAME/SUBFOLDER`, or one configuration file of any name.
        revision: of the hub.
        what: the model's part in what goes wrong: "model" or "teacher".
        own_code: whether the folder brings a class of its own for it, as compact ones do.
        changes: values in place of those that the file holds.

    Raises:
        ConfigError: it is not there, or cannot be read.
    """
    place = source if Path(source).is_file() else resolve_source(source)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            place, revision=revision, trust_remote_code=own_code, **changes
        )
    except (OSError, ValueError, ImportError) as error:
        where = "" if Path(place).exists() else ", no folder here and not to be had from the hub"
        raise ConfigError(f"cannot load {what} '{source}'{where}: {first_line(error)}") from error
    return config
