"""Run folders: who owns one; and those at a URL: objects of a store, the driver's local copy, what workers hand back."""

from ray_ensemble.storage.exchange import adapter_copy, bring, drop, located, run_copy, run_of, train_storage
from ray_ensemble.storage.lease import LOCAL_SETTLE_SECONDS, Lease
from ray_ensemble.storage.local import LocalFolder
from ray_ensemble.storage.mirror import Mirror
from ray_ensemble.storage.readers import run_files, status_files
from ray_ensemble.storage.sources import source_files
from ray_ensemble.storage.store import Store, Stored, store_at
from ray_ensemble.storage.url import checked_url, is_safe, is_url, run_place, without_settings
from ray_ensemble.storage.working_copy import MARKER, WorkingCopy, opened, origin, place_of, refuse_working_copy

__all__ = [
    "LOCAL_SETTLE_SECONDS",
    "MARKER",
    "Lease",
    "LocalFolder",
    "Mirror",
    "Store",
    "Stored",
    "WorkingCopy",
    "adapter_copy",
    "bring",
    "checked_url",
    "drop",
    "is_safe",
    "is_url",
    "located",
    "opened",
    "origin",
    "place_of",
    "refuse_working_copy",
    "run_copy",
    "run_files",
    "run_of",
    "run_place",
    "source_files",
    "status_files",
    "store_at",
    "train_storage",
    "without_settings",
]
