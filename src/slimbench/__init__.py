"""Benchmark and leaderboard harness for LLM compression: quality and speed of the same artefact, with evidence."""

__version__ = "0.1.0"
