"""Imports run one way: errors, schema, text ← config ← run, formulas ← data ← models ← engine ← stages ← the rest."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import davir_ray

PACKAGE = Path(davir_ray.__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}

RAY_ALLOWED = ("engine", "stages", "pipeline", "align", "compare", "export", "api", "benchmarks", "demo")
APPLICATIONS = {"align", "compare", "export", "api"}
ABOVE: dict[str, set[str]] = {
    "errors": set(),
    "schema": set(),
    "text": set(),
    "versions": set(),
    "config": {"errors", "text"},
    "run": {"errors", "schema", "text", "config"},
    "terminal": {"run", "text"},
    "cli": {"errors", "text", "config", "run", "terminal"},
    "formulas": set(),
    "data": {"errors", "schema", "text", "config", "run", "formulas"},
    "models": {"errors", "schema", "text", "versions", "config", "run", "data", "formulas"},
    "report": {"errors", "schema", "config", "run", "data", "formulas"},
    "engine": {"errors", "schema", "text", "config", "run", "formulas", "terminal"},
    "stages": {
        "errors", "schema", "text", "versions", "config", "run", "data", "formulas", "models", "report", "engine",
    },
}  # fmt: skip
"""Parts of the package and what each may import of it, beside itself. What is not listed may import all."""


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, late imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(module: str, package: str) -> bool:
    return any(name.split(".")[0] == package for name in imports(MODULES[module]))


def part(module: str) -> str:
    return module.split(".")[0]


def test_the_walk_sees_the_package() -> None:
    assert {"run.location", "formulas.scores", "models.kernel.likelihood", "engine.pool", "pipeline"} <= MODULES.keys()
    assert imports_of("engine.pool", "ray")
    assert imports_of("models.kernel.likelihood", "torch")


@pytest.mark.parametrize("module", MODULES)
def test_ray_is_imported_in_the_stages_and_doors_only(module: str) -> None:
    assert part(module) in RAY_ALLOWED or not imports_of(module, "ray")


@pytest.mark.parametrize(
    "module", [name for name in MODULES if part(name) in {"config", "run", "data", "report", "cli"}]
)
def test_rows_and_files_know_no_torch(module: str) -> None:
    assert not imports_of(module, "torch")


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) not in APPLICATIONS | {"__init__"}])
def test_nobody_imports_the_applications(module: str) -> None:
    inner = {".".join(name.split(".")[1:2]) for name in imports(MODULES[module]) if name.startswith("davir_ray.")}
    assert not inner & APPLICATIONS or part(module) == "benchmarks"


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) in ABOVE])
def test_imports_run_one_way(module: str) -> None:
    allowed = ABOVE[part(module)] | {part(module), "__version__"}
    inner = [name.split(".") for name in imports(MODULES[module]) if name.split(".")[0] == "davir_ray"]
    assert {names[1] for names in inner if len(names) > 1} <= allowed


def test_the_package_itself_imports_nothing_but_for_types() -> None:
    """What it names of the API is imported when it is asked for; `import davir_ray` costs nothing."""
    top = ast.parse((PACKAGE / "__init__.py").read_text()).body
    imported = [node for node in top if not is_for_types(node) and isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imported if isinstance(node, ast.ImportFrom)] == ["typing"]
    assert len(imported) == 1


LAZY = """
import sys
import davir_ray
assert davir_ray.__version__ and {"score", "rank", "select"} <= set(dir(davir_ray))
heavy = {"ray", "torch", "pyarrow", "numpy", "davir_ray.api"} & sys.modules.keys()
assert not heavy, heavy
assert not hasattr(davir_ray, "sort")
from davir_ray import score
assert score is davir_ray.score is sys.modules["davir_ray.api"].score
import davir_ray.pipeline, davir_ray.stages.finetune
late = {"torch._dynamo", "torch.distributed.fsdp", "transformers.modeling_utils", "aiohttp"} & sys.modules.keys()
assert not late, late
"""


@pytest.mark.slow
def test_the_api_is_imported_when_it_is_asked_for() -> None:
    """And a driver imports none of what takes seconds and only models, trainings and object stores need."""
    result = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


DRIVER = """
import sys
import davir_ray.pipeline
heavy = {"torch", "ray.train", "matplotlib", "scipy", "transformers.modeling_utils"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_what_only_later_stages_need_is_imported_by_these() -> None:
    result = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


WITHOUT_RAY = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ImportError("ray is blocked")

sys.meta_path.insert(0, Block())
import davir_ray.models.training.loop, davir_ray.models.scorer, davir_ray.data.reader, davir_ray.formulas.order
assert "ray" not in sys.modules
"""


def test_models_and_data_can_be_imported_without_ray() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_RAY], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
