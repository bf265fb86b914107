"""Learning how a decoder is rounded, one block after the other: what the rounded block makes is pulled towards what the dense one made.

The error is the mean squared difference of the outputs, for the calibration tokens. The target comes from the stream of the dense
model. The inputs come from the stream of the blocks that are rounded already, so that a block makes up for those before it, or,
where a paper says so, from the dense stream as well. Learning rates fall linearly to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from slimbench.methods.core.walk import Block, walk
from slimbench.methods.kernels.grid import Grid, QuantizedWeight
from slimbench.methods.quantization.solvers.learned import LearnedLinear
from slimbench.util import checkpoints as _checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scope = Literal["block", "layer", "dense block"]
"""What is pulled towards its dense counterpart: blocks, single layers, or blocks that get the inputs of the dense model."""

Learner = Callable[[nn.Linear], LearnedLinear]
"""Makes of a dense layer one that learns how to round its weight."""


@dataclass
class Reconstruction:
    """How long and on how much is learned, and what came of it.

    Attributes:
        learner: Makes the layers.
        steps: Gradient steps for each block, or for each layer.
        samples: Calibration samples of a step.
        learning_rate: That of Adam in the first step.
        seed: Of the choice of samples.
        folder: Where finished blocks are kept; None: nowhere.
        identity: Tells this run from others in `folder`.
        first: Error of each block, rounded as learning found it, as a fraction of the mean square of its outputs.
        last: The same after learning.
        tokens: Tokens of all gradient steps.
        parameters: Learned numbers.
    """

    learner: Learner
    scope: Scope
    steps: int
    samples: int
    learning_rate: float
    seed: int = 0
    folder: Path | None = None
    identity: str = ""
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    tokens: int = 0
    parameters: int = 0

    def run(self, model: PreTrainedModel, ids: Tensor, progress: Callable[[float, float], None]) -> Iterator[tuple[str, QuantizedWeight]]:
        """Round the linear layers of all blocks; the model then computes with the rounded weights.

        Args:
            ids: Calibration tokens, int64 [samples, length].
            progress: Told of finished blocks, and of fractions of them.
        """
        model.requires_grad_(False)
        total = model.config.num_hidden_layers
        for index, block in enumerate(walk(model, ids, dense=True, samples=self.samples)):
            layers = block.linears()
            weights = self._resume(index, layers)
            if weights is None:
                weights = self._learn(block, index, _shifted(progress, index, total))
                self._keep(index, weights)
            _assign(layers, weights)
            yield from weights.items()
            progress(index + 1, total)

    def details(self) -> dict[str, float]:
        """Errors for a claim, averaged over blocks."""
        return {f"loss_{name}": round(sum(found) / len(found), 8) for name, found in (("first", self.first), ("last", self.last)) if found}

    def _learn(self, block: Block, index: int, progress: Callable[[float], None]) -> dict[str, QuantizedWeight]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        linears = block.linears()
        layers = {name: self.learner(layer) for name, layer in linears.items()}
        seen: dict[str, list[Tensor]] = {}
        if self.scope == "layer":
            stages = block.stages()
            block.observe(lambda name, x: seen.setdefault(name, []).append(x), [stage[0] for stage in stages], dense=True)
        self.first.append(self._error(block, linears, {name: layer.quantized() for name, layer in layers.items()}))
        for layer, source in zip(layers.values(), linears.values(), strict=True):
            source.weight.copy_(layer.original())
        if self.scope == "layer":
            for done, stage in enumerate(stages):
                self._fit_layers(block, index, linears, {name: layers[name] for name in stage}, seen.get(stage[0], []), generator)
                progress((done + 1) / len(stages))
        else:
            self._fit_block(block, index, layers, generator, progress)
        self.parameters += sum(p.numel() for layer in layers.values() for p in layer.parameters() if p.requires_grad)
        weights = {name: layer.quantized() for name, layer in layers.items()}
        self.last.append(self._error(block, linears, weights))
        return weights

    def _fit_block(
        self, block: Block, index: int, layers: dict[str, LearnedLinear], generator: torch.Generator, progress: Callable[[float], None]
    ) -> None:
        """Learn all layers of a block together, from its outputs: in each step, from samples of a batch that is drawn by its size."""
        linears, power = block.linears(), _power(block.dense_outputs)
        inputs = block.dense_inputs if self.scope == "dense block" else block.inputs
        places = [batch for row in range(max(map(len, inputs))) for batch, held in enumerate(inputs) if row < len(held)]

        def loss() -> tuple[Tensor, int]:
            batch = places[int(torch.randint(len(places), (), generator=generator))]
            rows = torch.randperm(len(inputs[batch]), generator=generator)[: self.samples].to(inputs[batch].device)
            made = block.module(inputs[batch][rows], **_rows_of(block.arguments[batch], rows, len(inputs[batch])))
            made = made[0] if isinstance(made, tuple) else made
            error = (made.float() - block.dense_outputs[batch][rows].float()).square().mean() / power
            return error, made.shape[0] * made.shape[1]

        _put(block, layers)
        self._fit(f"{index}", list(layers.values()), loss, generator, progress)
        _put(block, linears)

    def _fit_layers(
        self,
        block: Block,
        index: int,
        linears: dict[str, nn.Linear],
        layers: dict[str, LearnedLinear],
        dense: list[Tensor],
        generator: torch.Generator,
    ) -> None:
        """Learn layers that share their inputs, each from its own outputs: min ‖W x − W̃ x̂‖², x̂ as the rounded layers before made it.

        The error is taken as a fraction of that of the weights as they are rounded at first.
        """
        name = next(iter(layers))
        rounded = [seen[name] for batch in range(len(block.inputs)) if name in (seen := block.inputs_of([name], batch))]
        if not rounded or not dense:
            return
        wanted, given = torch.cat(dense), torch.cat(rounded)
        for name, layer in layers.items():
            weight = layer.original()
            start = given[:2048] @ layer.quantized().dequantize().t() - wanted[:2048] @ weight.t()
            scale = float(start.float().square().mean()) or 1.0

            def loss(layer: LearnedLinear = layer, weight: Tensor = weight, scale: float = scale) -> tuple[Tensor, int]:
                rows = torch.randint(len(given), (self.samples * block.inputs[0].shape[1],), generator=generator).to(given.device)
                target = wanted[rows] @ weight.t()
                made = given[rows] @ layer.effective().to(weight.dtype).t()
                return (made.float() - target.float()).square().mean() / scale, len(rows)

            self._fit(f"{index}-{name}", [layer], loss, generator, lambda done: None)
            linears[name].weight.copy_(layer.quantized().dequantize())

    def _fit(
        self,
        name: str,
        layers: list[LearnedLinear],
        loss: Callable[[], tuple[Tensor, int]],
        generator: torch.Generator,
        progress: Callable[[float], None],
    ) -> None:
        """Take the steps of layers that learn together, from where an interrupted run saved them.

        Args:
            name: Tells these layers from others of the run.
            loss: Of a batch, and the number of its tokens.
        """
        optimizer, schedule = self._optimizer(layers)
        due, begin = _checkpoints.Due(), self._go_on(name, optimizer, schedule, generator)
        for step in range(begin, self.steps):
            value, tokens = loss()
            self._step(value, layers, step, optimizer, schedule)
            self.tokens += tokens
            progress((step + 1) / self.steps)
            ended = self.scope == "layer" and step + 1 == self.steps  # the layers after it may take long
            if self.folder is not None and (due or ended):
                with due.saving():
                    state = {f"{i}/{key}": t for i, p in enumerate(_learned(optimizer)) for key, t in optimizer.state[p].items()}
                    state |= {f"{i}/value": p for i, p in enumerate(_learned(optimizer))} | {"random": generator.get_state()}
                    _checkpoints.save(self.folder, f"{_STATE}-{name}", self.identity, state, {"step": step + 1, "tokens": self.tokens})

    @torch.no_grad()
    def _go_on(self, name: str, optimizer: torch.optim.Optimizer, schedule: Any, generator: torch.Generator) -> int:
        """Put the state of an interrupted run back, and return how many steps it had taken; 0 where there is none."""
        found = None if self.folder is None else _checkpoints.load(self.folder, f"{_STATE}-{name}", self.identity)
        if found is None:
            return 0
        tensors, facts = found
        generator.set_state(tensors.pop("random"))
        parameters = _learned(optimizer)
        for key, tensor in tensors.items():
            number, _, kind = key.partition("/")
            value = parameters[int(number)]
            if kind == "value":
                value.copy_(tensor)
            else:
                optimizer.state[value][kind] = tensor if kind == "step" else tensor.to(value.device)
        self.tokens, schedule.last_epoch = facts["tokens"], facts["step"]
        for group, rate in zip(optimizer.param_groups, schedule.get_lr(), strict=True):
            group["lr"] = rate
        return int(facts["step"])

    def _optimizer(self, layers: list[LearnedLinear]) -> tuple[torch.optim.Optimizer, Any]:
        groups = [{"params": [p], "lr": self.learning_rate * rate} for layer in layers for p, rate in layer.learned()]
        optimizer = torch.optim.Adam(groups)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)

    def _step(self, loss: Tensor, layers: list[LearnedLinear], step: int, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        for layer in layers:
            loss = loss + layer.penalty(step / self.steps)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss of step {step} is {loss.item()}; a smaller learning_rate may help")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    def _error(self, block: Block, linears: dict[str, nn.Linear], weights: dict[str, QuantizedWeight]) -> float:
        """Error of the first batch with these weights, which stay in the block."""
        _assign(linears, weights)
        with torch.no_grad():
            made = block.run(0, block.dense_inputs[0] if self.scope == "dense block" else None)
            difference = made.float() - block.dense_outputs[0].float()
            return float(difference.square().mean() / _power(block.dense_outputs[:1]))

    def _keep(self, index: int, weights: dict[str, QuantizedWeight]) -> None:
        if self.folder is None:
            return
        tensors = {f"{name}/{part}": t for name, w in weights.items() for part, t in _parts(w).items()}
        facts = {"first": self.first, "last": self.last, "tokens": self.tokens, "parameters": self.parameters}
        _checkpoints.save(self.folder, f"block-{index}", self.identity, tensors, facts)
        for state in self.folder.glob(f"{_STATE}-{index}*"):
            state.unlink()

    def _resume(self, index: int, layers: dict[str, nn.Linear]) -> dict[str, QuantizedWeight] | None:
        """The weights of a block that an interrupted run has finished."""
        found = None if self.folder is None else _checkpoints.load(self.folder, f"block-{index}", self.identity)
        if found is None:
            return None
        tensors, facts = found
        for name, value in facts.items():
            setattr(self, name, value)
        grid = self.learner(next(iter(layers.values()))).grid
        device = next(iter(layers.values())).weight.device
        return {name: _weight(grid, {p: t.to(device) for p in _PARTS if (t := tensors.get(f"{name}/{p}")) is not None}) for name in layers}


def _shifted(progress: Callable[[float, float], None], index: int, total: int) -> Callable[[float], None]:
    """Tells of a fraction of block `index`."""
    return lambda done: progress(index + done, total)


_STATE = "learning"  # of the layers of a block that is not done
_PARTS = ("codes", "scales", "offsets")


def _parts(weight: QuantizedWeight) -> dict[str, Tensor]:
    return {part: tensor for part in _PARTS if (tensor := getattr(weight, part)) is not None}


def _weight(grid: Grid, parts: dict[str, Tensor]) -> QuantizedWeight:
    return QuantizedWeight(grid, parts["codes"], parts["scales"], parts.get("offsets"))


def _learned(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def _assign(layers: dict[str, nn.Linear], weights: dict[str, QuantizedWeight]) -> None:
    for name, weight in weights.items():
        layers[name].weight.copy_(weight.dequantize())


def _put(block: Block, layers: dict[str, Any]) -> None:
    """Let other modules stand in for the linear layers of a block, or those again."""
    for name, layer in layers.items():
        block.module.set_submodule(name.removeprefix(f"{block.name}."), layer)


def _power(outputs: list[Tensor]) -> float:
    """Mean square, over all batches."""
    return sum(float(batch.float().square().mean()) for batch in outputs) / len(outputs) or 1.0


def _rows_of(argument: Any, rows: Tensor, samples: int) -> Any:
    """What a block is called with, for some of the samples: tensors that have one entry for each sample are cut."""
    if isinstance(argument, Tensor):
        return argument[rows] if argument.ndim > 1 and len(argument) == samples else argument
    if isinstance(argument, dict):
        return {key: _rows_of(value, rows, samples) for key, value in argument.items()}
    if isinstance(argument, tuple | list):
        return type(argument)(_rows_of(value, rows, samples) for value in argument)
    return argument
