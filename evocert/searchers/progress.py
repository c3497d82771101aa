"""How far a problem is: what of it the next step of a searcher depends on, for checkpoints."""

from typing import Any

from evocert.problem import CertifiedTraining


def progress_of(problem: CertifiedTraining) -> dict[str, Any]:
    """As tensors and plain values."""
    return {
        "generator": problem.generator.get_state(),
        "generation": problem.generation,
        "nonfinite_evals": problem.nonfinite_evals,
        "stalled_generations": problem.stalled_generations,
        "problem_status": {k: v for k, v in problem.status.items() if isinstance(v, bool | int | float | str)},
    }


def restore_progress(problem: CertifiedTraining, state: dict[str, Any]) -> None:
    """What ``progress_of`` gave, among whatever else a searcher's state holds."""
    problem.generator.set_state(state["generator"])
    problem.generation = state["generation"]
    problem.nonfinite_evals = state["nonfinite_evals"]
    problem.stalled_generations = state["stalled_generations"]
    problem.status.update(state["problem_status"])
