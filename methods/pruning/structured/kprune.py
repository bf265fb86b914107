"""K-prune: sub-layer after sub-layer, what carries least of the model's knowledge goes, and what stays is fitted to the dense outputs.

For a mask m_j on an input x_j of the layer W [out, in] that reads structures (the output projection reads heads, down reads channels),

    representation    R_j = E_tokens x_j² · mean_i W_ij²                          what the output of the sub-layer loses without it
    prediction        P_j = ½ E_samples (∂KL / ∂m_j)²                              KL = T² Σ q (log q - log p), q and p at temperature T
    importance        S   = (λ_r R_j + λ_p P_j) / parameters                       of a channel
                      S   = μ Σ_heads mean_j (λ_r R_j + λ_p P_j) / parameters      of a group of heads, j the inputs of a head

q are the predictions of the dense model; KL is the mean over the tokens of a sample. From the first attention to the last MLP (arXiv
2308.03449): importance is measured anew in all sub-layers that are not pruned yet, one threshold for them all meets the budget that is
left, and only the sub-layer at hand loses what lies below it. The weights that read what stays of it are then those that bring its
output, on top of the residual stream of the pruned model, nearest to the hidden states of the dense one,

    W ← argmin ‖X Wᵀ - (Y - Z - b)‖²           X the inputs that stay, Z the stream of the pruned model, Y the dense stream after it

The paper prunes encoders and divides by FLOPs under a budget of FLOPs; here both are parameters, to which the FLOPs of the projections
are proportional. Before anything has gone the divergence has no slope, so that representation alone decides in the first sub-layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import EDITED, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.architecture.units import Structures, best, price, structures
from slimbench.methods.core.settings import Smaller
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.architecture.anatomy import Block
    from slimbench.methods.core.walk import Block as Walked


@dataclass(frozen=True)
class KPrune(Smaller, Method):
    """Structured pruning without training; whole attentions and MLPs may go.

    Attributes:
        ratio: Share of the parameters of the blocks that goes, to one structure, or one norm, more.
        representation: λ_r. What is right depends on the hidden size and on the scale of the hidden states.
        prediction: λ_p.
        heads: μ, by which heads count more than channels; the width of a head makes a sum of the mean over its inputs.
        temperature: T of the softmax.
        tokens: Calibration tokens, in whole samples, on which importance is measured for each sub-layer; weights are fitted on all.
    """

    name = "kprune"
    citation = Citation("K-prune", year=2023, arxiv="2308.03449", covers=("pruning/cap-ebert-schubert-nas-pruning-kprune",))
    needs = Needs(calibration=True)
    produces = EDITED

    representation: float = 2.5e-4
    prediction: float = 1.0
    heads: float = 64.0
    temperature: float = 2.0
    tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.representation, self.prediction) < 0 or not self.representation + self.prediction > 0:
            raise ValueError(f"representation and prediction must not be negative or both 0: {self.representation}, {self.prediction}")
        if not (self.heads > 0 and self.temperature > 0 and self.tokens > 0):
            raise ValueError(f"heads, temperature and tokens must be positive: {self.heads}, {self.temperature}, {self.tokens}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts, name_of, remove_part
        from slimbench.methods.core.walk import passes, walk

        if not calibration.ids.numel():
            raise ValueError("calibration holds no tokens")
        model: Any = dense.load()
        before, blocks = model.num_parameters(), {block.name: block for block in anatomy(model)}
        kinds = {name: {name_of(model, kind.reads): kind for kind in structures(block)} for name, block in blocks.items()}
        pending = {name: kind for of_block in kinds.values() for name, kind in of_block.items()}
        spared = {name for block, of_block in kinds.items() for name, kind in of_block.items() if not removable(model, blocks[block], kind)}
        wanted = left = math.ceil(self.ratio * sum(_held(block) for block in blocks.values()) - 1e-6)
        most = sum(price(kind) * (kind.count - (name in spared)) for name, kind in pending.items())
        if most < wanted:
            raise Unsupported(f"what can go from the blocks holds {most} parameters, fewer than {wanted}")
        ids = calibration.ids[: math.ceil(self.tokens / calibration.ids.shape[1])]
        teacher = last_states(model, ids)
        stayed: dict[str, list[int]] = {"head_groups": [], "channels": []}
        total = {of: sum(kind.count for kind in pending.values() if kind.name == of) for of in stayed}
        reports = iter(passes(dense.progress, len(pending)))
        for walked in walk(model, calibration.ids, dense=True):
            block = blocks[walked.name]
            for name, kind in kinds[walked.name].items():
                attention = kind.name == "head_groups"
                if attention:
                    between = states_between(walked, block, dense=True)
                scores = self.importance(model, pending, ids, teacher, next(reports))
                prices = {layer: price(kind) for layer, kind in pending.items()}
                gone = least(spare(scores, spared), prices, left)[name]
                stream, target = (walked.inputs, between) if attention else (states_between(walked, block), walked.dense_outputs)
                held = _held(block)
                if gone.all():
                    remove_part(model, walked.name, "attention" if attention else "mlp")
                elif left < wanted or gone.any():
                    fitted = reconstructed(walked, name, kind, gone, stream, target)
                    kind.cut(model, (~gone).nonzero().squeeze(1))
                    with torch.no_grad():
                        kind.reads.weight.copy_(fitted)
                left -= held - _held(block)
                stayed[kind.name].append(int((~gone).sum()))
                del pending[name]
        save_dense(model, out)
        details: dict[str, Any] = {"parameters_before": before}
        for of, numbers in stayed.items():
            details |= {f"{of}_left": [sum(numbers), total[of]], f"{of}_by_block": numbers}
        return Claim(EDITED, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)

    def importance(
        self,
        model: Any,
        kinds: Mapping[str, Structures],
        ids: Tensor,
        teacher: list[Tensor],
        progress: Callable[[float, float], None] | None = None,
    ) -> dict[str, Tensor]:
        """S of the structures of some sub-layers, float64 [count] by the full name of the layer that reads them.

        Args:
            ids: Calibration tokens, int64 [samples, length].
            teacher: Last hidden states of the dense model, [1, length, hidden] for each sample.
            progress: Told of finished samples.
        """
        import torch

        squares: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        hooks = []

        def masked(name: str, _: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0]
            squares[name] += x.detach().double().flatten(0, -2).square().sum(0)
            return (x * masks[name].to(x.dtype),)

        for name, kind in kinds.items():
            width = kind.reads.in_features
            squares[name] = torch.zeros(width, dtype=torch.float64, device=model.device)
            masks[name] = torch.ones(width, device=model.device, requires_grad=True)
            hooks.append(kind.reads.register_forward_pre_hook(partial(masked, name)))
        slopes = {name: torch.zeros_like(total) for name, total in squares.items()}
        model.requires_grad_(False)
        try:
            for done, (sample, states) in enumerate(zip(ids.to(model.device).split(1), teacher, strict=True)):
                with torch.enable_grad():
                    made = model.base_model(sample, use_cache=False).last_hidden_state
                    logits, wanted = (model.get_output_embeddings()(hidden) for hidden in (made, states.to(model.device)))
                    loss = divergence(logits, wanted, self.temperature)
                for name, slope in zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True):
                    slopes[name] += slope.double().square()
                if progress:
                    progress(done + 1, len(ids))
        finally:
            for hook in hooks:
                hook.remove()
        scores = {}
        for name, kind in kinds.items():
            lost = squares[name] / ids.numel() * kind.reads.weight.double().square().mean(0)
            scores[name] = self.representation * lost + self.prediction * slopes[name] / len(ids) / 2
            if kind.name == "head_groups":
                query, key, *_ = kind.makes
                scores[name] = scores[name].view(kind.count, query.out_features // key.out_features, -1).mean(-1).sum(-1) * self.heads
            scores[name] = scores[name] / price(kind)
        return scores


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(q ‖ p) in nats, averaged over tokens, of logits [1, length, vocabulary] of the model and of its teacher."""
    p, q = ((values.float() / temperature).log_softmax(-1) for values in (logits, teacher))
    return temperature**2 * (q.exp() * (q - p)).sum(-1).mean()


