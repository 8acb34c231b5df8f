"""A run's adapters as one folder for peft, transformers, vLLM and the hub, with a model card; nothing of this machine in it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ensemble.config import JobConfig, load_config
from ray_ensemble.ensemble.card import model_card, public_source
from ray_ensemble.ensemble.merge import VLLM_RANKS
from ray_ensemble.ensemble.prediction import ensemble_parts
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.files import read_json, whole_folder
from ray_ensemble.storage import is_url, run_files, run_place

_VLLM_LORAS = 8  # --max-loras: adapters in one batch, for each of which vLLM sets GPU memory aside


@dataclass(frozen=True)
class FinishedRun:
    """What the files of a run say that has come to its ensemble; `metrics` and `partition` are as they stand in their files.

    `metrics` is None where the run was not evaluated.
    """

    folder: Path
    config: JobConfig
    plan: dict[str, Any]
    tasks: list[dict[str, Any]]
    partition: dict[str, Any]
    ensemble: dict[str, Any]
    steps: dict[str, int]
    metrics: dict[str, Any] | None

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters that are exported: path in the folder -> the name under which vLLM serves it."""
        served = {f"merged/{task['name']}": task["name"] for task in self.tasks}
        served |= {f"adapters/{name}": f"adapters/{name}" for name in self.ensemble["adapters"] if name != "start"}
        served |= {f"boosters/{name}": f"boosters/{name}" for name in self.ensemble["boosting"]["adapters"]}
        if self.starts_warm:
            served["start"] = "start"
        return served

    @property
    def starts_warm(self) -> bool:
        """Whether the adapters' common start was trained and has a part in a dataset's ensemble."""
        warm = self.config.gradients.start == "meta"
        return any("start" in ensemble_parts(self.ensemble, task["name"], warm) for task in self.tasks)

    @property
    def base(self) -> str:
        """The base as others can name it: a hub id, a `pypi:` source, or the name of a local file or folder."""
        return public_source(self.config.model.source)

    @property
    def hub_base(self) -> str | None:
        """The base's hub id, if it came from the hub."""
        source = self.config.model.source
        elsewhere = source.startswith("pypi:") or is_url(source) or Path(source.removeprefix("hf:")).is_absolute()
        return None if elsewhere else self.base


def finished_run(folder: str | Path) -> FinishedRun:
    """Read what an export needs.

    Raises:
        InputError: no run is there, or it has not come to its ensemble.
    """
    path = run_files(run_place(folder), "ensemble")
    config = load_config(path / "config.yaml")
    # Figures of before stay where the ensemble was made anew and not evaluated yet.
    evaluated = (path / "manifests" / "evaluate.json").is_file()
    return FinishedRun(
        path,
        config,
        read_json(path / "plan.json", "plan"),
        read_json(path / "tasks.json", "list of tasks")["tasks"],
        read_json(path / "partition.json", "partition"),
        read_json(path / "ensemble.json", "ensemble"),
        read_json(path / "manifests" / "train.json", "manifest of the training")["steps"],
        read_json(path / "metrics.json", "table of metrics") if evaluated else None,
    )


def export_run(folder: str | Path, target: str | Path) -> Path:
    """Write a run's adapters and what is needed to use them as one folder, whole or not at all.

    Every adapter of a group, every booster and every dataset's merged adapter is a plain PEFT folder, under the path that it has
    in the run. Beside them: `ensemble.json` (weights and scales), `tasks.json` (prompts and label words; no data), `README.md`
    (the model card), `predict.py` and `serve_vllm.sh`.

    Args:
        folder: a run that has come to its ensemble.
        target: a folder that does not exist yet or is empty.

    Raises:
        InputError: the run is not that far, a file of it is missing, or the target is in use.
    """
    run, path = finished_run(folder), Path(target).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--output {target}: is there already and not empty; choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {target}: cannot be made ({error.strerror})") from None
    with whole_folder(path) as temporary:
        ranks = {at: _copy_adapter(run.folder / at, temporary / at, run.base) for at in run.adapters}
        _write(temporary / "ensemble.json", run.ensemble)
        _write(temporary / "tasks.json", _described_tasks(run))
        (temporary / "README.md").write_text(model_card(run), encoding="utf-8")
        shutil.copyfile(Path(__file__).parent / "standalone.py", temporary / "predict.py")
        if any(rank <= VLLM_RANKS[-1] for rank in ranks.values()):
            script = temporary / "serve_vllm.sh"
            script.write_text(_vllm_script(run, ranks), encoding="utf-8")
            script.chmod(0o755)
    return path


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload an exported folder; a repository that is not there yet is made, private. Returns its address.

    The token is the one of huggingface_hub: HF_TOKEN, or that of `hf auth login`.

    Raises:
        RunError: the hub refused or could not be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="ray-ensemble")
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Adapters of a ray-ensemble run")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RunError(
            f"--push-to-hub {repository}: the hub did not take it ({' '.join(str(error).split())[:300]}); the folder is whole, "
            f"push it again with: hf upload {repository} {folder}"
        ) from None
    return str(address)


