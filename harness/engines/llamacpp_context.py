"""llama.cpp's model and context behind numpy arrays: weights in memory, a KV cache, and batches of tokens that go through them."""

from __future__ import annotations

import ctypes
import re
import weakref
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from slimbench.methods.base import Unsupported

_MOST_TOKENS = 2048
_CACHE_ITEM_BYTES = 2
_PADDING = 256
_KEPT_LOG_LINES = 8
_LOG_LEVELS = (3, 4)  # warnings and errors

_BUFFER = re.compile(r"model buffer size = *([\d.]+) MiB")

_log: list[str] = []
_buffers: list[float] = []


@llama_cpp.llama_log_callback
def _keep(level: int, text: bytes, data: Any) -> None:
    """Keep the last warnings and errors, for the message of what then fails, and the sizes of the model's buffers in MiB."""
    line = text.decode(errors="replace").strip()
    if found := _BUFFER.search(line):
        _buffers.append(float(found[1]))
    if level in _LOG_LEVELS and line:
        _log[:] = [*_log[1 - _KEPT_LOG_LINES :], line]


class Weights:
    """A GGUF file in memory. Its tensors are read, not mapped, so that the file may go and none of them is paged out.

    Attributes:
        vocab_size: Width of the logits.
        max_length: Positions that the model was made for.
        resident_bytes: What the tensors take, as llama.cpp says it, to 0.01 MiB for each of its buffers.
        cache_bytes_per_token: Keys and values of one token in all layers.
        build: llama-cpp-python's version, and the instructions that llama.cpp says it is compiled for.

    Raises:
        RuntimeError: llama.cpp refuses the file.
    """

    def __init__(self, file: Path) -> None:
        llama_cpp.llama_log_set(_keep, None)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        settings.n_gpu_layers = 0
        _log.clear()
        _buffers.clear()
        self.handle = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        if not self.handle:
            raise RuntimeError(f"llama.cpp does not load {file.name}: {'; '.join(_log)}")
        self._free = weakref.finalize(self, llama_cpp.llama_model_free, self.handle)
        self.resident_bytes = round(sum(_buffers) * 2**20)
        self.build = f"llama-cpp-python {llama_cpp.__version__}: {' '.join(llama_cpp.llama_print_system_info().decode().split())}"
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.handle))
        self.max_length = llama_cpp.llama_model_n_ctx_train(self.handle)
        layers, heads = llama_cpp.llama_model_n_layer(self.handle), llama_cpp.llama_model_n_head_kv(self.handle)
        architecture = self._header("general.architecture")
        widths = sum(int(self._header(f"{architecture}.attention.{name}_length")) for name in ("key", "value"))
        self.cache_bytes_per_token = layers * heads * widths * _CACHE_ITEM_BYTES

    def context(self, sequences: int, tokens: int, threads: int) -> Context:
        """A KV cache for sequences of these weights; arguments and errors as of `Context`."""
        return Context(self, sequences, tokens, threads)

    def _header(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(64)
        if llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer)) < 0:
            raise RuntimeError(f"the GGUF file does not say its {key}")
        return buffer.value.decode()


