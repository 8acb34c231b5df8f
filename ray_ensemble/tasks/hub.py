"""`hf:` sources: data sets of the Hugging Face hub, or saved to disk by `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_ensemble.config import TaskConfig
from ray_ensemble.errors import InputError, nearest
from ray_ensemble.tasks.rows import Schema
from ray_ensemble.tasks.split import draw_splits, drop_repeats
from ray_ensemble.tasks.task import SPLITS, Example, Split, Task
from ray_ensemble.tasks.template import prompt_fields

_SCALARS = ("string", "large_string", "int", "uint", "float", "bool")
_SAVED = ("dataset_dict.json", "dataset_info.json")


def read_hub(config: TaskConfig, base_dir: Path) -> Task:
    """Read `hf:<id>` (with `config.config` as its configuration) or `hf:<folder>` written by `save_to_disk`.

    Fields are the columns of strings and numbers; the label column is `config.label_field`, where integers are indices
    of `config.labels` and all else is looked up in `config.answers` or the labels. `config.splits` gives the source's
    name for each of our splits; without it the source's train, validation and test are taken. A validation or test
    split that is not named or not there is drawn from train with `config.seed`, after repeats are dropped from train: a
    fifth and three tenths of it, at most 500 and 1,000. No code of the data set is run.

    The task's name is `config.name`, else the last part of the id, with the configuration after a hyphen.

    Raises:
        InputError: the data set cannot be had, or a split, column, label or prompt does not fit.
    """
    source = config.source.removeprefix("hf:")
    schema = Schema.make(config.prompt, config.labels, config, f"hf:{source}")
    data = _open(source, config.config, base_dir)
    if not hasattr(data, "keys"):
        data = {"train": data}
    names = _split_names(config, list(data.keys()), f"hf:{source}")
    splits = {ours: _read_split(data[theirs], schema, f"hf:{source} {theirs}") for ours, theirs in names.items()}
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        kept = drop_repeats(splits["train"], prompt_fields(schema.prompt))
        splits.update(draw_splits(kept, config.seed, missing))
    name = config.name or "-".join(filter(None, [source.rstrip("/").rsplit("/", 1)[-1], config.config]))
    return Task(name, schema.prompt, schema.labels, {split: splits[split] for split in SPLITS})


def _open(source: str, config: str | None, base_dir: Path) -> Any:
    """A `Dataset` or `DatasetDict`; every failure is one line."""
    local = (base_dir / Path(source).expanduser()).resolve()
    is_local = source.startswith((".", "/", "~")) or any((local / name).is_file() for name in _SAVED)
    if is_local and not local.exists():
        raise InputError(f"{local}: no such folder with a saved data set")
    import datasets

    try:
        return datasets.load_from_disk(str(local)) if is_local else datasets.load_dataset(source, config)
    except Exception as error:
        # The hub's clients raise some twenty classes of errors for bad ids, missing configurations and dead networks.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"hf:{source}: the data set cannot be loaded ({reason})") from None


def _split_names(config: TaskConfig, known: list[str], where: str) -> dict[Split, str]:
    names: dict[Split, str] = {}
    if config.splits is None:
        names.update({split: split for split in SPLITS if split in known})
    else:
        names.update({split: config.splits[split] for split in SPLITS if split in config.splits})
    for theirs in names.values():
        if theirs not in known:
            raise InputError(f"{where}: no split '{theirs}'{nearest(theirs, known)} (known splits: {', '.join(known)})")
    if "train" not in names:
        raise InputError(f"{where}: no train split; name one in 'splits' (known splits: {', '.join(known)})")
    return names


def _read_split(data: Any, schema: Schema, where: str) -> tuple[Example, ...]:
    # Columns that no prompt can name (images, lists) are never decoded.
    columns = [
        name
        for name, feature in data.features.items()
        if name == schema.label_field or str(getattr(feature, "dtype", "")).startswith(_SCALARS)
    ]
    rows = data.select_columns(columns)
    return tuple(schema.row_example(row, f"{where} row {number}") for number, row in enumerate(rows))
