import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import failpoints
from pipeline.errors import ConfigError
from pipeline.failpoints import FOLDER_VARIABLE, PLACES, VARIABLE, Injected, arm, failpoint, parse, struck

ROOT = Path(__file__).parent.parent.parent
PLACE = "write.before-put"


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm({})


def hits(count: int) -> list[int]:
    """Which of so many passages raise, counted from 1."""
    raised: list[int] = []
    for number in range(1, count + 1):
        try:
            failpoint(PLACE)
        except Injected:
            raised.append(number)
    return raised


def test_the_table_holds_the_places_of_the_code_and_no_others() -> None:
    sources = [path for package in ("pipeline", "actors", "deploy") for path in (ROOT / package).rglob("*.py")]
    called = {name for path in sources for name in re.findall(r'failpoint\("([^"]*)"\)', path.read_text())}
    assert called == set(PLACES)


def test_unarmed_it_does_nothing() -> None:
    arm({})
    assert hits(3) == []
    failpoint("whatever; nobody looks")


@pytest.mark.parametrize(
    ("hit", "expected"), [("", [1]), ("@1", [1]), ("@3", [3]), ("@2-4", [2, 3, 4]), ("@9", []), ("@1,x", None)]
)
def test_it_strikes_at_the_hits_that_are_named(hit: str, expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match="expected PLACE:ACTION@HIT"):
            arm({VARIABLE: f"{PLACE}:raise{hit}"})
        return
    arm({VARIABLE: f"{PLACE}:raise{hit}"})
    failpoint("write.after-put")
    assert hits(6) == expected


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no place 'write\.befor-put'; the places are plan\."):
        parse("write.befor-put:kill")
    with pytest.raises(ConfigError):
        parse("*:kill")


def test_hits_are_counted_over_processes(tmp_path: Path) -> None:
    environment = {VARIABLE: f"{PLACE}:raise@4", FOLDER_VARIABLE: str(tmp_path)}
    arm(environment)
    assert hits(2) == []
    script = f"from pipeline.failpoints import failpoint\nfor _ in range(2): failpoint({PLACE!r})"
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, check=False
    )
    assert b"Injected" in process.stderr
    assert hits(5) == []
    assert list(struck(tmp_path)) == [f"{PLACE}:raise@4"]


@pytest.mark.parametrize(("action", "code"), [("kill", -signal.SIGKILL), ("full", 1), ("sleep=0.01", 0), ("note", 0)])
def test_what_it_does_to_a_process(action: str, code: int, tmp_path: Path) -> None:
    environment = {**os.environ, VARIABLE: f"{PLACE}:{action}", FOLDER_VARIABLE: str(tmp_path)}
    script = f"from pipeline.failpoints import failpoint\nfailpoint({PLACE!r})"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (b"No space left on device" in err) == (action == "full")
    expected = {} if action == "note" else {f"{PLACE}:{action.split('=')[0]}@1": process.pid}
    assert struck(tmp_path) == expected


def test_a_paused_process_stands_still_until_it_is_continued(tmp_path: Path) -> None:
    environment = {**os.environ, VARIABLE: f"{PLACE}:pause", FOLDER_VARIABLE: str(tmp_path)}
    script = f"from pipeline.failpoints import failpoint\nfailpoint({PLACE!r})"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(timeout=60) == 0


def test_every_place_can_be_noted(tmp_path: Path) -> None:
    arm({VARIABLE: "*:note", FOLDER_VARIABLE: str(tmp_path)})
    for place in ("plan.before-manifest", PLACE, PLACE):
        failpoint(place)
    assert {path.name for path in tmp_path.iterdir()} == {
        "hit plan.before-manifest@1",
        f"hit {PLACE}@1",
        f"hit {PLACE}@2",
    }
    assert failpoints.struck(tmp_path) == {}
