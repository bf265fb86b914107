"""Speculative decoding (Leviathan et al., arXiv 2211.17192): a smaller model guesses, and the model checks all guesses in one pass.

The smaller model is made of the model itself, or of another one of the same tokens that `model` names, as those of the paper are. It
lies in the artefact with tensors of its own; its layers and its head are rounded to nearest on a symmetric grid. Where a step before
packed the model, a copy is made of the one that the pipeline began with.

With an acceptance rate α of single guesses, γ of them, and a guess that costs c of a pass of the model, the paper expects
(1 - α^(γ + 1)) / (1 - α) tokens for the cost of γ c + 1 passes (equation 1, theorem 3.8). Records hold passes, tokens and times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, ModelShape, Needs, Unsupported
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.core.settings import Coded, Grouped
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.draft.policy import Model
from slimbench.methods.work import Work


@dataclass(frozen=True)
class DraftModel(Coded, Grouped, policies.ActsByModel, PolicyMethod):
    """Guesses of a copy in few bits, with all of its blocks, or of another model in few bits.

    Attributes:
        tokens: γ, guesses of a pass.
        bits: Bits of a weight of what guesses, before scales.
        model: Name in `conf/model` of the model that guesses, smaller and of the same tokens; None: a copy of the model itself.
    """

    name = "draft-model"
    slot = "draft"
    citation = Citation("Speculative decoding", year=2022, arxiv="2211.17192")
    needs = Needs()

    tokens: int = 3
    bits: Literal[4, 8] = 4
    model: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Model:
        return Model(self.tokens, "packed")

    def check(self, shape: ModelShape) -> None:
        if self.model is None:
            self.check_draft(shape)

    def check_draft(self, shape: ModelShape) -> None:
        super().check(shape)

    def whole(self, dense: DenseModel) -> Any:
        """The model that guesses, before anything is left out or rounded."""
        if self.model is not None:
            assert dense.draft is not None, "whoever reads the setting brings the model"
            return replace(dense, path=dense.draft[0], format=HUGGINGFACE).load()
        below = policies.base_of(dense)
        return below.load() if below.format in DENSE else below.load_original()

    def left_out(self, model: Any, calibration: Calibration, dense: DenseModel) -> Sequence[int]:
        """Indices of the blocks that the copy does without."""
        return ()

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from torch import nn

        from slimbench.methods.core.architecture.surgery import counts, name_of, remove_blocks
        from slimbench.methods.core.layers import block_linears, check_groups
        from slimbench.methods.formats import packed
        from slimbench.methods.formats.architecture.structure import blocks_of
        from slimbench.methods.kernels.rounding import round_layers

        copy: Any = self.whole(dense)
        total = len(blocks_of(copy))
        gone = self.left_out(copy, calibration, dense)
        remove_blocks(copy, gone)
        layers, made = block_linears(copy), counts(copy)["parameters"]
        if type(head := copy.get_output_embeddings()) is nn.Linear:
            layers[name_of(copy, head)] = head
        check_groups(layers, self.group_size)
        policy = replace(self.policy(dense.seed), model=out / Model.slot)
        (out / Model.slot).mkdir()
        packed.save(copy, round_layers(layers, packed.Grid(self.bits, self.group_size)), out / Model.slot)
        policies.save(policy, dense, out)
        dense.progress(1, 1)
        facts = {
            "draft_blocks": [index for index in range(total) if index not in gone],
            "draft_parameters": made,
            "draft_bytes": sum(file.stat().st_size for file in (out / Model.slot).glob("*.safetensors")),
        } | ({"draft_model": dense.draft[1]} if self.model is not None and dense.draft else {})
        work = Work() if dense.format == self.produces else None  # its own cache keeps all tokens, and all of it runs
        return Claim(self.produces, parameters=parameters_of(dense.path) + made, work=work, details=facts)


@dataclass(frozen=True)
class PrunedDraft(DraftModel):
    """Guesses of a copy in few bits that has fewer blocks, or of another model with fewer blocks than it had.

    Attributes:
        blocks: Blocks that stay: those of the largest influence (ShortGPT, arXiv 2403.03853), all measured on the whole model.
    """

    name = "draft-blocks"
    citation = Citation("Speculative decoding", year=2022, arxiv="2211.17192")
    needs = Needs(calibration=True)

    blocks: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {self.blocks}")

    def check_draft(self, shape: ModelShape) -> None:
        super().check_draft(shape)
        if self.blocks >= shape.num_layers:
            raise Unsupported(f"of {shape.num_layers} blocks fewer than all must guess, not {self.blocks}; draft-model has them all")

    def left_out(self, model: Any, calibration: Calibration, dense: DenseModel) -> Sequence[int]:
        import torch

        from slimbench.methods.core.masks import lowest
        from slimbench.methods.core.statistics import block_influence

        influence = torch.tensor(block_influence(model, calibration.ids, dense.progress), dtype=torch.float64)
        return [int(index) for index in lowest(influence, max(0, len(influence) - self.blocks)).nonzero()]


def parameters_of(folder: Path) -> int:
    """Parameters of the model in a folder, whatever its layers are stored as, what is shared counted once, and of its policies; no weight
    of it is read.
    """
    model = policies.skeleton(folder)
    model.tie_weights()  # what was made without data shares nothing yet
    return sum(parameter.numel() for parameter in model.parameters())
