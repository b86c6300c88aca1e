"""A training that begins with published weights: they are loaded once, and noted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utnetv2_fast.data.prepare import PreparedCase
from utnetv2_fast.errors import InputError, Stopped
from utnetv2_fast.models.rivals.swinunet import SwinUNet, SwinUNetConfig
from utnetv2_fast.training import RunFolder, train

MODEL = SwinUNetConfig(in_channels=1, num_classes=2, width=2)
CPU = torch.device("cpu")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Weights in the layout of Swin's, of as few channels as the network."""
    torch.manual_seed(5)
    encoder = {
        name: tensor
        for name, tensor in SwinUNet(MODEL).state_dict().items()
        if name.startswith(("patch_embed.", "layers.", "norm."))
    }
    torch.save({"model": encoder}, tmp_path / "swin.pth")
    return tmp_path / "swin.pth"


@pytest.fixture
def run(make_run: Callable[..., RunFolder], published: Path) -> RunFolder:
    """Of one epoch in which next to nothing is learnt, so that the weights stay those of the beginning."""
    run = make_run(epochs=1, steps_per_epoch=2, learning_rate=1e-30)
    run.write_config(run.config.model_copy(update={"model": MODEL, "pretrained": str(published)}))
    return run


def is_published(run: RunFolder, published: Path) -> bool:
    trained = run.load_model().state_dict()
    stored = torch.load(published, weights_only=True)["model"]
    return all(torch.allclose(trained[name], tensor, rtol=0, atol=1e-20) for name, tensor in stored.items())


def test_a_training_begins_with_the_weights_and_notes_their_file(
    run: RunFolder, cases: list[PreparedCase], published: Path
) -> None:
    train(run, cases[:2], cases[2:], CPU)
    assert is_published(run, published)
    assert run.config.pretrained == str(published)


def test_without_them_it_begins_with_others(run: RunFolder, cases: list[PreparedCase], published: Path) -> None:
    run.write_config(run.config.model_copy(update={"pretrained": None}))
    train(run, cases[:2], cases[2:], CPU)
    assert not is_published(run, published)


def test_a_resumed_training_does_not_need_the_file(run: RunFolder, cases: list[PreparedCase], published: Path) -> None:
    with pytest.raises(Stopped):
        train(run, cases[:2], cases[2:], CPU, stop=lambda: True)
    away = published.rename(published.with_name("away.pth"))
    train(run, cases[:2], cases[2:], CPU)
    assert is_published(run, away)


def test_a_training_that_lacks_its_file_does_not_begin(
    run: RunFolder, cases: list[PreparedCase], published: Path
) -> None:
    published.unlink()
    with pytest.raises(InputError, match="no such file"):
        train(run, cases[:2], cases[2:], CPU)
    assert not run.resume_file.exists()
