"""Who may import whom. The rules stand in launcher/README.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator

PACKAGES = ("launcher", "trainer", "cluster")
LIBRARIES = ("torch", "transformers", "deepspeed", "ray", "peft", "datasets", "numpy")
HEAVY = frozenset((*LIBRARIES, "accelerate", "bitsandbytes", "safetensors", "tokenizers"))
# The light contracts: what the launcher may know of the other two packages.
LIGHT_TRAINER = frozenset(("spec", "ds_config", "checkpoint_format", "heartbeat", "storage", "disk", "turn_templates"))
# The processes in which Ray runs: the backend starts them by name, and Ray itself imports the last.
RAY_PROCESSES = frozenset(("ray_actors", "ray_driver", "ray_nodes", "ray_room", "ray_worker"))


def is_backend(module: str) -> bool:
    return module.endswith("_backend") or module in RAY_PROCESSES - {"ray_nodes"}


def is_light(path: str) -> bool:
    package, _, file = path.partition("/")
    return package in ("launcher", "cluster") or file.removesuffix(".py") in LIGHT_TRAINER


def imports(tree: ast.AST) -> Iterator[tuple[int, int, str]]:
    """(line, relative level, dotted module or module.name) of every import, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, node.level, f"{node.module}.{alias.name}" if node.module else alias.name


def module_level(tree: ast.Module) -> ast.Module:
    """The tree without function bodies."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    return Strip().visit(ast.parse(ast.unparse(tree)))


def allowed(package: str, target: str) -> bool:
    """Whether a file of `package` may import the dotted `target` of another of our packages."""
    other, _, rest = target.partition(".")
    module = rest.partition(".")[0]
    if package == "benchmarks":
        return other == "cluster" or module == "data"  # how processes end, and in which order rows are trained on
    if package != "launcher":
        return False
    return module in LIGHT_TRAINER if other == "trainer" else other == "cluster" and not is_backend(module)


def test_packages_import_only_along_the_allowed_edges(trees: dict[str, ast.Module]) -> None:
    wrong = []
    for path, tree in trees.items():
        package = path.partition("/")[0]
        for line, level, target in imports(tree):
            other = target.partition(".")[0]
            if level == 0 and other in PACKAGES and other != package and not allowed(package, target):
                wrong.append(f"{path}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_imports_inside_a_package_are_relative(trees: dict[str, ast.Module]) -> None:
    wrong = []
    for path, tree in trees.items():
        package = path.partition("/")[0]
        for line, level, target in imports(tree):
            if level == 0 and target.partition(".")[0] == package:
                wrong.append(f"{path}:{line} imports {target}; write a relative import")
            if level > 1:
                wrong.append(f"{path}:{line} leaves its package by {'.' * level}{target}")
    assert not wrong, "\n".join(wrong)


def test_launcher_and_contracts_never_import_heavy_modules(trees: dict[str, ast.Module]) -> None:
    """Not inside functions either; only a backend may import its own library there."""
    wrong = []
    for path, tree in trees.items():
        if not is_light(path):
            continue
        module = path.rpartition("/")[2].removesuffix(".py")
        searched = module_level(tree) if is_backend(module) or module in RAY_PROCESSES else tree
        for line, _, target in imports(searched):
            if target.partition(".")[0] in HEAVY:
                wrong.append(f"{path}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_light_contracts_lean_only_on_light_files(trees: dict[str, ast.Module]) -> None:
    """What a contract imports from its own package at module level comes along when the launcher imports it."""
    wrong = []
    for path in trees:
        if not (path.startswith("trainer/") and is_light(path)):
            continue
        waiting, seen = [path], set()
        while waiting:
            file = waiting.pop()
            seen.add(file)
            for line, level, target in imports(module_level(trees[file])):
                sibling = f"trainer/{target.partition('.')[0]}.py"
                if level == 1 and sibling in trees and sibling not in seen:
                    waiting.append(sibling)
                if level == 0 and target.partition(".")[0] in HEAVY:
                    wrong.append(f"{path} leads to {file}:{line}, which imports {target}")
    assert not wrong, "\n".join(wrong)


def test_ray_is_imported_only_inside_functions_of_its_processes(trees: dict[str, ast.Module]) -> None:
    wrong = []
    for path, tree in trees.items():
        of_ray = path in {f"cluster/{module}.py" for module in RAY_PROCESSES}
        searched = module_level(tree) if of_ray else tree
        for line, level, target in imports(searched):
            if level == 0 and target.partition(".")[0] == "ray":
                wrong.append(f"{path}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_the_rules_catch_violations() -> None:
    tree = ast.parse("import torch\ndef f():\n    from trainer.train import run\n    import ray\n")
    assert [t for _, _, t in imports(tree)] == ["torch", "trainer.train.run", "ray"]
    assert [t for _, _, t in imports(module_level(tree))] == ["torch"]
    assert allowed("launcher", "trainer.spec.TrainSpec")
    assert allowed("launcher", "cluster.job.JobSpec")
    assert not allowed("launcher", "trainer.train.run")
    assert not allowed("launcher", "cluster.ray_backend.RayBackend")
    assert not allowed("launcher", "cluster.ray_driver.main")
    assert not allowed("cluster", "trainer.spec.TrainSpec")
    assert not allowed("trainer", "launcher.errors.LaunchError")
