"""The peer of `python benchmarks/training.py`: transformers.Trainer on a PEFT model, with its own loss or with ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from ray_ensemble.config import TrainingConfig
from ray_ensemble.models import LabelTree, label_scores, make_batch, score_loss
from ray_ensemble.tasks import EncodedExample, EncodedTask

Pair = tuple[EncodedTask, EncodedExample]


class _Ordered(Dataset[Pair]):
    """Examples in the order in which they are to be trained on."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]


def trainer_run(
    model: PeftModel, pairs: Sequence[Pair], config: TrainingConfig, steps: int, label_loss: bool
) -> Callable[[], list[float]]:
    """A Trainer that is ready to run once: `steps` steps, the loss of each.

    Args:
        model: with one trainable adapter.
        pairs: steps · batch_size examples in order.
        config: batch size, learning rate and clipping; the schedule is linear without warm-up.
        steps: optimiser steps.
        label_loss: the loss is the softmax over label words, else that of the right label's tokens over the vocabulary.
    """
    device = next(model.parameters()).device
    losses: list[Tensor] = []

    def collate_labels(rows: Sequence[Pair]) -> dict[str, Any]:
        trees = [LabelTree.of(task.label_ids) for task, _ in rows]
        classes = max(len(task.labels) for task, _ in rows)
        return {"batch": make_batch([example for _, example in rows], trees, classes, 0, device)}

    def collate_tokens(rows: Sequence[Pair]) -> dict[str, Any]:
        sequences = [example.prompt_ids + task.label_ids[example.label] for task, example in rows]
        width = max(map(len, sequences))
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for n, ((task, example), sequence) in enumerate(zip(rows, sequences, strict=True)):
            ids[n, : len(sequence)] = torch.tensor(sequence)
            mask[n, : len(sequence)] = 1
            labels[n, len(example.prompt_ids) : len(sequence)] = torch.tensor(task.label_ids[example.label])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class InOrder(Trainer):  # type: ignore[misc]
        """Trainer that takes the examples as they come and notes every loss."""

        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            if label_loss:
                batch = inputs["batch"]
                loss = score_loss(label_scores(model, batch), batch.labels).mean()
            else:
                loss = super().compute_loss(model, inputs, *rest, **named)
            losses.append(loss.detach())
            return loss

    folder = tempfile.TemporaryDirectory()
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=folder.name,
            per_device_train_batch_size=config.batch_size,
            max_steps=steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            optim="adamw_torch",
            use_cpu=device.type == "cpu",
            bf16=device.type == "cuda",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=_Ordered(pairs),
        data_collator=collate_labels if label_loss else collate_tokens,
    )
    trainer.remove_callback(PrinterCallback)

    def run() -> list[float]:
        with folder:
            trainer.train()
        return [float(loss) for loss in losses]

    return run
