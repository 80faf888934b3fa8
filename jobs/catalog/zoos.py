"""The zoos that a store keeps results of, each as a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from storage.errors import NotFound, StorageError
from storage.stores.blob_store import BlobStore
from workers.errors import WorkError


def zoo_pages(store: BlobStore) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the name of each zoo with what fills its page, or one line about why there is none.

    Raises:
        StoreUnavailable, AccessDenied: the store is out of reach.
    """
    names = list(store.folders("zoo/"))
    if not names:
        return
    from jobs.catalog.read import OUT_OF_REACH
    from jobs.zoo.ledger import ZooLedger
    from jobs.zoo.report import page_content

    for name in names:
        try:
            yield name, page_content(name, ZooLedger(store, name).read_rows())
        except NotFound:
            continue  # it has begun and finished no job yet
        except OUT_OF_REACH:
            raise
        except (WorkError, StorageError) as error:
            yield name, f"zoo {name}: {error}"
