"""Methods whose examples are of one task, or of several with fixed weights; what makes them is in their recipes.

SCOTT           (1 − α) CE(factual) + α CE(counterfactual): rationales that a teacher draws to fit the right answer and not a wrong one,
                and, behind a rationale of a wrong answer, this answer alone, so that what the student answers follows its rationale
Socratic CoT    CE(questions) + CE(answers): what to ask of a problem, and what the answers are; in the paper two students, here one
PaD, PERsD      CE of programs that come to the right answer; of PERsD those that a teacher mended
KARD            CE of a rationale behind passages that it finds, BM25
symbolic KD     CE of what follows on an event, of which a critic believes it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slimbench.methods.base import Citation
from slimbench.methods.distillation.taught.examples import Responses


@dataclass(frozen=True)
class Scott(Responses):
    """Self-consistent chain of thought.

    Attributes:
        counterfactual: α.
    """

    name = "scott"
    version = 2
    citation = Citation("SCOTT", year=2023, arxiv="2305.01879", covers=("distillation/scott",))
    citations = {"scott": citation}  # noqa: RUF012

    recipe: str = "scott"
    counterfactual: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.counterfactual < 1:
            raise ValueError(f"counterfactual must be between 0 and 1, both excluded, not {self.counterfactual}")

    def weights(self) -> Mapping[str, float] | None:
        return {"factual": 1 - self.counterfactual, "counterfactual": self.counterfactual}


@dataclass(frozen=True)
class Socratic(Responses):
    """Sub-questions and their answers."""

    name = "socratic"
    citation = Citation("Socratic CoT", year=2022, arxiv="2212.00193")
    citations = {"socratic": citation}  # noqa: RUF012

    recipe: str = "socratic"

    def weights(self) -> Mapping[str, float] | None:
        return {"questions": 1.0, "answers": 1.0}


@dataclass(frozen=True)
class ProgramTuning(Responses):
    """Programs in the place of rationales; the recipe says whose method it is."""

    name = "programs"
    citation = Citation("Program-aided distillation", 2023, "2305.13888")
    citations = {"pad": citation, "persd": Citation("PERsD", 2023, "2310.18628")}  # noqa: RUF012

    recipe: str = "pad"


@dataclass(frozen=True)
class KnowledgeAugmented(Responses):
    """Rationales behind the passages that they find."""

    name = "kard"
    citation = Citation("KARD", year=2023, arxiv="2305.18395")
    citations = {"kard": citation}  # noqa: RUF012

    recipe: str = "kard"
    length: int = 384


@dataclass(frozen=True)
class Symbolic(Responses):
    """What follows on events."""

    name = "symbolic"
    citation = Citation("Symbolic knowledge distillation", year=2021, arxiv="2110.07178")
    citations = {"symbolic": citation}  # noqa: RUF012

    recipe: str = "symbolic"
