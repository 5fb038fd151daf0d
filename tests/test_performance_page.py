"""The figures of the page on speed are those of the committed runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("page", ROOT / "benchmarks" / "page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_written_from_the_committed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = page()
    committed = module.PAGE.read_text(encoding="utf-8")
    copied = tmp_path / "page.md"
    copied.write_text(committed.replace("×", "?"), encoding="utf-8")
    (tmp_path / "docs" / "assets").mkdir(parents=True)
    monkeypatch.setattr(module, "PAGE", copied)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    module.write()
    begin, end = module.BEGIN, module.END
    written = copied.read_text(encoding="utf-8")
    assert written.split(begin)[1].split(end)[0] == committed.split(begin)[1].split(end)[0]
    for plot in (tmp_path / "docs" / "assets").iterdir():
        assert plot.read_bytes() == (ROOT / "docs" / "assets" / plot.name).read_bytes()
