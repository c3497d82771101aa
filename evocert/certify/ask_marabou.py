"""Runs Marabou on one property: python ask_marabou.py ONNX VNNLIB RESULT TIMEOUT. Needs maraboupy and nothing of evocert."""

import sys
from pathlib import Path


def main(onnx: str, vnnlib: str, result: str, timeout: str) -> None:
    """Writes "unsat", "sat" with the inputs, or "unknown" to ``result``."""
    from maraboupy import Marabou

    network = Marabou.read_onnx(onnx)
    options = Marabou.createOptions(verbosity=0, timeoutInSeconds=max(1, int(float(timeout))))
    status, values, statistics = network.solve(verbose=False, options=options, propertyFilename=vnnlib)
    if statistics.hasTimedOut():
        text = "timeout\n"
    elif status == "sat":
        inputs = [values[int(i)] for i in network.inputVars[0].flatten()]
        text = "sat\n" + "\n".join(f"(X_{i} {value!r})" for i, value in enumerate(inputs)) + "\n"
    else:
        text = f"{status}\n" if status in ("unsat", "unknown") else "unknown\n"
    Path(result).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
