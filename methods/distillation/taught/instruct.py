"""Instruction following: a student is fine-tuned on instructions with a teacher's responses.

The methods of this file differ in where instructions come from and in what is kept of them, which their recipes say; the loss is the same,
the cross entropy of the responses.

    alpaca          tasks with input and output in one go, twenty a request, after three that are shown
    self-instruct   instructions, then whether they are classifications, then instances, of these with the output first
    lamini          instructions alone, and then the answers
    vicuna          dialogues; here of the teacher with itself
    gpt4all         prompts that were there already, without answers that decline
    llama-gpt4      tasks with their inputs, answered by a better teacher
    seqkd           what the teacher writes behind the beginning of a text, found with a beam of five
    universalner    the names in a text, one question for each kind of thing
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slimbench.methods.base import Citation
from slimbench.methods.distillation.taught.examples import Responses

_CITATIONS: Mapping[str, Citation] = {
    "alpaca": Citation("Stanford Alpaca", year=2023, covers=("distillation/alpaca",)),
    "self-instruct": Citation("Self-Instruct", year=2022, arxiv="2212.10560", covers=("distillation/self-instruct",)),
    "seqkd": Citation(
        "Sequence-level knowledge distillation", year=2016, arxiv="1606.07947", covers=("distillation/seqkd-word-level-kd-baselines",)
    ),
    "lamini": Citation("LaMini-LM", year=2023, arxiv="2304.14402"),
    "vicuna": Citation("Vicuna", year=2023),
    "gpt4all": Citation("GPT4All", year=2023),
    "llama-gpt4": Citation("Instruction tuning with GPT-4", year=2023, arxiv="2304.03277"),
    "universalner": Citation("UniversalNER", year=2023, arxiv="2308.03279"),
}


@dataclass(frozen=True)
class InstructionTuning(Responses):
    """Fine-tuning on prompts and responses of any recipe; the recipe says whose method it is."""

    name = "instruct"
    citation = _CITATIONS["alpaca"]
    citations = _CITATIONS
    other = Citation("Instruction tuning", year=2021, arxiv="2109.01652")

    recipe: str = "alpaca"
