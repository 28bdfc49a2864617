"""Who makes the weights of the stored features: one small file for each forecaster.

A forecaster is one file in this folder, and its line below; docs/adding-a-forecaster.md shows an example.
"""

from lesa_kernels.forecasters.base import Forecaster, Option, RecordedRun, Steps
from lesa_kernels.forecasters.chebyshev import Chebyshev
from lesa_kernels.forecasters.dense import Dense
from lesa_kernels.forecasters.l2p import L2P
from lesa_kernels.forecasters.lesa import Lesa
from lesa_kernels.forecasters.linear import Linear
from lesa_kernels.forecasters.newton import Newton
from lesa_kernels.forecasters.registry import FORECASTERS, forecaster_of, register
from lesa_kernels.forecasters.taylor import Taylor
from lesa_kernels.forecasters.universal import Universal

__all__ = ["FORECASTERS", "SHIPPED", "Forecaster", "Option", "RecordedRun", "Steps", "forecaster_of", "register"]

# The order is that of tables and colours, so new ones go to the end.
for _kind in (Newton, Dense, Linear, Taylor, Chebyshev, Lesa, Universal, L2P):
    register(_kind())

SHIPPED = tuple(FORECASTERS.values())
"""The forecasters of this package. What users register is in `FORECASTERS` only."""
