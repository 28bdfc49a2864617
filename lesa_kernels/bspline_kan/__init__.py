"""The B-spline KAN layer, its spline functions on a uniform grid, and its reference."""

from lesa_kernels.bspline_kan.module import BSplineKAN
from lesa_kernels.bspline_kan.op import bspline_kan
from lesa_kernels.bspline_kan.reference import bspline_basis, bspline_evaluate, bspline_kan_ref, local_basis

__all__ = ["BSplineKAN", "bspline_basis", "bspline_evaluate", "bspline_kan", "bspline_kan_ref", "local_basis"]
