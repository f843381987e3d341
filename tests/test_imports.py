"""Which file may import which: experiments -> deepseek_jax -> {pallas_kernels, sharding}.

Read from the syntax tree, so that an import inside a function counts as one at the top does.
"""

import ast
import builtins
import os
import subprocess
import symtable
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "experiments": {"experiments", "deepseek_jax", "pallas_kernels", "sharding"},
    "deepseek_jax": {"deepseek_jax", "pallas_kernels", "sharding"},
    "pallas_kernels": {"pallas_kernels"},
    "sharding": {"sharding"},
}
# The order of the paper, which is the order of imports: a file imports only files before it.
ORDER = (
    "config configs e5m6 fp8 stored few_rows linear swiglu layers rope latent_cache "
    "attention experts experts_in_place moe residual block mtp model counts loss optimizer "
    "training sampling drafting decoding generate complete_folder tensor_files huggingface_blocks "
    "huggingface_config huggingface_names huggingface_checkpoint huggingface checkpoint"
).split()
# Inside an op folder: reference and hopper may share small files, api chooses between them.
LEVEL = {"reference": 1, "hopper": 1, "api": 2, "__init__": 3}
# Only sharding/ talks between devices.
COLLECTIVES = {
    "all_gather", "all_to_all", "axis_index", "pmax", "pmean", "pmin", "ppermute", "pshuffle",
    "psum", "psum_scatter", "ragged_all_to_all", "shard_map",
}  # fmt: skip
# Imported where they are used, so that training on tokenised shards needs none of them.
LATE = (
    "grain", "huggingface_hub", "matplotlib", "pyarrow", "safetensors", "tokenizers",
    "torch", "transformers", "wandb", "zstandard",
)  # fmt: skip
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name(path: Path) -> str:
    """The path below the root: the id of a test case."""
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """The dotted name of a file; a package is called by its `__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Dotted names of our own files that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(path.relative_to(ROOT).parts[: -node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            found |= {file_of([*base, alias.name]) for alias in node.names}
    return found - {None}


def file_of(parts: list[str]) -> str | None:
    """The file that an imported dotted name is read from, None when it is not one of ours."""
    if parts[0] not in MAY_IMPORT:
        return None
    while parts and not (ROOT / Path(*parts)).with_suffix(".py").is_file():
        if (ROOT / Path(*parts)).is_dir():
            return ".".join([*parts, "__init__"])
        parts = parts[:-1]
    return ".".join(parts)


def collectives_of(path: Path) -> set[str]:
    """Names of collectives that a file imports or calls as an attribute of a jax module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).startswith("jax"):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
            found |= {alias.name for alias in node.names}
    return found & COLLECTIVES


def run_fresh(code: str) -> subprocess.CompletedProcess:
    """What a fresh interpreter makes of the code, with the repository on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, text=True, capture_output=True)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_package_imports_only_what_lies_below_it(path):
    package = path.relative_to(ROOT).parts[0]
    above = {m for m in imports_of(path) if m.partition(".")[0] not in MAY_IMPORT[package]}
    assert not above, f"{name(path)} imports {above}; {package} may import {MAY_IMPORT[package]}"


def test_every_model_file_has_its_place_in_the_order():
    files = {path.stem for path in (ROOT / "deepseek_jax").glob("*.py")} - {"__init__"}
    assert not files - set(ORDER), "give each new file its place in ORDER, where the paper has it"


@pytest.mark.parametrize("path", sorted((ROOT / "deepseek_jax").glob("*.py")), ids=name)
def test_model_files_import_in_the_order_of_the_paper(path):
    inside = {m.split(".")[1] for m in imports_of(path) if m.startswith("deepseek_jax.")}
    if path.stem == "__init__":
        return
    assert path.stem in ORDER, f"give {path.stem} its place in ORDER, where the paper has it"
    allowed = set(ORDER[: ORDER.index(path.stem)])
    assert not inside - allowed, f"{path.stem} imports {inside - allowed}, which come after it"


@pytest.mark.parametrize("path", sorted((ROOT / "pallas_kernels").glob("*/*.py")), ids=name)
def test_op_files_import_api_then_kernels_then_mosaic(path):
    op, level = path.parent.name, LEVEL.get(path.stem, 0)
    for module in imports_of(path) - {"pallas_kernels.__init__"}:
        _, *parts = module.split(".")
        if len(parts) == 1:
            plain = parts[0] in ("rounding", "products") or path.stem != "reference"
            assert plain, "a reference imports nothing of the kernels' machinery"
        elif parts[0] == op:
            imported = LEVEL.get(parts[-1], 0)
            assert imported <= level, f"{name(path)} imports {module}, which lies above it"
            same = imported == level == LEVEL["hopper"]
            assert not same, f"{name(path)} imports {module}: reference and kernel stay independent"
        else:
            reaches_api = level >= LEVEL["api"] and parts[-1] in ("api", "__init__")
            assert reaches_api, f"{name(path)} imports {module}: ops meet at their api only"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_sharding_communicates(path):
    if path.relative_to(ROOT).parts[0] != "sharding":
        assert not collectives_of(path), f"{name(path)} communicates; that belongs to sharding/"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name)
def test_a_file_says_what_it_is_in_ascii(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{name(path)} does not begin with a docstring"
    assert text.startswith(('"""', 'r"""')), f"{name(path)} does not begin with its docstring"
    assert text.isascii(), f"{name(path)} holds {set(c for c in text if ord(c) > 127)}"


LIGHT = [
    module
    for module in (
        "deepseek_jax",
        "sharding",
        "pallas_kernels",
        "experiments.__main__",
        "experiments.recipes",
        "experiments.train",
        "experiments.launch",
        "experiments.report",
        "experiments.bench.train",
    )
    if list(ROOT.glob(f"{module.replace('.', '/')}*"))
]


def test_importing_needs_no_library_that_only_some_runs_need():
    without = f"import importlib, sys; sys.modules.update(dict.fromkeys({LATE}))"
    done = run_fresh(f"{without}; [importlib.import_module(name) for name in {LIGHT}]")
    assert done.returncode == 0, f"{LIGHT} need one of {LATE} to be imported:\n{done.stderr}"


def test_the_command_line_answers_without_loading_jax():
    done = run_fresh("import experiments.__main__, sys; print('jax' in sys.modules)")
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def tables_in(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """The names of a module and of everything defined in it."""
    yield table
    for child in table.get_children():
        yield from tables_in(child)


def test_every_name_is_defined():
    # ruff is not asked: to it, the shapes of jaxtyping are undefined names.
    undefined = {}
    for path in SOURCES + TESTS:
        module = symtable.symtable(path.read_text(), str(path), "exec")
        known = {*dir(builtins), "__file__"}
        known |= {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
        used = {
            s.get_name()
            for table in tables_in(module)
            for s in table.get_symbols()
            if s.is_global() and s.is_referenced()
        }
        undefined |= {name(path): used - known} if used - known else {}
    assert not undefined
