"""Other methods for the same problem, to compare with; ``evaluate --suite baselines`` runs them."""

from latentdem.baselines.blind_dps import BlindDPSSettings, run_blind_dps
from latentdem.baselines.classical import ClassicalSettings, run_classical
from latentdem.baselines.fast_em import FastEMSettings, run_fast_em
from latentdem.baselines.rows import ROWS, Row, choose_rows, restore
from latentdem.operators.hyper_laplacian import HyperLaplacianSettings, hyper_laplacian

__all__ = [
    "ROWS",
    "BlindDPSSettings",
    "ClassicalSettings",
    "FastEMSettings",
    "HyperLaplacianSettings",
    "Row",
    "choose_rows",
    "hyper_laplacian",
    "restore",
    "run_blind_dps",
    "run_classical",
    "run_fast_em",
]
