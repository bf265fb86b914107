"""What an engine must be able to do, so that every engine is measured by one protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from slimbench.harness.config.targets import locate
from slimbench.harness.measure.loaded import Loaded
from slimbench.harness.store.artefact import read_manifest
from slimbench.methods.base import Unsupported


class Engine(ABC):
    """Loads artefacts of the formats in its table.

    Args:
        loaders: Format of an artefact → dotted path of what turns its folder into this engine's model; what it is called with is
            the engine's affair.
        cards: CUDA cards among which a model is spread, from that of `device` on; only for the formats that its YAML says it `spreads`.

    Class attributes:
        version: Raised when the same artefact gives other numbers than before. Each class states its own, as a number: it is read without
            importing the module.
    """

    version: ClassVar[int]

    def __init__(self, loaders: dict[str, str], cards: int = 1) -> None:
        self.loaders, self.cards = loaders, cards

    def load(self, artefact: Path, device: str, trust_remote_code: bool = False) -> Loaded:
        """Load an artefact from disk.

        Raises:
            methods.base.Unsupported: This engine does not load its format here.
        """
        format_ = read_manifest(artefact).claim.format
        if format_ not in self.loaders:
            raise Unsupported(f"it does not load format '{format_}', only {', '.join(self.loaders)}")
        return self.open(artefact, locate(self.loaders[format_]), device, trust_remote_code)

    @abstractmethod
    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> Loaded:
        """Load an artefact with the loader of its format."""
