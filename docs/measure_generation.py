"""What a generation costs: time by part, peak memory, and the ratio to EvoTorch's own PGPE. The tables of performance.md.

python docs/measure_generation.py --width 16 --popsize 256 --batch 512 --budget 2GiB
"""

import argparse
import os
import resource
import statistics
import time
import warnings

warnings.simplefilter("ignore")
os.environ["EVOTORCH_VERBOSE_LEVEL"] = "0"

import torch  # noqa: E402
from evotorch import SolutionBatch  # noqa: E402
from evotorch.algorithms import PGPE as EvoTorchPGPE  # noqa: E402, N811

import evocert  # noqa: E402
from evocert.bounds import give_threads_to_tiles, worker_count  # noqa: E402
from evocert.data import Part  # noqa: E402
from evocert.searchers import PGPE  # noqa: E402


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="cnn3")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=28, help="images are [1, size, size]")
    parser.add_argument("--popsize", type=int, default=256)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--budget", default="2GiB")
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--searcher-only", action="store_true", help="sampling and gradient alone, against EvoTorch's")
    options = parser.parse_args()

    shape = (1, options.size, options.size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2048, *shape), generator=generator, dtype=torch.uint8)
    data = Part(images, torch.randint(0, 10, (2048,), generator=generator), torch.arange(2048), 255.0)
    torch.manual_seed(0)
    module = getattr(evocert, options.network)(shape, 10, mean=[0.1307], std=[0.3081], width=options.width)
    problem = evocert.CertifiedTraining(
        module, data, eps=0.1, batch_size=options.batch, memory_budget=options.budget, natural_every=0
    )
    settings = {"popsize": options.popsize, "center_learning_rate": 0.01, "stdev_init": 0.01}
    dimensions = problem.solution_length
    print(f"{options.network} width {options.width}, D = {dimensions}, P = {options.popsize}, B = {options.batch}")
    print(problem.tile)
    print(f"torch {torch.__version__}, {worker_count()} threads")

    if options.searcher_only:
        theirs = EvoTorchPGPE(problem, **settings, stdev_learning_rate=0.0, optimizer="adam", ranking_method="raw")
        ours = PGPE(problem, **settings)
        for name, searcher in (
            ("EvoTorch 0.6.1", theirs),
            ("evocert", ours),
            ("EvoTorch 0.6.1", theirs),
            ("evocert", ours),
        ):
            batch = SolutionBatch(problem, options.popsize, empty=True)
            losses = torch.randn(options.popsize)
            sample, gradient = [], []
            for _ in range(options.generations):
                start = time.perf_counter()
                searcher._distribution.sample(out=batch.access_values(), generator=problem)
                middle = time.perf_counter()
                searcher._distribution.compute_gradients(
                    batch.access_values(), losses, objective_sense="min", ranking_method="raw"
                )
                sample.append(middle - start)
                gradient.append(time.perf_counter() - middle)
            print(f"{name:15s} sample {statistics.median(sample):.3f} s  gradient {statistics.median(gradient):.4f} s")
        return

    give_threads_to_tiles()
    searcher = PGPE(problem, **settings)
    population = 4 * options.popsize * dimensions / 2**20
    before = peak_mib()
    parts: dict[str, list[float]] = {"sample": [], "bounds": [], "update": []}
    for generation in range(options.generations + 1):
        searcher.step()
        if generation:  # the first has nothing to update by, and warms up
            for key, values in parts.items():
                values.append(searcher.timing[key])
    medians = {key: statistics.median(values) for key, values in parts.items()}
    pairs = options.popsize * options.batch
    print("  ".join(f"{key} {value:.3f} s" for key, value in medians.items()))
    print(f"{pairs / sum(medians.values()):,.0f} network-images per second")
    print(
        f"peak memory above the level before the first generation: {peak_mib() - before:.0f} MiB, of which the population"
    )
    print(f"is {population:.0f} MiB and its noise, while it is drawn, {population / 2:.0f} MiB")


if __name__ == "__main__":
    main()
