"""Chain of thought: a student learns a teacher's reasoning with its answers, as one text or as tasks of their own.

    L = α · CE(label) + (1 − α) · CE(rationale)         where a recipe has both tasks, else the cross entropy of its responses

    step-by-step        a label and a rationale are two tasks, told apart by a word before the question
    mt-cot              the same with the answer behind the reason; where a teacher was wrong, it explains the right answer (CROP)
    magister            the right answer is shown to the teacher; what does not come to it is dropped
    fine-tune-cot       eight rationales for each question, those that come to the right answer
    specialize          four forms of each example: with others before it or not, with the rationale or not (Fu et al.)
    relation            relations between the things that a text names, with the reason for each (Wadhwa et al.)
    science             a rationale from the question, and an answer from both (Sci-CoT; there two models, here one)
    dialogue            what a reply needs to know, as questions and answers on the turns before it (DOCTOR)

A decoder has no head for each task, so that a task is a prompt of its own. Means are taken over the tokens of each task apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slimbench.methods.base import Citation
from slimbench.methods.distillation.taught.examples import Responses

_CITATIONS: Mapping[str, Citation] = {
    "step-by-step": Citation("Distilling step-by-step", 2023, "2305.02301", ("distillation/distilling-step-by-step",)),
    "mt-cot": Citation("MT-CoT and CROP", 2022, "2210.06726", ("distillation/li-et-al-crop-mt-cot",)),
    "magister": Citation("Teaching small language models to reason", 2022, "2212.08410", ("distillation/magister-et-al",)),
    "fine-tune-cot": Citation("Fine-tune-CoT", 2022, "2212.10071", ("distillation/fine-tune-cot",)),
    "specialize": Citation("Specializing smaller language models", 2023, "2301.12726"),
    "relation": Citation("Revisiting relation extraction", 2023, "2305.05003"),
    "science": Citation("Sci-CoT", 2023, "2308.04679"),
    "dialogue": Citation("DOCTOR", 2023, "2310.09343"),
}
BOTH = ("step-by-step", "mt-cot")
"""Recipes with a task for labels and one for rationales."""


@dataclass(frozen=True)
class RationaleTuning(Responses):
    """Fine-tuning on rationales and answers; the recipe says whose method it is.

    Attributes:
        label_share: α, where a recipe has both tasks; of the others it is not used.
    """

    name = "rationale"
    citation = _CITATIONS["step-by-step"]
    citations = _CITATIONS

    recipe: str = "step-by-step"
    label_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.label_share < 1:
            raise ValueError(f"label_share must be between 0 and 1, both excluded, not {self.label_share}")

    def weights(self) -> Mapping[str, float] | None:
        return {"label": self.label_share, "rationale": 1 - self.label_share} if self.recipe in BOTH else None
