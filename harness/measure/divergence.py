"""Distance of a compressed model's next-token distributions from the reference's, on the same tokens.

The reference's distributions are written once for each model and protocol and then only read, memory-mapped: the `top_k`
largest log-probabilities one by one in float32, the rest of the mass as one tail. By the log-sum inequality the
Kullback-Leibler divergence over these `top_k + 1` outcomes never exceeds the true one; how much it falls short is measured
on some positions whose whole distribution is kept.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from slimbench.harness.schema.quality import DivergenceResult
from slimbench.harness.store.partial import pack, unpack
from slimbench.util import checksums
from slimbench.util.files import beside, cache_dir, replace_folder

EXACT_POSITIONS = 128
_LEAST_MASS = 1e-9


def location(key: str) -> Path:
    """Where the reference's distributions of a protocol lie."""
    return cache_dir() / "reference" / key


def exists(key: str) -> bool:
    """Whether they are there, and are the bytes that were written."""
    return checksums.seal_fault(location(key)) is None


class Recorder:
    """Writes the distributions of the reference while it is scored; an observer of `label_logprobs`.

    Args:
        key: Content key of reference and protocol.
        positions: Positions that will be seen.
        top_k: Tokens kept one by one.
        vocabulary: Width of the logits.
        folder: Where an earlier attempt may have begun to write; None: in a new one.
    """

    def __init__(self, key: str, positions: int, top_k: int, vocabulary: int, folder: Path | None = None) -> None:
        self.key, self.seen, self.top_k = key, 0, min(top_k, vocabulary)
        self.folder = folder or beside(location(key))
        self.folder.mkdir(parents=True, exist_ok=True)
        index_dtype = np.uint16 if vocabulary <= 1 << 16 else np.int32
        self.logp = self._array("logp", np.float32, (positions, self.top_k))
        self.index = self._array("index", index_dtype, (positions, self.top_k))
        self.tail = self._array("tail", np.float32, (positions,))
        self.label = self._array("label", np.float32, (positions,))
        self.first = self._array("first", np.int32, (positions,))
        self.exact_at = exact_positions(positions)
        self.exact = self._array("exact", np.float32, (len(self.exact_at), vocabulary))

    def _array(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
        file = self.folder / f"{name}.npy"
        with suppress(OSError, ValueError):  # there is none, or a torn one
            begun = open_memmap(file, mode="r+")
            if begun.dtype == dtype and begun.shape == shape:
                return begun
        return open_memmap(file, mode="w+", dtype=dtype, shape=shape)

    def __call__(self, scores: torch.Tensor, norm: torch.Tensor, label: torch.Tensor) -> None:
        rows = slice(self.seen, self.seen + len(scores))
        best = scores.topk(self.top_k, -1)
        logp = best.values - norm[:, None]
        self.logp[rows], self.index[rows] = logp.cpu().numpy(), best.indices.cpu().numpy()
        self.tail[rows] = _tail(logp).cpu().numpy()
        self.label[rows], self.first[rows] = label.cpu().numpy(), scores.argmax(-1).cpu().numpy()
        for row, at in _within(self.exact_at, rows):
            self.exact[row] = (scores[at - rows.start] - norm[at - rows.start]).cpu().numpy()
        self.seen = rows.stop

    def since(self, first: int) -> dict[str, Any]:
        return {"rows": [first, self.seen], "sha256": self._sha256(slice(first, self.seen))}

    def restore(self, kept: dict[str, Any]) -> bool:
        """They are in the files, or the machine went down before they came there."""
        rows = slice(*kept["rows"])
        if rows.start != self.seen or rows.stop > len(self.tail) or self._sha256(rows) != kept["sha256"]:
            return False
        self.seen = rows.stop
        return True

    def _sha256(self, rows: slice) -> str:
        digest = hashlib.sha256()
        for array in (self.logp, self.index, self.tail, self.label, self.first):
            digest.update(array[rows].tobytes())
        for row, _ in _within(self.exact_at, rows):
            digest.update(self.exact[row].tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Move the finished files into place; which of two writers comes last does not matter, for both wrote the same."""
        if not self.folder.exists() and exists(self.key):  # another process took this stage over, and came to its end
            return
        for array in (self.logp, self.index, self.tail, self.label, self.first, self.exact):
            array.flush()
        checksums.write_seal(self.folder, {"top_k": self.top_k, "positions": self.seen})
        location(self.key).parent.mkdir(parents=True, exist_ok=True)
        replace_folder(self.folder, location(self.key))

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Comparison:
    """Holds a model against the reference's distributions while it is scored; an observer of `label_logprobs`.

    Args:
        key: Content key of reference and protocol; `exists` must hold.
    """

    def __init__(self, key: str) -> None:
        folder = location(key)
        self.logp, self.index, self.tail, self.label, self.first, self.exact = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("logp", "index", "tail", "label", "first", "exact")
        )
        self.exact_at = exact_positions(len(self.tail))
        self.seen = 0
        self.kl, self.agree, self.delta = (np.empty(len(self.tail)) for _ in range(3))
        self.exact_kl = np.empty(len(self.exact_at))

    def __call__(self, scores: torch.Tensor, norm: torch.Tensor, label: torch.Tensor) -> None:
        rows, device = slice(self.seen, self.seen + len(scores)), scores.device
        logp = torch.from_numpy(self.logp[rows].copy()).to(device)
        index = torch.from_numpy(self.index[rows].astype(np.int64)).to(device)
        logq = scores.gather(1, index) - norm[:, None]
        tail, other_tail = torch.from_numpy(self.tail[rows].copy()).to(device), _tail(logq)
        kl = (logp.exp() * (logp - logq)).sum(-1) + tail.exp() * (tail - other_tail)
        self.kl[rows] = kl.cpu().numpy()
        self.agree[rows] = scores.argmax(-1).cpu().numpy() == self.first[rows]
        self.delta[rows] = np.abs(np.exp(label.cpu().numpy()) - np.exp(self.label[rows]))
        for row, at in _within(self.exact_at, rows):
            whole = torch.from_numpy(self.exact[row].copy()).to(device)
            self.exact_kl[row] = float((whole.exp() * (whole - (scores[at - rows.start] - norm[at - rows.start]))).sum())
        self.seen = rows.stop

    def since(self, first: int) -> dict[str, Any]:
        parts = {name: pack(getattr(self, name)[first : self.seen]) for name in ("kl", "agree", "delta")}
        exact = [row for row, _ in _within(self.exact_at, slice(first, self.seen))]
        return {"rows": [first, self.seen], "exact": pack(self.exact_kl[exact]), **parts}

    def restore(self, kept: dict[str, Any]) -> bool:
        rows = slice(*kept["rows"])
        if rows.start != self.seen:
            return False
        for name in ("kl", "agree", "delta"):
            getattr(self, name)[rows] = unpack(kept[name])
        self.exact_kl[[row for row, _ in _within(self.exact_at, rows)]] = unpack(kept["exact"])
        self.seen = rows.stop
        return True

    def result(self, windows: int, within: int | None = None) -> DivergenceResult:
        """What was seen, in so many equally long windows; of the first `within` of them alone, where that is given."""
        last = len(self.kl) // windows * (within or windows)
        kl, agree, delta = (values.reshape(windows, -1)[:within].mean(1).tolist() for values in (self.kl, self.agree, self.delta))
        counted = self.exact_at < last
        return DivergenceResult(
            top_k=self.logp.shape[1],
            kl=kl,
            kl_mean=float(self.kl[:last].mean()),
            kl_p99=float(np.quantile(self.kl[:last], 0.99)),
            top1_agreement=agree,
            delta_p=delta,
            exact_positions=int(counted.sum()),
            tail_error=float(np.mean((self.exact_kl - self.kl[self.exact_at])[counted])),
        )


def exact_positions(positions: int) -> np.ndarray:
    """Which positions keep their whole distribution: some of all, spread evenly."""
    return np.unique(np.linspace(0, positions - 1, min(positions, EXACT_POSITIONS)).round().astype(int))


def _tail(logp: torch.Tensor) -> torch.Tensor:
    """Log of the mass that is not among the given log-probabilities, float32 [n]."""
    return (1 - logp.double().exp().sum(-1)).clamp(min=_LEAST_MASS).log().float()


def _within(at: np.ndarray, rows: slice) -> list[tuple[int, int]]:
    """(index, position) of the positions that lie in a range of rows."""
    low, high = np.searchsorted(at, [rows.start, rows.stop])
    return [(int(i), int(at[i])) for i in range(low, high)]
