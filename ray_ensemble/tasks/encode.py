"""Tasks as token ids: prompts within the token limit, label words apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_ensemble.errors import InputError
from ray_ensemble.files import sha256_json
from ray_ensemble.tasks.task import SPLITS, EncodedExample, EncodedTask, Example, Split, Task
from ray_ensemble.tasks.template import prompt_fields, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]

# Some chat templates write today's date, which would change the data's hash overnight. They take it from a variable, or from a
# function, which a macro of the same name hides; the empty text keeps jinja from eating a line feed that a template begins with.
DATE = "01 Jan 2025"
NO_CLOCK = f"{{% macro strftime_now(format) %}}{DATE}{{% endmacro %}}{{{{ '' }}}}"


def encode_task(task: Task, tokenizer: PreTrainedTokenizerBase, max_tokens: int, chat: bool = False) -> EncodedTask:
    """Tokenise every prompt and label word of a task.

    `prompt_ids` are what the tokenizer makes of the rendered prompt, with its BOS and without an end token; with `chat`
    the prompt is one user turn of the tokenizer's chat template, up to where the answer begins. `label_ids[k]` are the
    tokens of " " + labels[k], to be appended. Prompt and longest label together have at most `max_tokens` tokens: in
    a longer one the longest fields lose their ends (the template and short fields stay whole), and the example counts
    as `truncated`.

    Raises:
        InputError: label words that have no tokens, or whose tokens equal or begin another's; a template that does not
            fit even with empty fields; a prompt of no tokens; `chat` without a chat template.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise InputError("model.chat is true, but the model's tokenizer has no chat template")
    label_ids = _label_ids(task, tokenizer)
    prompter = _Prompter(task, tokenizer, max_tokens - max(map(len, label_ids)), chat)
    splits = {split: prompter.encode(split, task[split]) for split in SPLITS}
    return EncodedTask(task.name, task.labels, label_ids, splits, _data_hash(task, label_ids, splits))


def count_truncated(encoded: EncodedTask) -> dict[Split, int]:
    """How many examples of each split were shortened to fit."""
    return {split: sum(example.truncated for example in encoded[split]) for split in SPLITS}


def _label_ids(task: Task, tokenizer: Any) -> tuple[Ids, ...]:
    words = [" " + label for label in task.labels]
    found = tuple(tuple(ids) for ids in tokenizer(words, add_special_tokens=False)["input_ids"])
    for label, ids in zip(task.labels, found, strict=True):
        if not ids:
            raise InputError(f"task '{task.name}': the label word '{label}' has no tokens")
    for i, short in enumerate(found):
        for j, long in enumerate(found):
            if i != j and long[: len(short)] == short:
                relation = "are equal to" if long == short else "begin"
                tokens = tokenizer.convert_ids_to_tokens(list(short))
                raise InputError(
                    f"task '{task.name}': the tokens {tokens} of the label word '{task.labels[i]}' {relation} those of "
                    f"'{task.labels[j]}', so that the two cannot be told apart; choose other words in 'labels'"
                )
    return found


class _Prompter:
    """Renders and tokenises the prompts of one task in batches; at most `budget` tokens each."""

    def __init__(self, task: Task, tokenizer: Any, budget: int, chat: bool) -> None:
        self.task, self.tokenizer, self.budget, self.chat = task, tokenizer, budget, chat
        self.fields = prompt_fields(task.prompt)
        self.end = 0 if chat else _appended(tokenizer)

    def encode(self, split: Split, examples: Sequence[Example]) -> tuple[EncodedExample, ...]:
        ids = self._tokenize([self._render(example, None) for example in examples])
        long = [i for i, found in enumerate(ids) if len(found) > self.budget]
        for i, found in zip(long, self._shorten(split, [examples[i] for i in long]), strict=True):
            ids[i] = found
        for number, found in enumerate(ids):
            if not found:
                raise InputError(f"task '{self.task.name}': the prompt of {split} example {number} has no tokens")
        shortened = set(long)
        return tuple(
            EncodedExample(found, example.label, i in shortened)
            for i, (found, example) in enumerate(zip(ids, examples, strict=True))
        )

    def _shorten(self, split: Split, examples: Sequence[Example]) -> list[Ids]:
        """Cap an example's fields at one number of characters, the largest that fits, so that the longest go first.

        One binary search per example, all in step, so that each round is one batch. Token counts are not quite
        monotone in the cap; what is kept always fits, and may rarely be a character or two short of the most.
        """
        best = self._tokenize([self._render(example, 0) for example in examples])
        for found in best:
            if len(found) > self.budget:
                raise InputError(
                    f"task '{self.task.name}': the prompt's template alone has {len(found)} tokens in {split}, and "
                    f"limits.max_tokens leaves {self.budget} beside the label words"
                )
        fits = [0] * len(examples)
        fails = [max(len(example.fields[name]) for name in self.fields) for example in examples]
        while active := [i for i in range(len(examples)) if fails[i] - fits[i] > 1]:
            caps = {i: (fits[i] + fails[i]) // 2 for i in active}
            ids = self._tokenize([self._render(examples[i], caps[i]) for i in active])
            for i, found in zip(active, ids, strict=True):
                if len(found) <= self.budget:
                    fits[i], best[i] = caps[i], found
                else:
                    fails[i] = caps[i]
        return best

    def _render(self, example: Example, cap: int | None) -> str:
        prompt = render(self.task.prompt, {name: example.fields[name][:cap] for name in self.fields})
        if not self.chat:
            return prompt
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            chat_template=NO_CLOCK + self.tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=True,
            date_string=DATE,
        )
        return text

    def _tokenize(self, texts: list[str]) -> list[Ids]:
        if not texts:
            return []
        # A chat template writes its own BOS. `verbose` would warn of every text that is longer than the model's window.
        found = self.tokenizer(texts, add_special_tokens=not self.chat, return_attention_mask=False, verbose=False)
        return [tuple(ids[: len(ids) - self.end]) for ids in found["input_ids"]]


def _appended(tokenizer: Any) -> int:
    """How many special tokens (an end token, say) the tokenizer appends; the label must follow the prompt at once."""
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    return len(full) - starts[-1] - len(bare) if starts else 0


def _data_hash(task: Task, label_ids: tuple[Ids, ...], splits: dict[Split, tuple[EncodedExample, ...]]) -> str:
    content = {
        split: {"prompt_ids": [e.prompt_ids for e in examples], "labels": [e.label for e in examples]}
        for split, examples in splits.items()
    }
    return sha256_json({"name": task.name, "labels": task.labels, "label_ids": label_ids, "splits": content})
