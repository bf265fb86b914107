"""Methods that leave the weights alone and say what an engine does while it runs."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from slimbench.methods.base import Calibration, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.policy import Acts, Policy


class PolicyMethod(Acts, Method):
    """The base as it is, and a policy beside it, after those that are there."""

    needs = Needs(weights=False)
    accepts = policies.ADDED
    produces = policies.FORMAT

    @abstractmethod
    def policy(self, seed: int = 0) -> Policy:
        """What it asks the engine to do; `seed` is that of the cell."""

    def check(self, shape: ModelShape) -> None:
        self.policy().check(shape)

    def claims(self, policy: Policy, dense: DenseModel) -> dict[str, Any]:
        """Fields of the claim beside the format."""
        return {}

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        policy = self.policy(dense.seed)
        claims = self.claims(policy, dense)
        policies.save(policy, dense, out)
        return Claim(self.produces, **claims)
