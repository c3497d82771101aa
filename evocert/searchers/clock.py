"""Where the time of a step goes."""

import time

import torch


class Clock:
    """Laps in seconds. On CUDA a lap waits for the work that was launched in it."""

    def __init__(self, device: torch.device | str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._last = time.perf_counter()

    def lap(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        start, self._last = self._last, time.perf_counter()
        return self._last - start
