"""``make fuzz``: run directories changed at random, and what each verb makes of them.

    python tests/faults/fuzz_run_dirs.py --cases 10000 --seed 1
    python tests/faults/fuzz_run_dirs.py --seed 1 --only 4711      # one case again, with all that it wrote

Small real runs are made once; each case changes a copy of one and calls a verb on it.  Whatever a run directory holds:
no traceback, an end within the time limit, an exit status of the documented ones, nothing written outside of the run's
folder, with exit status 2 nothing left behind, and no damaged checkpoint that passes for an intact one.  Every case is
a process of its own, confined (:mod:`tests.faults.confinement`).  The same seed makes the same cases.
"""

import importlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # for the helpers of the other tests
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # before torch

from tests.faults.confinement import Outcome, differences, prepare, run_confined, snapshot
from tests.faults.fuzzing import PROGRESS, STATUSES, arguments_of, in_parallel
from tests.faults.run_mutations import MUTATIONS, OUTSIDE, forge

SECONDS = 60.0  # for a case
TINY = (
    "model=tiny", "model.hidden_size=8", "model.num_layers=1", "data.sequence_length=16", "runtime.num_threads=1",
    "metrics.log_every=1", "accumulation.batch_size=2", "accumulation.micro_batch_size=2", "checkpoint.every_steps=2",
    "checkpoint.keep_last=3", "loop.max_steps=6", "loop.eval_every=3", "loop.eval_batches=1", "precision=fp32",
)  # fmt: skip
RUNS = {
    "text": (*TINY, "data=text", "data.path=text.txt", "tokenizer=tiktoken", "tokenizer.encoding=ranks.tiktoken",
             "tokenizer.pattern=gpt2", "loop.sample_every=3", "loop.sample_tokens=2"),
    "classes": (*TINY, "data=labelled", "data.path=rows.csv", "data.label_column=label", "objective=classification",
                "tokenizer=byte", "loop.sample_every=0"),
    "adapters": (*TINY, "data=text", "data.path=text.txt", "tokenizer=tiktoken", "tokenizer.encoding=ranks.tiktoken",
                 "tokenizer.pattern=gpt2", "weights=checkpoint", "weights.path=base", "lora=lora", "lora.rank=2",
                 "loop.sample_every=0"),
}  # fmt: skip
TRAIN = ("run_dir=new", "loop.max_steps=1", "loop.eval_every=0", "loop.sample_every=0")
VERBS: dict[tuple[str, ...], int] = {  # with their shares of the cases; some take a second, some a tenth of it
    ("resume", "run"): 10,
    ("resume", "run", "loop.max_steps=7"): 12,
    ("resume", "run", "step=4", "run_dir=branch", "loop.max_steps=5"): 4,
    ("resume", "run", "--cfg", "job"): 3,
    ("generate", "run", "max_tokens=2", "prompt=a"): 10,
    ("generate", "run/checkpoints/step-00000004", "max_tokens=1", "prompt=a"): 2,
    ("chat", "run", "max_tokens=2", "template=plain"): 3,
    ("predict", "run", "text=a"): 6,
    ("export", "run", "to=exported"): 2,
    ("verify", "run", "replay_steps=0"): 20,
    ("verify", "run"): 8,
    ("verify", "run/checkpoints/step-00000004"): 4,
    ("report", "run", "plot=false"): 14,
    ("report", "."): 3,
    ("train", "weights=checkpoint", "weights.path=run", *TINY, "data=text", "data.path=text.txt", "tokenizer=byte",
     *TRAIN): 3,
    ("train", "--from", "run", *TRAIN): 4,
    ("plan", "model=auto", "weights=checkpoint", "weights.path=run", "data=text", "data.path=text.txt",
     "tokenizer=byte", "probe=false"): 3,
}  # fmt: skip
QUICK = [verb for verb in VERBS if verb[0] in ("generate", "predict") or {"replay_steps=0", "plot=false"} & set(verb)]


