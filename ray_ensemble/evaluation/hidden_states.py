"""What the untouched base makes of each task's prompts: mean hidden states, computed by Ray actors and kept as files.

They are a baseline's view of which tasks are alike: no label, no gradient and no adapter goes into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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


def last_prompt_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states (N, H) of the last layer, after the final norm, at the last column of a batch of bare prompts.

    It is the state from which label words are scored, the only one that has seen the whole prompt; a mean over all tokens
    would mostly tell how long the template is.
    """
    states: Tensor = model.base_model(**model_inputs(model, batch)).last_hidden_state  # (N, T, H)
    return states[:, -1]


class HiddenStateReplica:
    """One base without adapters; the plain class behind the Ray actor."""

    def __init__(self, spec: ReplicaSpec, threads: int, batch_tokens: int) -> None:
        quiet_libraries()
        torch.set_num_threads(threads)
        self._device = default_device()
        self._model = load_base(materialise(spec.source), spec.quantization, self._device)
        self._pad_id, self._batch_tokens = spec.pad_id, batch_tokens

    def mean(self, examples: tuple[EncodedExample, ...]) -> Means:
        """Mean (H,) float64 over the examples of their `last_prompt_states`."""
        total = torch.zeros((), dtype=torch.float64)
        with torch.inference_mode():
            for indices in length_sorted_batches([len(e.prompt_ids) for e in examples], self._batch_tokens):
                chosen = [examples[i] for i in indices]
                batch = make_batch(chosen, [_PROMPT] * len(chosen), 1, self._pad_id, self._device)
                total = total + last_prompt_states(self._model, batch).cpu().double().sum(dim=0)
        mean: Means = (total / len(examples)).numpy()
        return mean


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
    paths = [folder / "hidden_states" / f"{task.name}-{_key(task, config, base)}.npy" for task in tasks]
    units = {path.stem: task["train"] for path, task in zip(paths, tasks, strict=True) if not _is_vector(path)}
    if units:
        size = pool_size(config.replicas, config.threads, len(units))
        with Bar("hidden states", sum(map(len, units.values())), "examples") as bar:

            def keep(name: str, mean: Means) -> None:
                write_array(folder / "hidden_states" / f"{name}.npy", mean)
                bar.advance(len(units[name]), name.rpartition("-")[0])

            # Longest first, so that no actor is left with a long unit at the end.
            ordered = dict(sorted(units.items(), key=lambda item: -sum(len(e.prompt_ids) for e in item[1])))
            arguments = (spec, config.threads, config.batch_tokens)
            actors = PlainActors(HiddenStateReplica, arguments, config, size)
            map_units(actors, "mean", ordered, size=size, on_result=keep)
    return np.stack([np.load(path, allow_pickle=False) for path in paths])


def _key(task: EncodedTask, config: GradientsConfig, base: dict[str, str]) -> str:
    """What a mean depends on, hashed: the prompts, the base, and how batches round."""
    prompts = [list(example.prompt_ids) for example in task["train"]]
    how = {"of": "last prompt token", "batch": config.batch_tokens, "threads": config.threads}
    return sha256_json({"prompts": prompts, "model": base["model"], "quantization": base["quantization"], **how})[:16]


def _is_vector(path: Path) -> bool:
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        print(f"{path}: damaged ({error}); computing it again", flush=True)
        return False
    return bool(found.ndim == 1 and np.isfinite(found).all())