class Context:
    """A KV cache in float16 for a number of sequences, and the buffers of the computation.

    All of the cache is allocated at once, for each sequence a multiple of 256 positions.

    Args:
        sequences: Sequences that are processed together.
        tokens: Positions that each has at least.
        threads: Threads of the computation.

    Attributes:
        room: Positions that each sequence has.
        most_tokens: Tokens that can be processed at once.

    Raises:
        Unsupported: llama.cpp does not process so many sequences together.
        MemoryError: The cache cannot be allocated.
    """

    def __init__(self, weights: Weights, sequences: int, tokens: int, threads: int) -> None:
        most = llama_cpp.llama_max_parallel_sequences()
        if sequences > most:
            raise Unsupported(f"llama.cpp processes at most {most} sequences together, not {sequences}")
        self.weights, self.sequences, self.threads = weights, sequences, threads
        self.room = -(-tokens // _PADDING) * _PADDING
        self.most_tokens = min(_MOST_TOKENS, sequences * self.room)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = sequences * self.room, sequences
        settings.n_batch = self.most_tokens
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = False
        settings.no_perf = False
        _log.clear()
        self.handle = llama_cpp.llama_init_from_model(weights.handle, settings)
        if not self.handle:
            raise MemoryError(f"llama.cpp has no context for {sequences} × {self.room} tokens: {'; '.join(_log)}")
        self._free = weakref.finalize(self, llama_cpp.llama_free, self.handle)
        self._cache = llama_cpp.llama_get_memory(self.handle)
        self._batch = _Batch(self.most_tokens)

    def decode(
        self, token: NDArray[np.int32], position: NDArray[np.int64], sequence: NDArray[np.int64], wanted: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Process up to `most_tokens` tokens.

        Args:
            token: Their ids, [n].
            position: Where they stand in their sequences, [n].
            sequence: Which sequences they continue, [n].
            wanted: Which of them logits are wanted of, [n].

        Returns:
            Logits of the wanted ones in their order, [wanted, V]: llama.cpp's memory, overwritten by the next call.
        """
        batch = self._batch.fill(token, position, sequence, wanted)
        _log.clear()
        if code := llama_cpp.llama_decode(self.handle, batch):
            raise RuntimeError(f"llama.cpp could not process {len(token)} tokens (code {code}): {'; '.join(_log)}")
        shape = int(wanted.sum()), self.weights.vocab_size
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.handle), shape) if shape[0] else np.empty(shape, np.float32)

    def spent(self) -> float:
        """Milliseconds of llama.cpp's own work since this was asked last, by its counters."""
        found = llama_cpp.llama_perf_context(self.handle)
        llama_cpp.llama_perf_context_reset(self.handle)
        return float(found.t_p_eval_ms + found.t_eval_ms)

    def clear(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(self._cache, False)

    def forget(self, length: int) -> None:
        """Forget all tokens but the first `length` of each sequence."""
        for sequence in range(self.sequences):
            llama_cpp.llama_memory_seq_rm(self._cache, sequence, length, -1)

    def moved(self, tokens: int) -> Context:
        """A context with room for `tokens` tokens that holds what this one does. Errors as of the class."""
        larger = Context(self.weights, self.sequences, tokens, self.threads)
        for sequence in range(self.sequences):
            size = llama_cpp.llama_state_seq_get_size(self.handle, sequence)
            stored = (ctypes.c_uint8 * size)()
            llama_cpp.llama_state_seq_get_data(self.handle, stored, size, sequence)
            if not llama_cpp.llama_state_seq_set_data(larger.handle, stored, size, sequence):
                raise RuntimeError(f"llama.cpp could not move a sequence of {size} bytes to a larger cache")
        return larger


class _Batch:
    """The arrays of a `llama_batch`, allocated once."""

    def __init__(self, most: int) -> None:
        self._token, self._position, self._sequence = (np.zeros(most, np.int32) for _ in range(3))
        self._count, self._wanted = np.ones(most, np.int32), np.zeros(most, np.int8)
        self._sequences = self._sequence.ctypes.data + self._sequence.itemsize * np.arange(most, dtype=np.uintp)
        self._struct = llama_cpp.llama_batch(
            n_tokens=0,
            token=_pointer(self._token, ctypes.c_int32),
            pos=_pointer(self._position, ctypes.c_int32),
            n_seq_id=_pointer(self._count, ctypes.c_int32),
            seq_id=_pointer(self._sequences, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )

    def fill(self, token: NDArray[Any], position: NDArray[Any], sequence: NDArray[Any], wanted: NDArray[np.bool_]) -> Any:
        count = self._struct.n_tokens = len(token)
        self._token[:count], self._position[:count] = token, position
        self._sequence[:count], self._wanted[:count] = sequence, wanted
        return self._struct


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
