"""Promises about the whole code base that no single module can keep: layers, lengths, settings, metrics."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "hydra_rlhf"
FILES = sorted(SRC.rglob("*.py"))

# Who may import whom: only downwards, or a neighbour on the same row where NEIGHBOURS allows it.
LAYERS = (
    {"records", "config", "config_stages", "config_rewards", "config_checks", "recipes", "errors"},
    {"algorithms", "model", "data", "runtime"},
    {"stages", "evaluation", "memory", "benchmark"},
    {"reporting"},
    {"api", "cli", "cli_bench", "cli_chat", "cli_data", "cli_evaluation", "cli_plan"},
)
LAYER_OF = {name: row for row, names in enumerate(LAYERS) for name in names}
MEMORY_FOR_STAGES = {"hydra_rlhf.memory.count", "hydra_rlhf.memory.measure", "hydra_rlhf.memory.sizes"}
# The plan is asked in two places: where a stage's limits are settled, and where one step is held against it.
MEMORY_FOR_PLANNING = {"hydra_rlhf.memory.budget", "hydra_rlhf.memory.decide", "hydra_rlhf.memory.plan"}
PLANNING_FILES = {"stages/settle.py", "stages/probe_step.py"}
CONFIG_FILES = ("config.py", "config_stages.py", "config_rewards.py")
NO_TORCH = (
    *CONFIG_FILES,
    "config_checks.py",
    "recipes.py",
    "errors.py",
    "model/roles.py",
    "data/check.py",
    "data/sources.py",
    "data/world.py",
    "reporting/",
)
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pandas", "pyarrow", "peft")
TRANSFORMERS_PARTS = {"model", "data", "stages", "evaluation", "memory", "benchmark"}
MODEL_CLASS = re.compile(r"AutoModel\w*|AutoConfig|PreTrainedModel|\w+For(CausalLM|SequenceClassification)")
MODEL_CLASS_FILES = {"model/trunk.py", "model/load.py", "model/classifier.py", "model/export.py", "model/shapes.py"}
LOOP_FILES = {"stages/supervised.py", "stages/ppo.py"}
METRIC_PREFIXES = "loss|score|reward|kl|ppo|response|optim|train|eval|rollout|update|time|memory"
# NAME stands for the name of a reward source: `reward/NAME_mean`.
METRIC = re.compile(rf"({METRIC_PREFIXES})/(NAME_)?[a-z0-9_]+")
METHODS = {"ppo", "lora-ppo", "d-lora-ppo", "j-hydra-ppo", "hydra-ppo", "dpo", "simpo"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "managers", "base", "misc"}

AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    """A source file as the messages name it, e.g. `stages/ppo.py`."""
    return path.relative_to(SRC).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def nodes(kind: type | tuple[type, ...], files: list[Path] = FILES) -> Iterator[tuple[Path, Any]]:
    """Every node of a kind in the package, with its file."""
    for path in files:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, kind):
                yield path, node


def module_of(path: Path) -> str:
    """Dotted module name of a source file."""
    parts = ("hydra_rlhf", *path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(node: ast.Import | ast.ImportFrom, path: Path) -> list[str]:
    """The modules an import statement names, `from package import module` resolved to the module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    source = node.module or ""
    if node.level:
        package = module_of(path).split(".") + (["__init__"] if path.name == "__init__.py" else [])
        source = ".".join([*package[: -node.level], *([node.module] if node.module else [])])
    return [full if (full := f"{source}.{alias.name}") in MODULES else source for alias in node.names]


