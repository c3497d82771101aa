"""Copies what is small of finished runs to runs/reference/: how the folders there were made.

    python docs/keep_reference.py SWEEP... [--to runs/reference] [--metrics-of-seed 0]

Checkpoints, the list of the split and certify's record of each image stay behind, metrics of most seeds too, and the problem
file, which stands in problems/. Paths of the machine are cut to what is below the repository.
"""

import argparse
import json
import shutil
from pathlib import Path

KEPT = ("results.json", "certify.json", "environment.json", "network.onnx")


def keep(run, to, with_metrics):
    to.mkdir(parents=True, exist_ok=True)
    for name in (*KEPT, *(["metrics.jsonl"] if with_metrics else [])):
        if (run / name).exists():
            shutil.copy(run / name, to / name)
    config = json.loads((run / "config.json").read_text())
    config["problem_path"] = config["problem_file"] = f"problems/{Path(config['problem_path']).name}"
    config["data_dir"] = None
    if (to / "certify.json").exists():
        certify = json.loads((to / "certify.json").read_text())
        certify["settings"]["network"] = f"{config['problem']} (runs/{run.parent.name}/{run.name})"
        (to / "certify.json").write_text(json.dumps(certify, indent=1) + "\n")
    for key in ("init_from", "data_path"):
        if config[key] is not None:
            raise SystemExit(f"{run}: {key}={config[key]} is a path that this script does not cut")
    (to / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP")
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[1] / "runs" / "reference")
    parser.add_argument("--metrics-of-seed", type=int, default=0)
    arguments = parser.parse_args()
    for sweep in arguments.sweeps:
        to = arguments.to / sweep.resolve().name
        runs = [path.parent for path in sorted(sweep.glob("*/results.json"))]
        for run in runs:
            seed = json.loads((run / "config.json").read_text())["seed"]
            keep(run, to / run.name, seed == arguments.metrics_of_seed)
        # What marks a folder of runs for evocert compare: the cells and their settings.
        content = json.loads((sweep / "sweep.json").read_text())
        content["cells"] = {name: content["cells"][name] for name in content["cells"] if (to / name).is_dir()}
        (to / "sweep.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"{to}: {len(runs)} runs")


if __name__ == "__main__":
    main()
