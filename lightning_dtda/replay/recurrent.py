r"""LSTM layers with hand-written derivatives: the second derivative costs little more than the first.

With the gates :math:`y = (i, f, g, o)`, their pre-activations a, the cells c and the outputs h of a layer,

.. math:: a_t = W x_t + U h_{t-1} + b, \qquad c_t = f_t c_{t-1} + i_t g_t, \qquad h_t = o_t \tanh c_t .

The second derivative of torch's LSTM runs operation by operation and time step by time step. Here, only the recurrent
products with U run step by step; everything else is computed for the whole sequence at once. The derivative of the
gradient along a direction is the tangent of the gradient: one more forward and one more backward sweep (Pearlmutter,
*Fast exact multiplication by the Hessian*, 1994).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, grad
from torch.nn import functional

from lightning_dtda.compatibility import is_traced, is_transformed, onednn_linear, replaced_recurrence
from lightning_dtda.replay.kernels import enabled_kernels, using_kernels

_NOT_TWICE = frozenset({"cudnn", "mkldnn"})
"""Kernels of recurrent layers whose second derivative is missing, or slower than that of torch's plain kernels."""

_WEIGHTS = 2
"""Number of weight tensors per layer and direction; the number of biases is the same."""


@contextmanager
def twice_differentiable_recurrence() -> Iterator[None]:
    """Make recurrent layers twice differentiable inside this context; LSTMs use the implementation in this module.

    Packed sequences, projections, mixed precision and other kinds of layers use torch's plain kernels.
    """

    def plain(function: Callable[..., Any], *arguments: Any) -> Any:
        with using_kernels(set(enabled_kernels()) - _NOT_TWICE):
            return function(*arguments)

    def lstm(function: Callable[..., Any], *arguments: Any) -> Any:
        return _lstm(*arguments) if _is_covered(*arguments[:2]) else plain(function, *arguments)

    with replaced_recurrence({"lstm": lstm, "gru": plain, "rnn_tanh": plain, "rnn_relu": plain}):
        yield


def _is_covered(x: Tensor, states: Any) -> bool:
    """Return whether :func:`_lstm` supports these arguments of ``torch.lstm``."""
    return (
        not isinstance(states, Tensor)  # a tensor holds the batch sizes of a packed sequence
        and states[0].shape == states[1].shape  # the shapes differ for a projection
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(x.device.type)
        and not is_transformed()
    )


def _lstm(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``torch.lstm``: the outputs, and the last outputs and cells of each layer and direction."""
    hidden: list[Tensor] = []
    cells: list[Tensor] = []
    size = _WEIGHTS * (1 + has_biases)
    x = x.transpose(0, 1) if batch_first else x
    for layer in range(layers):
        outputs = []
        for backwards in range(1 + bidirectional):
            number = len(hidden)
            w, u, *biases = weights[number * size : (number + 1) * size]
            bias = biases[0] + biases[1] if has_biases else None
            h, c, _ = _Layer.apply(x.flip(0) if backwards else x, w, u, bias, states[0][number], states[1][number])
            hidden.append(h[-1])
            cells.append(c[-1])
            outputs.append(h.flip(0) if backwards else h)
        x = torch.cat(outputs, 2) if bidirectional else outputs[0]
        if layer < layers - 1:
            x = functional.dropout(x, dropout, train)
    return x.transpose(0, 1) if batch_first else x, torch.stack(hidden), torch.stack(cells)


class _Layer(Function):
    """One direction of a layer: maps inputs ``(T, B, I)`` and states ``(B, H)`` to outputs, cells and gates.

    Outputs and cells are ``(T, B, H)``. The gates ``(T, B, 4H)`` are returned for the second derivative, which arrives
    at them and at the cells.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, u: Tensor, bias: Tensor | None, h: Tensor, c: Tensor) -> Any:
        linear, arguments = _linear(x), (x, w, u, bias, h, c)
        flat = linear(x, w, bias)  # pre-activations; the loop turns them into gates in place
        outputs, cells, squashed = [], [], []
        for gates in _split(flat):
            gates.add_(linear(h, u).view_as(gates))
            gates[:, :2].sigmoid_()
            gates[:, 2].tanh_()
            gates[:, 3].sigmoid_()
            i, f, g, o = gates.unbind(1)
            c = torch.addcmul(f * c, i, g)
            cells.append(c)
            squashed.append(c.tanh())
            h = o * squashed[-1]
            outputs.append(h)
        stacked = torch.stack(cells)
        ctx.save_for_backward(*arguments, stacked, flat, torch.stack(squashed))
        ctx.set_materialize_grads(False)
        return torch.stack(outputs), stacked, flat

    @staticmethod
    def backward(ctx: Any, *by_results: Tensor | None) -> Any:
        return _Gradient.apply(*by_results, *ctx.saved_tensors)


