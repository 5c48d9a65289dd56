"""``make fuzz``: command lines at random, and what the program answered.

    python tests/faults/fuzz_commands.py --cases 10000 --seed 1
    python tests/faults/fuzz_commands.py --seed 1 --only 4711      # one case again, with all that it wrote

Whatever is typed: no traceback, an end within the time limit, an exit status of the documented ones, nothing written
outside of the folder, and with exit status 2 nothing written at all.  Every case is a process of its own, confined
(:mod:`tests.faults.confinement`).  The same seed makes the same cases.
"""

import os
import random
import shlex
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

SECONDS = 60.0  # for a case; some train for a few steps
QUICK = (
    "model=tiny", "tokenizer=byte", "data=text", "data.path=text.txt", "data.sequence_length=16",
    "accumulation.batch_size=2", "accumulation.micro_batch_size=2", "loop.max_steps=1", "loop.eval_every=0",
    "loop.sample_every=0", "runtime.num_threads=1",
)  # fmt: skip
LINES: dict[str, tuple[tuple[str, ...], int]] = {  # of each verb a command line that works, and its share of the cases
    "train": (QUICK, 10),
    "train --cfg": (("--cfg", "job", *QUICK), 8),
    "train -h": (("--help",), 1),
    "plan": (("probe=false", *QUICK), 8),
    "resume": (("run", "loop.max_steps=2"), 4),
    "resume --cfg": (("run", "--cfg", "job", "loop.max_steps=3"), 4),
    "generate": (("run", "prompt=Once", "max_tokens=2"), 5),
    "chat": (("run", "max_tokens=2"), 2),
    "predict": (("run", "text=Once"), 2),
    "export": (("run", "to=exported"), 2),
    "verify": (("run", "replay_steps=0"), 2),
    "report": (("run", "plot=false"), 3),
}
TRAINING = ("train", "resume", "verify", "export")  # take a second or more where the line is right
WORDS = (
    "", " ", "=", "==", "-", "--", "---", "-m", "-sc", "-s", "-h", "-c", "-c=job", "--cfg", "--cfg=all", "--info",
    "--info=x", "-V", "--version", "--debug", "--run", "-r", "--resolve", "--package", "--package=optimizer", "-p",
    "--config-dir", "--config-dir=nowhere", "--config-name=plan", "--lr", "1e-3",
    "--model", "gpt2", "--help=", "--experimental-rerun=a", "~", "~~", "+", "++", "~data", "~optimizer.lr", "~name",
    "+x=1", "++optimizer.lr=1", "+optimizer.lr=1", "a@b=c", "@=1", "model@x=tiny", "/model=tiny", "a/b=c", "a.b.c=1",
    "=value", "key=", ".", "..", "/", "run", "text.txt", "a b.txt", "nowhere", "stray", "5", "[", "]", "{", "}", "${",
    "$", "#", "%", "&&", "*", "?", "\\", "'", '"', "`", "\x1b[31m", "\x07", "\r", "\n", "\t", "\u202e",
    "\udcff", "caf\udce9", "x" * 300, "x" * 70_000, "x="+"y" * 5000, "ünï", "数据", "🦙", "hydra.run.dir=out",
    "hydra.output_subdir=out", "hydra.sweep.dir=out", "hydra.sweep.subdir=out", "hydra.job.chdir=true",
    "hydra.mode=MULTIRUN", "hydra.verbose=true", "hydra.job.name=x", "hydra/launcher=joblib", "hydra/sweeper=optuna",
    "hydra/job_logging=default", "hydra.searchpath=[nowhere]", "hydra.searchpath=[file://nowhere]", "hydra=x",
    "defaults=[]", "_target_=os.system", "optimizer=[adamw,lion]", "metrics=[local,tensorboard]", "model=[tiny,tiny]",
    "optimizer=null", "optimizer=", "optimizer={}", "model={a:1}", "experiment=spam", "experiment=nothing",
    "experiment=[laptop,spam]", "data=text.txt", "lr=1e-3", "epochs=3", "batch_size=8", "dtype=bf16", "step=1",
    "step=x", "checkpoint.step=1", "plugins=[os]", "plugins=os", "run_dir=run", "run_dir=text.txt", "run_dir=a/b/c",
    "run_dir=", "run_dir=null", "output_dir=text.txt", "output_dir=", "name=a/b", "name=..", "name=", "name=null",
    "--from", "--from=run", "--from=nowhere", "loop.max_steps = 5", "loop.max_steps=1e3", "loop.max_tokens=1000",
    "optimizer.lr", "adamw", "to=exported", "to=run", "to=text.txt", "to=", "output=out.jsonl", "output=out.csv",
    "output=run", "output=a/b.jsonl", "file=text.txt", "file=run", "json=plan.json", "json=run", "chart=plan.png",
    "chart=run", "tokenizer=gpt2", "tokenizer=huggingface", "tokenizer=sentencepiece", "tokenizer.path=run",
    "weights=checkpoint", "weights=huggingface", "weights.path=run", "weights.path=text.txt", "lora=lora", "base=run",
    "base=text.txt", "system=null", "template=alpaca", "template=x", "num_samples=2",
)  # fmt: skip
VALUES = (
    "", " ", "null", "true", "false", "0", "1", "-1", "1.5", "1e3", "1e-3", "1e400", "nan", "inf", "-inf", "0x10",
    "1_000", "007", "99999999999999999999", "abc", "a b", "a,b", "a, b", ",", "a,", "[", "]", "[]", "[a", "a]", "[a]",
    "[a,b]", "[[a]]", "[a,[b]", "{", "}", "{}", "{a}", "{a:1}", "{a:1,b:[2]}", "(", ")", "(1)", "a (1).txt", "f(x)",
    "f(x", "choice(1,2)", "range(1,3)", "range(3)", "glob(*)", "int(x)", "int(1.5)", "str(1)", "sort(1,2)",
    "tag(t,1)", "interval(0,1)", "shuffle(1,2)", "extend_list(1)", "'", '"', "''", '""', "'a'", '"a"', "'a", 'a"',
    "it's", "'it''s'", "\"a\" and 'b'", "\\", "\\\\", "a\\", "\\'", "'a\\'", "$", "${", "${}", "${x}", "${name}",
    "${oc.env:HOME}", "${oc.env:NOTHING}", "${oc.env:'MY_API_KEY'}", "${oc.env:NOTHING,x}",
    "${oc.decode:${oc.env:HOME}}", "${a", "$x", "a$", "${model.hidden_size}", "${model}", "${now:%Y}",
    "${hydra:runtime.cwd}", "${sample:x}", "${nosuch:x}", "${..}", "${.}", "#", "a#b", "~", "~a", "a~", "@", "a@b",
    "%", "a%b", "&", "*", "*.txt", "?", "!", "!a", "|", "<|endoftext|>", ":", "a:b", "c:\\x", ";", "`", "=", "a=b",
    "==", "???", "-", "--", "-a", ".", "..", "/", "//", "text.txt", "a b.txt", "nowhere", "run", "./run", "run/",
    "run/config.yaml", "https://user:pass@host/x", "ü", "数据.txt", "🦙", "\u202e", "\x1b[31m", "\x07", "\n", "a\nb",
    "\t", "\udcff", "x" * 300, "x" * 5000, "tiny", "adamw", "Adamw", "auto", "cpu", "cuda", "list",
)  # fmt: skip
CHARACTERS = "abz019 =,.:;[](){}'\"\\$#~@%&*?!|<>/+-_^`\t\n\x1büß数🦙"
# Numbers under these keys are sizes: a large one is a large model, or a large file.
SIZES = ("model.", "accumulation.", "data.sequence", "loop.", "lora.rank", "batch_size", "max_tokens", "num_samples",
         "checkpoint.", "runtime.num_threads", "runtime.profile")  # fmt: skip
