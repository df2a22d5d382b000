"""When to give up a run whose world is broken: wrong bucket, expired credentials, a model that fails on everything.

Errors are rows, and a run goes on over them; but when most inputs are errors, more of them help nobody.
"""

from collections import Counter

from actors.lane import ShardReport
from pipeline.errors import SystemFailure

_MIN_INPUTS = 50  # below that, a rate says little
_MAX_CODES_NAMED = 3


class Alarm:
    """Counts what this run has finished, shard by shard.

    Args:
        max_error_rate: errors per finished input, 0 to 1; None: never ring.
        num_inputs: all that this run has to do.
    """

    def __init__(self, max_error_rate: float | None, *, num_inputs: int) -> None:
        self._max_error_rate = max_error_rate
        self._min_inputs = min(_MIN_INPUTS, num_inputs)
        self._open: dict[str, ShardReport] = {}
        self._settled_ids: set[str] = set()
        self._num_settled = 0
        self._settled: Counter[str] = Counter()
        self._example: str | None = None

    def saw(self, report: ShardReport) -> None:
        """How far a shard is now; what was known of it before is replaced."""
        if report.shard_id in self._settled_ids:  # a report that was on its way when the shard was committed
            return
        self._open[report.shard_id] = report
        self._example = self._example or report.example

    def forget(self, shard_id: str) -> None:
        """A shard was lost with its lane and begins anew."""
        self._open.pop(shard_id, None)

    def settle(self, shard_id: str) -> None:
        """A shard is committed: it counts, and is not heard of again."""
        self._settled_ids.add(shard_id)
        report = self._open.pop(shard_id, None)
        if report is not None:
            self._num_settled += report.num_finished
            self._settled.update(report.errors)

    def check(self) -> None:
        """Raises SystemFailure if too many inputs are errors."""
        if self._max_error_rate is None:
            return
        finished = self._num_settled + sum(report.num_finished for report in self._open.values())
        errors = sum((Counter(report.errors) for report in self._open.values()), self._settled)
        if finished < self._min_inputs or errors.total() <= self._max_error_rate * finished:
            return
        codes = ", ".join(f"{code} {count:,}" for code, count in errors.most_common(_MAX_CODES_NAMED))
        raise SystemFailure(
            f"{errors.total():,} of the {finished:,} inputs finished so far are errors, more than --max-error-rate "
            f"{self._max_error_rate:g} allows: {codes}; e.g. {self._example}. "
            "Check input.uris, the credentials in input.storage_options, and the network"
        )
