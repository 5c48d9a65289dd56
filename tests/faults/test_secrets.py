"""Passwords and keys, however they were given, are in no file that a run, a sweep or a report leaves."""

from pathlib import Path

import pytest

from tests.faults.victims import STANDARD
from tests.helpers.launcher import Launcher

SECRETS = ("hush-api", "hush-token", "hush-option")
KEYED = ("plugins=[objectives]", "metrics._target_=objectives.Keyed")
PLAIN = ("+metrics.api_key=hush-api", "+metrics.token=hush-token", "+metrics.options={password: hush-option, user: me}")
FROM_ENVIRONMENT = (
    "+metrics.api_key=${oc.env:MY_API_KEY}", "+metrics.token=${oc.env:MY_TOKEN}",
    "+metrics.options={password: '${oc.env:MY_PASSWORD}', user: me}",
)  # fmt: skip
ENVIRONMENT = dict(zip(("MY_API_KEY", "MY_TOKEN", "MY_PASSWORD"), SECRETS, strict=True))


def assert_kept(folder: Path) -> None:
    """No file and no file name has a secret in it."""
    for path in folder.rglob("*"):
        for secret in SECRETS:
            assert secret not in path.name
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("secrets", [PLAIN, FROM_ENVIRONMENT], ids=["plain", "environment"])
def test_no_file_has_a_secret(launcher: Launcher, tmp_path: Path, secrets: tuple[str, ...]) -> None:
    """LoadedModel, failed, resumed with them given again, reported."""
    train = ("train", *STANDARD, *KEYED, *secrets, "checkpoint.every_steps=2", "loop.max_steps=4", "run_dir=run")
    launcher.run(*train, environment=ENVIRONMENT)
    assert "password: <redacted>" in (tmp_path / "run" / "config.yaml").read_text()
    assert "user: me" in (tmp_path / "run" / "config.yaml").read_text()
    refused = launcher.run("resume", "run", "loop.max_steps=6", KEYED[0], status=2)
    assert "it is a secret and was not stored" in refused
    again = [argument.removeprefix("+") for argument in secrets]
    launcher.run("resume", "run", "loop.max_steps=6", KEYED[0], *again, environment=ENVIRONMENT)
    launcher.run("resume", "run", "loop.max_steps=8", KEYED[0], *again, "optimizer.lr=1e-4", environment=ENVIRONMENT)
    launcher.run("report", "run")
    assert_kept(tmp_path / "run")


def test_a_secret_where_it_would_be_stored_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    output = launcher.run(
        "train", *STANDARD, "name=${oc.env:MY_API_KEY}", "run_dir=run", status=2, environment=ENVIRONMENT
    )
    assert "config.yaml would hold it" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sweep_stores_no_secret(launcher: Launcher, tmp_path: Path) -> None:
    """Its jobs need what was not stored, and are not given it; whatever it comes to, no file and no name has it."""
    sweep = ("train", "-m", *PLAIN, *STANDARD, *KEYED, "loop.max_steps=2", "optimizer.lr=1e-3,1e-4")
    output = launcher.start(*sweep).wait()
    assert list(tmp_path.glob("runs/sweeps/*/*/config.yaml")), output
    assert_kept(tmp_path / "runs")
