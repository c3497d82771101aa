"""Methods that follow gradients of the bound itself: at the centre, or averaged around it."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from evotorch.algorithms.searchalgorithm import SearchAlgorithm
from evotorch.optimizers import get_optimizer_class
from torch import Tensor

from evocert.errors import InputError
from evocert.experiment import Experiment
from evocert.objectives import ATTACKING
from evocert.problem import CertifiedTraining
from evocert.searchers import optimizers
from evocert.searchers.clock import Clock
from evocert.searchers.gaussian import drawn
from evocert.searchers.progress import progress_of, restore_progress
from evocert.searchers.scale import by_use


class Descent(SearchAlgorithm):
    """Steps against the mean gradient of a few points, which are evaluated and followed in the same step.

    Args:
        problem: any ``CertifiedTraining``; on the CPU or one GPU, without actors.
        center_learning_rate: of the optimizer.
        optimizer: "adam", "clipup", "sgd" or None (a plain step), as in EvoTorch.
        optimizer_config: what it takes besides the learning rate.
        clip_norm: the mean gradient is shortened to this length where it is longer; None: never.
        l1: weight of the parameters' absolute values in the loss.
        weight_decay: share of the parameters that an update at a learning rate of 1 takes away beside its step.
        regulariser: weight of ``regularisers.shi`` in the loss, times 1 - eps / final_eps.
        final_eps: where eps ends, in [0, 1] pixels.
        options: of ``objectives.Options``.

    Raises:
        InputError: a setting that is not allowed.
    """

    objective: ClassVar[str] = "certified"

    problem: CertifiedTraining
    _center: Tensor
    _stdev: Tensor
    _mean_eval: float

    def __init__(
        self,
        problem: CertifiedTraining,
        *,
        center_learning_rate: float,
        optimizer: str | None = "adam",
        optimizer_config: Mapping[str, Any] | None = None,
        clip_norm: float | None = None,
        l1: float = 0.0,
        weight_decay: float = 0.0,
        regulariser: float = 0.0,
        final_eps: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if clip_norm is not None and not 0 < clip_norm < math.inf:
            raise InputError(f"clip_norm={clip_norm}: allowed is a finite number over 0, or none")
        for name, value in (("l1", l1), ("weight_decay", weight_decay), ("regulariser", regulariser)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name}={value}: allowed is a finite number, 0 or more")
        super().__init__(problem, center=self._get_center, stdev=self._get_stdev, mean_eval=self._get_mean_eval)
        self._center = problem.generate_values(1)[0].as_subclass(Tensor).clone()
        self._stdev = torch.zeros(1, dtype=self._center.dtype, device=self._center.device)
        self._mean_eval = math.nan
        self._clip_norm, self._l1, self._options = clip_norm, l1, dict(options or {})
        self._weight_decay, self._regulariser, self._final_eps = weight_decay, regulariser, final_eps
        self._center_learning_rate = center_learning_rate
        self._optimizer = None
        if optimizer is not None:
            self._optimizer = get_optimizer_class(optimizer, dict(optimizer_config or {}))(
                solution_length=problem.solution_length,
                dtype=problem.dtype,
                device=problem.device,
                stepsize=center_learning_rate,
            )
        self._speed_per_rate = optimizers.speed_per_rate(self.optimizer)
        self.timing: dict[str, float] = {"sample": 0.0, "bounds": 0.0, "update": 0.0}
        """Seconds that the last step spent on sampling, on losses and gradients, and on the update."""

    @classmethod
    def configured(cls, problem: CertifiedTraining, experiment: Experiment) -> "Descent":
        """As an experiment describes it."""
        return cls(problem, **cls._settings(experiment))

    @classmethod
    def _settings(cls, experiment: Experiment) -> dict[str, Any]:
        names = {
            "mixture": experiment.mixture,
            "steps": experiment.train_attack_steps,
            "step": experiment.train_attack_step,
        }
        return {
            "center_learning_rate": experiment.center_learning_rate,
            "optimizer": experiment.optimizer,
            "optimizer_config": experiment.optimizer_config,
            "clip_norm": experiment.clip_norm,
            "l1": experiment.l1,
            "weight_decay": experiment.weight_decay,
            "regulariser": experiment.regulariser,
            "final_eps": experiment.radius * experiment.eps_schedule(1.0),
            "options": names if cls.objective in ATTACKING else {},
        }

    @classmethod
    def members(cls, experiment: Experiment) -> tuple[int, int]:
        """How many losses a generation takes of each image, without and with gradients, those of attacks included."""
        attacking, mixing = cls.objective in ATTACKING, cls.objective in ("mtl-ibp", "cc-ibp", "exp-ibp")
        return 0, 1 + attacking * experiment.train_attack_steps + mixing

    # The status. Methods, not lambdas: searchers can be pickled.

    def _get_center(self) -> Tensor:
        return self._center

    def _get_stdev(self) -> Tensor:
        return self._stdev

    def _get_mean_eval(self) -> float:
        return self._mean_eval

    @property
    def optimizer(self) -> Any:
        """torch's, or EvoTorch's ClipUp; None for a plain step."""
        return getattr(self._optimizer, "contained_optimizer", self._optimizer)

    def _step(self) -> None:
        clock = Clock(self.problem.device)
        points = self._points()
        self.timing["sample"] = clock.lap()
        losses, gradients = self.problem.descend(points, self.objective, **self._options, **self._warmth())
        self.timing["bounds"] = clock.lap()
        good = losses.isfinite() & gradients.isfinite().all(1)
        self._mean_eval = float(losses[good].mean()) if bool(good.any()) else math.nan
        if bool(good.any()):  # else there is no direction, and even momentum alone must not move the centre
            self._follow(gradients[good].mean(0))
        self.timing["update"] = clock.lap()

    def _warmth(self) -> dict[str, float]:
        """The regulariser's weight, while eps is on its way."""
        if not self._regulariser:
            return {}
        way = self.problem.eps_at(self.problem.generation) / self._final_eps if self._final_eps else 1.0
        return {"regulariser": self._regulariser * max(1.0 - way, 0.0)}

    def _points(self) -> Tensor:
        """Where the gradient is taken: ``[P, D]``."""
        return self._center.unsqueeze(0)

    def _follow(self, gradient: Tensor) -> None:
        gradient = gradient + self._l1 * self._center.sign()
        if not bool(gradient.any()):  # no direction either, and ClipUp would make NaN of it
            return
        if self._weight_decay:
            self._center = self._center * (1 - self._center_learning_rate * self._weight_decay)
        if self._clip_norm is not None:
            gradient = gradient * (self._clip_norm / gradient.norm()).clamp(max=1.0)
        if self._optimizer is None:
            self._center = self._center - self._center_learning_rate * gradient
        else:
            self._center = self._center + self._optimizer.ascent(-gradient)

    def finish(self) -> None:
        """Nothing is pending."""

    # Schedules

    def set_learning_rate(self, rate: float) -> None:
        """The centre's learning rate from the next update on."""
        self._center_learning_rate = rate
        if self.optimizer is not None:
            optimizers.set_rate(self.optimizer, rate, self._speed_per_rate)

    def set_stdev(self, stdev: float) -> None:
        """No noise, no sigma."""

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors and plain values."""
        return {
            "mu": self._center.detach().clone(),
            "sigma": self._stdev.clone(),
            "mean_eval": self._mean_eval,
            "optimizer": optimizers.state_of(self.optimizer),
            "center_learning_rate": self._center_learning_rate,
            "steps": self._steps_count,
            **progress_of(self.problem),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``: the following steps are bit for bit those of the searcher that gave it."""
        optimizers.load_state(self.optimizer, state["optimizer"])
        self._center_learning_rate = state["center_learning_rate"]
        self._steps_count = state["steps"]
        self._center = state["mu"].to(self.problem.device).clone()
        self._stdev = state["sigma"].to(self.problem.device).clone()
        self._mean_eval = state["mean_eval"]
        restore_progress(self.problem, state)
        self.clear_status()
        if self._steps_count:
            self.update_status({"iter": self._steps_count, **self.problem.status})


