"""The pages: their commands work, their links lead somewhere, and what they say of the code is so.

A block of commands in a page is composed by this test; one behind the comment ``<!-- test: run … -->`` is executed, in
the order of the page and in one folder for the whole page.  The words of the comment shrink it: ``key=value`` is added
to each ``train``, ``plan`` and ``generate``, ``one=>other`` replaces text.  ``<!-- test: file PATH -->`` writes a block
to a file, ``<!-- test: python -->`` executes it.  Runs that a page names stand for a tiny one of four steps.
"""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from llmtrain import Run
from llmtrain.cli.arguments import FROM, VERBS, split
from llmtrain.cli.main import main
from tests.helpers.cli import TINY, llmtrain
from tests.test_imports import LAYERS

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data/README.md", ROOT / "benchmarks/README.md"])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
HELP = {"-h", "--help", "-sc"}
EXAMPLES = {"key", "group", "file", "halving", "stored"}  # no keys and options of ours, but in examples
ARGUMENTS = {"step", "checkpoint.step"}  # of `resume`, beside the keys
PEERS_FILES = {"train.py", "pretrain.py"}
FILE_ENDINGS = {"jsonl", "json", "yaml", "py", "model"}
SHRUNK = ("train", "plan", "generate")  # the verbs that a marker's overrides are added to


@dataclass(frozen=True)
class Block:
    """A block of a page: its lines without their indentation, and the words of the marker before it."""

    lines: list[str]
    marker: list[str]
    line: int

    @property
    def commands(self) -> Iterator[list[str]]:
        """The words of each command of this program; other lines are output, or are none of ours."""
        for line in re.sub(r"\\\n\s*", "", "\n".join(self.lines)).splitlines():
            words = line.removeprefix("$ ").removeprefix(".venv/bin/")
            if not words.startswith("llmtrain "):
                continue
            if "…" not in words.split(" #")[0]:
                yield shlex.split(words, comments=True)[1:]


def blocks(page: Path) -> Iterator[Block]:
    """The code blocks of a page, fenced or indented by four."""
    marker: list[str] = []
    lines: list[str] = []
    fence = None
    text = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate([*text, ""], start=1):
        comment = re.fullmatch(r"<!-- test: (.*) -->", line)
        if line.startswith("```"):
            if fence is not None:
                yield Block(lines, marker, number)
                marker = []
            lines, fence = [], (line if fence is None else None)
        elif fence is not None or (line.startswith("    ") and (lines or not text[number - 2].strip())):
            lines.append(line if fence is not None else line[4:])
        elif comment:
            marker = shlex.split(comment[1])
        elif lines:
            yield Block(lines, marker, number)
            lines, marker = [], []
    assert not marker, f"{page.name}: a marker without a block: {marker}"


def prose(page: Path) -> str:
    """A page without its blocks and comments."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("    ", "<!--")))


def keys_of(value: object, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a tree of dictionaries."""
    for key, below in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}{key}"
        yield from keys_of(below, f"{prefix}{key}.")


def known_keys() -> set[str]:
    """Every key that some option has, and every group."""
    groups = [path for path in CONF.iterdir() if path.is_dir() and path.name not in ("__pycache__", "experiment")]
    known = {"experiment", "hydra.sweep.dir", *(group.name for group in groups)}
    for path in CONF.glob("*.yaml"):
        known.update(keys_of(yaml.safe_load(path.read_text(encoding="utf-8"))))
    for group in groups:
        for path in group.glob("*.yaml"):
            known.update(keys_of(yaml.safe_load(path.read_text(encoding="utf-8")), f"{group.name}."))
    return known


def anchors(page: Path) -> set[str]:
    """What its headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at two and four.  To be copied, not touched."""
    settings = ("loop.max_steps=4", "loop.eval_every=4", "checkpoint.every_steps=2", "checkpoint.keep_last=0")
    run_dir = tmp_path_factory.mktemp("docs") / "run"
    return Run.compose(*TINY, *settings, f"run_dir={run_dir}").train().run_dir


