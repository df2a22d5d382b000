"""A place does what was ordered, at the hit that was ordered, once over all processes; and nothing unless armed."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.failpoints import FOLDER_VARIABLE, PLACES, VARIABLE, Injected, arm, failpoint, parse, struck

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm({})


def test_nothing_happens_unless_armed() -> None:
    failpoint("write.before-put")


def test_only_the_ordered_hits_are_struck() -> None:
    arm({VARIABLE: "write.before-put:raise@2-3"})
    outcomes: list[bool] = []
    for _ in range(5):
        try:
            failpoint("write.before-put")
            outcomes.append(False)
        except Injected:
            outcomes.append(True)
        failpoint("write.after-put")
    assert outcomes == [False, True, True, False, False]


def test_hits_are_counted_over_all_processes(tmp_path: Path) -> None:
    """Four processes come to the place three times each; the seventh hit, whoever has it, is the one that is killed."""
    code = "from pipeline.failpoints import failpoint\nfor _ in range(3): failpoint('load.before-open')"
    environment = {VARIABLE: "load.before-open:kill@7", FOLDER_VARIABLE: str(tmp_path), "PATH": "/usr/bin:/bin"}
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) for _ in range(4)]
    codes = sorted(process.wait(timeout=60) for process in processes)
    assert codes == [-signal.SIGKILL, 0, 0, 0]
    assert list(struck(tmp_path)) == ["load.before-open:kill@7"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("write.before-pt:kill", "there is no place 'write.before-pt'"),
        ("write.before-put:explode", "expected PLACE:ACTION@HIT"),
        ("write.before-put", "expected PLACE:ACTION@HIT"),
        ("*:kill", "there is no place"),
    ],
)
def test_a_mistyped_order_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_every_place_is_in_the_code_exactly_as_named() -> None:
    """A place that nothing passes through could never fail, and a name that is not listed could never be armed."""
    sources = [path for folder in ("pipeline", "actors") for path in (ROOT / folder).glob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.name != "failpoints.py")
    assert set(re.findall(r'failpoint\("([\w.-]+)"\)', text)) == set(PLACES)
