"""One way into llmcompressor for the methods that it carries out: quiet, in memory, on the tokens that were handed in."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.util.compat import llmcompressor as compat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

    from slimbench.methods.base import Calibration

_BATCH_TOKENS = 4096


@dataclass
class Report:
    """What llmcompressor had to say: its warnings, in order."""

    warnings: list[str]

    @property
    def failed_inverses(self) -> int:
        """Layers whose Hessian a sparsifier could not invert, so that it took the identity in its place."""
        return compat.failed_inverses(self.warnings)

    @property
    def rounded_without_hessian(self) -> int:
        """Layers that GPTQ rounded to nearest because it could not invert their Hessians."""
        return compat.rounded_without_hessian(self.warnings)


def check_block_size(block_size: int, multiple: int = 1) -> None:
    """Raise `ValueError` unless its Hessian-based modifiers can update so many columns at once."""
    if block_size < 1 or block_size % multiple:
        raise ValueError(f"block_size must be a positive multiple of {multiple}, not {block_size}")


def oneshot(
    model: PreTrainedModel, modifier: Any, calibration: Calibration, progress: Callable[[float, float], None] | None = None
) -> Report:
    """Apply a modifier to a model in place, block by block, each block calibrated on the outputs of the compressed ones before it.

    Args:
        model: A model loaded from a path, which llmcompressor reads the config from.
        modifier: An llmcompressor modifier, or several in a list.
        calibration: Tokens; several samples go through a block at once.
        progress: Told of finished blocks.
    """
    with _quiet() as report, compat.on_device(model.device):
        import llmcompressor

        if progress is not None:
            modifier = [*(modifier if isinstance(modifier, list) else [modifier]), _reporter(progress, model.config.num_hidden_layers)]
        llmcompressor.oneshot(
            model=model,
            processor=_NO_PROCESSOR,
            recipe=modifier,
            dataset=batches(calibration),
            num_calibration_samples=len(calibration.ids),
            pipeline="sequential",
            clear_sparse_session=True,
        )
    return report


def _reporter(progress: Callable[[float, float], None], blocks: int) -> Any:
    """A modifier that changes nothing and tells of finished blocks."""
    from llmcompressor.modifiers import Modifier

    class Reporter(Modifier):
        done_: int = 0

        def on_initialize(self, state: Any, **kwargs: Any) -> bool:
            return True

        def on_sequential_epoch_end(self, state: Any, event: Any, modules: Any = None, **kwargs: Any) -> None:
            self.done_ += 1
            progress(min(self.done_, blocks), blocks)

    return Reporter()


def batches(calibration: Calibration) -> DataLoader[dict[str, Any]]:
    """The samples in their order, as many at once as hold about four thousand tokens."""
    import torch
    from torch.utils.data import DataLoader
    from transformers.data import default_data_collator

    size = max(1, _BATCH_TOKENS // calibration.ids.shape[1])
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration.ids]
    return DataLoader(rows, batch_size=size, shuffle=False, collate_fn=default_data_collator)  # type: ignore[arg-type]


_NO_PROCESSOR: Any = object()


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep what llmcompressor prints while it is imported off the standard output."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[Report]:
    """Collect warnings instead of printing the log, and keep the standard output clean."""
    report = Report([])
    with quiet_imports():
        import llmcompressor.logger  # noqa: F401 - importing it sets up sinks of its own
        from loguru import logger

        logger.remove()
        sink = logger.add(lambda message: report.warnings.append(str(message.record["message"])), level="WARNING")
        try:
            yield report
        finally:
            logger.remove(sink)
