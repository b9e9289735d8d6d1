"""Packages that only some settings need: imported where they are used, and missed with the setting's name."""

import importlib
from types import ModuleType

from hydra_rlhf.errors import ConfigError


def load_bitsandbytes(setting: str) -> ModuleType:
    """The bitsandbytes package, for `setting`. Raises `ConfigError` naming the setting where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(
            f"{setting} needs bitsandbytes: pip install 'hydra-rlhf[quant]' (importing it says: {error})"
        ) from error