def last_states(model: Any, ids: Tensor) -> list[Tensor]:
    """Hidden states [1, length, hidden] from which a model predicts, for each sample."""
    import torch

    with torch.inference_mode():
        return [model.base_model(sample, use_cache=False).last_hidden_state.clone().cpu() for sample in ids.to(model.device).split(1)]


def states_between(walked: Walked, block: Block, dense: bool = False) -> list[Tensor]:
    """Hidden states [..., hidden] between attention and MLP of a block, for each batch of its inputs or of its `dense_inputs`."""
    import torch

    seen: list[Tensor] = []
    hook = block.norms[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            for batch, hidden in enumerate(walked.dense_inputs if dense else walked.inputs):
                walked.run(batch, hidden)
    finally:
        hook.remove()
    return seen


def reconstructed(walked: Walked, name: str, kind: Structures, gone: Tensor, stream: list[Tensor], target: list[Tensor]) -> Tensor:
    """The weight [out, what stays], float64, of the layer `name` that brings the hidden states behind it nearest to the wanted ones.

    Args:
        gone: Mask of the structures, [count].
        stream: Hidden states [..., hidden] that the layer's output is added to, for each batch.
        target: What their sum should be.
    """
    import torch

    stay = (~gone).repeat_interleave(kind.reads.in_features // kind.count)
    width, outputs = int(stay.sum()), kind.reads.out_features
    gram, cross = (torch.zeros(width, size, dtype=torch.float64, device=stay.device) for size in (width, outputs))
    for batch, (before, after) in enumerate(zip(stream, target, strict=True)):
        x = walked.inputs_of([name], batch)[name].double()[:, stay]
        y = after.double().flatten(0, -2) - before.double().flatten(0, -2)
        if kind.reads.bias is not None:
            y = y - kind.reads.bias.detach().double()
        gram.addmm_(x.T, x)
        cross.addmm_(x.T, y)
    return (torch.linalg.pinv(gram, hermitian=True) @ cross).T


def removable(model: Any, block: Block, kind: Structures) -> bool:
    """Whether all structures of a kind may go from a block, and with them its attention or MLP.

    A layer whose bias would go with it stays, and so does the first attention, by which the cache counts tokens, and any among
    attentions of different kinds.
    """
    if kind.reads.bias is not None:
        return False
    layer_types = set(getattr(model.config, "layer_types", None) or [None])
    return kind.name == "channels" or (not block.name.endswith(".0") and len(layer_types) == 1)


def spare(scores: Mapping[str, Tensor], spared: set[str]) -> dict[str, Tensor]:
    """Scores by which the best structure of the spared layers outlasts all others."""
    return {name: of.index_fill(0, best(of, 1), math.inf) if name in spared else of for name, of in scores.items()}


def least(scores: Mapping[str, Tensor], prices: Mapping[str, int], wanted: int) -> dict[str, Tensor]:
    """The structures of the lowest scores, as few as hold so many parameters together, as masks [count] by layer.

    Args:
        prices: Parameters of one structure of each layer.
    """
    import torch

    from slimbench.methods.core.masks import across

    order = torch.cat(list(scores.values())).argsort(stable=True)
    held = torch.cat([torch.full((len(of),), prices[name], device=of.device) for name, of in scores.items()])[order].cumsum(0)
    return across(scores, int((held < wanted).sum()) + 1 if wanted > 0 else 0)


def _held(block: Block) -> int:
    """Parameters of a block."""
    return sum(parameter.numel() for parameter in block.module.parameters())
