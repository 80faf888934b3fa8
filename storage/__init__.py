"""Bytes and names: blobs by digest, manifests, versions, tags; the device's pull.

Imports neither torch nor ray; numpy, zstandard and boto3 only in the modules that need them (``storage.shard``,
``storage.stores.s3``). Nothing is imported here, so that a command that fails or helps does not load pydantic first.

Begin with ``storage.stores.uri.open_store``, ``storage.registry.Registry`` and ``storage.device.Device``.
"""
