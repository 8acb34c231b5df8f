"""One process of a contender of `benchmarks/shards.py`: an unsharded replica, or a rank of FSDP2 or of DeepSpeed ZeRO-3.

Each process computes the per-example gradients of its own batches with the project's collector. Under FSDP2 and ZeRO-3 it
keeps 1/k of the frozen weights and gathers the rest, layer by layer, in the forward pass and again in the backward pass.
The LoRA matrices are whole in every process: they are tiny, and the collector's hooks read them.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel

from ray_ensemble.gradients.per_example import Collected, GradientCollector
from ray_ensemble.gradients.projection import Projection
from ray_ensemble.gradients.units import GradientUnit
from ray_ensemble.models import Batch, attach_adapters, load_base, quiet_libraries
from ray_ensemble.models.shard import decoder_layers
from ray_ensemble.tasks import EncodedExample, cache_dir

CPU = torch.device("cpu")
# glibc keeps freed buffers for reuse, by default ever larger ones: a process that gathers and frees weights layer by layer then
# looks as if it held them all. With these in the environment of every contender, freed buffers go back to the system.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}


@dataclass(frozen=True)
class Setup:
    """What every process of every contender is told. `batches` is the number per process and round."""

    model: str  # folder
    adapter: str  # folder
    shards: int
    batches: int
    rows: int
    tokens: int
    dim: int
    seed: int
    timeout: float  # seconds

    @property
    def examples(self) -> int:
        """Examples of one round over all processes."""
        return self.shards * self.batches * self.rows


@dataclass(frozen=True)
class PeerRound:
    """A process's part of a round: when it began and ended by the machine's monotonic clock, and what came out."""

    start: float
    end: float
    margins: NDArray[np.float32]  # (batches·rows,)
    features: NDArray[np.float32]  # (batches·rows, d)


@dataclass(frozen=True)
class PeerFacts:
    """A process's weights and traffic. `peak_memory` is over the rounds alone: loading and cutting the model are left out."""

    bytes_sent_per_batch: float
    collectives_per_batch: float
    weight_bytes: int
    peak_memory: int
    memory_before_model: int


def process_unit(setup: Setup, vocabulary: int, rank: int) -> GradientUnit:
    """The batches of process `rank`: random tokens, prompts of equal length, two labels of one token each."""
    generator = np.random.default_rng([setup.seed, rank])
    words = ((1,), (2,))
    batches = []
    for _ in range(setup.batches):
        ids = generator.integers(0, vocabulary, (setup.rows, setup.tokens)).tolist()
        labels = generator.integers(0, len(words), setup.rows).tolist()
        batches.append(
            tuple(EncodedExample(tuple(prompt), label, False) for prompt, label in zip(ids, labels, strict=True))
        )
    return GradientUnit("margin", words, tuple(batches), tuple(range(setup.batches * setup.rows)))


def collect_margins(collector: GradientCollector, batches: Sequence[Batch]) -> Collected:
    """The gradient pass that is measured; nothing else here calls the collector."""
    return collector.collect(batches, "margin")


def vocabulary_size(model: torch.nn.Module) -> int:
    """Token ids that the model knows."""
    return int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]


# --- the three ways to hold the weights ---------------------------------------------------------------------------------


def whole(setup: Setup, device: torch.device) -> PeftModel:
    """The model as one unsharded replica."""
    model = _adapted(_base_on_cpu(setup, device), setup)
    model.to(device)
    return model


def fsdp2(setup: Setup, device: torch.device) -> PeftModel:
    """The model under `fully_shard`: a group per decoder layer, and the embedding, last norm and head at the root.

    Layers are resharded after the forward pass. The root is not (FSDP2's own choice: its backward follows at once).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _adapted(_base_on_cpu(setup, device), setup)
    adapters = {parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for parameter in adapters:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (setup.shards,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if embedding.weight is not head.weight:
        fully_shard(embedding, mesh=mesh, reshard_after_forward=True)
        fully_shard(head, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, ignored_params=adapters)
    model.to(device)  # buffers
    return model


def zero3(setup: Setup, device: torch.device) -> PeftModel:
    """The base under ZeRO-3 without an optimizer, since nothing is trained; the adapter is attached afterwards.

    ZeRO's defaults keep up to 10⁹ parameters gathered, which is the whole of a small model: reuse across the two passes is
    turned off, and look-ahead is held to one decoder layer, as it would have to be for a base that does not fit.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_dir() / "torch_extensions"))
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.disable(logging.WARNING)  # DeepSpeed's loggers are made, with their own levels, when it is imported
    deepspeed = importlib.import_module("deepspeed")
    base = _base_on_cpu(setup, device)
    layer = sum(parameter.numel() for parameter in decoder_layers(base)[0].parameters())
    largest = max(parameter.numel() for parameter in base.parameters())
    config = {
        "train_micro_batch_size_per_gpu": setup.rows,
        "bf16": {"enabled": device.type == "cuda"},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": base.config.get_text_config().hidden_size,  # norms stay whole
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 2 * layer + largest,
        },
    }
    engine, *_ = deepspeed.initialize(model=base, config=config)
    model = _adapted(engine.module, setup)
    model.to(device)
    return model


BUILDERS: dict[str, Callable[[Setup, torch.device], PeftModel]] = {
    "replicas": whole,
    "fsdp2": fsdp2,
    "zero3": zero3,
}


