"""wandb_workspaces: a dashboard as it is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


def definition(workspace: Workspace) -> dict[str, Any]:
    """The dashboard as W&B stores it."""
    model: Any = workspace._to_model()
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)
