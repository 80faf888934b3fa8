"""A network in memory: nested by what its layers see, saved to one file, loaded part-bit, and paged in."""

import torch
from torch import nn

import nestquant

torch.manual_seed(0)


def build() -> nn.Module:
    """Return a network of one's own; a real one comes with its trained weights."""
    body = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


model, calibration, images = build().eval(), torch.randn(256, 3, 32, 32), torch.randn(64, 3, 32, 32)
nested = nestquant.quantize(model, bits=(8, 4), calibration=calibration)
with torch.inference_mode():
    expected = model(images)
    for level, name in enumerate(("part-bit", "full-bit")):
        nested.set_level(level)
        print(f"{name}: error {(nested(images) - expected).norm() / expected.norm():.2%}")
    nested.save("own.nq")
    loaded = nestquant.load("own.nq", model=build)
    loaded.page_in()
    print(f"as saved: {torch.equal(loaded(images), nested(images))}")
