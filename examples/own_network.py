"""An architecture that neither timm nor pytorchcv has: its code travels with the job, and a device is given it."""

from pathlib import Path

import numpy as np
import torch
from my_nets import build
from safetensors.torch import save_file

from jobs.driver import run_job
from jobs.spec.job import JobSpec
from storage.device import Device, StoreSource
from storage.stores.uri import open_store
from workers import runtime
from workers.executor import InProcessExecutor

torch.manual_seed(0)
save_file(build(channels=32).state_dict(), "weights.safetensors")  # stands in for your trained network
inputs = np.random.default_rng(0).standard_normal((64, 3, 32, 32), dtype=np.float32)
np.savez("inputs.npz", inputs=inputs)  # prepared already; a folder of photographs works too

model = {"factory": "my_nets:build", "kwargs": {"channels": 32}, "checkpoint": "weights.safetensors"}
spec = {
    "name": "mine",
    "model": model,  # with "code": "my_nets.py" where workers have not installed it
    "quantize": {"recipe": "calibrated"},
    "preprocess": {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "calibration": {"data": "inputs.npz", "samples": 64},
    "store": {"uri": "./store"},
}
run_job(JobSpec.model_validate(spec), InProcessExecutor())

device = Device(Path("device"), StoreSource(open_store("./store")), unsigned=True)
device.pull("mine")
nested = runtime.load(device.manifest("mine"), device.blob_path, network=build(channels=32))
with torch.inference_mode():
    print(f"part-bit answers {tuple(nested.network(torch.from_numpy(inputs)).shape)}")
