"""Text of an ensemble is what a loop without cache writes, which asks one adapter at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from run_by_hand import BOOSTING, CPU, SCALES, WEIGHTS, moved, write_run
from scipy.special import log_softmax
from tiny_families import FAMILIES, examples_of, write

from ray_ensemble.cli import main
from ray_ensemble.config import AdapterConfig
from ray_ensemble.ensemble import Predictor, boosters_of, generation
from ray_ensemble.errors import InputError
from ray_ensemble.models import MixedAdapters, attach_adapters, draw_initial_adapter, load_base, load_tokenizer

NEW = 10
REQUESTS = [
    ("films", {"text": "a very good film"}),
    ("options", {"text": "bad"}),
    ("contrary", {"text": "it felt so sad and nasty and the phone was poor"}),
    ("films", {"text": "superb"}),
    ("phones", {"text": "so so"}),
]


class Slow:
    """One prompt, one adapter, one whole forward pass for every token."""

    def __init__(self, base: Path, folders: Mapping[str, Path]) -> None:
        self._model = attach_adapters(load_base(base, "none", CPU), folders)

    def __call__(
        self, ids: Sequence[int], parts: Mapping[str | None, float], new: int, ends: Collection[int] = ()
    ) -> tuple[list[int], float, bool]:
        written: list[int] = []
        total = 0.0
        for _ in range(new):
            joint = log_softmax(sum(share * self._next([*ids, *written], name) for name, share in parts.items()))
            token = int(joint.argmax())
            total += joint[token]
            if token in ends:
                return written, total, True
            written.append(token)
        return written, total, False

    @torch.no_grad()
    def _next(self, ids: list[int], name: str | None) -> np.ndarray:
        inputs = {"input_ids": torch.tensor([ids]), "use_cache": False}
        if name is None:
            with self._model.disable_adapter():
                logits = self._model(**inputs).logits[0, -1]
        else:
            self._model.set_adapter(name)
            logits = self._model(**inputs).logits[0, -1]
        return log_softmax(logits.double().numpy())


@pytest.mark.parametrize(
    "family", [name if name in ("llama", "gpt2") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_writes_what_the_loop_writes(family, tmp_path):
    """Prompts of many lengths, longer than sliding windows; texts end at different steps and leave the batch."""
    kind, extra, targets = FAMILIES[family]
    base = write(kind, extra, tmp_path / "model")
    folders = {}
    for seed, rank in enumerate((2, 2, 3)):
        config = AdapterConfig(rank=rank, alpha=8, seed=seed, target_modules=targets)
        draw_initial_adapter(load_base(base, "none", CPU), config, tmp_path / f"init-{seed}")
        folders[f"a{seed}"] = moved(tmp_path / f"init-{seed}", tmp_path / f"a{seed}", seed, scale=0.3)
    mixes = [{"a0": 0.5, "a1": 0.5}, {"a0": 0.3, "a1": 0.2, "a2": 0.5}, {"a2": 1.0}, {"a1": 1.0, "a2": 0.6, None: -0.6}]
    prompts = [
        generation.Prompt(example.prompt_ids, mixes[n % 4]) for n, example in enumerate(examples_of(8, ((30,),)))
    ]
    slow = Slow(base, folders)
    endless = [slow(prompt.ids, prompt.parts, NEW)[0] for prompt in prompts]
    ends = {endless[0][2], endless[1][4], endless[5][0]}
    model = load_base(base, "none", CPU)
    found = generation.generate(model, MixedAdapters(model, folders), prompts, NEW, ends, pad_id=0)
    wanted = [slow(prompt.ids, prompt.parts, NEW, ends) for prompt in prompts]
    assert [text.ids for text in found] == [ids for ids, _, _ in wanted]
    assert [text.ended for text in found] == [ended for _, _, ended in wanted]
    assert [text.log_probability for text in found] == pytest.approx([value for _, value, _ in wanted], abs=1e-3)
    assert sum(text.ended for text in found) >= 2
    assert len({len(text.ids) for text in found}) > 2


@pytest.fixture(scope="module")
def run(tiny_model, task_folder, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("generation") / "run", tiny_model, task_folder)


def slow_texts(run: Path, model: Path) -> list[list[int]]:
    folders = {path.name: path for kind in ("adapters", "boosters") for path in (run / kind).iterdir()}
    slow, tokenizer = Slow(model, folders), load_tokenizer(model)
    texts = []
    for name, row in REQUESTS:
        parts: dict[str | None, float] = {f"group-{g}": w for g, w in enumerate(WEIGHTS[name]) if w}
        boosters, step = boosters_of(BOOSTING, name)
        step /= SCALES[name]
        parts |= dict.fromkeys(boosters, step)
        if boosters:
            parts[None] = -step * len(boosters)
        ids = tokenizer(f"Review: {row['text']}\nAnswer:")["input_ids"]
        texts.append(slow(ids, parts, NEW)[0])
    return texts


def test_requests_of_many_tasks_are_continued_by_their_own_ensembles(run, tiny_model, monkeypatch):
    predictor, wanted = Predictor(run), slow_texts(run, tiny_model)
    found = predictor.generate(REQUESTS, NEW)
    assert [text["token_ids"] for text in found] == wanted
    assert len({tuple(ids) for ids in wanted}) == len(wanted)
    tokenizer = load_tokenizer(tiny_model)
    assert [text["text"] for text in found] == [tokenizer.decode(ids) for ids in wanted]
    monkeypatch.setattr(generation, "CACHE_TOKENS", 150)
    assert [text["token_ids"] for text in predictor.generate(REQUESTS, NEW)] == wanted, "in several batches"


def test_a_text_ends_where_the_base_says(run, tiny_model, tmp_path, capsys):
    """The end of a turn is named in `generation_config.json`; it is not part of the text."""
    whole = Predictor(run).generate(REQUESTS, NEW)
    stop = whole[0]["token_ids"][3]
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 1]}))
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(tiny_model), str(model)))
    for before, after in zip(whole, Predictor(copy).generate(REQUESTS, NEW), strict=True):
        ids = before["token_ids"]
        assert after["ended"] == (stop in ids)
        assert after["token_ids"] == (ids[: ids.index(stop)] if stop in ids else ids)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(REQUESTS[0][1]) + "\n")
    assert main(["predict", str(run), "--task", "films", "--input", str(rows), "--generate", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == whole[0]["token_ids"][:4]


def test_more_tokens_than_the_base_has_positions_for_are_refused(run):
    predictor = Predictor(run)
    with pytest.raises(InputError, match=r"request 2: a prompt of \d+ tokens and 240 new ones are more than the 256"):
        predictor.generate([("films", {"text": "bad"}), ("films", {"text": "very " * 20})], 240)
    with pytest.raises(InputError, match="at least one"):
        predictor.generate(REQUESTS, 0)
