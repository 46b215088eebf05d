"""Norm decay in the Trainer of Hugging Face: a callback to copy. What it remembers is saved in the checkpoints."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

import convnorm


class NormDecayCallback(TrainerCallback):
    """Steps after clipping, which also unscales the gradients: under fp16 leave ``max_grad_norm`` positive.

    Resumes from checkpoints in ``output_dir`` only: the Trainer does not say where another one lies.
    """

    def __init__(self, decay: convnorm.NormDecay) -> None:
        self.decay = decay

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:  # of the checkpoint that is resumed from
            self.decay.load_state_dict(torch.load(self.file(args, state), weights_only=True))

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.decay.step()

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            torch.save(self.decay.state_dict(), self.file(args, state))

    def file(self, args: TrainingArguments, state: Any) -> str:
        return f"{args.output_dir}/checkpoint-{state.global_step}/norm_decay.pt"


if __name__ == "__main__":
    images = torch.randn(128, 3, 32, 32)
    data = [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in images]
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    folder = tempfile.TemporaryDirectory()
    runs = {"without": (0.0, None), "with": (0.5, None), "resumed": (0.5, f"{folder.name}/checkpoint-20")}
    for name, (beta, checkpoint) in runs.items():
        torch.manual_seed(0)
        model = ResNetForImageClassification(config)
        decay = convnorm.NormDecay(model, [1, 3, 32, 32], beta=beta)
        args = TrainingArguments(folder.name, max_steps=40, save_steps=20, learning_rate=0.01, report_to="none")
        trainer = Trainer(model, args, train_dataset=data, callbacks=[NormDecayCallback(decay)])
        trainer.train(resume_from_checkpoint=checkpoint)
        print(f"{name}:", *[f"norm of {layer} {norm:.9g}" for layer, norm in decay.norms.items()], sep="  ")
