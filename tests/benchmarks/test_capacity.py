"""The capacity model, held against queueing theory where there is a formula."""

from __future__ import annotations

import numpy as np
import pytest

import capacity


@pytest.mark.parametrize("utilisation", [0.4, 0.7])
def test_one_replica_of_one_place_is_pollaczek_and_khinchine_s(utilisation: float) -> None:
    """M/D/1: requests of equal length are served in their order, and wait rho / (2 mu (1 - rho)) on average. A Poisson stream that comes during
    a step of half the service is seen at its end, which moves nobody's turn. Of 4,000 requests the mean is known to a few per cent.
    """
    service, steps = 1.0, 2
    requests = capacity.arrivals(4000, utilisation / service, [steps])
    found = capacity.latencies(requests, {1: service / steps}, 1)
    assert len(found) == len(requests)
    assert np.mean(found) - service == pytest.approx(utilisation * service / (2 * (1 - utilisation)), rel=0.12)


def test_what_is_never_crowded_takes_its_own_time() -> None:
    found = capacity.latencies([(0.0, 4), (10.0, 8)], {1: 0.1, 2: 0.15}, 3, image=0.05)
    assert found == pytest.approx([0.45, 0.85])


def test_capacity_is_what_a_full_queue_gets() -> None:
    """All requests at once keep every batch full but the last: the rate is the capacity, but for that."""
    cost, steps = {1: 0.02, 2: 0.03, 4: 0.05}, [10]
    count = 400
    last = max(capacity.latencies([(0.0, 10)] * count, cost, 2, image=0.01))
    assert count / last == pytest.approx(2 * capacity.capacity(cost, steps, image=0.01), rel=0.05)


def test_more_replicas_wait_less_at_the_same_utilisation() -> None:
    """Pooling: of eight, the less busy of two is seldom busy."""
    waits = [
        np.percentile(capacity.latencies(capacity.arrivals(1500, 0.8 * replicas, [2]), {1: 0.5}, replicas), 95)
        for replicas in (1, 8)
    ]
    assert waits[1] < 0.7 * waits[0]


def test_costs_are_milliseconds() -> None:
    assert capacity.parse_cost("1=20.5,4=40") == {1: 0.0205, 4: 0.04}
