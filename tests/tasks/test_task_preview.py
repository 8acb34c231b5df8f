"""The preview shows prompts and label words as the tokenizer sees them."""

from __future__ import annotations

import io

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from ray_ensemble.tasks import Example, Task, encode_task, preview


def shown(task: Task, tokenizer: PreTrainedTokenizerFast, limit: int = 60) -> list[str]:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(preview(task, encode_task(task, tokenizer, limit), tokenizer, examples=2))
    return [" ".join(line.strip("│ ").split()) for line in console.export_text().splitlines()]


def test_preview_shows_prompts_tokens_and_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["a [bold]great[/bold] film", "long " * 60, "third"]
    examples = tuple(Example({"text": text}, int(i == 0)) for i, text in enumerate(texts))
    splits = {"train": examples, "validation": examples[:1], "test": ()}
    task = Task("films", "Review: {text}\nSentiment:", ("(A)", "(B)"), splits)
    lines = shown(task, tokenizer)
    encoded = encode_task(task, tokenizer, 60)
    assert "films: 2 labels" in lines
    assert "<s>Review: a [bold]great[/bold] film" in lines, "data are never read as markup"
    assert lines.count("Sentiment: (B)") == 1
    assert lines.count("Sentiment: (A)") == 1, "two examples are shown, the truncated one up to its template's end"
    assert not any("third" in line for line in lines)
    tokens = " ".join(tokenizer.convert_ids_to_tokens(list(encoded.label_ids[0])))
    row = next(line for line in lines if line.startswith("(A)"))
    assert tokens in row
    assert row.split("│")[-3:] == [" 2 ", " 0 ", " 0"]
    sizes = [len(example.prompt_ids) for example in encoded["train"]]
    train = next(line for line in lines if line.startswith("train │"))
    assert train == f"train │ 3 │ {sum(sizes) / 3:.1f} │ {max(sizes)} │ 1"
    titles = [line for line in lines if "train example" in line]
    assert [("truncated" in title) for title in titles] == [False, True]
