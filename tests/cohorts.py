"""A cohort of three sites and a helper: keys, plan and images in one folder."""

import csv

import nibabel as nib
import numpy as np
from ports import free_port

from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.workflows import cohort
from dipy_ppir.workflows.cohortplan import toml_text

QUICK = {
    "pipeline": ["center_of_mass", "translation"],
    "level_iters": [4, 2],
    "sigmas": [1.0, 0.0],
    "factors": [2, 1],
}
PAIRS = [
    ["A/1", "B/1"],
    ["A/2", "C/1"],
    ["B/2", "C/1"],
    ["C/1", "A/1"],
    ["A/1", "B/2"],
]


class Cohort:
    """Keys, plan and images of three sites and a helper in one folder."""

    def __init__(self, folder, **entries):
        self.folder = folder
        self.keys = {site: create_identity(f"Site {site}") for site in "ABCH"}
        for site, key in self.keys.items():
            key.save(folder / "keys" / site)
        tables = {
            site: {"name": f"Site {site}", "fingerprint": key.fingerprint}
            for site, key in self.keys.items()
        }
        for site in "BH":
            tables[site]["address"] = f"127.0.0.1:{free_port(2)}"
        self.contents = {
            "title": "a test",
            "operation": "affine",
            "reveal": "transform",
            "concurrent": 2,
            "pairs": PAIRS,
            "helper": tables.pop("H"),
            "sites": tables,
            "parameters": QUICK,
            **entries,
        }
        if not self.contents["sites"]:
            del self.contents["sites"], self.contents["helper"]
        self.plan = folder / "plan.toml"
        self.write()

    def write(self, **entries):
        """Write the plan, changed."""
        self.contents |= entries
        self.plan.write_text(toml_text(self.contents))

    def images(self, site, *names, shift=0, size=16):
        """Small images of a site, and their table."""
        rows = ["participant_id\tfile"]
        for n, name in enumerate(names):
            at = np.indices((size, size - 1, size - 2)).T / (size - 2) - 0.5
            at -= 0.05 * (n + shift)
            data = np.exp(-12 * (at**2).sum(axis=-1)).T
            data[data < 0.05] = 0
            file = self.folder / f"{site}{name}.nii.gz"
            nib.save(nib.Nifti1Image(data.astype(np.float32), np.eye(4)), file)
            rows.append(f"{name}\t{file.name}")
        (self.folder / f"{site}.tsv").write_text("\n".join(rows))
        return self

    def argv(self, site, *extra):
        """Arguments of the command of a site; "" has all images."""
        argv = [str(self.plan), "--out_dir", str(self.folder / f"out_{site}")]
        if site:
            argv += ["--identity", str(self.folder / "keys" / site)]
        if site != "H":
            argv += ["--images", str(self.folder / f"{site}.tsv")]
        return [*argv, *extra]

    def run(self, site, *extra):
        """Run the command of a site here; its exit status."""
        return cohort.cohort(self.argv(site, *extra))

    def table(self, site):
        """Rows of the table of outcomes, by pair."""
        with open(self.folder / f"out_{site}" / "outcomes.tsv", newline="") as stream:
            rows = list(csv.DictReader(stream, dialect="excel-tab"))
        return {row["pair"]: row for row in rows}

    def statuses(self, site):
        """What became of each pair."""
        return [row["status"] for row in self.table(site).values()]
