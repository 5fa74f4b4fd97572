"""What an attribution says about itself, and the index of a stored one: the types of their entries."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from typing_extensions import NotRequired, TypedDict

from lightning_dtda.attribution.scales import ScaleName
from lightning_dtda.trajectory.manifest import Source
from lightning_dtda.trajectory.schema import Count, FileEntry

_Number = Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,18}\Z")]
"""A number as a key: in JSON, keys are text."""

_Norms = dict[_Number, float] | None


class Group(TypedDict):
    """A removal of several training examples."""

    name: str
    examples: list[Count]


class Drift(TypedDict, total=False):
    """Largest differences between the replay of a run and its record."""

    parameters: float
    gradients: float | None


class Diagnosed(TypedDict, total=False):
    """Errors of a run's responses."""

    finite_differences: float | None
    precision: float | None


class Draws(TypedDict):
    """Random draws of a measurement."""

    number: Count
    seed: Count


class About(TypedDict, total=False):
    """Description of an attribution. It may have more entries; none of these has to be there."""

    removals: str | list[Group] | None
    step: Count | None
    range: Annotated[list[float | None], msgspec.Meta(min_length=2, max_length=2)] | None
    scale: ScaleName
    chaotic: list[str]
    seeds: dict[str, dict[str, Count]]
    fixed_sources: list[Source]
    keep_top: Annotated[int, msgspec.Meta(ge=1)]
    draws: Draws | None
    shared: dict[str, str] | None
    ensemble: str | None
    configuration: dict[str, Any]
    drift: dict[str, Drift]
    adjoint_norms: dict[str, Any]  # checked in files only: long, and each selection of queries checks this again
    diagnosis: dict[str, Diagnosed]
    response_norm: dict[str, float]
    largest_response: dict[str, float]


class RunEntry(FileEntry):
    """The file of a run."""

    drift: Drift
    adjoint_norms: _Norms
    diagnosis: Diagnosed
    response_norm: float
    largest_response: float


class BlockEntry(FileEntry):
    """The file of a block of queries."""

    queries: Count
    trusted: list[str]
    drift: NotRequired[dict[str, Drift]]
    adjoint_norms: NotRequired[dict[str, _Norms]]
    diagnosis: NotRequired[dict[str, Diagnosed]]
    response_norm: NotRequired[dict[str, float]]
    largest_response: NotRequired[dict[str, float]]


class Index(TypedDict):
    """``attribution.json``, with either ``runs`` or ``blocks``."""

    about: About
    queries: list[int]
    removals: Count
    wanted: dict[str, Count | None]
    runs: NotRequired[dict[str, RunEntry]]
    blocks: NotRequired[dict[_Number, BlockEntry]]
    trusted: NotRequired[list[str]]
