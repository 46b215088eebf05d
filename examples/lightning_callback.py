"""Norm decay in Lightning: a callback to copy. It logs norms, and a run resumed from a checkpoint is the whole run."""

import tempfile
from typing import Any

import lightning
import torch
from torch import nn

import convnorm


class NormDecayCallback(lightning.Callback):
    """Steps on unscaled gradients, before clipping. (Under "16-mixed" take an optimizer that is not fused.)"""

    def __init__(self, **options: Any) -> None:
        self.options, self.decay, self.saved = options, None, None

    def on_train_start(self, trainer: Any, pl_module: lightning.LightningModule) -> None:  # after the sanity check
        self.decay = convnorm.NormDecay(pl_module, **self.options)  # without example=, the first batch tells sizes
        saved, self.saved = self.saved, None
        if saved is not None:
            self.decay.load_state_dict(saved)

    def on_before_optimizer_step(self, trainer: Any, pl_module: lightning.LightningModule, optimizer: Any) -> None:
        self.decay.step()
        pl_module.log_dict({f"norm of {layer}": norm for layer, norm in self.decay.norms.items()})  # waits for nothing

    def state_dict(self) -> dict[str, Any] | None:
        return self.saved if self.decay is None else self.decay.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict  # comes before on_train_start


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 2))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


if __name__ == "__main__":
    folder = tempfile.TemporaryDirectory()
    for name, beta, epochs in [("without", 0.0, 4), ("with", 0.1, 4), ("half", 0.1, 2), ("resumed", 0.1, 4)]:
        torch.manual_seed(0)
        images = torch.randn(256, 3, 16, 16)
        data = torch.utils.data.TensorDataset(images, (images.mean((1, 2, 3)) > 0).long())
        trainer = lightning.Trainer(
            max_epochs=epochs, callbacks=NormDecayCallback(beta=beta), default_root_dir=folder.name
        )
        begin = f"{folder.name}/half" if name == "resumed" else None
        trainer.fit(Classifier(), torch.utils.data.DataLoader(data, 32), ckpt_path=begin, weights_only=True)
        trainer.save_checkpoint(f"{folder.name}/{name}")
        print(f"{name}:", *[f"{key} {value:.9g}" for key, value in trainer.callback_metrics.items()], sep="  ")
