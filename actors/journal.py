"""What lost lanes have taught about a shard: kept on storage, so that a repeated run need not lose them again.

    OUTPUT/_kikitori/journal/<shard id>.json

Only a driver that saw a lane die and lived to tell writes here; of what was in hand when a driver died with its lanes
nothing is known, and nobody is blamed for it.

A shard that was open in `_SUSPECT_AFTER` dying lanes is suspect: from then on it is alone with its lane and done in
groups, the driver knowing which one is in hand. A death convicts a group of one; a larger group is done one input at a
time from then on. So p inputs that kill processes cost their shard at most `_SUSPECT_AFTER` + 2 p lanes, over any
number of runs with the same settings: per input one death for its group and one for itself.

Groups have the square root of the shard's inputs. By arithmetic, to find one input among 2,048 where a lane takes 40 s
to replace and 0.8 s for a stream, or for up to 64 together: one at a time, 1 death and 28 min; halving, 11 deaths and
8 min, most of it waiting for lanes; groups, 2 deaths and 3 min.
"""

import json
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from actors.lane import Culprit
from pipeline.failpoints import failpoint
from pipeline.storage import Storage, join

logger = logging.getLogger(__name__)

_SUSPECT_AFTER = 2  # deaths; the first may well be somebody else's fault
_FEW = 16  # inputs: up to here the second death that a group costs takes longer than going one by one
_NUM_THREADS = 16


@dataclass(slots=True)
class Case:
    """What is known of one shard."""

    shard_id: str
    deaths: int = 0  # of lanes that had it open
    culprits: tuple[Culprit, ...] = ()
    suspects: frozenset[str] = frozenset()  # inputs that were in hand, in a group, at a death
    cleared: frozenset[str] = frozenset()  # inputs that came through, in this run

    @property
    def is_suspect(self) -> bool:
        """Whether the shard has to be alone with its lane."""
        return self.deaths >= _SUSPECT_AFTER

    def groups(self, ids: Sequence[str]) -> list[tuple[str, ...]]:
        """How to do these inputs, one group after the other; those that may kill come first, before much is done."""
        if not self.is_suspect:
            return [tuple(ids)]
        suspects = [id for id in ids if id in self.suspects]
        cleared = tuple(id for id in ids if id in self.cleared - self.suspects)
        others = [id for id in ids if id not in self.cleared | self.suspects]
        size = 1 if len(others) <= _FEW else math.isqrt(len(others))
        cut = [tuple(others[start : start + size]) for start in range(0, len(others), size)]
        return [*((id,) for id in suspects), *cut, *([cleared] if cleared else [])]

    def died(self, in_hand: Collection[str], *, died: bool, detail: str) -> bool:
        """A lane that had the shard is dead; -> whether that tells more than was known.

        Args:
            in_hand: what was being done; empty unless the shard was alone with its lane.
            died: False: the model raised, and the process was given up for it.
            detail: what it died of.
        """
        self.deaths += 1
        known = self.suspects | {culprit.source_id for culprit in self.culprits}
        if len(in_hand) == 1:
            (source_id,) = in_hand
            self.culprits += (Culprit(source_id=source_id, died=died, detail=detail),)
        elif not known.issuperset(in_hand):
            self.suspects |= frozenset(in_hand)
        else:
            return False
        return True


class Journal:
    """The cases of one output.

    Args:
        storage: where the output is.
        output_uri: of the output.
        config_fingerprint: of the settings; what happened with others says nothing about these.
    """

    def __init__(self, storage: Storage, output_uri: str, config_fingerprint: str) -> None:
        self._storage = storage
        self._folder = join(output_uri, "_kikitori", "journal")
        self._config_fingerprint = config_fingerprint

    def read(self, *, acquitted: Collection[str] = ()) -> dict[str, Case]:
        """All cases by shard; culprits whose error code is in `acquitted` get another chance."""
        if not self._storage.is_folder(self._folder):
            return {}
        uris = [entry.uri for entry in self._storage.list_files(self._folder) if entry.uri.endswith(".json")]
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            cases = [case for case in threads.map(self._read, uris) if case is not None]
        for case in cases:
            case.culprits = tuple(culprit for culprit in case.culprits if culprit.code not in acquitted)
        return {case.shard_id: case for case in cases}

    def write(self, case: Case) -> None:
        """Put down what is known now."""
        record = {
            "config_fingerprint": self._config_fingerprint,
            "deaths": case.deaths,
            "culprits": [asdict(culprit) for culprit in case.culprits],
            "suspects": sorted(case.suspects),
        }
        failpoint("journal.before-write")
        self._storage.overwrite(self._uri(case.shard_id), json.dumps(record, indent=2).encode())
        failpoint("journal.after-write")

    def close(self, case: Case) -> None:
        """The shard is committed: only its culprits are worth remembering."""
        failpoint("journal.before-close")
        if case.culprits:
            self.write(case)
        else:
            self._storage.delete(self._uri(case.shard_id))

    def _uri(self, shard_id: str) -> str:
        return join(self._folder, f"{shard_id}.json")

    def _read(self, uri: str) -> Case | None:
        try:
            record: Mapping[str, Any] = json.loads(self._storage.read_bytes(uri))
            if record["config_fingerprint"] != self._config_fingerprint:
                return None
            return Case(
                shard_id=PurePosixPath(uri).stem,
                deaths=int(record["deaths"]),
                culprits=_culprits(record["culprits"]),
                suspects=frozenset(map(str, record["suspects"])),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            # It saves lanes and decides nothing: a run must not end over it.
            logger.warning("%s cannot be read and is ignored: %s", uri, error)
            return None


def _culprits(records: Iterable[Mapping[str, Any]]) -> tuple[Culprit, ...]:
    return tuple(
        Culprit(source_id=str(one["source_id"]), died=bool(one["died"]), detail=str(one["detail"])) for one in records
    )
