"""The device's half of the store: resolve, pull, upgrade, downgrade, verify, roll back."""

from storage.device.device import Device
from storage.device.http import HttpClient, HttpSource, PresignedSource
from storage.device.open import open_source
from storage.device.pace import Pace
from storage.device.report import Event, Moved, Status, Verified
from storage.device.retry import Retry
from storage.device.source import Documents, Source, StoreSource

__all__ = [
    "Device",
    "Documents",
    "Event",
    "HttpClient",
    "HttpSource",
    "Moved",
    "Pace",
    "PresignedSource",
    "Retry",
    "Source",
    "Status",
    "StoreSource",
    "Verified",
    "open_source",
]