def _base_on_cpu(setup: Setup, device: torch.device) -> PreTrainedModel:
    base = load_base(Path(setup.model), "none", CPU)
    return base.to(torch.bfloat16) if device.type == "cuda" else base


def _adapted(base: PreTrainedModel, setup: Setup) -> PeftModel:
    return attach_adapters(base, {"default": Path(setup.adapter)})


# --- what is measured beside time ---------------------------------------------------------------------------------------


# Collective, the argument whose size counts, how often it is sent.
COLLECTIVES = (
    ("all_gather_single", ("output", "output_tensor"), 0, 1),
    ("all_gather_into_tensor", ("output_tensor", "output"), 0, 1),
    ("reduce_scatter_single", ("input", "input_tensor"), 1, 1),
    ("reduce_scatter_tensor", ("input", "input_tensor"), 1, 1),
    ("all_reduce", ("tensor",), 0, 2),
)


class Traffic:
    """Counts what this process sends in torch's collectives, by the ring algorithm's formula.

    Of an all-gather whose result has B bytes each of k processes sends B·(k − 1)/k; of a reduce-scatter of B bytes the same;
    of an all-reduce twice that. Calls are counted where FSDP2 and DeepSpeed make them; the bytes are not seen on the wire.
    """

    def __init__(self, processes: int) -> None:
        self._share = (processes - 1) / processes
        self.bytes = 0.0
        self.calls = 0
        for name, keywords, position, times in COLLECTIVES:
            if original := getattr(dist, name, None):
                setattr(dist, name, self._counted(original, keywords, position, times))

    def _counted(
        self, original: Callable[..., Any], keywords: Sequence[str], position: int, times: int
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[position] if len(args) > position else next(kwargs[k] for k in keywords if k in kwargs)
            self.bytes += times * self._share * tensor.numel() * tensor.element_size()
            self.calls += 1
            return original(*args, **kwargs)

        return call

    def reset(self) -> None:
        """Begin at zero."""
        self.bytes, self.calls = 0.0, 0


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters that this process holds between passes: its shards, and what is whole everywhere."""
    return sum(_local_bytes(parameter) for parameter in model.parameters())


def _local_bytes(parameter: Any) -> int:
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: the shard, and beside it the whole where that is kept
        shard = parameter.ds_tensor
        kept = parameter.numel() if parameter.ds_persist else 0
        return int(shard.numel() * shard.element_size() + kept * parameter.element_size())
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(local.numel() * local.element_size())


def resident_bytes(field: str = "VmRSS") -> int:
    """This process's resident set (`VmRSS`), or the most that it was (`VmHWM`), from Linux's account."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak(device: torch.device) -> None:
    """Give freed memory back and forget the peak so far, so that loading a model whole before it is cut does not count."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The peak since `reset_peak`: of the GPU's memory if there is one, else of the resident set."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else resident_bytes("VmHWM")


# --- the process --------------------------------------------------------------------------------------------------------


class Peer:
    """Process `rank` of a contender."""

    def __init__(self, kind: str, setup: Setup, rank: int) -> None:
        quiet_libraries()
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        self._setup = setup
        self._device = process_device(rank, setup.shards)
        self._traffic = Traffic(setup.shards)
        self._before = resident_bytes()
        self._model = BUILDERS[kind](setup, self._device)
        self._collector = GradientCollector(self._model, Projection(setup.dim, 0, self._device))
        self._batches = process_unit(setup, vocabulary_size(self._model), rank).made(0, self._device)
        self._rounds = 0

    def round(self) -> PeerRound:
        """All of this process's batches once; the processes begin together."""
        if self._rounds == 1:  # the first warms up: allocations, ZeRO's record of the order of modules
            reset_peak(self._device)
        if self._rounds <= 1:
            self._traffic.reset()
        self._rounds += 1
        dist.barrier()
        start = time.monotonic()
        result = collect_margins(self._collector, self._batches)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        end = time.monotonic()
        return PeerRound(start, end, result.margins.float().cpu().numpy(), result.features.float().cpu().numpy())

    def facts(self) -> PeerFacts:
        """Means and peaks over the rounds after the first."""
        passes = max(1, self._rounds - 1) * self._setup.batches
        return PeerFacts(
            bytes_sent_per_batch=self._traffic.bytes / passes,
            collectives_per_batch=self._traffic.calls / passes,
            weight_bytes=weight_bytes(self._model),
            peak_memory=peak_bytes(self._device),
            memory_before_model=self._before,
        )


def process_device(rank: int, processes: int) -> torch.device:
    """A GPU of its own for every process if the machine has that many, else the CPU."""
    return torch.device("cuda", rank) if torch.cuda.device_count() >= processes else CPU


def peer_main(kind: str, setup: Setup, rank: int, rendezvous: str, pipe: Connection) -> None:
    """Answer `round` and `facts` until told to `stop`; whatever goes wrong is sent as text."""
    try:
        _join(setup, rank, rendezvous)
        peer = Peer(kind, setup, rank)
        pipe.send((True, None))
        while (command := pipe.recv()) != "stop":
            pipe.send((True, peer.round() if command == "round" else peer.facts()))
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}\n{traceback.format_exc()}"))
    except EOFError:
        return
    os._exit(0)  # leave without the libraries' clean-up, which would wait for peers that may be gone


def _join(setup: Setup, rank: int, rendezvous: str) -> None:
    device = process_device(rank, setup.shards)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(setup.shards))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=setup.shards,
        timeout=timedelta(seconds=setup.timeout),
    )
