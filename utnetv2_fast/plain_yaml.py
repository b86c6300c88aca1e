"""YAML as people and this program write it: plain values, and nothing that could take memory without end."""

from __future__ import annotations

from typing import Any

import yaml

_DEEPEST = 20  # levels


def load(text: str) -> Any:
    """The content of a YAML document; raises yaml.YAMLError for what is none, and for aliases and deep nesting."""
    return yaml.load(text, _PlainLoader)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases and deep nesting: this program writes neither, and both take more than any machine has."""

    def fetch_more_tokens(self) -> None:
        if max(self.flow_level, len(self.indents)) > _DEEPEST:
            raise yaml.YAMLError("nested too deep")
        super().fetch_more_tokens()

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)
