"""Facts about who may import whom: strictly downwards, and no torch below the models."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import polyground

ROOT = Path(polyground.__file__).parent

HEIGHTS = {
    "__init__": -2,
    "errors": -1,
    "extras": -1,
    "geometry": 0,
    "answer": 1,
    "records": 2,
    "config": 3,
    "conventions": 3,
    "imagefile": 3,
    "storage": 3,
    "charts": 4,
    "completion": 4,
    "detection": 4,
    "memory": 4,
    "metrics": 4,
    "prompts": 4,
    "rewards": 4,
    "runs": 4,
    "shards": 4,
    "sources": 4,
    "splits": 4,
    "teaching": 4,
    "vision": 4,
    "worlds": 4,
    "benchmarks": 5,
    "cards": 5,
    "exports": 5,
    "losses": 5,
    "models": 5,
    "predictions": 5,
    "tokens": 5,
    "batches": 6,
    "lmms_eval": 6,
    "sampling": 6,
    "grounder": 7,
    "rollout": 7,
    "curation": 8,
    "outcomes": 8,
    "training": 8,
    "stages": 9,
    "demo": 10,
    "app": 11,
    "cli": 12,
    "__main__": 13,
}
"""The table of CONTRIBUTING.md. `errors`, which everything may raise, is at the bottom; trainers learn from groups, so
`training` stands above `rollout`."""

MODELS = HEIGHTS["models"]
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "trl", "openai", "gradio"}
ON_DEMAND = {("sources", "hub"): {"datasets"}}
"""What a light module imports inside the functions that need it, and never when it is imported itself."""


def parts_of(path: Path) -> tuple[str, ...]:
    """`("sources", "mig_bench")` for src/polyground/sources/mig_bench.py."""
    return path.relative_to(ROOT).with_suffix("").parts


SOURCES = {parts_of(path): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = pytest.mark.parametrize("module", SOURCES, ids=".".join)


def imports(module: tuple[str, ...], *, top_level: bool) -> Iterator[tuple[str, ...]]:
    """Dotted names a module imports, split at the dots; with `top_level`, only what importing it runs."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    for node in run_on_import(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ("polyground", *module[: len(module) - node.level]) if node.level else ()
            base = (*base, *(node.module or "").split(".")) if node.module else base
            yield from ((*base, alias.name) for alias in node.names)


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported: neither function bodies nor `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from run_on_import(child)


def polyground_imports(module: tuple[str, ...], *, top_level: bool) -> Iterator[tuple[str, ...]]:
    """As `imports`, of this package only and without its name."""
    for name in imports(module, top_level=top_level):
        if name[0] == "polyground" and len(name) > 1:
            yield name[1:] if name[1] in HEIGHTS else ("__init__",)


@MODULES
def test_every_module_has_a_height(module: tuple[str, ...]) -> None:
    assert module[0] in HEIGHTS, f"give {module[0]!r} a height in DESIGN.md and in this test"


@MODULES
def test_imports_point_strictly_downwards(module: tuple[str, ...]) -> None:
    top = module[0]
    upward = [
        ".".join(name)
        # The front door, `polyground.load`, reaches for what it opens when it is called.
        for name in polyground_imports(module, top_level=module == ("__init__",))
        if name[0] != top and HEIGHTS[name[0]] >= HEIGHTS[top]
    ]
    assert upward == []


@MODULES
def test_no_heavy_library_is_imported_at_module_level_below_the_models(module: tuple[str, ...]) -> None:
    if HEIGHTS[module[0]] < MODELS:
        assert sorted({name[0] for name in imports(module, top_level=True)} & HEAVY) == []
        on_demand = {name[0] for name in imports(module, top_level=False)} & HEAVY
        assert on_demand <= ON_DEMAND.get(module, set())


@pytest.mark.parametrize(
    "module", [module for module in SOURCES if module[0] in {"stages", "demo", "cli", "__main__"}], ids=".".join
)
def test_the_command_line_reaches_its_verbs_without_torch(module: tuple[str, ...]) -> None:
    if module[0] in {"cli", "__main__"} or module == ("stages", "__init__"):
        assert sorted({name[0] for name in imports(module, top_level=True)} & HEAVY) == []


@pytest.mark.parametrize("module", [module for module in SOURCES if module[0] == "stages"], ids=".".join)
def test_stages_meet_through_folders_and_not_through_imports(module: tuple[str, ...]) -> None:
    others = {name[1] for name in polyground_imports(module, top_level=False) if name[0] == "stages" and len(name) > 1}
    others &= {stage[1] for stage in SOURCES if stage[0] == "stages"} - {"__init__", *module[1:]}
    if module == ("stages", "run"):
        # The one stage above the others; lazily, so that a plan is shown without loading torch.
        others = {
            name[1] for name in polyground_imports(module, top_level=True) if name[0] == "stages" and len(name) > 1
        } & others
    assert others == set()


def test_rewards_and_models_never_meet() -> None:
    for module in SOURCES:
        named = {name[0] for name in polyground_imports(module, top_level=False)}
        if module[0] == "rewards":
            assert "models" not in named
        if module[0] == "models":
            assert "rewards" not in named
