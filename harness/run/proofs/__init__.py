"""Proofs in seconds on a tiny model: of a method, of an engine in each format that it loads."""
