"""Encoding: the template's end survives every limit, ambiguous label words are refused, the hash sees the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from task_data import CHAT_TEMPLATE, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from ray_ensemble.errors import InputError
from ray_ensemble.tasks import EncodedTask, Example, Task, count_truncated, encode_task, render

PROMPT = "Review: {text}\nSentiment:"


def task_of(*texts: str, prompt: str = PROMPT, labels: Sequence[str] = ("negative", "positive")) -> Task:
    examples = tuple(Example({"text": text}, i % 2) for i, text in enumerate(texts))
    return Task("films", prompt, tuple(labels), {"train": examples, "validation": examples[:1], "test": ()})


def test_prompts_are_what_the_tokenizer_makes_of_them(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_task(task_of("a great film", "{text} dull ☃"), tokenizer, 100)
    for example, text in zip(encoded["train"], ("a great film", "{text} dull ☃"), strict=True):
        ids = list(example.prompt_ids)
        assert ids == tokenizer(PROMPT.replace("{text}", text, 1))["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert not example.truncated
    assert [example.label for example in encoded["train"]] == [0, 1]
    assert encoded.label_ids[1] == tuple(tokenizer(" positive", add_special_tokens=False)["input_ids"])
    assert [len(encoded[split]) for split in ("train", "validation", "test")] == [2, 1, 0]


def test_an_end_token_never_stands_before_the_label() -> None:
    ended = byte_tokenizer("<s> $A </s>")
    bare = byte_tokenizer("<s> $A")
    assert ended("x")["input_ids"][-1] == ended.eos_token_id
    task = task_of("a great film", "long " * 50)
    assert encode_task(task, ended, 40) == encode_task(task, bare, 40)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=200), question=st.text(max_size=60), limit=st.integers(36, 120))
def test_truncation_keeps_the_template_and_the_limit(
    text: str, question: str, limit: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = "Review: {text}\n{question}\nAnswer:"
    fields = {"text": text, "question": question}
    splits = {"train": (Example(fields, 0),), "validation": (), "test": ()}
    encoded = encode_task(Task("films", prompt, ("No", "(A) or (B)"), splits), tokenizer, limit)
    (example,) = encoded["train"]
    assert len(encoded.label_ids[0]) < len(encoded.label_ids[1])
    longest = len(encoded.label_ids[1])
    whole = tokenizer(render(prompt, fields))["input_ids"]
    assert len(example.prompt_ids) + longest <= limit
    assert example.truncated == (len(whole) + longest > limit)
    # The prompt must be the template with both fields cut to one common length, never cut itself.
    caps = range(max(len(text), len(question)) + 1)
    candidates = [render(prompt, {name: value[:cap] for name, value in fields.items()}) for cap in caps]
    encoded_candidates = [tuple(ids) for ids in tokenizer(candidates)["input_ids"]]
    assert example.prompt_ids in encoded_candidates
    if example.truncated:
        place = max(i for i, ids in enumerate(encoded_candidates) if ids == example.prompt_ids)
        assert len(encoded_candidates[place + 1]) + longest > limit, "one character more would not have fitted"


def test_the_longest_field_goes_first(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = "{passage}\nQuestion: {question}\nAnswer:"
    fields = {"passage": "a great film " * 40, "question": "is this film right or dull?"}
    task = replace(task_of("x", prompt=prompt), splits={"train": (Example(fields, 0),), "validation": (), "test": ()})
    (example,) = encode_task(task, tokenizer, 60)["train"]
    text = tokenizer.decode(list(example.prompt_ids), skip_special_tokens=True)
    passage, _, rest = text.partition("\n")
    assert fields["passage"].startswith(passage)
    assert rest == "Question: is this film right or dull?\nAnswer:"


def test_truncated_examples_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_task(task_of("long " * 60, "short", "long " * 61), tokenizer, 40)
    assert [example.truncated for example in encoded["train"]] == [True, False, True]
    assert count_truncated(encoded) == {"train": 2, "validation": 1, "test": 0}


def test_a_template_that_does_not_fit_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        InputError, match=r"task 'films': the prompt's template alone has \d+ tokens in train.*max_tokens"
    ):
        encode_task(task_of("x", prompt="a very long template " * 10 + "{text}"), tokenizer, 40)


def test_a_prompt_of_no_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="the prompt of train example 1 has no tokens"):
        encode_task(task_of("x", "", prompt="{text}"), byte_tokenizer(), 40)


def test_labels_that_share_first_tokens_are_good(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_task(task_of("x", labels=("(A)", "(B)", "(C)", "(D)")), tokenizer, 40)
    assert len({ids[0] for ids in encoded.label_ids}) == 1
    assert len(set(encoded.label_ids)) == 4


def test_labels_that_begin_one_another_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    message = r"task 'films': the tokens \[.*\] of the label word '{}' {} those of '{}'"
    with pytest.raises(InputError, match=message.format("12", "begin", "123")):
        encode_task(task_of("x", labels=("123", "4", "12")), tokenizer, 40)
    lower = byte_tokenizer("<s> $A")
    from tokenizers import normalizers

    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match=message.format("yes", "are equal to", "Yes")):
        encode_task(task_of("x", labels=("yes", "Yes")), lower, 40)


def test_labels_without_tokens_are_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate("Yes")}, []))  # others vanish
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(InputError, match="the label word 'No' has no tokens"):
        encode_task(task_of("x", labels=("Yes", "No")), PreTrainedTokenizerFast(tokenizer_object=words), 40)


def test_chat_prompts_end_where_the_answer_begins() -> None:
    tokenizer = byte_tokenizer("<s> $A", CHAT_TEMPLATE)
    encoded = encode_task(task_of("a great film", "long " * 60), tokenizer, 70, chat=True)
    first, second = (tokenizer.decode(list(example.prompt_ids)) for example in encoded["train"])
    assert first == "<s><|user|>Review: a great film\nSentiment:<|assistant|>"
    assert second.startswith("<s><|user|>Review: long long")
    assert second.endswith("\nSentiment:<|assistant|>")
    assert encoded["train"][1].truncated
    with pytest.raises(InputError, match=r"model\.chat is true, but .* has no chat template"):
        encode_task(task_of("x"), byte_tokenizer(), 40, chat=True)


@pytest.mark.parametrize("clock", ["strftime_now('%d %B %Y')", "strftime_now(format='%d')", "date_string"])
def test_chat_prompts_do_not_change_overnight(clock: str) -> None:
    """Templates get the date from a variable, or from a function that transformers gives them; neither is asked."""
    encoded = [
        encode_task(
            task_of("a film"), byte_tokenizer("<s> $A", f"{start}{{{{ {clock} }}}}{CHAT_TEMPLATE}"), 90, chat=True
        )
        for start in ("", "\n")
    ]
    tokenizer = byte_tokenizer("<s> $A", CHAT_TEMPLATE)
    for found, start in zip(encoded, ("", "\n"), strict=True):
        text = tokenizer.decode(list(found["train"][0].prompt_ids))
        assert text == f"{start}01 Jan 2025<s><|user|>Review: a film\nSentiment:<|assistant|>"


def test_the_hash_changes_with_what_the_model_sees(tokenizer: PreTrainedTokenizerFast) -> None:
    task = task_of("a", "b")

    def hashed(changed: Task, limit: int = 40) -> str:
        encoded: EncodedTask = encode_task(changed, tokenizer, limit)
        return encoded.data_hash

    examples = task["train"]
    others = [
        replace(task, name="other"),
        replace(task, labels=("negative", "good")),
        replace(task, prompt=PROMPT + " "),
        replace(task, splits={**task.splits, "train": examples[::-1]}),
        replace(task, splits={**task.splits, "train": (Example({"text": "a"}, 1), examples[1])}),
        replace(task, splits={**task.splits, "validation": (), "test": task["validation"]}),
    ]
    hashes = [hashed(changed) for changed in (task, *others)]
    assert len(set(hashes)) == len(hashes)
    unseen = replace(task, splits={**task.splits, "train": (Example({"text": "a", "id": "7"}, 0), examples[1])})
    assert hashed(unseen, 50) == hashes[0], "neither an unused field nor a roomier limit changes what the model sees"
