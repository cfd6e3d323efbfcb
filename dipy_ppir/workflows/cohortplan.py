"""The plan of a cohort: which pairs two or more sites register, and how.

A TOML file that all sites hold alike, public among them. Each pair becomes a session
file of its own, so that whatever goes for a session goes for a pair.

Pairs share ports: pair n of a plan is held in lane n mod `concurrent`, whose parties
listen at the ports of the plan plus the lane's number, and has place n in that row of
sessions (`SessionFile.place`). Within a lane every site holds the pairs that name it in
the order of the plan, one at a time, and the helper holds all. So no sites wait for one
another in a circle: of the pairs of a lane that are not over, take the first. Whoever
takes part in it has no earlier one to hold, and comes to it; or it is at a later one,
because it failed or was ended there, which the others are told when they meet it, and
give the pair up; or it is not there at all, and they give up when their patience ends.
Either way the pair ends in finite time, and the next one is the first.
"""

from dataclasses import dataclass
import hashlib
import json
from pathlib import Path
import re

from dipy_ppir.mpc.agreedfile import check_keys, parse_address, read_toml, text_of
from dipy_ppir.mpc.errors import SessionFileError
from dipy_ppir.mpc.identity import parse_fingerprint
from dipy_ppir.mpc.sessionfile import TABLES, SessionFile
from dipy_ppir.workflows.operations import operation_of

#: Larger files are no plans, and longer lists of pairs are several.
MAX_BYTES, MOST_PAIRS = 1 << 20, 10_000
MOST_CONCURRENT = 64
#: Seconds to wait for the others. An owner whose turn has not come hears of it, so this
#: need outlast no more than one registration of others, during which nobody listens.
CONNECT = 3600.0
#: What the helper is called where sites are named.
HELPER_NAME = "helper"

_TOP = {"title", "operation", "reveal", "result_to", "concurrent", "pairs", "all_pairs"}
_TABLES = {"sites", "helper", "parameters", "limits", "timeouts", "all_pairs"}
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,19}")
_PSEUDONYM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_LONGEST_TITLE = 60
#: Parties where all images are on this machine.
_HERE = {
    name: {"name": f"The owner of the {name} image", "fingerprint": f"{pid}" * 64}
    for name, pid in (("moving", 1), ("static", 2))
} | {"helper": {"name": "The helper", "fingerprint": "3" * 64, "address": "here:1"}}


@dataclass(frozen=True, order=True)
class Image:
    """An image by its site and pseudonym; without sites, by the latter alone."""

    site: str
    pseudonym: str

    def __str__(self):
        return f"{self.site}/{self.pseudonym}" if self.site else self.pseudonym


@dataclass(frozen=True)
class Pair:
    """Two images to register.

    Attributes
    ----------
    place : int
        in the plan, from 1.
    moving, static : Image
    """

    place: int
    moving: Image
    static: Image

    @property
    def name(self):
        """Name of its folder: ``A.sub-01_to_B.sub-07``."""
        return "_to_".join(str(x).replace("/", ".") for x in (self.moving, self.static))

    @property
    def images(self):
        """Both images, by "moving" and "static"."""
        return {"moving": self.moving, "static": self.static}

    def image_of(self, site):
        """ "moving" or "static": which of them a site has; None if it has none."""
        return next((n for n, i in self.images.items() if i.site == site), None)


