r"""Local cross-correlation of two owners' images, and the force it exerts.

At every voxel x whose window of N voxels lies inside the grid, with window sums
:math:`\Sigma`, the static image s and the moving image m give

.. math::

    D = \Sigma s m - \tfrac{1}{N} \Sigma s\, \Sigma m, \quad
    \rho = D e f, \quad e = E^{-1/2}, \quad f = F^{-1/2},

with E and F the windows' sums of squared deviations, known to the static and the
moving owner. With the normalised residuals :math:`a = (s - \bar s) e` and
:math:`b = (m - \bar m) f`, the gradient of the correlation moves the static image
along :math:`-2 t_s\, e \nabla s` and the moving image along
:math:`-2 t_m\, f \nabla m`,

.. math:: t_s = \rho (b - \rho a), \quad t_m = \rho (a - \rho b)

(eq. 11 of Taiello et al. 2024, with D/(EF) and the brackets normalised).

Every secret is a sum of parts modulo 2**128 or 2**64, and everything rests on one
step (`Products`): the product of a number x of the static owner and y of the moving
owner. The helper and the static owner draw u, the helper and the moving owner v; the
owners send each other :math:`x - u` and :math:`y - v`; then

.. math:: x y = (x - u) y + u (y - v) + u v

has one term known to each party: (left) (right) with left = x - u, u, u and
right = y, y - v, v at the moving owner, the static owner and the helper. The helper
receives nothing in this module but words that say how far the owners are.

====================================  ==================================  =======
step                                  16-byte elements per centre         rounds
====================================  ==================================  =======
N D, window sums of products          2 (per voxel) + 1                   1
rho, truncated                        4 + 1                               1
forces, ``"force"`` (8-byte elements) 8; opened: 4                        2
forces, ``"update"``                  8 + 2 dim; masked: 4                2
update opened, 2 dim values           4 dim / spacing**dim                1
====================================  ==================================  =======

A centre is a voxel whose window lies inside the grid, or with `stride` every second
of these along each axis. In 3D that is at most 224 bytes a voxel with ``"force"``,
440 with ``"update"`` and spacing 2, 85 with stride 2 (32 for the images).

What each party sees before anything is opened: x - u, y - v and the helper's parts,
each hidden by numbers that it does not know and that hide nothing else. With
``"update"`` the static owner sees :math:`t_s + k` with a k that the other two draw;
it multiplies that by its gradient, they take k's share of the product away again.
All of this is uniform, whatever the images: a simulator draws it at random.
"""

from dataclasses import dataclass

import numpy as np

from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R64, R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, declare
from dipy_ppir.mpc.linear import banded, points
from dipy_ppir.mpc.protocols import blur, check_truncation, dither, truncate_part
from dipy_ppir.mpc.scratch import Scratch
from dipy_ppir.mpc.threads import threads

OWNERS = {STATIC: "static", MOVING: "moving"}

for _owner, _name in OWNERS.items():
    _other = OWNERS[MOVING + STATIC - _owner]
    declare(
        f"update_{_name}",
        receivers=(_owner,),
        shape="dim numbers per voxel of the grid reduced by update_spacing, each "
        "iteration",
        meaning="the smoothed step by which its half of the map moves; from all steps "
        f"of one registration most of the {_other} image can be rebuilt "
        "(doc/security.md)",
        bits=32,
    )
    declare(
        f"force_{_name}",
        receivers=(_owner,),
        shape="1 number per voxel, each iteration",
        meaning=f"the force on each voxel of its image, from which the {_other} image "
        "can be rebuilt (doc/security.md)",
        bits=24,
    )
    declare(
        f"bracket_{_name}",
        receivers=(_owner,),
        shape="1 number per voxel, each iteration",
        meaning="the second factor of the paper's force; together with the first, "
        f"nearly the whole {_other} image",
        bits=127,
    )
