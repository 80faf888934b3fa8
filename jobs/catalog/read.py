"""Reading a store for the catalogue: each manifest once, and of one model at a time no more than one whole version.

What is broken becomes a line that says so. What cannot be told apart from a store out of reach (`StoreUnavailable`,
`AccessDenied`) ends the run: a catalogue without half of its models would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tuf.api.metadata import Root

from jobs.catalog.describe import blobs_by_level, describe
from jobs.catalog.record import Broken, Model, Signature, Version
from jobs.measurements import InvalidReport, Measurements, read_measurements
from storage import layout
from storage.errors import AccessDenied, StorageError, StoreUnavailable, VersionDeleted
from storage.registry import Registry, Resolved
from storage.signing.keys import SigningError
from storage.signing.root import newest_root, root_key
from storage.signing.statement import Statement, read_statement
from storage.stores.blob_store import BlobStore

OUT_OF_REACH = (AccessDenied, StoreUnavailable)


@dataclass(frozen=True, slots=True)
class Trust:
    """The store's root of trust; without one nothing is signed. ``problem``: why the root that is there is none."""

    root: Root | None
    problem: str | None = None


def read_trust(store: BlobStore) -> Trust:
    """Return the root that the signatures of all models are checked with."""
    if not store.exists(root_key(1)):
        return Trust(None)
    try:
        return Trust(newest_root(store).signed)
    except OUT_OF_REACH:
        raise
    except StorageError as error:
        return Trust(None, str(error))


class ModelReader:
    """One model of a store. `versions` yields each version that can be read, oldest first, and fills ``model``."""

    def __init__(self, store: BlobStore, name: str, trust: Trust) -> None:
        self.model = Model(name)
        self._registry = Registry(store)
        self._trust = trust
        self._statement: Statement | None = None
        self._signing_problem = trust.problem

    def versions(self) -> Iterator[tuple[Resolved, Measurements | None, Version]]:
        """Yield manifest, measurements and description of each version.

        Raises:
            StoreUnavailable, AccessDenied: the store is out of reach.
        """
        name, model = self.model.name, self.model
        try:
            numbers, reports = self._numbers()
        except OUT_OF_REACH:
            raise
        except StorageError as error:
            model.problems.append(str(error))
            return
        self._read_tags()
        self._read_statement()
        before: tuple[int, list[dict[str, int]]] | None = None
        for number in numbers:
            try:
                resolved = self._registry.resolve(name, number)
            except OUT_OF_REACH:
                raise
            except VersionDeleted:
                model.deleted += 1
                continue
            except StorageError as error:
                model.broken.append(Broken(number, str(error)))
                continue
            problems: list[str] = []
            measured = None
            if number in reports:
                try:
                    measured = read_measurements(self._registry, name, number)
                except InvalidReport as error:
                    problems.append(str(error))
            tags = tuple(sorted(tag for tag, version in model.tags.items() if version == number))
            blobs = blobs_by_level(resolved.manifest)
            version = describe(
                resolved,
                measured,
                tags=tags,
                signature=self._signature(resolved),
                before=before,
                problems=tuple(problems),
            )
            before = (number, blobs)
            yield resolved, measured, version

    def _numbers(self) -> tuple[list[int], set[int]]:
        """Return the numbers that are taken, ascending, and those with a report, as one LIST tells."""
        numbers, reports = [], set()
        for info in self._registry.store.list(layout.versions_prefix(self.model.name)):
            stem, _, rest = info.key.rpartition("/")[2].partition(".")
            if (version := layout.manifest_version(info.key)) is not None and version > 0:
                numbers.append(version)
            elif rest == f"{layout.JOB_REPORT}.json" and stem.isdecimal():
                reports.add(int(stem))
        return sorted(numbers), reports

    def _read_tags(self) -> None:
        name, model = self.model.name, self.model
        for tag in self._registry.tag_names(name):
            try:
                model.tags[tag] = self._registry.read_tag(name, tag).version
            except OUT_OF_REACH:
                raise
            except StorageError as error:
                model.problems.append(f"tag {tag!r}: {error}")

    def _read_statement(self) -> None:
        name, model = self.model.name, self.model
        if self._trust.root is None:
            return
        try:
            self._statement = read_statement(self._registry.store, name, self._trust.root)
            for tag in model.tags if self._statement else ():
                assert self._statement is not None
                model.rollouts += [(tag, rollout) for rollout in self._statement.rollouts(tag)]
        except (SigningError, ValueError) as error:
            self._statement, self._signing_problem = None, str(error)
            model.problems.append(str(error))

    def _signature(self, resolved: Resolved) -> Signature:
        if self._signing_problem is not None:
            return Signature("broken", problem=self._signing_problem)
        statement = self._statement
        if statement is None:
            return Signature("unsigned")
        if not statement.vouches_for(resolved.version, resolved.digest, len(resolved.raw)):
            if layout.manifest_key(resolved.manifest.name, resolved.version) in statement.targets:
                return Signature("broken", problem="another manifest is signed under this number")
            return Signature("unsigned")
        return Signature(
            "signed", statement.edition, tuple(statement.signers.items()), tuple(sorted(statement.ends.items()))
        )
