r"""PPIR(FHE) v1 and v2 as published: to measure, never to use. Version 2 leaks images.

    python benchmarks/paper/leaking_ckks.py [--pixels 1000 100000] [--parts 16]

Taiello et al. 2024, sections 4.2 and 5.4.2 and appendix A 1: the product :math:`R = S^T
J` of the moving owner's matrix S (p parameters, n pixels) with the static owner's image
J, by CKKS (TenSEAL; 4096 coefficients, moduli of 30, 24, 24 and 30 bits, scale 2^24).
Written from the paper's text; J and S are filled up with zeros
to whole parts of D pixels.

Version 1 (`DotProducts`). The static owner encrypts each part of J. The moving owner
multiplies each by its part of S (``DotProduct``: D rotations) and adds up. The static
owner decrypts R, and sends it in the clear.

Version 2 (`LeakingProducts`). Of the first half of the parts the static owner encrypts
J, each part p times; of the second half the moving owner encrypts S, flattened. Each
multiplies what it gets by its own numbers, element by element, adds up the parts, and
returns the sum. There are no rotations, so that what is returned is not R:

.. math:: P_{ki} = \sum_{j} S_{k, jD + i} \, J_{jD + i}, \qquad 0 \le i < D,

and :math:`R_k = \sum_i P_{ki}` is added up after decryption. **All P are read by who
holds the key**, p D numbers in place of p, none of them masked: the moving owner those
of the second half of the image, the static owner those of the first half.

What the moving owner does with them: it knows S. For each i it gets p equations about
the n / 2D pixels j D + i of J in every iteration, and S changes from iteration to
iteration while J does not. From n / 2Dp iterations on half of J is the solution of
linear equations (`solved`): with 6 parameters and 63 x 54 pixels, the paper's coarsest
resolution, 3 iterations are enough (``table2_affine_ssd.py`` does it for its images).
Samples that are drawn anew change nothing but which
pixels the equations are about, and reach both halves. What the static owner does: the
same with the unknown S, of which it gets D equations for each row in place of one.

In both versions besides: R itself is read by both owners in every iteration, and the
results go back without other noise than their own, so that who holds the key may learn
of the numbers that they were multiplied by from it.

Time is the process's own at each party. As the paper has it, serialization is not in
it, nor are the Galois keys of version 1, 9.6 MB, in the bytes.
"""

import argparse
from contextlib import contextmanager
import operator
import time

from common import show
import numpy as np

from dipy_ppir.mpc.ledger import MOVING, STATIC

try:
    import tenseal
except ImportError:
    tenseal = None

#: The paper's parameters.
DEGREE, MODULI, SCALE = 4096, [30, 24, 24, 30], 2.0**24
#: Numbers in a ciphertext.
SLOTS = DEGREE // 2
#: Of what multiplies ciphertexts no number is smaller: TenSEAL refuses to multiply by
#: zeros alone. It is less than the error of R.
LEAST = 2.0**-18
MISSING = (
    "PPIR(FHE) is left out: TenSEAL is not installed; pip install 'dipy-ppir[fhe]'"
)
HEADINGS = (
    "solution",
    "time moving (s)",
    "time static (s)",
    "comm. moving (MB)",
    "comm. static (MB)",
    "error of R (%)",
)


def new_key(*, rotations=False):
    """A context with a secret key, of the paper's parameters.

    As in the paper's program encryption is symmetric, except with rotations: TenSEAL's
    product with a matrix encrypts zeros, for which the other owner needs a public key.
    The paper's owners are in one process, with all keys.
    """
    kinds = tenseal.ENCRYPTION_TYPE
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        DEGREE,
        -1,
        MODULI,
        encryption_type=kinds.ASYMMETRIC if rotations else kinds.SYMMETRIC,
        n_threads=1,
    )
    context.global_scale = SCALE
    if rotations:
        context.generate_galois_keys()
    return context


def public(context):
    """What the other owner gets of a context."""
    return tenseal.context_from(context.serialize(save_secret_key=False))


