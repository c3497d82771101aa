"""The bounds written for clarity: dense matrices, lower and upper ends, one network and one image at a time, float64.

A network is a list of steps. Each is bounded from below and from above by a linear function of the steps that it takes its
values from; of an affine layer the two are the same, and found by asking the module itself what it does to each unit vector.
Nothing here is taken from ``evocert.bounds``.
"""

import math
from dataclasses import dataclass

import torch
import zonotope_reference
from torch import Tensor, nn

from evocert.modules import Normalize, Residual
from evocert.networks import with_parameters

AFFINE = (Normalize, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.AvgPool2d, nn.ConstantPad2d, nn.Flatten)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)

# Where the intervals before activations come from, and which lower line is taken where there is a choice.
SETTINGS = {
    "ibp": ("propagated", "adaptive"),
    "crown-ibp": ("propagated", "adaptive"),
    "deeppoly": ("substituted", "adaptive"),
    "deeppoly-sparse": ("sparse", "adaptive"),
    "deeppoly-intersect": ("intersected", "adaptive"),
    "crown-zero": ("substituted", "zero"),
    "crown-one": ("substituted", "one"),
    "crown-same-slope": ("substituted", "same"),
    "deepz": ("substituted", "same"),
}
NAMES = (*SETTINGS, "hbox")


@torch.no_grad()
def margins(bound: str, module: nn.Module, lower: Tensor, upper: Tensor, label: int) -> tuple[Tensor, float]:
    """Lower bounds of logit[label] - logit[j] over one box ``[C, H, W]``, j rising, and the distance from the next tie.

    A tie is where a bound jumps: where another line would be chosen if an interval were a little different. Close to one
    rounding decides, and two implementations may differ by more than rounding.
    """
    if bound == "hbox":
        found = zonotope_reference.Hybrid(module, lower, upper)
        return found.margins(label), found.closest
    reference = Reference(module, lower, upper, *SETTINGS[bound])
    if bound == "ibp":
        return reference.propagated_margins(label), math.inf  # it never jumps
    found = reference.substituted_margins(label)
    if bound == "deeppoly-intersect":
        found = torch.maximum(found, Reference(module, lower, upper, *SETTINGS["ibp"]).propagated_margins(label))
    return found, reference.closest


def nearest_tie(bound: str, module: nn.Module, parameters: Tensor, box: tuple[Tensor, Tensor], labels: Tensor) -> float:
    """The distance from the next tie of any of some members ``[P, D]`` and images ``[B, ...]``."""
    distances = [
        margins(bound, with_parameters(module.double(), member.double()), low, high, label)[1]
        for member in parameters
        for low, high, label in zip(*box, labels.tolist(), strict=True)
    ]
    return min(distances)


@dataclass
class Step:
    """Values, as linear functions of those of other steps: ``matrix @ values + offset`` for each side.

    ``lower`` and ``upper`` are what an interval of the step before gives.
    """

    sources: tuple[int, ...]
    below: tuple[Tensor, Tensor]
    above: tuple[Tensor, Tensor]
    lower: Tensor
    upper: Tensor
    shape: tuple[int, ...]
    layer: nn.Module | None = None


