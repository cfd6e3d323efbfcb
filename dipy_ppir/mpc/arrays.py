"""Secret-shared arrays: one party's share, with its scale and its bound."""

from dataclasses import dataclass
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R64, Field


@dataclass
class SharedArray:
    """One party's share of an array: in a field f(i + 1) for party i, as in MPyC.

    In the ring a secret is the sum of the parties' words, and the degree is 2.

    Parameters
    ----------
    field : Field
        the field of the shares.
    share : array of uint64, shape ``field.storage(shape)``
        this party's share.
    degree : int
        degree of the sharing polynomials: 1, or 2 after a product.
    frac_bits : int
        the elements stand for multiples of ``2**-frac_bits``.
    bound : int
        largest magnitude, as an integer before scaling, of any element.
    noise_bits : float, optional
        low bits that say nothing, because a party has added noise to them.
    choices : int, optional
        how many different values an element can have, if not all within the bound.

    Raises
    ------
    FixedPointOverflowError
        if the bound leaves no room in the field: raised where the array would
        be made, at every party, before anything is sent.
    """

    field: Field
    share: npt.NDArray[np.unsignedinteger[Any]]
    degree: int
    frac_bits: int
    bound: int
    noise_bits: float = 0
    choices: int | None = None

    def __post_init__(self) -> None:
        self.bound = int(self.bound)
        if 2 * self.bound >= self.field.modulus:
            raise FixedPointOverflowError(
                f"values of up to {self.bound.bit_length()} bits do not fit "
                f"{self.field!r}; use fewer fraction bits or the larger field"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the secret array."""
        return self.share.shape if self.field.words == 1 else self.share.shape[:-1]

    @property
    def open_bits(self) -> float:
        """Bits that an opening of an element shows."""
        values = 2 * self.bound + 1 if self.choices is None else self.choices
        return max(math.log2(values) - self.noise_bits, 0.0)

    def empty(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Room for another party's share."""
        return self.field.empty(self.shape)

    def _with(
        self,
        share,
        *,
        degree=None,
        frac_bits=None,
        bound=None,
        noise_bits=None,
        choices=None,
    ):
        return SharedArray(
            self.field,
            share,
            self.degree if degree is None else degree,
            self.frac_bits if frac_bits is None else frac_bits,
            self.bound if bound is None else bound,
            # Arithmetic spreads noise: nothing is promised of its result.
            noise_bits or 0,
            choices,
        )

    def _compatible(self, other, what):
        if self.field is not other.field or self.shape != other.shape:
            raise ValueError(f"cannot {what} arrays of different field or shape")

    def _same_scale(self, other, what):
        self._compatible(other, what)
        if self.frac_bits != other.frac_bits:
            raise ValueError(
                f"cannot {what} arrays of {self.frac_bits} and {other.frac_bits} "
                "fraction bits; bring them to one scale first"
            )

    def __add__(self, other: "SharedArray") -> "SharedArray":
        self._same_scale(other, "add")
        return self._with(
            self.field.add(self.share, other.share),
            degree=max(self.degree, other.degree),
            bound=self.bound + other.bound,
        )

    def __sub__(self, other: "SharedArray") -> "SharedArray":
        self._same_scale(other, "subtract")
        return self._with(
            self.field.sub(self.share, other.share),
            degree=max(self.degree, other.degree),
            bound=self.bound + other.bound,
        )

    def __neg__(self) -> "SharedArray":
        return self._with(self.field.neg(self.share))

    def __getitem__(self, index: Any) -> "SharedArray":
        return self._with(np.ascontiguousarray(self.share[index]))

    def reshape(self, *shape: Any) -> "SharedArray":
        """The same secrets in another shape."""
        whole = len(shape) == 1 and np.iterable(shape[0])
        storage = self.field.storage(shape[0] if whole else shape)
        return self._with(self.share.reshape(storage))

    def times(self, integer: int) -> "SharedArray":
        """Product with one public integer; local."""
        return self._with(
            self.field.scale(self.share, integer), bound=self.bound * abs(integer)
        )

    def __rmul__(self, integer: int) -> "SharedArray":
        return self.times(integer)

    def add_public(self, integer: int) -> "SharedArray":
        """Sum with one public integer (in units of the last place); local."""
        if self.field is R64:
            raise ValueError("in the ring one party adds a constant to its part")
        constant = self.field.from_ints(integer % self.field.modulus)
        share = np.broadcast_to(constant, self.share.shape)
        return self._with(
            self.field.add(self.share, np.ascontiguousarray(share)),
            bound=self.bound + abs(integer),
        )

    def _local_product(self, other, share, terms=1):
        if self.degree + other.degree > 2:
            raise ValueError("reduce the degree of a product before multiplying again")
        return SharedArray(
            self.field,
            share,
            2,
            self.frac_bits + other.frac_bits,
            self.bound * other.bound * terms,
        )

    def __mul__(self, other: "SharedArray") -> "SharedArray":
        """Elementwise product: local, of degree 2."""
        self._compatible(other, "multiply")
        return self._local_product(other, self.field.mul(self.share, other.share))

    def __matmul__(self, other: "SharedArray") -> "SharedArray":
        """Matrix product: local, of degree 2."""
        if self.field is not other.field or self.shape[1] != other.shape[0]:
            raise ValueError("matrix shapes do not match")
        share = self.field.matmul(self.share, other.share)
        return self._local_product(other, share, self.shape[1])


def broadcast(array, shape):
    """A shared array as one of a larger shape; local."""
    share = np.broadcast_to(array.share, array.field.storage(shape))
    return array._with(np.ascontiguousarray(share))


@dataclass
class OwnedArray:
    """Numbers that one party knows in the clear, about to be opened to others.

    Parameters
    ----------
    owner : int
    values : array or None
        at the owner only.
    shape : tuple of int
        public shape.
    dtype : dtype
    """

    owner: int
    values: npt.NDArray[Any] | None
    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    degree = 0

    @property
    def share(self) -> npt.NDArray[Any] | None:
        """What the owner sends."""
        return self.values

    @property
    def open_bits(self) -> float:
        """Bits that an opening of a number shows."""
        return 8 * np.dtype(self.dtype).itemsize

    def empty(self) -> npt.NDArray[Any]:
        """Room for the numbers."""
        return np.empty(self.shape, dtype=self.dtype)

    def __post_init__(self) -> None:
        if self.values is not None:
            self.values = np.ascontiguousarray(self.values, dtype=self.dtype)
            if self.values.shape != tuple(self.shape):
                raise ValueError(
                    f"expected an array of shape {self.shape}, got {self.values.shape}"
                )