class Cost:
    """What each owner computes, seconds, and sends, bytes; the moving owner's first.

    Attributes
    ----------
    seconds : list of float
        of computation.
    packing : list of float
        of ciphertexts to messages and back.
    sent : list of int
    """

    def __init__(self):
        self.seconds, self.packing, self.sent = [0.0, 0.0], [0.0, 0.0], [0, 0]

    @contextmanager
    def at(self, owner):
        """What this owner computes."""
        start = time.process_time()
        yield
        self.seconds[owner] += time.process_time() - start

    def message(self, owner, row):
        """A ciphertext as this owner sends it."""
        start = time.process_time()
        message = row.serialize()
        self.packing[owner] += time.process_time() - start
        self.sent[owner] += len(message)
        return message

    def received(self, owner, context, messages):
        """Rows of ciphertexts as this owner gets them, one at a time."""
        for message in messages:
            start = time.process_time()
            row = tenseal.ckks_vector_from(context, message)
            self.packing[owner] += time.process_time() - start
            yield row

    def encrypted(self, owner, key, rows):
        """Messages with rows of numbers that this owner encrypts."""
        messages = []
        for row in rows:
            with self.at(owner):
                row = tenseal.ckks_vector(key, row)
            messages.append(self.message(owner, row))
        return messages

    def added_up(self, owner, product, rows, factors):
        """Message with the sum of products of encrypted rows with numbers."""
        total = None
        for row, factor in zip(rows, factors, strict=True):
            with self.at(owner):
                row = product(row, factor)
                total = row if total is None else total + row
        return self.message(owner, total)

    def table(self):
        """Everything, shape (3, 2), to see what is added to it."""
        return np.array([self.seconds, self.packing, self.sent], dtype=float)


def padded(x, multiple):
    """Zeros after the last axis, up to a multiple of a length."""
    more = -x.shape[-1] % multiple
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])


def not_zero(x):
    """Numbers, none of which is smaller than `LEAST`."""
    return np.where(np.abs(x) < LEAST, LEAST, x)


class DotProducts:
    """Version 1; see the module.

    Parameters
    ----------
    length : int
        D.

    Attributes
    ----------
    cost : Cost
    """

    name = "PPIR(FHE)-v1"

    def __init__(self, length=128):
        self.length, self.cost = length, Cost()
        self._key = new_key(rotations=True)
        self._public = public(self._key)

    def share_static(self, static, parameters):
        """Encrypt and send J, shape (n,)."""
        cost = self.cost
        parts = padded(static, self.length).reshape(-1, self.length)
        messages = cost.encrypted(STATIC, self._key, parts)
        self._parts = list(cost.received(MOVING, self._public, messages))

    def product(self, matrix):
        """R of S transposed, shape (p, n), as the moving owner gets it.

        Raises
        ------
        ValueError
            if there are more parameters than a ciphertext holds numbers: TenSEAL's
            product is wrong then, without a word.
        """
        if len(matrix) > SLOTS:
            raise ValueError(
                f"version 1 takes {SLOTS} parameters at most, got {len(matrix)}; "
                "measure a coarser resolution"
            )
        cost = self.cost
        matrix = not_zero(padded(matrix, self.length))
        blocks = matrix.T.reshape(-1, self.length, len(matrix))
        sums = cost.added_up(MOVING, operator.matmul, self._parts, blocks)
        (row,) = cost.received(STATIC, self._key, [sums])
        with cost.at(STATIC):
            result = np.array(row.decrypt())
        cost.sent[STATIC] += result.nbytes
        return result


