"""The tutorial is done from its first line to its last, in an empty folder, with the real commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.conftest import ON_POSTGRESQL
from tests.docs.reader import Reader, blocks


@pytest.mark.timeout(300)
def test_whoever_follows_the_tutorial_ends_with_two_isolated_tenants_on_sqlite_and_on_postgresql(shop: Reader) -> None:
    """The fixture has done the part on SQLite, and has compared what was printed."""
    assert ON_POSTGRESQL in {block.section for block in blocks("tutorial.md")}

    shop.follow("tutorial.md", sections=lambda title: title == ON_POSTGRESQL)


def test_a_page_that_shows_what_is_not_printed_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr("tests.docs.reader.DOCS", tmp_path)
    page.write_text("```sh\necho two\n```\n\n```text\ntw...\n```\n")
    Reader(tmp_path).follow("page.md")

    page.write_text("```sh\necho two\n```\n\n```text\none\n```\n")
    with pytest.raises(AssertionError, match="the page shows"):
        Reader(tmp_path).follow("page.md")


def test_a_page_with_a_command_that_fails_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.docs.reader.DOCS", tmp_path)
    (tmp_path / "page.md").write_text("```sh\nfalse\ntrue\n```\n")

    with pytest.raises(AssertionError, match="exit code 1"):
        Reader(tmp_path).follow("page.md")


def test_a_page_with_a_fence_that_cannot_be_read_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.docs.reader.DOCS", tmp_path)
    (tmp_path / "page.md").write_text("!!! note\n    ```sh\n    false\n    ```\n")

    with pytest.raises(AssertionError, match="cannot read"):
        Reader(tmp_path).follow("page.md")
