"""What the program writes, all of it: nothing that would have to be unpickled, nothing outside of where it belongs."""

import importlib.util
from pathlib import Path

import pytest

from tests.faults.victims import STANDARD
from tests.helpers.launcher import Launcher

# How files begin that Python or torch would execute on loading: pickles of protocols 0 (as torch wrote them) to 5, zip
# archives (torch.save, .npz, wheels), gzip, numpy arrays (which may hold pickles), compiled Python, ELF, scripts
BEGINNINGS = (
    b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"(dp0", b"(lp0", b"ccopy_reg", b"c__builtin__", b"PK\x03\x04",
    b"\x1f\x8b", b"\x93NUMPY", importlib.util.MAGIC_NUMBER, b"\x7fELF", b"#!",
)  # fmt: skip
SUFFIXES = {
    ".yaml", ".json", ".jsonl", ".log", ".png", ".safetensors", ".lock", ".bin", ".idx", ".npy", ".html", ".txt",
    ".zst",
}  # fmt: skip


@pytest.mark.slow
def test_nothing_is_pickled_and_nothing_strays(launcher: Launcher, tmp_path: Path) -> None:
    """Train, stop, resume, sweep, verify, generate, report; TensorBoard's event files where it is installed."""
    home, scratch, cache = tmp_path / "home", tmp_path / "scratch", tmp_path / "cache"
    for folder in (home, scratch):
        folder.mkdir()
    environment = {"HOME": str(home), "TMPDIR": str(scratch), "LLMTRAIN_CACHE": str(cache)}
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "text.txt").rename(work / "text.txt")
    metrics = ("metrics=tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    quick = (*STANDARD, "loop.max_steps=6", "loop.eval_every=3", "loop.sample_every=3", "checkpoint.every_steps=2")

    def run(*arguments: str, status: int = 0) -> None:
        launcher.run(*arguments, status=status, cwd=work, environment=environment)

    run("train", *quick, *metrics, "run_dir=run")
    run("train", *quick, "loop.max_minutes=0.0001", "run_dir=stopped", status=75)
    run("resume", "run", "loop.max_steps=8")
    run("train", "-m", *quick, "optimizer.lr=1e-3", "output_dir=out")
    run("generate", "run", "max_tokens=3")
    run("verify", "run")
    run("report", "run", "out")

    places = {path.name for path in work.iterdir()}
    assert places == {"text.txt", "run", "stopped", "out", *(["report.png"] if "report.png" in places else [])}
    strayed = [path for path in (*home.rglob("*"), *scratch.rglob("*")) if path.is_file()]
    assert not [path for path in strayed if "matplotlib" not in path.parts]  # it keeps a list of fonts
    compiled = cache / "native"  # kernels of ours, which are made here and travel nowhere
    written = [
        path
        for folder in (work, cache)
        for path in folder.rglob("*")
        if path.is_file() and compiled not in path.parents
    ]
    assert len(written) > 40
    for path in written:
        content = path.read_bytes()
        assert not content.startswith(BEGINNINGS), path
        suffix = path.suffix or (path.name if path.name.startswith(".") else "")
        assert suffix in SUFFIXES or path.name.startswith("events.out.tfevents."), path
        if suffix in (".yaml", ".json", ".jsonl", ".log"):
            text = content.decode("utf-8")
            assert "!!python" not in text, path
            assert "\x00" not in text, path
        assert not path.stat().st_mode & 0o111, f"{path} is executable"
    assert not [path for path in (*work.rglob("*"), *cache.rglob("*")) if path.is_symlink() or ".tmp-" in path.name]
