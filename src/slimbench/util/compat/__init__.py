"""What is used of libraries without being promised by them: one module a library, one probe in the tests for each thing.

A new release of a library is tried by `tests/unit/util/test_compat.py`; until it passes, pyproject keeps that release out. Nothing
else in slimbench touches a name that begins with an underscore (the linter's SLF001), or a module that its library keeps for itself.
"""