class Grad(Descent):
    """Gradient descent on the certified loss itself: what certified training is elsewhere."""


class RGS(Descent):
    """Randomised gradient smoothing: the mean gradient at points around the centre (arXiv:2403.07095).

        g = (1 / P) sum_i grad L(mu + sigma * noise_i)

    estimates the gradient of the smoothed loss ``L_sigma(mu) = E L(mu + sigma * noise)`` wherever L is differentiable almost
    everywhere and continuous; a jump of L it does not see (PGPE does).

    Args:
        popsize: P, even if symmetric.
        stdev_init: sigma, the standard deviation of the parameter noise.
        symmetric: antithetic pairs.
        stdev_by_use: how sigma is shared out: see ``scale.by_use``.
        more: as of ``Descent``.
    """

    def __init__(
        self,
        problem: CertifiedTraining,
        *,
        popsize: int,
        stdev_init: float,
        symmetric: bool = True,
        stdev_by_use: float = 0.0,
        **more: Any,
    ) -> None:
        if not 0 < stdev_init < math.inf:
            raise InputError(f"stdev_init={stdev_init}: allowed is a finite number over 0")
        if popsize < 1 or (symmetric and popsize % 2):
            raise InputError(f"popsize={popsize}: allowed is 1 or more, with symmetric=true an even number")
        super().__init__(problem, **more)
        self._popsize, self._symmetric = popsize, symmetric
        self._scale = by_use(problem, stdev_by_use)
        self._stdev = stdev_init * self._scale

    @classmethod
    def _settings(cls, experiment: Experiment) -> dict[str, Any]:
        return {
            **super()._settings(experiment),
            "popsize": experiment.popsize,
            "stdev_init": experiment.stdev_init,
            "symmetric": experiment.symmetric,
            "stdev_by_use": experiment.stdev_by_use,
        }

    @classmethod
    def members(cls, experiment: Experiment) -> tuple[int, int]:
        return 0, experiment.popsize

    def _points(self) -> Tensor:
        pairs = self._popsize // 2 if self._symmetric else self._popsize
        noise = drawn(pairs, self._stdev, self._center, self.problem.generator)
        if self._symmetric:
            noise = torch.stack((noise, -noise), 1).flatten(0, 1)
        return self._center + noise

    def set_stdev(self, stdev: float) -> None:
        """Sigma from the next points on."""
        self._stdev = stdev * self._scale


class Standard(Descent):
    """Gradient descent on the loss of the images themselves: for pre-training."""

    objective = "standard"


class PGD(Descent):
    """Adversarial training: see ``objectives.pgd``."""

    objective = "pgd"


class SABR(Descent):
    """Small adversarial bounding regions: see ``objectives.sabr``."""

    objective = "sabr"


class MTLIBP(Descent):
    """See ``objectives.mtl_ibp``."""

    objective = "mtl-ibp"


class CCIBP(Descent):
    """See ``objectives.cc_ibp``."""

    objective = "cc-ibp"


class EXPIBP(Descent):
    """See ``objectives.exp_ibp``."""

    objective = "exp-ibp"
