"""The comparison compares: tokens first, then every system on the same clips."""

import json

import numpy as np
import pytest

from benchmarks.peers import batches, main, padded

pytestmark = pytest.mark.oracle


def test_all_three_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--slots", "2", "--lookahead", "1,2", "--batches", "2", "--clips", "3", "--seconds", "2", "--repeats", "2"]
    main(["--shape", "tiny", *sizes])
    *shown, last = capsys.readouterr().out.splitlines()
    facts = json.loads(last)
    assert [entry["system"] for entry in facts["systems"]] == ["kikitori", "transformers", "moshi"]
    assert facts["systems"][0]["ours_is_faster"] == 1
    assert all(len(entry["wall_seconds"]) == 2 for entry in facts["systems"])
    assert len(facts["tried_once"]) == 2 + 2 + 1
    # 2 s, 0.5 s and 1 s at 12.5 Hz are 43.75 frames of the longest; all clips here are at least 1.3 s.
    assert facts["equal_tokens"]["transformers"] == facts["equal_tokens"]["moshi"] > 3 * 30
    assert any("tokens equal" in line for line in shown)


def test_batches_hold_clips_of_similar_length() -> None:
    samples = [np.ones(num, np.float32) for num in (3, 9, 5, 1, 7)]
    assert list(batches(samples, 2)) == [[1, 4], [2, 0], [3]]
    assert padded(samples, [4, 2]).sum(dim=1).tolist() == [7, 5]
    assert padded(samples, [4, 2]).shape == (2, 7)
