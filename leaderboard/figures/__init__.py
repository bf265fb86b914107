"""Figures of the board. Pure functions of rows: the same rows give the same bytes.

`catalogue.figures` says which figures a set of rows allows; each kind has a module of its own, and `canvas`, `labels`,
`measures`, `groups` and `palette` hold what they share.
"""

from __future__ import annotations

from slimbench.leaderboard.figures.palette import FAMILIES, family_of
from slimbench.leaderboard.figures.pareto import caption, draw, plottable

__all__ = ["FAMILIES", "caption", "draw", "family_of", "plottable"]
