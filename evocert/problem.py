"""Certified training as an EvoTorch problem: parameters in, relaxation-bounded worst-case loss out."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from evotorch import Problem, SolutionBatch
from torch import Tensor, nn

from evocert import regularisers
from evocert.bounds import (
    BOUNDS,
    Members,
    Tile,
    box_around,
    choose_tile,
    logit_margins,
    over_tiles,
    read_network,
    value_and_gradient,
)
from evocert.errors import InputError
from evocert.losses import cross_entropy_of_margins
from evocert.memory import parse_bytes
from evocert.minibatches import Images, Minibatch, drawn_noise, drawn_rows
from evocert.networks import flat_parameters
from evocert.objectives import ATTACKING, OBJECTIVES, Options

STALLED_GENERATIONS = 3


def _checked_eps(eps: Any) -> float:
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps <= 1:
        raise InputError(f"eps={eps!r}: allowed is 0 to 1, in [0, 1] pixels")
    return float(eps)


class NonFiniteFitnessError(RuntimeError):
    """No member had a finite fitness, several generations in a row."""


class CertifiedTraining(Problem):
    """Minimise the certified worst-case loss of a network over its flat parameter vector.

    The fitness of a member is the mean, over the generation's minibatch, of the cross-entropy of the worst-case margins:
    lower bounds of logit[y] - logit[j] over all inputs within eps of the image, clipped to [0, 1]. Each evaluation of a
    population is one generation; its minibatch is drawn from (seed, generation) alone and is the same for every member, on
    any number of actors.

    Extra evaluation data travel with each member's fitness: ``evals[:, 1]`` the natural loss on the same minibatch (NaN in
    generations that skip it), ``evals[:, 2]`` the fraction of the minibatch that is certified.

    A NaN or infinite fitness is replaced, when all pieces of the population are in, by the worst finite fitness of the
    population, and counted in ``status["nonfinite_evals"]``. In EvoTorch's distributed mode each actor samples, ranks and
    replaces on its own.

    Args:
        network: a module that is a chain of supported layers (``evocert.bounds.read_network``). Its parameters are where
            the search starts.
        data: the training images.
        eps: input radius in [0, 1] pixels, or a function of the generation (0, 1, …) that gives it.
        bound: a name in ``evocert.bounds.BOUNDS``.
        batch_size: images a generation.
        seed: of the minibatches and of the searcher's noise.
        natural_every: the natural loss is computed in every so-manyth generation; it costs a forward pass, about half of
            what IBP does. 0: never.
        memory_budget: bytes, or such as "2GiB", for the temporaries of an evaluation (not for the whole process).
        tile: members and images worked on at once; chosen from the budget if None.
        device, num_actors, num_gpus_per_actor, num_subbatches, subbatch_size: as of ``evotorch.Problem``.

    Raises:
        UnsupportedLayer: the network has no bound.
        InputError: an unknown bound, an impossible batch size, eps or memory budget.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Images,
        *,
        eps: float | Callable[[int], float],
        bound: str = "ibp",
        batch_size: int = 256,
        seed: int = 0,
        natural_every: int = 1,
        memory_budget: int | str = "2GiB",
        tile: Tile | None = None,
        device: torch.device | str = "cpu",
        num_actors: int | str | None = None,
        num_gpus_per_actor: int | float | str | None = None,
        num_subbatches: int | None = None,
        subbatch_size: int | None = None,
    ) -> None:
        if bound not in BOUNDS:
            raise InputError(f"bound={bound!r}: allowed are {', '.join(BOUNDS)}")
        if not (isinstance(batch_size, int) and 1 <= batch_size <= len(data)):
            raise InputError(f"batch_size={batch_size}: allowed is 1 to {len(data)}, the number of training images")
        if not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise InputError(f"seed={seed}: allowed is a whole number, 0 or more, less than 2**63")
        if tile is not None and not all(isinstance(size, int) and size >= 1 for size in tile):
            raise InputError(f"tile={tuple(tile)}: allowed are whole numbers, 1 or more")
        if not callable(eps):
            _checked_eps(eps)
        if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
            raise InputError("network: some of its parameters are NaN or infinite, allowed are finite ones")
        self.network = read_network(network, data.image_shape)
        self.bound = bound
        self.batch_size = int(batch_size)
        self.generation = 0
        self.natural_every = int(natural_every)
        self.nonfinite_evals = 0
        self.stalled_generations = 0
        self._minibatch_seed = int(seed)
        self._module: nn.Module | None = network
        self._data = data
        self._eps = eps
        self._minibatch: Minibatch | None = None
        self._ranks_alone = False
        self._leave_behind = False
        if tile is None:
            cost = BOUNDS[bound].cost(self.network, torch.device(device))
            try:
                budget, together = parse_bytes(memory_budget), num_actors in (None, 0, 1)
                tile = choose_tile(cost, self.batch_size, budget, torch.device(device), together=together)
            except ValueError as error:
                raise InputError(str(error)) from error
        self.tile = Tile(*tile)
        super().__init__(
            "min",
            solution_length=self.network.num_parameters,
            dtype=torch.float32,
            eval_data_length=2,
            device=device,
            seed=int(seed),
            num_actors=num_actors,
            num_gpus_per_actor=num_gpus_per_actor,
            num_subbatches=num_subbatches,
            subbatch_size=subbatch_size,
            # A best member is the best on its own minibatch only; keeping it costs clones and host synchronisations.
            store_solution_stats=False,
        )
        self.after_eval_hook.append(self._report)

    # The loss

    def minibatch(self, generation: int) -> Minibatch:
        """The images, labels and eps of a generation: a function of (seed, generation) alone."""
        rows = drawn_rows(self._minibatch_seed, generation, len(self._data), self.batch_size)
        images, labels = self._data.batch(rows)
        if int(labels.max()) >= self.network.num_classes:
            raise InputError(
                f"label {int(labels.max())} of a training image: allowed is 0 to {self.network.num_classes - 1}, the network's "
                "outputs"
            )
        natural = self.natural_every > 0 and generation % self.natural_every == 0
        return Minibatch(generation, images, labels, self.eps_at(generation), natural)

    def eps_at(self, generation: int) -> float:
        """The radius, in [0, 1] pixels, that a generation is trained at."""
        return _checked_eps(self._eps(generation) if callable(self._eps) else self._eps)

    def _checked(self, parameters: Tensor) -> Tensor:
        if parameters.ndim != 2 or parameters.shape[1] != self.network.num_parameters:
            raise InputError(
                f"parameters of shape {list(parameters.shape)}: allowed is [P, {self.network.num_parameters}]"
            )
        return parameters

    def losses(self, parameters: Tensor, generation: int | None = None) -> Tensor:
        """The certified loss of each member on a generation's minibatch.

        Args:
            parameters: ``[P, D]``.
            generation: which minibatch and eps; by default the next one to be evaluated.

        Returns:
            ``[P]``, on the device and in the dtype of ``parameters``, and differentiable with respect to them. The graph
            keeps the temporaries of all tiles: ``value_and_gradient`` gives the same gradients within the budget.
        """
        minibatch = self.minibatch(self.generation if generation is None else generation)
        return self._columns(self._checked(parameters), minibatch._replace(natural=False))[..., 0].mean(1)

    def value_and_gradient(self, parameters: Tensor, generation: int | None = None) -> tuple[Tensor, Tensor]:
        """The certified loss of each member on a generation's minibatch, and its gradient, within the memory budget.

        Args:
            parameters: ``[P, D]``.
            generation: which minibatch and eps; by default the next one to be evaluated.

        Returns:
            ``[P]`` and ``[P, D]``.
        """
        minibatch = self.minibatch(self.generation if generation is None else generation)
        losses, gradients = self._differentiated(self._checked(parameters), minibatch, "certified", {})
        return losses[:, 0], gradients

    def descend(self, parameters: Tensor, objective: str, **options: Any) -> tuple[Tensor, Tensor]:
        """As ``value_and_gradient`` of an objective on the next generation's minibatch, which then counts as evaluated.

        The status is that of the evaluation: eps, and for "certified" the certified share.

        Args:
            parameters: ``[P, D]``.
            objective: a name in ``objectives.OBJECTIVES``.
            options: of ``objectives.Options``, but bound and eps.

        Raises:
            NonFiniteFitnessError: no member had a finite loss and gradient in several generations in a row.
        """
        minibatch = self._current_minibatch()
        columns, gradients = self._differentiated(self._checked(parameters), minibatch, objective, options)
        finite = columns[:, 0].isfinite() & gradients.isfinite().all(1)
        self.nonfinite_evals += int((~finite).sum())
        status: dict[str, Any] = {"eps": minibatch.eps, "nonfinite_evals": self.nonfinite_evals}
        for name, column in (("natural_loss", 1), ("certified", 2)):
            value = columns[:, column].mean().item()
            if not np.isnan(value):
                status[name] = value
        self.status.clear()
        self.status.update(status)
        self._advance(stalled=not bool(finite.any()))
        return columns[:, 0], gradients

    def _differentiated(
        self, parameters: Tensor, minibatch: Minibatch, objective: str, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Means over the minibatch ``[P, 3]``, as the columns of ``_columns``, and gradients ``[P, D]`` of the first."""
        wanted = Options(self.bound, minibatch.eps, **options)

        def on_tile(members: Members, images: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
            if objective == "certified":
                columns = self._losses(members, images, labels, minibatch)
            else:
                loss = OBJECTIVES[objective](members, images, labels, noise, wanted)
                columns = torch.stack((loss, *[torch.full_like(loss, torch.nan)] * 2), 2)
            if wanted.regulariser:
                penalty = wanted.regulariser * regularisers.shi(members, box_around(images, minibatch.eps))
                columns = torch.cat((columns[..., :1] + penalty.unsqueeze(2), columns[..., 1:]), 2)
            return columns

        images = minibatch.images.to(parameters.device, parameters.dtype)
        attacking = objective in ATTACKING  # the others have no use for where an attack starts
        noise = drawn_noise(self._minibatch_seed, minibatch.generation, images if attacking else images[:, :0])
        inputs = images, minibatch.labels.to(parameters.device), noise
        # Gradients are not shared out among actors, whose tiles must be alike: no member is computed in vain.
        most = min(self.tile.members, len(parameters)) if objective == "certified" else 1
        tile = self.tile._replace(members=max(most, 1))
        columns, gradients = value_and_gradient(on_tile, self.network, parameters, inputs, tile)
        return columns.mean(1), gradients / len(images)

    def _columns(self, parameters: Tensor, minibatch: Minibatch) -> Tensor:
        """``[P, B, 3]``: certified loss, natural loss (NaN if it is not wanted), certified or not as 1 or 0."""

        def on_tile(members: Members, images: Tensor, labels: Tensor) -> Tensor:
            return self._losses(members, images, labels, minibatch)

        images = minibatch.images.to(parameters.device, parameters.dtype)
        labels = minibatch.labels.to(parameters.device)
        return over_tiles(on_tile, self.network, parameters, (images, labels), self.tile)

    def _losses(self, members: Members, images: Tensor, labels: Tensor, minibatch: Minibatch) -> Tensor:
        """The columns of ``_columns`` on a tile."""
        margins = BOUNDS[self.bound].margins(members, box_around(images, minibatch.eps), labels)
        loss = cross_entropy_of_margins(margins)
        if minibatch.natural:
            natural = cross_entropy_of_margins(logit_margins(members.logits(images), labels)).detach()
        else:
            natural = torch.full_like(loss, torch.nan)
        return torch.stack((loss, natural, (margins > 0).all(2).to(loss.dtype)), 2)

    # What EvoTorch calls

    def _evaluate_batch(self, batch: SolutionBatch) -> None:
        minibatch = self._minibatch if self.is_remote else self._current_minibatch()
        assert minibatch is not None, "an actor evaluates only after it was given the generation's minibatch"
        values = batch.values.as_subclass(torch.Tensor)
        if self.is_remote and self._num_gpus_per_actor:
            values = values.to(self.aux_device)
        with torch.no_grad():
            evals = self._columns(values, minibatch).mean(1).to(batch.device)
        batch.set_evals(evals[:, 0], evals[:, 1:])

    def _current_minibatch(self) -> Minibatch:
        if self._minibatch is None or self._minibatch.generation != self.generation:
            self._minibatch = self.minibatch(self.generation)
        return self._minibatch

    def _evaluate_all(self, batch: SolutionBatch) -> None:
        super()._evaluate_all(batch)
        if self.is_main or self._ranks_alone:
            self._replace_nonfinite(batch)

    def evaluate(self, x: Any) -> None:
        """Evaluate a population (or one solution) on the minibatch of ``self.generation``, which then advances by one."""
        super().evaluate(x)
        if self.is_main:
            self._advance()

    def _advance(self, *, stalled: bool | None = None) -> None:
        """A generation is evaluated. ``stalled``: whether all of it was not finite, where that is not counted yet."""
        self.generation += 1
        if stalled is not None:
            self.stalled_generations = self.stalled_generations + 1 if stalled else 0
        if self.stalled_generations >= STALLED_GENERATIONS:
            raise NonFiniteFitnessError(
                f"no member had a finite loss in {self.stalled_generations} generations in a row: the parameters have "
                "grown too large; lower the learning rate, sigma or eps"
            )

    def sample_and_compute_gradients(self, *args: Any, **kwargs: Any) -> Any:
        """As EvoTorch's; with actors it is the distributed mode, where it stands for the evaluation of a population."""
        result = super().sample_and_compute_gradients(*args, **kwargs)
        if self.is_main and self._actors is not None:
            self.generation += 1
        return result

    def _sample_and_compute_gradients(self, *args: Any, **kwargs: Any) -> Any:
        self._ranks_alone = self.is_remote
        try:
            return super()._sample_and_compute_gradients(*args, **kwargs)
        finally:
            self._ranks_alone = False

    def _replace_nonfinite(self, batch: SolutionBatch) -> None:
        fitness = batch.evals[:, 0].as_subclass(torch.Tensor)
        finite = fitness.isfinite()
        if bool(finite.all()):
            self.stalled_generations = 0
            return
        self.nonfinite_evals += int((~finite).sum())
        if bool(finite.any()):
            self.stalled_generations = 0
            worst = fitness[finite].max()
        else:
            # All alike: no direction is better than another. Searchers of ours do not move then (``stalled_generations``).
            self.stalled_generations += 1
            worst = fitness.new_tensor(torch.finfo(fitness.dtype).max ** 0.5)
        batch.set_evals(torch.where(finite, fitness, worst), batch.evals[:, 1:].as_subclass(torch.Tensor))

    def _report(self, batch: SolutionBatch) -> dict[str, float]:
        natural, certified = batch.evals[:, 1:].as_subclass(torch.Tensor).mean(0).tolist()
        status = {"eps": self.eps_at(self.generation), "certified": certified, "nonfinite_evals": self.nonfinite_evals}
        return status if np.isnan(natural) else {**status, "natural_loss": natural}

    def _fill(self, values: Tensor) -> None:
        """The first row starts at the module's own parameters, others at fresh draws of its layers' initialisation."""
        if self._module is None:  # an actor's: EvoTorch fills a population before it is sampled over
            values.zero_()
            return
        values[0] = flat_parameters(self._module).to(values)
        if len(values) > 1:
            module = copy.deepcopy(self._module)
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would move CUDA's generators too
                torch.default_generator.manual_seed(int(self.make_randint((), n=2**31)))
                for row in range(1, len(values)):
                    for child in module.modules():
                        if callable(reset := getattr(child, "reset_parameters", None)):
                            reset()
                    values[row] = flat_parameters(module).to(values)

    # Actors

    def seed(self, seed: int) -> None:
        """EvoTorch 0.6.1 seeds its actors by this name, which its own class does not have."""
        self.manual_seed(seed)

    def _parallelize(self) -> None:
        # Creating actors draws from the generator; the trajectory must not depend on whether there are any.
        state = None if self._generator is None else self._generator.get_state()
        with self._without_data():
            super()._parallelize()
        if state is not None:
            self._generator.set_state(state)

    @contextmanager
    def _without_data(self) -> Iterator[None]:
        """Actors are handed each minibatch and need neither the data set nor the user's own classes."""
        self._leave_behind = True
        try:
            yield
        finally:
            self._leave_behind = False

    @property
    def _nonserialized_attribs(self) -> list[str]:
        return ["_data", "_module", "_eps", "_minibatch"] if self._leave_behind else []

    def _make_sync_data_for_actors(self) -> Minibatch:
        return self._current_minibatch()

    def _use_sync_data_from_main(self, received: Minibatch) -> None:
        self._minibatch = received
