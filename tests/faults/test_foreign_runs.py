"""A run directory from elsewhere is data: nothing in it runs, is looked up, or is written through."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.victims import STANDARD, steps
from tests.helpers.launcher import Launcher

PLANTED = """
from pathlib import Path
Path("obeyed").touch()
class Evil:
    def __init__(self, *arguments, **options):
        Path("obeyed").touch()
    def __getattr__(self, name):
        return lambda *arguments, **options: None
"""
EVIL = {"_target_": "planted.Evil"}
SYSTEM = {"_target_": "os.system", "command": "touch obeyed"}

Edit = Callable[[dict[str, Any]], str | None]


def at(path: str, value: Any) -> Edit:
    """Set the value of a dotted key; a slash stands for a dot that is none."""

    def edit(config: dict[str, Any]) -> None:
        *folders, last = path.split(".")
        for name in folders:
            config = config.setdefault(name, {})
        config[last] = value

    return edit


def raw(line: str) -> Edit:
    """Put a line of YAML of one's own before the others."""
    return lambda config: line + "\n" + yaml.safe_dump(config)


def plugin(config: dict[str, Any]) -> None:
    config["plugins"], config["schedule"]["_target_"] = ["planted"], "planted.Evil"


# Whether the config as a whole is refused; else what is planted means nothing.
PLANTS: dict[str, tuple[bool, Edit]] = {
    "os_system": (True, at("schedule", SYSTEM)),
    "another_package": (True, at("schedule._target_", "planted.Evil")),
    "the_whole_run": (True, at("_target_", "planted.Evil")),
    "hydra_call": (True, at("schedule", {"_target_": "hydra.utils.call", "config": SYSTEM})),
    "no_dataclass": (True, at("schedule._target_", "llmtrain.config.compose.load")),
    "another_group": (True, at("schedule._target_", "llmtrain.run.run.Run")),
    "its_own_plugin": (True, plugin),
    "plugins_unused": (False, at("plugins", ["planted"])),
    "python_tag": (True, raw('evil: !!python/object/apply:os.system ["touch obeyed"]')),
    "python_name": (True, raw("evil: !!python/name:planted.Evil")),
    "python_module": (True, raw("evil: !!python/module:planted")),
    "callbacks": (True, at("hydra", {"callbacks": {"evil": EVIL}})),
    "callbacks_system": (True, at("hydra", {"callbacks": {"evil": SYSTEM}})),
    "launcher": (True, at("hydra", {"launcher": EVIL, "sweeper": EVIL})),
    "searchpath": (True, at("hydra", {"searchpath": ["file://planted"]})),
    "job": (True, at("hydra", {"job": {"env_set": {"A": "b"}}, "run": {"dir": "obeyed"}, "output_subdir": "obeyed"})),
    "defaults": (True, at("defaults", [{"override hydra/launcher": "basic"}])),
    "inner_defaults": (True, at("schedule.defaults", ["/model: tiny"])),
    "group_of_hydra": (True, at("hydra/callbacks", {"evil": EVIL, "_target_": "x.Y"})),
    "package": (True, at("schedule@hydra/callbacks/evil", EVIL)),
    "a_number": (True, at("schedule", 3)),
    "numbers_as_keys": (True, raw("3: 4")),
    "a_list": (True, lambda config: "- 1\n"),
    "environment": (False, at("name", "${oc.env:HUSH}")),
    "environment_escaped": (False, at("name", r"\${oc.env:HUSH}")),
    "environment_escaped_twice": (False, at("name", r"\\${oc.env:HUSH}")),
    "environment_in_a_group": (False, at("loop.sample_prompt", r"\${oc.env:HUSH}")),
    "environment_of_hydra": (False, at("name", "${hydra:job.env_copy}")),
    "eval": (False, at("name", "${oc.create:${oc.env:HUSH}}")),
    "missing": (True, at("name", "???")),
}
# Without Hydra, as ``generate``, ``verify`` and ``weights=checkpoint`` read a config.
BOTH = (
    "os_system",
    "its_own_plugin",
    "python_tag",
    "callbacks_system",
    "environment_escaped",
    "environment_in_a_group",
)


@pytest.fixture(scope="session")
def foreign(server: Launcher) -> Path:
    """A finished run, before anything is planted in it."""
    server.run("train", *STANDARD, "loop.max_steps=4", "run_dir=foreign")
    return server.folder / "foreign"


