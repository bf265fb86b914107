"""torch's compiler: passes over its graphs, and options that no page documents."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

__all__ = ["CustomGraphPass", "get_hash_for_files", "instructions", "operator_name", "pass_options", "step_options"]


def instructions() -> str:
    """Vector instructions that compiled code for the CPU uses."""
    return str(pick_vec_isa())


def operator_name(node: torch.fx.Node) -> str | None:
    """Name of the operator that a node of a graph calls, without namespace and overload; None if it calls something else."""
    return getattr(node.target, "_opname", None)


def pass_options(graph_pass: CustomGraphPass | None) -> dict[str, Any]:
    """Options of `torch.compile` by which a pass sees each graph before torch's own passes do; none for None."""
    return {"post_grad_custom_pre_pass": graph_pass} if graph_pass else {}


def step_options(most_operations_twice: int, cuda_graphs: bool) -> dict[str, Any]:
    """Options of `torch.compile` for code under which nothing changes from call to call: no guards.

    Args:
        most_operations_twice: A result of more operations than these is kept rather than computed again where it is used.
        cuda_graphs: Launch all kernels of a call at once.
    """
    return {
        "cpp.enable_kernel_profile": sys.platform == "linux",  # each kernel has a name that a profiler sees, and costs some nanoseconds
        "triton.cudagraphs": cuda_graphs,
        "realize_opcount_threshold": most_operations_twice,
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
    }
