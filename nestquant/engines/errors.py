"""What can go wrong where a version runs on an engine. Every message is one line: what is wrong, what to try."""

from __future__ import annotations

from storage.device.errors import DeviceError


class EngineError(DeviceError):
    """Root of everything that goes wrong where a version runs on an engine."""


class NoEngine(EngineError):
    """The engine, or what reads photographs, is not installed."""


class NotExported(EngineError):
    """The version has nothing that the engine could run."""


class LevelMissing(EngineError):
    """The level is not in the device's folder, or the version has none of that number."""


class PhotoError(EngineError):
    """A photograph, or a batch of inputs, cannot be used."""
