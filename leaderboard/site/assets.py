"""Scripts and styles of the site. DataTables comes from the wheel of itables; the rest is ours. Nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from slimbench.leaderboard.site.pages import HERE

_EXPORTS = re.compile(r"\bexport\s*\{([^}]*)\};?")


def assets() -> dict[str, bytes]:
    """Every file of `assets/` by its path in the board."""
    ours = {f"assets/{path.name}": path.read_bytes() for path in sorted((HERE / "static").iterdir())}
    return {"assets/datatables.js": _datatables(), **ours}


def _folder(package: str) -> Path:
    """Where a package lies. It is not imported: what it needs to run is not needed here."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(2, f"the package {package} is not installed: pip install {package}")
    return Path(spec.submodule_search_locations[0])


@cache
def _datatables() -> bytes:
    """The bundle as a classic script that defines `DataTable`: browsers load no module from `file://`."""
    bundle = (_folder("itables") / "html" / "dt_bundle.js").read_text(encoding="utf-8")
    (exports,) = _EXPORTS.findall(bundle)
    (table,) = re.findall(r"([\w$]+) as default", exports)
    body = _EXPORTS.sub(f"window.DataTable={table};", bundle)
    return f'(function(){{"use strict";\n{body}\n}})();\n'.encode()