def provide_run(words: list[str], stored: Path) -> None:
    """Put a run where the command expects one and no earlier command of the page has made it."""
    verb, *rest = words
    if verb == "plan" or HELP & set(rest):
        return
    flags, targets, _ = split(verb, rest)
    origins = [Path(flag.removeprefix(f"{FROM}=")) for flag in flags if flag.startswith(f"{FROM}=")]
    for target in [*targets, *origins]:
        run_dir = Path(*target.parts[: target.parts.index("checkpoints")]) if "checkpoints" in target.parts else target
        if not run_dir.exists():
            shutil.copytree(stored, run_dir)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_compose(
    page: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every verb, group, option and key of a page's commands exists, and Hydra accepts their values."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.marker[:1] == ["file"]:
            write(block)
        for words in block.commands:
            if HELP & set(words) or words[0] == "VERB":
                continue
            assert words[0] in VERBS, f"{page.name}:{block.line}: {words}"
            provide_run(words, stored)
            for job in jobs(words):
                status = main([*job, *([] if "--cfg" in job else ["--cfg", "job"])])
                assert status == 0, f"{page.name}:{block.line}: llmtrain {shlex.join(job)}\n{capfd.readouterr().err}"


def jobs(words: list[str]) -> list[list[str]]:
    """The commands of a sweep; another command alone."""
    if "-m" not in words:
        return [words]
    values = [word.partition("=") for word in words if word != "-m"]
    return [list(job) for job in itertools.product(*([f"{key}{sign}{one}" for one in value.split(",")]
                                                      for key, sign, value in values))]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- test: run" in page.read_text(encoding="utf-8")],
                         ids=lambda page: page.name)  # fmt: skip
def test_marked_commands_run(page: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "data", "data")
    for block in blocks(page):
        kind, *changes = block.marker or ["compose"]
        if kind == "file":
            write(block)
        elif kind == "python":
            script = "import os\n" + "\n".join(block.lines)
            subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, timeout=300)
        elif kind == "run":
            run(block, changes, stored, tmp_path, f"{page.name}:{block.line}")
        else:
            assert kind == "compose", f"{page.name}:{block.line}: {block.marker}"


