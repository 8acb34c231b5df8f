"""The job file as types. Every default of the project stands in this module and nowhere else.

`load_config("job.yaml", overrides=["search.trials=8"])` reads, checks and completes a job file. Unknown keys are errors
that list the known ones; relative paths are taken from the job file's folder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ray_ensemble.config_errors import explain
from ray_ensemble.config_yaml import read_yaml, yaml_text
from ray_ensemble.errors import InputError
from ray_ensemble.storage.url import checked_url, is_url

Fraction = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A section of the job file: immutable, and strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The base model. `source` is a local folder or GGUF file, `pypi:<package>==<version>/<path>`, or a hub id."""

    source: str
    quantization: Literal["auto", "none", "nf4"] = "auto"
    chat: bool = False


ALL_LINEAR = "all-linear"


class AdapterConfig(Section):
    """The LoRA adapter that gradients, training and merging share. `seed` draws θ₀ once, when the run is planned.

    `target_modules: all-linear` stands for every linear map of the base but the vocabulary matrix. `rank_stabilized` scales
    by alpha/√rank instead of alpha/rank.
    """

    rank: Count = 4
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[str], Field(min_length=1)] = ["q_proj", "k_proj", "v_proj"]
    rank_stabilized: bool = False
    seed: Seed = 0

    @field_validator("target_modules", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Let a bare name stand for a list of one."""
        return [value] if isinstance(value, str) else value

    @field_validator("target_modules")
    @classmethod
    def _alone(cls, value: list[str]) -> list[str]:
        if ALL_LINEAR in value and len(value) > 1:
            raise ValueError(f"{ALL_LINEAR} names every linear module and stands alone")
        return value


class TaskConfig(Section):
    """One dataset, or a folder of dataset folders.

    A folder with `task.json` needs only `source`. For `hf:` and `pypi:` sources `prompt` and `labels` are needed;
    `answers` are the data's own values for each label, in the labels' order (the labels themselves by default).
    `splits` gives an `hf:` source's names for our splits; those left out are drawn from its train split. `seed` draws
    splits where the source has none, and nothing else.
    `part: 1/4` takes the first of four disjoint parts of a file without splits, so that several tasks can be made of one
    corpus without sharing a text.
    """

    source: str
    name: str | None = None
    config: str | None = None
    prompt: str | None = None
    labels: list[str] | None = None
    answers: list[str | int | bool] | None = None
    label_field: str = "label"
    splits: dict[Literal["train", "validation", "test"], str] | None = None
    seed: Seed = 0
    part: Annotated[str, Field(pattern=r"^[1-9][0-9]*/[1-9][0-9]*$")] | None = None


class LimitsConfig(Section):
    """How many examples a task gives at most (a fixed sample of each split) and how long a prompt may be, in tokens."""

    train: Count | None = None
    validation: Annotated[int, Field(ge=2)] | None = None
    test: Count | None = None
    max_tokens: Annotated[int, Field(ge=8)] = 512


class Range(Section):
    """Replicas or workers that grow with the work from `min` to `max`."""

    min: Count = 1
    max: Count

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class GradientsConfig(Section):
    """The gradient pass: projected dimension d, projection seed, number of replicas and what one replica may use.

    `replicas` is a number, a range {min, max}, or `auto`: one a GPU, or one per `threads` CPUs. `shards` spreads the layers
    of each replica over that many actors, for a base that is larger than one device; the replicas that score labels and lift
    boosters are cut alike. `gpus` is what each actor asks for: `auto` is one where the cluster has any now, which a cluster
    that grows from nothing has not. Actors that the cluster cannot place in `wait_minutes` end the run. `projection:
    kronecker` is cheaper for wide adapters and less exact (docs/gradients.md).
    `start: meta` first trains the adapter for `meta_steps` steps on all tasks together (GradEx's meta-initialisation); gradients
    are taken there, and every adapter of the run starts there.
    `targets` says what is differentiated for a training example of K labels: `pairwise` the K − 1 margins against each
    wrong label, `margin` the one margin against all of them, which costs one backward pass whatever K but, with more than two
    labels, loses which of the wrong labels is near.
    """

    dim: Annotated[int, Field(ge=1, le=65536)] = 400
    seed: Seed = 0
    projection: Literal["rademacher", "kronecker"] = "rademacher"
    replicas: Literal["auto"] | Count | Range = "auto"
    gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    wait_minutes: Fraction = 20.0
    shards: Count = 1
    threads: Count = 1
    start: Literal["fresh", "meta"] = "fresh"
    meta_steps: Count = 50
    targets: Literal["pairwise", "margin"] = "pairwise"
    max_examples: Count | None = None
    batch_tokens: Count = 1024


class EstimatorConfig(Section):
    """The first-order estimate. `regularization: auto` chooses λ on validation data and scales it to each group's steps.

    The affinity is estimated on `subsets` subsets of `subset_size` tasks. Up to 50 tasks they cover every pair; above that each
    task is covered first with its `neighbours` most similar ones, by the cosine of mean training gradients.

    `calibrate: k` really fine-tunes the last k of these subsets before the search and takes the λ that is nearest to what they
    reached, in place of the one that validation data choose.
    """

    regularization: Literal["auto"] | Fraction = "auto"
    subsets: Count = 50
    subset_size: Count = 3
    neighbours: Count = 5
    calibrate: Annotated[int, Field(ge=0)] = 0
    seed: Seed = 0


class SearchConfig(Section):
    """The search over partitions: numbers of groups that are allowed and the number of Ray Tune trials (docs/search.md).

    `methods` give the trials' first partitions: `sdp` and `spectral` for each number of groups, `sdp-penalty` chooses it.
    `price` is what an adapter costs, in units of the objective: a partition into m groups has mean estimated loss + price · m.
    `rule: one_standard_error` takes the fewest groups whose objective is within one standard error of the best.
    `regularization_scales`: multiples of the estimate's λ; all trials are made at each. `wait_minutes` without a trial end it.
    """

    groups: list[Count] = [2, 3, 4, 5]
    trials: Count = 32
    objective: Literal["loss", "accuracy"] = "loss"
    methods: list[Literal["sdp", "spectral", "sdp-penalty"]] = ["sdp", "spectral", "sdp-penalty"]
    price: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    rule: Literal["best", "one_standard_error"] = "best"
    regularization_scales: list[Fraction] = [1.0]
    wait_minutes: Fraction = 20.0
    seed: Seed = 0

    @field_validator("groups", "methods", "regularization_scales")
    @classmethod
    def _not_empty(cls, value: list[Any]) -> list[Any]:
        if not value:
            raise ValueError("must name at least one")
        return value


class EarlyStopConfig(Section):
    """Look at the validation loss every so many steps, and stop after `patience` looks in a row without a better one."""

    every: Count = 50
    patience: Count = 3


Sampling = Literal["examples", "tasks"]
Logger = Literal["tensorboard", "mlflow", "wandb"]
Strategy = Literal["none", "zero2", "zero3", "fsdp2"]


class TrainingConfig(Section):
    """How every adapter is trained: groups, baseline and validation runs alike.

    `sampling: examples` draws every example of a group equally often; `tasks` draws every task equally often, and every
    example of a task. `early_stop` looks at the search half of the group's validation examples and keeps the best adapter. A
    step's batch is cut into micro-batches of at most `batch_tokens` padded tokens, which are halved when memory runs out;
    `auto` is 8192 on a GPU and 256 on a CPU, which larger ones hardly make faster. `activation_checkpointing` recomputes
    activations in the backward pass, which costs a forward pass and saves most of the memory that grows with the batch; the
    result is the same. `precision: auto` is bf16 autocast on a GPU that has it, fp32 elsewhere. `optimizer: paged_adamw` (GPU
    only) lets the optimiser's state move to host memory.

    A job is one Ray Train run of `cpus` and `gpus` (fractions allowed), and trains one adapter, or up to `pack` small ones on
    one copy of the base. A worker that fails is started again from its last checkpoint, `max_failures` times in a job; nodes
    that are taken away count apart, by `max_preemptions`. A job that the cluster cannot place in `wait_minutes` fails.
    `loggers` show the steps elsewhere than in `train.jsonl`. A job has `workers` workers, each with its own `cpus` and
    `gpus`, that share the rows of every step; with a range {min, max} the longest job has `max` of them and others in
    proportion, `auto` shares out what the cluster holds. With `strategy: none` each holds the whole base; `zero3` (DeepSpeed)
    and `fsdp2` (torch) cut the base into a shard each, `zero2` (DeepSpeed) the optimiser's state and gradients. `offload` moves
    that to host memory: the optimiser's state under `zero2`, the shards too under `zero3`, the shards under `fsdp2`.
    """

    epochs: Count = 2
    min_steps: Annotated[int, Field(ge=0)] = 200
    batch_size: Count = 8
    learning_rate: Fraction = 1.0e-3
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Fraction = 1.0
    sampling: Sampling = "examples"
    early_stop: EarlyStopConfig | None = None
    optimizer: Literal["adamw", "paged_adamw"] = "adamw"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    batch_tokens: Literal["auto"] | Count = "auto"
    activation_checkpointing: bool = False
    checkpoint_every: Count = 50
    max_failures: Annotated[int, Field(ge=0)] = 2
    max_preemptions: Annotated[int, Field(ge=0)] = 100
    strategy: Strategy = "none"
    workers: Literal["auto"] | Count | Range = 1
    offload: bool = False
    concurrency: Literal["auto"] | Count = "auto"
    cpus: Fraction = 1.0
    gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    wait_minutes: Fraction = 20.0
    threads: Count = 1
    pack: Count = 1
    loggers: list[Logger] = []
    seed: Seed = 0

    @model_validator(mode="after")
    def _possible(self) -> TrainingConfig:
        if self.offload and self.strategy == "none":
            raise ValueError("offload: true needs strategy zero2, zero3 or fsdp2; with none, leave it out")
        if self.strategy in ("zero2", "zero3") and self.optimizer != "adamw":
            raise ValueError(
                f"optimizer: {self.optimizer} cannot be used under strategy {self.strategy}, where the optimiser's state is "
                "DeepSpeed's; use adamw, with offload: true to keep its state in host memory"
            )
        if self.most_workers > self.batch_size:
            raise ValueError(
                f"{self.most_workers} workers share the {self.batch_size} examples of a step, so some would have none; lower "
                "workers or raise batch_size"
            )
        if self.most_workers > 1 and self.gpus != "auto" and self.gpus != int(self.gpus):
            raise ValueError(
                f"gpus: {self.gpus:g} is not a whole number, and several workers cannot share a GPU; use gpus: 1 or workers: 1"
            )
        if self.pack > 1 and (self.strategy != "none" or self.most_workers > 1):
            raise ValueError(
                "pack: several adapters on one base are trained by one worker with strategy none; use pack: 1, or workers: 1 "
                "and strategy: none"
            )
        return self

    def tokens_of(self, device: str) -> int:
        """Padded tokens that a micro-batch may hold on a device of this type ("cuda", "cpu")."""
        if self.batch_tokens == "auto":
            return 8192 if device == "cuda" else 256
        return self.batch_tokens

    @property
    def most_workers(self) -> int:
        """Workers that a job has at most; `auto` counts as several."""
        if self.workers == "auto":
            return min(2, self.batch_size)
        return self.workers if isinstance(self.workers, int) else self.workers.max

    def workers_of(self, steps: int, longest: int) -> int:
        """Workers of a job of so many steps, where the longest has `longest`."""
        if not isinstance(self.workers, Range):
            return self.most_workers
        return max(self.workers.min, round(self.workers.max * steps / longest))

    def steps(self, examples: int) -> int:
        """Optimiser steps that an adapter trained on `examples` examples gets: its epochs, but never below the floor."""
        return max(self.min_steps, math.ceil(self.epochs * examples / self.batch_size))


class BoostingConfig(Section):
    """Up to `steps` further adapters, each for the group of highest training loss under the ensemble so far (docs/boosting.md).

    `method: ridge` fits the ensemble's residual by ridge regression on the gradients and lifts the fit to an adapter; `train`
    trains one for `train_steps` steps on the loss of the ensemble with it added. `regularization` is the ridge's λ, `auto` the
    one whose estimated loss on validation data is least. Boosting ends early when a step does not lower the group's
    validation loss.
    """

    steps: Annotated[int, Field(ge=0)] = 0
    method: Literal["ridge", "train"] = "ridge"
    regularization: Literal["auto"] | Fraction = "auto"
    train_steps: Count = 30


class EnsembleConfig(Section):
    """How the adapters are combined, per dataset (docs/weights.md, docs/ensemble.md).

    `weights: learned` fits them and a scale of the scores on validation examples, held back towards the dataset's own group;
    `own` is that group's adapter alone, `uniform` all adapters alike, both at scale 1. `baselines` measures uniform weights on
    the test splits too, which takes every adapter's pass over them. `router` learns to tell the datasets by their bare text and
    measures the ensemble where an input's dataset is not known. `merged_rank` is the most that the rank of a dataset's merged
    adapter may be, such as the `--max-lora-rank` of a vLLM server: what is above is cut by singular value decomposition. By
    default the rank is the sum of those of the adapters in use. A merged adapter goes as far from the dataset's main adapter
    towards the ensemble's weights as makes its predictions most like the ensemble's on at most `merge_prompts` held-out prompts;
    with 0 it has the weights as they are.
    """

    weights: Literal["learned", "own", "uniform"] = "learned"
    baselines: bool = False
    router: bool = False
    merged_rank: Count | None = None
    merge_prompts: Annotated[int, Field(ge=0)] = 32


class ServingConfig(Section):
    """How `serve` answers; options of the command line, not keys of a job (docs/serving.md).

    Rows that come within `batch_wait` seconds of each other go through the base together, up to `batch_size` of them, whatever
    their datasets. Besides the two batches that a replica holds, up to `queue` requests wait; those beyond are refused (503).
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    merged: bool = False
    replicas: Count = 1
    batch_size: Count = 64
    batch_wait: Annotated[float, Field(ge=0, le=60)] = 0.01
    queue: Count = 1000
    max_rows: Count = 256
    max_body_bytes: Count = 2**20


class JobConfig(Section):
    """A whole job. Only `model.source` and `tasks` have no default."""

    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]
    limits: LimitsConfig = LimitsConfig()
    gradients: GradientsConfig = GradientsConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    search: SearchConfig = SearchConfig()
    training: TrainingConfig = TrainingConfig()
    boosting: BoostingConfig = BoostingConfig()
    ensemble: EnsembleConfig = EnsembleConfig()

    @model_validator(mode="before")
    @classmethod
    def _lift_sources(cls, data: Any) -> Any:
        """Let a bare string stand for a task that only has a source."""
        if isinstance(data, dict) and isinstance(data.get("tasks"), list):
            tasks = [{"source": task} if isinstance(task, str) else task for task in data["tasks"]]
            data = {**data, "tasks": tasks}
        return data


def load_config(path: str | Path, overrides: list[str] | None = None) -> JobConfig:
    """Read a job file and check every key.

    Args:
        path: the YAML job file. Relative `source` paths in it start at its folder and come back absolute.
        overrides: `"section.key=value"` strings (values are YAML) that replace what the file says.

    Raises:
        InputError: the file cannot be read, a key is unknown, or a value is of the wrong type or out of range.
    """
    path = Path(path)
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the job file ({error.strerror})") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: a job file is a mapping with the keys {', '.join(JobConfig.model_fields)}")
    for override in overrides or []:
        _apply_override(data, override)
    return parse_config(data, str(path), path.resolve().parent)


