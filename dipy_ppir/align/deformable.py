"""What SyN and free-form registration of two parties' images have in common.

Both take the same arguments as DIPY's ``SymmetricDiffeomorphicRegistration.optimize``,
start the other parties where both images are here, and end with a map.
"""

from dipy.testing.decorators import warning_for_keywords
import numpy as np

from dipy_ppir.align import plausibility
from dipy_ppir.align.agreed import keep_to
from dipy_ppir.align.alone import check_parties
from dipy_ppir.align.arguments import image_array, matrix_array
from dipy_ppir.align.checkpoint import digest
from dipy_ppir.align.memory import check_session
from dipy_ppir.align.remote import (
    check_roles,
    grid2world_of,
    is_remote,
    split,
    unite,
)
from dipy_ppir.align.validation import check_grid2world, check_image, check_overlap
from dipy_ppir.mpc import local
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.ledger import MOVING, ROLES, STATIC

#: Which owners get the resulting map.
RESULT_TO = {
    "both": (MOVING, STATIC),
    "moving": (MOVING,),
    "static": (STATIC,),
}
_NAMES = ("static", "moving")


class DeformableRegistration:
    """A registration of two parties' images that ends with a map.

    A subclass has ``session``, ``parties``, ``checkpoint``, ``strict``, ``parameters``,
    ``receipt`` and ``dim``.

    Attributes
    ----------
    operation : str
        what session files call it.
    party : str
        what the other parties run where both images are here; see `register_party`.
    """

    operation = party = None

    def config(self):
        """Public parameters of the registration, JSON-able."""
        raise NotImplementedError

    def flat_config(self):
        """Those of `config` as session files have them."""
        return self.config()

    def check_here(self, images):
        """Raise ValueError for what images of this registration must not be.

        Parameters
        ----------
        images : dict
            with ``static``, ``moving`` and their ``_grid2world``.
        """
        raise NotImplementedError

    def register(self, images, prealign):
        """One registration inside a session; see `optimize`."""
        raise NotImplementedError

    def join(self, session):
        """Make the registration part of `session`, or of none with None."""
        if session is not None:
            check_parties(self.parties, session, self.operation, self.parameters)
        keep_to(session, self.operation, self.flat_config())
        self.session = session

    @warning_for_keywords()
    def optimize(
        self,
        static,
        moving,
        *,
        static_grid2world=None,
        moving_grid2world=None,
        prealign=None,
    ):
        """Register, as DIPY does, without showing either image.

        Parameters
        ----------
        static, moving : array or RemoteImage, shape (S, R, C) or (R, C)
            the image that another party holds is a `RemoteImage`.
        static_grid2world, moving_grid2world : array, shape (dim + 1, dim + 1), optional
            voxel-to-space transformations, mm; of a `RemoteImage`, its own.
        prealign : array, shape (dim + 1, dim + 1), optional
            affine transform from the static to the moving image's space, at the moving
            owner.

        Returns
        -------
        static_to_moving : DiffeomorphicMap or None
            the map, at the owners that get it.

        Raises
        ------
        ValueError
            if an image or a parameter cannot be used; before any connection is opened.
        ParameterMismatchError
            if the parties do not use the same parameters.
        ImplausibleError
            with `strict`, if the result is not plausible.
        """
        check_parties(self.parties, self.session, self.operation, self.parameters)
        static, moving = image_array(static, "static"), image_array(moving, "moving")
        static_grid2world = matrix_array(static_grid2world, "static_grid2world")
        moving_grid2world = matrix_array(moving_grid2world, "moving_grid2world")
        images = {
            "static": static,
            "moving": moving,
            "static_grid2world": grid2world_of(static, static_grid2world),
            "moving_grid2world": grid2world_of(moving, moving_grid2world),
        }
        prealign = matrix_array(prealign, "prealign")
        if self.session is not None:
            check_session(self.session, self.parameters, static, moving)
        self.check(images, prealign)
        if prealign is not None and is_remote(moving):
            raise ValueError("prealign belongs to the moving owner; leave it out here")
        if self.session is not None:
            check_roles(self.session.pid, static, moving)
            mapping = self.register(images, prealign)
            plausibility.tell(self.receipt["warnings"], strict=self.strict)
            return mapping
        if is_remote(static) or is_remote(moving):
            raise ValueError(
                "a RemoteImage needs a session with the party that holds the image"
            )
        if self.checkpoint is not None:
            raise ValueError("a checkpoint needs a session; leave it out")
        return self._register_locally(images, prealign)

    def _register_locally(self, images, prealign):
        """With both images: the other parties are processes on this machine."""
        masks = {"static_mask": None, "moving_mask": None}
        here, there, helper = split({**images, **masks})
        here = {name: here[name] for name in images}
        common = {"parameters": self.flat_config()}

        def run_here(session):
            self.join(session)
            try:
                return self.register(here, prealign)
            finally:
                self.join(None)

        results = local.run_locally(
            run_here,
            self.party,
            parties=self.parties,
            moving={},
            static={**common, **there},
            helper={**common, **helper},
        )
        # Of the images, each owner speaks of its own.
        concerns = [*self.receipt["warnings"], *results[STATIC]]
        self.receipt["warnings"] = list(dict.fromkeys(concerns))
        plausibility.tell(self.receipt["warnings"], strict=self.strict)
        return results[MOVING]

    # -- before the session ----------------------------------------------

    def check(self, images, prealign):
        """Raise ValueError unless the images can be registered; see `optimize`.

        Parameters
        ----------
        images : dict
            with ``static``, ``moving`` and their ``_grid2world``.
        prealign : array or None
        """
        for name in _NAMES:
            image = images[name]
            check_image(image, images[name + "_grid2world"], name)
            if len(image.shape) != self.dim:
                raise ValueError(
                    f"this registration is for {self.dim}D images, but the {name} "
                    f"image has {len(image.shape)} dimensions; give the right dim"
                )
        check_grid2world(prealign, self.dim, "prealign of the")
        self.check_here(images)
        if is_remote(images["moving"]):
            return  # where the prealign matrix puts it is the moving owner's to check
        grid2world = images["static_grid2world"]
        check_overlap(
            images["static"].shape,
            grid2world if prealign is None else prealign.dot(grid2world),
            images["moving"].shape,
            images["moving_grid2world"],
            remedy="check their headers, or pass prealign (see affine_registration)"
            if prealign is None
            else "the prealign matrix maps the static image outside the moving one; it "
            "must map static to moving world coordinates, mm",
        )

    def agree(self, images):
        """Compare all public parameters with the other parties'."""
        voxels = {n: int(np.prod(images[n].shape)) for n in _NAMES}
        self.session.ledger.about_images(
            {MOVING: voxels["static"], STATIC: voxels["moving"]}
        )
        parameters = self.flat_config()
        for name in _NAMES:
            parameters[name + "_shape"] = list(images[name].shape)
            parameters[name + "_grid2world"] = images[name + "_grid2world"].tolist()
        parameters["checkpoint"] = self.checkpoint is not None
        parameters["resume"] = self.checkpoint is not None and self.checkpoint.resume
        with self.session.phase("agreement"):
            self.session.agree("registration", parameters)

    # -- in the end ---------------------------------------------------------

    def checkpoint_facts(self, images, prealign):
        """What a checkpoint belongs to."""
        here = {n: None if is_remote(images[n]) else images[n] for n in images}
        return {
            **self.config(),
            "static image": digest(here["static"], here["static_grid2world"]),
            "moving image": digest(here["moving"], here["moving_grid2world"]),
            "prealign": digest(prealign),
        }

    def of_overlap(self, images, prealign):
        """Concerns about where the two images lie from where it began."""
        grids = [
            part
            for n in _NAMES
            for part in (images[n].shape, images[f"{n}_grid2world"])
        ]
        start = np.eye(self.dim + 1) if prealign is None else prealign
        return plausibility.of_overlap(plausibility.overlap(start, *grids))


def check_received(values, sender):
    """Refuse numbers of another party that are none."""
    if not np.isfinite(values).all():
        raise ProtocolError(
            f"the {ROLES[sender]} sent a map that contains NaN or infinity", sender
        )


def received_prealign(matrix):
    """The prealign matrix that the moving owner sent; None for none.

    Raises
    ------
    ProtocolError
        if it is of no use.
    """
    check_received(matrix, MOVING)
    if abs(np.linalg.det(matrix)) < 1e-12:
        raise ProtocolError(
            "the moving owner sent a prealign matrix that is singular", MOVING
        )
    return None if np.array_equal(matrix, np.eye(len(matrix))) else matrix


def register_party(registration, images):
    """Take part in a registration that another process began.

    Parameters
    ----------
    registration : DeformableRegistration
        with its session.
    images : dict
        see `dipy_ppir.align.remote.unite`.

    Returns
    -------
    warnings : list of str
    """
    images = unite(**images)
    with plausibility.untold():
        registration.optimize(
            images["static"],
            images["moving"],
            static_grid2world=images["static_grid2world"],
            moving_grid2world=images["moving_grid2world"],
        )
    return registration.receipt["warnings"]
