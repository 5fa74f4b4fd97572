"""What a run's training minimised, at one of its checkpoints: derivatives, streamed over the training examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.func import grad, hessian, jvp, vjp, vmap

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.memory import peak_memory
from lightning_dtda.optimizers import Hyperparameters
from lightning_dtda.replay import Replay
from lightning_dtda.replay.batches import map_tensors, rows_of
from lightning_dtda.replay.network import Network, loss_of_one
from lightning_dtda.trajectory import ParameterLayout
from lightning_dtda.units import human_bytes

_SPLIT_TOLERANCE = 1e-3
"""Relative difference of a gradient from the one through the network's outputs that is taken for rounding."""


class RootRows(NamedTuple):
    """Rows of a root of the Gauss-Newton matrix, those of B examples."""

    indices: Tensor
    """Which examples."""
    rows: Tensor
    """By the parameters that were asked for ``(B * C, n)``."""
    layers: list[tuple[Tensor, Tensor]]
    """By the outputs of each layer that was asked for ``(B * C, d_out)``, and its inputs ``(B, d_in)``."""


class Objective:
    r"""The mean training loss of a run at a step, with the module in evaluation mode.

    .. math:: L(\theta) = \frac1N \sum_n l_n(\theta) + \frac12 \sum_p \gamma_p \theta_p^2

    with :math:`\gamma` the weight decay of optimizers that add it to the gradient (a decoupled one is no part of any
    objective), and minus the losses for an optimizer that maximizes them. Examples pass through the module one by one:
    an influence function takes the loss for a sum over them.

    Args:
        replay: One run.
        step: t; ``None`` is the end of the training.
        memory: Bytes that what is computed at once may take.
        chunks: How many examples at a time stay within it, as found for runs of the same shape before.
        scale: s ``(P,)``, for other coordinates: of what follows, all derivatives are by :math:`\phi` at
            :math:`\theta + s \odot \phi`, so that matrices are those of the parameters with s on either side.
        decay: Added to :math:`\gamma` ``(P,)``.

    Raises:
        AttributionError: If the optimizer minimises by some parameters and maximizes by others.
    """

    def __init__(
        self,
        replay: Replay,
        step: int | None = None,
        *,
        memory: float,
        chunks: dict[tuple[str, int], int] | None = None,
        scale: Tensor | None = None,
        decay: Tensor | None = None,
    ) -> None:
        step = replay.steps if step is None else step
        self.run = replay.runs[0]
        self.step = step
        theta, buffers = replay.trained(step)
        self.theta = theta[0]
        self.memory = memory
        self._replay = replay
        self._buffers = {name: buffer[0] for name, buffer in buffers.items()}
        self._chunks = {} if chunks is None else chunks
        self.scale = scale
        groups = replay.hyperparameters(max(step - 1, 0))
        self._sign = self._descended(groups)
        penalty = torch.cat(
            [
                self.theta.new_full((part.stop - part.start,), replay.update.update.penalty(group))
                for part, group in zip(replay.update.slices, groups, strict=True)
            ]
        )
        if scale is not None:
            penalty = penalty * scale.square()
        self.penalty = penalty if decay is None else penalty + decay
        r""":math:`\gamma` ``(P,)``, in the coordinates that are asked for."""

    @property
    def size(self) -> int:
        """P."""
        return len(self.theta)

    @property
    def examples(self) -> int:
        """N."""
        return len(self._replay.examples)

    def gradients(self, held: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the gradients of examples' losses ``(B, P)``, B examples at a time, and which examples they are.

        Args:
            held: Further vectors of P numbers for each example that the caller has at the same time. What it still has
                when it asks for the next ones counts too.
        """
        of_each = vmap(grad(self._loss), in_dims=(None, 0))

        def computed(batch: Any) -> list[Tensor]:
            beside = self.theta.new_empty(held, rows_of(batch), self.size)
            return [beside, of_each(self.theta, batch)]

        for indices in self._split("gradients", 1 + held, computed):
            yield indices, of_each(self.theta, self._fetch(indices))

    def slopes(self, vectors: Tensor) -> Tensor:
        r"""Return :math:`\langle \nabla l_n(\theta), v \rangle` for each of ``vectors`` ``(Q, P)``, as ``(Q, N)``.

        By forward-mode differentiation of the losses, which needs no gradient of an example.
        """

        def along(batch: Any) -> Tensor:
            def losses(theta: Tensor) -> Tensor:
                return vmap(self._loss, in_dims=(None, 0))(theta, batch)

            def slope(vector: Tensor) -> Tensor:
                result: Tensor = jvp(losses, (self.theta,), (vector,))[1]
                return result

            return vmap(slope)(vectors)

        return torch.cat([along(self._fetch(indices)) for indices in self._split("slopes", len(vectors), along)], 1)

    def hessian_products(self, vectors: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the Hessian of L times each of ``vectors`` ``(Q, P)``, or that of the ``chosen`` examples' mean."""

        def products(batch: Any, vectors: Tensor) -> Tensor:
            def total(theta: Tensor) -> Tensor:
                return vmap(self._loss, in_dims=(None, 0))(theta, batch).sum()

            def product(vector: Tensor) -> Tensor:
                result: Tensor = jvp(grad(total), (self.theta,), (vector,))[1]
                return result

            return vmap(product)(vectors)

        return self._mean("Hessian products", products, vectors, chosen)

    def gauss_newton_products(self, network: Network, vectors: Tensor) -> Tensor:
        r"""Return the Gauss-Newton matrix of L times each of ``vectors`` ``(Q, P)``.

        .. math:: G = \frac1N \sum_n J_n^\top \nabla^2\ell_n(z_n) J_n + \operatorname{diag}(\gamma), \qquad
            J_n = \frac{d z_n}{d \theta}
        """

        def products(batch: Any, vectors: Tensor) -> Tensor:
            def outputs(theta: Tensor) -> Tensor:
                return vmap(self._output, in_dims=(None, None, 0))(network, theta, batch)

            def total(outputs: Tensor) -> Tensor:
                return vmap(self._loss_of_output, in_dims=(None, 0, 0))(network, outputs, batch).sum()

            def product(vector: Tensor) -> Tensor:
                at, along = jvp(outputs, (self.theta,), (vector,))  # type: ignore[misc]
                curved: Tensor = jvp(grad(total), (at,), (along,))[1]
                _, pull_back = vjp(outputs, self.theta)  # type: ignore[misc]
                result: Tensor = pull_back(curved)[0]
                return result

            return vmap(product)(vectors)

        return self._mean("Gauss-Newton products", products, vectors)

    def roots(self, network: Network, columns: Tensor | None = None, layers: Sequence[str] = ()) -> Iterator[RootRows]:
        r"""Yield rows of a root of the Gauss-Newton matrix, those of B examples at a time.

        .. math:: A_n = \left(\nabla^2\ell_n(z_n)\right)^{1/2} J_n, \qquad
            G = \frac1N \sum_n A_n^\top A_n + \operatorname{diag}(\gamma)

        Args:
            network: What has C outputs.
            columns: The parameters by which to differentiate; ``None`` is all of them.
            layers: Names of submodules of the network that are called once, with one tensor, and whose inputs and
                derivatives are wanted as well.

        Raises:
            AttributionError: If a loss is not convex in the outputs.
        """
        width = self.size if columns is None else len(columns)
        sizes = ("Jacobians", width + sum(network.sizes_of(layers)))
        for indices in self._split(*sizes, lambda batch: self._root_rows(network, batch, columns, layers)):
            yield RootRows(indices, *self._root_rows(network, self._fetch(indices), columns, layers))

    def first_root_rows(self, network: Network, layers: Sequence[str]) -> RootRows:
        """Return what :meth:`roots` yields, of the first example alone."""
        first = torch.arange(1)
        return RootRows(first, *self._root_rows(network, self._fetch(first), None, layers))

    def _root_rows(
        self, network: Network, batch: Any, columns: Tensor | None, layers: Sequence[str]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        _, roots = self.loss_roots(network, batch)
        shifts = [self.theta.new_zeros(size) for size in network.sizes_of(layers)]

        def of_one(example: Any, root: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
            def outputs(chosen: Tensor, shifts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
                theta = chosen if columns is None else self.theta.index_copy(0, columns, chosen)
                return self._of_one(
                    theta, example, lambda module, one: network.output_and_inputs(module, one, layers, shifts)
                )

            chosen = self.theta if columns is None else self.theta[columns]
            _, pull_back, inputs = vjp(outputs, chosen, shifts, has_aux=True)  # type: ignore[misc]
            rows, derivatives = vmap(pull_back)(root)
            return rows, derivatives, inputs

        rows, derivatives, inputs = vmap(of_one)(batch, roots)
        pairs = zip(derivatives, inputs, strict=True)
        return rows.flatten(0, 1), [(of_outputs.flatten(0, 1), of_inputs) for of_outputs, of_inputs in pairs]

    def materialize(self) -> LightningModule:
        """Return a module, in evaluation mode, that holds the run's parameters and buffers.

        Raises:
            AttributionError: If other coordinates were asked for, of which a module knows nothing.
        """
        if self.scale is not None:
            raise AttributionError(
                f"The parameters of {self.run.path} move at different rates: the optimizer scales each gradient's "
                "entries, or parameter groups have learning rates of their own. Kronecker factors have no such "
                "matrix. Use GaussNewton() or ExactHessian()."
            )
        return self._replay.module.materialize(self.theta, self._buffers)

    def network_inputs(self, network: Network, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that the network is called with for a batch, positional and by name."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def look(module: LightningModule, batch: Any) -> Tensor:
            found.append(network.inputs(module, batch))
            return self.theta

        with torch.no_grad():
            self._replay.module.measure(self.theta, self._buffers, batch, look)
        return found[0]

    def batches(self, size: int) -> Iterator[Any]:
        """Yield the training examples, ``size`` at a time."""
        for indices in torch.arange(self.examples).split(size):
            yield self._fetch(indices)

    def loss_roots(self, network: Network, batch: Any) -> tuple[Tensor, Tensor]:
        """Return a batch's outputs ``(B, C)``, and symmetric roots of its losses' Hessians by them ``(B, C, C)``."""
        outputs = vmap(self._output, in_dims=(None, None, 0))(network, self.theta, batch)
        return outputs, self._curvature_roots(network, batch, outputs)

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the parameters."""
        return self._replay.layout

    def _curvature_roots(self, network: Network, batch: Any, outputs: Tensor) -> Tensor:
        of_loss = vmap(hessian(lambda output, example: self._loss_of_output(network, output, example)))
        values, vectors = torch.linalg.eigh(of_loss(outputs, batch))
        floor = -self.theta.new_tensor(torch.finfo(self.theta.dtype).eps).sqrt() * values.abs().amax()
        if bool((values < floor).any()):
            raise AttributionError(
                f"The training loss of {self.run.path} is not convex in the network's outputs (smallest eigenvalue "
                f"{float(values.min()):.2g}): its Gauss-Newton matrix has no root. Use Hessian(...) or ExactHessian()."
            )
        return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT

    def find_network(self, name: str | None = None) -> Network:
        """Find the network in the module, and check that the loss depends on the parameters by its outputs only.

        Raises:
            AttributionError: If it does not.
            ReplayError: If there is no network; see :class:`~lightning_dtda.replay.network.Network`.
        """
        first = self._fetch(torch.arange(1))
        found: list[Network] = []

        def find(module: Any, batch: Any) -> Tensor:
            found.append(Network(module, batch, self._replay.layout.names, name))
            return self.theta.new_zeros(())

        self._replay.module.measure(self.theta, self._buffers, first, find)
        network = found[0]
        example = map_tensors(lambda leaf: leaf[0], first)
        whole = grad(self._loss)(self.theta, example)
        output, pull_back = vjp(lambda theta: self._output(network, theta, example), self.theta)  # type: ignore[misc]
        slope = grad(lambda output: self._loss_of_output(network, output, example))(output)
        if not bool((pull_back(slope)[0] - whole).norm() <= _SPLIT_TOLERANCE * whole.norm()):
            raise AttributionError(
                f"The training loss of {type(self._replay.module).__name__} depends on the parameters otherwise than "
                f"by the outputs of the network {network.name or 'itself'!r} (a penalty in training_step, say), of "
                "which the Gauss-Newton matrix knows nothing. Give network=..., leave the penalty to weight_decay, or "
                "use Hessian(...)."
            )
        return network

    def _descended(self, groups: Sequence[Hyperparameters]) -> float:
        """Return the sign of the loss in what the optimizer descends."""
        maximizes = {bool(group.get("maximize")) for group in groups}
        if len(maximizes) > 1:
            raise AttributionError(
                f"The optimizer of {self.run.path} minimises the loss by some parameters and maximizes it by others, "
                "which is the training of no objective. Use UnrolledDifferentiation(), which follows the steps."
            )
        return -1.0 if maximizes.pop() else 1.0

    def _loss(self, theta: Tensor, example: Any) -> Tensor:
        return self._sign * self._of_one(theta, example, loss_of_one)

    def _output(self, network: Network, theta: Tensor, example: Any) -> Tensor:
        return self._of_one(theta, example, network.output)

    def _loss_of_output(self, network: Network, output: Tensor, example: Any) -> Tensor:
        # whatever the parameters: the loss has nothing of them but the outputs
        return self._sign * self._of_one(
            self.theta, example, lambda module, batch: network.loss_of_output(module, batch, output)
        )

    def _of_one(self, theta: Tensor, example: Any, function: Callable[[Any, Any], Any]) -> Any:
        batch = map_tensors(lambda leaf: leaf.unsqueeze(0), example)
        if self.scale is not None:
            theta = self.theta + self.scale * (theta - self.theta)  # the same parameters, with derivatives by phi
        return self._replay.module.measure(theta, self._buffers, batch, function)

    def _mean(
        self, what: str, products: Callable[[Any, Tensor], Tensor], vectors: Tensor, chosen: Tensor | None = None
    ) -> Tensor:
        """Return the mean over examples of products with vectors ``(Q, P)``, and the penalty's beside it."""
        result = torch.zeros_like(vectors)
        examples = torch.arange(self.examples) if chosen is None else chosen
        size = len(self._split(what, len(vectors), lambda batch: products(batch, vectors))[0])
        for indices in examples.split(size):
            result += products(self._fetch(indices), vectors)
        return result.div_(len(examples)).addcmul_(vectors, self.penalty)

    def _fetch(self, indices: Tensor) -> Any:
        return self._replay.examples.fetch(indices)

    def _split(self, what: str, width: int, function: Callable[[Any], object]) -> tuple[Tensor, ...]:
        """Split the examples into chunks for which a function stays within the memory.

        Raises:
            AttributionError: If not even one example does.
        """
        if (what, width) not in self._chunks:
            # the first call keeps what is no part of a chunk
            function(self._fetch(torch.arange(1)))
            count = min(2, self.examples)
            alone, both = (
                peak_memory(lambda n=n: function(self._fetch(torch.arange(n))), self.theta.device)  # type: ignore[misc]
                for n in (1, count)
            )
            each = max(both - alone, 1)
            if alone > self.memory:
                raise AttributionError(
                    f"{what} of one example take {human_bytes(alone)}; {human_bytes(self.memory)} may be used. Raise "
                    "memory_budget, or ask fewer queries at a time."
                )
            self._chunks[what, width] = int(min(self.examples, 1 + (self.memory - alone) // each))
        return torch.arange(self.examples).split(self._chunks[what, width])
