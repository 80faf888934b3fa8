"""Makes the checkpoints in this folder with the tools that people use, which the tests do not install.

    python -m tests.workers.checkpoints.make

Made with pytorch-lightning 2.6.6, thop 0.1.1.post2209072238, omegaconf 2.4.0, yacs 0.1.8, easydict 1.14.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

FOLDER = Path(__file__).parent


class Net(nn.Module):
    """A network of 31 numbers, the same wherever it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.bn = nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 3)
        for at, (name, tensor) in enumerate(sorted(self.state_dict().items())):
            if not name.endswith("num_batches_tracked"):
                tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) / 8 + at)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn(self.conv(images)).mean((2, 3)))


def lightning() -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self, config: object, size: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = Net()
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            return self.loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> object:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    data = torch.utils.data.TensorDataset(torch.zeros(4, 1, 4, 4), torch.zeros(4, dtype=torch.long))
    for name, averaging in (("lightning.ckpt", []), ("lightning_averaged.ckpt", [EMAWeightAveraging(decay=0.5)])):
        with tempfile.TemporaryDirectory() as folder:
            saver = ModelCheckpoint(dirpath=folder, filename="mine", every_n_train_steps=3)
            trainer = pl.Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[saver, *averaging],
            )
            trainer.fit(Module(argparse.Namespace(lr=0.1, out=pathlib.Path("runs"))), torch.utils.data.DataLoader(data))
            (FOLDER / name).write_bytes((Path(folder) / "mine.ckpt").read_bytes())


def profiled() -> None:
    import thop

    net = Net()
    thop.profile(net, (torch.zeros(1, 1, 4, 4),), verbose=False)
    torch.save(net.state_dict(), FOLDER / "thop.pth")


def configured() -> None:
    from easydict import EasyDict
    from omegaconf import OmegaConf
    from yacs.config import CfgNode

    torch.save(
        {
            "model": Net().state_dict(),
            "config": CfgNode({"MODEL": CfgNode({"TYPE": "net"})}),
            "cfg": OmegaConf.create({"lr": 0.1, "layers": [1, 2], "deep": {"er": None}}),
            "opts": EasyDict(lr=0.1, deep=EasyDict(er=1)),
            "args": argparse.Namespace(lr=0.1, out=pathlib.Path("runs")),
            "best_acc1": np.float64(71.5),
            "history": np.arange(3.0),
            "counts": collections.defaultdict(list, a=[1]),
        },
        FOLDER / "configs.pth",
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    lightning()
    profiled()
    configured()
