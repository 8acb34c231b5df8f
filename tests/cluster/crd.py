"""KubeRay's schemas, cut down to what our manifests use, and made strict about keys as the API server is.

The full ones take 2 MB and are not kept here. `python tests/cluster/crd.py FOLDER` writes the cut ones anew into
`kuberay_schemas.json`, once a manifest uses more. FOLDER has `ray.io_rayclusters.yaml` and `ray.io_rayjobs.yaml` of
https://github.com/ray-project/kuberay (helm-chart/kuberay-operator/crds, release line 1.7, Apache-2.0).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
REDUCED = Path(__file__).with_name("kuberay_schemas.json")
KINDS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
_KEPT = ("type", "enum", "required", "minimum", "maximum", "pattern", "minItems", "minLength", "maxLength", "format")
Schema = dict[str, Any]


def manifests() -> dict[str, Schema]:
    """Every Kubernetes document in `cluster/kuberay`, by its file's name."""
    files = sorted((REPOSITORY / "cluster" / "kuberay").glob("*.yaml"))
    return {file.name: yaml.safe_load(file.read_text()) for file in files}


def full_schemas() -> Path | None:
    """The folder of KubeRay's full schemas, if this machine has them."""
    folder = Path(os.environ.get("RAY_ENSEMBLE_SCHEMAS") or REPOSITORY.parent / "shared" / "schemas")
    return folder if all((folder / name).is_file() for name in KINDS.values()) else None


def read_crd(file: Path) -> Schema:
    """The v1 schema of a custom resource definition."""
    definition = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return next(v for v in definition["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]


def strict(schema: Schema, used: Any = None) -> Schema:
    """A JSON schema that refuses unknown keys; with `used`, only of the keys that those documents have."""
    found = {key: schema[key] for key in _KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        names = schema["properties"]
        if used is not None:
            names = [name for name in names if any(name in document for document in used)]
        found["properties"] = {
            name: strict(schema["properties"][name], None if used is None else [d[name] for d in used if name in d])
            for name in names
        }
        found["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        inner = None if used is None else [value for document in used for value in document.values()]
        found["additionalProperties"] = strict(schema["additionalProperties"], inner)
    if "items" in schema:
        found["items"] = strict(schema["items"], None if used is None else [item for d in used for item in d])
    return found


def reduced(folder: Path) -> dict[str, Schema]:
    """Strict schemas by kind, of what the manifests use."""
    documents = list(manifests().values())
    return {
        kind: strict(_whole(read_crd(folder / name)), [d for d in documents if d["kind"] == kind])
        for kind, name in KINDS.items()
    }


def whole(folder: Path, kind: str) -> Schema:
    """The strict schema of everything that a kind allows."""
    return strict(_whole(read_crd(folder / KINDS[kind])))


def _whole(schema: Schema) -> Schema:
    """With the metadata that every object of Kubernetes has, and no custom resource definition spells out."""
    text = {"type": "string"}
    labels = {"type": "object", "additionalProperties": text}
    metadata = {"type": "object", "properties": {"name": text, "namespace": text, "labels": labels}}
    required = ["apiVersion", "kind", "metadata", "spec"]
    return {**schema, "required": required, "properties": {**schema["properties"], "metadata": metadata}}


if __name__ == "__main__":
    REDUCED.write_text(json.dumps(reduced(Path(sys.argv[1])), sort_keys=True) + "\n")