class _Gradient(Function):
    r"""Gradients by the arguments of a layer, given the gradients by its outputs, cells and gates.

    From the last step to the first, with :math:`p_t = \partial (c_t, c_t, c_t, h_t) / \partial a_t` and
    :math:`q_t = \partial h_t / \partial c_t`,

    .. math:: \bar c_t \mathrel{+}= q_t \bar h_t, \qquad
        \bar a_t = p_t (\bar c_t, \bar c_t, \bar c_t, \bar h_t) + \frac{\partial y_t}{\partial a_t} \bar y_t, \qquad
        \bar c_{t-1} \mathrel{+}= f_t \bar c_t, \qquad \bar h_{t-1} \mathrel{+}= U^\top \bar a_t .
    """

    @staticmethod
    def forward(
        ctx: Any, by_outputs: Tensor | None, by_cells: Tensor | None, by_gates: Tensor | None, *saved: Tensor
    ) -> Any:
        x, w, u, bias, h, c, cells, flat, squashed = saved
        linear, transposed, gates = _linear(x), u.t(), _split(flat)
        local = _Local.of(gates, _before(c, cells), squashed)
        partials = local.slopes * local.factors
        arrived = None if by_gates is None else _split(by_gates) * local.slopes
        of_outputs, of_cells, of_sums, by_h, by_c = [], [], [], torch.zeros_like(c), torch.zeros_like(c)
        for step in reversed(range(len(x))):
            by_h = by_h if by_outputs is None else by_h + by_outputs[step]
            by_c = by_c if by_cells is None else by_c + by_cells[step]
            by_c = torch.addcmul(by_c, by_h, local.cells[step])
            of_outputs.append(by_h)
            of_cells.append(by_c)
            p = partials[step]
            sums = torch.cat((p[:, :3] * by_c.unsqueeze(1), (p[:, 3] * by_h).unsqueeze(1)), 1)
            of_sums.append((sums if arrived is None else sums + arrived[step]).flatten(1))
            by_h = linear(of_sums[-1], transposed)
            by_c = by_c * gates[step, :, 1]
        by_sums = torch.stack(of_sums[::-1])
        stacked = torch.stack(of_outputs[::-1]), torch.stack(of_cells[::-1])
        ctx.save_for_backward(by_outputs, by_cells, *saved, by_sums, *stacked)
        ctx.set_materialize_grads(False)
        return (
            linear(by_sums, w.t()) if x.requires_grad else None,
            _outer(by_sums, x) if w.requires_grad else None,
            _outer(by_sums, _before(h, local.outputs)) if u.requires_grad else None,
            by_sums.sum((0, 1)) if bias is not None and bias.requires_grad else None,
            by_h,
            by_c,
        )

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> Any:
        """Differentiate the gradient along a direction: sweep its tangents forwards, but nothing backwards yet.

        The derivatives by gates and cells go to :class:`_Layer`, whose single backward pass serves all derivatives.
        """
        if torch.is_grad_enabled():  # a third derivative follows: the loss contains a gradient
            return *_by_autograd(along, *ctx.saved_tensors[:8]), None, None, None
        _, _, x, w, u, _, h, c, cells, flat, squashed, by_sums, by_outputs, by_cells = ctx.saved_tensors
        dx, dw, du, dbias, dh, dc = along
        linear, gates = _linear(x), _split(flat)
        local = _Local.of(gates, _before(c, cells), squashed)
        h_before = _before(h, local.outputs)

        pairs = [(one, by) for one, by in ((dx, w), (x, dw), (h_before, du)) if one is not None and by is not None]
        terms = [linear(one, by) for one, by in pairs] + ([] if dbias is None else [dbias])
        sums = _split(sum(terms, torch.zeros_like(flat)))
        dh, dc = (torch.zeros_like(c) if one is None else one for one in (dh, dc))
        outputs, hidden = _sweep_forwards(sums, u, dh, dc, gates, local)

        crossing = None if du is None else linear(by_sums, du.t())
        by_gates, by_states, by_c = _of_each_step(
            sums, hidden, _before(dc, hidden), gates, squashed, local, by_outputs, by_cells, crossing
        )
        return (
            outputs if ctx.needs_input_grad[0] else None,
            hidden if ctx.needs_input_grad[1] else None,
            None,
            linear(by_sums, dw.t()) if dw is not None else None,
            _outer(by_sums, dx) if dx is not None else None,
            _outer(by_sums, _before(dh, outputs)),
            None,
            None if crossing is None else crossing[0],
            by_c,
            by_states,
            by_gates.flatten(2),
            None,
        )


