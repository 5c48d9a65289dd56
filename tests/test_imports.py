"""Imports point down: the shape of the program, kept by reading its source."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "llmtrain"

# A module imports from lines below its own, and from its own folder.
LAYERS = [
    "cli commands",
    "sweep verify",
    "run",
    "lint plan report",
    "config",
    "train",
    "checkpoint display distributed evaluation inference weights",
    "accumulation activation_checkpointing clipping data hf kernels lora metrics model objective optimizer precision "
    "recovery schedule tokenizer",
    "base",
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}
DEPTH |= {"__init__": -1, "__main__": -1}  # the two entrances

# Within a line: who knows another folder's contract, the names of its ``__init__``, and no option of it …
CONTRACTS = {
    "activation_checkpointing": {"model"}, "data": {"tokenizer"}, "lora": {"model"}, "objective": {"data", "model"},
    "hf": {"objective"},
}  # fmt: skip
# … and who knows all of it: names and keys of particular models, kernels, a run's checkpoints.
MODULES = {
    "hf": {"model", "lora", "tokenizer"}, "model": {"kernels"}, "objective": {"kernels"}, "weights": {"checkpoint"},
}  # fmt: skip

HYDRA = {"cli", "config"}
# chat templates, the ranks of a run, a compiler, git for environment.json, jobs of a sweep
PROCESSES = {"data", "distributed", "kernels", "run", "sweep"}
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
    is_contract = other in CONTRACTS.get(own, ()) and module == f"llmtrain.{other}"
    return own == other or is_contract or other in MODULES.get(own, ()) or DEPTH[own] < DEPTH[other]


def test_every_module_has_a_layer() -> None:
    assert set(DEPTH) == {top(path) for path in FILES}


def test_imports_are_absolute() -> None:
    assert not [path for path in FILES if any(module.startswith(".") for module in imports(path))]


def test_imports_point_to_lower_layers() -> None:
    assert not [(str(path), module) for path in FILES for module in imports(path) if not points_down(top(path), module)]


def test_imports_of_higher_layers_are_found() -> None:
    assert not points_down("clipping", "llmtrain.train.loop")
    assert not points_down("optimizer", "llmtrain.model")
    assert not points_down("lora", "llmtrain.model.gpt")
    assert not points_down("evaluation", "llmtrain.inference.generate")
    assert points_down("lora", "llmtrain.model")


def test_only_cli_and_config_import_hydra() -> None:
    knowing = {top(path) for path in FILES if {"hydra", "omegaconf"} & {m.split(".")[0] for m in imports(path)}}
    assert knowing == HYDRA


def test_few_modules_start_processes() -> None:
    assert {top(path) for path in FILES if "subprocess" in imports(path)} == PROCESSES


def test_no_module_can_run_the_files_it_reads() -> None:
    """A run directory, a checkpoint or a text travels: reading one must never execute it."""
    for path in FILES:
        assert not UNSAFE_MODULES & {module.split(".")[0] for module in imports(path)}, path
        named = {f"{node.module}.{alias.name}" for node in nodes(path) if isinstance(node, ast.ImportFrom)
                 for alias in node.names}  # fmt: skip
        assert not UNSAFE_CALLS & named, f"{path}: {UNSAFE_CALLS & named}"
        for call in (node for node in nodes(path) if isinstance(node, ast.Call)):
            assert ast.unparse(call.func) not in UNSAFE_CALLS, f"{path}:{call.lineno}"
            assert not UNSAFE_ARGUMENTS & {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
