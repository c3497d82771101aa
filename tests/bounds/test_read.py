"""Reading a module: what is read gives the module's outputs, and what is not supported is refused by name and place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evocert.bounds import UnsupportedLayer, read_network
from evocert.modules import Normalize, Residual
from evocert.networks import flat_parameters

SHAPE = (2, 6, 5)


class Module(nn.Module):
    """Layers for the forwards below, defined in another order than they run in."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(8, 3)
        self.middle = nn.Linear(8, 8)
        self.first = nn.Linear(3 * 4 * 3, 8)
        self.same = nn.Conv2d(2, 2, 3, padding=1)
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = Normalize([0.2, 0.4], [0.5, 0.3])
        self.bn = nn.BatchNorm2d(3)
        self.bn.running_mean.uniform_()
        self.bn.running_var.uniform_(0.5, 2)
        self.stateless = nn.BatchNorm2d(3, track_running_stats=False)
        self.pool = nn.AvgPool2d((2, 1), stride=(1, 2), padding=(1, 0))
        self.few = nn.Linear(3 * 4 * 1, 8)
        self.pad = nn.ConstantPad2d((1, 0, 2, -1), 0.3)
        self.many = nn.Linear(3 * 5 * 4, 8)
        inner = Residual(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1)))
        self.block = Residual(nn.Sequential(inner, nn.Tanh()), nn.Conv2d(2, 2, 1))
        self.uneven = Residual(nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 1))
        self.odd = Residual(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Softmax2d()))
        self.weight = nn.Parameter(torch.randn(8, 8))
        self._run = forward

    def forward(self, x):
        return self._run(self, x)


def relu_flat(m, x):
    return m.last(m.first(F.relu(m.conv(m.norm(x))).flatten(1)))


SUPPORTED = {
    "another order than defined": relu_flat,
    "a layer used twice": lambda m, x: m.last(m.middle(m.middle(m.first(torch.flatten(m.conv(x), 1)).relu()).relu())),
    "functions in place": lambda m, x: m.last(
        F.relu(m.first(F.relu(m.conv(x), inplace=True).view(x.size(0), -1)).relu_())
    ),
    "view by size": lambda m, x: m.last(m.first((h := m.conv(x).relu()).view(h.size(0), -1))),
    "reshape by shape": lambda m, x: m.last(m.first((h := torch.relu(m.conv(x))).reshape(h.shape[0], -1))),
    "batch size of the input": lambda m, x: m.last(m.first(m.conv(x).view(x.size(0), -1))),
    "reshape by keyword": lambda m, x: m.last(m.first(m.conv(x).reshape(shape=(x.shape[0], -1)))),
    "reshape as a function": lambda m, x: m.last(m.first(torch.reshape(m.conv(x), (x.shape[0], -1)))),
    "relu6 by keyword": lambda m, x: m.last(F.relu6(input=m.first(m.conv(x).flatten(start_dim=1)))),
    "dropout by keyword": lambda m, x: m.last(F.dropout(m.first(m.conv(x).flatten(1)), training=False)),
    "view to a number": lambda m, x: m.last(m.first(m.conv(x).view(-1, 36))),
    "other activations": lambda m, x: m.last(torch.tanh(m.first(F.leaky_relu(m.conv(x), 0.3).flatten(1))).sigmoid()),
    "batch norm": lambda m, x: m.last(m.first(m.bn(m.conv(x)).flatten(1))),
    "pooling": lambda m, x: m.last(m.few(m.pool(F.max_pool2d(m.conv(x), 2, 1)).flatten(1))),
    "average pooling of what is there": lambda m, x: m.last(
        m.first(F.avg_pool2d(m.conv(x), 3, 1, 1, count_include_pad=False).flatten(1))
    ),
    "padding": lambda m, x: m.last(m.many(m.conv(m.pad(x)).flatten(1))),
    "clamp": lambda m, x: m.last(m.first(m.conv(x).flatten(1)).clamp(-0.1, max=0.2)),
    "residual": lambda m, x: relu_flat(m, m.block(x)),
    "hardtanh": lambda m, x: m.last(F.hardtanh(m.first(m.conv(x).flatten(1)), -0.1, 0.2)),
    "dropout as in eval": lambda m, x: m.last(F.dropout(m.first(m.conv(x).flatten(1)), 0.5, m.training)),
    "two layers of one kind": lambda m, x: relu_flat(m, m.same(x).relu()),
}


@pytest.mark.parametrize("forward", SUPPORTED.values(), ids=SUPPORTED.keys())
def test_gives_the_outputs_of_the_module(forward):
    module = Module(forward).double().eval()
    network = read_network(module, SHAPE)
    images = torch.rand(4, *SHAPE, dtype=torch.float64)
    for sign in (1, -1):  # of the parameters, in the order of module.parameters()
        torch.nn.utils.vector_to_parameters(sign * flat_parameters(module), module.parameters())
        found = network.logits(flat_parameters(module).unsqueeze(0), images)[0]
        torch.testing.assert_close(found, module(images).detach(), rtol=1e-10, atol=1e-10)


