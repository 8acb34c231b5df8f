"""Saved adapters on one base, loaded as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError

from ray_ensemble.files import sha256_file
from ray_ensemble.models.adapters import unloadable
from ray_ensemble.storage import adapter_copy

_KEPT = 32  # adapters held at once


def adapter_name(adapter: Path | str) -> str:
    """A name by content: the same adapter under two folders is one adapter."""
    return f"adapter-{sha256_file(adapter_copy(adapter) / 'adapter_model.safetensors')[:16]}"


class AdapterSwitch:
    """A model, or a shard of one, under one adapter at a time. A shard keeps the tensors of its own layers alone."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._names: list[str] = []

    @contextmanager
    def using(self, adapter: Path | str | None, name: str | None) -> Iterator[None]:
        """Passes in this block go through a saved `adapter`, whose `adapter_name` is `name`; None: the bare base.

        Raises:
            InputError: the adapter is damaged.
        """
        if adapter is None or name is None:
            with self._model.disable_adapter():
                yield
            return
        if name not in self._names:
            if len(self._names) == _KEPT:
                self._model.delete_adapter(self._names.pop(0))
            folder = adapter_copy(adapter)
            try:
                self._model.load_adapter(folder, adapter_name=name)
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
                raise unloadable(folder, error) from None
            self._model.eval()
            self._names.append(name)
        self._model.set_adapter(name)
        yield
