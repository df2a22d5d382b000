import numpy as np
import pytest

from actors.lane import LaneSettings, open_stages, packed
from pipeline.config import load_config
from pipeline.errors import SystemFailure
from pipeline.load import Padding
from pipeline.messages import AudioFacts, Source, Waveform

PADDING = Padding(prefix_seconds=0.0, delay_seconds=0.5, sampling_rate_hz=24_000, samples_per_frame=1920)

SOURCES = [Source(id=f"id{index}", uri=f"/x/{index}.wav") for index in range(4)]


def pieces(source: Source, count: int) -> list[Waveform]:
    """Piece i holds i + 1 samples, so that pieces can be told apart."""
    return [
        Waveform(
            source=source,
            samples=np.zeros(index + 1, dtype=np.float32),
            is_last=index == count - 1,
            facts=AudioFacts() if index == count - 1 else None,
        )
        for index in range(count)
    ]


def test_packing_loses_nothing_and_keeps_the_order() -> None:
    messages = [piece for source in SOURCES for piece in pieces(source, 3)]
    long = Waveform(source=SOURCES[0], samples=np.zeros(24_000 * 61, np.float32), is_last=False)
    groups = list(packed([*messages, long, *messages]))
    assert [m for group in groups for m in group] == [*messages, long, *messages]
    assert len(groups) == 2  # the long piece fills the first object
    assert groups[0][-1] is long


def test_a_node_with_another_copy_of_the_checkpoint_refuses_to_work() -> None:
    config = load_config(None, ["checkpoint.source=demo"])
    settings = LaneSettings(
        config=config, run_id="t", model_revision="0" * 12, padding=PADDING, num_loaders=1, loader_cpus=1, num_threads=1
    )
    with pytest.raises(SystemFailure, match="revision"):
        open_stages(settings)
