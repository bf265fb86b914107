"""What libraries write past Python is kept from the standard error."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def libraries_silenced() -> Iterator[None]:
    """Keep from the standard error what libraries write to it, compiled ones included, unless an error ends the block."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as heard:
        own = os.dup(2)
        os.dup2(heard.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            heard.seek(0)
            os.write(own, heard.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
