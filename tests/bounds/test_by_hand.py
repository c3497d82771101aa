"""Bounds of networks that are small enough to work them out on paper."""

import pytest
import torch
from torch import nn

from evocert.bounds import BOUNDS, Box, box_around, read_network
from evocert.modules import Residual
from evocert.networks import flat_parameters

DTYPES = [torch.float32, torch.float64]


def linear(weight, bias):
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight, dtype=torch.float64))
        layer.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return layer


def margins(bound, module, lower, upper, labels=(0, 1), dtype=torch.float64):
    """Of one image, given as nested lists, for each label: ``[labels][M]``."""
    box = Box(*(torch.tensor(end, dtype=dtype).expand(len(labels), -1, -1, -1) for end in (lower, upper)))
    parameters = flat_parameters(module).unsqueeze(0).to(dtype)
    network = read_network(module, tuple(box.lower.shape[1:]))
    return BOUNDS[bound](network, parameters, box, torch.tensor(labels))[0].detach()


def assert_are(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
class TestIntervals:
    """Two pixels; hidden h1 = x1 - x2, h2 = 2 x2 - 3 (dead), h3 = x1 + x2 + 1 (always on); logits (h1 + h3, 2 h1, h2)."""

    module = nn.Sequential(
        nn.Flatten(),
        linear([[1, -1], [0, 2], [1, 1]], [0, -3, 1]),
        nn.ReLU(),
        linear([[1, 0, 1], [2, 0, 0], [0, 1, 0]], [0, 0, 0]),
    )

    def test_a_box(self, dtype):
        # x1 in [.375, .625], x2 in [.125, .375]: h1 in [0, .5], h2 in [-2.75, -2.25] -> 0, h3 in [1.5, 2]
        # logit0 - logit1 = h3 - h1 >= 1.5 - .5; logit0 - logit2 = h1 + h3 - h2 >= 1.5
        # logit1 - logit0 = h1 - h3 >= 0 - 2; logit1 - logit2 = 2 h1 - h2 >= 0
        found = margins("ibp", self.module, [[[0.375, 0.125]]], [[[0.625, 0.375]]], dtype=dtype)
        assert_are(found, [[1.0, 1.5], [-2.0, 0.0]])

    @pytest.mark.parametrize("bound", [name for name in BOUNDS if name not in ("ibp", "deeppoly-intersect")])
    def test_nothing_is_lost_where_all_neurons_are_decided(self, bound, dtype):
        # logit0 - logit1 = h3 - h1 = 2 x2 + 1; logit0 - logit2 = h1 + h3 = 2 x1 + 1;
        # logit1 - logit0 = h1 - h3 = -2 x2 - 1; logit1 - logit2 = 2 h1 = 2 x1 - 2 x2
        found = margins(bound, self.module, [[[0.375, 0.125]]], [[[0.625, 0.375]]], dtype=dtype)
        assert_are(found, [[1.25, 1.75], [-1.75, 0.0]])

    def test_a_box_cut_by_the_pixels_range(self, dtype):
        box = box_around(torch.tensor([0.875, 0.125], dtype=dtype).reshape(1, 1, 1, 2), 0.25)
        assert_are(box.lower.flatten(), [0.625, 0.0])
        assert_are(box.upper.flatten(), [1.0, 0.375])
        # h1 in [.25, 1], h3 in [1.625, 2.375]
        found = margins("ibp", self.module, box.lower[0].tolist(), box.upper[0].tolist(), labels=[0], dtype=dtype)
        assert_are(found, [[0.625, 1.875]])


# Of TestBackSubstitution, for each label.
# c by intervals: [0 - 2 + 1, 3/2 - 0 + 1] = [-1, 5/2]. Back-substituted: at least a - b + 1 = 2 x2 - 1/2 >= -1/2, at most
# 3/4 (x1 + x2) - b + 1 = -1/4 x1 + 7/4 x2 <= 7/4.
TWO_LAYERS = {
    # relu(c) >= 0 and relu(b) <= 2;   relu(b) >= 0 and relu(c) <= 5/2
    "ibp": (-2, -5 / 2),
    # relu(c) >= c >= 2 x2 - 1/2, minus b: 3 x2 - x1 - 3/2
    # relu(c) <= 5/7 (c + 1) <= 5/7 (7/4 x2 - 1/4 x1 + 1): b minus that is 33/28 x1 - 63/28 x2 + 8/28
    "crown-ibp": (-5 / 2, -55 / 28),
    # relu(c) <= 7/9 (c + 1/2): b minus that is 43/36 x1 - 85/36 x2 + 22/36
    "deeppoly": (-5 / 2, -63 / 36),
    "deeppoly-sparse": (-5 / 2, -63 / 36),  # c is undecided
    "deeppoly-intersect": (-2, -63 / 36),  # the better of DeepPoly's and IBP's
    # relu(a) >= 0, so c >= x2 - x1 >= -1; relu(c) >= 0: -b = x2 - x1 - 1
    # relu(c) <= 7/11 (c + 1): b minus that is 51/44 x1 - 93/44 x2 + 16/44
    "crown-zero": (-2, -77 / 44),
    "crown-one": (-5 / 2, -63 / 36),  # DeepPoly's choices
    # relu(a) >= 3/4 a, so c >= -1/4 x1 + 7/4 x2 - 3/8 >= -5/8; relu(c) >= 14/19 c: minus b, at x = (1, 0)
    # relu(c) <= 14/19 (c + 5/8): b minus that, at x = (0, 1)
    "crown-same-slope": (-14 / 19 * 5 / 8 - 2, -14 / 19 * (7 / 4 + 5 / 8)),
    "deepz": (-14 / 19 * 5 / 8 - 2, -14 / 19 * (7 / 4 + 5 / 8)),
    # relu(a) = 3/4 +- 3/4, its own; b is kept: c = 3/4 +- 3/4 - (x1 - x2) in [-1, 5/2], and relu(c) = 5/4 +- 5/4
    "hbox": (-2, -5 / 2),
}


class TestBackSubstitution:
    """Two pixels in [0, 1]; a = x1 + x2 - 1/2 in [-1/2, 3/2], b = x1 - x2 + 1 in [0, 2], c = relu(a) - relu(b) + 1.

    relu(b) is b. relu(a) is at most 3/4 a + 3/8 = 3/4 (x1 + x2), and at least a (for slopes "adaptive" and "one").
    Logits are relu(c) and relu(b): by a third neuron of the second layer, which b passes unchanged.
    """

    module = nn.Sequential(
        nn.Flatten(),
        linear([[1, 1], [1, -1]], [-0.5, 1]),
        nn.ReLU(),
        linear([[1, -1], [0, 1]], [1, 0]),
        nn.ReLU(),
        linear([[1, 0], [0, 1]], [0, 0]),
    )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bound", TWO_LAYERS)
    def test_two_layers(self, bound, dtype):
        """For one label each of IBP and DeepPoly is tighter than the other; slope zero is tightest, and the true ones -3/2."""
        found = margins(bound, self.module, [[[0.0, 0.0]]], [[[1.0, 1.0]]], dtype=dtype)
        assert_are(found, [[value] for value in TWO_LAYERS[bound]])

    def test_optimised_slopes_find_the_better_of_slopes_zero_and_one(self):
        first, second = margins("alpha-crown", self.module, [[[0.0, 0.0]]], [[[1.0, 1.0]]]).flatten().tolist()
        # relu(c) >= s c, with DeepPoly's interval of c: s (2 x2 - 1/2) - b = (2 s + 1) x2 - x1 - 1 - s / 2 >= -2 - s / 2
        assert first == pytest.approx(-2)
        assert second == pytest.approx(-63 / 36)

    def test_a_row_that_one_layer_decides_is_kept_by_the_sparse_form(self):
        """d = relu(a) + 1/10 is positive by intervals; back-substituted it is only at least a + 1/10 >= -4/10."""
        head = [nn.ReLU(), linear([[1, 0], [0, 1]], [0, 0])]
        module = nn.Sequential(*self.module[:3], linear([[1, 0], [0, 1]], [0.1, 0]), *head)
        # relu(b) - relu(d): b - 3/4 (x1 + x2) - 1/10 = 1/4 x1 - 7/4 x2 + 9/10, at x = (0, 1)
        found = margins("deeppoly-sparse", module, [[[0.0, 0.0]]], [[[1.0, 1.0]]], labels=[1])
        assert_are(found, [[-0.85]])
        # relu(d) <= 8/10 (d + 4/10): b - 6/10 (x1 + x2) - 4/10 = 4/10 x1 - 16/10 x2 + 6/10
        found = margins("deeppoly", module, [[[0.0, 0.0]]], [[[1.0, 1.0]]], labels=[1])
        assert_are(found, [[-1.0]])


class TestOtherLayers:
    @pytest.mark.parametrize("bound", BOUNDS)
    def test_a_residual_block_that_undoes_its_input(self, bound):
        """x + (1/2 - x) is 1/2, which intervals do not see: they give [-1/2, 3/2] for x in [0, 1]."""
        module = nn.Sequential(
            nn.Flatten(), Residual(linear([[-1, 0], [0, -1]], [0.5, 0.5])), nn.ReLU(), linear([[1, 0], [0, 1]], [2, 0])
        )
        expected = {
            "ibp": [[0.5], [-3.5]],  # 2 + relu - relu, each in [0, 3/2]
            "crown-ibp": [[1.75], [-2.25]],  # each at least 1/2 and at most 3/4 (1/2 + 1/2)
        }
        found = margins(bound, module, [[[0.0, 0.0]]], [[[1.0, 1.0]]])
        assert_are(found, expected.get(bound, [[2.0], [-2.0]]))

    @pytest.mark.parametrize("bound", [name for name in BOUNDS if name not in ("ibp", "hbox")])
    @pytest.mark.parametrize(
        ("lower", "upper", "expected"),
        [
            # One wins everywhere: the maximum is it.
            ([0.6, 0.2, 0, 0], [1, 0.5, 0.1, 0.2], (0.0, 0.0)),
            # a in [.2, 1] has the greatest midpoint, .6; the others are at most .4: max <= a + .2, and max >= a.
            ([0.2, 0.1, 0, 0], [1, 0.4, 0.1, 0.1], (0.0, -0.2)),
            # Nearly level, a in [0, 1] and others at most .7: a + .7 would enclose more than the constant 1.
            ([0.0, 0.2, 0, 0], [1, 0.7, 0.1, 0.1], (0.0, -1.0)),
        ],
    )
    def test_maximum_pooling(self, bound, lower, upper, expected):
        """Logits are the maximum of four pixels, and the first of them, a."""
        body = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), linear([[1], [0]], [0, 0]))
        shortcut = nn.Sequential(nn.Flatten(), linear([[0, 0, 0, 0], [1, 0, 0, 0]], [0, 0]))
        module = nn.Sequential(Residual(body, shortcut), linear([[1, 0], [0, 1]], [0, 0]))
        ends = [torch.tensor(end).reshape(1, 2, 2).tolist() for end in (lower, upper)]
        assert_are(margins(bound, module, *ends).double(), [[value] for value in expected])
        # Intervals, and hybrid zonotopes, forget in the pooling that a is one of the four.
        ends = torch.tensor(lower), torch.tensor(upper)
        apart = [[(ends[0].max() - ends[1][0]).item()], [(ends[0][0] - ends[1].max()).item()]]
        for loose in ("ibp", "hbox"):
            assert_are(margins(loose, module, *(end.reshape(1, 2, 2).tolist() for end in ends)).double(), apart)

    @pytest.mark.parametrize("bound", BOUNDS)
    def test_a_convolution_and_an_average_that_see_their_padding(self, bound):
        """3 x 3 pixels in [0, 1]: a window at a corner holds 4 of them, and their average is over 4 or 9."""
        for count, share in ((True, 1 / 9), (False, 1 / 4)):
            sum_up = nn.Conv2d(1, 1, 3, padding=1)
            pool = nn.AvgPool2d(3, 1, 1, count_include_pad=count)
            with torch.no_grad():
                sum_up.weight.fill_(1.0)
                sum_up.bias.fill_(-5.0)
            corner = linear([[1] + [0] * 8, [0] * 9], [0, 0])
            module = nn.Sequential(pool, nn.Flatten(), corner)
            ends = torch.zeros(1, 3, 3).tolist(), torch.ones(1, 3, 3).tolist()
            assert_are(margins(bound, module, *ends), [[0.0], [-4 * share]])
            # At the corner sums are at most 4 - 5.
            module = nn.Sequential(sum_up, nn.ReLU(), nn.Flatten(), corner)
            assert_are(margins(bound, module, *ends), [[0.0], [0.0]])
