"""The command ``dipy_ppir_report``: the page of a registration that is done."""

import argparse
from dataclasses import replace
from pathlib import Path

from dipy.align.imaffine import AffineMap
import numpy as np

from dipy_ppir.mpc.record import file_hash
from dipy_ppir.workflows import report
from dipy_ppir.workflows.flow import check_name, short_name
from dipy_ppir.workflows.inputs import InputError, load_volume
from dipy_ppir.workflows.outputs import OutputFiles, new_folders
from dipy_ppir.workflows.receiptfile import in_own_words, load, printable
from dipy_ppir.workflows.streams import QUIET, be_quiet, say

#: Images of which pictures are made, by the flag that names them.
_IMAGES = ("static", "moving", "moved")


def report_parser():
    """The arguments of ``dipy_ppir_report``."""
    parser = argparse.ArgumentParser(
        prog="dipy_ppir_report",
        description="Write a page (HTML) about a registration from its receipt: what "
        "was found, whether it is plausible, and what each party learned. With the "
        "static and the moved image the page shows both; keep it as you keep these. "
        "Static and moving images of which the receipt has other hashes are refused.",
    )
    parser.add_argument("receipt", metavar="FILE", help="receipt of the run (JSON)")
    parser.add_argument(
        "-o", "--out", default=report.REPORT, metavar="FILE", help="page to write"
    )
    parser.add_argument("--static", metavar="FILE", help="the static image")
    parser.add_argument(
        "--moving", metavar="FILE", help="the moving image as it was before"
    )
    parser.add_argument(
        "--moved", metavar="FILE", help="the moving image on the static one's grid"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a page that is there already"
    )
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    parser.add_argument(
        "--debug", action="store_true", help="on an error show where it occurred"
    )
    return parser


def report_of(arguments=None):
    """``dipy_ppir_report``: write the page of a receipt, and of images if given."""
    given = report_parser().parse_args(arguments)
    be_quiet(given.quiet)
    check_name(given.out, "out", report.HTML)
    lacking = report.missing()
    if lacking:
        raise InputError(
            f"{' and '.join(lacking)} must be there to make a report: pip install "
            "'dipy-ppir[report]'"
        )
    receipt = in_own_words(load(given.receipt))
    names = {name: getattr(given, name) for name in _IMAGES if getattr(given, name)}
    pictures = _pictures(receipt, names)
    read = [given.receipt, *names.values()]
    out = Path(given.out)
    shown = {}
    if names:
        shown["static"] = short_name(names["static"])
        shown["moving"] = short_name(names.get("moving", names["moved"]))
    with new_folders([out]), OutputFiles([out], read, force=given.force) as files:
        temporary = files.temporary(out)
        report.save_report(temporary, receipt, names=shown, pictures=pictures)
        files.commit()
    say(f"Saved {out}")


def _pictures(receipt, names):
    """What can be drawn of the images that were given, if they are of the run."""
    if not names:
        return None
    if not {"static", "moved"} <= set(names):
        raise InputError(
            "pictures need --static and --moved, the moved image that the registration "
            "wrote; give both, or neither"
        )
    images = {name: load_volume(path, name) for name, path in names.items()}
    vouched = _vouched(receipt, names)
    (static, grid2world), (moved, _) = images["static"], images["moved"]
    if moved.shape != static.shape:
        raise InputError(
            f"the moved image has shape {moved.shape} and the static one "
            f"{static.shape}; give the moved image that the registration wrote"
        )
    before = None
    if "moving" in names:
        moving, moving_grid2world = images["moving"]
        before = AffineMap(
            np.eye(4),
            domain_grid_shape=static.shape,
            domain_grid2world=grid2world,
            codomain_grid_shape=moving.shape,
            codomain_grid2world=moving_grid2world,
        ).transform(moving)
    found = report.of_both_images(static, before, moved, grid2world, None)
    return replace(found, origin=_origin(names, vouched))


def _vouched(receipt, names):
    """Names of the images that are those of the run by the receipt's hashes."""
    vouched = []
    for name in ("static", "moving"):
        digest = receipt.get("files", {}).get(f"{name} image")
        if name not in names or digest is None:
            continue
        if file_hash(receipt["run"], names[name]) != digest:
            raise InputError(
                f"{printable(names[name], 1000)} is not the {name} image of the run, "
                "by the hash in the receipt; give the file that was registered, as it "
                "was then"
            )
        vouched.append(name)
    return vouched


def _origin(names, vouched):
    """What is known of the images of a page, in words."""
    unknown = [name for name in _IMAGES if name in names and name not in vouched]
    known = (
        f"By the receipt's hashes of the run: the {' and the '.join(vouched)} image. "
    )
    return (known if vouched else "") + (
        f"Nothing vouches for the {' and the '.join(unknown)} image, but the word of "
        "who made this page."
    )
