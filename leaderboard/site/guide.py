"""The guide: what columns, marks and statuses mean, and which engine runs what."""

from __future__ import annotations

from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.pages import page
from slimbench.leaderboard.site.ranking import ALL
from slimbench.leaderboard.tables.columns import RANK
from slimbench.leaderboard.tables.engines import paths

_STATUSES = {
    "ok": "Every stage that was asked for ended well.",
    "incomplete": "A stage has no record yet.",
    "unsupported": "The combination cannot run: the reason says why.",
    "diverged": "The perplexity is not finite or above the vocabulary size.",
    "timeout": "A stage took longer than it was given.",
    "oom": "Memory did not suffice.",
    "failed": "A stage ended in an error. Nothing that failed is left out.",
}


def render(board: Board) -> str:
    return page(
        "guide.html.j2", "guide.html", "Guide", columns=ALL, rank_help=RANK, statuses=list(_STATUSES.items()), paths=paths(board.rows)
    )
