"""The pictures of the README, made anew: a terminal of tmux beside a real run, and the report of a real sweep.

.venv/bin/python docs/images/make.py run       # docs/images/run.svg: the recipe laptop, two minutes on two free cores
.venv/bin/python docs/images/make.py report    # docs/images/report.png: a sweep of three small runs
"""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parent
WIDTH, HEIGHT = 104, 40
COMMAND = "llmtrain train experiment=laptop"
SWEEP = (
    "-m name=sweep model=tiny tokenizer=byte optimizer.lr=3e-4,2e-3,1e-2 loop.max_steps=400 loop.eval_every=50 "
    "loop.sample_every=0"
)
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>.{unique_id}-matrix {{ font-family: Consolas, Menlo, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
line-height: {line_height}px; }} {styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>
<rect fill="#292929" x="1" y="1" width="{width}" height="{height}" rx="8"/>
<g transform="translate(9, 41)" clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def tmux(*arguments: str) -> str:
    """Run tmux on a server of its own."""
    command = ["tmux", "-u", "-L", "llmtrain-picture", "-f", os.devnull, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def draw_run(folder: Path) -> None:
    """The terminal in the last third of the run, after a save, an evaluation and a sample."""
    program = (
        f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; cd {shlex.quote(str(folder))}; {COMMAND}; sleep 5"
    )
    tmux("new-session", "-d", "-x", str(WIDTH), "-y", str(HEIGHT), program)
    picture = plain = ""
    while "finished at" not in plain:
        time.sleep(0.5)
        screen = tmux("capture-pane", "-e", "-p")  # fails if the run does, as the terminal ends with it
        plain = re.sub(r"\x1b\[[\d;]*m", "", screen)
        step = re.search(r"\s(\d+)/840  [\d.]+%", plain)
        if step and 640 <= int(step[1]) < 830:
            picture = screen
    tmux("kill-server")
    console = Console(width=WIDTH, record=True, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    console.print(Text("$ ", "bold") + Text(COMMAND))
    console.print(Text.from_ansi(picture.rstrip()))
    svg = console.export_svg(title="", code_format=SVG, unique_id="run")
    (IMAGES / "run.svg").write_text(svg, encoding="utf-8")


def draw_report(folder: Path) -> None:
    """The curves of a sweep."""
    program = [str(Path(sys.executable).parent / "llmtrain"), "train", *SWEEP.split()]
    subprocess.run(program, cwd=folder, check=True)
    (sweep,) = (folder / "runs/sweeps").iterdir()
    subprocess.run([program[0], "report", str(sweep)], check=True)
    shutil.copy(sweep / "report.png", IMAGES / "report.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        {"run": draw_run, "report": draw_report}[sys.argv[1]](Path(scratch))
