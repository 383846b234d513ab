"""Which operators mix the positions of an axis linearly: where a removed position can be made up for.

A convolution or matrix product reads an axis if the axis runs through its input channels and not, position
by position, through its output as well (a depthwise convolution hands every channel on and mixes none).

>>> import graphprune
>>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
>>> graph = graphprune.trace(model, torch.zeros(1, 1, 4, 4))
>>> [(linear.node.name, linear.columns[graph.axes["0.weight[0]"].atom].shape) for linear in linears(graph)]
[('conv2d', (0,)), ('linear', (16,))]
"""
