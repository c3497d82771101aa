"""The exact stage: every margin that no bound has decided, by branch and bound or by a mixed-integer linear program."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from evocert.bounds import backward, deeppoly
from evocert.bounds.margins import class_pairs
from evocert.bounds.network import Box, Members
from evocert.certify.branch import Search
from evocert.certify.milp import Milp
from evocert.certify.verdict import ROUNDING, Deadline, Outcome

# With so few open neurons the program is asked first; it is then solved in well under a second.
PROGRAM_FIRST = 24
# Seconds of branch and bound before the program is asked, and the part of what is left that the program may take. Measured on
# CNN3 w=16 near its limit (MNIST, eps 0.13, some 1,500 open neurons): branch and bound finds counterexamples within 0.1 s,
# where the program finds none in 30 s, and proves easy margins as fast; other margins, which need thousands of domains, the
# program proves in 1 to 4 s.
SEARCH_FIRST = 2.0
PROGRAM_SHARE = 0.5


def takes(members: Members) -> bool:
    """Whether the exact stage can decide anything about a network: its activations are ReLUs or leaky ones."""
    return Milp.takes(members)


@torch.no_grad()
def decide(members: Members, box: Box, label: int, deadline: Deadline, replay: Callable[[Tensor], bool]) -> Outcome:
    """Whether a network gives the label in a whole box.

    Args:
        members: one network, in float64, that ``takes``.
        box: one box ``[1, C, H, W]``, float64.
        label: the class.
        deadline: when to stop.
        replay: whether a point ``[C, H, W]`` of the box really breaks the network.

    Returns:
        "certified", "attacked" with the replayed point, or "undecided".
    """
    labels = torch.tensor([label])
    root = deeppoly.relaxing(members, box, intersect=True)
    lower = backward.margins(members, box, labels, root)[0, 0]  # [M]
    rivals = class_pairs(members.network.num_classes, lower.device).rivals[label]
    intervals = {node: relaxed.interval for node, relaxed in root.relaxations.items()}

    @cache
    def program() -> Milp | None:
        try:
            return Milp(members, box, intervals)
        except MemoryError:  # too large to be written out
            return None

    undecided = False
    for place in lower.argsort().tolist():  # the weakest first: a counterexample is likeliest there
        if lower[place] > ROUNDING:
            continue
        outcome = _margin(Search(members, box, label, int(rivals[place]), root, program), deadline)
        if outcome.verdict == "attacked" and outcome.point is not None and replay(outcome.point):
            return outcome
        undecided |= outcome.verdict != "certified"
    return Outcome("undecided" if undecided else "certified")


def _margin(search: Search, deadline: Deadline) -> Outcome:
    """One margin: what is likely to be fastest first, then the other, then the first again."""
    if search.open <= PROGRAM_FIRST:
        outcome = search.programmed(deadline)
        return outcome if outcome.verdict != "undecided" else _searched(search, deadline)
    outcome = _searched(search, deadline.within(SEARCH_FIRST))
    if outcome.verdict == "undecided":
        outcome = search.programmed(deadline.within(PROGRAM_SHARE * deadline.left))
    return outcome if outcome.verdict != "undecided" else _searched(search, deadline)


def _searched(search: Search, deadline: Deadline) -> Outcome:
    with torch.enable_grad():
        return search.decide(deadline)
