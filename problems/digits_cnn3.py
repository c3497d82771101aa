import evocert

experiment = evocert.Experiment(
    data="digits", network="cnn3", width=4, mean=[0.305], std=[0.376], eps=0.05,
    generations=3000, batch_size=64, popsize=64, stdev_init=0.02, center_learning_rate=0.01,
    eps_schedule=evocert.Schedule("linear", end=0.4, first=0.0), natural_every=10,
    learning_rate_schedule=evocert.Schedule("cosine", start=0.6, last=0.1),
)
