"""The random number generators that a training step may draw from: saving, restoring and reproducing their draws."""

from __future__ import annotations

import ctypes
import json
import random
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dtda.compatibility import TorchDispatchMode, tree_map
from lightning_dtda.errors import ReplayError

_NOT_A_STATE = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError, struct.error)
"""What generators may raise for an invalid state."""

_OWN = "own."
"""Name prefix of generators that are attributes of the module; a number follows, in the order of its submodules."""

_TWISTER_BYTES = 624 * 4 + 4
"""Size of NumPy's Mersenne Twister in memory: 624 words, and the position in them."""

_WORDS_IN_PYTHON = 4 + 624 * 4
"""Size of Python's Mersenne Twister in memory, after the object header: the position, and 624 words."""

_GAUSSIAN = struct.Struct("<?d")
"""Format of a flag, whether a normal number is cached for the next call, and of that number."""

FILLING = frozenset(
    {"bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"}
)
"""torch operations that fill a tensor with random numbers."""

_RETURN = frozenset({"bernoulli", "rand", "rand_like", "randn", "randn_like", "normal", "native_dropout"})
"""torch operations that return floating-point random numbers."""

Generator: TypeAlias = "torch.Generator | np.random.Generator | np.random.RandomState | random.Random"

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""Types of generators that an object may own."""


class Generators:
    """All generators that a module may draw from: the global ones of torch, NumPy and Python, and its own.

    Args:
        module: The module. Its own generators are those among the attributes of its submodules.
        device: Device of the module.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        found = [value for layer in module.modules() for value in vars(layer).values() if isinstance(value, GENERATORS)]
        self._own: list[Any] = list({id(generator): generator for generator in found}.values())
        self._device = device
        self._numpy: tuple[bytes, Tensor] | None = None
        self._python: tuple[bytes, Tensor] | None = None

    def states(self) -> dict[str, Tensor]:
        """Return the state of each generator by name, as a tensor of bytes."""
        states = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        states["numpy"] = self._state_of_numpy()
        states["python"] = self._state_of_python()
        for number, generator in enumerate(self._own):
            states[f"{_OWN}{number}"] = _state(generator)
        return states

    def set(self, states: Mapping[str, Tensor]) -> None:
        """Restore the states of the named generators, as returned by :meth:`states`.

        Raises:
            ReplayError: If the states include that of a GPU but the module is not on one.
        """
        for name, state in states.items():
            if name == "cuda" and self._device.type != "cuda":
                raise ReplayError(
                    f"The training drew random numbers on a GPU, but the replay runs on {self._device}, which "
                    'cannot draw the same. Give device="cuda" (on the command line: --device cuda).'
                )
            try:
                self._set(name, state)
            except _NOT_A_STATE as error:
                raise ReplayError(
                    f"The recorded state of the random number generator {name} does not fit this module or these "
                    f"versions of torch and NumPy ({error}). Give the module that was trained, or record the run again."
                ) from error

    def _set(self, name: str, state: Tensor) -> None:
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        elif name == "numpy":
            np.random.set_state(_to_numpy(state))
            self._numpy = None  # a normal number may be cached again, unnoticed
        elif name == "python":
            random.setstate(_to_python(state))
            self._python = None
        else:
            _set_state(self._own[int(name.removeprefix(_OWN))], state)

    def seed(self, seed: int) -> None:
        """Seed all generators; the module's own get others, as they would draw the same numbers from the same seed."""
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self.seed_own(seed)

    def seed_own(self, seed: int) -> None:
        """Seed the module's own generators."""
        for number, generator in enumerate(self._own, 1):
            seed_generator(generator, seed + number)

    @contextmanager
    def refusing_other_devices(self, states: Mapping[str, Tensor]) -> Iterator[None]:
        """Refuse random numbers drawn on a GPU inside if the training drew none there.

        Args:
            states: States of the generators that the training drew from.

        Raises:
            ReplayError: If numbers are drawn on a GPU, but were not in the training.
        """
        is_on_gpu = self._device.type == "cuda" and "cuda" not in states
        before = torch.cuda.get_rng_state(self._device) if is_on_gpu else None
        yield
        if before is not None and not torch.equal(before, torch.cuda.get_rng_state(self._device)):
            raise ReplayError(
                "The training drew its random numbers on the CPU, but the replay runs on a GPU, which cannot draw "
                'the same. Give device="cpu" (on the command line: --device cpu).'
            )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the generators at the end, whatever is drawn inside."""
        before = self.states()
        try:
            yield
        finally:
            self.set(before)

    def _state_of_numpy(self) -> Tensor:
        # get_state() takes 25 us, which matters for a small step: it is called only if the memory has changed, or if a
        # normal number is cached, which that memory does not show
        bits: Any = np.random.mtrand.get_bit_generator()
        content = ctypes.string_at(bits.ctypes.state_address, _TWISTER_BYTES)
        if self._numpy is None or self._numpy[0] != content:
            state_of_all: Any = np.random.get_state()
            _, words, position, has_gaussian, gaussian = state_of_all
            packed = (
                words.astype("<u4").tobytes() + struct.pack("<i", position) + _GAUSSIAN.pack(has_gaussian, gaussian)
            )
            state = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
            self._numpy = None if has_gaussian else (content, state)
            return state
        return self._numpy[1]

    def _state_of_python(self) -> Tensor:
        # as for NumPy: getstate() and the conversion to bytes take 17 us
        content = _memory_of_python()
        if content is None or self._python is None or self._python[0] != content:
            state: Any = random.getstate()
            packed = _of_python(state)
            # only if the memory has the layout assumed, that of CPython
            is_known = content is not None and content == _in_memory(state) and state[2] is None
            self._python = (content, packed) if is_known and content is not None else None
            return packed
        return self._python[1]


def seed_generator(generator: Generator, seed: int) -> None:
    """Seed a generator that is not a global one."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        fresh: Any = type(generator.bit_generator)
        generator.bit_generator.state = fresh(seed).state
    else:
        generator.seed(seed % 2**32)


