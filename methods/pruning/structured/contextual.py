"""Contextual pruning (Mini-GPTs, arXiv 2312.12682): what a text of one domain hardly uses is taken out.

A neuron j of a layer goes if its mean magnitude over the N tokens of that text, its ℓ1 norm divided by their number, is at most ε:

    m_j = 1/N Σ_n |a_nj|  ≤  ε

and a token of the vocabulary if its share of the text is at most f, which at f = 0 says that it does not occur. Neurons are the inputs
and outputs of linear layers and the outputs of activations. The authors' program sets the weights to zero that read or make them. Here
those are cut that a block can do without, its channels, with the same outputs: a channel goes if what down reads of it is quiet, or what
gate or up make of it. Where all are quiet the loudest of the block stays. Quiet neurons of attentions and of the hidden states, which the
program also sets to zero, stay as they are.

All magnitudes are those of the dense model. The fine-tuning that follows in the paper is another step of a pipeline.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import EDITED, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.architecture.units import Structures, best
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.core.architecture.anatomy import MLP
    from slimbench.methods.core.walk import Block


@dataclass(frozen=True)
class ContextualPruning(Method):
    """Channels and tokens go that the calibration text, a sample of the domain, hardly uses; nothing is trained.

    Attributes:
        epsilon: ε, at least 0: mean magnitude at which a channel goes; the paper's mild setting is a thousandth, its harsh one a tenth.
        frequency: f, from 0 to 1: share of the text at which a token loses its row in the embedding and the head. It is then read as
            the first token that stays and never predicted. None: all stay.
    """

    name = "contextual-pruning"
    citation = Citation("Mini-GPTs", year=2023, arxiv="2312.12682", covers=("pruning/mini-gpts-contextual-pruning",))
    needs = Needs(calibration=True)
    produces = EDITED

    epsilon: float = 1e-3
    frequency: float | None = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, not {self.epsilon}")
        if self.frequency is not None and not 0 <= self.frequency < 1:
            raise ValueError(f"frequency must be at least 0 and below 1, not {self.frequency}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts, keep_tokens
        from slimbench.methods.core.walk import walk

        if not calibration.ids.numel():
            raise ValueError("calibration holds no tokens")
        model: Any = dense.load()
        before = model.num_parameters()
        mlps = [block.mlp for block in anatomy(model)]
        tokens = None if self.frequency is None else self.tokens(model, calibration.ids)
        gone = [self.quiet(block, mlp) for block, mlp in zip(walk(model, calibration.ids, dense.progress), mlps, strict=True)]
        if not any(bool(mask.any()) for mask in gone) and (tokens is None or bool(tokens.all())):
            raise Unsupported(f"no channel has a mean magnitude of {self.epsilon:g} or less, and no token is to go")
        details: dict[str, Any] = {"channels_left": [sum(int((~mask).sum()) for mask in gone), sum(len(mask) for mask in gone)]}
        for mlp, mask in zip(mlps, gone, strict=True):
            if mask.any():
                Structures("channels", len(mask), mlp.makes, mlp.down).cut(model, (~mask).nonzero().squeeze(1))
        if tokens is not None:
            details |= coverage(calibration.ids, tokens)
            if not tokens.all():
                keep_tokens(model, tokens.nonzero().squeeze(1))
        save_dense(model, out)
        details |= {"channels_by_block": [int((~mask).sum()) for mask in gone], "parameters_before": before}
        return Claim(EDITED, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)

    def quiet(self, block: Block, mlp: MLP) -> Tensor:
        """The channels of a block that go, as a mask [channels]."""
        import torch

        means = magnitudes(block, mlp)
        gone = torch.stack([mean <= self.epsilon for mean in means.values()]).any(0)
        gone[best(means[mlp.down], 1)] &= not gone.all()
        return gone

    def tokens(self, model: Any, ids: Tensor) -> Tensor:
        """Which tokens stay, as a mask [vocabulary] on the CPU: the frequent ones, and those by which texts begin, end and are padded.

        Raises:
            Unsupported: The embedding is none whose rows can be taken out.
        """
        from torch import nn

        embedding = model.get_input_embeddings()
        if type(embedding) is not nn.Embedding:
            raise Unsupported(f"{type(model).__name__} has no embedding of the usual class, from which tokens could be taken out")
        kept = counted(ids, embedding.num_embeddings) > (self.frequency or 0) * ids.numel()
        kept[specials(model)] = True
        return kept


def magnitudes(block: Block, mlp: MLP) -> dict[nn.Linear, Tensor]:
    """Mean magnitudes [channels] over the tokens, float64: of the inputs of down, and of the outputs of the layers that make channels."""
    sums: dict[nn.Linear, Any] = defaultdict(float)
    tokens = 0

    def add(layer: nn.Linear, values: Tensor) -> None:
        sums[layer] += values.detach().flatten(0, -2).double().abs().sum(0)

    def observe(_: str, x: Tensor) -> None:
        nonlocal tokens
        tokens += len(x)
        add(mlp.down, x)

    hooks = [layer.register_forward_hook(lambda layer, _, made: add(layer, made)) for layer in mlp.makes]
    try:
        block.observe(observe, [name for name, layer in block.linears().items() if layer is mlp.down])
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: total / tokens for layer, total in sums.items()}


def counted(ids: Tensor, vocabulary: int) -> Tensor:
    """How often each token of a vocabulary occurs in a text, int64 [vocabulary] on the CPU."""
    return ids.cpu().flatten().bincount(minlength=vocabulary)


def specials(model: Any) -> list[int]:
    """Ids of the tokens that the configuration of a model names: the beginning and the end of texts, padding, separators."""
    found: set[int] = set()
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(token for token in found if 0 <= token < model.get_input_embeddings().num_embeddings)


def coverage(ids: Tensor, kept: Tensor) -> dict[str, Any]:
    """What a claim says of the vocabulary.

    `token_coverage` is the share of the text whose tokens stay. `unseen_tokens` is how much of other text of the domain is expected to be
    tokens that this one has not, by Good and Turing: the share of the tokens that occur once.

    Args:
        ids: The text, int64 [samples, length].
        kept: Mask [vocabulary] of the tokens that stay.
    """
    found = counted(ids, len(kept))
    return {
        "vocabulary_left": [int(kept.sum()), len(kept)],
        "token_coverage": round(int(found[kept].sum()) / ids.numel(), 6),
        "unseen_tokens": round(int((found == 1).sum()) / ids.numel(), 6),
    }
