"""A template: your own images and your own network. Copy it, and change what is marked.

    evocert run problems/own_data.py --set data_path=FILE.npz

FILE.npz holds x_train and x_test, images as [N, C, H, W] in uint8 (0 to 255) or floats (0 to 1), and y_train and y_test,
their classes as whole numbers from 0:

    numpy.savez_compressed("FILE.npz", x_train=…, y_train=…, x_test=…, y_test=…)

Everything that can be set, with its meaning: python -c "import evocert; help(evocert.Experiment)".
"""

from torch import nn

import evocert


class MyNetwork(nn.Module):
    """Any chain of supported layers, in any order; it is traced, so forward may call them and their functions freely."""

    def __init__(
        self, channels: int, height: int, width: int, classes: int, mean: list[float], std: list[float]
    ) -> None:
        super().__init__()
        self.normalize = evocert.Normalize(mean, std)  # inside the network: eps and the images stay in [0, 1] pixels
        self.conv = nn.Conv2d(channels, 8, kernel_size=4, stride=2, padding=1)
        self.hidden = nn.Linear(8 * (height // 2) * (width // 2), 32)
        self.logits = nn.Linear(32, classes)

    def forward(self, x):
        x = self.conv(self.normalize(x)).relu().flatten(1)
        return self.logits(self.hidden(x).relu())


def network(input_shape, num_classes, *, mean, std):
    """Called with (C, H, W) and the number of classes of the data; mean and std are measured on the training part."""
    return MyNetwork(*input_shape, num_classes, mean, std)


experiment = evocert.Experiment(
    data="npz",
    data_path="my_images.npz",  # yours; relative to this file
    network=network,
    eps=2 / 255,  # yours: how far each pixel may change, in [0, 1]
    generations=5_000,  # more is better; watch the validation figures, and stop and resume at will
    popsize=64,  # more members, less noise in a step, and as much longer a generation
    batch_size=128,  # at most the number of training images
    stdev_init=0.02,  # sigma: as large as the certified fraction of the population still bears
    center_learning_rate=0.005,  # Adam's step in each weight; lower it if the loss climbs once eps is full
    eps_schedule=evocert.Schedule("linear", end=0.4, first=0.0),
    learning_rate_schedule=evocert.Schedule("cosine", start=0.4, last=0.02),
    loggers=[("StdOutLogger", {"interval": 500})],  # EvoTorch's loggers, or TensorBoardLogger
)
