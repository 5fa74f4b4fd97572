"""The examples and queries of an attribution as people see them: made from the data, stored, shown by reports."""

from lightning_dtda.attribution.gallery.gallery import Gallery, Shown

__all__ = ["Gallery", "Shown"]
