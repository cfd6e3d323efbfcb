"""How Sphinx builds the documentation; see `make doc`.

The pages are Markdown that also reads well on a forge, where README.md and SECURITY.md
lie above them. Nothing is fetched while building.
"""

from pathlib import Path
import re
import sys

from sphinx.util.nodes import make_refnode

import dipy_ppir
from dipy_ppir.mpc import PUBLIC

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

project = "dipy_ppir"
author = "the dipy_ppir developers"
copyright = author
version = release = dipy_ppir.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
    "commandhelp",
]
root_doc = "index"
exclude_patterns = ["_build", "extensions", "templates", "tutorials"]
default_role = "py:obj"
smartquotes = False
nitpicky = False

# -- pages ---------------------------------------------------------------

myst_heading_anchors = 4
#: Files above this folder, to the page that shows each.
ABOVE = {"README.md": "index", "SECURITY.md": "reporting"}


def _show_files_above(app, docname, content):
    """Put README.md and SECURITY.md into their pages, with links as from here."""
    text = content[0]
    for name, page in ABOVE.items():
        if docname == page:
            above = (HERE.parent / name).read_text(encoding="utf-8")
            text = text.replace("{{ " + name + " }}", above.replace("](doc/", "]("))
    for name, page in ABOVE.items():
        text = re.sub(rf"\]\((\.\./)?{re.escape(name)}([)#])", rf"]({page}.md\2", text)
    content[0] = text.replace("](tutorials)", "](auto_tutorials/index.rst)")


# -- reference -----------------------------------------------------------

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False


def _list_public_of_mpc(app, docname, content):
    """Add what `dipy_ppir.mpc` calls public to its page, by module."""
    if docname == "mpc":
        for module, names in PUBLIC.items():
            title = f"dipy_ppir.mpc.{module}"
            content[0] += f"\n{title}\n{'-' * len(title)}\n\n"
            content[0] += f".. automodule:: {title}\n    :members: {', '.join(names)}\n"
            content[0] += "    :show-inheritance:\n"


def _find_by_last_name(app, env, node, contnode):
    """Link what docstrings call by its last names, if only one is called so."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    found = domain.find_obj(env, None, None, node["reftarget"], None, searchmode=1)
    found = [entry for _, entry in found if not entry.aliased]
    if len(found) != 1:
        return None
    entry = found[0]
    return make_refnode(
        app.builder, node["refdoc"], entry.docname, entry.node_id, contnode
    )


def _escape_stars(app, what, name, obj, options, lines):
    """``shape (*grid, dim)`` is no beginning of emphasis."""
    for i, line in enumerate(lines):
        if re.match(r"\s*[\w, *]+ : ", line):
            lines[i] = re.sub(r"(?<=[(, ])\*(?=\w)", r"\*", line)


# -- tutorials -----------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "auto_tutorials",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "abort_on_example_error": True,
    "min_reported_time": 0,
    "plot_gallery": True,
    "remove_config_comments": True,
}

# -- HTML ----------------------------------------------------------------

templates_path = ["templates"]
html_theme = "pydata_sphinx_theme"
html_title = "dipy_ppir"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["style.css"]
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
}


def setup(app):
    """Register what is above."""
    app.connect("source-read", _show_files_above)
    app.connect("source-read", _list_public_of_mpc)
    app.connect("missing-reference", _find_by_last_name)
    app.connect("autodoc-process-docstring", _escape_stars, priority=100)
