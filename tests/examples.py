"""How many examples hypothesis makes up for the tests of kernels."""

from hypothesis import HealthCheck, settings

# With `make test-full` they are new in every run, and three times as many.
MORE = not settings.default.derandomize


def quick(max_examples):
    """Settings that depend on no clock; a third of the examples in most runs."""
    return settings(
        max_examples=max_examples if MORE else max_examples // 3,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
