"""Pruning by a predictor of accuracy (Ji et al., arXiv 2309.09507): which blocks can spare how much is learned from pruned models.

A configuration c says which share of its groups of heads and of its channels each block loses. Some are drawn, and the loss of the model
so pruned is measured; boosted regression trees learn

    L̂(c) ≈ L(c) = mean -log p(y)

from seven tenths of these pairs, and the others tell how well they rank (Spearman). Of many more configurations, drawn like the first,

    c* = argmin L̂(c)

is cut. All have the number of parameters that was asked for. Shares are drawn evenly between none and twice the mean, then moved by the
same amount until the number holds; how much of it heads take is drawn too.

Which structures of a block make a share is settled once, so that configurations differ in their shares alone: those first that add
least to the hidden states, S = Σ_j E[x_j²] ‖W_:j‖², the sum over the inputs x of the structure to the layer W that reads it. Losses are
measured on samples that have no part in that. The paper also narrows its space of configurations by what the predictor says; here it
stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import EDITED, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.architecture.units import Structures, price, structures
from slimbench.methods.core.settings import Smaller
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from numpy.random import Generator
    from torch import Tensor

    from slimbench.methods.core.walk import Progress

_LEARNED = 0.7


@dataclass(frozen=True)
class AccuracyPredictor(Smaller, Method):
    """Blocks lose different numbers of heads and channels; nothing of the model is trained.

    Attributes:
        ratio: Share of the parameters of the blocks that goes, to less than one channel more where channels can make it up.
        configurations: How many are measured; the paper has 525.
        candidates: How many the predictor judges.
        tokens: Calibration tokens, in whole samples from the last, on which losses are measured; half of the samples at most.
    """

    name = "accuracy-predictor"
    citation = Citation("Pruning via accuracy predictor", year=2023, arxiv="2309.09507")
    needs = Needs(calibration=True)
    produces = EDITED
    draws = True

    configurations: int = 60
    candidates: int = 1000
    tokens: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.configurations < 10:
            raise ValueError(f"configurations must be at least 10, not {self.configurations}")
        if min(self.candidates, self.tokens) < 1:
            raise ValueError(f"candidates and tokens must be at least 1, not {self.candidates} and {self.tokens}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import numpy as np

        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts, name_of
        from slimbench.methods.core.architecture.uniform import sizes_of
        from slimbench.methods.core.masks import lowest
        from slimbench.methods.core.walk import passes

        if len(calibration.ids) < 2:
            raise ValueError("calibration holds fewer than two samples, of which some rank structures and others measure losses")
        model: Any = dense.load()
        before = model.num_parameters()
        sizes_of(model)
        kinds = {name_of(model, kind.reads): kind for block in anatomy(model) for kind in structures(block)}
        samples = min(math.ceil(self.tokens / calibration.ids.shape[1]), len(calibration.ids) // 2)
        drawn = partial(draw, kinds, self.wanted(model), min(1.0, 2 * self.ratio), np.random.default_rng(dense.seed))
        configurations = [drawn() for _ in range(self.configurations)]
        ranking, measuring = passes(dense.progress, 2)
        scores = energies(model, kinds, calibration.ids[:-samples], ranking)
        loss_of = partial(loss, model, kinds, scores, calibration.ids[-samples:])
        losses = []
        for done, gone in enumerate(configurations):
            losses.append(loss_of(gone))
            measuring(done + 1, self.configurations)
        predictor, rank = fit([shares(kinds, gone) for gone in configurations], losses, dense.seed)
        candidates = [drawn() for _ in range(self.candidates)]
        predicted = predictor.predict([shares(kinds, gone) for gone in candidates])
        chosen = candidates[int(np.argmin(predicted))]
        details: dict[str, Any] = {
            "spearman": rank,
            "configurations": [learned(self.configurations), self.configurations - learned(self.configurations)],
            "loss_dense": round(loss_of(dict.fromkeys(kinds, 0)), 6),
            "loss_drawn": [round(value, 6) for value in (min(losses), float(np.median(losses)))],
            "loss_predicted": round(float(predicted.min()), 6),
            "loss_chosen": round(loss_of(chosen), 6),
            "parameters_before": before,
        }
        for of in ("head_groups", "channels"):
            details[f"{of}_by_block"] = [kind.count - chosen[name] for name, kind in kinds.items() if kind.name == of]
        for name, kind in kinds.items():
            if chosen[name]:
                kind.cut(model, (~lowest(scores[name], chosen[name])).nonzero().squeeze(1))
        save_dense(model, out)
        return Claim(EDITED, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)

    def wanted(self, model: Any) -> int:
        """How many parameters go at least."""
        return math.ceil(self.ratio * sum(p.numel() for block in blocks_of(model).values() for p in block.parameters()) - 1e-6)


def learned(configurations: int) -> int:
    """How many of the measured configurations the predictor learns from."""
    return round(_LEARNED * configurations)


def energies(model: Any, kinds: Mapping[str, Structures], ids: Tensor, progress: Progress | None = None) -> dict[str, Tensor]:
    """S of all structures, [count] by the layer that reads them.

    Args:
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished blocks.
    """
    from slimbench.methods.core.statistics import inputs
    from slimbench.methods.core.walk import walk

    found: dict[str, Tensor] = {}
    for block in walk(model, ids, progress):
        for name, seen in inputs(block, [name for name in block.linears() if name in kinds]).items():
            columns = kinds[name].reads.weight.detach().float().square().sum(0)
            found[name] = (seen.squares * columns).view(kinds[name].count, -1).sum(1)
    return found


def draw(kinds: Mapping[str, Structures], wanted: int, most: float, generator: Generator) -> dict[str, int]:
    """A configuration: how many structures go, by the layer that reads them. One of each kind stays in each block.

    Args:
        kinds: Of blocks that are all alike.
        wanted: Parameters that go at least.
        most: The largest share of a kind that is drawn.
        generator: Of all draws.

    Raises:
        Unsupported: There are not so many parameters.
    """
    from slimbench.methods.core.budgets import exact

    sizes = {of: {name: kind.count for name, kind in kinds.items() if kind.name == of} for of in ("head_groups", "channels")}
    group, channel = (next(price(kind) for kind in kinds.values() if kind.name == of) for of in sizes)
    total, spare = ({of: sum(of_kind.values()) - less * len(of_kind) for of, of_kind in sizes.items()} for less in (0, 1))
    fewest = max(0, math.ceil((wanted - channel * spare["channels"]) / group))
    if fewest > spare["head_groups"]:
        free = group * spare["head_groups"] + channel * spare["channels"]
        raise Unsupported(f"one group of heads and one channel in each block leave {free} parameters to prune, fewer than {wanted}")
    usual = min(spare["head_groups"], wanted // group, int(most * total["head_groups"]))
    heads = int(generator.integers(fewest, max(fewest, usual), endpoint=True))
    gone = {"head_groups": heads, "channels": max(0, math.ceil((wanted - heads * group) / channel))}
    found: dict[str, int] = {}
    for of, of_kind in sizes.items():
        even = {name: float(generator.uniform(0, most)) for name in of_kind}
        found |= exact(even, of_kind, gone[of] / total[of]) if gone[of] else dict.fromkeys(of_kind, 0)
    return {name: found[name] for name in kinds}


def loss(model: Any, kinds: Mapping[str, Structures], scores: Mapping[str, Tensor], ids: Tensor, gone: Mapping[str, int]) -> float:
    """Mean next-token loss of the pruned model, in nats a token; nothing is cut, but nothing reads what is gone.

    Args:
        scores: [count] of each kind; the lowest go.
        ids: Tokens, int64 [samples, length].
        gone: How many structures of each kind.
    """
    import torch

    from slimbench.methods.core.losses import next_token
    from slimbench.methods.core.masks import lowest
    from slimbench.methods.core.walk import batches

    def read(kept: Tensor, _: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * kept.to(args[0].dtype),)

    found = 0.0
    with ExitStack() as hooks, torch.inference_mode():
        for name, kind in kinds.items():
            kept = ~lowest(scores[name], gone[name]).repeat_interleave(kind.reads.in_features // kind.count)
            hooks.callback(kind.reads.register_forward_pre_hook(partial(read, kept)).remove)
        for batch in batches(ids, model.device):
            found += float(next_token(model(batch, use_cache=False).logits, batch)) * len(batch) / len(ids)
    return found


def shares(kinds: Mapping[str, Structures], gone: Mapping[str, int]) -> list[float]:
    """What the predictor sees of a configuration: the share of each kind of each block that goes."""
    return [gone[name] / kind.count for name, kind in kinds.items()]


def fit(configurations: Sequence[Sequence[float]], losses: Sequence[float], seed: int) -> tuple[Any, float | None]:
    """Boosted trees that predict losses, and the rank correlation of what they predict with what was measured.

    The trees see the first seven tenths of the configurations, the correlation is that of the others; None where these have equal ranks.

    Args:
        configurations: Shares that go, [configurations, kinds].
        losses: Measured, [configurations].
        seed: Of the order in which features are tried.
    """
    from scipy.stats import spearmanr
    from sklearn.ensemble import GradientBoostingRegressor

    first = learned(len(losses))
    predictor = GradientBoostingRegressor(random_state=seed).fit(configurations[:first], losses[:first])
    predicted = predictor.predict(configurations[first:])
    if len(set(predicted)) < 2 or len(set(losses[first:])) < 2:
        return predictor, None
    return predictor, round(float(spearmanr(predicted, losses[first:]).statistic), 4)
