"""Megatron-FSDP's second interface, and what it is made to do otherwise here: the parts of the engine nvFSDP.

Imports megatron-fsdp, an optional requirement, so import this module only where that engine is used.

A rank owns a part of the *main weights*, FP32: the model's parameters, which the optimizer updates and checkpoints
hold. Of the same part it keeps *compute weights*, in the compute dtype: these are gathered for forward and backward.
Whoever changes main weights pushes them into the compute weights. With FP32 as compute dtype, both are one buffer.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron_fsdp import MixedPrecisionPolicy
from megatron_fsdp.experimental import DBuffer, Flat, Partial, Placements, Replicate, fully_shard
from megatron_fsdp.experimental.module import FsdpModule
from megatron_fsdp.experimental.parameter_group import FsdpParameterGroup, get_containing_parameter_group
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from geneformer_pretrain.errors import TrainingError


class ParameterGroup(FsdpParameterGroup):
    """The weights of one module, whose gradients are reduced in the dtype of the main weights.

    Without replicas, sharded tensors and the buffer that is reduced are described once; anew in every step, that was
    two fifths of the host's work for 36 layers. (With replicas, megatron-fsdp replaces the buffer of gradients in every
    step, and their description with it.)
    """

    _gradients: tuple[DBuffer, list[DTensor]] | None = None

    @functools.cached_property
    def _partial_grad(self) -> DBuffer:
        owned = self.main_grad
        return DBuffer(
            mesh=self.mesh,
            placements=[Partial(dist.ReduceOp.AVG)] * self.mesh.ndim,
            tensor_shapes=owned.layout.tensor_shapes,
            dtype=owned.dtype,
            device="meta",
        )

    @functools.cached_property
    def _owners(self) -> list[tuple[dict[str, nn.Parameter | None], str]]:
        """Where each weight is kept: the parameters of its module, and its name there."""
        split = [name.rpartition(".") for name in self.parameter_names]
        return [(self.owning_module.get_submodule(module)._parameters, name) for module, _, name in split]

    def _set_module_parameters(self, parameters: tuple[nn.Parameter, ...]) -> None:
        for (owner, name), parameter in zip(self._owners, parameters, strict=True):
            owner[name] = parameter

    def _install_sharded_grads(self) -> None:
        if self._gradients is None or self._gradients[0] is not self.main_grad:
            indices = range(len(self.sharded_parameters))
            self._gradients = self.main_grad, [self.main_grad.get_dtensor(index) for index in indices]
        for parameter, gradient in zip(self.sharded_parameters, self._gradients[1], strict=True):
            parameter.grad = gradient

    def allocate_partial_grad_buffer(self) -> DBuffer:
        """Allocate the buffer that is reduced over the ranks."""
        partial_grad = copy.copy(self._partial_grad)
        partial_grad.local_buffer = torch.empty_like(partial_grad.local_buffer, device=self.main_grad.device)
        return partial_grad

    def copy_gradients_to_partial_buffer(self, partial_grad: DBuffer) -> None:
        """Copy gradients into the buffer that is reduced, and convert them, in one launch for all."""
        parts = [partial_grad.get_local_tensor(index) for index in range(len(self.unsharded_parameters))]
        torch._foreach_copy_(parts, [parameter.grad for parameter in self.unsharded_parameters])
        for parameter in self.unsharded_parameters:
            parameter.grad = None


class KeepsWeights:
    """Mixin for a sharded module: its weights stay gathered until the backward of a step's last micro-batch."""

    context: Any

    def post_forward(self) -> None:
        """Close the profiler's range that `pre_forward` opened, and free nothing."""
        torch.cuda.nvtx.range_pop()

    def _reshard_parameter_groups(self) -> None:
        if self.context.is_last_microbatch:
            super()._reshard_parameter_groups()  # type: ignore[misc]


