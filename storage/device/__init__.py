"""The device's half of the store: resolve, pull, upgrade, downgrade, verify, roll back."""

from storage.device.device import Device, Event, Moved, Status, Verified
from storage.device.fetch import Pace, Retry
from storage.device.open import open_source
from storage.device.source import Source, StoreSource

__all__ = ["Device", "Event", "Moved", "Pace", "Retry", "Source", "Status", "StoreSource", "Verified", "open_source"]
