"""Small mistakes that the unit tests must notice: each mutant is one change of one place in the source.

Those of `src/hydra_rlhf/<package>/<module>.py` are listed in `tests/mutants/<package>/<module>.py`, and the tests that
must notice them are `tests/unit/test_<module>.py`. They are applied one at a time. Every public function of
`algorithms/`, and `standardize`, has at least five.
"""

import importlib
import importlib.util
import inspect
import itertools
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import hydra_rlhf.algorithms

TESTS = Path(__file__).resolve().parents[1]
ALGORITHMS = [path.stem for path in Path(hydra_rlhf.algorithms.__file__).parent.glob("[a-z]*.py")]
MIN_MUTANTS = 5


def load(path: Path) -> types.ModuleType:
    """A private copy of a Python file as a module, so that swapping its attributes touches nobody else."""
    spec = importlib.util.spec_from_file_location(f"mutation_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong line. `old` occurs exactly once in the source of its module."""

    module: str
    """The last name of the module."""
    function: str
    """The function that the change breaks."""
    mistake: str
    """What went wrong, in words."""
    old: str
    """The source as it is."""
    new: str
    """The source with the mistake."""


CHANGE_FILES = sorted(path.relative_to(TESTS / "mutants") for path in (TESTS / "mutants").rglob("*.py"))
MODULES = tuple(path.stem for path in CHANGE_FILES)
FULL_NAMES = {path.stem: ".".join(("hydra_rlhf", *path.with_suffix("").parts)) for path in CHANGE_FILES}
MUTANTS = [
    Mutant(path.stem, function, *change)
    for path in CHANGE_FILES
    for function, changes in load(TESTS / "mutants" / path).CHANGES.items()
    for change in changes
]
TEST_MODULES = {name: load(TESTS / "unit" / f"test_{name}.py") for name in MODULES}
SOURCES = {
    name: Path(inspect.getfile(importlib.import_module(full))).read_text(encoding="utf-8")
    for name, full in FULL_NAMES.items()
}


def calls(test_module: types.ModuleType) -> Iterator[Callable[[], None]]:
    """Each test of a module that needs no fixture, once per combination of its parameters."""
    for name, function in list(vars(test_module).items()):
        if not name.startswith("test_"):
            continue
        axes = []
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "parametrize":
                names, values = mark.args
                axes.append([as_arguments(names, value) for value in values])
        known = {name for axis in axes for name in axis[0]}
        if inspect.signature(function).parameters.keys() - known:
            continue
        for choice in itertools.product(*axes):
            arguments = {name: value for part in choice for name, value in part.items()}
            yield lambda function=function, arguments=arguments: function(**arguments)


def as_arguments(names: str | tuple[str, ...], value: object) -> dict[str, object]:
    """One entry of a `parametrize` as arguments."""
    return {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))  # pyright: ignore


def is_killed(module: str, source: str) -> bool:
    """Whether a test of `module` fails when it is replaced by `source`; other errors than failed tests are raised."""
    mutated = types.ModuleType(FULL_NAMES[module])
    exec(compile(source, f"<{module} with a mistake>", "exec"), mutated.__dict__)
    test_module = TEST_MODULES[module]
    original = getattr(test_module, module)
    setattr(test_module, module, mutated)
    try:
        for call in calls(test_module):
            try:
                call()
            except (AssertionError, pytest.fail.Exception):
                return True
        return False
    finally:
        setattr(test_module, module, original)


@pytest.mark.parametrize("module", MODULES)
def test_tests_pass_without_a_mistake(module):
    assert not is_killed(module, SOURCES[module])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.function}: {m.mistake}".replace(" ", "-"))
def test_mutant_is_killed(mutant):
    source = SOURCES[mutant.module]
    assert source.count(mutant.old) == 1, "the mutant's old text must stand in the source exactly once"
    assert mutant.new != mutant.old
    assert is_killed(mutant.module, source.replace(mutant.old, mutant.new)), "no test noticed this mistake"


def test_every_function_has_mutants():
    counts = Counter((mutant.module, mutant.function) for mutant in MUTANTS)
    required = set(counts) - {("masking", "masked_sum and its relatives")}
    for name in ALGORITHMS:
        if name == "masking":
            continue
        module = importlib.import_module(f"hydra_rlhf.algorithms.{name}")
        functions = inspect.getmembers(module, inspect.isfunction)
        required |= {(name, key) for key, f in functions if not key.startswith("_") and f.__module__ == module.__name__}
    assert len(required) > 19
    assert {key: counts[key] for key in required if counts[key] < MIN_MUTANTS} == {}