declare(
    "paper_factor",
    receivers=(MOVING, STATIC),
    shape="1 number per voxel, each iteration",
    meaning="the first factor of the paper's force, 2 D / (E F)",
    bits=127,
)
declare(
    "correlation",
    receivers=(MOVING, STATIC),
    shape="1 each iteration",
    meaning="how well the two images match (sum of squared local correlations)",
    bits=32,
)

#: Voxels handled at a time: the working set stays in the second-level cache.
BLOCK = 1 << 13
#: Blocks that an owner sends ahead of what it has received.
LAG = 4
#: rho times a power of two stays below 2**RHO_BITS before its truncation.
RHO_BITS = 86
#: Fraction bits of rho and of the residuals; a force has three times as many.
UNIT_BITS = 19
#: Fraction bits of the gradients and of the weights of a filter along one axis.
GRADIENT_BITS, WEIGHT_BITS = 16, 16
#: Fraction bits of what is opened: the map does not need more, and every bit more
#: makes the equations that they are easier to solve. Steps are small numbers.
OPEN_BITS = {"force": 19, "update": 24}
#: Bits to which the mean squared correlation is opened.
ENERGY_BITS = 28
#: Blocks after which the helper waits for the owners, so that it is never far ahead;
#: no fewer than LAG, or it would wait for owners that wait for it.
PACE = 64
#: Windows flatter than this part of an image's range exert no force.
LEAST_DEVIATION = 2.0**-10
#: |t| = |rho| |b - rho a| <= |rho| sqrt(1 - rho^2) <= 1/2, and |e grad s| <= sqrt(1/2)
#: in voxels, because both neighbours lie in the window.
MOST_FORCE, MOST_STEP = 0.5, 0.5 * 0.5**0.5


def _ring(reveal):
    return R128 if reveal == "update" else R64


def check_grid(shape, reveal):
    """Raise FixedPointOverflowError if sums over a grid would not fit."""
    if int(np.prod(shape)) << 2 * UNIT_BITS + 1 >= _ring(reveal).modulus:
        raise FixedPointOverflowError(
            f"a grid of {tuple(map(int, shape))} voxels is too large for "
            f'reveal={reveal!r}, which sums over it in 64 bits; use reveal="update"'
        )


@dataclass
class Half:
    """What an owner knows of its image, at every centre.

    Parameters
    ----------
    image : array of int64, shape of the grid
        intensities as integers of at most `LocalCrossCorrelation.image_bits` bits.
    inverse : array, flat
        1 / sqrt(E) of an image scaled to [0, 1], 0 where the window is flat.
    residual : array, flat
        (s - mean) / sqrt(E), 0 where the window is flat.
    gradient : array, shape (dim, centres)
        gradient of the image times `inverse`, per voxel.
    """

    image: np.ndarray
    inverse: np.ndarray
    residual: np.ndarray
    gradient: np.ndarray


class Products:
    """Numbers of the two owners, ready to be multiplied; see the module.

    Parameters
    ----------
    ring : Ring
    left, right : array, shape (numbers, n)
        what this party holds of the static and of the moving owner's numbers.
    """

    def __init__(self, ring, left, right):
        self.ring, self.left, self.right = ring, left, right

    def add(self, out, i, j, c=1):
        """Add this party's part of c times the i-th by the j-th number; local."""
        self.ring.addmul(out, self.left[i], self.right[j], c)


