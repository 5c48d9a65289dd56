"""Decoding with shapes that do not change gives the text of decoding with a cache that grows."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.inference import decoding
from llmtrain.inference.decoding import Decoder, GraphRecorder, Pass
from llmtrain.inference.generate import Sampling, generate
from llmtrain.model import LanguageModel
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.model.layers.rotary import Scaling
from llmtrain.model.llama import LlamaConfig, Position

VOCABULARY = 101
CONTEXT = 44
LLAMA: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_size": None, "intermediate_size": 80,
    "context_length": CONTEXT, "vocab_size": None, "position": Position.rope, "rope_theta": 10000.0,
    "rope_scaling": Scaling.none, "rope_factor": None, "rope_low_freq_factor": None, "rope_high_freq_factor": None,
    "rope_original_context_length": None, "norm_eps": 1e-5, "qkv_bias": False, "output_bias": False, "mlp_bias": False,
    "qk_norm": False, "fused_qkv": False, "sliding_window": None, "sliding_window_from_layer": 0,
    "tie_embeddings": False, "normalised_head": False, "dropout": 0.0, "logit_softcap": None, "initial_std": 0.5,
}  # fmt: skip
ALIBI = {"position": Position.alibi, "rope_theta": None, "num_heads": 6, "num_kv_heads": 6, "fused_qkv": True}
DYNAMIC = {"rope_scaling": Scaling.dynamic, "rope_factor": 2.0, "rope_original_context_length": 16}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "gpt": None,
    "llama": {},
    "window": {"sliding_window": 5, "sliding_window_from_layer": 1},
    "baichuan": ALIBI | {"normalised_head": True},
    "alibi_with_groups_and_window": ALIBI | {"num_kv_heads": 2, "sliding_window": 9},
    "dynamic": DYNAMIC,
}


def make(variant: str, device: str = "cpu") -> LanguageModel:
    changes = VARIANTS[variant]
    if changes is None:
        config: Any = GPTConfig(2, 48, 4, CONTEXT, None, 0.1, True, False, None, Initialisation.torch)
    else:
        config = LlamaConfig(**LLAMA | changes)
    return config.create(VOCABULARY, torch.device(device), NamedGenerators(3)).eval()


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes change every 16 keys, and the context is no multiple of that."""
    monkeypatch.setattr(decoding, "STEP", 16)


class CountingRecorder:
    """A recorder that repeats passes by running them again, and counts what is recorded and repeated."""

    def __init__(self) -> None:
        self.recorded = self.repeated = 0

    def __call__(self, function: Pass) -> Pass:
        self.recorded += 1
        function()  # as a recording does: twice for the same token

        def again() -> torch.Tensor:
            self.repeated += 1
            return function()

        return again


def text(model: LanguageModel, sampling: Sampling, tokens: int, recorder: Any, monkeypatch: Any) -> list[int]:
    monkeypatch.setattr("llmtrain.inference.generate.graph_recorder", lambda device, tokens: recorder)
    generator = torch.Generator().manual_seed(5)
    return list(generate(
        model, [1, 2, 3], max_tokens=tokens, sampling=sampling, generator=generator, dtype=torch.float32,
        end_of_text=-1,
    ))  # fmt: skip


