"""Every row of docs/crash-matrix.md, for real. `python -m benchmarks.crash` does such things at random."""

import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from pipeline.failpoints import PLACES
from tests.crash.disturb import Outcome, disturb, prepare
from tests.crash.matrix import ROWS, RUNS
from tests.crash.world import world

_DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "crash-matrix.md"
Run = Callable[[str], Outcome]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Do a run, once; rows that share it share its outcome."""
    # Not pytest's own folder: the name of a socket may have 107 bytes.
    folder = tempfile.TemporaryDirectory(prefix="crash-", ignore_cleanup_errors=True)
    with folder as root, world(Path(root), with_s3=True) as place:
        expected = prepare(place)

        def do(name: str) -> Outcome:
            return disturb(place, RUNS[name], expected)

        yield cache(do)


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS)
def test_the_output_holds_every_input_exactly_once(row: str, run: Run) -> None:
    name, struck = ROWS[row]
    outcome = run(name)
    assert not outcome.problems
    assert any(struck in what for what in outcome.struck), f"{struck} did not come to pass: {outcome.struck}"


def test_the_document_and_the_tests_have_the_same_rows() -> None:
    found = re.findall(r"^\| .*\| `([\w.-]+)` \|$", _DOCUMENT.read_text(), re.MULTILINE)
    assert sorted(found) == sorted(ROWS)


def test_every_place_is_in_a_row() -> None:
    assert not PLACES.keys() - {struck.split(":")[0] for _, struck in ROWS.values()}
