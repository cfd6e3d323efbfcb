"""Samples of an image at which a gradient is estimated, fresh at every iteration.

Sections 5.4.1 of Taiello et al. 2024: uniformly random selection (URS; Viola and Wells
1997, Mattes et al. 2003), and gradient magnitude sampling (GMS; Sabuncu and Ramadge
2004), which prefers the edges of the moving image. Who sees the samples of GMS sees
where these are; who could work out the random numbers that they were drawn with would
see, at every voxel, whether the gradient is above a known threshold. So the moving
owner draws them from the operating system (``dipy_ppir.mpc.edgesamples``).
"""

import numpy as np

#: No fewer samples are taken, if there are as many.
LEAST = 1000


def sample_count(n, fraction):
    """How many of n samples are a fraction; all without one."""
    if fraction is None:
        return n
    return min(n, max(LEAST, round(fraction * n)))


def uniform_samples(rng, n, count):
    """Different samples, each with the same probability.

    Parameters
    ----------
    rng : numpy.random.Generator
    n, count : int

    Returns
    -------
    index : array of int64, shape (count,)
        in ascending order.
    """
    return np.sort(rng.choice(n, count, replace=False, shuffle=False))


def magnitude_samples(draws, weights, count):
    """Different samples, drawn one after the other with probabilities by weight.

    By exponential keys (Efraimidis and Spirakis 2006): the `count` smallest of E / w, E
    exponentially distributed. Where weights are zero, samples are drawn only if there
    are not enough others.

    Parameters
    ----------
    draws : array, shape (n,)
        uniform between 0 and 1.
    weights : array, shape (n,)
        not negative.
    count : int

    Returns
    -------
    index : array of int64, shape (count,)
        in ascending order.
    """
    if count >= len(weights):
        return np.arange(len(weights))
    largest = weights.max(initial=0)
    least = np.finfo(np.float64).tiny * 1e8
    keys = -np.log1p(-draws)
    keys /= np.maximum(weights / largest if largest > 0 else weights, least)
    return np.sort(np.argpartition(keys, count)[:count])
