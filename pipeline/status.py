"""How far an output is, from storage alone: the plan, the parts that are there, and what their footers say."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from pipeline.plan import Plan, committed, remaining
from pipeline.storage import Storage
from pipeline.write import PartSummary, part_uri, read_summary

_NUM_THREADS = 16  # footers are small reads; the wait is the store's


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of an output."""

    num_inputs: int
    num_shards: int
    num_committed_shards: int
    num_rows: int
    num_ok: int
    errors: Mapping[str, int]  # code -> rows
    audio_seconds: float  # of the rows that are ok
    remaining_seconds: float  # estimated

    @property
    def num_errors(self) -> int:
        """Rows that are errors."""
        return sum(self.errors.values())

    @property
    def is_complete(self) -> bool:
        """Whether every shard of the plan is committed."""
        return self.num_committed_shards == self.num_shards


def status_of(plan: Plan, output_uri: str, storage: Storage) -> Status:
    """Count what is committed of a plan.

    Raises:
        SystemFailure: a part's footer cannot be read.
    """
    there = committed(output_uri, storage)
    todo = remaining(plan, there)
    done = [shard.id for shard in plan.shards if shard.id in there]
    summaries = _summaries(done, output_uri, storage)
    errors: Counter[str] = Counter()
    for summary in summaries:
        errors.update(summary.errors)
    return Status(
        num_inputs=plan.num_inputs,
        num_shards=len(plan.shards),
        num_committed_shards=len(done),
        num_rows=sum(summary.num_rows for summary in summaries),
        num_ok=sum(summary.num_ok for summary in summaries),
        errors=dict(sorted(errors.items())),
        audio_seconds=sum(summary.audio_seconds for summary in summaries),
        remaining_seconds=sum(shard.estimated_seconds for shard in todo),
    )


def _summaries(shard_ids: Sequence[str], output_uri: str, storage: Storage) -> list[PartSummary]:
    uris = [part_uri(output_uri, shard_id) for shard_id in shard_ids]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return list(threads.map(partial(read_summary, storage), uris))