@dataclass(frozen=True)
class CohortPlan:
    """A plan that was read and checked.

    Attributes
    ----------
    title : str
    concurrent : int
        pairs at a time.
    sites : dict
        maps the sites' short names, and "helper", to tables as a session file has
        them; empty where all images are on this machine.
    pairs : list of Pair
    shared : dict
        what is the same in all session files.
    """

    title: str
    concurrent: int
    sites: dict
    pairs: list
    shared: dict

    @classmethod
    def read(cls, path):
        """Read and check a plan.

        Raises
        ------
        SessionFileError
            naming the entry and the remedy.
        """
        contents = read_toml(path, "plan", "dipy_ppir_cohort --new", MAX_BYTES)
        try:
            return cls.parse(contents)
        except SessionFileError as exc:
            raise SessionFileError(f"plan {Path(path).name}: {exc}") from None

    @classmethod
    def parse(cls, contents):
        """Check the contents of a plan; see `read`."""
        check_keys(contents, _TOP | _TABLES, "the plan")
        for name in _TABLES & set(contents):
            if not isinstance(contents[name], dict):
                raise SessionFileError(f"[{name}] must be a table")
        title = text_of(contents, "title", "untitled cohort", where="the plan")
        if len(title) > _LONGEST_TITLE:
            raise SessionFileError(
                f"title has {len(title)} letters; {_LONGEST_TITLE} are the most, as "
                "those of pairs go on with their images"
            )
        concurrent = contents.get("concurrent", 1)
        if type(concurrent) is not int or not 1 <= concurrent <= MOST_CONCURRENT:
            raise SessionFileError(
                "concurrent, how many pairs are registered at a time, must be an "
                f"integer from 1 to {MOST_CONCURRENT}"
            )
        sites = _sites(contents, concurrent)
        shared = {"operation": text_of(contents, "operation", where="the plan")}
        for entry in ("reveal", "result_to", "parameters", "limits"):
            if entry in contents:
                shared[entry] = contents[entry]
        shared["timeouts"] = {"connect": CONNECT, **contents.get("timeouts", {})}
        plan = cls(title, concurrent, sites, _pairs(contents, sites), shared)
        for number, pair in enumerate(plan.pairs):
            session = plan.session(pair)
            if not number:
                operation_of(session)
        return plan

    @property
    def digest(self):
        """SHA-256 of what the plan says, whatever its comments and line ends."""
        pairs = [[str(image) for image in pair.images.values()] for pair in self.pairs]
        said = [self.title, self.concurrent, self.sites, pairs, self.shared]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def work(self):
        """SHA-256 of what is asked for of each pair, as `same_work` compares it."""
        shared = {k: v for k, v in self.shared.items() if k != "timeouts"}
        said = json.dumps([self.title, shared], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    def site_of(self, fingerprint):
        """The short name of the site with this certificate, or "helper".

        Raises
        ------
        SessionFileError
            if the plan does not name it.
        """
        for name, table in self.sites.items():
            if table["fingerprint"] == fingerprint:
                return name
        raise SessionFileError(
            "the plan does not name this site's certificate, whose fingerprint is "
            f"{fingerprint}; put it into the table of this site, in everybody's copy, "
            "or choose another --identity"
        )

    def pairs_of(self, site):
        """The pairs that a site takes part in; the helper does in all."""
        if site in (HELPER_NAME, ""):
            return list(self.pairs)
        return [pair for pair in self.pairs if pair.image_of(site)]

    def lane(self, pair):
        """Number of the lane that a pair is held in, from 0."""
        return (pair.place - 1) % self.concurrent

    def parties(self, pair):
        """The short names of the sites that take part in a pair."""
        return [*(image.site for image in pair.images.values()), HELPER_NAME]

    def session(self, pair):
        """The session file of a pair, checked.

        Returns
        -------
        plan : SessionFile
        """
        return SessionFile.parse(self.contents(pair))

    def contents(self, pair):
        """What the session file of a pair says; `toml_text` writes it."""
        parties = _HERE
        if self.sites:
            parties = {}
            for role, site in zip(TABLES, self.parties(pair), strict=True):
                parties[role] = {**self.sites[site]}
                if "address" in parties[role]:
                    host, port = parse_address(parties[role]["address"])
                    host = f"[{host}]" if ":" in host else host
                    parties[role]["address"] = f"{host}:{port + self.lane(pair)}"
        return {
            "title": f"{self.title}: {pair.moving} to {pair.static}",
            "place": pair.place,
            **self.shared,
            "parties": parties,
        }


def same_work(one, other):
    """Whether two session files ask for the same, wherever the parties are.

    Parameters
    ----------
    one, other : SessionFile
    """
    return _work(one) == _work(other)


def _work(session):
    said = {k: v for k, v in session.contents.items() if k not in ("place", "timeouts")}
    said["parties"] = {
        role: {k: v for k, v in table.items() if k != "address"}
        for role, table in said["parties"].items()
    }
    return said


def _sites(contents, concurrent):
    """Tables of the sites and the helper; none where all images are here."""
    tables = contents.get("sites", {})
    if not tables and HELPER_NAME not in contents:
        return {}
    if HELPER_NAME in tables:
        raise SessionFileError(
            "[sites.helper] must be [helper]: it belongs to no site that has images"
        )
    if len(tables) < 2 or HELPER_NAME not in contents:
        raise SessionFileError(
            "a plan between sites needs two tables [sites.NAME] or more, and [helper]; "
            "leave out all of them where all images are on this machine"
        )
    found = {}
    for name, table in {**tables, HELPER_NAME: contents[HELPER_NAME]}.items():
        where = f"[sites.{name}]" if name != HELPER_NAME else "[helper]"
        if not _SITE.fullmatch(name):
            raise SessionFileError(
                f"the name of a site, {name!r:.100}, must be 20 letters, digits, - and "
                "_ at most"
            )
        if not isinstance(table, dict):
            raise SessionFileError(f"{where} must be a table")
        check_keys(table, {"name", "address", "fingerprint"}, where)
        found[name] = {
            key: text_of(table, key, where=where)
            for key in ("name", "fingerprint", "address")
            if key in table or key != "address"
        }
        pin = parse_fingerprint(found[name]["fingerprint"])
        if pin is None:
            raise SessionFileError(
                f"fingerprint in {where} is not a SHA-256 fingerprint (64 hexadecimal "
                "digits); dipy_ppir_keygen --show prints it"
            )
        found[name]["fingerprint"] = pin
    _check_apart(found, concurrent)
    return found


def _check_apart(sites, concurrent):
    """Refuse sites that cannot be told apart, or would listen at the same ports."""
    for entry in ("name", "fingerprint"):
        said = [table[entry] for table in sites.values()]
        twice = [x for x in said if said.count(x) > 1]
        if twice:
            raise SessionFileError(
                f"two sites have the same {entry} ({twice[0]:.50}); each needs its own"
            )
    ports = {}
    for name, table in sites.items():
        if "address" not in table:
            continue
        address = parse_address(table["address"])
        if address is None or address[1] + concurrent > 65536:
            raise SessionFileError(
                f"address of {name} must be host:port, with room for {concurrent} "
                'ports from this one on, for example "registration.hospital.org:7433"'
            )
        for lane in range(concurrent):
            other = ports.setdefault((address[0], address[1] + lane), name)
            if other != name:
                raise SessionFileError(
                    f"{name} and {other} would both listen at {address[0]}:"
                    f"{address[1] + lane}: each takes {concurrent} ports from that of "
                    "its address on; put them further apart"
                )


def _pairs(contents, sites):
    if ("pairs" in contents) == ("all_pairs" in contents):
        raise SessionFileError(
            "give either pairs, a list of [moving, static], or [all_pairs], whose "
            "moving images are all registered to all of its static ones"
        )
    if "pairs" in contents:
        given = contents["pairs"]
    else:
        table = contents["all_pairs"]
        check_keys(table, {"moving", "static"}, "[all_pairs]")
        lists = [table.get(name) for name in ("moving", "static")]
        if not all(isinstance(x, list) and len(x) <= MOST_PAIRS for x in lists):
            raise SessionFileError("[all_pairs] needs two lists, moving and static")
        if len(lists[0]) * len(lists[1]) > MOST_PAIRS:
            raise SessionFileError(f"a plan has at most {MOST_PAIRS:,} pairs")
        given = [[m, s] for m in lists[0] for s in lists[1] if m != s]
    if not isinstance(given, list) or not given:
        raise SessionFileError("pairs must be a list of [moving, static], not empty")
    if len(given) > MOST_PAIRS:
        raise SessionFileError(f"a plan has at most {MOST_PAIRS:,} pairs")
    pairs, names = [], {}
    for place, entry in enumerate(given, 1):
        pair = Pair(place, *_images(entry, place, sites))
        twin = names.setdefault(pair.name.casefold(), pair)
        if twin is not pair:
            raise SessionFileError(
                f"pairs {twin.place} and {place} would both be called {pair.name}; "
                "name each pair once"
            )
        pairs.append(pair)
    return pairs


def _images(entry, place, sites):
    """Moving and static image of an entry of the list of pairs."""
    where = f"pair {place}"
    if isinstance(entry, dict):
        check_keys(entry, {"moving", "static"}, where)
        entry = [entry.get("moving"), entry.get("static")]
    if not isinstance(entry, list) or len(entry) != 2:
        raise SessionFileError(f"{where} must be [moving, static]")
    images = [_image(text, where, sites) for text in entry]
    if images[0] == images[1]:
        raise SessionFileError(f"{where} has the same image twice")
    if sites and images[0].site == images[1].site:
        raise SessionFileError(
            f"{where} has two images of {images[0].site}, which can register them by "
            "itself; a plan without [sites] is for those"
        )
    return images


def _image(text, where, sites):
    form = "SITE/PSEUDONYM" if sites else "PSEUDONYM"
    site, slash, pseudonym = text.partition("/") if isinstance(text, str) else ("",) * 3
    if not sites:
        site, pseudonym = "", text if isinstance(text, str) else ""
    if not _PSEUDONYM.fullmatch(pseudonym) or bool(slash) != bool(sites):
        raise SessionFileError(
            f"{where} has {text!r:.100}, which is not {form}; a pseudonym is 40 "
            "letters, digits, points, - and _ at most, and begins with a letter or "
            "digit"
            + ("" if sites else "; sites are named where there are tables [sites.NAME]")
        )
    if sites and (site not in sites or site == HELPER_NAME):
        raise SessionFileError(
            f"{where} names a site {site!r:.100} that has no table [sites.NAME]"
        )
    return Image(site, pseudonym)


def toml_text(contents):
    """Nested tables of texts, numbers and lists as TOML.

    Parameters
    ----------
    contents : dict

    Returns
    -------
    text : str
    """
    return "\n".join(_toml_lines(contents, [])) + "\n"


def _toml_lines(table, path):
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    lines = [f"{_toml_value(k)} = {_toml_value(v)}" for k, v in plain.items()]
    for name, inner in table.items():
        if isinstance(inner, dict):
            here = [*path, _toml_value(name)]
            lines += ["", f"[{'.'.join(here)}]", *_toml_lines(inner, here)]
    return lines


def _toml_value(value):
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    # Texts and numbers of JSON are among those of TOML, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
