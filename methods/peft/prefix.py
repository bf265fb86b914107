"""Prefix tuning: k virtual tokens before every text are trained, as keys and values of each layer; the model stays (arXiv 2101.00190).

    P = W₂ tanh(W₁ E + b₁) + b₂        E [k, hidden size], W₁ [m, hidden size], W₂ [2 Σ heads · head dimension, m]

What is trained is E and the layers over it, since P itself learns badly; in the end P is computed once and they are dropped. A row of P
holds, layer by layer, the keys and then the values of a virtual token. The last layer begins with zeros, as the library's does on demand:
all virtual tokens then have the key and the value 0. That is not the model without them, since they take a share of the softmax each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.kv.prefix import Prefix
from slimbench.methods.formats.policy import Acts

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class PrefixTuning(TrainingSettings, Acts, Method):
    """A policy beside the model as it is: the numbers of the prefix are parameters that it has more.

    Attributes:
        tokens: Virtual ones.
        hidden: Width m of the layer between, used while training.
    """

    name = "prefix-tuning"
    slot = "cache"
    accepts = DENSE
    citation = Citation("Prefix-tuning", year=2021, arxiv="2101.00190", covers=("peft/prefix-tuning",))
    needs = Needs(calibration=True, training=True)
    produces = policies.FORMAT

    tokens: int = 20
    hidden: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def policy(self) -> Prefix:
        return Prefix(self.tokens)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.training import cut, objective, train
        from slimbench.methods.formats.kv.prefix import heads_of
        from slimbench.methods.formats.kv.prefix_cache import PrefixCache

        model: Any = trained.load(dense)
        heads = heads_of(model)
        parameters = self.start(model.get_input_embeddings().embedding_dim, heads, dense)

        def student(input_ids: Tensor, use_cache: bool) -> Any:
            with torch.autocast(dense.device, enabled=False):
                states = self.states(parameters, heads, dense.shape.head_dim)
            return model(input_ids=input_ids, past_key_values=PrefixCache(list(states.values())), use_cache=True)

        done = train(self, parameters, objective(self, student, dense), cut(calibration.ids, self.length), dense)
        with torch.no_grad():
            states = self.states(parameters, heads, dense.shape.head_dim)
        stored = {name: state.to(getattr(torch, dense.dtype)) for name, state in states.items()}
        policies.save(replace(self.policy(), states=stored), dense, out)
        size = sum(state.numel() for state in stored.values())
        bytes_ = sum(state.numel() * state.element_size() for state in stored.values())
        facts = {"prefix_tokens": self.tokens, "prefix_parameters": size, "prefix_cache_bytes": bytes_}
        whole = size + counts(model)["parameters"]
        return done.added_to(Claim(self.produces, parameters=whole, teacher=trained.teacher(self), details=facts))

    def start(self, width: int, heads: Sequence[int], dense: DenseModel) -> dict[str, nn.Parameter]:
        """E, W₁, b₁, W₂ and b₂ as training begins: E normal, W₁ as a linear layer has it, the others zero."""
        import torch
        from torch.nn import Parameter

        generator, outputs = torch.Generator().manual_seed(self.seed + dense.seed), 2 * sum(heads) * dense.shape.head_dim
        made = {
            "embedding": torch.randn(self.tokens, width, generator=generator),
            "first.weight": torch.empty(self.hidden, width).uniform_(-(width**-0.5), width**-0.5, generator=generator),
            "first.bias": torch.zeros(self.hidden),
            "second.weight": torch.zeros(outputs, self.hidden),
            "second.bias": torch.zeros(outputs),
        }
        return {name: Parameter(value.to(dense.device)) for name, value in made.items()}

    def states(self, parameters: Mapping[str, Tensor], heads: Sequence[int], head_dim: int) -> dict[str, Tensor]:
        """Keys and values [heads, k, head_dim] by layer, as the policy names them."""
        from torch.nn import functional

        inside = functional.linear(parameters["embedding"], parameters["first.weight"], parameters["first.bias"]).tanh()
        rows = functional.linear(inside, parameters["second.weight"], parameters["second.bias"])
        names = [f"{layer}.{part}" for layer in range(len(heads)) for part in ("keys", "values")]
        parts = rows.split([count * head_dim for count in heads for _ in range(2)], 1)
        return {name: part.unflatten(1, (-1, head_dim)).transpose(0, 1) for name, part in zip(names, parts, strict=True)}