def parse_config(data: dict[str, Any], where: str, base_dir: Path) -> JobConfig:
    """Check a job given as plain data; `where` stands in errors, relative sources start at `base_dir`."""
    try:
        config = JobConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, JobConfig, TaskConfig)}") from None
    tasks = [task.model_copy(update={"source": _anchored(task.source, base_dir)}) for task in config.tasks]
    source = _anchored(config.model.source, base_dir, hub=True)
    return config.model_copy(update={"tasks": tasks, "model": config.model.model_copy(update={"source": source})})


def serving_config(given: dict[str, Any]) -> ServingConfig:
    """The options of `serve`; what is None is left at its default.

    Raises:
        InputError: a value is out of range.
    """
    try:
        return ServingConfig.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        option = "--" + str(problem["loc"][0]).replace("_", "-")
        raise InputError(f"{option}: {problem['msg'].lower()}, got {problem['input']!r}") from None


def dump_config(config: JobConfig) -> str:
    """The resolved job as YAML that `load_config` reads back to an equal `JobConfig`."""
    return yaml_text(config.model_dump(mode="json"))


def flatten(config: JobConfig) -> dict[str, Any]:
    """Every leaf of a job as `"section.key" -> value`; lists stay whole, tasks are keyed by their place."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {
                k: v for key, item in value.items() for k, v in walk(f"{prefix}.{key}" if prefix else key, item).items()
            }
        if prefix == "tasks":
            return {k: v for i, item in enumerate(value) for k, v in walk(f"tasks.{i}", item).items()}
        return {prefix: value}

    return walk("", config.model_dump(mode="json"))


def _anchored(source: str, base_dir: Path, hub: bool = False) -> str:
    if source.startswith("pypi:") or is_url(source):
        return checked_url(source) if is_url(source) else source
    if source.startswith("hf:"):
        if is_url(source[3:]):
            raise InputError("a source 'hf:…://…': 'hf:' stands before a hub id or a folder, not before a URL")
        local = _local(source[3:], base_dir)
        return f"hf:{local}" if source[3:].startswith((".", "/", "~")) else source
    local = _local(source, base_dir)
    # A model given as "owner/name" is a hub id unless such a path is there.
    if hub and not local.exists() and not source.startswith((".", "/", "~")):
        return source
    return str(local)


def _local(source: str, base_dir: Path) -> Path:
    try:
        return (base_dir / Path(source).expanduser()).resolve()
    except (RuntimeError, ValueError, OSError) as error:  # no such user; a NUL in it; a circle of links
        raise InputError(f"source {source!r}: no path ({' '.join(str(error).split())})") from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected section.key=value, such as search.trials=8")
    try:
        value = read_yaml(text)
    except (ValueError, yaml.YAMLError):
        raise InputError(f"--set {override}: the value is not YAML") from None
    *sections, leaf = key.split(".")
    target = data
    for section in sections:
        inner = target.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {override}: {section} is not a section of the job file")
        target = inner
    target[leaf] = value
