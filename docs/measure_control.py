"""How much of what noise does to the loss a few gradients predict: the table of docs/method.md.

    python docs/measure_control.py RUN [--bound NAME] [--sigma 0.003,0.03] [--points 0,2,8,128] [--pairs 256]

RUN is the folder of a finished run, whose network, data, minibatch size and eps are taken.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from evocert import parts
from evocert.problem_files import load_problem
from evocert.runs import Run


def explained(problem, centre, sigma, points, pairs):
    """The share of the variance of (L(mu + d) - L(mu - d)) / 2 that the mean gradient at some points accounts for.

    ``points``: how many, in antithetic pairs with noise of their own; 0: the centre itself.
    """
    noise = sigma * torch.randn(pairs, len(centre))
    with torch.no_grad():
        ends = [torch.cat([problem.losses(some, 0) for some in (centre + side * noise).split(64)]) for side in (1, -1)]
    differences = (ends[0] - ends[1]) / 2
    where = sigma * torch.randn(max(points // 2, 1), len(centre)) * (points > 0)
    _, gradients = problem.value_and_gradient(torch.cat((centre + where, centre - where)), 0)
    predicted = noise @ gradients.mean(0)
    coefficient = (differences @ predicted) / (predicted @ predicted)
    left = differences - coefficient * predicted
    return 1 - float(left.square().sum() / differences.square().sum()), float(coefficient)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--bound")
    parser.add_argument("--sigma", default="0.003,0.03")
    parser.add_argument("--points", default="0,2,8,128")
    parser.add_argument("--pairs", type=int, default=256)
    arguments = parser.parse_args()

    config = Run(arguments.run).read_config()
    loaded = load_problem(arguments.run / "problem.py", config["overrides"], original=Path(config["problem_path"]))
    experiment = dataclasses.replace(
        loaded.experiment,
        init_from=str(arguments.run),
        stages=(),
        bound=arguments.bound or config["bound"],
        method="grad",
    )
    built = parts.build(dataclasses.replace(experiment, eps_schedule=type(experiment.eps_schedule)()))
    centre = built.problem.generate_values(1)[0].as_subclass(torch.Tensor).clone()
    torch.manual_seed(0)
    print("| bound | sigma | gradients at | explained | coefficient |\n| --- | --- | --- | --- | --- |")
    for sigma in map(float, arguments.sigma.split(",")):
        for points in map(int, arguments.points.split(",")):
            share, coefficient = explained(built.problem, centre, sigma, points, arguments.pairs)
            place = f"{points} points" if points else "the centre"
            print(f"| {experiment.bound} | {sigma:g} | {place} | {share:.3f} | {coefficient:.2f} |", flush=True)


if __name__ == "__main__":
    main()