@pytest.mark.parametrize("sampling", [Sampling(0.0, 0, 1.0), Sampling(0.9, 20, 0.95)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_are_those_of_a_growing_cache(variant: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorder = make(variant), CountingRecorder()
    expected = text(model, sampling, 70, None, monkeypatch)  # past the end of the context
    assert text(model, sampling, 70, recorder, monkeypatch) == expected
    assert len(set(expected)) > 2
    if variant == "dynamic":  # beyond 16 tokens each number of tokens has other frequencies
        assert (recorder.recorded, recorder.repeated) == (1, 13)
    else:
        assert recorder.repeated == 70 - 3  # all but the prompt, and half the context, which is read again twice
        assert recorder.recorded == 3 + 2 + 1  # 16, 32, 44 keys; from 22 on 32, 44; from 22 on 32


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "dynamic"])
def test_logits_are_those_of_the_whole_sequence(variant: str) -> None:
    model = make(variant).double()
    ids = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(model, torch.float64, recorder=lambda function: function)
    with torch.no_grad():
        whole = model(ids[None])[0, :, :VOCABULARY]
        pieces = [decoder.read(ids[:10].tolist()), *(decoder.read([token]) for token in ids[10:].tolist())]
    torch.testing.assert_close(torch.stack(pieces), whole[9:], atol=1e-10, rtol=1e-10)


def test_a_recording_that_fails_is_reported_once_and_decoding_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a torch that cannot record")
    model, recorder = make("llama"), GraphRecorder()
    reports: list[str] = []
    decoder = Decoder(model, torch.float32, recorder=recorder, report=reports.append)
    plain = Decoder(model, torch.float32)
    with torch.no_grad():
        for ids in ([1, 2, 3], [4], [5], [6]):
            assert torch.equal(decoder.read(ids), plain.read(ids))
    assert recorder.has_failed
    assert len(reports) == 1
    assert reports[0].startswith("one token at a time without a CUDA graph, several times slower: ")
    monkeypatch.setattr(decoding, "RECORDER", recorder)
    assert decoding.graph_recorder(torch.device("cuda"), 100) is None


def test_passes_are_recorded_where_it_pays() -> None:
    assert decoding.graph_recorder(torch.device("cuda"), 60) is decoding.RECORDER
    assert decoding.graph_recorder(torch.device("cuda"), 4) is None
    assert decoding.graph_recorder(torch.device("cpu"), 60) is None


class Operations(TorchDispatchMode):
    """A record of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


HOST_WORK = ("_local_scalar_dense", "nonzero", "lift_fresh")  # a number or a size that is read, a tensor of the host's


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "dynamic"])
def test_a_recorded_pass_is_the_same_for_every_token(variant: str) -> None:
    """Nothing that a CUDA graph cannot hold: the host reads no number and gives none, and nothing moves or grows."""
    decoder = Decoder(make(variant), torch.float32, recorder=lambda function: function)
    with torch.no_grad():
        decoder.read([1, 2, 3])
        seen, places = [], set()
        for token in (4, 5, 6):
            with Operations() as operations:
                decoder.read([token])
            seen.append(operations.names)
            places.add(tuple(buffer.data_ptr() for buffer in (*decoder.cache.keys, *decoder.cache.values)))
    assert len(places) == 1
    assert seen[1] == seen[2] == seen[0][-len(seen[1]) :]  # the first one also makes room
    assert not [name for name in seen[1] if any(part in name for part in HOST_WORK)]
    assert sum("scaled_dot_product" in name for name in seen[1]) == decoder.model.num_layers


@pytest.mark.parametrize("sampling", [Sampling(0.0, 0, 1.0), Sampling(1.0, 0, 1.0), Sampling(0.5, 7, 0.9)])
def test_the_host_reads_one_number_a_token(sampling: Sampling) -> None:
    logits, generator = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.Generator()
    with Operations() as operations:
        sampling.choose(logits, generator)
    assert sum("_local_scalar_dense" in name for name in operations.names) == 1
    assert not [name for name in operations.names if "nonzero" in name or "multinomial" in name]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_passes_give_the_same_text_on_a_gpu(variant: str) -> None:
    model = make(variant, "cuda")
    reports: list[str] = []
    recorded = Decoder(model, torch.float32, recorder=GraphRecorder(), report=reports.append)
    plain = Decoder(model, torch.float32)
    with torch.no_grad():
        for ids in ([1, 2, 3], *([token] for token in range(4, 40))):
            torch.testing.assert_close(recorded.read(ids).clone(), plain.read(ids), atol=1e-4, rtol=1e-4)
    assert not reports
