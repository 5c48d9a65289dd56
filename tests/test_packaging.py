"""What is installed, and what is imported before it is needed."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_is_packaged() -> None:
    folders = {init.parent.relative_to(ROOT) for init in (ROOT / "llmtrain").rglob("__init__.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"llmtrain.conf", "llmtrain.samples"}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(expected)


def test_every_module_is_in_a_package() -> None:
    assert not [path for path in (ROOT / "llmtrain").rglob("*.py") if not (path.parent / "__init__.py").exists()]


@pytest.mark.slow
def test_the_wheel_holds_every_file_the_program_reads(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: building leaves a folder behind, and takes what an older one left
    for name in ("llmtrain", "conf", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("llmtrain-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "llmtrain = llmtrain.__main__:run" in archive.read(entry_points).decode()
        licences = [name for name in archive.namelist() if "/licenses/" in name]
    code = {str(path.relative_to(source)) for path in (source / "llmtrain").rglob("*") if path.is_file()}
    conf = {f"llmtrain/{path.relative_to(source)}" for path in (source / "conf").rglob("*") if path.is_file()}
    samples = {f"llmtrain/samples/{path.name}" for path in (source / "data").iterdir()}
    assert shipped == code | conf | samples
    assert {"llmtrain/tokenizer/gpt2.tiktoken", "llmtrain/tokenizer/python4096.tiktoken"} <= shipped
    assert "llmtrain/conf/model/gpt124m.yaml" in shipped
    assert {Path(name).name for name in licences} == {"LICENSE", "gpt2.LICENSE"}


@pytest.mark.parametrize(
    ("arguments", "not_imported"),
    [
        (["--help"], {"hydra", "omegaconf", "torch", "numpy"}),
        (["train", "--cfg", "job", "model=tiny"], {"torch", "numpy", "matplotlib"}),
        (["train", "--help"], {"torch", "numpy", "matplotlib"}),
    ],
    ids=["help", "cfg", "verb_help"],
)
def test_commands_that_only_show_import_no_torch(tmp_path: Path, arguments: list[str], not_imported: set[str]) -> None:
    program = (
        "import sys\n"
        "from llmtrain.cli.main import main\n"
        f"main({arguments!r})\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = set(done.stderr.split())
    assert "llmtrain" in imported
    assert not imported & not_imported
    assert list(tmp_path.iterdir()) == []


def test_inference_imports_no_compiler(tmp_path: Path) -> None:
    """Which takes a second: a short answer must not take longer than torch itself."""
    quick = ("model=tiny", "tokenizer=byte", "data.sequence_length=32", "loop.max_steps=1", "loop.eval_every=0")
    program = (
        "import sys\n"
        "from llmtrain.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )

    def imported(*arguments: str) -> set[str]:
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return set(done.stderr.splitlines()[-1].split())

    imported("train", *quick, "run_dir=run")
    found = imported("generate", "run", "max_tokens=2")
    assert "torch" in found
    assert not found & {"torch._dynamo", "torch._inductor", "sympy", "matplotlib"}
