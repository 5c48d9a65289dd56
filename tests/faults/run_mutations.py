"""The mutations of the fuzzer of run directories: each one is a function of the run's folder and of chance."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

OUTSIDE = "outside"  # beside the working directory: what nothing may change
Mutation = Callable[[Path, random.Random], None]

HUGE = 10**400
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 5, 7, 1e9, -0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64,
    -(2**63), HUGE, "", " ", "x", "nan", "inf", "0", "../x", "/dev/zero", "/", "\x00", "\x1b[31m", "\ud800", "ü" * 3,
    "x" * 100_000, [], {}, [[]], [None], [1, 2], ["x"], {"x": 1}, {"_target_": "os.system", "command": "touch obeyed"},
    {"_target_": "llmtrain.tokenizer.byte.Byte"}, "llmtrain.tokenizer.byte.Byte", "llmtrain.model.gpt.GPTConfig",
    "${oc.env:HOME}", "${name}", "???", "<redacted>",
)  # fmt: skip
TEXTS = (
    "", "\n", "\x00", "\x00" * 5000, "{", "[]", "{}", "null", "3", '"x"', "[1,2]", "NaN", "{]", "\ufeff{}",
    "- a\n- b\n",
    "a: &a [*a]\n", "!!python/object/apply:os.system ['touch obeyed']\n", "a: 1\na: 2\n", '{"step": 1, "step": 2}\n',
    '{"step": 1}', "[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "9" * 10_000,
    "a: " + "9" * 10_000 + "\n", "a: 2026-13-45\n", "a: 0x" + "f" * 9000 + "\n", "? [a]\n: 1\n", "a: !!binary x\n",
    "a: !!set {b}\n", "a: &x [1]\nb: [*x,*x]\n" + "".join(f"c{i}: &c{i} [{','.join(['*x'] * 9)}]\n" for i in range(3)),
    "a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
)  # fmt: skip
PLACES = (
    "data.cache_dir",
    "output_dir",
    "run_dir",
    "data.path",
    "weights.path",
    "tokenizer.path",
    "tokenizer.encoding",
)


def files_of(run: Path, chance: random.Random) -> Path:
    """A file of the run; those that are read most are chosen most often."""
    found = sorted(path for path in run.rglob("*") if _is_small(path))  # and not what was stretched before
    top = [path for path in found if path.parent == run and path.suffix in (".json", ".jsonl", ".yaml")]
    return chance.choice(top if top and chance.random() < 0.5 else found) if found else run / "config.yaml"


def flip(run: Path, chance: random.Random) -> None:
    """A bit of a file, or several."""
    path = files_of(run, chance)
    content = bytearray(path.read_bytes()) if path.exists() else bytearray()
    for _ in range(chance.choice((1, 1, 1, 20)) if content else 0):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(run: Path, chance: random.Random) -> None:
    """A file, to a shorter length."""
    path = files_of(run, chance)
    if path.exists():
        os.truncate(path, chance.randrange(path.stat().st_size + 1))


def stretch(run: Path, chance: random.Random) -> None:
    """A file, to a gigabyte or a terabyte of nothing."""
    path = files_of(run, chance)
    if path.exists():
        os.truncate(path, chance.choice((1 << 30, 1 << 40)))


def remove(run: Path, chance: random.Random) -> None:
    """A file, or a folder."""
    path = chance.choice((files_of(run, chance), *sorted((run / "checkpoints").glob("step-*")), run / "tokenizer"))
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def replace_by(run: Path, chance: random.Random) -> None:
    """A file by something that is none, or by another name of a file outside."""
    path = files_of(run, chance)
    if chance.random() < 0.2:
        path = run / chance.choice((".lock", "train.log", "overrides.json", "summary.json", "samples.jsonl"))
    kind = chance.choice(("folder", "pipe", "link", "hard link", "zero", "null", "dangling", "loop"))
    precious = run.parents[1] / OUTSIDE / "precious"
    content = path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 24 else b"precious\n"
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "x").touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("link", "hard link"):
        precious.write_bytes(content)
        path.hardlink_to(precious) if kind == "hard link" else path.symlink_to(precious)
    else:
        path.symlink_to({"zero": "/dev/zero", "null": "/dev/null", "dangling": "nowhere", "loop": path.name}[kind])


def link_folder(run: Path, chance: random.Random) -> None:
    """A folder of the run out of it, its content with it, or an empty one."""
    steps = sorted((run / "checkpoints").glob("step-*"))
    folder = chance.choice((run / "checkpoints", *steps, run / "tokenizer", run / "tensorboard", run / "profile"))
    target = run.parents[1] / OUTSIDE / folder.name
    if folder.is_dir() and not folder.is_symlink() and not target.exists():
        shutil.move(folder, target)
    elif not os.path.lexists(folder):
        target.mkdir(exist_ok=True)
    if not os.path.lexists(folder):
        folder.symlink_to(target)


def swap(run: Path, chance: random.Random) -> None:
    """The contents of two files."""
    one, other = files_of(run, chance), files_of(run, chance)
    if one.exists() and other.exists() and one.stat().st_size + other.stat().st_size < 1 << 26:
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)


def rename(run: Path, chance: random.Random) -> None:
    """A checkpoint, to another step."""
    steps = sorted((run / "checkpoints").glob("step-*"))
    name = chance.choice(("step-00000001", "step-00000003", "step-00000099", "step-9", "step-" + "9" * 40, "step-x"))
    target = run / "checkpoints" / name
    if steps and not target.exists():
        chance.choice(steps).rename(target)


def rewrite(run: Path, chance: random.Random) -> None:
    """A text file, to something odd."""
    path = files_of(run, chance)
    text = chance.choice(TEXTS)
    if path.exists() and path.suffix == ".jsonl" and chance.random() < 0.7:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        lines.insert(chance.randrange(len(lines) + 1), text + "\n")
        text = "".join(lines)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def edit(run: Path, chance: random.Random) -> None:
    """A value in JSON or YAML, to one of another type; a key left out, or one too many."""
    found = [path for path in run.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml") and _is_small(path)]
    top = [path for path in found if path.parent == run]
    if not found:
        return
    path = chance.choice(sorted(top if top and chance.random() < 0.6 else found))
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        if path.suffix == ".jsonl":
            lines = text.splitlines()
            number = chance.randrange(len(lines))
            lines[number] = json.dumps(_edited(json.loads(lines[number]), chance))
            path.write_text("\n".join(lines) + "\n")
        elif path.suffix == ".json":
            path.write_text(json.dumps(_edited(json.loads(text), chance), indent=1))
        else:
            path.write_text(yaml.safe_dump(_edited(yaml.safe_load(text), chance), sort_keys=False))
    except (ValueError, RecursionError, yaml.YAMLError, AttributeError):  # an earlier mutation has been here
        return


def _is_small(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 20


def _edited(values: Any, chance: random.Random) -> Any:
    node, parent, key = values, None, None
    while isinstance(node, dict | list) and node and (parent is None or chance.random() < 0.7):
        key = chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
        parent, node = node, node[key]
    value = chance.choice(VALUES)
    if parent is None:
        return value
    what = chance.random()
    if what < 0.15:
        del parent[key]
    elif what < 0.25 and isinstance(parent, dict):
        parent[chance.choice(("x", "hydra", "defaults", "_target_", "step", "event", "a.b", ""))] = value
    elif what < 0.35:
        for _ in range(chance.choice((5, 200))):
            value = [value]
        parent[key] = value
    else:
        parent[key] = value
    return values


def lead_out(run: Path, chance: random.Random) -> None:
    """A place in the config of the run and of its checkpoints, to the folder outside."""
    key = chance.choice(PLACES)
    group, _, name = key.rpartition(".")
    for path in sorted(run.rglob("config.yaml")):
        if not _is_small(path):
            continue
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            (config[group] if group else config)[name] = str(run.parents[1] / OUTSIDE)
        except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
            continue
        path.write_text(yaml.safe_dump(config, sort_keys=False))


def add(run: Path, chance: random.Random) -> None:
    """Files and folders of names with a meaning."""
    outside = run.parents[1] / OUTSIDE
    match chance.randrange(5):
        case 0:
            (run / ".tmp-x").symlink_to(outside)
        case 1:
            (run / "checkpoints" / ".tmp-replaced-step-00000002").mkdir(parents=True, exist_ok=True)
        case 2:
            (run / "checkpoints" / chance.choice(("step-00000001", "step-" + "9" * 30))).mkdir(
                parents=True, exist_ok=True
            )
        case 3:
            for name in ("summary.json", "config.yaml", "environment.json", "loss.png", "metrics.jsonl"):
                for pid in range(os.getpid(), os.getpid() + 40):  # those of the next processes
                    path = run / f".tmp-{name}-{pid}"
                    if not os.path.lexists(path):
                        path.symlink_to(outside / "precious")
        case _:
            (run / "checkpoints" / ".tmp-y").mkdir(parents=True, exist_ok=True)


MUTATIONS: dict[Mutation, int] = {
    flip: 12, cut: 8, stretch: 4, remove: 6, replace_by: 16, link_folder: 5, swap: 5, rename: 5, rewrite: 12, edit: 30,
    lead_out: 5, add: 5,
}  # fmt: skip


def forge(run: Path) -> None:
    """Make the manifests of all checkpoints agree with their files, as anybody can."""
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if not _is_small(checkpoint / "manifest.json"):
            continue
        try:
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            if not all(_is_small(checkpoint / name) for name in manifest["files"]):
                continue
            for name, entry in manifest["files"].items():
                content = (checkpoint / name).read_bytes()
                entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest.pop("sha256", None)
            digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
            (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}, indent=1) + "\n")
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, MemoryError):
            continue  # no checkpoint any more
