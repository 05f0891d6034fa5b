"""Size limits, docstrings, names, and calls that must never appear."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
# "path::function" or "path" -> why it may be longer.
LONGER: dict[str, str] = {}
# Files in which every exception may be caught -> why.
PROCESS_BORDERS = {
    "launcher/cli.py": "the launcher's border: an unexpected exception becomes exit code 70",
    "trainer/worker.py": "the worker's border: the first cause is written to a file before the process ends",
    "trainer/row_map.py": "a function of the user's own: whatever it raises is told with its line and the row",
    "trainer/storage.py": "the clients of buckets share no base class: whatever they raise becomes one clear error",
    "cluster/node_agent.py": "the border of a host: the launcher shows the person what went wrong there, with the host's name",
    "cluster/ray_driver.py": "the border of a job under Ray: whatever Ray raises, what the workers left says more",
    "cluster/debug_backend.py": "the same border, for a worker that runs in this process",
}
FORBIDDEN_NAMES = frozenset(("utils", "util", "helpers", "helper", "common", "misc"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def num_lines(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_functions_fit_on_a_screen(trees: dict[str, ast.Module]) -> None:
    long = [
        f"{path}:{node.lineno} {node.name} has {num_lines(node)} lines"
        for path, tree in trees.items()
        for node in functions(tree)
        if num_lines(node) > MAX_FUNCTION_LINES and f"{path}::{node.name}" not in LONGER
    ]
    assert not long, "\n".join(long)


def test_files_fit_in_one_sitting(sources: dict[str, str]) -> None:
    lengths = {path: text.count("\n") for path, text in sources.items()}
    long = [f"{path} has {n} lines" for path, n in lengths.items() if n > MAX_FILE_LINES and path not in LONGER]
    assert not long, "\n".join(long)


def test_init_files_hold_a_docstring_and_nothing_else(trees: dict[str, ast.Module]) -> None:
    for package in ("launcher", "trainer", "cluster"):
        assert f"{package}/__init__.py" in trees
    for path, tree in trees.items():
        if path.endswith("__init__.py"):
            assert ast.get_docstring(tree), f"{path} has no docstring"
            assert len(tree.body) == 1, f"{path} holds more than its docstring"


def is_documented(node: ast.AST) -> bool:
    """It has a docstring, or (a class of plain fields) at least one field has."""
    assert isinstance(node, Function | ast.ClassDef)
    fields = isinstance(node, ast.ClassDef) and any(
        isinstance(before, ast.AnnAssign | ast.Assign) and isinstance(after, ast.Expr)
        for before, after in itertools.pairwise(node.body)
    )
    return bool(ast.get_docstring(node)) or fields


def test_every_module_and_public_name_is_documented(trees: dict[str, ast.Module]) -> None:
    missing = []
    for path, tree in trees.items():
        if not ast.get_docstring(tree):
            missing.append(f"{path}: the module")
        for node in tree.body:
            public = isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
            if public and not is_documented(node):
                missing.append(f"{path}:{node.lineno} {node.name}")
    assert not missing, "no docstring:\n" + "\n".join(missing)


def test_every_argument_is_annotated(trees: dict[str, ast.Module]) -> None:
    missing = []
    for path, tree in trees.items():
        for node in functions(tree):
            a = node.args
            named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x)]
            bare = [x.arg for x in named if x.annotation is None and x.arg not in ("self", "cls")]
            if bare or (node.returns is None and node.name != "__init__"):
                missing.append(f"{path}:{node.lineno} {node.name}({', '.join(bare)})")
    assert not missing, "not annotated:\n" + "\n".join(missing)


def test_no_file_or_folder_is_a_drawer(root: Path) -> None:
    folders = [root / name for name in ("launcher", "trainer", "cluster", "recipes", "tests", "docs", "benchmarks")]
    found = [p for folder in folders for p in folder.rglob("*") if p.stem.lower() in FORBIDDEN_NAMES]
    assert not found, f"name what they do: {found}"


def forbidden_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: k.value for k in node.keywords}
        if name == "torch.load" and not _is_true(keywords.get("weights_only")):
            yield node.lineno, "torch.load without weights_only=True"
        if name in ("pickle.load", "pickle.loads", "dill.load", "dill.loads", "joblib.load"):
            yield node.lineno, f"{name} runs code from a file"
        if name in ("os.system", "os.popen") or _is_true(keywords.get("shell")):
            yield node.lineno, f"{name} goes through a shell"


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def kill_by_name(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """pkill and killall in any string that is not a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if is_text and re.search(r"\b(pkill|killall)\b", str(node.value)):
            yield node.lineno, "kills processes by name"


def broad_excepts(tree: ast.AST) -> Iterator[int]:
    """Handlers that swallow everything; one that cleans up and ends in a bare `raise` swallows nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            last = node.body[-1]
            passes_on = isinstance(last, ast.Raise) and last.exc is None
            caught = "BaseException" if node.type is None else ast.unparse(node.type)
            if re.search(r"\b(Base)?Exception\b", caught) and not passes_on:
                yield node.lineno


def test_no_call_that_runs_foreign_code_or_kills_by_name(trees: dict[str, ast.Module]) -> None:
    found = [
        f"{path}:{line} {what}"
        for path, tree in trees.items()
        for line, what in (*forbidden_calls(tree), *kill_by_name(tree))
    ]
    assert not found, "\n".join(found)


def test_every_exception_is_caught_only_at_the_process_borders(trees: dict[str, ast.Module]) -> None:
    found = [
        f"{path}:{line}" for path, tree in trees.items() if path not in PROCESS_BORDERS for line in broad_excepts(tree)
    ]
    assert not found, "broad except:\n" + "\n".join(found)


def test_the_rules_catch_violations() -> None:
    bad = ast.parse(
        "import torch\ntorch.load(p)\ntorch.load(p, weights_only=False)\npickle.loads(b)\n"
        "subprocess.run(c, shell=True)\nos.system('x')\ncommand = ['pkill', '-f', 'x']\n"
        "try:\n    pass\nexcept (ValueError, Exception):\n    pass\n"
        "try:\n    pass\nexcept BaseException:\n    clean()\n    raise\n"
    )
    assert [line for line, _ in forbidden_calls(bad)] == [2, 3, 4, 5, 6]
    assert [line for line, _ in kill_by_name(bad)] == [7]
    assert list(broad_excepts(bad)) == [10]
    good = ast.parse(
        '"""never pkill"""\ntorch.load(p, weights_only=True)\ntry:\n    pass\nexcept ImportError:\n    pass\n'
    )
    assert not [*forbidden_calls(good), *kill_by_name(good), *broad_excepts(good)]


def test_training_sends_no_large_objects_between_ranks(trees: dict[str, ast.Module]) -> None:
    """Gloo copies them in threads of its own that start OpenMP teams, which slows every later step by half."""
    allowed = {("trainer/checkpoint.py", "broadcast_object_list")}
    names = {"all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list"}
    found = {
        (path, node.attr)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in names
    }
    assert found <= allowed
