"""Custom evaluations: exact match, and losses on tables that the run was trained on."""

import msllm
from msllm.hooks import Run, mean_losses


def answers(run: Run) -> dict[str, float]:
    """The fraction of held-out examples that the model answers exactly."""
    result = msllm.evaluate(run.model(), examples=100)
    return {"exact_match": result.exact_match}


def seen_tables(run: Run) -> dict[str, float]:
    """Losses on training tables. Their gap to the held-out losses measures memorisation."""
    losses = mean_losses(run.program, run.state.parameters, run.loader)
    return {f"seen/{name}": value for name, value in losses.items()}
