"""SM3 in float64 NumPy. Anil et al. 2019, arXiv:1901.11150, Algorithms SM3-I and SM3-II."""

import itertools

import numpy as np

from tests.oracles import each_tensor

OPTIONS = [
    {},
    {"variant": "I"},
    {"momentum": 0.9},
    {"beta": 0.9},
    {"variant": "I", "beta": 0.5, "momentum": 0.5},
]


def sm3_start(p, momentum=0.0, **_):
    axes = range(max(1, p.ndim))
    state = {f"mu{k}": np.zeros([n if d == k else 1 for d, n in enumerate(p.shape)]) for k in axes}
    return state | ({"m": np.zeros_like(p)} if momentum else {})


def sm3_step(w, g, s, lr, t, momentum=0.0, beta=0.0, variant="II", **_):
    """Coordinate by coordinate: the sets S_r are the slices along each axis, the whole tensor for a
    scalar."""
    axes = range(max(1, w.ndim))
    old = {k: s[f"mu{k}"] for k in axes}
    keep, take = (beta, 1 - beta) if beta else (1.0, 1.0)
    nu = np.zeros_like(w)
    new = {k: np.zeros_like(old[k]) for k in axes}

    def slot(k, index):
        return tuple(i if d == k else 0 for d, i in enumerate(index))

    if variant == "II":
        for index in np.ndindex(*w.shape):
            nu[index] = keep * min(old[k][slot(k, index)] for k in axes) + take * g[index] ** 2
            for k in axes:
                new[k][slot(k, index)] = max(new[k][slot(k, index)], nu[index])
    else:
        for k, index in itertools.product(axes, np.ndindex(*w.shape)):
            new[k][slot(k, index)] = max(new[k][slot(k, index)], take * g[index] ** 2)
        for k in axes:
            new[k] = keep * old[k] + new[k]
        for index in np.ndindex(*w.shape):
            nu[index] = min(new[k][slot(k, index)] for k in axes)
    for k in axes:
        s[f"mu{k}"] = new[k]
    update = np.divide(g, np.sqrt(nu), out=np.zeros_like(g), where=nu > 0)
    if momentum:
        update = s["m"] = momentum * s["m"] + (1 - momentum) * update
    return w - lr * update


oracle = each_tensor(sm3_step, sm3_start)
