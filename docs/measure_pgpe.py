"""What makes PGPE better at equal wall time: the table of docs/results.md.

    python docs/measure_pgpe.py OUT [--seconds 30] [--seeds 0,1,2] [--jobs 2] [--bound ibp] [--only NAME ...]

Every variant is given the generations that it does in so many seconds of one thread (validations not counted), is searched
over its settings on the first seed by certified validation accuracy, and is then run on the others. OUT keeps the runs: the
same command goes on.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

PROBLEM = Path(__file__).parents[1] / "problems" / "mnist_tiny_pgpe.py"
SHORT = 100  # generations that a variant is timed on
RATES = [0.002, 0.005, 0.01, 0.02]
PLAIN = {"control_points": [0], "stdev_by_use": [0.0], "stdev_init": [0.003], "center_learning_rate": RATES}

# Settings in the place of PLAIN's, all combinations of which are searched.
VARIANTS = {
    "plain": {"stdev_init": [0.001, 0.003]},
    "no common random numbers": {},
    "orthogonal directions": {},
    "sigma by use": {"stdev_by_use": [0.25, 0.5], "stdev_init": [0.01]},
    "centered ranks": {"ranking_method": ["centered"]},
    "ClipUp": {"optimizer": ["clipup"], "center_learning_rate": [0.01, 0.03, 0.1, 0.3]},
    "256 members, 4 images": {"popsize": [256], "batch_size": [4]},
    "16 members, 64 images": {"popsize": [16], "batch_size": [64]},
    "control variate": {"control_points": [4], "stdev_init": [0.001, 0.003]},
    "control variate, sigma by use": {"control_points": [4], "stdev_by_use": [0.5], "stdev_init": [0.01]},
    "control variate, sigma by use, 16 members, 64 images": {
        "control_points": [4],
        "stdev_by_use": [0.5],
        "stdev_init": [0.01],
        "popsize": [16],
        "batch_size": [64],
    },
    "rgs": {"method": ["rgs"], "popsize": [2], "batch_size": [64]},
}


# What is no setting of evocert, as it did not win: changes to sampling or evaluation, made before evocert's command runs.


def orthogonal_directions():
    """Noise of a population that is orthogonal, each direction as long as if it had been drawn alone."""
    import torch

    from evocert.searchers import gaussian

    def fill(self, out, *, generator=None):
        source, unit = getattr(generator, "generator", generator), torch.ones_like(self.sigma)
        noise = gaussian.drawn(len(out) // 2, unit, self.mu, source)
        lengths = noise.norm(dim=1, keepdim=True)
        noise = torch.linalg.qr(noise.T).Q.T * lengths * self.sigma
        torch.add(self.mu, noise, out=out[0::2])
        torch.sub(self.mu, noise, out=out[1::2])

    gaussian.FixedSymmetricGaussian._fill = fill


def no_common_random_numbers():
    """The two members of a pair see other images."""
    import torch

    from evocert.problem import CertifiedTraining

    def evaluate(self, batch):
        first = self._current_minibatch()
        second = self.minibatch(self.generation + 2**20)._replace(eps=first.eps, natural=first.natural)
        values = batch.values.as_subclass(torch.Tensor)
        with torch.no_grad():
            halves = [self._columns(values[i::2], each).mean(1) for i, each in enumerate((first, second))]
        evals = torch.stack(halves, 1).flatten(0, 1)
        batch.set_evals(evals[:, 0], evals[:, 1:])

    CertifiedTraining._evaluate_batch = evaluate


CHANGES = {"no common random numbers": no_common_random_numbers, "orthogonal directions": orthogonal_directions}


def combinations(variant):
    settings = {**PLAIN, **VARIANTS[variant]}
    return [dict(zip(settings, values, strict=True)) for values in product(*settings.values())]


def trained(folder, variant, settings):
    """Seconds of generations, and certified validation and test accuracy in percent. A finished run is not run again."""
    if not (folder / "results.json").exists():
        what = ["resume", str(folder)]
        if not (folder / "checkpoint.pt").exists():
            shutil.rmtree(folder, ignore_errors=True)
            sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
            what = ["run", str(PROBLEM), "--run-dir", str(folder), *sets]
        command = [sys.executable, __file__, "--change", variant, shlex.join([*what, "--quiet"])]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    results = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    validation = [row["certified"] for row in rows if row["event"] == "validation"][-1]
    bound = json.loads((folder / "config.json").read_text())["bound"]
    seconds = sum(row["timing"]["seconds"] for row in rows if row["event"] == "generation")
    return seconds, 100 * validation, 100 * results["accuracy"]["certified"][bound]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--bound", default="ibp")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(VARIANTS):
        parser.error(f"--only {', '.join(unknown)}: allowed are {', '.join(VARIANTS)}")
    first, *others = map(int, arguments.seeds.split(","))
    arguments.out.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(arguments.jobs)

    def run(variant, index, seed, generations):
        settings = {"bound": arguments.bound, **combinations(variant)[index], "generations": generations}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{variant.replace(',', '').replace(' ', '_')}-{digest}-seed-{seed}"
        return trained(arguments.out / name, variant, {**settings, "seed": seed})

    timed = pool.map(lambda variant: run(variant, 0, first, SHORT)[0], arguments.only)
    rate = dict(zip(arguments.only, timed, strict=True))
    # A second call is to find the first one's runs, whose generations another timing would change.
    file = arguments.out / f"generations-{arguments.bound}-{arguments.seconds:g}-seconds.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    wanted = {name: int(round(arguments.seconds * SHORT / rate[name], -1)) for name in arguments.only}
    generations = {name: known.get(name, max(wanted[name], SHORT)) for name in arguments.only}
    file.write_text(json.dumps({**known, **generations}))

    cells = [(variant, index) for variant in arguments.only for index in range(len(combinations(variant)))]
    found = dict(zip(cells, pool.map(lambda cell: run(*cell, first, generations[cell[0]]), cells), strict=True))
    for variant, index in cells:
        print(f"{found[variant, index][1]:5.1f} {variant}: {combinations(variant)[index]}", flush=True)
    best = {
        variant: max((cell for cell in cells if cell[0] == variant), key=lambda cell: found[cell][1])[1]
        for variant in arguments.only
    }
    again = [(variant, seed) for variant in arguments.only for seed in others]
    more = dict(
        zip(
            again, pool.map(lambda cell: run(cell[0], best[cell[0]], cell[1], generations[cell[0]]), again), strict=True
        )
    )
    print("| variant | best settings | generations | seconds | validation, each seed | mean | test |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for variant in arguments.only:
        runs = [found[variant, best[variant]], *(more[variant, seed] for seed in others)]
        seconds, validation, test = zip(*runs, strict=True)
        spread = statistics.stdev(validation) if others else 0.0
        mine = combinations(variant)[best[variant]]
        changed = ", ".join(f"{key}={value}" for key, value in mine.items() if key != "control_points" or value)
        print(
            f"| {variant} | {changed} | {generations[variant]:,} | {statistics.mean(seconds):.0f} | "
            f"{', '.join(f'{value:.1f}' for value in validation)} | {statistics.mean(validation):.1f} ± {spread:.1f} | "
            f"{statistics.mean(test):.1f} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--change"]:
        from evocert.cli import main as evocert_command

        CHANGES.get(sys.argv[2], lambda: None)()
        sys.argv = ["evocert", *shlex.split(sys.argv[3])]
        evocert_command()
    else:
        main()
