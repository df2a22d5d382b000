"""What goes wrong in one run, and when: all of it follows from one integer."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tests.crash.world import ACTORS
from tests.fault_proxy import Kind

Story = Literal[
    "fresh",  # an empty output
    "retry",  # a complete one with rows of inputs that could not be fetched: --retry-errors
    "new-version",  # a complete one made with other settings: --new-version
    "superseded",  # the first attempt has other settings than the later ones, which come with --new-version
]
OTHER_SETTINGS: Mapping[str, Any] = {"stages.generate.alignment": "bos-replaces-first"}
# Where a raised exception is the system's fault and not an input's, so that it must not cost a row.
_MAY_RAISE = frozenset(
    {
        "plan.before-manifest",
        "plan.after-manifest",
        "settings.before-record",
        "settings.after-record",
        "driver.before-lane",
        "driver.before-begin",
        "driver.before-commit",
        "encode.before-piece",
        "encode.after-piece",
        "generate.before-accept",
        "generate.before-pass",
        "generate.before-finish",
        "align.before-words",
        "commit.before-check",
        "write.before-put",
        "write.after-put",
        "write.before-archive",
        "write.before-replace",
        "write.after-replace",
        "write.before-amend",
        "write.after-amend",
    }
)
# Where more than three hits can be expected of a run that begins with nothing.
_MOST_HITS = {"load": 14, "encode": 14, "generate": 30, "align": 12, "local": 12, "write": 5, "commit": 5}
_ONLY_IN: Mapping[str, tuple[Story, ...]] = {
    "plan": ("fresh", "superseded"),
    "settings": ("fresh", "new-version", "superseded"),
    "write.before-archive": ("new-version", "superseded"),
    "write.before-replace": ("new-version", "superseded"),
    "write.after-replace": ("new-version", "superseded"),
    "write.before-put": ("fresh", "new-version", "superseded"),
    "write.after-put": ("fresh", "superseded"),
    "write.before-amend": ("retry",),
    "write.after-amend": ("retry",),
}
_S3_TARGETS = (("PUT", "data/part-"), ("GET|HEAD", "data/part-"), ("PUT", "_kikitori"), ("GET|HEAD", ""), (".*", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A signal to a process at some moment; `node` is the raylet, and with it all its workers."""

    after_seconds: float  # since the attempt began; later if the victim is not there yet
    victim: str  # LoadActor, EncoderActor, DecoderActor, driver or node
    signal: Literal["KILL", "TERM", "STOP"] = "KILL"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Fault:
    """As `tests.fault_proxy` knows them."""

    kind: Kind
    times: int = 1
    method: str = ".*"
    path: str = ""
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One call of the command."""

    failpoints: str = ""  # as KIKITORI_FAILPOINTS
    strikes: tuple[Strike, ...] = ()
    s3: tuple[S3Fault, ...] = ()
    lanes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The attempts that are disturbed; then the command is repeated in peace.

    What was stopped goes on `resume_seconds` after the next attempt began, or when the output is complete (None).
    """

    name: str
    story: Story = "fresh"
    on_s3: bool = False
    attempts: tuple[Attempt, ...] = field(default=())
    resume_seconds: float | None = None

    @property
    def may_convict(self) -> bool:
        """Whether so many lanes or loaders die that an innocent input may get its error row, as it is designed."""
        orders = [order for attempt in self.attempts for order in attempt.failpoints.split(",") if order]
        lethal = sum(":kill" in order or ":raise" in order for order in orders)
        return lethal + sum(len(attempt.strikes) for attempt in self.attempts) > 2

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


def schedule_of(seed: int, places: Sequence[str], *, with_s3: bool) -> Schedule:
    """The schedule of a seed; `places` are those that can be reached at all."""
    rng = random.Random(seed)
    on_s3 = with_s3 and rng.random() < 0.3
    stories: list[Story] = ["fresh", "retry", "new-version", "superseded"]
    story = rng.choices(stories, [60, 15, 15, 10])[0]
    count = rng.choices([1, 2, 3], [55, 35, 10])[0]
    reachable = [place for place in places if _is_reachable(place, story, on_s3=on_s3)]
    return Schedule(
        name=f"seed-{seed}",
        story=story,
        on_s3=on_s3,
        attempts=tuple(_attempt(rng, reachable, few=story == "retry", on_s3=on_s3) for _ in range(count)),
        resume_seconds=rng.choice([None, None, rng.uniform(0.2, 3.0)]),
    )


def _is_reachable(place: str, story: Story, *, on_s3: bool) -> bool:
    stage = place.split(".")[0]
    return story in _ONLY_IN.get(place, _ONLY_IN.get(stage, (story,))) and not (on_s3 and stage == "local")


def _attempt(rng: random.Random, places: Sequence[str], *, few: bool, on_s3: bool) -> Attempt:
    orders = [_order(rng, places, few=few) for _ in range(rng.choices([0, 1, 2], [20, 60, 20])[0])]
    num_strikes = rng.choices([0, 1, 2], [65, 28, 7])[0] if orders else 1
    num_s3 = rng.choices([0, 1, 2], [15, 60, 25])[0] if on_s3 else 0
    return Attempt(
        failpoints=",".join(orders),
        strikes=tuple(_strike(rng) for _ in range(num_strikes)),
        s3=tuple(_s3_fault(rng) for _ in range(num_s3)),
        lanes=rng.choice([1, 1, 2]),
    )


def _order(rng: random.Random, places: Sequence[str], *, few: bool) -> str:
    place = rng.choice(places)
    stage = place.split(".")[0]
    actions = ["kill"] * 5 + ["pause"] * 2 + ["sleep=0.7"] + ["raise"] * 2 * (place in _MAY_RAISE)
    if place == "local.before-write":
        actions += ["full"] * 6
    action = rng.choice(actions)
    hit = rng.randint(1, 1 if stage in ("plan", "settings") else 3 if few else _MOST_HITS.get(stage, 3))
    span = rng.choice([0, 2, 8]) if action == "full" else 0
    return f"{place}:{action}@{hit}" + (f"-{hit + span}" if span else "")


def _strike(rng: random.Random) -> Strike:
    victim = rng.choices([*ACTORS, "driver", "node"], [4, 4, 6, 6, 1])[0]
    signals: list[Literal["KILL", "TERM", "STOP"]] = (
        ["KILL", "KILL", "TERM", "STOP"] if victim == "driver" else ["KILL"]
    )
    return Strike(after_seconds=round(rng.uniform(0.0, 3.5), 2), victim=victim, signal=rng.choice(signals))


def _s3_fault(rng: random.Random) -> S3Fault:
    kinds: list[Kind] = ["answer", "reset", "lose answer", "reset body", "cut body", "flip a byte", "stall"]
    kind = rng.choices(kinds, [4, 3, 5, 2, 2, 2, 1])[0]
    method, path = rng.choice(_S3_TARGETS)
    times = 1 if kind == "stall" else rng.choice([1, 1, 2, 4])
    return S3Fault(kind=kind, times=times, method=method, path=path, num_bytes=rng.randint(0, 400))
