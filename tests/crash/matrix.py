"""The rows of docs/crash-matrix.md. Rows that do not get into each other's way share a run, for the sake of time."""

from collections.abc import Sequence
from typing import Literal

from tests.crash.schedule import Attempt, S3Fault, Schedule, Story, Strike


def _armed(
    name: str, *attempts: str, story: Story = "fresh", resume_seconds: float | None = None, lanes: int = 1
) -> Schedule:
    """Attempts by what they are armed with."""
    armed = tuple(Attempt(failpoints=failpoints, lanes=lanes) for failpoints in attempts)
    return Schedule(name=name, story=story, attempts=armed, resume_seconds=resume_seconds)


def _struck(name: str, victim: str, signal: Literal["KILL", "TERM"], seconds: float, *, lanes: int = 1) -> Schedule:
    strikes = (Strike(after_seconds=seconds, victim=victim, signal=signal),)
    return Schedule(name=name, attempts=(Attempt(strikes=strikes, lanes=lanes),))


_S3_FAULTS = {
    "s3-503": S3Fault(kind="answer", times=2, method="PUT", path="data/part-"),
    "s3-reset": S3Fault(kind="reset", times=1, method="PUT", path="_kikitori"),
    "s3-lost-answer": S3Fault(kind="lose answer", times=1, method="PUT", path="data/part-"),
    "s3-stall": S3Fault(kind="stall", method="GET", path="_kikitori"),
}
_RUNS = (
    _armed(
        "planning",  # each attempt ends at its place
        "local.before-write:kill@2",
        "local.before-publish:kill@2",
        "local.after-publish:kill@3",
        "plan.before-manifest:kill@1",
        "plan.after-manifest:kill@1",
        "settings.before-record:kill@1",
        "settings.after-record:kill@1",
    ),
    _armed("loaders", "loader.before-ready:kill@1,load.before-open:kill@2,load.mid-stream:kill@4"),
    _armed(
        "lanes",
        "encoder.before-ready:kill@1,decoder.before-ready:kill@1,encode.before-piece:kill@2,encode.after-piece:kill@9,"
        "generate.before-accept:kill@10",
    ),
    _armed("slots", "generate.before-pass:kill@9,generate.before-finish:kill@6,align.before-words:kill@11"),
    _armed("commits", "commit.before-check:kill@1,write.before-put:kill@2,write.after-put:kill@2"),
    _armed(
        "drivers",
        "driver.before-lane:kill@1",
        "driver.before-begin:kill@2",
        "driver.before-commit:kill@2",
        "driver.after-commit:kill@2",
    ),
    _armed(
        "journal",
        "write.before-put:kill@1,journal.before-write:kill@1",
        "write.before-put:kill@2,journal.after-write:kill@1",
        "journal.before-close:kill@1",
    ),
    _armed(
        "replacing",
        "write.before-archive:kill@1,write.before-replace:kill@2,write.after-replace:kill@3",
        story="new-version",
    ),
    _armed("amending", "write.before-amend:kill@1,write.after-amend:kill@1", story="retry"),
    _armed("raising", "generate.before-pass:raise@9,write.before-put:raise@2"),
    _armed("disk-full", "local.before-write:full@6-7", "local.before-write:full@14-30"),
    _armed("zombie-driver", "driver.before-commit:pause@2"),
    _armed("zombie-decoder", "write.before-put:pause@2"),
    _armed("zombie-planner", "plan.before-manifest:pause@1"),
    _armed("zombie-of-older-settings", "write.before-put:pause@2", story="superseded"),
    _struck("sigterm", "driver", "TERM", 2.5),
    _struck("one-of-two-lanes", "DecoderActor", "KILL", 2.0, lanes=2),
    _struck("node", "node", "KILL", 2.5),
    Schedule(name="s3", on_s3=True, attempts=(Attempt(s3=tuple(_S3_FAULTS.values())),)),
)
RUNS = {run.name: run for run in _RUNS}


def _rows(runs: Sequence[Schedule]) -> dict[str, tuple[str, str]]:
    rows: dict[str, tuple[str, str]] = {}
    for run in runs:
        orders = [order for attempt in run.attempts for order in attempt.failpoints.split(",") if order]
        if run.on_s3:
            rows |= {name: (run.name, f"s3 {fault.kind}") for name, fault in _S3_FAULTS.items()}
        elif len(run.attempts) == 1 and (run.attempts[0].strikes or ":pause" in orders[0]):
            rows[run.name] = (run.name, orders[0] if orders else run.attempts[0].strikes[0].victim)
        elif run.name == "disk-full":
            rows |= {"disk-full": (run.name, "local.before-write:full@6"), "disk-full-for-long": (run.name, "@14")}
        else:
            kept = [order for order in orders if run.name != "journal" or order.startswith("journal")]
            rows |= {_row_name(order): (run.name, order) for order in kept}
    return rows


def _row_name(order: str) -> str:
    place, action = order.split("@")[0].split(":")
    return place if action == "kill" else f"{place}-{action}"


# Row -> the run it is part of, and what must have struck in it.
ROWS = _rows(_RUNS)