def check_push(repository: str) -> None:
    """Refuse a push that cannot succeed before anything is written.

    Raises:
        InputError: the name is no hub id, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repository}: not a hub id, owner/name ({error})") from None
    if get_token() is None:
        raise InputError("--push-to-hub: no token; set HF_TOKEN to one that may write, or log in with: hf auth login")


def _copy_adapter(source: Path, target: Path, base: str) -> int:
    """Copy an adapter, its base named as others can name it; returns its rank."""
    config = read_json(source / "adapter_config.json", "adapter configuration")
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])
    target.mkdir(parents=True)
    _write(target / "adapter_config.json", config)
    try:
        shutil.copyfile(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
    except FileNotFoundError:
        raise InputError(f"{source / 'adapter_model.safetensors'}: this adapter is missing") from None
    return int(config["r"])


def _described_tasks(run: FinishedRun) -> dict[str, Any]:
    model = run.plan["model"]
    return {
        "base": {"source": run.base, "hash": model["hash"], "quantization": model["quantization"]},
        "chat": run.config.model.chat,
        "max_tokens": run.config.limits.max_tokens,
        "tasks": [{key: task[key] for key in ("name", "prompt", "labels")} for task in run.tasks],
    }


def _vllm_script(run: FinishedRun, ranks: dict[str, int]) -> str:
    """A command that serves every adapter whose rank vLLM can."""
    fitting = {at: name for at, name in run.adapters.items() if ranks[at] <= VLLM_RANKS[-1]}
    left_out = [f"{name} (rank {ranks[at]})" for at, name in run.adapters.items() if at not in fitting]
    rank = next(allowed for allowed in VLLM_RANKS if allowed >= max(ranks[at] for at in fitting))
    lines = [
        "#!/bin/sh",
        "# Serves the adapters of this folder with vLLM. A dataset's own has the name of the dataset as its model's.",
        "# BASE is the base model, a folder or a hub id. Further options are handed on: sh serve_vllm.sh --port 8000",
    ]
    if run.plan["model"]["quantization"] == "nf4":
        lines.append(
            "# The adapters were trained on the base in NF4: add --quantization bitsandbytes to serve that base."
        )
    if left_out:
        lines.append(f"# Left out, since vLLM takes ranks up to {VLLM_RANKS[-1]}: {', '.join(left_out)}")
    if run.hub_base is None:
        lines.append(': "${BASE:?set BASE to the base model, a folder or a hub id}"')
    else:
        # A hub id is letters, digits and -_./ alone.
        lines.append(f'BASE="${{BASE:-{run.hub_base}}}"')
    modules = [f'  "{name}=$here/{at}" \\' for at, name in fitting.items()]
    lines += [
        'here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)',
        'exec vllm serve "$BASE" --enable-lora \\',
        f"  --max-loras {min(len(fitting), _VLLM_LORAS)} --max-lora-rank {rank} --lora-modules \\",
        *modules,
        '  "$@"',
    ]
    return "\n".join(lines) + "\n"


def vllm_command(folder: Path) -> str:
    """The command of an export's `serve_vllm.sh` in one line, to be shown."""
    path = folder / "serve_vllm.sh"
    if not path.exists():
        return f"vLLM takes no rank above {VLLM_RANKS[-1]}, which all these adapters have"
    script = path.read_text(encoding="utf-8")
    command = script[script.index("exec ") + len("exec ") :].replace('  "$@"', "")
    return re.sub(r"\s*\\\n\s*", " ", command).replace("$here", str(folder)).strip()


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
