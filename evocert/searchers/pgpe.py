"""PGPE on EvoTorch's own class: fixed sigma and raw fitness, so that a step follows the smoothed loss's gradient."""

import math
from typing import Any

import torch
from evotorch import SolutionBatch
from evotorch.algorithms import PGPE as EvoTorchPGPE  # noqa: N811 (two classes of one name)
from evotorch.distributions import Distribution
from torch import Tensor

from evocert.errors import InputError
from evocert.experiment import Experiment
from evocert.problem import CertifiedTraining
from evocert.searchers import optimizers
from evocert.searchers.clock import Clock
from evocert.searchers.control import ControlVariate
from evocert.searchers.gaussian import FixedGaussian, FixedSymmetricGaussian
from evocert.searchers.progress import progress_of, restore_progress
from evocert.searchers.scale import by_use


class PGPE(EvoTorchPGPE):
    """Policy gradients with parameter-based exploration (Sehnke et al. 2010; smoothed certified loss: arXiv:2403.07095).

    EvoTorch's PGPE with other defaults, cheaper sampling, schedules, and a state that can be saved and restored bit for bit.
    With ``ranking_method="raw"`` the estimate it follows is

        g = (1 / n) sum_i delta_i (L(mu + delta_i) - L(mu - delta_i)) / 2,   delta_i = sigma * noise_i,   n = popsize / 2,

    which is sigma^2 times the textbook estimate of the gradient of the smoothed loss
    ``L_sigma(mu) = E L(mu + sigma * noise)``. So ``center_learning_rate`` means: with ``optimizer=None`` or "sgd",
    sigma^2 * center_learning_rate is the textbook step length; with "adam" the factor cancels, as long as Adam's epsilon is
    far below g, hence ``epsilon=1e-12`` by default; with "clipup" steps have their own length anyway. Rank shaping
    ("centered") keeps the direction only roughly; it is not the gradient of the smoothed loss.

    As in EvoTorch, step k applies the gradient of population k-1, then samples and evaluates population k: the reported
    centre is the one whose population was just evaluated. ``finish`` applies the last population's gradient, so that N
    steps are N updates.

    Args:
        problem: any ``CertifiedTraining``.
        popsize: P, even if symmetric.
        center_learning_rate: of the optimizer, see above.
        stdev_init: sigma, the standard deviation of the parameter noise.
        stdev_learning_rate: 0 keeps sigma as it is.
        optimizer: "adam", "clipup", "sgd" or None, as in EvoTorch.
        optimizer_config: what it takes besides the learning rate (adam: beta1, beta2, epsilon, amsgrad).
        ranking_method: "raw", "centered", "linear", "nes" or "normalized".
        symmetric: antithetic pairs.
        control_points: gradients that serve as a control variate (``ControlVariate``): 0, or an even number, with "raw", pairs,
            a fixed sigma and no distributed mode.
        weight_decay: share of the centre that an update at a learning rate of 1 takes away beside its step; not in
            distributed mode.
        stdev_by_use: how sigma is shared out: see ``scale.by_use``.
        more: whatever else EvoTorch's PGPE takes, without num_interactions and popsize_max.

    Raises:
        InputError, ValueError: a setting that EvoTorch or this class refuses.
    """

    # EvoTorch's own attributes, which it does not annotate.
    _distribution: Distribution
    _population: Any
    _first_iter: bool

    def __init__(
        self,
        problem: CertifiedTraining,
        *,
        popsize: int,
        center_learning_rate: float,
        stdev_init: float,
        stdev_learning_rate: float = 0.0,
        optimizer: str | None = "adam",
        optimizer_config: dict[str, Any] | None = None,
        ranking_method: str = "raw",
        symmetric: bool = True,
        control_points: int = 0,
        weight_decay: float = 0.0,
        stdev_by_use: float = 0.0,
        **more: Any,
    ) -> None:
        if "num_interactions" in more or "popsize_max" in more:
            raise InputError(
                "num_interactions and popsize_max are for reinforcement learning: allowed is a fixed popsize"
            )
        if not 0 < stdev_init < math.inf:
            raise InputError(f"stdev_init={stdev_init}: allowed is a finite number over 0")
        if control_points < 0 or control_points % 2:
            raise InputError(f"control_points={control_points}: allowed is an even number, or 0")
        plain = ranking_method == "raw" and symmetric and stdev_learning_rate == 0 and not more.get("distributed")
        if control_points and not plain:
            raise InputError(
                f"control_points={control_points}: allowed is 0, without ranking_method='raw', symmetric=True, "
                "stdev_learning_rate=0 and distributed=False"
            )
        if not 0 <= weight_decay < math.inf or (weight_decay and more.get("distributed")):
            raise InputError(
                f"weight_decay={weight_decay}: allowed is a finite number, 0 or more, and 0 if distributed"
            )
        self._scale = by_use(problem, stdev_by_use)
        if optimizer == "adam":
            optimizer_config = {"epsilon": 1e-12, **(optimizer_config or {})}
        super().__init__(
            problem,
            popsize=popsize,
            center_learning_rate=center_learning_rate,
            stdev_learning_rate=stdev_learning_rate,
            stdev_init=(stdev_init * self._scale).repeat(problem.solution_length // len(self._scale)),
            optimizer=optimizer,
            optimizer_config=optimizer_config,
            ranking_method=ranking_method,
            symmetric=symmetric,
            **more,
        )
        given = self._distribution
        if stdev_learning_rate == 0:
            kind = FixedSymmetricGaussian if symmetric else FixedGaussian
            self._distribution = kind(given.parameters, dtype=given.dtype, device=given.device)
        self._weight_decay = weight_decay
        self._control = ControlVariate(control_points) if control_points else None
        # What the population was drawn from: the generator's state, the centre and sigma.
        self._before_sampling: Tensor | None = None
        self._drawn_from: tuple[Tensor, Tensor] | None = None
        self._speed_per_rate = optimizers.speed_per_rate(self.optimizer)
        self.timing: dict[str, float] = {"sample": 0.0, "bounds": 0.0, "update": 0.0}
        """Seconds that the last step spent on sampling, on evaluating the population, and on gradient and update."""

    @classmethod
    def configured(cls, problem: CertifiedTraining, experiment: Experiment) -> "PGPE":
        """As an experiment describes it."""
        return cls(
            problem,
            popsize=experiment.popsize,
            center_learning_rate=experiment.center_learning_rate,
            stdev_init=experiment.stdev_init,
            stdev_learning_rate=experiment.stdev_learning_rate,
            optimizer=experiment.optimizer,
            optimizer_config=dict(experiment.optimizer_config),
            ranking_method=experiment.ranking_method,
            symmetric=experiment.symmetric,
            control_points=experiment.control_points,
            weight_decay=experiment.weight_decay,
            stdev_by_use=experiment.stdev_by_use,
        )

    @classmethod
    def members(cls, experiment: Experiment) -> tuple[int, int]:
        """How many losses a generation takes of each image, without and with gradients."""
        return experiment.popsize, experiment.control_points

    def _step_non_distributed(self) -> None:
        clock = Clock(self.problem.device)
        if not self._first_iter:
            self._apply_gradient()
        self._first_iter = False
        self.timing["update"] = clock.lap()
        self._sample()
        self.timing["sample"] = clock.lap()
        self.problem.evaluate(self._population)
        if self._control is not None:
            self._control.renew(self.problem, self._distribution.mu, self._distribution.sigma)
        self.timing["bounds"] = clock.lap()

    def _sample(self) -> None:
        if self._population is None:
            self._population = SolutionBatch(
                self.problem, popsize=self._popsize, device=self.problem.device, empty=True
            )
        self._before_sampling = self.problem.generator.get_state()
        self._drawn_from = self._distribution.mu, self._distribution.sigma
        self._distribution.sample(out=self._population.access_values(), generator=self.problem)

    def _apply_gradient(self) -> None:
        fitness = self._population.evals[:, self._obj_index]
        # No finite fitness, or the same for all: no direction is better than another, and even momentum alone must not move
        # the centre. (Equal fitness makes NaN of "normalized" and of ClipUp's steps, and a random walk of ranks.)
        if self.problem.stalled_generations or bool(fitness.min() == fitness.max()):
            return
        samples, fitness = self._population.access_values(keep_evals=True), fitness.as_subclass(Tensor)
        if self._control is not None:
            fitness = self._control.without(samples.as_subclass(Tensor), fitness)
        gradients = self._distribution.compute_gradients(
            samples,
            fitness,
            objective_sense=self.problem.senses[self._obj_index],
            ranking_method=self._ranking_method,
        )
        if self._control is not None and self._drawn_from is not None:
            gradients["mu"] = self._control.restored(gradients["mu"], self._drawn_from[1])
        if len(self._scale) > 1:  # sigma^2 times the textbook estimate, with one sigma for all: no preconditioner
            gradients["mu"] = gradients["mu"] / self._scale**2
        if self._weight_decay:
            kept = 1 - self._rate * self._weight_decay
            self._distribution = self._distribution.modified_copy(mu=kept * self._distribution.mu)
        self._update_distribution(gradients)

    @property
    def _rate(self) -> float:
        rate = self._center_learning_rate if self.optimizer is None else self.optimizer.param_groups[0]["lr"]
        return float(rate)

    def finish(self) -> None:
        """Apply the gradient of the last population, if there is one that is pending."""
        if self._population is not None and not self._first_iter:
            self._apply_gradient()
            self._first_iter = True
            self._renew_status()

    # Schedules

    def set_learning_rate(self, rate: float) -> None:
        """The centre's learning rate from the next update on."""
        if self.optimizer is None:
            self._center_learning_rate = rate
        else:
            optimizers.set_rate(self.optimizer, rate, self._speed_per_rate)

    def set_stdev(self, stdev: float) -> None:
        """Sigma from the next population on.

        The pending population's gradient stays right if sigma has no learning rate: the centre's does not contain sigma.
        """
        sigma = torch.full_like(self._distribution.sigma, stdev) * self._scale
        self._distribution = self._distribution.modified_copy(sigma=sigma)

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors and plain values. Small: the population is drawn again from it."""
        return {
            "mu": self._distribution.mu.detach().clone(),
            "sigma": self._distribution.sigma.detach().clone(),
            "optimizer": optimizers.state_of(self.optimizer),
            "center_learning_rate": self._center_learning_rate,
            "steps": self._steps_count,
            "pending": not self._first_iter,
            "evals": None if self._population is None else self._population.evals.as_subclass(Tensor).clone(),
            "before_sampling": self._before_sampling,
            "drawn_from": None if self._drawn_from is None else tuple(t.detach().clone() for t in self._drawn_from),
            "control": None if self._control is None else self._control.state_dict(),
            **progress_of(self.problem),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``: the following steps are bit for bit those of the searcher that gave it."""
        optimizers.load_state(self.optimizer, state["optimizer"])
        self._center_learning_rate = state["center_learning_rate"]
        self._steps_count = state["steps"]
        self._first_iter = not state["pending"]
        if state["evals"] is not None:
            self._set_distribution(*state["drawn_from"])
            self.problem.generator.set_state(state["before_sampling"])
            self._sample()
            evals = state["evals"].to(self.problem.device)
            self._population.set_evals(evals[:, 0], evals[:, 1:])
        self._set_distribution(state["mu"], state["sigma"])
        if self._control is not None:
            self._control.load_state_dict(state["control"], self.problem.device)
        restore_progress(self.problem, state)
        self._renew_status()

    def _renew_status(self) -> None:
        """The status of the last step, with the centre as it is now."""
        self.clear_status()
        if self._steps_count:
            self.update_status({"iter": self._steps_count, **self.problem.status})

    def _set_distribution(self, mu: Tensor, sigma: Tensor) -> None:
        device = self.problem.device
        self._distribution = self._distribution.modified_copy(mu=mu.to(device), sigma=sigma.to(device))