LARGE = ("99999999999999999999", "1e400", "1e3", "1_000", "inf")


@dataclass(frozen=True)
class Case:
    """A command line, and what is wrong with the answer to it."""

    number: int
    arguments: list[str]
    outcome: Outcome | None = None
    problems: tuple[str, ...] = ()

    def shown(self) -> str:
        """The command as a shell takes it."""
        return " ".join(
            ["llmtrain", *(shlex.quote(word) if len(word) < 200 else f"{word[:50]}…" for word in self.arguments)]
        )


class Grammar:
    """Random command lines, most of them near to one that works."""

    def __init__(self, seed: int, *, cheap: bool = False) -> None:
        from llmtrain.config.compose import compose
        from llmtrain.config.folders import conf_dir
        from llmtrain.config.suggestions import flatten

        self.seed = seed
        self.lines = {name: line for name, line in LINES.items() if not (cheap and name in TRAINING)}
        needed = {"train": ["data=text", "data.path=x"], "plan": ["data=text", "data.path=x"], "export": ["to=x"]}
        self.keys = {
            verb: flatten(compose(verb, needed.get(verb, [])))
            for verb in ("train", "plan", "generate", "chat", "predict", "export", "verify", "report")
        }  # fmt: skip
        self.keys["resume"] = self.keys["train"]
        self.options = sorted(
            f"{path.parent.name}={path.stem}" for path in conf_dir().glob("*/*.yaml")
            if path.parent.name not in ("model", "experiment") or path.stem in ("tiny", "llama_tiny", "auto", "spam")
        )  # fmt: skip

    def case(self, number: int) -> Case:
        """The command line of this number."""
        chance = random.Random(f"{self.seed} {number}")
        names, shares = list(self.lines), [share for _, share in self.lines.values()]
        name = chance.choices(names, shares)[0]
        verb = name.split()[0]
        words = list(LINES[name][0])
        for _ in range(chance.choices((0, 1, 2, 3), (1, 10, 6, 3))[0]):
            self.mutate(chance, verb, words)
        line = [verb, *words]
        if chance.random() < 0.03:
            line[0] = chance.choice(("", "trian", "-m", "help", "Train", "model=tiny", "\udcff", "--debug", "report "))
        return Case(number, line)

    def mutate(self, chance: random.Random, verb: str, words: list[str]) -> None:
        """Change ``words`` in one way."""
        kind = chance.choices(("key", "word", "option", "character", "cut", "twice", "swap", "split"),
                              (12, 8, 3, 3, 2, 2, 1, 1))[0]  # fmt: skip
        place = chance.randrange(len(words) + 1)
        if kind == "key":
            key = chance.choice(self.keys[verb])
            value = chance.choice(VALUES)
            if key.startswith(SIZES) and value in LARGE:
                value = "0"
            if chance.random() < 0.2:
                value = chance.choice(VALUES) + value[:200] + chance.choice(VALUES)[:200]
            words[:] = [word for word in words if word.partition("=")[0] != key]
            prefix = chance.choices(("", "+", "++", "~"), (20, 1, 1, 1))[0]
            words.insert(min(place, len(words)), f"{prefix}{key}={value}")
        elif kind == "word":
            words.insert(place, chance.choice(WORDS))
        elif kind == "option":
            words.insert(place, chance.choice(self.options))
        elif kind == "split" and words:
            place = chance.randrange(len(words))
            key, equals, value = words[place].partition("=")
            words[place : place + 1] = [key, *["="] * (bool(equals) and chance.random() < 0.5), value]
        elif words:
            place = chance.randrange(len(words))
            word = words[place]
            at = chance.randrange(len(word) + 1)
            if kind == "character":
                words[place] = word[:at] + chance.choice(CHARACTERS) + word[at:]
            elif kind == "cut":
                words[place] = word[:at] + word[at + 1 :]
            elif kind == "twice":
                words.append(word)
            elif kind == "swap":
                chance.shuffle(words)


