"""What the untouched base makes of prompts: hidden states, computed by Ray actors and kept as files.

No label, no gradient and no adapter goes into them: they are a baseline's view of which tasks are alike, what the router tells
datasets by, and what a dataset without labels is compared by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ray_ensemble.config import GradientsConfig
from ray_ensemble.files import sha256_json, write_array
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.models import (
    Batch,
    LabelTree,
    default_device,
    length_sorted_batches,
    load_base,
    make_batch,
    materialise,
    quiet_libraries,
)
from ray_ensemble.models.scoring import model_inputs
from ray_ensemble.pool import PlainActors, map_units, pool_size
from ray_ensemble.progress import Bar
from ray_ensemble.tasks import EncodedExample, EncodedTask

# The bare prompt: a label of one token needs no node beyond it, whichever token it is.
_PROMPT = LabelTree.of(((0,),))

Means = NDArray[np.float64]
States = NDArray[np.float32]


def prompt_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states (N, T, H) of the last layer, after the final norm, of a batch of bare prompts."""
    states: Tensor = model.base_model(**model_inputs(model, batch)).last_hidden_state
    return states


class HiddenStateReplica:
    """One base without adapters; the plain class behind the Ray actor."""

    def __init__(self, spec: ReplicaSpec, threads: int, batch_tokens: int) -> None:
        quiet_libraries()
        torch.set_num_threads(threads)
        self._device = default_device()
        self._model = load_base(materialise(spec.source), spec.quantization, self._device)
        self._pad_id, self._batch_tokens = spec.pad_id, batch_tokens

    def mean(self, examples: tuple[EncodedExample, ...]) -> Means:
        """Mean (H,) float64 over the examples of the states at their prompts' last tokens.

        It is the state from which label words are scored, the only one that has seen the whole prompt; a mean over all tokens
        would mostly tell how long the template is.
        """
        total = torch.zeros((), dtype=torch.float64)
        for _, states, _ in self._batches(examples):
            total = total + states[:, -1].cpu().double().sum(dim=0)
        mean: Means = (total / len(examples)).numpy()
        return mean

    def pooled(self, examples: tuple[EncodedExample, ...]) -> States:
        """Mean (N, H) float32 of each example's states over the tokens of its prompt, which without a template are its text."""
        found: list[tuple[int, States]] = []
        for indices, states, mask in self._batches(examples):
            # What stands at padding may be anything, NaN too.
            seen = states.float().masked_fill(mask[:, :, None] == 0, 0.0)
            means = seen.sum(dim=1) / mask.sum(dim=1, keepdim=True)  # (N, T, H) -> (N, H)
            found += zip(indices, means.cpu().numpy(), strict=True)
        return np.stack([state for _, state in sorted(found, key=lambda pair: pair[0])])

    def _batches(self, examples: Sequence[EncodedExample]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Places, states (N, T, H) and attention masks (N, T) of the examples, batch by batch."""
        with torch.inference_mode():
            for indices in length_sorted_batches([len(e.prompt_ids) for e in examples], self._batch_tokens):
                chosen = [examples[i] for i in indices]
                batch = make_batch(chosen, [_PROMPT] * len(chosen), 1, self._pad_id, self._device)
                yield indices, prompt_states(self._model, batch), batch.attention_mask


def mean_hidden_states(
    tasks: Sequence[EncodedTask], spec: ReplicaSpec, config: GradientsConfig, base: dict[str, str], folder: Path
) -> Means:
    """Mean hidden states (n, H) float64 of the tasks' training examples, from files where they are, else by a pool of actors.

    Each task is a file in `hidden_states/`, so that a call after a stop computes what is missing. Ray must be initialised
    where any is.

    Args:
        tasks: n tasks.
        spec: how an actor loads the base; its adapter is not used.
        config: replicas, threads and batch tokens, as for the gradients.
        base: hashes of the base and its quantization (that of θ₀, if there, does not matter).
        folder: the run folder.

    Raises:
        InputError, RunError: as for `map_units`.
    """
    units = {f"{task.name}-{_key(task['train'], 'last prompt token', config, base)}": task["train"] for task in tasks}
    found = _states(units, "mean", 1, spec, config, folder)
    return np.stack([found[name] for name in units])


def pooled_hidden_states(
    texts: Mapping[str, tuple[EncodedExample, ...]],
    spec: ReplicaSpec,
    config: GradientsConfig,
    base: dict[str, str],
    folder: Path,
) -> dict[str, States]:
    """States (N, H) float32 of every example, each the mean over its tokens; kept and computed as `mean_hidden_states`.

    Args:
        texts: name -> N examples; the names stand in file names.
        spec: as for `mean_hidden_states`, and so are the other arguments and the errors.
        config: likewise.
        base: likewise.
        folder: the run folder.
    """
    names = {name: f"{name}-{_key(examples, 'mean of tokens', config, base)}" for name, examples in texts.items()}
    found = _states({names[name]: examples for name, examples in texts.items()}, "pooled", 2, spec, config, folder)
    return {name: found[unit] for name, unit in names.items()}


def _states(
    units: Mapping[str, tuple[EncodedExample, ...]],
    method: str,
    dimensions: int,
    spec: ReplicaSpec,
    config: GradientsConfig,
    folder: Path,
) -> dict[str, NDArray[Any]]:
    """What `method` of a replica makes of each unit, by file name."""
    paths = {name: folder / "hidden_states" / f"{name}.npy" for name in units}
    missing = {name: examples for name, examples in units.items() if not _is_whole(paths[name], dimensions)}
    if missing:
        size = pool_size(config.replicas, config.threads, len(missing))
        with Bar("hidden states", sum(map(len, missing.values())), "examples") as bar:

            def keep(name: str, found: NDArray[Any]) -> None:
                write_array(paths[name], found)
                bar.advance(len(missing[name]), name.rpartition("-")[0])

            # Longest first, so that no actor is left with a long unit at the end.
            ordered = dict(sorted(missing.items(), key=lambda item: -sum(len(e.prompt_ids) for e in item[1])))
            arguments = (spec, config.threads, config.batch_tokens)
            actors = PlainActors(HiddenStateReplica, arguments, config, size)
            map_units(actors, method, ordered, size=size, on_result=keep)
    return {name: np.load(path, allow_pickle=False) for name, path in paths.items()}


def _key(examples: Sequence[EncodedExample], of: str, config: GradientsConfig, base: dict[str, str]) -> str:
    """What states depend on, hashed: the prompts, the base, and how batches round."""
    prompts = [list(example.prompt_ids) for example in examples]
    how = {"of": of, "batch": config.batch_tokens, "threads": config.threads}
    return sha256_json({"prompts": prompts, "model": base["model"], "quantization": base["quantization"], **how})[:16]


def _is_whole(path: Path, dimensions: int) -> bool:
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        print(f"{path}: damaged ({error}); computing it again", flush=True)
        return False
    return bool(found.ndim == dimensions and np.isfinite(found).all())