@cache
def imports_of(path: Path, *, lazy: bool = True, typing: bool = True) -> frozenset[str]:
    """Modules a file imports; without `lazy` not those inside functions, without `typing` not those for annotations."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(imported(node, path))
        if isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING" and not typing:
            return
        for child in ast.iter_child_nodes(node):
            if lazy or not isinstance(child, AnyFunction | ast.Lambda):
                visit(child)

    visit(tree_of(path))
    return frozenset(found)


def part_of(module: str) -> str:
    """The part of the package a module belongs to: a subpackage, or a top-level file."""
    return module.split(".")[1] if "." in module else "hydra_rlhf"


def is_in(module: str, packages: tuple[str, ...] | set[str]) -> bool:
    """Whether a module is one of the packages or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def last_name(node: ast.AST) -> str:
    """The last identifier of a dotted expression: `run.config` -> `config`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


# --- layers ---------------------------------------------------------------------------------------------------------


def test_imports_point_down() -> None:
    wrong = []
    for path in FILES:
        part = part_of(module_of(path))
        if part == "hydra_rlhf":  # the public surface may name everything
            continue
        for module in sorted(imports_of(path)):
            target = part_of(module)
            if not is_in(module, ("hydra_rlhf",)) or target == part:
                continue
            if target not in LAYER_OF or part not in LAYER_OF or LAYER_OF[target] > LAYER_OF[part]:
                wrong.append(f"{name_of(path)} imports {module}")
            allowed = MEMORY_FOR_STAGES | (MEMORY_FOR_PLANNING if name_of(path) in PLANNING_FILES else set())
            if part == "stages" and target == "memory" and module not in allowed:
                wrong.append(f"{name_of(path)} imports {module}; it may use only {sorted(allowed)}")
    assert not wrong, "\n".join(wrong)


def in_circles(edges: set[tuple[str, str]]) -> list[str]:
    """The names from which following `edges` leads back to themselves."""
    reached: dict[str, set[str]] = {a: {b for start, b in edges if start == a} for a, _ in edges}
    for _ in reached:  # transitive closure: as many rounds as there are names is enough
        reached = {a: direct.union(*(reached.get(b, set()) for b in direct)) for a, direct in reached.items()}
    return sorted(name for name, found in reached.items() if name in found)


def test_nothing_imports_itself_in_a_circle() -> None:
    edges = {(module_of(p), m) for p in FILES for m in imports_of(p, typing=False) if m in MODULES}
    assert not in_circles(edges)
    # Nor do whole parts, but for one pair: stages evaluate while they train, and evaluation samples as a rollout does.
    one = {"evaluation": "stages"}
    parts = {(one.get(x := part_of(a), x), one.get(y := part_of(b), y)) for a, b in edges}
    assert not in_circles({(a, b) for a, b in parts if a != b and "hydra_rlhf" not in (a, b)})


def test_algorithms_are_pure_tensor_functions() -> None:
    pure = {"math", "re", "typing", "collections", "dataclasses", "functools", "itertools"}
    allowed = {"torch", "jaxtyping", "hydra_rlhf.records", "hydra_rlhf.algorithms"} | pure
    algorithms = [path for path in FILES if path.parent.name == "algorithms"]
    wrong = [f"{name_of(path)} imports {m}" for path in algorithms for m in imports_of(path) if not is_in(m, allowed)]
    wrong += [
        f"{name_of(p)}:{node.lineno} uses {node.attr}"
        for p, node in nodes(ast.Attribute, algorithms)
        if node.attr == "Module"
    ]
    wrong += [
        f"{name_of(p)} imports {alias.name}"
        for p, alias in nodes(ast.alias, algorithms)
        if alias.name in {"nn", "Module"}
    ]
    assert len(algorithms) > 1
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("prefix", NO_TORCH)
def test_parts_that_work_without_torch_import_none(prefix: str) -> None:
    start = [path for path in FILES if name_of(path).startswith(prefix)]
    assert start, f"no source file {prefix}"
    assert not [name_of(path) for path in start if any(is_in(m, ("torch",)) for m in imports_of(path))]
    # What they import in their turn, when they are imported.
    reached, waiting = set(start), list(start)
    while waiting:
        path = waiting.pop()
        modules = imports_of(path, lazy=False, typing=False)
        assert not any(is_in(m, ("torch",)) for m in modules), f"{prefix} reaches torch through {name_of(path)}"
        new = {MODULES[m] for m in modules if m in MODULES} - reached
        reached |= new
        waiting += new


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    light = [m for m, path in MODULES.items() if name_of(path).startswith(NO_TORCH)] + ["hydra_rlhf", "hydra_rlhf.cli"]
    code = f"import sys, {', '.join(light)}; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_only_the_trunk_and_the_export_know_model_classes() -> None:
    # Tokenizers and caches are handed around as they are; which families of models there are is the trunk's business.
    users = {path for path in FILES if any(is_in(m, ("transformers",)) for m in imports_of(path))}
    assert {part_of(module_of(path)) for path in users} <= TRANSFORMERS_PARTS
    named = {name_of(p) for p, alias in nodes(ast.alias, sorted(users)) if MODEL_CLASS.fullmatch(alias.name)}
    named |= {name_of(p) for p, node in nodes(ast.Attribute, sorted(users)) if MODEL_CLASS.fullmatch(node.attr)}
    assert "model/trunk.py" in named
    assert named <= MODEL_CLASS_FILES


def test_shapes_are_checked_while_tests_run() -> None:
    import torch
    from jaxtyping import TypeCheckError

    from hydra_rlhf.records import TokenBatch

    mask = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(TypeCheckError, match="attention_mask"):
        TokenBatch(tokens=torch.zeros(2, 5, dtype=torch.long), attention_mask=mask[:, 1:], response_mask=mask[:, :2])


# --- size and form --------------------------------------------------------------------------------------------------


def test_files_and_functions_stay_short() -> None:
    wrong = [f"{name_of(p)}: {n} lines" for p in FILES if (n := len(p.read_text("utf-8").splitlines())) > 300]
    longest: dict[str, list[int]] = {}
    for path, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef)):
        num_lines = node.end_lineno - node.lineno + 1
        if num_lines > 80 and name_of(path) in LOOP_FILES:
            longest.setdefault(name_of(path), []).append(num_lines)
        elif num_lines > 80:
            wrong.append(f"{name_of(path)}:{node.lineno} {node.name}: {num_lines} lines")
    # One loop per file of stages that has one, and that one up to 120 lines.
    wrong += [f"{file}: {sizes}" for file, sizes in longest.items() if len(sizes) > 1 or max(sizes) > 120]
    assert not wrong, "\n".join(wrong)


def test_everything_public_has_a_docstring() -> None:
    wrong = [name_of(p) for p in FILES if tree_of(p).body and not ast.get_docstring(tree_of(p))]
    for path, owner in nodes((ast.Module, ast.ClassDef)):
        public = [n for n in owner.body if isinstance(n, AnyFunction | ast.ClassDef) and not n.name.startswith("_")]
        wrong += [f"{name_of(path)}:{node.lineno} {node.name}" for node in public if not ast.get_docstring(node)]
    assert not wrong, "\n".join(wrong)


def test_nothing_unsafe_or_unfinished() -> None:
    unsafe_calls = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}
    unsafe_modules = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    wrong = []
    for path in FILES:
        wrong += [f"{name_of(path)} imports {module}" for module in imports_of(path) if is_in(module, unsafe_modules)]
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", line):
                wrong.append(f"{name_of(path)}:{number} {line.strip()}")
    for path, call in nodes(ast.Call):
        place = f"{name_of(path)}:{call.lineno}"
        if ast.unparse(call.func) in unsafe_calls:
            wrong.append(f"{place} calls {ast.unparse(call.func)}")
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        wrong += [f"{place} sets {name}" for name in ("shell", "allow_pickle") if given.get(name, "False") != "False"]
        # Whoever calls a Python function of ours may say trust_remote_code=True; in here it is only handed on.
        if not re.fullmatch(r"False|([a-z_]+\.)*trust_remote_code", given.get("trust_remote_code", "False")):
            wrong.append(f"{place} sets trust_remote_code={given['trust_remote_code']}")
    for path, arguments in nodes(ast.arguments):
        positional = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults + arguments.kw_defaults
        for argument, default in zip([*positional, *arguments.kwonlyargs], defaults, strict=True):
            if argument.arg == "trust_remote_code" and default is not None and ast.unparse(default) != "False":
                wrong.append(f"{name_of(path)}:{argument.lineno} trust_remote_code is not False by default")
    assert not wrong, "\n".join(wrong)


def test_only_the_role_tables_know_methods_by_name() -> None:
    wrong = []
    for path, node in nodes((ast.Compare, ast.Match)):
        if name_of(path) in {"model/roles.py", *CONFIG_FILES}:
            continue
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.subject, *node.cases]
        values = {c.value for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)}
        # "ppo" is also a stage: there it is the other side that tells.
        about_method = any(last_name(side) == "method" for side in sides)
        if values & METHODS and (about_method or values & METHODS - {"ppo"}):
            wrong.append(f"{name_of(path)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_no_vague_file_names() -> None:
    named = [*FILES, *(ROOT / "tests").rglob("*.py")]
    assert not [
        str(path.relative_to(ROOT)) for path in named if set(path.relative_to(ROOT).with_suffix("").parts) & VAGUE_NAMES
    ]


# --- settings and recipes -------------------------------------------------------------------------------------------


def config_classes() -> list[type]:
    """The dataclasses of the config files."""
    from hydra_rlhf import config, config_rewards, config_stages

    named = vars(config_rewards) | vars(config_stages) | vars(config)
    return [c for c in named.values() if isinstance(c, type) and dataclasses.is_dataclass(c)]


def test_every_setting_is_documented_where_it_is_defined() -> None:
    wrong = []
    for _, owner in nodes(ast.ClassDef, [SRC / name for name in CONFIG_FILES]):
        for node, following in zip(owner.body, [*owner.body[1:], None], strict=True):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and not documented:
                wrong.append(f"{owner.name}.{ast.unparse(node.target)}")
    assert not wrong, "\n".join(wrong)


def test_every_setting_is_read() -> None:
    from hydra_rlhf.model.roles import STAGE1_ORDER

    # A read is `<config>.<field>`, where the left side ends in `config`, `recipe` or the name of a section: `.format`
    # on a string does not count as reading `data.format`.
    sections = {f.name for c in config_classes() for f in dataclasses.fields(c) if dataclasses.is_dataclass(f.type)}
    sections |= {"recipe", "config"}
    read = {
        node.attr
        for path, node in nodes(ast.Attribute)
        if name_of(path) not in CONFIG_FILES
        and ((left := last_name(node.value)) in sections or left.endswith("_config"))
    }
    # The stage-1 sections are also read by the name of the stage: getattr(recipe, stage).
    if any(ast.unparse(call.args[0]) == "recipe" for _, call in nodes(ast.Call) if last_name(call.func) == "getattr"):
        read |= set(STAGE1_ORDER)
    fields = {f"{c.__name__}.{f.name}": f.name for c in config_classes() for f in dataclasses.fields(c)}
    assert {"ppo", "reward"} <= sections
    unread = [full for full, name in fields.items() if name not in read]
    assert not unread, "\n".join(unread)


def recipes() -> list[Path]:
    """The recipes that ship with the project: those to start from, and the demo's inside the package."""
    return sorted([*(ROOT / "recipes").glob("*.yaml"), *SRC.rglob("*.yaml")])


