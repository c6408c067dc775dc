"""The journal of a monitor: one line per unit, on disk before the unit is acknowledged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any

from adaptive._monitor_records import JournalError

_log = logging.getLogger(__name__)
SCHEMA = 1


class Journal:
    """An append-only file of JSON lines that outlives the process at any point.

    The first line is the header. A group of lines is written in one call and synced before
    :meth:`append` returns: what was acknowledged is on the disk, and what was not is at most a
    beginning of the group, whose last line may be torn. A torn last line is cut off when the
    file is opened. One process at a time: the file is locked.

    Parameters
    ----------
    path : Path
    header : dict
        What the journal must be about; written if the file is new or empty.

    Raises
    ------
    JournalError
        If the file is another's, damaged, or in use.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        self._file = path.open("a+b", buffering=0)
        try:
            _lock(self._file, path)
            self._cut()
            if self._file.seek(0, os.SEEK_END) == 0:
                self.append([{"kind": "header", "schema": SCHEMA} | header])
            if new:
                _sync_folder(path.parent)
            self.start = self._check(header)
        except BaseException:
            self._file.close()
            raise

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._file.seek(0, os.SEEK_END)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._file.closed

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write records and wait until they are on the disk."""
        if self.closed:
            raise JournalError(f"{self.path} is closed: make a new monitor to go on with it")
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
        before = self.size
        try:
            written = 0
            while written < len(lines):
                written += self._file.write(lines[written:])
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(before)  # a disk that is full must not leave half a line
            raise

    def read(self, offset: int) -> Iterator[dict[str, Any]]:
        """Return records from a byte offset on (:attr:`start` is the first behind the header)."""
        with self.path.open("rb") as file:
            file.seek(offset)
            yield from _parsed(file, self.path, offset)

    def close(self) -> None:
        """Unlock and close the file."""
        self._file.close()

    def _cut(self) -> None:
        """Cut a torn last line off."""
        size = self._file.seek(0, os.SEEK_END)
        back = 1 << 16
        while True:
            start = max(0, size - back)
            self._file.seek(start)
            tail = self._file.read(size - start)
            end = tail.rfind(b"\n") + 1
            if end or start == 0:
                break
            back *= 4
        if start + end < size:
            _log.warning("the last line of %s is torn and is cut off", self.path)
            self._file.truncate(start + end)
            os.fsync(self._file.fileno())

    def _check(self, header: dict[str, Any]) -> int:
        with self.path.open("rb") as file:
            first = file.readline()
        found = _record(first, self.path, 0)
        if found.get("kind") != "header" or found.get("schema") != SCHEMA:
            raise JournalError(
                f"{self.path} is not a journal this version reads (schema {SCHEMA}): its first "
                f"line says kind {found.get('kind')!r}, schema {found.get('schema')!r}"
            )
        check_header(found, header, str(self.path))
        return len(first)


def read_journal(path: str | Path) -> Iterator[dict[str, Any]]:
    """Return the records of a journal, header first; a torn last line is left out.

    Raises
    ------
    JournalError
        If there is no such file, or a line is not a record.
    """
    place = Path(path)
    if not place.is_file():
        raise JournalError(f"no journal at {place}")
    with place.open("rb") as file:
        yield from _parsed(file, place, 0)


def check_header(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """Refuse what another policy's monitor, or one with other settings, has written."""
    if found.get("policy") != expected["policy"]:
        raise JournalError(
            f"{name} belongs to the policy {found.get('policy')}, this is {expected['policy']}: "
            "name another file, or load the policy it was written for"
        )
    mine, theirs = json.loads(json.dumps(expected["rules"])), found.get("rules") or {}
    other = sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))
    if other:
        raise JournalError(
            f"{name} was begun with other settings ({', '.join(other)}): its promise would not "
            "survive a change. Name another file, or use the settings it was begun with"
        )


@dataclass(frozen=True)
class Snapshot:
    """A state and the place in the journal behind it, so that a start need not read everything.

    Parameters
    ----------
    offset : int
        Bytes of the journal that the state accounts for.
    state : dict
    """

    offset: int
    state: dict[str, Any]

    def write(self, path: Path, header: dict[str, Any]) -> None:
        """Write whole or not at all."""
        body = json.dumps({"offset": self.offset, "state": self.state} | header, allow_nan=False)
        text = json.dumps({"schema": SCHEMA, "sha256": _digest(body), "body": body})
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)

    @classmethod
    def read(cls, path: Path, header: dict[str, Any]) -> Snapshot | None:
        """Read a snapshot; ``None`` if there is none.

        Raises
        ------
        JournalError
            If it is damaged, or of another policy or other settings.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            data = json.loads(text)
            body = data["body"]
            intact = data["schema"] == SCHEMA and data["sha256"] == _digest(body)
            found = json.loads(body)
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"the snapshot {path} is damaged: {error!r}") from error
        if not intact:
            raise JournalError(
                f"the snapshot {path} is damaged: its checksum differs. Delete it: the journal "
                "alone is enough"
            )
        check_header(found, header, str(path))
        return cls(int(found["offset"]), found["state"])


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _parsed(file: IO[bytes], path: Path, offset: int) -> Iterator[dict[str, Any]]:
    for line in file:
        if not line.endswith(b"\n"):
            return
        yield _record(line, path, offset)
        offset += len(line)


def _record(line: bytes, path: Path, offset: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise JournalError(f"{path} is damaged at byte {offset}: {error}") from error
    if not isinstance(found, dict):
        raise JournalError(f"{path} is damaged at byte {offset}: {found!r} is not a record")
    return found


def _lock(file: FileIO, path: Path) -> None:
    """Keep other processes out; where the system has no such locks, nothing is done."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise JournalError(
            f"{path} is in use by another monitor: each needs a journal of its own"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a new or renamed name in a folder outlive a loss of power, where that is possible."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
