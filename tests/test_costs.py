"""Bytes on the wire against the counts that the docstrings state."""

import numpy as np
import pytest

from dipy_ppir.mpc.contingency import BLOCK, Contingency, Scales
from dipy_ppir.mpc.ledger import MOVING, STATIC, declare
from dipy_ppir.mpc.logarithm import logarithm, take_apart
from dipy_ppir.mpc.protocols import reduce, share, truncate
from dipy_ppir.mpc.fields import P61, P127

declare("test-costs", (MOVING,), "any", "what a test opens")

N, CATEGORIES, BINS, COLUMNS = BLOCK + 1000, 28, 32, 12


def sent(session, function):
    """Result of a step, and the bytes this party sent in it."""
    before = sum(session.ledger.sent.values())
    result = function()
    return result, sum(session.ledger.sent.values()) - before


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(3)
    return {
        "category": rng.integers(0, CATEGORIES, N).astype(np.int32),
        "keep": rng.random(N) < 0.9,
        "weights": rng.integers(-500, 500, (N, 5)).astype(np.int64),
        "first": rng.integers(0, BINS - 5, N).astype(np.int32),
        "counted": (rng.random(N) < 0.8).astype(np.uint8),
        "rows": rng.standard_normal((N, CATEGORIES)),
        "columns": rng.standard_normal((N, COLUMNS)),
        "table": rng.uniform(-10, 0, (BINS, CATEGORIES)),
    }


def dense(data):
    out = np.zeros((N, BINS))
    for j in range(5):
        out[np.arange(N), data["first"] + j] = data["weights"][:, j]
    return out


def everything(session, data, keep):
    """All sums over samples, opened, with the bytes this party sent for each."""
    sums = Contingency(session, N, CATEGORIES, BINS)
    moving, static = session.pid == MOVING, session.pid == STATIC
    mine = (data["category"], data["keep"] if keep else None) if static else ()
    costs = {}
    _, costs["categories"] = sent(session, lambda: sums.share_categories(*mine))

    def band(a, b, scale):
        return data["weights"][a:b], data["first"][a:b], data["counted"][a:b]

    def columns(a, b):
        return data["columns"][a:b]

    table, costs["table"] = sent(session, lambda: sums.table(band if moving else None))
    scales = Scales(2.0**20, np.full(COLUMNS, 2.0**12))
    known = (lambda a, b: data["rows"][a:b], columns, scales) if moving else ()
    g, costs["contract"] = sent(session, lambda: sums.contract(COLUMNS, *known))
    # Shared by the helper for the test: a table that neither owner knows.
    secret = share(
        session,
        2,
        data["table"] if session.pid == 2 else None,
        (BINS, CATEGORIES),
        frac_bits=14,
        bound=45.0,
    )
    shared_scales = Scales(1.0, np.full(COLUMNS, 2.0**12))
    derivative = (
        (lambda a, b, _: band(a, b, _)[:2], columns, shared_scales) if moving else ()
    )
    h, costs["contract_shared"] = sent(
        session, lambda: sums.contract_shared(secret, COLUMNS, *derivative)
    )
    opened = [session.open(x, "test-costs", (MOVING,)) for x in (table, g, h)]
    return opened, costs, sums.frac_bits


@pytest.mark.parametrize("keep", [False, True])
def test_sums_and_their_bytes(three, data, keep):
    results = three(everything, data, keep)
    (table, g, h), _, frac_bits = results[0]
    total = {k: sum(r[1][k] for r in results) / 8 / N for k in results[0][1]}
    assert total == {
        "categories": CATEGORIES,
        "table": BINS + 1,
        "contract": CATEGORIES + COLUMNS + 2,
        "contract_shared": BINS + 3 * CATEGORIES + COLUMNS + 2,
    }
    with_gradient = total["table"] + total["contract"]
    assert with_gradient <= 80

    one_hot = np.zeros((N, CATEGORIES))
    one_hot[np.arange(N), data["category"]] = data["keep"] if keep else 1
    weights = dense(data)
    np.testing.assert_allclose(
        table[:-1] * 2.0**frac_bits, weights.T @ one_hot, rtol=0, atol=0.5
    )
    np.testing.assert_array_equal(table[-1], data["counted"] @ one_hot)
    z = (data["rows"] * one_hot).sum(axis=1)
    np.testing.assert_allclose(g / 2.0**32, z @ data["columns"], atol=0.1)
    z = ((weights @ data["table"]) * one_hot).sum(axis=1)
    np.testing.assert_allclose(
        h / 2.0**26, z @ data["columns"], rtol=0, atol=1e-3 * np.abs(z).sum()
    )


def test_elementary_bytes(three):
    """Elements per value: input 1, reduction 3, truncation 1 + 2, opening 2 or 1."""

    def party(session):
        x = np.linspace(-1, 1, 100)
        costs = {}
        a, costs["share"] = sent(
            session,
            lambda: share(
                session,
                0,
                x if session.pid == 0 else None,
                (100,),
                frac_bits=20,
                field=P127,
            ),
        )
        _, costs["open 1"] = sent(
            session, lambda: session.open(a, "test-costs", (MOVING,))
        )
        _, costs["open 2"] = sent(
            session, lambda: session.open(a * a, "test-costs", (MOVING,))
        )
        _, costs["reduce"] = sent(session, lambda: reduce(session, a * a))
        _, costs["truncate"] = sent(
            session, lambda: truncate(session, a * a, 20, field=P61)
        )
        return costs

    results = three(party)
    total = {k: sum(r[k] for r in results) / 100 for k in results[0]}
    assert total == {
        "share": 16,
        "open 1": 16,
        "open 2": 32,
        "reduce": 48,
        "truncate": 16 + 2 * 8,
    }


def test_logarithm(three):
    """Exact bits, logarithms to 2.5e-7, and the bytes stated per number."""
    edges = [1, 2, 3, 2**40 - 1, 2**40, 2**40 + 1, 2**58]
    rng = np.random.default_rng(5)
    values = np.array(edges + list(np.floor(2.0 ** rng.uniform(0, 50, 93))))

    def party(session):
        x = share(
            session,
            1,
            values if session.pid == 1 else None,
            values.shape,
            bound=2.0**58,
        )
        bits, apart = sent(session, lambda: take_apart(session, x))
        logs, taken = sent(session, lambda: logarithm(session, bits))
        parts = [
            session.open(v, "test-costs", (MOVING,))
            for v in (bits.integer, bits.exponent, bits.mantissa, logs)
        ]
        return parts, apart, taken

    results = three(party)
    integer, exponent, mantissa, logs = results[0][0]
    np.testing.assert_array_equal(integer, values)
    np.testing.assert_array_equal(exponent, np.floor(np.log2(values)))
    exact = values / 2.0**exponent - 1
    assert ((exact - mantissa >= 0) & (exact - mantissa < 2.0**-24)).all()
    np.testing.assert_allclose(logs, np.log(values), rtol=0, atol=2.5e-7)
    apart, taken = (sum(r[i] for r in results) / len(values) for i in (1, 2))
    # One part to the moving owner, 26 words of AND, 31 bits and 2 parts brought to
    # arithmetic shares, 3 sums reduced; then 8 truncations.
    assert apart == 8 + 26 * 40 + (2 * 31 + 2 + 3 * 3) * 16
    assert taken == 8 * 3 * 16