def test_there_are_recipes() -> None:
    assert [path for path in recipes() if path.parent.name == "recipes"]


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.name)
def test_every_recipe_loads(path: Path) -> None:
    from hydra_rlhf.config import Recipe
    from hydra_rlhf.recipes import load_recipe

    assert isinstance(load_recipe(path), Recipe)


# --- metrics --------------------------------------------------------------------------------------------------------


def documented_metrics() -> set[str]:
    """The metrics in the first column of the tables of docs/metrics.md."""
    lines = (ROOT / "docs" / "metrics.md").read_text("utf-8").splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("|")]
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell) if METRIC.fullmatch(key)}


def test_logged_metrics_and_their_documentation_agree() -> None:
    written = {(p, n.value) for p, n in nodes(ast.Constant) if isinstance(n.value, str) and METRIC.fullmatch(n.value)}
    logged = {key for path, key in written if part_of(module_of(path)) not in {"reporting", "cli"}}
    documented = documented_metrics()
    assert logged
    wrong = [f"{key} is logged, but not in docs/metrics.md" for key in sorted(logged - documented)]
    wrong += [f"{key} is in docs/metrics.md, but never logged" for key in sorted(documented - logged)]
    wrong += [f"{key} is shown to users, but never logged" for key in sorted({key for _, key in written} - logged)]
    assert not wrong, "\n".join(wrong)


def test_metric_names_are_written_out() -> None:
    # f"kl/{name}" could be found neither by the test above nor by someone who searches for the metric.
    built = []
    for path, node in nodes(ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
        fixed = "".join(str(part) for part in parts if part is not None)
        pattern = "".join(r"[a-z0-9_]+" if part is None else re.escape(str(part)) for part in parts)
        could_be_one = len(fixed) > 3 and any(re.fullmatch(pattern, key) for key in documented_metrics())
        if could_be_one or re.match(rf"({METRIC_PREFIXES})/", str(parts[0])):
            built.append(f"{name_of(path)}:{node.lineno} {ast.unparse(node)}")
    assert not built, "\n".join(built)
