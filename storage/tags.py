"""Tags that move by create-only, numbered entries: a history, an undo, and no race that leads back.

    models/<name>/entries/<tag>/<8 digits>.json   what the tag says after this move; put if absent, the newest counts
    models/<name>/entries/<tag>/newest.json       a copy of the newest entry: where to look first
    models/<name>/tags/<tag>.json                 what it says, for releases that know no entries

A move is judged by the newest entry and takes the number behind it, so two that race are judged one after the other.
Both copies are written after the entry and may lag behind it; each writer goes on until they name the newest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from storage import layout
from storage.errors import NotFound, WouldGoBack
from storage.manifest import canonical_json
from storage.numbering import take_number
from storage.references import MAX_TAG_BYTES, TagEntry, TagRecord, TagState, parse_entry, read_tag_state
from storage.stores.blob_store import BlobStore


@dataclass(frozen=True)
class TagLog:
    """The entries of one tag of one model. ``holds``: tells whether a record's version is there under its digest."""

    store: BlobStore
    name: str
    tag: str
    holds: Callable[[TagRecord], bool]

    def state(self) -> TagState:
        """Return what stands in the store. Raises `InvalidManifest` where the newest entry is damaged."""
        return read_tag_state(self._read, self.name, self.tag)

    def move(self, target: TagRecord, *, back: bool = False) -> TagEntry:
        """Point the tag at a version and return the entry that says so; none is added where it points there already.

        Raises:
            WouldGoBack: the version is an earlier one than the tag names, and ``back`` was not said.
        """
        while True:
            newest = self._adopted()
            if newest is not None and newest.record() == target:
                return self._keep_in_step(newest)
            if newest is not None and target.version < newest.version and not back:
                raise WouldGoBack(
                    f"{self.name}: tag {self.tag!r} names version {newest.version}; at version {target.version} "
                    "devices would go back: say --back if that is meant"
                )
            earlier = newest is not None and target.version < newest.version
            if (entry := self._append(newest, target, "back" if earlier else "forward")) is not None:
                return entry

    def advance(self, target: TagRecord) -> TagEntry | None:
        """Point the tag at a version that is later than all that it ever named; None, and no move, where it is not.

        What a job may do: a person's move back is not undone by a job that began before it.
        """
        while True:
            newest = self._adopted()
            if newest is not None and newest.record() == target:
                return self._keep_in_step(newest)
            if newest is not None and target.version <= newest.highest and target.version != newest.version:
                return None
            if (entry := self._append(newest, target, "forward")) is not None:
                return entry

    def undo(self) -> TagEntry:
        """Take the last move back; a second undo takes back the one before. Two at once take back one move.

        Raises:
            NotFound: there is no such tag, or nothing stands before its first move.
        """
        while True:
            newest = self._adopted()
            if newest is None:
                raise no_tag(self.store, self.name, self.tag)
            if newest.before is None:
                raise NotFound(
                    f"{self.name}: tag {self.tag!r} names version {newest.version}, and nothing stands before that; "
                    f"'nestquant tag {self.name}@N {self.tag} --back' names another one"
                )
            before = self._entry(newest.before)
            if (entry := self._append(newest, before.record(), "undo", before=before.before)) is not None:
                return entry

    def history(self) -> list[tuple[TagEntry, float]]:
        """Return every entry, oldest first, each with the store's time of it in seconds since 1970."""
        newest = self.state().entry
        numbers = range(1, (0 if newest is None else newest.number) + 1)
        keys = [layout.entry_key(self.name, self.tag, number) for number in numbers]
        return [
            (self._entry(number), self.store.head(key).modified_s) for number, key in zip(numbers, keys, strict=True)
        ]

    def _adopted(self) -> TagEntry | None:
        """Return the newest entry, after a move that an older release made without one was given its own."""
        while True:
            state = self.state()
            record = state.moved_by_older()
            if record is None or not self.holds(record):
                return state.entry
            if (entry := self._append(state.entry, record, "adopted")) is not None:
                return entry

    def _append(
        self, newest: TagEntry | None, target: TagRecord, move: str, *, before: int | None = None
    ) -> TagEntry | None:
        """Take the number behind ``newest``; None where somebody else has it."""
        number, highest = (0, 0) if newest is None else (newest.number, newest.highest)
        entry = TagEntry.model_validate(
            {
                **target.model_dump(),
                "tag": self.tag,
                "number": number + 1,
                "highest": max(highest, target.version),
                "before": before if move == "undo" or newest is None else newest.number,
                "move": move,
            }
        )
        key = layout.entry_key(self.name, self.tag, entry.number)
        if not take_number(self.store, key, canonical_json(entry), max_bytes=MAX_TAG_BYTES).ours:
            return None
        return self._keep_in_step(entry)

    def _keep_in_step(self, entry: TagEntry) -> TagEntry:
        """Write both copies, and again while a later entry stands there: ours may have overtaken those of its writer.

        Returns ``entry``: what came later is a later move.
        """
        newest = entry
        while True:
            self.store.put(layout.tag_key(self.name, self.tag), canonical_json(newest.record()), mode="overwrite")
            self.store.put(layout.newest_entry_key(self.name, self.tag), canonical_json(newest), mode="overwrite")
            if not self.store.exists(layout.entry_key(self.name, self.tag, newest.number + 1)):
                return entry
            newest = self._entry(newest.number + 1)

    def _entry(self, number: int) -> TagEntry:
        raw = self.store.get(layout.entry_key(self.name, self.tag, number), max_bytes=MAX_TAG_BYTES)
        return parse_entry(raw, self.name, self.tag, number)

    def _read(self, key: str, max_bytes: int) -> bytes | None:
        try:
            return self.store.get(key, max_bytes=max_bytes)
        except NotFound:
            return None


def no_tag(store: BlobStore, name: str, tag: str) -> NotFound:
    """Return the error that says that there is no such tag."""
    return NotFound(
        f"model {name!r}: no tag {tag!r} in {store.uri}; 'nestquant ls' shows what there is",
        key=layout.tag_key(name, tag),
    )
