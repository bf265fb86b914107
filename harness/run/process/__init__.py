"""Processes in which stages run: their families, the signals that stop them, and whose fault their errors are."""