class _Local(NamedTuple):
    r"""Local derivatives of each step of a layer.

    Args:
        outputs: Outputs h ``(T, B, H)``.
        slopes: Derivatives of the gates, :math:`\partial y_t / \partial a_t` ``(T, B, 4, H)``.
        factors: Derivatives of :math:`(c_t, c_t, c_t, h_t)` by the gates, :math:`(g_t, c_{t-1}, i_t, \tanh c_t)`.
        cells: Derivatives of the outputs by the cells, :math:`q_t = \partial h_t / \partial c_t` ``(T, B, H)``.
    """

    outputs: Tensor
    slopes: Tensor
    factors: Tensor
    cells: Tensor

    @classmethod
    def of(cls, gates: Tensor, before: Tensor, squashed: Tensor) -> _Local:
        """Compute the derivatives from the gates, the cells before each step, and the tanh of the cells."""
        i, _, g, o = gates.unbind(2)
        outputs = o * squashed
        slopes = torch.addcmul(gates, gates, gates, value=-1)
        slopes[:, :, 2].add_(1 - g)
        factors = torch.stack((g, before, i, squashed), 2)
        return cls(outputs, slopes, factors, torch.addcmul(o, outputs, squashed, value=-1))


def _by_autograd(along: Sequence[Tensor | None], *of: Tensor | None) -> list[Tensor | None]:
    """Differentiate the gradient of torch's LSTM along a direction, with a graph.

    Args:
        along: The direction.
        of: Inputs of the gradient: the gradients by outputs and by cells (only those by the last cells are used), and
            the arguments of the layer.

    Returns:
        The derivatives with respect to the gradients by outputs, cells and gates (``None`` for the gates), and with
        respect to the arguments.
    """
    # views: the gradients depend on the arguments, and the derivatives must not follow that dependence
    others: list[Any] = [one if one is None else one.view_as(one) for one in of]
    by_outputs, by_cells, *arguments = others
    x, w, u, bias, h, c = arguments
    weights = (w, u) if bias is None else (w, u, bias, torch.zeros_like(bias))
    states = h[None], c[None]
    with using_kernels(set(enabled_kernels()) - _NOT_TWICE):
        outputs, _, cell = torch.lstm(x, states, weights, bias is not None, 1, 0.0, True, False, False)
    results = [(outputs, by_outputs), (cell, None if by_cells is None else by_cells[-1:])]
    first = _grad(results, arguments)
    return _grad(list(zip(first, along, strict=True)), (by_outputs, by_cells, None, *arguments))


