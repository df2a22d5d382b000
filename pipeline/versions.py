"""Which settings an output is made with: numbered records that are never rewritten; the highest is in force.

    OUTPUT/_kikitori/settings/settings-00000.json   of the first run
    OUTPUT/_kikitori/settings/settings-00001.json   of the first `run --new-version`, and so on

Each is written create-only, so of two runs that begin at the same moment with different settings one gets the number
and the other stops. A run looks again before it puts a part, and stops when a newer version is in force.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipeline.config import fingerprint
from pipeline.errors import ConfigError, Superseded, SystemFailure
from pipeline.failpoints import failpoint
from pipeline.storage import Storage, join
from pipeline.write import PartSummary

COLUMNS = "output.columns"
_NAME = re.compile(r"settings-(\d{5,})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One set of settings, and its place in the order in which they were recorded."""

    number: int
    settings: Mapping[str, Any]  # decoding settings, and the extra columns under `COLUMNS`

    @property
    def config_fingerprint(self) -> str:
        """As in the rows: of the decoding settings, without the columns."""
        return fingerprint({key: value for key, value in self.settings.items() if key != COLUMNS})

    def made(self, part: PartSummary) -> bool:
        """Whether a part was made with these settings and has these columns."""
        same_settings = part.config_fingerprint == self.config_fingerprint
        return same_settings and sorted(part.columns) == sorted(self.settings.get(COLUMNS, ()))


def read_versions(output_uri: str, storage: Storage) -> tuple[Version, ...]:
    """All that were ever recorded, oldest first.

    Raises:
        SystemFailure: a record is damaged.
    """
    folder = _folder(output_uri)
    uris = [entry.uri for entry in storage.list_files(folder)] if storage.is_folder(folder) else []
    matches = ((_NAME.fullmatch(PurePosixPath(uri).name), uri) for uri in uris)
    numbered = {int(match[1]): uri for match, uri in matches if match}
    if 0 not in numbered and storage.exists(before := join(output_uri, "_kikitori", "settings.json")):
        numbered[0] = before  # where the first releases wrote it
    return tuple(_read(number, numbered[number], storage) for number in sorted(numbered))


def check_settings(settings: Mapping[str, Any], versions: Sequence[Version], *, output_uri: str) -> None:
    """Refuse to resume with other settings than those in force.

    Raises:
        ConfigError: they differ; every difference is named.
    """
    if versions and settings != versions[-1].settings:
        raise ConfigError(
            f"{output_uri} was begun with other settings:\n  "
            + "\n  ".join(differences(versions[-1].settings, settings))
            + "\nGo back to those settings, choose another output.uri, or add --new-version: every input is then done "
            "again and every part replaced"
        )


def record_version(
    settings: Mapping[str, Any], versions: Sequence[Version], *, output_uri: str, storage: Storage
) -> Version:
    """Put these settings in force, unless they are already.

    Args:
        settings: of this run.
        versions: as they were read before; nothing else may have been recorded since.
        output_uri: of the output.
        storage: where it is.

    Raises:
        ConfigError: another run has just recorded other settings.
    """
    if versions and versions[-1].settings == settings:
        return versions[-1]
    number = versions[-1].number + 1 if versions else 0
    ours = Version(number=number, settings=settings)
    record = {"config_fingerprint": ours.config_fingerprint, "settings": dict(settings)}
    failpoint("settings.before-record")
    if storage.create(_uri(output_uri, number), json.dumps(record, indent=2).encode()):
        failpoint("settings.after-record")
        return ours
    theirs = read_versions(output_uri, storage)[-1]
    if theirs.settings != settings:
        raise ConfigError(
            f"another run has just begun in {output_uri} with other settings, so this one stops:\n  "
            + "\n  ".join(differences(theirs.settings, settings))
            + "\nLet one of them finish, or choose another output.uri for one"
        )
    return theirs


def check_in_force(version: Version, output_uri: str, storage: Storage) -> None:
    """Make sure that nothing newer was recorded: one look at the next number.

    Raises:
        Superseded: it was.
    """
    if storage.exists(_uri(output_uri, version.number + 1)):
        raise _superseded(output_uri)


def check_not_newer(part: PartSummary, version: Version, output_uri: str, storage: Storage) -> None:
    """Make sure that a part was not made with settings that came into force after `version`.

    Raises:
        Superseded: it was.
    """
    if any(later.made(part) for later in read_versions(output_uri, storage) if later.number > version.number):
        raise _superseded(output_uri)


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per key whose values differ."""
    return [
        f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*there, *now})
        if there.get(key) != now.get(key)
    ]


def _superseded(output_uri: str) -> Superseded:
    return Superseded(
        f"another run has put newer settings in force in {output_uri} (--new-version), so this one stops; "
        "what it has committed will be done again by the other"
    )


def _folder(output_uri: str) -> str:
    return join(output_uri, "_kikitori", "settings")


def _uri(output_uri: str, number: int) -> str:
    return join(_folder(output_uri), f"settings-{number:05d}.json")


def _read(number: int, uri: str, storage: Storage) -> Version:
    try:
        settings = json.loads(storage.read_bytes(uri))["settings"]
    except (ValueError, KeyError, TypeError):
        settings = None
    if not isinstance(settings, dict):
        raise SystemFailure(
            f"{uri} is damaged: it does not hold the settings of the output; restore it from a backup, or choose "
            "another output.uri"
        )
    return Version(number=number, settings=settings)
