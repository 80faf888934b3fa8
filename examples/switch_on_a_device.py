"""A device: pulls what job_to_a_folder.py published part-bit first, upgrades, runs, and goes back to part-bit."""

from pathlib import Path

import torch

from storage.device import Device, StoreSource
from storage.stores.uri import open_store
from workers import runtime

device = Device(Path("device"), StoreSource(open_store("./store")), unsigned=True)  # with keys: root_of_trust=
device.pull("first")
model = runtime.load(device.manifest("first"), device.blob_path)
inputs = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    part_bit = model.network(inputs)
    print(f"part-bit: {model.resident_bytes():,} bytes resident, class {part_bit.argmax()}")
    device.upgrade("first")  # fetches the low shards, and nothing else
    model.upgrade()
    full_bit = model.network(inputs)
    print(f"full-bit: {model.resident_bytes():,} bytes resident, class {full_bit.argmax()}")
    model.downgrade()  # offline; the answers are those of before
    device.downgrade("first")
    print(f"part-bit again: {torch.equal(model.network(inputs), part_bit)}")