def run(block: Block, changes: list[str], stored: Path, folder: Path, place: str) -> None:
    """Execute the commands of a block, shrunk by the words of its marker."""
    replaced = [change.split("=>", 1) for change in changes if "=>" in change]
    added = [change for change in changes if "=>" not in change]
    text = "\n".join(block.lines)
    for one, other in replaced:
        assert one in text, f"{place}: {one} is not in the block"
        text = text.replace(one, other)
    commands = list(Block(text.splitlines(), [], block.line).commands)
    assert commands, f"{place}: a marker without a command"
    for words in commands:
        provide_run(words, stored)
        extra = added if words[0] in SHRUNK and not HELP & set(words) and "--cfg" not in words else []
        done = llmtrain(*words, *extra, cwd=folder, check=None)
        assert done.returncode == 0, f"{place}: llmtrain {shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def write(block: Block) -> None:
    """Write the file that a block shows, beside an empty ``__init__.py`` if it is Python."""
    path = Path(block.marker[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(block.lines) + "\n", encoding="utf-8")
    if path.suffix == ".py":
        (path.parent / "__init__.py").touch()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_other_commands_exist(page: Path) -> None:
    """Targets of ``make``, extras of ``pip install``, modules of ``python -m``."""
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(re.findall(r"(?:^    |`)make ([a-z]+)", text, flags=re.M)) <= targets
    assert set(re.findall(r"(?:'\.|llmtrain)\[(\w+)\]", text)) <= set(project["optional-dependencies"])
    for module in re.findall(r"python -m (\w+)", text):
        assert module in ("pip", "pytest", "venv") or (ROOT / module).is_dir(), module


# --- names in the text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_keys_in_the_text_exist(page: Path) -> None:
    """``key=value`` and ``group.key`` between backticks, and the options of groups."""
    known = known_keys()
    leaves = {key.rpartition(".")[2] for key in known}
    for code in re.findall(r"`([^`\n(]+)`", prose(page)):
        for key, value in re.findall(r"(?:^| |')([a-z_]+(?:\.[a-z_]+)*)=(?!=)(\S*)", code):
            if key not in EXAMPLES | ARGUMENTS:
                assert key in (leaves if "." not in key else known), f"{page.name}: `{code}`"
            if (CONF / key).is_dir() and re.fullmatch(r"[a-z]\w*", value) and value not in EXAMPLES:
                assert (CONF / key / f"{value}.yaml").exists(), f"{page.name}: `{code}`"
        group, _, key = code.partition(".")
        if (
            group
            and (CONF / group).is_dir()
            and code not in ARGUMENTS
            and re.fullmatch(r"[a-z_]+", key)
            and key not in FILE_ENDINGS
        ):
            assert code in known, f"{page.name}: `{code}`"


def is_file(name: str) -> bool:
    """Whether some file or folder of the project ends with this path."""
    name = name.rstrip("/")
    if (ROOT / name).exists():
        return True
    folders = [ROOT / folder for folder in ("llmtrain", "conf", "docs", "tests", "benchmarks")]
    return any(str(path).endswith(f"/{name}") for folder in folders for path in folder.rglob(Path(name).name))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_in_the_text_exist(page: Path) -> None:
    """Paths of the project, and names of modules."""
    first = r"(?:llmtrain|conf|docs|tests|data|benchmarks|config|train|run|checkpoint|kernels|lora|lint|cli|hf|model)"
    for path in re.findall(rf"`({first}/[\w./-]*|\w+\.(?:py|cpp))`", prose(page)):
        if "halving" not in path and path not in PEERS_FILES:
            assert is_file(path), f"{page.name}: `{path}`"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(other), f"{page.name}: {target}"


# --- what the pages say of the code -----------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_readme_lists_every_verb_group_and_option() -> None:
    rows = re.findall(r"^\| `([^|]*)` \| ([^|]*) \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    cells = {key: re.findall(r"[\w*]+", text.replace("none;", "")) for key, text in rows}
    assert {key.split()[0] for key in cells} >= set(VERBS)
    defaults = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    for group, default in (entry.popitem() for entry in defaults if isinstance(entry, dict)):
        options = {path.stem for path in (CONF / group).glob("*.yaml")}
        listed = cells[group]
        assert default is None or listed[0] == default, f"{group}: {listed[0]} is not the default"
        stars = tuple(name.removesuffix("*") for name in listed if name.endswith("*"))
        assert {name for name in listed if not name.endswith("*")} <= options, group
        assert {name for name in options if not (stars and name.startswith(stars))} <= set(listed), group


def architecture(heading: str) -> list[str]:
    """The lines of the first block below a heading of docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split(f"\n## {heading}\n\n")[1]
    lines = text.split("\n\n")[0].splitlines()
    assert all(line.startswith("    ") for line in lines)
    return [line[4:] for line in lines]


def test_the_tree_is_that_of_the_code() -> None:
    shown: list[str] = []
    parents: list[str] = []
    for line in architecture("The tree"):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        assert name.endswith("/"), line
        parents = [*parents[:depth], name.rstrip("/")]
        shown.append("/".join(parents))
    packages = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "llmtrain").rglob("__init__.py")}
    assert {name for name in shown if name.split("/")[0] == "llmtrain"} == packages
    assert all((ROOT / name).is_dir() for name in shown)


def test_the_layers_are_those_of_the_imports() -> None:
    assert [line.split() for line in architecture("Layers")] == [names.split() for names in LAYERS]


def test_figures_are_those_of_the_results() -> None:
    """The tokens a second in the README's table stand in the results that it links to."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    table = page.split("## Beside its peers")[1].split("\n\n")[2]
    results = ROOT / "benchmarks/results"
    training = json.loads((results / "2026-11-27-training-cpu.json").read_text(encoding="utf-8"))
    assert training
    text = (results / "2026-11-27-training-cpu.md").read_text(encoding="utf-8")
    for mode, row in (
        ("bf16-compiled", "bf16, compiled"),
        ("bf16", "training in bf16:"),
        ("fp32", "training in fp32:"),
    ):
        (line,) = (line for line in table.splitlines() if row in line)
        for contestant in ("llmtrain", "nanogpt", "hf_trainer"):
            (figure,) = re.findall(rf"^\| {mode} \| {contestant} \| ([\d,]+) \|", text, flags=re.M)
            assert figure in line, f"{row}, {contestant}: {figure}"
