"""Job files as YAML, read safely, and written so that they read back the same."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that is given twice is an error, and 1e-3 is a number as in YAML 1.2."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping of distinct keys."""
        given: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in given:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' is given twice", key.start_mark
                    )
                given.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """What the loader reads back as it was: texts that look like numbers to it are quoted."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is not YAML, or gives a key twice.
        ValueError: a value looks like a date and is none.
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader)


def yaml_text(data: Any) -> str:
    """Plain data as YAML that `read_yaml` reads back to the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
