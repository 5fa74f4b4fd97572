"""The gallery of a stored attribution: ``gallery.json`` in its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from typing_extensions import TypedDict

from lightning_dtda.attribution.gallery import Gallery, Shown
from lightning_dtda.attribution.gallery.pictures import SIGNATURE
from lightning_dtda.errors import DTDAError, TrajectoryError, UnknownFormatError
from lightning_dtda.trajectory.storage import read_json, write_json

GALLERY = "gallery.json"
_FORMAT_VERSION = 1

_MOST_IMAGE = 256 * 2**10
"""Largest size of a picture in bytes; thumbnails have at most 37 KB, figures usually less than 30 KB."""

_Index = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Content(TypedDict):
    examples: dict[_Index, Shown]
    queries: dict[_Index, Shown]


def write_gallery(path: Path, gallery: Gallery) -> None:
    """Write the gallery of the attribution in a directory, replacing an older one.

    Raises:
        OSError: If the directory cannot be written to.
    """
    content = {"examples": dict(gallery.examples), "queries": dict(gallery.queries)}
    write_json(path / GALLERY, {"format_version": _FORMAT_VERSION} | msgspec.to_builtins(content, str_keys=True))


def read_gallery(path: Path) -> Gallery:
    """Read the gallery of the attribution in a directory; empty if there is none.

    Raises:
        TrajectoryError: If it is damaged, or has an unknown format.
    """
    file = path / GALLERY
    if not (file.exists() or file.is_symlink()):
        return Gallery()
    content = read_json(file)
    remedy = "Delete it, and attribute again to make another."
    if content.get("format_version") != _FORMAT_VERSION:
        raise UnknownFormatError(
            f"{file} has format version {content.get('format_version')!r}; this lightning-dtda reads version "
            f"{_FORMAT_VERSION}. {remedy}"
        )
    try:
        found: Any = msgspec.convert(content, _Content, str_keys=True)
    except (msgspec.ValidationError, RecursionError) as reason:
        raise TrajectoryError(f"{file} is not valid: {reason}. {remedy}") from None
    for part, shown in found.items():
        for index, one in shown.items():
            check_image(one.image, f"{file}, {part} {index},", remedy, TrajectoryError)
    return Gallery(found["examples"], found["queries"])


def check_image(image: bytes | None, where: str, remedy: str, error: type[DTDAError]) -> None:
    """Refuse pictures that are too large, or no PNG files."""
    if image is not None and not image.startswith(SIGNATURE):
        raise error(f"{where} has an image that is not a PNG file. {remedy}")
    if image is not None and len(image) > _MOST_IMAGE:
        raise error(f"{where} has an image of {len(image):,} bytes, more than {_MOST_IMAGE:,}. {remedy}")
