"""The values of a unit that was built without memory: each rank fills the parts of the parameters that it holds.

No rank ever has the whole unit: one whole parameter at a time is drawn, or read, and cut.  The numbers are those of a
unit that one process builds: :class:`llmtrain.base.named_generators.NamedGenerators` draws a parameter by its name.
"""

import torch

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.base.places import Shape, places_of
from llmtrain.base.world import World
from llmtrain.checkpoint.own_parts import OwnParts
from llmtrain.config.run_config import RunConfig
from llmtrain.distributed.options import Distributed
from llmtrain.distributed.parallel import Parallel
from llmtrain.lora.low_rank import LowRankAdaptation
from llmtrain.lora.none import NoLora
from llmtrain.lora.quantization import Quantization
from llmtrain.objective import TrainingUnit
from llmtrain.weights.scratch import Scratch


def builds_parts(run: RunConfig, world: World) -> bool:
    """True if every rank is to fill its parts alone: where a rank holds no whole unit, and needs none to start.

    The magnitudes of DoRA and weights in few bits are computed from whole weights, which other adapters are not.
    """
    if world.size == 1:
        return False
    if type(run.distributed) is not Distributed:  # an option with a way of sharing of its own
        return False
    mesh = run.distributed.mesh(world.size)
    holds_parts = mesh.pipeline > 1 or mesh.tensor > 1 or run.distributed.is_sharded(mesh)
    return holds_parts and run.weights.takes_parts and _starts_by_name(run)


def _starts_by_name(run: RunConfig) -> bool:
    lora = run.lora
    if not isinstance(lora, LowRankAdaptation):
        return isinstance(lora, NoLora)
    return not lora.has_magnitude and lora.quantization is Quantization.none and lora.path is None


def knows_values(unit: TrainingUnit) -> bool:
    """Return whether every parameter of ``unit``, on the meta device, has a rule for its initial values.

    False for heads of plug-ins that have none, and for buffers that nobody has set.
    """
    if any(buffer.is_meta for buffer in unit.buffers()) or any(True for _ in unit.saved_buffers()):
        return False
    return all(unit.source_of(name) is not None for name, _ in unit.named_weights())


@torch.no_grad()
def fill_own_parts(run: RunConfig, parallel: Parallel, generators: NamedGenerators, *, load_weights: bool) -> None:
    """Fill this rank's parts of the parameters: with initial values, or from ``weights`` where these have them.

    Without ``load_weights`` a checkpoint is restored later, and only frozen weights that it does not hold are loaded.
    """
    unit = parallel.unit
    own = own_parts(parallel)
    of_model = {name for name in own.shapes() if unit.source_of(name) is unit.model}
    loaded = set() if isinstance(run.weights, Scratch) else of_model
    if load_weights:
        for name in own:
            if name not in loaded:
                draw(unit, own, name, generators)
    if loaded and (load_weights or run.lora.adapts):
        run.weights.load_parts(unit.model, own.only(loaded))


def own_parts(parallel: Parallel) -> OwnParts:
    """The parts that this rank holds of every parameter."""
    unit = parallel.unit
    padding = unit.model.padded_vocab_size - unit.model.vocab_size
    weights, places = dict(parallel.trainable.named_weights()), parallel.places()
    shapes: dict[str, Shape] = {}
    for name, parameter in unit.named_weights():
        found = places_of(places.get(name, ()))  # none: every rank, or another one, has the whole
        rows, *rest = found[0].whole if found else tuple(parameter.shape)
        shapes[name] = (rows - padding if name in unit.model.padded_weights else rows, *rest)
    return OwnParts(weights, places, shapes)


def draw(unit: TrainingUnit, own: OwnParts, name: str, generators: NamedGenerators) -> None:
    """Draw the whole parameter ``name`` and keep this rank's parts."""
    whole, source = own.whole(name), unit.source_of(name)
    assert source is not None
    source.fill(name if source is unit.model else name.rpartition(".")[2], whole, generators.of(name, whole.device))
    own.put(name, whole)
