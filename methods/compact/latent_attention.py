"""Latent attention put on a model that was trained without it (MHA2MLA, arXiv 2502.14837; `methods.formats.attention.latent`).

    which pairs     of each head the pairs of channels of the largest mean ‖q_i‖ ‖k_i‖ over calibration tokens stay rotated   §3.1
    C, U            the r leading directions of what calibration tokens have as values and keys without position: Cᵀ = U        §3.2, joint

and then both are fitted as linear attentions are, so that the result of each layer comes near that of the attention as it was. The paper
takes the directions from the weights, and trains the whole model on some thousandths of its pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.latent import Latent

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LatentAttention(TrainingSettings, Method):
    """A latent vector in place of keys and values.

    Attributes:
        rank: Numbers of it.
        pairs: Pairs of channels of each head of keys that stay rotated.
        tokens: Calibration tokens from which pairs and directions come.
    """

    name = "latent-attention"
    citation = Citation("MHA2MLA", year=2025, arxiv="2502.14837")
    needs = Needs(calibration=True, training=True)
    accepts = DENSE
    produces = policies.FORMAT

    rank: int = 128
    pairs: int = 8
    tokens: int = 8192
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        Latent(self.rank, self.pairs)
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")

    def check(self, shape: ModelShape) -> None:
        whole = shape.num_kv_heads * (2 * shape.head_dim - 2 * self.pairs)
        if 2 * self.pairs > shape.head_dim or self.rank > whole:
            raise Unsupported(f"{self.rank} numbers beside {self.pairs} rotated pairs are more than the {max(0, whole)} they stand for")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.training import cut, train

        model: Any = trained.load(dense)
        pairs, directions = self.begin(model, calibration.ids)
        learned = {name: torch.nn.Parameter(part) for name, part in directions.items()}
        done = train(self, learned, self._loss(model, pairs, learned), cut(calibration.ids, self.length), dense)
        stored = {name: part.detach().to(getattr(torch, dense.dtype)) for name, part in learned.items()}
        policies.save(replace(Latent(self.rank, self.pairs), parts=stored | pairs), dense, out)
        size = sum(part.numel() for part in stored.values())
        numbers = self.rank + dense.shape.num_kv_heads * 2 * self.pairs
        bytes_ = float(dense.shape.num_layers * numbers * getattr(torch, dense.dtype).itemsize)
        whole = counts(model)["parameters"] + size
        return done.added_to(Claim(self.produces, parameters=whole, cache_bytes_per_token=bytes_, teacher="the model itself"))

    def begin(self, model: Any, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pairs of each layer, and C and U before they are fitted."""
        import torch

        from slimbench.methods.formats.attention.operators.latent import merged, split

        pairs: dict[str, Tensor] = {}
        directions: dict[str, Tensor] = {}
        rows = ids[: max(1, -(-self.tokens // ids.shape[1]))]
        with torch.no_grad():
            for layer, (query, key, value) in self._states(model, rows).items():
                norms = [(part.unflatten(3, (2, -1)) ** 2).sum(3).sqrt() for part in (query, key)]  # [B, heads, T, d / 2]
                asked = norms[0].unflatten(1, (key.shape[1], -1)).mean((0, 2, 3))
                strength = asked * norms[1].mean((0, 2))
                chosen = strength.topk(self.pairs, 1).indices.sort(1).values if self.pairs else strength[:, :0].long()
                joint = merged(split(key, chosen)[1], value).flatten(0, 1).double()
                _, vectors = torch.linalg.eigh(joint.T @ joint)
                basis = vectors[:, -self.rank :].flip(1).float()
                pairs[f"{layer}.pairs"] = chosen
                directions |= {f"{layer}.down": basis.T.contiguous(), f"{layer}.up": basis.contiguous()}
        return pairs, directions

    def _states(self, model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values of each layer, not rotated."""
        from slimbench.methods.formats.attention.operators.interface import attentions
        from slimbench.methods.formats.depth.rows import states

        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            query, key, value = (states(module, which, hidden) for which in ("q", "k", "v"))
            found[module.layer_idx] = query, key, value

        handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in attentions(model)]
        try:
            model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _loss(self, model: Any, pairs: Mapping[str, Tensor], learned: Mapping[str, nn.Parameter]) -> Any:
        """Squared error of the results of all layers."""
        import torch

        from slimbench.methods.formats.attention.operators.interface import Rotary, attention
        from slimbench.methods.formats.attention.operators.latent import LatentOperator

        rotary = Rotary(model.base_model.rotary_emb)

        def loss(ids: Tensor) -> Tensor:
            rotary.forget()
            with torch.no_grad():
                held = self._states(model, ids)
            errors = []
            for layer, (query, key, value) in held.items():
                scaling = query.shape[3] ** -0.5
                with torch.no_grad():
                    wanted = attention(rotary(query, 0), rotary(key, 0), value, scaling)
                parts = {part: learned[f"{layer}.{part}"] for part in ("down", "up")} | {"pairs": pairs[f"{layer}.pairs"]}
                found: Tensor = LatentOperator(rotary, scaling, parts)(query, key, value, None)
                errors.append((found - wanted).square().mean())
            return torch.stack(errors).sum()

        return loss