class LeakingProducts:
    """Version 2; see the module for what it leaks.

    Parameters
    ----------
    length : int
        D.

    Attributes
    ----------
    cost : Cost
    read : list of array, shape (p, D)
        the partial sums that the moving and the static owner decrypted last.
    """

    name = "PPIR(FHE)-v2"

    def __init__(self, length=128):
        self.length, self.cost = length, Cost()
        self._keys = [new_key(), new_key()]
        self._public = [public(key) for key in self._keys]

    def share_static(self, static, parameters):
        """Encrypt and send half of J, shape (n,)."""
        cost, most = self.cost, SLOTS // self.length
        # Of a row of S, flattened, what a ciphertext holds is some parameters' numbers.
        self._groups = np.split(np.arange(parameters), range(most, parameters, most))
        self._parts, self._own = [], []
        for group in self._groups:
            with cost.at(STATIC):
                parts = padded(static, 2 * self.length).reshape(2, -1, self.length)
                first, second = np.tile(parts, len(group))
            messages = cost.encrypted(STATIC, self._keys[STATIC], first)
            got = cost.received(MOVING, self._public[STATIC], messages)
            self._parts.append(list(got))
            self._own.append(not_zero(second))

    def product(self, matrix):
        """R of S transposed, shape (p, n), as the moving owner gets it."""
        sums = [
            self._sums(matrix[group], *own)
            for group, *own in zip(self._groups, self._parts, self._own, strict=True)
        ]
        self.read = [np.concatenate(x) for x in zip(*sums, strict=True)]
        with self.cost.at(STATIC):
            half = self.read[STATIC].sum(axis=1)
        self.cost.sent[STATIC] += half.nbytes
        with self.cost.at(MOVING):
            return self.read[MOVING].sum(axis=1) + half

    def _sums(self, matrix, parts, own):
        """Partial sums of some parameters, as the moving and the static owner read."""
        cost, p, length = self.cost, len(matrix), self.length
        with cost.at(MOVING):
            rows = padded(matrix, 2 * length).reshape(p, -1, length)
            first, second = rows.swapaxes(0, 1).reshape(2, -1, p * length)
        factors = cost.encrypted(MOVING, self._keys[MOVING], second)
        sums = cost.added_up(MOVING, operator.mul, parts, not_zero(first))
        rows = cost.received(STATIC, self._public[MOVING], factors)
        others = cost.added_up(STATIC, operator.mul, rows, own)
        return self._decrypted(MOVING, others, p), self._decrypted(STATIC, sums, p)

    def _decrypted(self, owner, message, p):
        (row,) = self.cost.received(owner, self._keys[owner], [message])
        with self.cost.at(owner):
            return np.array(row.decrypt()).reshape(p, self.length)


def solved(matrices, sums, length):
    """What the moving owner works out of the partial sums that version 2 hands it.

    Parameters
    ----------
    matrices : list of array, shape (p, n)
        its own, of some iterations with the same pixels.
    sums : list of array, shape (p, D)
        what it decrypted.
    length : int
        D.

    Returns
    -------
    half : array, shape (m,)
        the second half of J, with the zeros that it was filled up with.
    """
    matrices = np.concatenate(matrices)
    matrices = padded(matrices, 2 * length)
    matrices = matrices.reshape(len(matrices), 2, -1, length)[:, 1]
    sums = np.concatenate(sums)
    half = [
        np.linalg.lstsq(matrices[:, :, i], sums[:, i], rcond=1e-3)[0]
        for i in range(length)
    ]
    return np.stack(half, axis=1).reshape(-1)


def encrypted_points(static, moving):
    """Correlation of two sets of points by version 1 (appendix A 1).

    Each coordinate of the static owner is a ciphertext, as in TenSEAL's product of
    matrices; so that the sets may not be large.

    Parameters
    ----------
    static, moving : array, shape (dim, n)

    Returns
    -------
    products : array, shape (dim, dim)
        ``static @ moving.T``, as the moving owner gets it.
    cost : Cost
    """
    cost, key = Cost(), new_key()
    other = public(key)
    with cost.at(STATIC):
        points = tenseal.ckks_tensor(key, static, batch=False)
    points = tenseal.ckks_tensor_from(other, cost.message(STATIC, points))
    with cost.at(MOVING):
        sums = points @ moving.T
    sums = tenseal.ckks_tensor_from(key, cost.message(MOVING, sums))
    with cost.at(STATIC):
        products = np.array(sums.decrypt().tolist())
    cost.sent[STATIC] += products.nbytes
    return products, cost


