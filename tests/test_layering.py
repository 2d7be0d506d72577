"""Layering and limits, read off the source: who imports whom, what stays light and short."""

import ast
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Modules and packages in order: each imports only what stands above it.
MODULES = (
    "__init__",
    "allocator",
    "lifeline",
    "rollcall",
    "places",
    "processes",
    "watchdog",
    "faults",
    "ledger",
    "xla_cache",
    "mesh",
    "data",
    "models",
    "interop",
    "masking",
    "objectives",
    "optimizer",
    "metrics",
    "step",
    "tasks",
    "eval_keys",
    "config",
    "runlocal",
    "config_files",
    "lifetime",
    "checkpoint",
    "evals",
    "embed",
    "pictures",
    "runlog",
    "train",
    "replay",
    "hlo",
    "chips",
    "flops",
    "fitting",
    "plan",
    "publish",
    "report",
    "actions",
    "commands",
    "__main__",
)
CONFIGURED = {
    "tasks",
    "eval_keys",
    "config",
    "runlocal",
    "config_files",
    "checkpoint",
    "train",
    "replay",
    "fitting",
    "plan",
    "report",
}
TORCH = {"torch", "torchvision", "transformers", "open_clip", "timm"}


@dataclass(frozen=True)
class Import:
    """One imported thing: ``a.b.c`` for ``from a.b import c``."""

    file: Path
    line: int
    target: str
    inside_function: bool

    @property
    def top(self) -> str:
        return self.target.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def python_files(*folders):
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def tree_of(path):
    return ast.parse(path.read_text(), str(path))


def imports_of(path, tree=None, inside=False):
    """Every import of a file, at whatever depth."""
    for node in ast.iter_child_nodes(tree or tree_of(path)):
        here = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        if isinstance(node, ast.Import):
            yield from (Import(here, node.lineno, a.name, inside) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{here}:{node.lineno}: relative import"
            for a in node.names:
                yield Import(here, node.lineno, f"{node.module}.{a.name}", inside)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(path, node, inside or function)


def all_imports(*folders):
    return [found for path in python_files(*folders) for found in imports_of(path)]


def module(path):
    """The module or subpackage that a file of the package belongs to."""
    return Path(path).relative_to("uta_jax").with_suffix("").parts[0]


def module_of_import(target):
    """``uta_jax.data.loader.TrainLoader`` -> data; ``uta_jax.UserError`` -> __init__."""
    part = target.split(".")[1]
    return part if part in MODULES else "__init__"


def forbidden_direction(found):
    return (
        found.top == "uta_jax"
        and (theirs := module_of_import(found.target)) != (ours := module(found.file))
        and MODULES.index(theirs) >= MODULES.index(ours)
    )


def report(broken):
    return "\n" + "\n".join(map(str, broken))


def test_every_module_is_in_the_order():
    found = {module(path.relative_to(ROOT)) for path in python_files("uta_jax")}
    assert found == set(MODULES)


def test_a_module_imports_only_modules_above_it():
    found = all_imports("uta_jax")
    assert sum(i.top == "uta_jax" for i in found) > 50
    broken = [i for i in found if forbidden_direction(i)]
    assert not broken, report(broken)


@pytest.mark.parametrize(
    "line, forbidden",
    [
        ("from uta_jax.train import train", True),
        ("from uta_jax import train", True),
        ("import uta_jax.evals.zeroshot", True),
        ("def f():\n    from uta_jax import report", True),
        ("from uta_jax import UserError, mesh", False),
        ("from uta_jax.models.vit import Vit", False),
        ("from uta_jax.interop import files", False),  # its own package
    ],
)
def test_the_direction_test_notices(tmp_path, line, forbidden):
    """As if the line stood in interop/."""
    (tmp_path / "x.py").write_text(line)
    found = [
        Import(Path("uta_jax/interop/x.py"), i.line, i.target, i.inside_function)
        for i in imports_of(tmp_path / "x.py")
    ]
    assert found and any(map(forbidden_direction, found)) == forbidden


def test_flax_linen_stays_in_models():
    broken = [
        i
        for i in all_imports("uta_jax", "configs")
        if i.target.startswith("flax.linen") and module(i.file) != "models"
    ]
    assert not broken, report(broken)


def test_torch_is_imported_inside_functions_of_few_modules():
    broken = [
        i
        for i in all_imports("uta_jax", "configs")
        if i.top in TORCH and not (i.inside_function and _may_compare_with_torch(i.file))
    ]
    assert not broken, report(broken)


def _may_compare_with_torch(path) -> bool:
    """Weights come from torch, and the data benchmark measures itself against torchvision."""
    return module(path) == "interop" or path.as_posix() == "uta_jax/data/bench.py"


def test_only_comparisons_import_torch():
    """Parity tests, and what is run by hand."""
    broken = [
        i
        for i in all_imports("tests")
        if i.top in TORCH and i.file.parts[1] not in ("parity", "benchmarks")
        if not i.inside_function
    ]
    assert not broken, report(broken)


def test_nothing_imports_tensorflow():
    broken = [i for i in all_imports("uta_jax", "configs", "tests") if i.top == "tensorflow"]
    assert not broken, report(broken)


def test_libraries_never_see_a_config():
    """ConfigDict is for the modules that put a run together; the others take plain arguments."""
    broken = [
        i
        for i in all_imports("uta_jax")
        if i.top == "ml_collections" and module(i.file) not in CONFIGURED
    ]
    assert not broken, report(broken)


def attribute_calls(tree):
    """(receiver, method, call) of every ``receiver.method(...)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield ast.unparse(node.func.value), node.func.attr, node


def test_pickles_are_never_executed():
    """``torch.load`` has ``weights_only=True`` spelt out; no code of a model's own is trusted."""
    loads, broken = 0, []
    for path in python_files("uta_jax", "tests"):
        for receiver, method, call in attribute_calls(tree_of(path)):
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if "trust_remote_code" in keywords:
                broken.append(f"{path}:{call.lineno} trust_remote_code")
            if (receiver, method) == ("torch", "load"):
                loads += 1
                if keywords.get("weights_only") != "True":
                    broken.append(f"{path}:{call.lineno} torch.load without weights_only=True")
            if receiver in ("pickle", "joblib") and method in ("load", "loads"):
                broken.append(f"{path}:{call.lineno} {receiver}.{method}")
    assert loads and not broken, report(broken)
    assert not [p for p in python_files("uta_jax", "configs") if "trust_remote" in p.read_text()]


def test_a_config_has_no_defaults_at_the_point_of_use():
    """``config.x.get("y", 0)`` on a locked ConfigDict silently gives 0 for a typo."""
    broken = [
        f"{path}:{call.lineno} {receiver}.get"
        for path in python_files("uta_jax", "configs")
        if "interop" not in path.parts  # where "config" is somebody's JSON
        for receiver, method, call in attribute_calls(tree_of(path))
        if method == "get" and "config" in receiver.split(".")
    ]
    assert not broken, report(broken)


def test_no_asserts_on_what_users_give():
    broken = [
        f"{path}:{node.lineno}"
        for path in python_files("uta_jax", "configs")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Assert)
    ]
    assert not broken, report(broken)