def _grad(of: Sequence[tuple[Tensor | None, Tensor | None]], by: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Differentiate tensors along directions, with a graph; ``None`` for inputs that need no derivative."""
    tensors, along = zip(*[pair for pair in of if pair[0] is not None and pair[1] is not None], strict=True)
    inputs = [one for one in by if one is not None and one.requires_grad]
    found = iter(grad(tensors, inputs, along, create_graph=True, allow_unused=True))
    return [next(found) if one is not None and one.requires_grad else None for one in by]


def _sweep_forwards(
    sums: Tensor, u: Tensor, h: Tensor, c: Tensor, gates: Tensor, local: _Local
) -> tuple[Tensor, Tensor]:
    """Return the tangents of outputs and cells, given those of the initial states; updates ``sums`` in place."""
    linear, partials, outputs, cells = _linear(u), local.slopes * local.factors, [], []
    for sum_, p, q, gate in zip(sums, partials, local.cells, gates, strict=True):
        reached = sum_.add_(linear(h, u).view_as(sum_)) * p
        c = torch.addcmul(reached[:, :3].sum(1), gate[:, 1], c)
        h = torch.addcmul(reached[:, 3], q, c)
        outputs.append(h)
        cells.append(c)
    return torch.stack(outputs), torch.stack(cells)


def _of_each_step(
    sums: Tensor,
    cells: Tensor,
    before: Tensor,
    gates: Tensor,
    squashed: Tensor,
    local: _Local,
    by_outputs: Tensor,
    by_cells: Tensor,
    crossing: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of the gradient along the tangents by gates, by cells and by the first cell.

    Args:
        sums: Tangents of the pre-activations; overwritten.
        cells: Tangents of the cells.
        before: Tangents of the cells before each step.
        gates: Gates y.
        squashed: Hyperbolic tangents of the cells.
        local: Local derivatives of the steps.
        by_outputs: Gradient by the outputs.
        by_cells: Gradient by the cells.
        crossing: Derivative by the outputs before each step, as far as the gradient contains them directly; ``None`` if
            there is none.
    """
    sums[:, :, :3].mul_(by_cells.unsqueeze(2))
    sums[:, :, 3].mul_(by_outputs)
    by_slopes, by_factors = sums * local.factors, sums.mul_(local.slopes)
    by_g, by_before, by_i, by_squashed = by_factors.unbind(2)
    by_gates = torch.addcmul(by_slopes, by_slopes, gates, value=-2)
    by_gates[:, :, 0].add_(by_i)
    by_gates[:, :, 1].add_(before * by_cells)
    by_gates[:, :, 2].add_(by_g - by_slopes[:, :, 2])
    by_q, slopes = cells * by_outputs, 1 - squashed * squashed
    by_gates[:, :, 3].add_(by_q * slopes)
    by_squashed = torch.addcmul(by_squashed, by_q, local.outputs, value=-2)
    if crossing is not None:
        by_output = _after(crossing)
        by_gates[:, :, 3].add_(by_output * squashed)
        by_squashed = torch.addcmul(by_squashed, by_output, gates[:, :, 3])
    return by_gates, torch.addcmul(_after(by_before), by_squashed, slopes), by_before[0]


def _split(flat: Tensor) -> Tensor:
    """Split values of the four gates ``(T, B, 4H)`` into ``(T, B, 4, H)``."""
    return flat.unflatten(2, (4, -1))


def _before(first: Tensor, each: Tensor) -> Tensor:
    """Return the values before each step: the initial value, followed by those after each step but the last."""
    return torch.cat((first.unsqueeze(0), each[:-1]))


def _after(each: Tensor) -> Tensor:
    """Return the derivatives that each step receives from the next one; the last step receives zeros."""
    return torch.cat((each[1:], torch.zeros_like(each[:1])))


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the sum of outer products over time and batch ``(T, B, ...)``."""
    rows, columns = rows.flatten(0, 1).t(), columns.flatten(0, 1).t()
    return _linear(rows)(columns, rows).t()  # oneDNN takes a third longer for the transposed product


def _linear(like: Tensor) -> Callable[..., Tensor]:
    """Return a function that multiplies by the transpose of a weight ``(M, K)``, with oneDNN if it is enabled.

    torch also uses oneDNN for LSTMs in training. In single precision it is up to twice as fast as MKL, which torch uses
    for matrix products.
    """
    uses_onednn = like.device.type == "cpu" and like.dtype == torch.float32 and torch.backends.mkldnn.enabled
    return (onednn_linear() if uses_onednn and not is_traced() else None) or functional.linear
