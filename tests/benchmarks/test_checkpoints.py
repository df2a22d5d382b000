"""Both formats hold the same model, which is the one that the shape names."""

from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints import Written, write_both
from models.checkpoint import open_checkpoint
from models.config import decoder_config_from_original, mimi_config_from_original
from models.shapes import SHAPES

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_both(tmp_path_factory.mktemp("both"), TINY)


def test_the_shape_survives(written: Written) -> None:
    opened = open_checkpoint(written.trfs)
    assert (opened.decoder, opened.mimi) == (TINY.decoder, TINY.mimi)
    assert mimi_config_from_original(written.mimi_config, num_codebooks=8) == TINY.mimi
    assert decoder_config_from_original(written.lm_kwargs) == TINY.decoder


@pytest.mark.parametrize("name", ["2.6b", "1b", "60m"])
def test_moshi_is_told_the_right_width(name: str) -> None:
    """It rounds a factor down to the width of the MLP."""
    config = SHAPES[name].decoder
    assert (2 * int(1.5 * config.mlp_dim / config.dim * config.dim)) // 3 == config.mlp_dim


def test_more_weight_makes_more_padding(written: Written, tmp_path: Path) -> None:
    codes = torch.randint(64, (2, 8, 100), generator=torch.Generator().manual_seed(0))
    text = torch.full((2, 100), TINY.speech.padding_id)

    def share(folder: Path) -> float:
        ids = open_checkpoint(folder).load_decoder().clip_logits(text, codes).argmax(-1)
        return (ids == TINY.speech.padding_id).float().mean().item()

    often = write_both(tmp_path, TINY, padding_weight=5.0)
    assert share(written.trfs) < 0.2
    assert share(often.trfs) > 0.5
