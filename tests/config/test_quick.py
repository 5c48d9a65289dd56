"""The quick libraries of most tests do as the libraries do."""

from collections.abc import Sequence
from pathlib import Path

import hydra
import pytest
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra

from llmtrain.config.compose import compose
from tests.helpers import quick


def plain_hydra(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ConfigRepository, "load_config", quick._load)
    patch.setattr(Hydra, "get_mode", quick._get_mode)
    patch.setattr(defaults_list, "_create_interpolation_map", quick._create_map)


@pytest.mark.parametrize(
    ("verb", "overrides"),
    [
        ("train", ["experiment=laptop", "optimizer=muon", "optimizer.lr=2e-3", "run_dir=here"]),
        ("train", ["model=tiny", "data=text", "data.path=text", "lora=dora"]),
        ("plan", ["precision=bf16"]),
        ("report", []),
    ],
)
def test_configs_are_the_same(verb: str, overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quick = [compose(verb, overrides) for _ in range(2)]
    with monkeypatch.context() as patch:
        plain_hydra(patch)
        assert quick == [compose(verb, overrides)] * 2


def test_an_edited_config_is_read_again(tmp_path: Path) -> None:
    option = tmp_path / "optimizer" / "mine.yaml"
    option.parent.mkdir()
    for lr in (0.5, 0.25):
        option.write_text(f"defaults: [sgd]\nlr: {lr}\n")
        assert compose("train", ["optimizer=mine"], tmp_path)["optimizer"]["lr"] == lr


@pytest.mark.parametrize("word", ["hydra.mode=MULTIRUN", "hydra.mode=RUN", "model=tiny"])
def test_the_mode_is_that_of_hydra(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an override, or from a file of a folder besides conf/."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "many.yaml").write_text("# @package _global_\nhydra:\n  mode: MULTIRUN\n")
    folder, name = str(Path(quick.__file__).parents[2] / "conf"), "train"
    with hydra.initialize_config_dir(folder, version_base="1.3"):
        loaded: Hydra = hydra.core.global_hydra.GlobalHydra.instance().hydra
        assert loaded.get_mode(name, [word]) == quick._get_mode(loaded, name, [word])
        search = f"hydra.searchpath=['file://{tmp_path}']"
        assert str(loaded.get_mode(name, ["experiment=many", search])) == "RunMode.MULTIRUN"
