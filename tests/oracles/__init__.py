"""Every optimizer in float64 NumPy, transcribed from its paper: what our rules and engines are held against.

`tests/oracles/NAME.py` has `oracle(parameters, gradients_by_step, rates, **options)`, which gives the
parameters and the states after all steps, `(list of arrays, list of {state name: array})`, and `OPTIONS`, the
settings to be tested. Norms are taken where the algorithm takes them; nothing is shared with the code under
test.
"""

import math

import numpy as np


def norm(x):
    return math.sqrt(float((x * x).sum()))


def rms(x):
    return norm(x) / math.sqrt(x.size)


def zeros(*names):
    return lambda p, **_: {name: np.zeros_like(p) for name in names}


def each_tensor(step, start):
    """Run `step(p, g, state, lr, t, **options) -> p` tensor by tensor."""

    def oracle(parameters, gradients_by_step, rates, **options):
        states = [start(p, **options) for p in parameters]
        parameters = [p.copy() for p in parameters]
        for t, (gradients, lr) in enumerate(zip(gradients_by_step, rates, strict=True), start=1):
            for i, g in enumerate(gradients):
                parameters[i] = step(parameters[i], g, states[i], lr, t, **options)
        return parameters, states

    return oracle
