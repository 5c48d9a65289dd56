"""Options of config groups: their names, and their keys that a run would not read."""

from dataclasses import dataclass
from typing import ClassVar

from llmtrain.base.format import counted


@dataclass(frozen=True)
class RunFacts:
    """The length of a run and its data, as far as they decide which keys are read."""

    steps: int  # optimizer steps
    tokens: int  # of all steps, without padding
    epochs: float  # passes over the training data
    largest_batch: int  # sequences of the largest step
    train_tokens: int
    validation_tokens: int | None  # None: there are no validation data
    evaluates: bool  # there will be a validation loss

    @property
    def end(self) -> str:
        """The end of the run, as a clause of a message."""
        return f"the run ends after {counted(self.steps, 'step')}"

    @property
    def tenth(self) -> int:
        """A tenth of the steps, at least 1: an interval to propose."""
        return max(1, self.steps // 10)

    @property
    def no_evaluation(self) -> str:
        """The reason why nothing is evaluated, and what would change that; for a run that does not evaluate."""
        if self.validation_tokens is None:
            return "there are no validation data; data.validation_fraction=0.1 sets some aside"
        return f"nothing is evaluated with loop.eval_every=0; loop.eval_every={self.tenth}"


class Option:
    """Base of the contracts of all config groups."""

    ITSELF: ClassVar[str] = ""  # stands for the option as a whole among the keys of :meth:`unread`

    def unread(self, run: RunFacts) -> dict[str, str]:
        """Return the keys of this option that ``run`` would not read: ``{key: "why; what would work"}``.

        Keys are without their group, those named in the reasons with it.  The linter warns of the keys among them that
        the user has set, with ``group.key=value: has no effect: `` before the reason.  An option that overrides this
        adds to what its base class gives.
        """
        return {}


def option_name(component: object) -> str:
    """Return the name of a component's option, as in ``optimizer=adamw``: that of its module."""
    return type(component).__module__.rpartition(".")[2]


def option_of_target(target: str) -> str:
    """Return the option that a stored ``_target_`` names: the module for ours, the class for a plugin's."""
    parts = target.split(".")
    return parts[-2] if parts[0] == "llmtrain" and len(parts) > 2 else parts[-1]
