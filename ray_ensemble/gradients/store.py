"""The gradient store: one folder a (task, split), memory-mapped arrays beside an `info.json` with their hashes.

from ray_ensemble.gradients import GradientStore
store = GradientStore.open("runs/demo/gradients")
store["sst2", "train"].features          # (N, d) float32
store["sst2", "validation"].class_features  # (N, K, d) float32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_ensemble.errors import InputError, nearest
from ray_ensemble.files import file_harm, read_json, sha256_file, whole_folder, write_array, write_json

Array = NDArray[np.float32]


@dataclass(frozen=True)
class StoredGradients:
    """Gradients of one split of one task.

    Every split has `features` (N, d), `margins` (N,) and `labels` (N,). Validation splits, and training splits of tasks
    with more than two labels, have besides `class_scores` (N, K), the base's label scores, and `class_features` (N, K, d),
    the features of s_k − s_0; `features` and `margins` then follow from these.
    """

    features: Array
    margins: Array
    labels: NDArray[np.int64]
    class_scores: Array | None = None
    class_features: Array | None = None


class GradientStore:
    """Read access to a run's gradients; arrays are mapped when they are asked for, not before."""

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info

    @classmethod
    def open(cls, folder: str | Path) -> GradientStore:
        """Open a store.

        Raises:
            InputError: there is no whole store in `folder`.
        """
        folder = Path(folder)
        return cls(folder, read_json(folder / "info.json", "gradient store"))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the job's order."""
        return list(self.info["tasks"])

    def __getitem__(self, key: tuple[str, str]) -> StoredGradients:
        task, split = key
        if task not in self.info["tasks"]:
            raise InputError(
                f"{self.folder}: no task '{task}'{nearest(task, self.tasks)} (tasks: {', '.join(self.tasks)})"
            )
        if split not in ("train", "validation"):
            raise InputError(f"{self.folder}: no split '{split}' (gradients are kept of train and validation)")
        return read_split(split_folder(self.folder, task, split), self._expected(task, split))

    def _expected(self, task: str, split: str) -> dict[str, Any]:
        """What a split's own description must say if it belongs to this store."""
        shared = {key: value for key, value in self.info.items() if key not in ("tasks", "data")}
        return {**shared, "task": task, "split": split, "data": self.info["data"][f"{task}/{split}"]}


def split_folder(folder: Path, task: str, split: str) -> Path:
    """Where a split of a task is kept."""
    return folder / task / split


def write_split(folder: Path, arrays: Mapping[str, NDArray[Any]], info: Mapping[str, Any]) -> None:
    """Write one split, whole or not at all. `info` tells what the arrays were computed from; hashes are added."""
    with whole_folder(folder) as temporary:
        for name, array in arrays.items():
            write_array(temporary / f"{name}.npy", array)
        files = {f"{name}.npy": sha256_file(temporary / f"{name}.npy") for name in arrays}
        write_json(temporary / "info.json", {**info, "files": files})


def damage(folder: Path, info: Mapping[str, Any]) -> str | None:
    """Why the split in `folder` is not the one that `info` describes, or None if it is, byte for byte."""
    if not folder.is_dir():
        return "missing"
    try:
        found = read_json(folder / "info.json", "split of the gradient store")
    except InputError as error:
        return str(error)
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict) or not found["files"]:
        return f"{folder / 'info.json'}: damaged (it lists no files)"
    for key, value in info.items():
        if found.get(key) != value:
            return f"{folder}: made with {key} = {found.get(key)}, not {value}"
    harms = ((folder / name, file_harm(folder / name, digest)) for name, digest in found["files"].items())
    return next((f"{file}: {harm}" for file, harm in harms if harm), None)


def read_split(folder: Path, expected: Mapping[str, Any]) -> StoredGradients:
    """Map the arrays of one split, once every byte has been checked against its hash.

    Args:
        folder: the split's.
        expected: what its `info.json` must say.

    Raises:
        InputError: a file is missing or damaged, or the split was made of something else; it is named.
    """
    reason = damage(folder, expected)
    if reason is not None:
        where = f"{folder}: missing from the gradient store" if reason == "missing" else reason
        raise InputError(f"{where}; run the gradients stage again, which computes this part alone")
    info = read_json(folder / "info.json", "split of the gradient store")
    arrays = {Path(name).stem: _mapped(folder / name) for name in info["files"]}
    if "class_scores" in arrays:
        scores, features = arrays["class_scores"], arrays["class_features"]
        margins, margin_features = margins_of_classes(scores, features, arrays["labels"])
        return StoredGradients(margin_features, margins, arrays["labels"], scores, features)
    return StoredGradients(arrays["features"], arrays["margins"], arrays["labels"])


def margins_of_classes(scores: Array, features: Array, labels: NDArray[np.int64]) -> tuple[Array, Array]:
    """Margins (N,) and their features (N, d) from scores (N, K) and the features (N, K, d) of s_k − s_0.

    ∇f = ∇s_y − Σ_{k≠y} q_k ∇s_k with q the softmax over the other labels; Σq = 1, so differences to s_0 are enough.
    """
    rows = np.arange(len(labels))
    others = scores.astype(np.float64)
    others[rows, labels] = -np.inf
    top = others.max(axis=1, keepdims=True)
    share = np.exp(others - top)
    total = share.sum(axis=1, keepdims=True)
    margins = scores[rows, labels] - (top + np.log(total))[:, 0]
    weights = -share / total
    weights[rows, labels] = 1.0
    projected = np.einsum("nk,nkd->nd", weights, features)  # (N, K) · (N, K, d)
    return margins.astype(np.float32), projected.astype(np.float32)


def _mapped(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
