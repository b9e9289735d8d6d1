"""Read a recipe file: YAML to a checked `Recipe`, with errors that name the setting, the value and the remedy."""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from hydra_rlhf.config import Recipe
from hydra_rlhf.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-5` as a string and lets a key come twice; here it is a number, and an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys all differ. Raises `yaml.YAMLError` for one that comes twice."""
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} comes twice{node.start_mark}; keep one")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, with `overrides` ({setting: value}, dotted names allowed) laid over it.

    Raises `ConfigError` for a file that cannot be read, an unknown setting (with the nearest name) or a wrong value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = _Loader(text).get_single_data()
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {path} holds no settings; it must be a mapping such as `name: my-run`")
    content.setdefault("name", Path(path).stem)
    for name, value in (overrides or {}).items():
        lay_over(content, name, value)
    return parse_recipe(content, source=str(path))


def lay_over(content: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted setting in nested settings."""
    *sections, last = name.split(".")
    for section in sections:
        content = content.setdefault(section, {})
    content[last] = value


def parse_recipe(content: Mapping[str, Any], *, source: str) -> Recipe:
    """Nested settings -> `Recipe`. Raises `ConfigError` with one line per problem."""
    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{source}:\n" + "\n".join(f"  {describe(problem)}" for problem in error.errors())) from error
    except ConfigError as error:  # a check across settings
        raise ConfigError(f"{source}: {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}; settings are strings, numbers, booleans, lists and mappings") from error


def describe(problem: Mapping[str, Any]) -> str:
    """One line for one pydantic problem: the setting, the value, the way out."""
    # pydantic puts the kind of a list's entry after its index (`sources.0.length.target`); no setting is called so.
    parts = problem["loc"]
    location = [
        str(part) for i, part in enumerate(parts) if not (isinstance(part, str) and _is_index(parts[i - 1 : i]))
    ]
    name = ".".join(location)
    if problem["type"] == "unexpected_keyword_argument":
        near = nearest(name)
        return f"unknown setting {name}" + (f"; did you mean {near}?" if near else "")
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{name}={problem['input']!r}: {message}"


def _is_index(parts: Sequence[str | int]) -> bool:
    return len(parts) == 1 and isinstance(parts[0], int)


def nearest(name: str) -> str | None:
    """The known setting that a misspelt one is nearest to, if any is near."""
    names = setting_names(Recipe)
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if found:
        return found[0]
    last = {other.rsplit(".", 1)[-1]: other for other in reversed(names)}
    by_last = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.7)
    return last[by_last[0]] if by_last else None


def setting_names(config: type, prefix: str = "") -> list[str]:
    """Every dotted setting below a config class."""
    names: list[str] = []
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        for section in sections_in(kind):
            names += setting_names(section, f"{prefix}{field.name}.")
        names.append(f"{prefix}{field.name}")
    return names


def sections_in(kind: Any) -> list[type]:
    """The config classes of a field: its own, or those that the entries of a list may have."""
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return [kind]
    return [section for part in get_args(kind) for section in sections_in(part)]


def recipe_differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two nested settings, as lines like `ppo.kl_coef: 0.02 -> 0.05`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        pairs = [(old.get(key, "(none)"), new.get(key, "(none)"), f"{name}.{key}".lstrip(".")) for key in keys]
        return [line for pair in pairs for line in recipe_differences(*pair)]
    return [] if old == new else [f"{name}: {old} -> {new}"]
