"""Two networks with two recipes each, one after the other, and a table of what came out."""

from pathlib import Path

from jobs.spec.zoo import load_zoo
from jobs.zoo.run import run_zoo
from workers.executor import InProcessExecutor

ZOO = """
name: nightly
store: {uri: ./store}
models: [timm/test_resnet, timm/test_vit]
random_seed: 0                     # or pretrained: true; a checkpoint for each: {models: timm/..., checkpoint: ...}
recipes: {w84: {recipe: paper, bits: [8, 4]}, w86: {recipe: paper, bits: [8, 6]}}
"""
Path("zoo.yaml").write_text(ZOO)
zoo, jobs = load_zoo("zoo.yaml")
rows = run_zoo(zoo, jobs, InProcessExecutor(), results=Path("nightly"), listen=lambda *_: None)
for row in rows:
    print(row.name, row.status)
print(*sorted(path.name for path in Path("nightly").iterdir()))
