"""What the model will see of a task: rendered prompts, label words as tokens, sizes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ray_ensemble.tasks.encode import count_truncated
from ray_ensemble.tasks.task import SPLITS, EncodedTask, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview(task: Task, encoded: EncodedTask, tokenizer: PreTrainedTokenizerBase, examples: int = 2) -> RenderableType:
    """A rich renderable with the label words' tokens, the splits' sizes and lengths, and the first training prompts.

    Prompts are decoded from their token ids, so that special tokens and truncation show; the right label word follows
    each. `tokens` are those of the prompt alone.
    """
    parts: list[RenderableType] = [Text(f"{task.name}: {len(task.labels)} labels", style="bold")]
    parts += [_label_table(encoded, tokenizer), _split_table(encoded)]
    for number, example in enumerate(encoded["train"][:examples]):
        text = Text(tokenizer.decode(list(example.prompt_ids), clean_up_tokenization_spaces=False))
        text.append(" " + encoded.labels[example.label], style="bold green")
        title = f"train example {number}, {len(example.prompt_ids)} tokens{', truncated' * example.truncated}"
        parts.append(Panel(text, title=title, title_align="left"))
    return Group(*parts)


def _label_table(encoded: EncodedTask, tokenizer: Any) -> Table:
    table = Table("label word", "tokens", "ids", *SPLITS, show_edge=False)
    counts = {split: Counter(example.label for example in encoded[split]) for split in SPLITS}
    for index, (label, ids) in enumerate(zip(encoded.labels, encoded.label_ids, strict=True)):
        tokens = " ".join(tokenizer.convert_ids_to_tokens(list(ids)))
        shares = [str(counts[split][index]) for split in SPLITS]
        table.add_row(Text(label), Text(tokens), Text(" ".join(map(str, ids))), *shares)
    return table


def _split_table(encoded: EncodedTask) -> Table:
    table = Table("split", "examples", "tokens, mean", "tokens, max", "truncated", show_edge=False)
    truncated = count_truncated(encoded)
    for split in SPLITS:
        lengths = [len(example.prompt_ids) for example in encoded[split]]
        mean = f"{sum(lengths) / len(lengths):.1f}" if lengths else "-"
        table.add_row(split, str(len(lengths)), mean, str(max(lengths, default=0)), str(truncated[split]))
    return table
