"""Find the linear layers of a model and choose those to prune.

find_sites(model) -> Found       what is there, and why the rest is left alone
select(found, ...) -> Selection  what the user's selectors choose
"""

from nmonnx.sites.constant import AT_RUN_TIME
from nmonnx.sites.find import converted_with, find_sites
from nmonnx.sites.select import Selection, block_selectors, matching, select
from nmonnx.sites.site import ROLES, Found, FusableCodes, FusableWeight, Site, Skipped

__all__ = [
    "AT_RUN_TIME",
    "ROLES",
    "Found",
    "FusableCodes",
    "FusableWeight",
    "Selection",
    "Site",
    "Skipped",
    "block_selectors",
    "converted_with",
    "find_sites",
    "matching",
    "select",
]
