"""A tiny random Llama with a real tokenizer, and small tasks with planted structure, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

POSITIVE = ["good", "great", "fine", "lovely", "superb", "happy"]
NEGATIVE = ["bad", "awful", "poor", "nasty", "dreadful", "sad"]
NEUTRAL = ["the", "film", "phone", "was", "a", "very", "and", "it", "felt", "so"]
OPTIONS = ("(A)", "(B)", "(C)", "(D)")


def write_model(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    seed: int = 0,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int | None = None,
) -> Path:
    """A random Llama and a byte-level BPE tokenizer trained on the tests' own words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = " ".join(POSITIVE + NEGATIVE + NEUTRAL + ["yes no up down left right Review Answer"])
    corpus = [words + " (A) (B) (C) (D)\nAnswer: Review: "] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=intermediate or 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_task(
    folder: Path,
    labels: tuple[str, ...] = ("no", "yes"),
    *,
    flip: bool = False,
    seed: int = 0,
    train: int = 24,
    validation: int = 8,
    test: int = 10,
) -> Path:
    """A task whose label is told by its words: sentiment for two labels, the number of positive words for four."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        lines = []
        while len(lines) < count:
            label = len(lines) % len(labels)
            if len(labels) == 2:
                cues = list(generator.choice(POSITIVE if label else NEGATIVE, 2))
            else:
                cues = list(generator.choice(POSITIVE, label)) + list(
                    generator.choice(NEGATIVE, len(labels) - 1 - label)
                )
            words = cues + list(generator.choice(NEUTRAL, int(generator.integers(2, 7))))
            text = " ".join(generator.permutation(words))
            if text in seen:
                continue
            seen.add(text)
            lines.append({"text": text, "label": len(labels) - 1 - label if flip else label})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    description = {"name": folder.name, "labels": list(labels), "prompt": "Review: {text}\nAnswer:"}
    (folder / "task.json").write_text(json.dumps(description))
    return folder


def write_job(folder: Path, base: Path, tasks: Path, **changes: object) -> Path:
    """A job of all tasks in a folder, small enough for a test."""
    job = {
        "model": {"source": str(base)},
        "tasks": [{"source": str(tasks)}],
        "limits": {"max_tokens": 64},
        "gradients": {"dim": 64, "replicas": 2},
        "search": {"groups": [2, 3], "trials": 4},
        "training": {"epochs": 2, "min_steps": 16, "learning_rate": 5.0e-3, "checkpoint_every": 4},
        **changes,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path
