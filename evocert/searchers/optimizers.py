"""EvoTorch's optimizers, scheduled, saved and restored: torch's own ones in EvoTorch's clothing, and ClipUp."""

from typing import Any

import torch


def speed_per_rate(optimizer: Any) -> float | None:
    """Of ClipUp, what its greatest speed is in learning rates; None of any other."""
    if optimizer is None or "max_speed" not in optimizer.param_groups[0]:
        return None
    group = optimizer.param_groups[0]
    return float(group["max_speed"] / group["lr"])


def set_rate(optimizer: Any, rate: float, speed: float | None) -> None:
    """The learning rate from the next step on; ClipUp's greatest speed follows it."""
    group = optimizer.param_groups[0]
    group["lr"] = rate
    if speed is not None:
        group["max_speed"] = rate * speed


def state_of(optimizer: Any) -> dict[str, Any] | None:
    """All that its next step depends on, as tensors and plain values."""
    if optimizer is None:
        return None
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer.state_dict()
    return {"velocity": optimizer._velocity.clone(), "param_groups": [dict(optimizer.param_groups[0])]}


def load_state(optimizer: Any, state: dict[str, Any] | None) -> None:
    """What ``state_of`` gave."""
    if state is None or optimizer is None:
        return
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer.load_state_dict(state)
        return
    optimizer._velocity.copy_(state["velocity"])
    for key, value in state["param_groups"][0].items():
        optimizer.param_groups[0][key] = value