def forge(checkpoint: Path, **names: str) -> None:
    """Make the manifest agree with the files, as anybody can; ``names`` are put in place of those it has."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, entry in list(manifest["files"].items()):
        content = (checkpoint / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["files"][names.get(name.replace(".", "_"), name)] = manifest["files"].pop(name)
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}, indent=1) + "\n")


def plant(run: Path, edit: Edit) -> None:
    """Plant something in the config of a run and of its checkpoints."""
    (run.parent / "planted.py").write_text(PLANTED)
    for folder in (run, *(run / "checkpoints").iterdir()):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        text = edit(config)
        (folder / "config.yaml").write_text(yaml.safe_dump(config) if text is None else text)
        if folder != run:
            forge(folder)


def look_for(secret: bytes, folder: Path) -> list[Path]:
    """The files that have ``secret`` in them."""
    return [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


@pytest.mark.slow
def test_code_planted_in_a_config_is_never_run(launcher: Launcher, foreign: Path, tmp_path: Path) -> None:
    """For each verb that reads the config of a run, with what is planted, and with manifests that agree with it."""
    wrong = []
    for name, (is_refused, edit) in PLANTS.items():
        folder = tmp_path / name
        run = Path(shutil.copytree(foreign, folder / "run"))
        shutil.copy(tmp_path / "text.txt", folder)
        plant(run, edit)
        verbs = [
            ("resume", "run", "loop.max_steps=5"),
            *([("generate", "run", "max_tokens=3")] if name in BOTH else []),
        ]
        victims = {verb: launcher.start(*verb, cwd=folder, environment={"HUSH": "hush-hush"}) for verb in verbs}
        for verb, victim in victims.items():
            output = victim.wait()
            if victim.returncode != (2 if is_refused else 0):
                wrong.append(f"{name}: {verb[0]}: exit status {victim.returncode}\n{output}")
            if "Traceback" in output:
                wrong.append(f"{name}: {verb[0]}: {output}")
            if (folder / "obeyed").exists():
                wrong.append(f"{name}: {verb[0]}: it was obeyed")
        wrong += [f"{name}: the environment is in {path}" for path in look_for(b"hush-hush", tmp_path)]
    readable = [name for name in PLANTS if not name.startswith(("python_", "a_list"))]
    output = launcher.run("report", *readable, "plot=false", environment={"HUSH": "hush-hush"})
    wrong += [f"report: {output}"] * ("hush-hush" in output or (tmp_path / "obeyed").exists())
    assert not wrong, "\n".join(wrong)


def test_a_harmless_foreign_run_works_and_a_named_plugin_runs(
    launcher: Launcher, foreign: Path, tmp_path: Path
) -> None:
    """The same without anything planted but a name, so that the test above can tell; a plug-in that the user names."""
    run = Path(shutil.copytree(foreign, tmp_path / "run"))
    plant(run, at("name", "mine"))
    for verb in (("resume", "run", "loop.max_steps=5"), ("generate", "run", "max_tokens=3"), ("report", "run")):
        launcher.run(*verb)
    plant(run, plugin)
    assert "not a dataclass" in launcher.run("generate", "run", "plugins=[planted]", status=2)
    assert (tmp_path / "obeyed").exists()


@pytest.mark.parametrize("name", ["../text.txt", "/etc/passwd", "..", "."])
def test_file_names_that_leave_the_checkpoint_are_refused(
    launcher: Launcher, foreign: Path, tmp_path: Path, name: str
) -> None:
    run = Path(shutil.copytree(foreign, tmp_path / "run"))
    for step in steps(run):
        forge(run / "checkpoints" / f"step-{step:08d}", config_yaml=name)
    for verb in (("resume", "run", "loop.max_steps=5"), ("generate", "run")):
        assert f"{name!r} is not a plain file name" in launcher.run(*verb, status=2)


@pytest.mark.parametrize("name", [".lock", "train.log", "metrics.jsonl", "samples.jsonl", "summary.json", "loss.png",
                                  "environment.json", "config.yaml"])  # fmt: skip
def test_links_that_leave_the_run_are_refused(launcher: Launcher, foreign: Path, tmp_path: Path, name: str) -> None:
    """What they point to stays as it was, whether the run is refused or goes on."""
    run = Path(shutil.copytree(foreign, tmp_path / "run"))
    precious = tmp_path / "precious"
    precious.write_bytes((run / name).read_bytes() if (run / name).exists() else b"precious\n")
    before = precious.read_bytes()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(precious)
    output = launcher.start("resume", "run", "loop.max_steps=6", "loop.sample_every=2").wait()
    assert precious.read_bytes() == before
    assert f"run/{name}" in output or (run / name).is_file()
