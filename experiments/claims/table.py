"""The table of claims: every row, by subject. A new subject is a file with CLAIMS, named here."""

from experiments.claims import (
    compute,
    decoding,
    formats,
    measured,
    memory,
    network,
    pipeline,
    precision,
    routing,
    serving,
    topologies,
    training,
)
from experiments.claims.claim import Claim

SUBJECTS: dict[str, tuple[Claim, ...]] = {
    "memory": memory.CLAIMS,
    "compute": compute.CLAIMS,
    "training": training.CLAIMS,
    "precision": precision.CLAIMS,
    "formats": formats.CLAIMS,
    "measured": measured.CLAIMS,
    "pipeline": pipeline.CLAIMS,
    "decoding": decoding.CLAIMS,
    "routing": routing.CLAIMS,
    "topologies": topologies.CLAIMS,
    "network": network.CLAIMS,
    "serving": serving.CLAIMS,
}
CLAIMS: dict[str, Claim] = {claim.name: claim for rows in SUBJECTS.values() for claim in rows}
