"""Runs in a Python that has kvpress, and imports nothing of slimbench: which tokens of a prompt its presses keep.

Reads a request as JSON from standard input and writes the answer as the last line.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import sys
from typing import Any

import torch
from kvpress import KnormPress, ScorerPress, SnapKVPress, TOVAPress
from transformers import AutoModelForCausalLM

PRESSES = {"snapkv": SnapKVPress, "tova": TOVAPress, "knorm": KnormPress}


def kept(model: Any, kind: type[ScorerPress], ids: list[int], budget: int) -> list[list[str]]:
    """By layer and head of keys, a bit for each token of the prompt, as base64."""
    found: dict[int, list[str]] = {}

    class Watched(kind):  # type: ignore[misc, valid-type]
        def score(self, module: Any, *given: Any) -> Any:
            scores = super().score(module, *given)
            places = scores[0].topk(budget, dim=-1).indices
            bits = torch.zeros(scores.shape[1:], dtype=torch.bool).scatter(1, places, True).flatten(1)
            found[module.layer_idx] = [base64.b64encode(packed(row)).decode() for row in bits.tolist()]
            return scores

    with torch.no_grad(), Watched(compression_ratio=1 - budget / len(ids))(model):
        model.model(torch.tensor([ids]))
    return [found[layer] for layer in sorted(found)]


def packed(bits: list[bool]) -> bytes:
    return int("".join("1" if bit else "0" for bit in bits), 2).to_bytes(len(bits) // 8, "big")


def main() -> None:
    request = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
    answer = {name: [kept(model, kind, ids, request["budget"]) for ids in request["ids"]] for name, kind in PRESSES.items()}
    print(json.dumps({"library": f"kvpress {importlib.metadata.version('kvpress')}", "kept": answer}))


if __name__ == "__main__":
    main()
