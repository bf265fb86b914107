"""Scripts and styles of the site. DataTables comes from the wheel of itables; the rest is ours. Nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from leaderboard.site.pages import HERE

_EXPORTS = re.compile(r"\bexport\s*\{([^}]*)\};?")


def assets() -> dict[str, bytes]:
    """Every file of `assets/` by its path in the board."""
    ours = {f"assets/{path.name}": path.read_bytes() for path in sorted((HERE / "static").iterdir())}
    return {"assets/datatables.js": _datatables(), **ours}


@cache
def _datatables() -> bytes:
    """The bundle as a classic script that defines `DataTable`: browsers load no module from `file://`."""
    bundle = files("itables").joinpath("html", "dt_bundle.js").read_text(encoding="utf-8")
    (exports,) = _EXPORTS.findall(bundle)
    (table,) = re.findall(r"([\w$]+) as default", exports)
    body = _EXPORTS.sub(f"window.DataTable={table};", bundle)
    return f'(function(){{"use strict";\n{body}\n}})();\n'.encode()
