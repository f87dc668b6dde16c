"""Images: from a hospital's folder to bytes in memory, each file read once and every one accounted for."""

from wardround.data.hospitals import write_hospitals
from wardround.data.index import Index, SiteImages, open_site
from wardround.data.labelled import LabelledImages, channel_constants, labelled_sites, read_labelled, select_site
from wardround.data.masks import MaskedImages, read_masked
from wardround.data.procedural import positioning_set, procedural_set

__all__ = [
    "Index",
    "LabelledImages",
    "MaskedImages",
    "SiteImages",
    "channel_constants",
    "labelled_sites",
    "open_site",
    "positioning_set",
    "procedural_set",
    "read_labelled",
    "read_masked",
    "select_site",
    "write_hospitals",
]