@dataclass(frozen=True)
class Case:
    """A run, what is done to it, the verb that is called, and what is wrong with its answer."""

    number: int
    run: str
    mutations: tuple[str, ...]
    forged: bool
    verb: tuple[str, ...]
    seed: int
    outcome: Outcome | None = None
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, seed: int, number: int, *, quick: bool) -> "Case":
        """The case of this number."""
        chance = random.Random(f"{seed} {number}")
        run = chance.choices(list(RUNS), (6, 2, 2))[0]
        names = [mutation.__name__ for mutation in MUTATIONS]
        count = chance.choices((1, 2, 3), (6, 2, 1))[0]
        mutations = tuple(chance.choices(names, list(MUTATIONS.values()), k=count))
        verbs = QUICK if quick else list(VERBS)
        verb = chance.choices(verbs, [VERBS[verb] for verb in verbs])[0]
        return cls(number, run, mutations, chance.random() < 0.3, verb, seed)

    def mutate(self, run: Path) -> None:
        """Change the run in its folder."""
        chance = random.Random(f"{self.seed} {self.number} mutations")
        functions = {mutation.__name__: mutation for mutation in MUTATIONS}
        for name in self.mutations:
            functions[name](run, chance)
        if self.forged:
            forge(run)

    def shown(self) -> str:
        """The case in words."""
        how = ", ".join(self.mutations) + ", manifests forged" * self.forged
        return f"{self.run} ({how}): llmtrain {' '.join(self.verb)}"


def import_all() -> None:
    """Import what the command imports, and do what a process does but once, so that the cases need not."""
    from llmtrain.cli.arguments import VERBS as verbs
    from tests.helpers.launcher import warm_up

    for verb in verbs:
        importlib.import_module(f"llmtrain.commands.{verb}")
    importlib.import_module("torch._dynamo")
    warm_up()


def start(arguments: Sequence[str]) -> int:
    """Run a command line as ``python -m llmtrain`` does, but for the restart of the process."""
    from llmtrain.cli.main import main
    from llmtrain.cli.start import requested_allocator, split_verb

    requested_allocator(*split_verb(arguments))
    return main(list(arguments))


def make_worlds(folder: Path) -> dict[str, Path]:
    """A folder for each run, with all that it was made from."""
    worlds = {}
    for name, overrides in RUNS.items():
        world = prepare(folder / name)
        (world / OUTSIDE).mkdir()
        (world / OUTSIDE / "precious").write_text("precious\n")
        (world / OUTSIDE / ".tmp-precious").mkdir()
        work = world / "work"
        (work / "text.txt").write_text("Once upon a time there was a lamp by the sea. " * 12)
        (work / "rows.csv").write_text("text,label\n" + "".join(f"{t * n},{t}\n" for n in range(1, 9) for t in "ab"))
        _write_ranks(work / "ranks.tiktoken")
        if name == "adapters":
            shutil.copytree(worlds["text"] / "work" / "run", work / "base")
        made = run_confined(world, lambda line=("train", *overrides, "run_dir=run"): start(line), seconds=300)
        assert made.status == 0, made.output
        worlds[name] = world
    return worlds


def _write_ranks(path: Path) -> None:
    """The merge ranks of a vocabulary of the 256 bytes and two pairs."""
    from llmtrain.tokenizer.bpe import write_ranks

    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"a "]
    path.write_bytes(write_ranks({token: rank for rank, token in enumerate(tokens)}))


