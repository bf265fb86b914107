"""A model over several cards, whole blocks on each, one card after the other: as accelerate's device maps, with equal shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slimbench.methods.formats import storage
from slimbench.util.compat.transformers import blocks_kept_whole


def device_map(folder: Path, cards: Sequence[int], trust_remote_code: bool = False) -> dict[str, int]:
    """Which card each part of a model lies on, by the names of its modules; no weight is read.

    accelerate leaves room on the first card for the largest block, and moves what fits nowhere to host memory; here the last card takes
    what is left, and a model that is too large for it fails with its allocator's word.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    model = storage.skeleton(folder, trust_remote_code)
    model.tie_weights()
    whole = blocks_kept_whole(model)
    sizes = compute_module_sizes(model)
    largest = max(sizes[name] for name, module in model.named_modules() if name and (type(module).__name__ in whole or not whole))
    share = sizes[""] // len(cards) + largest // 2
    room = dict.fromkeys(cards, share) | {cards[0]: share + largest, cards[-1]: 2 * sizes[""]}
    return dict(infer_auto_device_map(model, max_memory=room, no_split_module_classes=sorted(whole)))
