"""Fail the build of the documentation when a public name is missing from the API pages."""

from __future__ import annotations

import ast
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError


def public_names() -> list[str]:
    """Read ``__all__`` from the source, since the package itself may not be installed."""
    init = Path(__file__).parent.parent / "src" / "polyak" / "__init__.py"
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise PluginError("src/polyak/__init__.py has no __all__")


def on_post_build(config: MkDocsConfig) -> None:
    """Look for the anchor of every public name in the pages that were built."""
    pages = [page.read_text(encoding="utf-8") for page in Path(config.site_dir).rglob("*.html")]
    missing = [
        name
        for name in public_names()
        if not any(
            f'id="polyak.{name}"' in page or f'id="polyak.{module}.{name}"' in page
            for module in MODULES
            for page in pages
        )
    ]
    if missing:
        raise PluginError(f"public names that no API page documents: {', '.join(missing)}")


MODULES = ("averaged_model", "weight_average", "schedules", "formulas", "names", "trajectory")
