"""How one cell of the benchmark runs; knows no method, engine or task by name."""