def test_reads_nested_sequences_and_leaves_the_module_alone():
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True)), nn.Flatten(), nn.Dropout(), nn.Linear(36, 2)
    )
    before = copy.deepcopy(module.state_dict())
    network = read_network(module, SHAPE)
    assert [layer.kind for layer in network.layers] == ["Conv2d", "Activation", "Flatten", "Linear"]
    assert [layer.place for layer in network.layers] == ["0.0", "0.1", "1", "3"]
    assert network.num_parameters == sum(p.numel() for p in module.parameters())
    assert module.training
    assert all(p.dtype == torch.float32 and p.requires_grad and p.grad is None for p in module.parameters())
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def two_outputs(m, x):
    logits = relu_flat(m, x)
    return logits, x


def branch(m, x):
    return relu_flat(m, x) if x.sum() > 0 else relu_flat(m, -x)


REFUSED = {
    "skip": (lambda m, x: relu_flat(m, x + m.same(x)), "add"),
    "skip of the input": (
        lambda m, x: relu_flat(m, m.same(x)) + x.flatten(1)[:, :3],
        "a connection that leaves the chain",
    ),
    "batch norm without statistics": (
        lambda m, x: m.last(m.first(m.stateless(m.conv(x)).flatten(1))),
        "BatchNorm2d at 'stateless'.*track_running_stats=False",
    ),
    "instance norm": (
        lambda m, x: m.last(m.first(F.instance_norm(m.conv(x)).flatten(1))),
        "instance_norm.*supported are .*Conv2d",
    ),
    "pooling with a ceiling": (lambda m, x: relu_flat(m, F.max_pool2d(x, 1, ceil_mode=True)), "ceil_mode=True"),
    "a mean by another number": (
        lambda m, x: relu_flat(m, F.avg_pool2d(x, 1, divisor_override=2)),
        "divisor_override=2",
    ),
    "a clamp with one end": (lambda m, x: m.last(m.first(m.conv(x).flatten(1)).clamp(min=0)), "clamp with one end"),
    "a residual block of two shapes": (lambda m, x: m.last(m.first(m.uneven(x).flatten(1))), "Residual at 'uneven'"),
    "a layer in a block": (lambda m, x: relu_flat(m, m.odd(x)), "Softmax2d at 'odd.body.1'"),
    "softmax": (lambda m, x: F.softmax(relu_flat(m, x), 1), "softmax"),
    "arithmetic": (lambda m, x: relu_flat(m, (x - 0.5) / 0.3), "sub"),
    "product": (lambda m, x: relu_flat(m, x * 2), "mul"),
    "a parameter of its own": (lambda m, x: m.last(m.first(m.conv(x).flatten(1)) @ m.weight), "direct use of 'weight'"),
    "two outputs": (two_outputs, "output that is not the last layer's"),
    "branches": (branch, "cannot be traced"),
    "another view": (lambda m, x: relu_flat(m, x.view(-1, 2, 5, 6).transpose(2, 3)), "view"),
    "view by another size": (lambda m, x: m.last(m.first((h := m.conv(x)).view(h.size(1), -1))), "size"),
    "half a flatten": (lambda m, x: m.last(m.first(m.conv(x).flatten(2).flatten(1))), "start_dim=1"),
    "linear on a map": (lambda m, x: m.last(m.same(x)), "Linear at 'last'"),
    "dropout by default in training": (lambda m, x: F.dropout(relu_flat(m, x), 0.0), "dropout"),
    "a flatten of everything": (lambda m, x: m.last(m.first(torch.flatten(m.conv(x)))), "Flatten at 'flatten'"),
    "view to two unknowns": (lambda m, x: m.last(m.first(m.conv(x).view(-1, -1))), "view"),
    "hardtanh upside down": (lambda m, x: F.hardtanh(relu_flat(m, x), 1.0, -1.0), "hardtanh at 'hardtanh'"),
    "a size as a number": (lambda m, x: F.leaky_relu(relu_flat(m, x), x.size(0)), "LeakyReLU at 'leaky_relu'"),
    "a result thrown away": (lambda m, x: (m.conv(x), relu_flat(m, x))[1], "a connection that leaves the chain"),
    "dropout in training": (lambda m, x: F.dropout(relu_flat(m, x), 0.5, True), "dropout"),
}