def drawn_from(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the earlier states of the generators whose state has changed: those that were drawn from."""
    return {
        name: state
        for name, state in before.items()
        if state is not after[name] and not torch.equal(state, after[name])
    }


class DrawnIn(TorchDispatchMode):
    """Draws floating-point numbers in the data type of the training when replaying in another one.

    The same bits of a generator give different numbers in another data type. In this mode, a training in single
    precision that is replayed in double precision draws the same numbers as before.

    Args:
        recorded: Data type of the training.
        computed: Data type of the replay.
    """

    def __init__(self, recorded: torch.dtype, computed: torch.dtype) -> None:
        super().__init__()
        self._recorded = recorded
        self._computed = computed

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in FILLING and args[0].dtype == self._computed:
            return args[0].copy_(func(torch.empty_like(args[0], dtype=self._recorded), *args[1:], **kwargs))
        if name in _RETURN:
            if not any(isinstance(value, Tensor) for value in args):
                kwargs = kwargs | {"dtype": kwargs.get("dtype") or self._computed}
            drawn = func(*tree_map(self._lowered, args), **tree_map(self._lowered, kwargs))
            return tree_map(self._raised, drawn)
        return func(*args, **kwargs)

    def _lowered(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self._recorded if value == self._computed else value
        return value.to(self._recorded) if isinstance(value, Tensor) and value.dtype == self._computed else value

    def _raised(self, value: Any) -> Any:
        return value.to(self._computed) if isinstance(value, Tensor) and value.dtype == self._recorded else value


def _to_numpy(state: Tensor) -> tuple[str, Any, int, int, float]:
    content = state.numpy().tobytes()
    (position,) = struct.unpack_from("<i", content, 624 * 4)
    has_gaussian, gaussian = _GAUSSIAN.unpack_from(content, _TWISTER_BYTES)
    _check_position(position, 624)
    return "MT19937", np.frombuffer(content, "<u4", 624), position, int(has_gaussian), gaussian


def _memory_of_python() -> bytes | None:
    """Return the memory of Python's global generator; ``None`` if it is not all of its state, or not CPython's."""
    generator: Any = getattr(random.getstate, "__self__", None)
    twister: Any = random.Random.__base__
    if not isinstance(generator, twister) or generator.gauss_next is not None:
        return None
    if twister.__basicsize__ < object.__basicsize__ + _WORDS_IN_PYTHON:
        return None
    return ctypes.string_at(id(generator) + object.__basicsize__, _WORDS_IN_PYTHON)


def _in_memory(state: Any) -> bytes:
    """Return the bytes that CPython would hold in memory for a state."""
    *words, position = state[1]
    return struct.pack("=i", position) + np.array(words, "=u4").tobytes()


def _of_python(state: Any) -> Tensor:
    _, words, gaussian = state
    packed = np.array(words, "<u4").tobytes() + _GAUSSIAN.pack(gaussian is not None, gaussian or 0.0)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _to_python(state: Tensor) -> Any:
    content = state.numpy().tobytes()
    has_gaussian, gaussian = _GAUSSIAN.unpack_from(content, 625 * 4)
    return 3, tuple(np.frombuffer(content, "<u4", 625).tolist()), gaussian if has_gaussian else None


def _state(generator: Any) -> Tensor:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return _of_python(generator.getstate())
    is_old = isinstance(generator, np.random.RandomState)
    state: Any = generator.get_state(legacy=False) if is_old else generator.bit_generator.state
    content = json.dumps(state, default=lambda value: value.tolist())
    return torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)


def _set_state(generator: Any, state: Tensor) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
        return
    if isinstance(generator, random.Random):
        generator.setstate(_to_python(state))
        return
    content = json.loads(state.numpy().tobytes())
    _check_position(content["state"].get("pos", 0), 624)  # of a Mersenne Twister
    _check_position(content.get("buffer_pos", 0), 4)  # of Philox
    if isinstance(generator, np.random.RandomState):
        content["state"]["key"] = np.array(content["state"]["key"], np.uint32)
        generator.set_state(content)
    else:
        generator.bit_generator.state = content


def _check_position(position: int, most: int) -> None:
    # NumPy would read what lies behind the state in memory, and may crash
    if not 0 <= position <= most:
        raise ValueError(f"position {position}")
