"""Mean hidden states of the base against one plain forward pass a prompt, in every usual family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_families import CPU, FAMILIES, LABELS, examples_of, write

from ray_ensemble.config import GradientsConfig
from ray_ensemble.evaluation.hidden_states import HiddenStateReplica, mean_hidden_states
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.models import load_base
from ray_ensemble.tasks import EncodedExample, EncodedTask


def alone(folder: Path, examples: list[EncodedExample]) -> np.ndarray:
    """(N, H) states at the last token of each prompt by itself: no padding, no batch."""
    model = load_base(folder, "none", CPU)
    with torch.inference_mode():
        found = [model(input_ids=torch.tensor([e.prompt_ids]), output_hidden_states=True) for e in examples]
    return np.stack([output.hidden_states[-1][0, -1].double().numpy() for output in found])


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_give_the_states_of_single_prompts(family, tmp_path):
    kind, extra, _ = FAMILIES[family]
    folder = write(kind, extra, tmp_path / "model")
    examples = examples_of(9, LABELS["single"])
    replica = HiddenStateReplica(ReplicaSpec(str(folder), "none", "unused", 0), 1, 40)
    want = alone(folder, examples)
    np.testing.assert_allclose(replica.mean(tuple(examples)), want.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert want.std(axis=0).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_the_mean_over_its_own_tokens(family, tmp_path):
    kind, extra, _ = FAMILIES[family]
    folder = write(kind, extra, tmp_path / "model")
    examples = examples_of(9, LABELS["single"])
    model = load_base(folder, "none", CPU)
    with torch.inference_mode():
        outputs = [model(input_ids=torch.tensor([e.prompt_ids]), output_hidden_states=True) for e in examples]
    want = [output.hidden_states[-1][0].double().mean(dim=0).numpy() for output in outputs]
    found = HiddenStateReplica(ReplicaSpec(str(folder), "none", "unused", 0), 1, 40).pooled(tuple(examples))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def task(name: str, examples: list[EncodedExample]) -> EncodedTask:
    splits = {"train": tuple(examples), "validation": (), "test": ()}
    return EncodedTask(name, ("a", "b", "c"), LABELS["single"], splits, name)


@pytest.mark.ray
def test_files_are_kept_and_only_what_is_missing_is_computed(ray_cluster, tmp_path, capsys):
    folder = write("LlamaConfig", FAMILIES["llama"][1], tmp_path / "model")
    examples = examples_of(12, LABELS["single"])
    tasks = [task("one", examples[:5]), task("two", examples[5:])]
    spec, config = ReplicaSpec(str(folder), "none", "unused", 0), GradientsConfig(replicas=1)
    base = {"model": "m", "quantization": "none", "adapter": "θ₀"}
    run = tmp_path / "run"
    found = mean_hidden_states(tasks, spec, GradientsConfig(replicas=2), base, run)
    assert found.dtype == np.float64
    want = alone(folder, examples)
    np.testing.assert_allclose(found, [want[:5].mean(axis=0), want[5:].mean(axis=0)], rtol=1e-4, atol=1e-5)

    files = sorted((run / "hidden_states").iterdir())
    content = files[0].read_bytes()
    files[0].write_bytes(content[:-9])
    stamp = files[1].stat().st_mtime_ns
    again = mean_hidden_states(tasks, spec, config, {**base, "adapter": "another start"}, run)
    assert np.array_equal(again, found)
    assert sorted((run / "hidden_states").iterdir()) == files, "labels and θ₀ are no part of it"
    assert (files[0].read_bytes(), files[1].stat().st_mtime_ns) == (content, stamp)
    assert "damaged" in capsys.readouterr().out
    # Other prompts or another base are other files.
    mean_hidden_states([task("one", examples[:4])], spec, config, base, run)
    mean_hidden_states(tasks[:1], spec, config, {**base, "quantization": "nf4"}, run)
    assert len(list((run / "hidden_states").iterdir())) == 4
