"""
Three sites on one machine
==========================

Two hospitals and a university, each with a folder of its own, do what
:doc:`/deployment` describes: they make keys, pin one another's certificates in a
session file, start three commands that find each other over TLS, and check the three
receipts in the end. Here all of them are on this machine; nothing else is different.
"""

# %%
# The images
# ----------
# A T1-weighted template at hospital B, and at hospital A grey matter that was turned by
# 10 degrees and shifted by 10 mm.

from pathlib import Path
import shutil
import socket
import subprocess
import sys
import tempfile

import nibabel as nib
from nilearn.datasets import load_mni152_gm_template, load_mni152_template
from nilearn.plotting import plot_anat
import numpy as np
from scipy.spatial.transform import Rotation

folder = Path(tempfile.mkdtemp(prefix="sites_"))
sites = {"moving": "Hospital A", "static": "Hospital B", "helper": "University C"}
for site in sites:
    (folder / site).mkdir()

static = load_mni152_template(resolution=3)
grey_matter = load_mni152_gm_template(resolution=3)
turn = Rotation.from_euler("z", 10, degrees=True).as_matrix()
away = nib.affines.from_matvec(turn, [10, 0, 0])
nib.save(static, folder / "static" / "t1.nii.gz")
nib.save(
    nib.Nifti1Image(grey_matter.get_fdata(dtype=np.float32), away @ grey_matter.affine),
    folder / "moving" / "gm.nii.gz",
)

# %%
# Keys
# ----
# Each site makes a key and a certificate that it signs itself, and tells the others its
# fingerprint, by telephone.


def start(site, command, *arguments):
    """Start a command in the folder of a site."""
    program = shutil.which(command, path=Path(sys.executable).parent)
    return subprocess.Popen(
        [program, *arguments],
        cwd=folder / site,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(site, command, *arguments):
    """Run a command in the folder of a site; what it printed."""
    process = start(site, command, *arguments)
    printed = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(printed)
    return printed


fingerprints = {}
for site, name in sites.items():
    printed = run(site, "dipy_ppir_keygen", name, "--identity", "key")
    fingerprints[site] = printed.split("fingerprint: ")[1].split()[0]
    print(f"{name:<13}{fingerprints[site]}")

# %%
# The session file
# ----------------
# ``dipy_ppir_session new affine`` writes one to fill in. It is the same at all three.
# The owners can be behind firewalls; the helper needs an address, here a port that is
# free.

with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]

text = f"""
title = "Registration of a grey-matter map"
operation = "affine"
reveal = "transform"
result_to = "both"

[parties.moving]
name = "{sites["moving"]}"
fingerprint = "{fingerprints["moving"]}"

[parties.static]
name = "{sites["static"]}"
fingerprint = "{fingerprints["static"]}"

[parties.helper]
name = "{sites["helper"]}"
fingerprint = "{fingerprints["helper"]}"
address = "127.0.0.1:{port}"

[parameters]
pipeline = ["center_of_mass", "translation", "rigid"]
nbins = 32
sampling_proportion = 0.2
"""
for site in sites:
    (folder / site / "session.toml").write_text(text)

# %%
# Who answers for the data reads what the file means before anything is started:

print(run("static", "dipy_ppir_session", "check", "session.toml"))

# %%
# Three processes
# ---------------
# Started in any order, each waits for the others. ``remote`` stands for the image that
# a site does not have.

common = "--session", "session.toml", "--identity", "key"
processes = {
    "static": start("static", "dipy_ppir_align_affine", "t1.nii.gz", "remote", *common),
    "helper": start("helper", "dipy_ppir_helper", "session.toml", "--identity", "key"),
    "moving": start("moving", "dipy_ppir_align_affine", "remote", "gm.nii.gz", *common),
}
printed = {site: process.communicate()[0] for site, process in processes.items()}
for site, process in processes.items():
    if process.returncode:
        raise RuntimeError(f"{site}: {printed[site]}")
    files = sorted(p.name for p in (folder / site).iterdir() if p.is_file())
    print(f"{sites[site]:<13}{', '.join(files)}")

# %%
# The moving owner's own account of it:

print(printed["moving"])

# %%
# The result
# ----------
# The moving owner has its image on the static image's grid, both owners the matrix.
# Only here, where both images are at hand, can they be laid over each other.

moved = nib.load(folder / "moving" / "moved.nii.gz")
display = plot_anat(static, title="after", cut_coords=(0, -18, 12), draw_cross=False)
display.add_contours(moved, levels=[0.4], colors="tab:orange")

both = [np.loadtxt(folder / owner / "affine.txt") for owner in ("moving", "static")]
print("the owners have the same matrix:", np.array_equal(*both))
print("to find, and found:", np.round(away[:3, 3], 1), np.round(both[0][:3, 3], 1))

# %%
# The receipts
# ------------
# All three signed what their receipts have in common. Any of them can check that they
# belong together and that nobody changed one since; the last line is the verdict.

for site in sites:
    shutil.copy(folder / site / "receipt.json", folder / f"{site}.json")
receipts = [str(folder / f"{site}.json") for site in sites]
print(run("static", "dipy_ppir_receipt", *receipts).replace(f"{folder}/", ""))

# %%
# A receipt in which somebody made fewer bits of the opened ones is found out:

import json

forged = json.loads(Path(receipts[0]).read_text())
forged["bits"]["moving owner"] /= 2
Path(receipts[0]).write_text(json.dumps(forged))
process = start("static", "dipy_ppir_receipt", *receipts)
lines = process.communicate()[0].replace(f"{folder}/", "").splitlines()
print("\n".join(lines[lines.index("What is wrong") :]))

shutil.rmtree(folder)
