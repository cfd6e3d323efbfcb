"""Which site and plan a cohort's output folder is of: a small file in it."""

import json

from dipy_ppir.workflows import outcomes
from dipy_ppir.workflows.cohortplan import HELPER_NAME
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.outputs import OutputFiles

FILE = "cohort.json"


def check_folder(folder, plan, site, *, anew=False):
    """Refuse a folder of another site or plan; nothing is changed in it.

    Parameters
    ----------
    folder : Path
    plan : CohortPlan
    site : str
        this one; "" where all images are on this machine.
    anew : bool, optional
        whether pairs are to be registered again, whatever the plan was before.

    Raises
    ------
    InputError
    """
    path = folder / FILE
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        of, title, work, pairs = (said[x] for x in ("site", "title", "work", "pairs"))
        pairs = set(pairs)
    except FileNotFoundError:
        if (folder / outcomes.FILE).exists():
            raise InputError(
                f"{folder} has outcomes of a cohort, but no {FILE} that says of which "
                "site and plan; choose another --out_dir"
            ) from None
        return
    except OSError as exc:
        raise InputError(
            f"{path} cannot be read ({exc.strerror}); choose another --out_dir"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is damaged, so that nobody knows of which site and plan {folder} "
            "is; choose another --out_dir"
        ) from None
    if of != site:
        raise InputError(
            f"{folder} is of {_called(of)}, and this is {_called(site)}; choose "
            "another --out_dir, or --identity"
        )
    if work != plan.work and not anew:
        raise InputError(
            f"{folder} is of another plan ({title!r:.100}), or of this one before it "
            "was changed; choose another --out_dir"
        )
    lost = sorted(pairs - {pair.name for pair in plan.pairs_of(site)})
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"{folder} is of another plan ({title!r:.100}), or of this one with pairs "
            f"that were taken out since ({lost[0]:.100}{more}); choose another "
            "--out_dir, or put them back at all sites"
        )


def mark_folder(folder, plan, site):
    """Write of which site and plan a folder is.

    Parameters
    ----------
    folder : Path
    plan : CohortPlan
    site : str
    """
    path = folder / FILE
    said = {
        "site": site,
        "title": plan.title,
        "work": plan.work,
        "pairs": [pair.name for pair in plan.pairs_of(site)],
    }
    text = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
    with OutputFiles([path], [], force=True) as out:
        out.temporary(path).write_text(text, encoding="utf-8")
        out.commit()


def _called(site):
    if site in ("", HELPER_NAME):
        return "the helper" if site else "a plan without sites"
    return f"site {site}"
