"""Label scores of adapters on splits, kept as files: Ray actors that hold a base, or a shard of it, swap adapters.

Scores are filed under what they depend on (adapter, data, base), so that no stage computes a score that another has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.config import GradientsConfig
from ray_ensemble.ensemble.adapter_switch import AdapterSwitch, adapter_name
from ray_ensemble.files import sha256_file, sha256_json, write_array
from ray_ensemble.gradients import ReplicaSpec
from ray_ensemble.gradients.pipeline import map_pipelines
from ray_ensemble.models import (
    LabelTree,
    attach_adapters,
    default_device,
    label_scores,
    length_sorted_batches,
    load_base,
    make_batch,
    materialise,
    quiet_libraries,
)
from ray_ensemble.pool import PlainActors, map_units, pool_size
from ray_ensemble.progress import Bar
from ray_ensemble.runtime import peak_memory_bytes
from ray_ensemble.storage import adapter_copy, located
from ray_ensemble.tasks import EncodedExample, EncodedTask, split_hash

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class ScoreRequest:
    """Scores wanted: of the adapter saved in `adapter` (None: the bare base) on `examples` of `task`.

    Workers are told of the adapter as `storage.located` has it.
    """

    adapter: Path | str | None
    task: EncodedTask
    examples: tuple[EncodedExample, ...]


@dataclass(frozen=True)
class Scored:
    """Scores (N, K) in the order of the requests, tokens that went through the model, and peak memory of an actor."""

    scores: tuple[Scores, ...]
    tokens: int
    peak_memory_bytes: int


class ScoringReplica:
    """One base with adapters attached as they are asked for; the plain class behind the Ray actor."""

    def __init__(self, spec: ReplicaSpec, threads: int, batch_tokens: int) -> None:
        import torch

        quiet_libraries()
        torch.set_num_threads(threads)
        self._device = default_device()
        base = load_base(materialise(spec.source), spec.quantization, self._device)
        self._model = attach_adapters(base, {"initial": adapter_copy(spec.initial_adapter)})
        self._adapters = AdapterSwitch(self._model)
        self._pad_id = spec.pad_id
        self._batch_tokens = batch_tokens

    def score(self, request: ScoreRequest) -> dict[str, Any]:
        """Scores (N, K) of a request's examples in their order, tokens seen, peak memory in bytes."""
        import torch

        tree = LabelTree.of(request.task.label_ids)
        classes = len(request.task.labels)
        scores = np.empty((len(request.examples), classes), dtype=np.float32)
        name = None if request.adapter is None else adapter_name(request.adapter)
        tokens = 0
        with torch.inference_mode(), self._adapters.using(request.adapter, name):
            for indices in batches_of(request, self._batch_tokens):
                examples = [request.examples[i] for i in indices]
                batch = make_batch(examples, [tree] * len(examples), classes, self._pad_id, self._device)
                scores[indices] = label_scores(self._model, batch).cpu().numpy()
                tokens += batch.tokens
        return {"scores": scores, "tokens": tokens, "peak_memory_bytes": peak_memory_bytes()}


def score_all(
    requests: Sequence[ScoreRequest],
    spec: ReplicaSpec,
    config: GradientsConfig,
    base: dict[str, str],
    folder: Path,
    title: str,
) -> Scored:
    """Scores of every request, from files where they are, else by a pool of actors.

    Args:
        requests: what is wanted.
        spec: how an actor loads the base.
        config: replicas, shards, threads and batch tokens, as for the gradients; scores do not depend on replicas and shards.
        base: hashes of the base and θ₀.
        folder: the run folder; scores are kept in its `scores/`.
        title: of the progress bar.
    """
    paths = score_paths(requests, config, base, folder)
    units = {path.stem: request for path, request in zip(paths, requests, strict=True) if not _is_scores(path, request)}
    tokens = sum(token_count(request) for request in requests)
    peak = 0
    if units:
        total = sum(len(r.examples) for r in units.values())
        size = pool_size(config.replicas, config.threads, len(units), config.shards)
        with Bar(title, total, "examples") as bar:

            def keep(name: str, result: dict[str, Any]) -> None:
                nonlocal peak
                peak = max(peak, result["peak_memory_bytes"])
                write_array(folder / "scores" / f"{name}.npy", result["scores"])
                bar.advance(len(units[name].examples), units[name].task.name)

            # Longest first, so that no actor is left with a long unit at the end.
            ordered = dict(sorted(units.items(), key=lambda item: -token_count(item[1])))
            places = {a: located(folder, a) for a in {r.adapter for r in units.values()} if isinstance(a, Path)}
            ordered = {
                name: replace(request, adapter=places[request.adapter]) if request.adapter in places else request
                for name, request in ordered.items()
            }
            if config.shards == 1:
                arguments = (spec, config.threads, config.batch_tokens)
                actors = PlainActors(ScoringReplica, arguments, config, size)
                map_units(actors, "score", ordered, size=size, on_result=keep)
            else:
                from ray_ensemble.ensemble.scoring_shards import ShardedScoring

                map_pipelines(ShardedScoring, "score", ordered, spec=spec, config=config, size=size, on_result=keep)
    return Scored(tuple(np.load(path, allow_pickle=False) for path in paths), tokens, peak)


def score_paths(
    requests: Sequence[ScoreRequest], config: GradientsConfig, base: dict[str, str], folder: Path
) -> list[Path]:
    """Where the scores of each request are kept: below `scores/`, by what they depend on.

    Adapters and examples are many requests' own, and hashed once.
    """
    adapters: dict[Path | str | None, str | None] = {None: None}
    data: dict[tuple[str, int], str] = {}  # by the identity of the examples, which the requests hold
    paths = []
    for request in requests:
        adapter, examples = request.adapter, (request.task.name, id(request.examples))
        if adapter is not None and adapter not in adapters:
            adapters[adapter] = sha256_file(adapter_copy(adapter) / "adapter_model.safetensors")
        if examples not in data:
            data[examples] = split_hash(request.task, request.examples)
        how = {"batch": config.batch_tokens, "threads": config.threads}
        key = sha256_json({"adapter": adapters[adapter], "data": data[examples], "base": base, **how})[:16]
        paths.append(folder / "scores" / f"{request.task.name}-{key}.npy")
    return paths


def batches_of(request: ScoreRequest, budget: int) -> list[list[int]]:
    """A request's examples in batches of at most `budget` padded tokens, as lists of their places."""
    return length_sorted_batches(_lengths(request), budget)


def token_count(request: ScoreRequest) -> int:
    """Tokens that a request's rows hold without padding."""
    return sum(_lengths(request))


def _lengths(request: ScoreRequest) -> list[int]:
    nodes = len(LabelTree.of(request.task.label_ids).tokens)
    return [len(e.prompt_ids) + nodes for e in request.examples]


def _is_scores(path: Path, request: ScoreRequest) -> bool:
    try:
        shape = np.load(path, allow_pickle=False).shape
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        print(f"{path}: damaged ({error}); computing it again", flush=True)
        return False
    return bool(shape == (len(request.examples), len(request.task.labels)))