class Reference:
    def __init__(self, module: nn.Module, lower: Tensor, upper: Tensor, intervals: str, slope: str) -> None:
        self.intervals, self.slope = intervals, slope
        self.closest = math.inf
        nothing = torch.zeros(0, dtype=torch.float64)
        low, high = lower.double().flatten(), upper.double().flatten()
        self.steps = [Step((), (nothing, nothing), (nothing, nothing), low, high, tuple(lower.shape))]
        self.last = self.follow(module.double().eval(), 0)

    # The network, step by step

    def follow(self, module: nn.Module, source: int) -> int:
        """Adds what a module does to the values of a step; returns the step of its outputs."""
        if isinstance(module, nn.Sequential):
            for child in module:
                source = self.follow(child, source)
            return source
        if isinstance(module, NOTHING):
            return source
        if isinstance(module, Residual):
            return self.sum(self.follow(module.body, source), self.follow(module.shortcut, source))
        if isinstance(module, AFFINE):
            return self.affine(module, source)
        if isinstance(module, nn.MaxPool2d):
            return self.max_pool(module, source)
        return self.activation(module, source)

    def add(self, *step) -> int:
        self.steps.append(Step(*step))
        return len(self.steps) - 1

    def affine(self, layer: nn.Module, source: int) -> int:
        before = self.steps[source]
        size = len(before.lower)
        offset = layer(torch.zeros(1, *before.shape, dtype=torch.float64))
        units = torch.eye(size, dtype=torch.float64).reshape(size, *before.shape)
        matrix = (layer(units) - offset).reshape(size, -1).T
        line = matrix, offset.flatten()
        ends = interval(*line, before.lower, before.upper)
        return self.add((source,), line, line, *ends, tuple(offset.shape[1:]), layer)

    def sum(self, one: int, other: int) -> int:
        first, second = self.steps[one], self.steps[other]
        size = len(first.lower)
        line = torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        ends = first.lower + second.lower, first.upper + second.upper
        return self.add((one, other), line, line, *ends, first.shape)

    def activation(self, layer: nn.Module, source: int) -> int:
        lower, upper = self.before(layer, source)
        each = [self.lines(layer, low, high) for low, high in zip(lower.tolist(), upper.tolist(), strict=True)]
        below_slope, below_offset, above_slope, above_offset = torch.tensor(each, dtype=torch.float64).T
        below, above = (below_slope.diag(), below_offset), (above_slope.diag(), above_offset)
        return self.add((source,), below, above, layer(lower), layer(upper), self.steps[source].shape)

    # Intervals

    def before(self, layer: nn.Module, source: int) -> tuple[Tensor, Tensor]:
        """The interval that an activation's lines are made for."""
        step = self.steps[source]
        if self.intervals == "propagated":
            return step.lower, step.upper
        units = torch.eye(len(step.lower), dtype=torch.float64)
        lower, upper = self.substituted(source, units), -self.substituted(source, -units)
        if self.intervals == "intersected":
            return torch.maximum(lower, step.lower), torch.minimum(upper, step.upper)
        if self.intervals == "sparse":
            keep = torch.tensor(
                [self.decided(layer, *ends) for ends in zip(step.lower.tolist(), step.upper.tolist(), strict=True)]
            )
            return torch.where(keep, step.lower, lower), torch.where(keep, step.upper, upper)
        return lower, upper

    def substituted(self, at: int, rows: Tensor) -> Tensor:
        """The least values of ``rows @ values`` of a step, ``[R]``: all steps before it by their lines, then the box."""
        terms, constant = {at: rows}, torch.zeros(len(rows), dtype=torch.float64)
        for number in range(at, 0, -1):
            if number not in terms:
                continue
            row, step = terms.pop(number), self.steps[number]
            positive, negative = row.clamp(min=0), row.clamp(max=0)
            constant += positive @ step.below[1] + negative @ step.above[1]
            for source in step.sources:
                terms[source] = terms.get(source, 0) + positive @ step.below[0] + negative @ step.above[0]
        box = self.steps[0]
        return interval(terms[0], constant, box.lower, box.upper)[0]

    # Margins

    def differences(self, label: int) -> Tensor:
        units = torch.eye(len(self.steps[self.last].lower), dtype=torch.float64)
        return units[label] - units[[j for j in range(len(units)) if j != label]]

    def substituted_margins(self, label: int) -> Tensor:
        return self.substituted(self.last, self.differences(label))

    def propagated_margins(self, label: int) -> Tensor:
        """A linear last layer takes the differences into itself."""
        step, rows = self.steps[self.last], self.differences(label)
        if isinstance(step.layer, nn.Linear):
            before = self.steps[step.sources[0]]
            return interval(rows @ step.above[0], rows @ step.above[1], before.lower, before.upper)[0]
        return interval(rows, torch.zeros(len(rows), dtype=torch.float64), step.lower, step.upper)[0]

    # Lines

    def tie(self, distance: float) -> None:
        self.closest = min(self.closest, abs(distance))

    def decided(self, layer: nn.Module, low: float, high: float) -> bool:
        """Whether no tighter interval would change an activation's lines."""
        if isinstance(layer, nn.ReLU | nn.LeakyReLU):
            self.tie(low)
            self.tie(high)
            return low >= 0 or high <= 0
        if isinstance(layer, nn.Hardtanh):
            for end in (layer.min_val, layer.max_val):
                self.tie(low - end)
                self.tie(high - end)
            return high <= layer.min_val or low >= layer.max_val or (low >= layer.min_val and high <= layer.max_val)
        return False

    def lines(self, layer: nn.Module, low: float, high: float) -> tuple[float, float, float, float]:
        """Slope and offset of the line below and of that above an activation over [low, high]."""
        if isinstance(layer, nn.ReLU):
            return self.rectifier_lines(0.0, low, high)
        if isinstance(layer, nn.LeakyReLU):
            return self.rectifier_lines(layer.negative_slope, low, high)
        if isinstance(layer, nn.Hardtanh):
            return self.hardtanh_lines(layer.min_val, layer.max_val, low, high)
        if isinstance(layer, nn.Sigmoid):
            return self.s_lines(lambda x: 1 / (1 + math.exp(-x)), lambda x: 1 / (2 + 2 * math.cosh(x)), low, high)
        if isinstance(layer, nn.Tanh):
            return self.s_lines(math.tanh, lambda x: 1 / math.cosh(x) ** 2, low, high)
        raise TypeError(f"no lines for {layer}")

    def rectifier_lines(self, flat: float, low: float, high: float) -> tuple[float, float, float, float]:
        """Slope ``flat`` below zero, 1 above it. Over an interval that holds zero: the chord, and a line through zero."""
        if self.slope == "zero" and high > 1e-9:
            self.tie(low)
        if self.slope == "one" and low < -1e-9:
            self.tie(high)
        if low >= 0:
            return 1.0, 0.0, 1.0, 0.0
        if high <= 0:
            return flat, 0.0, flat, 0.0
        chord = (high - flat * low) / (high - low)
        if self.slope == "adaptive":
            self.tie(high + low)
        below = {"adaptive": 1.0 if high > -low else flat, "zero": flat, "one": 1.0, "same": chord}[self.slope]
        return below, 0.0, chord, high - chord * high

    def hardtanh_lines(self, bottom: float, top: float, low: float, high: float) -> tuple[float, float, float, float]:
        def value(x):
            return min(max(x, bottom), top)

        if self.slope in ("zero", "one"):
            for x in (low, high):
                self.tie(x - bottom)
                self.tie(x - top)
        if high <= bottom or low >= top:
            return 0.0, value(low), 0.0, value(low)
        if low >= bottom and high <= top:
            return 1.0, 0.0, 1.0, 0.0
        if self.slope == "same":
            chord = (value(high) - value(low)) / (high - low)
            apart = [value(x) - chord * x for x in (low, bottom, top, high) if low <= x <= high]
            return chord, min(apart), chord, max(apart)
        # Below, the mirror image of what is above.
        above = self.line_above_hardtanh(bottom, top, low, high)
        slope, offset = self.line_above_hardtanh(-top, -bottom, -high, -low)
        return slope, -offset, *above

    def line_above_hardtanh(self, bottom: float, top: float, low: float, high: float) -> tuple[float, float]:
        left = max(low, bottom)  # the function's value there
        if high < top:
            slope = (high - left) / (high - low)  # the chord
            return slope, left - slope * low
        # Beyond its corner (top, top) the function is flat: the constant, or the line from the left end through the corner.
        constant = {"zero": True, "one": False}.get(self.slope, high - top > top - low)
        if self.slope == "adaptive":
            self.tie((high - top) - (top - low))
        if constant:
            return 0.0, top
        slope = (top - left) / (top - low)
        return slope, left - slope * low

    def s_lines(self, function, derivative, low: float, high: float) -> tuple[float, float, float, float]:
        """Below through the left end, above through the right one: with the chord's slope where that is safe."""
        flattest = min(derivative(low), derivative(high))
        if self.slope == "same":
            return flattest, function(low) - flattest * low, flattest, function(high) - flattest * high
        chord = (function(high) - function(low)) / (high - low) if high - low > 1e-6 else flattest
        if high - low > 1e-9:
            self.tie(low)
            self.tie(high)
        below, above = chord if low > 0 else flattest, chord if high <= 0 else flattest
        return below, function(low) - below * low, above, function(high) - above * high

    def max_pool(self, layer: nn.MaxPool2d, source: int) -> int:
        """Below, the input with the greatest midpoint; above, the same raised over the others, or a constant."""
        (channels, height, width), (lower, upper) = self.steps[source].shape, self.before(layer, source)
        pairs = [
            value if isinstance(value, tuple) else (value, value)
            for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        ]
        outputs = layer(torch.zeros(1, channels, height, width, dtype=torch.float64)).shape[1:]
        below, above = ([torch.zeros(outputs.numel(), len(lower)), torch.zeros(outputs.numel())] for _ in range(2))
        below, above = ([part.double() for part in side] for side in (below, above))
        for output in range(outputs.numel()):
            channel, place = divmod(output, outputs[1] * outputs[2])
            inputs = [
                (channel * height + y) * width + x
                for y in taps(*(pair[0] for pair in pairs), place // outputs[2], height)
                for x in taps(*(pair[1] for pair in pairs), place % outputs[2], width)
            ]
            best = max(inputs, key=lambda i: (lower[i] + upper[i]).item())  # the first of equals
            rivals = [i for i in inputs if i != best]
            greatest = max(upper[i].item() for i in inputs)
            over = max([0.0, *((upper[i] - lower[best]).item() for i in rivals)])
            middle = (lower[best] + upper[best]).item() / 2
            below[0][output, best] = 1.0
            if middle + over < greatest:
                above[0][output, best], above[1][output] = 1.0, over
            else:
                above[1][output] = greatest
            if rivals and upper[best] - lower[best] > 1e-9:
                self.tie(middle + over - greatest)
            for i in rivals:
                if max(upper[best] - lower[best], upper[i] - lower[i]) > 1e-9:
                    self.tie(middle - (lower[i] + upper[i]).item() / 2)
        ends = (layer(end.reshape(1, channels, height, width)).flatten() for end in (lower, upper))
        return self.add((source,), tuple(below), tuple(above), *ends, tuple(outputs))


def taps(kernel: int, stride: int, padding: int, dilation: int, position: int, size: int) -> list[int]:
    """Which places of a map a pooling sees from a position, along one axis."""
    places = [position * stride - padding + dilation * tap for tap in range(kernel)]
    return [place for place in places if 0 <= place < size]


def interval(matrix: Tensor, offset: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = matrix.clamp(min=0), matrix.clamp(max=0)
    return positive @ lower + negative @ upper + offset, positive @ upper + negative @ lower + offset