def import_all() -> None:
    """Import what the command imports, and do what a process does but once, so that the cases need not."""
    import importlib

    from llmtrain.cli import main
    from llmtrain.cli.arguments import VERBS
    from tests.helpers.launcher import warm_up

    assert main
    for verb in VERBS:
        importlib.import_module(f"llmtrain.commands.{verb}")
    for module in ("llmtrain.cli.help", "llmtrain.sweep.jobs", "torch._dynamo", "tensorboard.compat"):
        importlib.import_module(module)
    warm_up()


def make_world(folder: Path) -> Path:
    """The folder that the cases find: a text, files with unusual names, and a run."""
    prepare(folder)
    work = folder / "work"
    for name in ("text.txt", "a b.txt", "a (1).txt", "a,b.txt", "ü.txt", "数据.txt"):
        (work / name).write_text("Once upon a time there was a lamp by the sea. " * 12)
    made = run_confined(folder, lambda: start(["train", *QUICK, "run_dir=run"]), seconds=300)
    assert made.status == 0, made.output
    shutil.rmtree(folder / "cache")  # each case begins with an empty one
    return folder


def start(arguments: list[str]) -> int:
    """Run a command line as ``python -m llmtrain`` does, but for the restart of the process."""
    from llmtrain.cli.main import main
    from llmtrain.cli.start import requested_allocator, split_verb

    requested_allocator(*split_verb(arguments))
    return main(arguments)