class LocalCrossCorrelation:
    """One iteration's forces between two owners' images of one grid.

    Parameters
    ----------
    session : Session
    shape : sequence of int
        the grid; public.
    radius : int
        radius of the windows.
    reveal : {"update", "force", "paper"}
        what is opened.
    sigma : float
        standard deviation in voxels of the smoothing, with "update".
    spacing : int
        with "update", only every so many voxels along each axis are opened.
    stride : int
        forces are computed at every so many voxels along each axis.
    """

    def __init__(
        self, session, shape, radius, *, reveal="update", sigma=2.0, spacing=2, stride=1
    ):
        self.session = session
        self.shape, self.dim = tuple(shape), len(shape)
        self.radius, self.reveal, self.stride = radius, reveal, stride
        self.sigma, self.spacing = sigma, spacing
        self.window = (2 * radius + 1) ** self.dim
        self._window_bits = (self.window - 1).bit_length()
        self.ring = _ring(reveal)
        check_grid(self.shape, reveal)
        self._scratch = Scratch()

    @property
    def image_bits(self):
        """Bits of the integers that stand for intensities."""
        return (RHO_BITS // 2 - self._window_bits + 3) // 2

    @property
    def inverse_bits(self):
        """Fraction bits of the inverse norms, scaled by `_inverse_scale`."""
        return RHO_BITS // 2 - self._window_bits - self.image_bits

    @property
    def _inverse_scale(self):
        # N D times the scaled e and f is then rho times a power of two.
        return 2.0**self._window_bits / self.window**0.5

    def centers(self, offset):
        """The voxels at which forces are computed, as one slice per axis."""
        r = self.radius
        return tuple(
            slice(r + min(o, n - 2 * r - 1), n - r, self.stride)
            for n, o in zip(self.shape, offset, strict=True)
        )

    def positions(self):
        """Indices along each axis of the voxels whose step is opened."""
        return [points(n, self.spacing) for n in self.shape]

    # -- plumbing --------------------------------------------------------

    def _pads(self, peer, ring, shape):
        """Numbers that this party and `peer` draw; one of the two is the helper."""
        out = self._scratch("pads", shape, ring)
        return self.session.random_elements(peer, HELPER, ring, shape, out=out)

    def _masks(self, owner, ring, shape, out=None):
        """Numbers that hide an owner's, drawn by it and the helper."""
        s = self.session
        peer = HELPER if s.pid == owner else owner
        return s.random_elements(peer, owner, ring, shape, out=out)

    def _offer(self, ring, values, name):
        """Send the other owner this owner's numbers, hidden.

        Rounds: 1, with `_accept`. Elements: 1 per number.
        """
        s, shape = self.session, values.shape[:2]
        masks = self._masks(s.pid, ring, shape)
        hidden = ring.sub(values, masks)
        s.network.send(MOVING + STATIC - s.pid, name, hidden)
        return values, masks

    def _accept(self, ring, offered, name):
        """The `Products` of what was offered by both owners."""
        s = self.session
        if s.pid == HELPER:
            (left, right), n = offered
            return Products(
                ring,
                self._masks(STATIC, ring, (left, n)),
                self._masks(MOVING, ring, (right, n)),
            )
        values, masks = offered
        theirs = s.receive_elements(
            MOVING + STATIC - s.pid, ring, values.shape[:2], name
        )
        if s.pid == MOVING:
            return Products(ring, theirs, values)
        return Products(ring, masks, theirs)

    def _hand_in(self, part, receiver, name):
        """Give the helper's part of a sum to one owner, hidden; the other unhides it.

        Rounds: 1. Elements: 1 per value. Returns the owners' new parts.
        """
        s, ring, n = self.session, R128, len(part)
        other = MOVING + STATIC - receiver
        if s.pid == HELPER:
            s.network.send(
                receiver, name, ring.sub(part, self._pads(other, ring, (n,)))
            )
            return part
        if s.pid == other:
            return ring.add(part, self._pads(HELPER, ring, (n,)))
        return ring.add(part, s.receive_elements(HELPER, ring, (n,), name))

    def _pipeline(self, n, stages, paced=True):
        """Run blocks through stages, each LAG blocks behind the one before.

        What a stage sends is on its way while the next blocks are computed, and as
        many rounds as there are stages are needed, not as many as there are blocks.
        The helper, which needs nothing of the others, is told now and then how far
        they are.
        """
        blocks = [slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]
        states = {}
        for i in range(len(blocks) + LAG * (len(stages) - 1)):
            for k, stage in enumerate(stages):
                at = i - LAG * k
                if not 0 <= at < len(blocks):
                    continue
                if paced and k == 0 and at % PACE == 0 and at >= 2 * PACE:
                    self._wait_for_owners()
                states[at] = stage(blocks[at], states.pop(at, None))
                if paced and k == len(stages) - 1:
                    group, last = divmod(at + 1, PACE)
                    if last == 0 and (group + 1) * PACE < len(blocks):
                        self._tell_helper()

    def _wait_for_owners(self):
        if self.session.pid == HELPER:
            words = {p: np.empty(1, dtype=np.uint64) for p in OWNERS}
            self.session.network.receive_all(words, "pace")

    def _tell_helper(self):
        if self.session.pid != HELPER:
            self.session.network.send(HELPER, "pace", np.zeros(1, dtype=np.uint64))

    # -- the protocol ----------------------------------------------------

    def step(self, half=None, offset=None):
        """One iteration: forces or steps of both images, each opened to its owner.

        Parameters
        ----------
        half : Half, at the owners only
        offset : sequence of int, optional
            with `stride`, the first centre along each axis.

        Returns
        -------
        opened : array or None
            of the own image, before DIPY's factor of -2, at the owners: with "update"
            the smoothed step, per voxel, shape (dim, reduced grid); else the force, by
            which ``half.gradient`` is to be multiplied, flat.
        correlation : float or None
            sum of the squared local correlations, at the owners.
        """
        s = self.session
        centers = self.centers(offset or (0,) * self.dim)
        counts = [
            len(range(*c.indices(n))) for c, n in zip(centers, self.shape, strict=True)
        ]
        n = int(np.prod(counts))
        s.ledger.about(int(np.prod([n - 2 * self.radius for n in self.shape])))
        with s.phase("cross correlation"):
            product = self._window_products(half, centers)
            rho = self._correlation(half, product, n)
            gradients = self.dim if self.reveal == "update" else 0
            energy, parts = self._forces(half, rho, n, gradients)
            if self.reveal == "paper":
                return self._open_paper(half, product, energy, n)
            bits, most = 3 * UNIT_BITS, MOST_FORCE
            if self.reveal == "update":
                parts = self._smooth(parts, centers, counts)
                bits += GRADIENT_BITS + WEIGHT_BITS * self.dim
                most = MOST_STEP
            openings = [self._energy_opening(energy, n)]
            for owner, name in OWNERS.items():
                bound = int(most * (1 << bits)) * 2
                array = SharedArray(self.ring, parts[owner], 2, bits, bound)
                other = MOVING + STATIC - owner
                array = blur(s, array, bits - OPEN_BITS[self.reveal], other)
                openings.append((array, f"{self.reveal}_{name}", (owner,)))
            return self._opened(openings)

    def _window_products(self, half, centers):
        """Three parts of N D. Elements: 2 per voxel. Rounds: 1."""
        s, ring, size = self.session, R128, int(np.prod(self.shape))
        left, right = (self._scratch(f"large-{p}", (size,)) for p in (STATIC, MOVING))
        if s.pid == HELPER:
            self._masks(STATIC, ring, (size,), out=left)
            self._masks(MOVING, ring, (size,), out=right)
        else:
            image, other = half.image.reshape(-1), MOVING + STATIC - s.pid
            mine, theirs = (right, left) if s.pid == MOVING else (left, right)

            def send(block, _):
                offered = self._offer(
                    ring, ring.encode_int(image[block])[None], "image"
                )
                mine[block] = offered[s.pid == STATIC][0]

            def receive(block, _):
                shape = (block.stop - block.start,)
                s.receive_elements(other, ring, shape, "image", out=theirs[block])

            self._pipeline(size, [send, receive], paced=False)
        product = self._scratch("image-product", (size,))
        ring.kernels.mul(left, right, product)
        product = self._box("product", product, centers)
        ring.kernels.scale(product, self.window, product)
        left = self._box("left", left, centers)
        right = self._box("right", right, centers)
        ring.addmul(product, left, right, -1)
        return product

    def _box(self, name, x, centers):
        """Window sums at the centres of a packed array of the grid; local."""
        shape = list(self.shape)
        for axis, center in enumerate(centers):
            outer = int(np.prod(shape[:axis]))
            inner = 2 * int(np.prod(shape[axis + 1 :]))
            whole = shape[axis] - 2 * self.radius
            # Only the last axis's sums outlive this call.
            last = f"-{name}" if axis == self.dim - 1 else ""
            out = self._scratch(f"box-{axis}{last}", (outer * whole * inner // 2,))
            out = out.reshape(outer, whole, inner)
            x = x.reshape(outer, shape[axis], inner)
            R128.kernels.box(x, self.radius, self.radius, out, threads())
            if self.stride > 1:
                first = center.start - self.radius
                out = np.ascontiguousarray(out[:, first :: self.stride])
            shape[axis] = out.shape[1]
            x = out
        return x.reshape(-1, 2)

    def _correlation(self, half, product, n):
        """Two parts of rho, at the owners. Elements: 6 per centre. Rounds: 2."""
        s, ring = self.session, R128
        bits, bound = RHO_BITS - UNIT_BITS, (1 << RHO_BITS) + (1 << RHO_BITS - 6)
        check_truncation(ring, bound, bits)
        rho = None if s.pid == HELPER else self._scratch("rho", (n,), self.ring)

        def send(block, _):
            part = self._hand_in(product[block], MOVING, "product")
            if s.pid == HELPER:
                return (2, 2), len(part)
            product[block] = part
            inverse = ring.encode(
                half.inverse[block] * self._inverse_scale, self.inverse_bits, 2.0**12
            )
            values = np.stack([inverse, ring.mul(part, inverse)])
            return self._offer(ring, values, "inverse")

        def multiply(block, offered):
            products = self._accept(ring, offered, "inverse")
            part = ring.zeros(products.left.shape[1:2])
            products.add(part, 0, 1)
            products.add(part, 1, 0)
            part = self._hand_in(part, STATIC, "correlation")
            if s.pid != HELPER:
                rho[block] = truncate_part(s.pid, ring, part, bound, bits, self.ring)

        self._pipeline(n, [send, multiply])
        return rho

    def _forces(self, half, rho, n, gradients):
        """Parts of both forces, or of their products with the gradients.

        With R the own part of rho, A the own residual and the same of the other owner,
        t_s is R_s A_m + R_m A_m - (R_s + R_m)**2 A_s, and t_m its mirror image.

        Elements: 8 per centre, with gradients 12 + 2 dim. Rounds: 1, with gradients 2.

        Returns
        -------
        energy : array, one element
            this party's part of the sum of squares of rho.
        parts : dict
            for each image, three parts of its force, shape (n,), or of the products,
            shape (dim, n).
        """
        s, ring, one = self.session, self.ring, 1 << UNIT_BITS
        shape = (gradients, n) if gradients else (n,)
        # The images are done with.
        parts = {p: self._scratch(f"large-{p}", shape, ring) for p in OWNERS}
        energy = ring.zeros((1,))
        numbers = 4 + gradients

        def send(block, _):
            if s.pid == HELPER:
                return (numbers, numbers), block.stop - block.start
            r = rho[block]
            a = ring.encode(half.residual[block], UNIT_BITS, 1.0)
            values = [r, a, ring.mul(r, a), ring.mul(r, r)]
            for g in half.gradient[:gradients]:
                values.append(ring.encode(g[block], GRADIENT_BITS, 1.0))
            return self._offer(ring, np.stack(values), "residual")

        def multiply(block, offered):
            products = self._accept(ring, offered, "residual")
            static, moving = (ring.zeros((block.stop - block.start,)) for _ in range(2))
            products.add(static, 0, 1, one)
            products.add(static, 1, 3, -1)
            products.add(static, 2, 0, -2)
            products.add(moving, 1, 0, one)
            products.add(moving, 3, 1, -1)
            products.add(moving, 0, 2, -2)
            energy[...] = ring.add(
                energy, ring.scale(ring.dot(products.left[0], products.right[0]), 2)
            )
            forces = {STATIC: static, MOVING: moving}
            if s.pid != HELPER:
                own, other = forces[s.pid], forces[MOVING + STATIC - s.pid]
                r, a, ra, r2 = offered[0][:4]
                ring.addmul(own, r2, a, -1)
                energy[...] = ring.add(energy, ring.dot(r, r))
                other[...] = ring.add(other, ring.scale(ra, one))
            if not gradients:
                for owner, force in forces.items():
                    parts[owner][block] = force
                return None
            return self._hide_forces(forces, products, offered, parts, block)

        def receive(block, state):
            if s.pid == HELPER:
                return
            masked, values = state
            theirs = {
                p: ring.empty(masked.shape[:1])
                for p in (MOVING + STATIC - s.pid, HELPER)
            }
            s.network.receive_all(theirs, "force")
            for part in theirs.values():
                masked = ring.add(masked, part)
            for g in range(gradients):
                parts[s.pid][g, block] = ring.mul(masked, values[4 + g])

        self._pipeline(n, [send, multiply, receive] if gradients else [send, multiply])
        return energy, parts

    def _hide_forces(self, forces, products, offered, parts, block):
        """Send each owner its force plus k, and begin the products with -k.

        k is a sum of two numbers that the other owner and the helper draw.
        """
        s, ring = self.session, self.ring
        for owner in OWNERS:
            if owner == s.pid:
                continue
            peer = MOVING + STATIC - owner if s.pid == HELPER else HELPER
            pads = self._pads(peer, ring, (2, block.stop - block.start))
            pad = pads[1 if s.pid == HELPER else 0]
            s.network.send(owner, "force", ring.add(forces[owner], pad))
            minus_k = ring.neg(ring.add(pads[0], pads[1]))
            # What this party holds of the owner's gradients.
            gradients = (products.left if owner == STATIC else products.right)[4:]
            for g, gradient in enumerate(gradients):
                parts[owner][g, block] = ring.mul(minus_k, gradient)
        if s.pid != HELPER:
            return forces[s.pid], offered[0]

    # -- opening ---------------------------------------------------------

    def _energy_opening(self, energy, n):
        bits = 2 * UNIT_BITS
        energy = SharedArray(self.ring, energy, 2, bits, n << bits)
        energy = dither(self.session, energy, n << bits - ENERGY_BITS, by=HELPER)
        return energy, "correlation", (MOVING, STATIC)

    def _opened(self, openings):
        """Open the energy and one array to each owner; what this party sees."""
        energy, static, moving = self.session.open_all(openings)
        own = static if static is not None else moving
        return own, None if energy is None else float(energy[0])

    def _smooth(self, steps, centers, counts):
        """Smooth and subsample parts of the steps; local."""
        filters = [
            gaussian_filter_matrix(n, range(*c.indices(n)), positions, self.sigma)
            for n, c, positions in zip(
                self.shape, centers, self.positions(), strict=True
            )
        ]
        order = [1, 0, 2] if self.dim == 3 else [0, 1]
        out = {}
        for owner, parts in steps.items():
            rows = []
            for x in parts:
                shape = list(counts)
                for axis in order:
                    first, weights = filters[axis]
                    outer = int(np.prod(shape[:axis]))
                    inner = 2 * int(np.prod(shape[axis + 1 :]))
                    x = x.reshape(outer, shape[axis], inner)
                    shape[axis] = len(first)
                    y = self._scratch(
                        f"filter-{axis}", (outer * len(first) * inner // 2,)
                    )
                    y = y.reshape(outer, len(first), inner)
                    self.ring.kernels.filter_axis(x, first, weights, y, threads())
                    x = y
                rows.append(x.reshape(*shape, 2).copy())
            out[owner] = np.stack(rows)
        return out

    def _open_paper(self, half, product, energy, n):
        """Open the two factors of the paper's force; returns their product over e."""
        s, ring = self.session, R128
        w = 2 * self._window_bits + 2 * self.image_bits
        square_bits = (126 - 22 - w) // 2
        scale = self._inverse_scale
        # D e a, and the other's residual in units of its image, in one scale.
        mixed = self.window * scale * 2.0 ** (2 * self.image_bits + self.inverse_bits)
        factor = self._scratch("paper-factor", (n,))
        brackets = {p: self._scratch(f"bracket-{p}", (n,)) for p in OWNERS}

        def send(block, _):
            part = product[block]
            if s.pid == HELPER:
                return (4, 4), len(part)
            e = half.inverse[block]
            square = ring.encode((e * scale) ** 2, square_bits, 2.0**24)
            weight = ring.encode(
                e * scale * half.residual[block], self.inverse_bits, 2.0**12
            )
            values = [square, ring.mul(part, square), weight, part]
            return self._offer(ring, np.stack(values), "paper")

        def multiply(block, offered):
            products = self._accept(ring, offered, "paper")
            size = (block.stop - block.start,)
            x, static, moving = (ring.zeros(size) for _ in range(3))
            products.add(x, 0, 1)
            products.add(x, 1, 0)
            products.add(static, 2, 3, -1)
            products.add(moving, 3, 2, -1)
            factor[block] = x
            if s.pid != HELPER:
                own, other = (static, moving) if s.pid == STATIC else (moving, static)
                ring.addmul(own, offered[0][3], offered[0][2], -1)
                e = half.inverse[block]
                image = np.divide(
                    half.residual[block], e, out=np.zeros_like(e), where=e > 0
                )
                other[...] = ring.add(other, ring.encode(image * mixed, 0, 2.0**125))
            brackets[STATIC][block], brackets[MOVING][block] = static, moving

        self._pipeline(n, [send, multiply])
        openings = [self._energy_opening(energy, n)]
        for owner, name in OWNERS.items():
            bracket = SharedArray(ring, brackets[owner], 2, 0, 1 << 126)
            openings.append((bracket, f"bracket_{name}", (owner,)))
        factor = SharedArray(ring, factor, 2, 0, 1 << 126)
        factor = s.open(factor, "paper_factor", (MOVING, STATIC))
        own, energy = self._opened(openings)
        if own is None:
            return None, None
        force = factor / 2.0 ** (w + 2 * square_bits) / scale**2 * (own / mixed)
        e = half.inverse
        return np.divide(force, e, out=np.zeros_like(e), where=e > 0), energy


def gaussian_filter_matrix(n, centers, positions, sigma):
    """Integer weights of a Gaussian filter along one axis.

    They are those of ``scipy.ndimage.gaussian_filter`` (mode "reflect", cut off at four
    standard deviations) times 2**WEIGHT_BITS, rounded.

    Parameters
    ----------
    n : int
        size of the axis.
    centers : sequence of int
        where the input is given; elsewhere it is zero.
    positions : array of int
        where the output is wanted.
    sigma : float
        standard deviation, voxels.

    Returns
    -------
    first : array of int64, shape (p,)
        index into `centers` of the first term of each sum.
    weights : array of int32, shape (p, taps)
    """
    reach = int(4.0 * sigma + 0.5)
    taps = np.arange(-reach, reach + 1)
    gauss = np.exp(-0.5 * (taps / sigma) ** 2) if sigma > 0 else np.ones(1)
    gauss /= gauss.sum()
    # scipy's "reflect" repeats the border voxel; numpy calls that symmetric.
    source = np.pad(np.arange(n), reach, mode="symmetric")
    dense = np.zeros((len(positions), n))
    for row, p in zip(dense, positions, strict=True):
        np.add.at(row, source[p : p + 2 * reach + 1], gauss)
    dense = np.rint(dense[:, list(centers)] * 2.0**WEIGHT_BITS).astype(np.int32)
    return banded(dense)
