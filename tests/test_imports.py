"""Imports point down: the shape of the program, kept by reading its source."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "llmtrain"

# Each module or folder may import those in the lines below its own; a folder's modules also one another.
LAYERS = [
    "__init__ __main__",
    "cli",
    "help suggestions sweep",
    "commands",
    "comparison probe replay conversation",
    "run",
    "trained training",
    "resumption summary",
    "run_config",
    "lint planning",
    "config",
    "stored_config",
    "loop",
    "looks saver",
    "loop_config",
    "checkpoint display evaluate inference offenders report tuning",
    "accumulation activation_checkpointing clipping data hf lora metrics model objective optimizer precision recovery "
    "schedule tokenizer weights",
    "native profiling",
    "memory_timeline run_directory",
    "checks figures format memory readback runtime signals state stopwatch storage",
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}

# Within the line of the groups: who knows another one, and then its contract alone, not an option of it.
CONTRACTS = {
    "activation_checkpointing": "model", "data": "tokenizer", "lora": "model", "objective": "model", "weights": "model",
}  # fmt: skip
OPTIONS = {"hf": {"model", "lora"}, "weights": {"hf"}}  # who knows the options too: names and keys of particular models

HYDRA = {"cli", "config"}
PROCESSES = {"native", "runtime", "sweep"}  # a compiler, git for environment.json, the jobs of a sweep
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "torch.jit.load",
    "torch.hub.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "hydra.utils.instantiate",
    "hydra.utils.call",
}  # fmt: skip
UNSAFE_ARGUMENTS = {"shell", "allow_pickle"}

FILES = sorted(PACKAGE.rglob("*.py"))


def top(path: Path) -> str:
    """The module or folder of the table that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def nodes(path: Path) -> Iterator[ast.AST]:
    """All that is in a file, function bodies included."""
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, dotted; ``from llmtrain import run`` is ``llmtrain.run.run``."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"llmtrain.{alias.name}" for alias in node.names) if module == "llmtrain" else [module]


def points_down(own: str, module: str) -> bool:
    """Whether ``own``, a name of the table, may import ``module``."""
    if not module.startswith("llmtrain.") or module == "llmtrain.__version__":
        return True
    other = module.split(".")[1]
    is_contract = CONTRACTS.get(own) == other and module == f"llmtrain.{other}"
    return own == other or is_contract or other in OPTIONS.get(own, ()) or DEPTH[own] < DEPTH[other]


def test_the_table_is_complete() -> None:
    assert set(DEPTH) == {top(path) for path in FILES}


def test_imports_are_absolute() -> None:
    assert not [path for path in FILES if any(module.startswith(".") for module in imports(path))]


def test_imports_point_down() -> None:
    assert not [(str(path), module) for path in FILES for module in imports(path) if not points_down(top(path), module)]


def test_the_rule_notices() -> None:
    assert not points_down("clipping", "llmtrain.train.loop")
    assert not points_down("optimizer", "llmtrain.model")
    assert not points_down("weights", "llmtrain.model.gpt")
    assert not points_down("evaluate", "llmtrain.inference.generate")
    assert points_down("weights", "llmtrain.model")


def test_only_the_door_knows_hydra() -> None:
    knowing = {top(path) for path in FILES if {"hydra", "omegaconf"} & {m.split(".")[0] for m in imports(path)}}
    assert knowing == HYDRA


def test_few_modules_start_processes() -> None:
    assert {top(path) for path in FILES if "subprocess" in imports(path)} == PROCESSES


def test_nothing_runs_what_it_reads() -> None:
    """A run directory, a checkpoint or a text travels: reading one must never execute it."""
    for path in FILES:
        assert not UNSAFE_MODULES & {module.split(".")[0] for module in imports(path)}, path
        named = {f"{node.module}.{alias.name}" for node in nodes(path) if isinstance(node, ast.ImportFrom)
                 for alias in node.names}  # fmt: skip
        assert not UNSAFE_CALLS & named, f"{path}: {UNSAFE_CALLS & named}"
        for call in (node for node in nodes(path) if isinstance(node, ast.Call)):
            assert ast.unparse(call.func) not in UNSAFE_CALLS, f"{path}:{call.lineno}"
            assert not UNSAFE_ARGUMENTS & {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
