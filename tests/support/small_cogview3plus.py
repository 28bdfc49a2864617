"""Small CogView 3 Plus pipelines of random weights."""

from small_cogview import CASES_OF_3_PLUS as CASES

__all__ = ["CASES"]

FAMILY, QUICK, RECORDED = "cogview3plus", "cogview3plus", "cogview3plus cfg"