def make_sharding(
    mesh: DeviceMesh, compute_dtype: torch.dtype, reshard_after_forward: bool
) -> Callable[[nn.Module], None]:
    """Make the function that shards a module: gathered in the compute dtype, gradients reduced in FP32.

    Parameters
    ----------
    reshard_after_forward
        Free weights after the forward and gather them again for the backward.
    """
    # Between micro-batches, gradients stay unreduced over the replicas; the last one's reduction averages them.
    flat, replicas = [Flat()], mesh.ndim - 1
    weights = [Replicate()] * replicas + flat
    gradient = [Partial(dist.ReduceOp.AVG)] * replicas + flat
    axes = list(mesh.mesh_dim_names or ())
    placements = Placements(dp_axes=axes, parameter=weights, gradient=gradient, optimizer=weights)
    policy = MixedPrecisionPolicy(main_params_dtype=torch.float32, main_grads_dtype=torch.float32)

    def shard(module: nn.Module) -> None:
        parameters = {name: p for name, p in module.named_parameters() if get_containing_parameter_group(p) is None}
        exact = {name: parameter.detach() for name, parameter in parameters.items()}
        # Compute weights get the dtype of the parameters; main weights would get their rounded values.
        for name, parameter in parameters.items():
            parameter.data = exact[name].to(compute_dtype)
        original: Any = type(module)
        fully_shard(module, mesh, placements, policy)
        module.__class__ = sharded_class(original, reshard_after_forward)
        for group in cast(Any, module).parameter_groups:
            group.__class__ = ParameterGroup
            whole = [exact[name] for name in group.parameter_names]
            group.main_weight.local_buffer.copy_(DBuffer.distribute_tensors(whole, mesh, weights).local_buffer)
            group.sync_model_weight_from_main_weight()

    return shard


@functools.cache
def sharded_class(original: type[nn.Module], reshard_after_forward: bool) -> type[nn.Module]:
    """Derive the class of sharded modules from that which they had: one for all of them.

    Compiled code is made for the class of its layer. Megatron-FSDP makes a class for each module: layers would be
    compiled one by one, and from the ninth on not at all.
    """
    bases = (FsdpModule, original) if reshard_after_forward else (KeepsWeights, FsdpModule, original)
    return type(f"Sharded{original.__name__}", bases, {})


def sharded_modules(model: nn.Module) -> list[FsdpModule]:
    """List the modules that own sharded weights, the root first."""
    return [module for module in model.modules() if isinstance(module, FsdpModule)]


def parameter_groups(model: nn.Module) -> Iterator[FsdpParameterGroup]:
    """Yield the groups of weights that lie in one buffer each."""
    for module in sharded_modules(model):
        yield from module.parameter_groups


def keep_gradients_until_reduced(model: nn.Module) -> None:
    """Tell the allocator which stream reads the buffers that hold the first step's gradients.

    With replicas, megatron-fsdp replaces each of them as soon as their sum over the replicas is under way. The memory,
    which is this stream's, would go to the backward's next tensors while it is still being read.
    """
    root = sharded_modules(model)[0]
    root._lazy_init_context()  # makes the stream
    for group in parameter_groups(model):
        group.main_grad.local_buffer.record_stream(root.context.reduce_scatter_stream)


def push_weights(model: nn.Module) -> None:
    """Copy the main weights into the compute weights."""
    for group in parameter_groups(model):
        group.sync_model_weight_from_main_weight()


def require_pushed(model: nn.Module) -> None:
    """Check that this rank's compute weights are its parameters in the compute dtype.

    Raises
    ------
    TrainingError
        They are not: a release of megatron-fsdp that keeps its weights in another way.
    """
    for group in parameter_groups(model):
        for index, (name, parameter) in enumerate(zip(group.parameter_names, group.sharded_parameters, strict=True)):
            found, main = group.model_weight.get_local_tensor(index), parameter.detach().to_local()
            if not torch.equal(found, main.to(group.dtype)):
                raise TrainingError(
                    f"training.use_nvfsdp=True: the {group.dtype} weights that forward and backward use are not those "
                    f"of the optimizer ({name}). This release of megatron-fsdp keeps them in another way than 0.6.1: "
                    "install that one, or set training.use_fsdp2=True in its place."
                )


def free_gathered(model: nn.Module) -> None:
    """Free gathered weights."""
    for module in sharded_modules(model):
        if module._unshard_event is not None:
            module._reshard_parameter_groups()
