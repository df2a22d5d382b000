"""The script prints a table and, last, one JSON object; it needs no library beyond those of the engine."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.encode import agreement, main

ROOT = Path(__file__).parent.parent.parent
FOREIGN = ("ray", "av", "soxr", "pydantic", "yaml", "pyarrow", "fsspec", "click", "rich", "transformers", "moshi")


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    what = ["--shape", "tiny", "--rows", "1,3", "--piece-frames", "2,5", "--precision", "bfloat16,float32,tf32"]
    main([*what, "--clips", "4", "--seconds", "2", "--repeats", "2", "--device", "cpu", "--decoder-rtfx", "10"])
    *shown, last = capsys.readouterr().out.splitlines()
    facts = json.loads(last)
    rows = [(row["precision"], row["rows"], row["piece_frames"]) for row in facts["encode"]]
    assert rows == [(p, r, f) for p in ("float32", "bfloat16") for r in (1, 3) for f in (2, 5)]
    assert len(shown) == 1 + 2 + 8
    assert all(len(row["wall_seconds"]) == 2 and row["rows_alike"] for row in facts["encode"])
    for row in facts["encode"]:
        assert (row["surplus"] > 0) == (row["rows"] > 1)
        assert (row["equal"]["frames"] == 1) == (row["precision"] == "float32")
        assert 0 < row["of_limit"] < 1
    assert facts["encoder_to_decoder"] > 0


def test_agreement_is_by_codebook_and_by_frame() -> None:
    codes = np.zeros((8, 4), np.int16)
    other = codes.copy()
    other[0, 0] = other[7, 0] = other[7, 1] = 1
    assert agreement(codes, other) == {"codebook_1": 0.75, "codebook_8": 0.5, "frames": 0.5}


def test_a_precision_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--precision", "float8"])
    assert "float8; known are float32, tf32, bfloat16" in capsys.readouterr().err


def test_a_machine_with_little_installed_is_enough() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({FOREIGN!r}));"
    program = blocked + "import benchmarks.encode"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
