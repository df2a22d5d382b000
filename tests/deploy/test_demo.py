from pathlib import Path

import pytest
from rich.console import Console

from deploy.demo import show
from pipeline.config import load_config
from pipeline.discover import discover
from pipeline.fetch import fetch
from pipeline.messages import Shard
from pipeline.run import build_stages, transcribe
from pipeline.storage import Storage
from pipeline.write import WriteStage
from tests.speech import ROOT


def test_every_bundled_clip_is_shown_with_what_was_said_and_heard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, ["checkpoint.source=demo", "checkpoint.device=cpu"])
    stages = build_stages(config, fetch(config.checkpoint))
    uris = [str(ROOT / "digits"), str(ROOT / "people")]
    sources = tuple(found.source for found in discover(uris, Storage()).found)
    write = WriteStage(Storage(), str(tmp_path), stages.provenance("test"))
    write.commit(Shard(id="0" * 16, sources=sources, estimated_seconds=1), list(transcribe(sources, stages)))
    show(str(tmp_path), Console(width=160))
    shown = capsys.readouterr().out
    for source in sources:
        assert Path(source.uri).name in shown
    assert "WER 2.2%" in shown  # the sixteen digit clips; people: 66.7 % and worse, shown as they are
    assert shown.index("unseen: held out") < shown.index("recordings of people")