class EncryptedProducts:
    """R for a registration: a new set of pixels whenever J is shared.

    Numbers of S are scaled to 1 at most before they are encrypted or multiplied.

    Parameters
    ----------
    version : type
        `DotProducts` or `LeakingProducts`.
    length : int, optional
    """

    def __init__(self, version, length=128):
        self.protocol = version(length)
        self.cost = self.protocol.cost
        self._static = self._parameters = None
        #: What each iteration took for J and for R, see `Cost.table`.
        self.taken = []

    def share_static(self, static):
        """Take J, shape (n,)."""
        self._static, self._parameters = static, None

    def __call__(self, matrix):
        """R of S transposed, shape (p, n)."""
        tables = [self.cost.table()]
        if self._parameters != len(matrix):
            self._parameters = len(matrix)
            self.protocol.share_static(self._static, self._parameters)
        tables.append(self.cost.table())
        most = np.abs(matrix).max() or 1.0
        result = most * self.protocol.product(matrix / most)
        self.taken.append(np.diff([*tables, self.cost.table()], axis=0))
        return result

    def costs(self, made=None, meant=None, resent=True):
        """Seconds and megabytes of an iteration, as `common.row` takes them.

        Parameters
        ----------
        made, meant : list of int, optional
            iterations at each resolution that were made, and for how many they stand,
            where some were made.
        resent : bool, optional
            whether each iteration has another J.
        """
        made = made or [len(self.taken)]
        total, count, start = 0.0, 0, 0
        for n, whole in zip(made, meant or made, strict=True):
            if n:
                image, result = np.mean(self.taken[start : start + n], axis=0)
                total = total + image * (whole if resent else n) + result * whole
                count, start = count + whole, start + n
        (moving, static), _, sent = total / count
        sent = dict(zip(("mb_moving", "mb_static"), sent / 1e6, strict=True))
        return {"seconds": moving, "seconds_static": static, **sent}


def measured(version, pixels, parts, repetitions):
    """What J and an iteration with 6 parameters take, and the error of R.

    Parameters
    ----------
    version : type
    pixels : int
    parts : int or None
        measured; what depends on their number is scaled to that of all pixels.
    repetitions : int

    Returns
    -------
    image, iteration : array, shape (3, 2)
        see `Cost.table`; of an iteration the median.
    error : float
        of R, relative.
    """
    rng, length, parameters = np.random.default_rng(0), 128, 6
    n = min(pixels, (parts or pixels) * length)
    protocol, taken, apart = version(length), [], []
    static = rng.random(n)
    protocol.share_static(static, parameters)
    image = protocol.cost.table() * pixels / n
    for _ in range(repetitions):
        before = protocol.cost.table()
        matrix = rng.uniform(-1, 1, (parameters, n))
        found, exact = protocol.product(matrix), matrix @ static
        taken.append(protocol.cost.table() - before)
        apart.append(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    iteration = np.median(taken, axis=0)
    iteration[0, MOVING] *= pixels / n
    return image, iteration, np.median(apart)


def main():
    """Print what a product takes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pixels", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--parts", type=int, default=16, help="that version 1 is measured on"
    )
    given = parser.parse_args()
    if tenseal is None:
        print(MISSING)
        return
    rows, notes = [], []
    for pixels in given.pixels:
        for version in (DotProducts, LeakingProducts):
            parts = given.parts if version is DotProducts else None
            image, each, error = measured(version, pixels, parts, given.repetitions)
            name = f"{version.name}, {pixels:,} pixels"
            cells = [f"{x:.3g}" for x in (*each[0], *each[2] / 1e6, 100 * error)]
            rows.append([name, *cells])
            text = (
                "{}: serialization takes {:.2g} s and {:.2g} s besides; J is encrypted "
                "in {:.2g} s and takes {:.3g} MB"
            )
            notes.append(text.format(name, *each[1], image[0, 1], image[2, 1] / 1e6))
            if parts and parts * 128 < pixels:
                notes[-1] += f"; measured on {parts} parts of 128 pixels, and scaled"
            notes[-1] += "."
    show("S^T J, 6 parameters, D = 128", HEADINGS, rows, notes)


if __name__ == "__main__":
    main()
