"""The least time that a graph can take: its floating-point operations and bytes against the rates measured in the same run."""

from __future__ import annotations

from typing import Any

from gpu_suite.models import TOKENS
from gpu_suite.session import Rates, Session
from ldmrt.bench.flops import Cost, by_class, costs
from ldmrt.graph import Graph, specialize


def floor_of(graph: Graph, rows: int, rates: Rates) -> dict[str, Any]:
    """A graph's floors at a row count.

    Returns:
        flops and bytes; `flop_seconds`: all operations at the rate of a large matrix product; `node_seconds`: node by node the
        larger of operations and bytes; both by class of operator too. What depends on weights alone is left out: it is computed
        once, when an engine is loaded.
    """
    fixed = specialize(graph, {"rows": rows, "tokens": TOKENS})
    found = costs(fixed)

    def least(cost: Cost) -> float:
        return max(cost.flops / rates.gemm, cost.nbytes / rates.copy)

    flops, nbytes = sum(cost.flops for cost in found), sum(cost.nbytes for cost in found)
    classes = {}
    for name, total in by_class(found).items():
        part = [cost for cost in found if by_class([cost]).keys() == {name}]
        classes[name] = {"flops": total.flops, "bytes": total.nbytes, "node_seconds": sum(map(least, part))}
    return {
        "rows": rows,
        "flops": flops,
        "bytes": nbytes,
        "flop_seconds": flops / rates.gemm,
        "byte_seconds": nbytes / rates.copy,
        "node_seconds": sum(map(least, found)),
        "classes": classes,
    }


def floors(session: Session, unit: str) -> None:
    """The floors of every network that the suite times."""
    for name, batches in (("sd15", (1, 4, 8)), ("sdxl", (1,))):
        with session.results.part(unit, f"{name} decoder") as figures:
            model = session.model(name)
            figures.update(floor_of(model.decoder_graph, 1, session.rates))
        for batch in batches:
            with session.results.part(unit, f"{name} step, batch {batch} with guidance") as figures:
                figures.update(floor_of(session.model(name).unet["step"], 2 * batch, session.rates))
