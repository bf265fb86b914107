"""The W&B dashboard of a project, defined through W&B's own workspaces API: quality against size and speed, cost, failures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


def workspace(entity: str, project: str) -> Workspace:
    """The dashboard as an object; `save()` sends it, `to_dict` shows it."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def scatter(title: str, x: str, y: str, log_y: bool = False) -> Any:
        return reports.ScatterPlot(title=title, x=reports.SummaryMetric(x), y=reports.SummaryMetric(y), log_y=log_y)

    def bars(title: str, metric: str) -> Any:
        return reports.BarPlot(title=title, metrics=[metric], orientation="h")

    sections = {
        "Quality": [
            scatter("Perplexity against resident weights", "weight_bytes", "perplexity", log_y=True),
            scatter("KL against perplexity", "perplexity", "kl_mean", log_y=True),
            bars("Accuracy", "accuracy"),
        ],
        "Speed": [
            scatter("Decode rate against resident weights", "weight_bytes", "decode_tokens_per_s"),
            scatter("Perplexity against decode rate", "decode_tokens_per_s", "perplexity", log_y=True),
            bars("Speed-up over the reference on the same engine", "speedup"),
        ],
        "Cost": [
            scatter("Perplexity against compression time", "compress_seconds", "perplexity", log_y=True),
            bars("Peak memory of the compression", "peak_memory_bytes"),
        ],
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="slimbench",
        sections=[workspaces.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Config("model"), workspaces.Config("family")],
            order=[workspaces.Ordering(workspaces.Summary("perplexity"), ascending=True)],
        ),
        auto_generate_panels=False,
    )