@pytest.mark.parametrize(("forward", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(forward, message):
    with pytest.raises(UnsupportedLayer, match=message) as refused:
        read_network(Module(forward), SHAPE)
    assert "\n" not in str(refused.value)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(60, 3)

    def forward(self, x, y):
        return self.linear(x.flatten(1))


class Restless(nn.Module):
    """Counts its calls, which tracing cannot see."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(60, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = x.flatten(1)
        return self.linear(x if self.calls == 1 else x.relu().tanh())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(60, 1)), r"\[1\] for one image: allowed are logits \[K\] of K >= 2"),
        (nn.Sequential(nn.Conv2d(2, 3, 3)), r"\[3, 4, 3\] for one image"),
        (nn.Sequential(nn.Flatten(), nn.Linear(61, 2)), r"Linear at '1' cannot take an input of shape \[60\]"),
        (nn.Sequential(nn.Conv2d(2, 3, 9), nn.Flatten(), nn.Linear(3, 2)), r"Conv2d at '0' cannot take an input"),
        (
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(90, 2)),
            "reflect",
        ),
        (nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(60, 2)), "start_dim=1"),
        (nn.Sequential(nn.Flatten(), nn.Linear(60, 4), nn.LeakyReLU(-0.5), nn.Linear(4, 2)), "negative_slope"),
        (nn.Sequential(nn.Flatten(), nn.Linear(60, 4), nn.GELU(), nn.Linear(4, 2)), "GELU at '2'"),
        (
            nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(60, 2))),
            "ParametrizedLinear at '1'",
        ),
        (nn.Sequential(nn.Flatten(), nn.Flatten(2), nn.Linear(60, 2)), r"Flatten at '1' cannot take .* \[60\]"),
        (nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Flatten(), nn.Linear(168, 2)), "ConvTranspose2d at '0'"),
        (nn.Sequential(nn.AdaptiveMaxPool2d((3, 2)), nn.Flatten(), nn.Linear(12, 2)), "AdaptiveMaxPool2d at '0'"),
        (nn.Sequential(nn.Conv1d(2, 3, 3)), "Conv1d at '0'"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), "cannot be copied"),
        (nn.Sequential(nn.Flatten(), nn.Linear(60, 2, device="meta")), "cannot be copied"),
        (nn.Flatten(), "no layer with weights"),
        (TwoInputs(), "TwoInputs: a second input 'y'"),
        (Restless(), "gives other outputs"),
    ],
)
def test_refuses_modules(module, message):
    with pytest.raises(UnsupportedLayer, match=message) as refused:
        read_network(module, SHAPE)
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_refuses_the_old_weight_norm():
    module = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(60, 3)))
    with pytest.raises(UnsupportedLayer, match="Linear at '1' cannot be copied"):
        read_network(module, SHAPE)


def test_refuses_a_normalisation_whose_radius_would_be_negative():
    module = nn.Sequential(Normalize([0.2, 0.4], [0.5, 0.3]), nn.Flatten(), nn.Linear(60, 3))
    module[0].std[1] = -0.3
    with pytest.raises(UnsupportedLayer, match="allowed is positive"):
        read_network(module, SHAPE)


def test_a_flatten_of_a_vector_is_nothing():
    """So that the margins can be folded into the linear layer before it."""
    network = read_network(nn.Sequential(nn.Flatten(), nn.Linear(60, 3), nn.Flatten()), SHAPE)
    assert [layer.kind for layer in network.layers] == ["Flatten", "Linear"]


@pytest.mark.parametrize("change", [lambda output: output[:, :2], lambda output: (output, output)])
def test_refuses_a_hook_that_changes_what_outputs_are(change):
    module = nn.Sequential(nn.Flatten(), nn.Linear(60, 3))
    module.register_forward_hook(lambda layer, inputs, output: change(output))
    with pytest.raises(UnsupportedLayer, match="gives other outputs"):
        read_network(module, SHAPE)


def test_refuses_a_layer_that_a_hook_changes():
    module = nn.Sequential(nn.Flatten(), nn.Linear(60, 3))
    module[1].register_forward_hook(lambda layer, inputs, output: output * 2)
    with pytest.raises(UnsupportedLayer, match="gives other outputs"):
        read_network(module, SHAPE)


def flat(*chain, features=60):
    return nn.Sequential(*chain, nn.Flatten(), nn.Linear(features, 3))


class Block(nn.Module):
    """A body of its own kind."""

    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self._run = forward

    def forward(self, x):
        return self._run(self, x)


class TestResidual:
    def test_layers_are_named_by_their_place(self):
        inner = Residual(nn.Conv2d(2, 2, 3, padding=1), nn.Sequential(nn.Identity(), nn.BatchNorm2d(2)))
        block = Residual(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), inner), Block(lambda b, x: b.conv(x).relu()))
        module = nn.Sequential()
        module.add_module("block", block)
        module.add_module("head", flat())
        network = read_network(module, SHAPE)
        assert [layer.kind for layer in network.layers] == ["Residual", "Flatten", "Linear"]
        assert [(layer.kind, layer.place) for layer in network.all_layers] == [
            ("Conv2d", "block.body.0"),
            ("Activation", "block.body.1"),
            ("Conv2d", "block.body.2.body"),
            ("BatchNorm2d", "block.body.2.shortcut.1"),
            ("Residual", "block.body.2"),
            ("Conv2d", "block.shortcut.conv"),
            ("Activation", "block.shortcut.relu"),
            ("Residual", "block"),
            ("Flatten", "head.0"),
            ("Linear", "head.1"),
        ]

    def test_has_the_outputs_of_the_module_with_a_layer_that_runs_in_both_parts(self):
        torch.manual_seed(0)
        shared = nn.Conv2d(2, 2, 3, padding=1)
        module = flat(Residual(nn.Sequential(shared, nn.Tanh()), shared), Residual(nn.Identity(), nn.ReLU())).double()
        network = read_network(module, SHAPE)
        images = torch.randn(4, *SHAPE, dtype=torch.float64)
        found = network.logits(flat_parameters(module).unsqueeze(0), images)[0]
        torch.testing.assert_close(found, module(images).detach(), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (flat(Residual(nn.Conv2d(2, 3, 1)), features=90), r"Residual at '0' cannot take .* \[2, 6, 5\]"),
            # torch would stretch the one to the other's shape
            (flat(Residual(nn.Conv2d(2, 1, 1))), r"Residual at '0'.*its body gives \[1, 6, 5\]"),
            (flat(Residual(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1))), r"its shortcut gives \[1, 6, 5\]"),
            (flat(Residual(nn.Sequential(Residual(nn.Sequential(nn.ReLU(), nn.GELU()))))), "GELU at '0.body.0.body.1'"),
            (flat(Residual(nn.Identity(), nn.Softplus())), "Softplus at '0.shortcut'"),
            (flat(Residual(Block(lambda b, x: F.gelu(b.conv(x))))), "Block at '0.body': the call gelu"),
            (
                flat(Residual(Block(lambda b, x: b.conv(x) + x))),
                "Block at '0.body': a connection that leaves the chain",
            ),
            (flat(Residual(Block(lambda b, x: x if x.sum() > 0 else -x))), "Block at '0.body' cannot be traced"),
            # It changes what the shortcut is given, too.
            (
                flat(nn.Conv2d(2, 2, 1), Residual(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1)))),
                "gives other outputs",
            ),
        ],
    )
    def test_is_refused_by_name_and_place(self, module, message):
        with pytest.raises(UnsupportedLayer, match=message) as refused:
            read_network(module, SHAPE)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.MaxPool2d(2, ceil_mode=True), "MaxPool2d at '0'.*ceil_mode=True, allowed is False"),
        (nn.AvgPool2d(2, ceil_mode=True), "AvgPool2d at '0'.*ceil_mode=True, allowed is False"),
        (nn.AvgPool2d(2, divisor_override=3), "AvgPool2d at '0'.*divisor_override=3, allowed is None"),
        (nn.MaxPool2d(2, return_indices=True), "MaxPool2d at '0' that gives several tensors"),
        (nn.MaxPool2d(2, padding=2), "MaxPool2d at '0' cannot take"),
        (nn.BatchNorm2d(3), r"BatchNorm2d at '0' cannot take an input of shape \[2, 6, 5\]"),
        (nn.BatchNorm2d(2, track_running_stats=False), "BatchNorm2d at '0'.*track_running_stats=False"),
        (nn.ConstantPad2d(1, float("nan")), "ConstantPad2d at '0'.*value=nan, allowed is finite"),
        (nn.ConstantPad2d(-3, 0.0), "ConstantPad2d at '0' cannot take"),
        (nn.ReflectionPad2d(1), "ReflectionPad2d at '0'"),
        (nn.AdaptiveAvgPool2d(1), "AdaptiveAvgPool2d at '0'.*supported are .*AvgPool2d"),
        (nn.Sequential(nn.Flatten(), nn.AvgPool2d(2)), r"AvgPool2d at '0.1' cannot take an input of shape \[60\]"),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(60)), "BatchNorm1d at '0.1'"),
    ],
)
def test_refuses_pooling_norms_and_pads_that_have_no_bound(layer, message):
    with pytest.raises(UnsupportedLayer, match=message) as refused:
        read_network(flat(layer), SHAPE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ends", [{"min": 0.0}, {"max": 1.0}, {"min": 0.0, "max": None}])
def test_refuses_a_clamp_with_one_end(ends):
    with pytest.raises(UnsupportedLayer, match=r"clamp with one end at 'clamp'; allowed is clamp\(low, high\)"):
        read_network(Module(lambda m, x: relu_flat(m, x.clamp(**ends))), SHAPE)
