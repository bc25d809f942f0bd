"""Makes the README that a package index shows from the one in the checkout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")


def with_absolute_links(text: str, repository: str | None) -> str:
    """Relative links made absolute; without a repository only their text."""

    def replace(match: re.Match[str]) -> str:
        is_picture, label, path = match.groups()
        if repository is None:
            return f"(A picture in the repository: {label}.)" if is_picture else label
        kind = "raw" if is_picture else "blob"
        return f"{is_picture}[{label}]({repository.rstrip('/')}/{kind}/main/{path})"

    return RELATIVE_LINK.sub(replace, text)


class ReadmeHook(MetadataHookInterface):
    """Sets `readme`; the one setting is `Repository` in `[project.urls]` of pyproject.toml."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the README to the metadata of the package."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": with_absolute_links(text, repository),
        }
