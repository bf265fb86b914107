"""Tables that a command writes into a page, between marks that name them."""

from __future__ import annotations

from pathlib import Path


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->` in a page.

    Raises:
        ValueError: The page has no such marks.
    """
    content = page.read_text()
    before, mark, rest = content.partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not mark or not end:
        raise ValueError(f"{page} has no part named {name}")
    page.write_text(f"{before}{mark}\n{text}\n{end}{after}")