def modules_after(code):
    """Names of the modules that a fresh interpreter has loaded after ``code``."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_is_light():
    assert not modules_after("import uta_jax") & ({"jax", "numpy", "tensorflow", "flax"} | TORCH)


def test_importing_everything_needs_no_torch_and_no_tensorflow():
    """Every module, as a TPU host has it: without the torch extra."""
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in python_files("uta_jax")
    ]
    loaded = modules_after("import " + ", ".join(names))
    assert "jax" in loaded and not loaded & ({"tensorflow"} | TORCH)


def functions():
    """(where, lines) of every function of the package."""
    for path in python_files("uta_jax", "configs"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                yield where, node.end_lineno - node.lineno + 1


def test_functions_are_short():
    """At most 60 lines, 120 in the training loop's file, half of them at most 12."""
    lengths = dict(functions())
    broken = [
        f"{where}: {lines} lines"
        for where, lines in lengths.items()
        if lines > (120 if where.startswith("uta_jax/train.py") else 60)
    ]
    assert not broken, report(broken)
    assert statistics.median(lengths.values()) <= 12


def test_files_are_short():
    lengths = {p: len(p.read_text().splitlines()) for p in python_files("uta_jax", "configs")}
    broken = [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > 400]
    assert not broken, report(broken)


def test_no_grab_bags():
    names = {"utils", "util", "helpers", "misc", "common"}
    assert not [p for p in python_files("uta_jax", "configs", "tests") if p.stem in names]


def test_what_is_public_is_documented():
    """Modules, and the functions and classes at their top level."""
    broken = []
    for path in python_files("uta_jax", "configs"):
        tree = tree_of(path)
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        broken += [
            f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
            for node in (tree, *public)
            if not ast.get_docstring(node)
        ]
    assert not broken, report(broken)
