"""Small Sana pipelines of random weights for videos."""

from small_sana import VIDEO_CASES as CASES

__all__ = ["CASES"]

FAMILY, QUICK, RECORDED = "sana-video", "sana video", "sana video cfg"