def attempt(case: Case, folder: Path, world: Path) -> Case:
    """Run a case in ``folder``, which becomes a copy of ``world``."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world, folder, symlinks=True)
    run = folder / "work" / "run"
    case.mutate(run)
    damaged = [] if case.forged else damaged_checkpoints(run, world / "work" / "run")
    before = snapshot(folder)
    outcome = run_confined(folder, lambda: start(case.verb), seconds=SECONDS)
    changed = [str(Path(path).relative_to(folder)) for path in differences(before, snapshot(folder))]
    problems = []
    if outcome.status is None:
        problems.append(f"no end within {SECONDS:g} s")
    elif outcome.crashed:
        problems.append("traceback")
    elif outcome.status not in STATUSES:
        problems.append(f"exit status {outcome.status}")
    elif outcome.status == 2 and "llmtrain: " not in outcome.output:
        problems.append("exit status 2 without a message")
    problems += [f"writes outside: {place}" for place in outcome.outside]
    problems += [f"changes {path}" for path in changed if path.startswith(OUTSIDE)]
    if (folder / "work" / "obeyed").exists():
        problems.append("code in the run was run")
    left = [path for path in changed if is_left_behind(path)]
    if outcome.status == 2 and left:
        problems.append(f"exit status 2 and changed: {', '.join(left[:5])}")
    if outcome.status == 0 and (wrong := [path for path in damaged if is_used(case.verb, path, run)]):
        problems.append(f"passes for intact: {wrong[0].name}")
    return replace(case, outcome=outcome, problems=tuple(problems))


def is_left_behind(path: str) -> bool:
    """Return True unless a refused command may make this change: to the lock of the run, or to leftovers."""
    name = Path(path).name
    return path != "work/run/.lock" and not any(part.startswith(".tmp-") for part in Path(path).parts) and (
        not path.startswith(("cache", "home", "tmp")) and name != "checkpoints"
    )  # fmt: skip


def damaged_checkpoints(run: Path, original: Path) -> list[Path]:
    """The checkpoints of a run that are not, byte for byte, those of the original run."""
    found = sorted(path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit())
    return [path for path in found if not _is_same(path, original / "checkpoints" / path.name)]


def _is_same(one: Path, other: Path) -> bool:
    if not one.is_dir() or not other.is_dir():
        return not one.is_dir()  # a file of that name is no checkpoint
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return all(
        (one / name).is_file()
        and (one / name).stat().st_size == (other / name).stat().st_size
        and (one / name).read_bytes() == (other / name).read_bytes()
        for name in names
    )


def is_used(verb: Sequence[str], checkpoint: Path, run: Path) -> bool:
    """Return True if a verb that succeeded has vouched for a checkpoint, or used it."""
    if verb[0] == "verify":
        return len(verb) < 2 or verb[1] == "run" or Path(verb[1]).name == checkpoint.name
    if verb[0] in ("generate", "chat", "predict", "export", "train") and "--from" not in verb:
        newest = sorted((run / "checkpoints").glob("step-*"))[-1] if verb[0] != "generate" or verb[1] == "run" else None
        return checkpoint == newest or (newest is None and Path(verb[1]).name == checkpoint.name)
    return False


def attempts(worlds: dict[str, Path], scratch: Path, cases: Sequence[Case]) -> Iterator[Case]:
    """Run the cases, one after the other, in a folder below ``scratch``."""
    for case in cases:
        yield attempt(case, scratch / f"case-{os.getpid()}", worlds[case.run])


def main() -> int:
    """Run the cases; returns 1 if the answer to any was wrong."""
    parser = arguments_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="only the verbs that take a tenth of a second")
    arguments = parser.parse_args()
    began = time.monotonic()
    import_all()
    numbers = arguments.only or range(arguments.first, arguments.first + arguments.cases)
    cases = [Case.of(arguments.seed, number, quick=arguments.quick) for number in numbers]
    counts: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="llmtrain-fuzz-") as scratch:
        worlds = make_worlds(Path(scratch))
        for case in in_parallel(partial(attempts, worlds, Path(scratch)), cases, arguments.workers):
            assert case.outcome is not None
            counts[f"exit status {case.outcome.status}"] += 1
            if case.problems or arguments.only:
                print(f"case {case.number}: {'; '.join(case.problems) or 'right'}\n  {case.shown()}"
                      f"\n  {case.outcome.output if arguments.only else ascii(case.outcome.output[-1500:])}",
                      flush=True)  # fmt: skip
            wrong += bool(case.problems)
            if (done := counts.total()) % PROGRESS == 0:
                print(
                    f"{done:,} run directories, {wrong:,} answered wrongly, {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    for name, count in sorted(counts.items()):
        print(f"{name:<20}{count:>8,}")
    print(f"{counts.total():,} run directories, {wrong:,} answered wrongly, {time.monotonic() - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