def attempt(case: Case, folder: Path, world: Path) -> Case:
    """Run a case in ``folder``, a copy of ``world``; leave the folder as it was."""
    before = snapshot(folder)
    outcome = run_confined(folder, lambda: start(case.arguments), seconds=SECONDS)
    changed = differences(before, snapshot(folder))
    problems = []
    # the plan of a run that would be refused: shown whole, with the reason at its end; it leaves a data cache
    is_planned = "plan" in case.arguments and "\nerror: " in outcome.output
    if outcome.status is None:
        problems.append(f"no end within {SECONDS:g} s")
    elif outcome.crashed and not ("--debug" in case.arguments and outcome.status in STATUSES):  # which asks for it
        problems.append("traceback")
    elif outcome.status not in STATUSES:
        problems.append(f"exit status {outcome.status}")
    elif outcome.status == 2 and "llmtrain: " not in outcome.output and not is_planned:
        problems.append("exit status 2 without a message")
    problems += [f"writes outside: {attempt}" for attempt in outcome.outside]
    if outcome.status == 2 and changed and not is_planned:
        problems.append(
            f"exit status 2 and changed: {', '.join(str(Path(path).relative_to(folder)) for path in changed[:5])}"
        )
    if changed:
        shutil.rmtree(folder)
        shutil.copytree(world, folder, symlinks=True)
    return replace(case, outcome=outcome, problems=tuple(problems))


def attempts(grammar: Grammar, scratch: Path, numbers: Sequence[int]) -> Iterator[Case]:
    """Run the cases of these numbers, one after the other, in a folder below ``scratch``."""
    folder = make_world(scratch / f"world-{os.getpid()}")
    world = Path(shutil.copytree(folder, f"{folder}-untouched", symlinks=True))
    for number in numbers:
        yield attempt(grammar.case(number), folder, world)


def main() -> int:
    """Run the cases; returns 1 if the answer to any was wrong."""
    parser = arguments_of(__doc__)
    parser.add_argument("--show", action="store_true", help="print every command and its answer")
    parser.add_argument("--cheap", action="store_true", help="leave out lines that would train")
    arguments = parser.parse_args()
    began = time.monotonic()
    os.environ["MY_API_KEY"] = "hush"
    import_all()
    grammar = Grammar(arguments.seed, cheap=arguments.cheap)
    numbers = arguments.only or range(arguments.first, arguments.first + arguments.cases)
    counts: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="llmtrain-fuzz-") as scratch:
        for case in in_parallel(partial(attempts, grammar, Path(scratch)), numbers, arguments.workers):
            assert case.outcome is not None
            counts[f"exit status {case.outcome.status}"] += 1
            if case.problems or arguments.only or arguments.show:
                print(f"case {case.number}: {'; '.join(case.problems) or 'right'}\n  {case.shown()!a}"
                      f"\n  {ascii(case.outcome.output[-1500:]) if not arguments.only else case.outcome.output}",
                      flush=True)  # fmt: skip
            wrong += bool(case.problems)
            if (done := counts.total()) % PROGRESS == 0:
                print(f"{done:,} command lines, {time.monotonic() - began:.0f} s", flush=True)
    for name, count in sorted(counts.items()):
        print(f"{name:<20}{count:>8,}")
    print(f"{counts.total():,} command lines, {wrong:,} answered wrongly, {time.monotonic() - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
