"""The own CPU kernel: its C++ source, how it is compiled, and the layout that it reads."""
