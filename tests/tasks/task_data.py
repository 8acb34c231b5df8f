"""What the tests of this folder are made of: tokenizers trained on the spot, JSONL files and task folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MakeWheel = Callable[..., str]
CORPUS = [
    "Review: a great film with a great cast Sentiment: positive",
    "Review: a dull film with a dull plot Sentiment: negative",
    "Question: is this right? Answer: Yes No (A) (B) (C) (D)",
] * 20
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if date_string is not defined %}{{ raise_exception('a date of today') }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(template: str | None = None, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 340 tokens; `template` such as "<s> $A </s>" is what it puts around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = chat_template
    return wrapped


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(folder: Path, **changes: Any) -> Path:
    """A good one; `train`, `validation`, `test` replace a split's rows, all else keys of task.json (None: none)."""
    sizes = {"train": 12, "validation": 6, "test": 4}
    for split, size in sizes.items():
        rows = changes.pop(split, [{"text": f"{split} {i} of {folder.name}", "label": i % 2} for i in range(size)])
        write_jsonl(folder / f"{split}.jsonl", rows)
    task = {"name": folder.name, "prompt": "Review: {text}\nSentiment:", "labels": ["negative", "positive"], **changes}
    (folder / "task.json").write_text(json.dumps({k: v for k, v in task.items() if v is not None}), encoding="utf-8")
    return folder
