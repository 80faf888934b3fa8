"""A job from weights to a published version: 4 bits nested in 8, in the folder ./store."""

import numpy as np

from jobs.driver import run_job
from jobs.spec.job import JobSpec
from workers.executor import InProcessExecutor

random = np.random.default_rng(0)
np.savez("images.npz", x=random.integers(0, 256, (32, 64, 64, 3), dtype=np.uint8))  # stand in for your own photographs

spec = JobSpec.model_validate(
    {
        "name": "first",
        "model": {"library": "timm", "arch": "test_resnet", "random_seed": 0},  # or checkpoint: weights.safetensors
        "quantize": {"recipe": "calibrated", "bits": [8, 4]},
        "preprocess": {"size": 64},
        "calibration": {"data": "images.npz", "samples": 32},
        "store": {"uri": "./store"},
    }
)
result = run_job(spec, InProcessExecutor())  # on Ray: workers.on_ray.executor.RayExecutor
print(f"{result.name} version {result.version}: {', '.join(result.tags)}")
for level, size_bytes in enumerate(result.pull.level_bytes):
    print(f"level {level}: {size_bytes:,} bytes")
