"""`slimbench board serve`: the board in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    board: Annotated[Path, typer.Option(help="Folder of a board that was built.")] = Path("board"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes any that is free.")] = 8000,
) -> None:
    """Serve a board on this machine until Ctrl+C and print its address. Opening index.html from the folder does as well."""
    from slimbench.leaderboard.site.serve import server, url

    with server(board, port) as serving:
        print(f"{url(serving)} shows {board}; Ctrl+C ends it", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print()
