"""The rules that all code of the package follows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "scale_mae"
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Yield the names of the modules that a file imports, at any place in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def runtime_imports(path):
    """Yield the names of the scale_mae modules that a file imports when it runs, not those for type checkers only."""
    tree = ast.parse(path.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    skipped = {id(n) for block in blocks for n in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and node.module.split(".")[0] == "scale_mae":
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in NAMES else node.module


def importers(prefix):
    return {name_of(p) for p in MODULES if any(m == prefix or m.startswith(prefix + ".") for m in imports(p))}


NAMES = {name_of(path) for path in MODULES}
TOP = {"__init__", "__main__", "api", "cli", "demo", "doctor"}
LAYERS = [  # a layer imports from the layers before it only
    *("config", "system", "distributed", "model", "data", "checkpoint", "engine", "metrics", "runs", "weights"),
    *("evaluation", "training", "slurm", "report", "doctor", "preflight", "demo", "api", "cli", "__main__"),
]
DATA = {"demo_data", "reference_curves"}  # packages of data files


def test_the_top_level_holds_six_modules_and_packages():
    assert {p.stem for p in PACKAGE.glob("*.py")} == TOP
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} == {*LAYERS, *DATA} - TOP


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_its_own_layer_and_lower_ones(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = {"__init__", *LAYERS[: LAYERS.index(own) + 1]} if own in LAYERS else set()
    for module in runtime_imports(path):
        layer = [*module.split("."), "__init__"][1]
        assert layer in allowed, f"{name_of(path)} imports {module}, which is in a higher layer"


def test_no_modules_import_each_other():
    graph = {name_of(p): set(runtime_imports(p)) - {"scale_mae"} for p in MODULES}
    while independent := [name for name, imported in graph.items() if not imported & graph.keys() - {name}]:
        for name in independent:
            del graph[name]
    assert not graph, f"these modules import each other: {sorted(graph)}"


def test_only_engine_and_checkpoint_import_deepspeed():
    assert all(name.startswith(("scale_mae.engine", "scale_mae.checkpoint")) for name in importers("deepspeed"))


def test_only_data_dali_imports_dali():
    assert importers("nvidia.dali") <= {"scale_mae.data.dali"}


def test_only_the_api_imports_the_trainer():
    assert importers("scale_mae.training.trainer") <= {"scale_mae.api"}
    assert importers("scale_mae.api") <= {"scale_mae", "scale_mae.cli"}
    assert importers("scale_mae.cli") <= {"scale_mae.__main__"}


@pytest.mark.parametrize(
    "action",
    ["build_parser().format_help()", "main(['recipes'])", "main(['schema'])", "complete_override('train.')"],
    ids=["help", "recipes", "schema", "completion"],
)
def test_light_commands_import_no_heavy_package(action):
    program = f"""
import sys, scale_mae
from scale_mae.cli import build_parser, main
from scale_mae.system.completion import complete_override
{action}
heavy = {{"torch", "numpy", "rich", "plotly", "PIL", "matplotlib"}} & sys.modules.keys()
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_public_names_have_docstrings():
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        members = [n for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body]
        for node in [*tree.body, *members]:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_files_and_functions_stay_short():
    for path in MODULES:
        lines = len(path.read_text().splitlines())
        assert lines <= 300, f"{path}: {lines} lines"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 60, f"{path}: {node.name}"


def test_constraints_pin_names_and_versions_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"(#.*|[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+( ; .*)?)", line), line


def test_no_file_names_a_machine_or_a_download_address():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in listed:
        if name.endswith((".safetensors", ".gz", ".png")) or name == "tests/test_architecture.py":
            continue
        text = (ROOT / name).read_text()
        assert not re.search(r"index.url|find.links", text), name
        assert str(ROOT) not in text, name
        assert f"{Path.home()}/" not in text, name
