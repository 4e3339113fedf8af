"""Evaluations of a user: right answers, and losses on tables that the run was trained on."""

import msllm
from msllm.hooks import Run, mean_losses


def answers(run: Run) -> dict[str, float]:
    """The fraction of held-out examples that the model answers right."""
    result = msllm.evaluate(run.model(), examples=100)
    return {"exact_match": result.exact_match}


def seen_tables(run: Run) -> dict[str, float]:
    """Losses on training tables. What they are lower than the held-out ones is memorised."""
    losses = mean_losses(run.program, run.state.parameters, run.loader)
    return {f"seen/{name}": value for name, value in losses.items()}
