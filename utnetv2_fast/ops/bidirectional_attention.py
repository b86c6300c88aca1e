"""Bidirectional attention between a token map and a semantic map (UTNetV2, section 3.2): function, ops, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from utnetv2_fast.ops.arguments import autocast_dtype, check_alike, check_dtype, lowered
from utnetv2_fast.ops.dispatch import Impl, choose, implementation


def bidirectional_attention(
    q: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_v: Tensor,
    *,
    scale: float | None = None,
    need_map: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend from every token to the semantic map and from the semantic map to every token, with one score matrix.

    S = scale * q @ map_q^T is computed once, and its transpose serves the other direction.

    Args:
        q: (B, H, n, d) token map, query and key at once.
        v: (B, H, n, d) values of the token map.
        map_q: (B, H, l, d) semantic map, query and key at once.
        map_v: (B, H, l, d) values of the semantic map.
        scale: factor of the scores; d ** -0.5 unless given.
        need_map: whether the semantic map is updated too. Without it that half of the work is not done, and `v` is
            only checked.
        impl: backend: "auto" takes the fastest that can run these inputs, a named one runs or raises.

    Tensors are float32, float16, bfloat16 or float64, all of one dtype on one device, with any strides; under autocast
    they are cast as for `torch.nn.functional.scaled_dot_product_attention`. B and H may be 0; n, l and d may not.

    Returns:
        out: (B, H, n, d) = softmax(S, over l) @ map_v, with the memory layout of `q`.
        map_out: (B, H, l, d) = softmax(S, over n)^T @ v, with the memory layout of `map_q`; None if not `need_map`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown `impl`.
        NotImplementedError: the backend named by `impl` cannot run these inputs.
    """
    if (dtype := autocast_dtype(q)) is not None:
        q, v, map_q, map_v = lowered(q, dtype), lowered(v, dtype), lowered(map_q, dtype), lowered(map_v, dtype)
    _check(q, v, map_q, map_v)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    # Dynamo refuses an autograd.Function that is given one tensor twice; a view is another tensor.
    if v is q:
        v = v.view_as(v)
    if map_q is q or map_q is v:
        map_q = map_q.view_as(map_q)
    if map_v is q or map_v is v or map_v is map_q:
        map_v = map_v.view_as(map_v)
    backend = choose("bidirectional_attention", impl, (q, v, map_q, map_v))
    if need_map:
        return _BidirectionalAttention.apply(q, v, map_q, map_v, scale, backend)
    return _TokenAttention.apply(q, map_q, map_v, scale, backend), None


def _check(q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be (B, H, n, d), not of shape {tuple(q.shape)}")
    if v.shape != q.shape:
        raise ValueError(f"v must have the shape of q, {tuple(q.shape)}, not {tuple(v.shape)}")
    if map_q.ndim != 4 or map_q.shape[:2] != q.shape[:2] or map_q.shape[3] != q.shape[3]:
        raise ValueError(f"map_q must be (B, H, l, d) beside q of shape {tuple(q.shape)}, not {tuple(map_q.shape)}")
    if map_v.shape != map_q.shape:
        raise ValueError(f"map_v must have the shape of map_q, {tuple(map_q.shape)}, not {tuple(map_v.shape)}")
    if q.shape[2] == 0 or q.shape[3] == 0 or map_q.shape[2] == 0:
        raise ValueError(
            f"n, l and d must be at least 1; q has shape {tuple(q.shape)} and map_q has shape {tuple(map_q.shape)}"
        )
    check_dtype("q", q)
    check_alike("v", v, "q", q)
    check_alike("map_q", map_q, "q", q)
    check_alike("map_v", map_v, "q", q)


torch.library.define(
    "utnetv2_fast::bidirectional_attention",
    "(Tensor q, Tensor v, Tensor map_q, Tensor map_v, float scale, str impl)"
    " -> (Tensor out, Tensor map_out, Tensor column_lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "utnetv2_fast::bidirectional_attention_backward",
    "(Tensor grad_out, Tensor grad_map_out, Tensor q, Tensor v, Tensor map_q, Tensor map_v, Tensor map_out,"
    " Tensor column_lse, float scale, str impl)"
    " -> (Tensor grad_q, Tensor grad_v, Tensor grad_map_q, Tensor grad_map_v)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "utnetv2_fast::token_attention",
    "(Tensor q, Tensor map_q, Tensor map_v, float scale, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "utnetv2_fast::token_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor map_q, Tensor map_v, float scale, str impl)"
    " -> (Tensor grad_q, Tensor grad_map_q, Tensor grad_map_v)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("utnetv2_fast::bidirectional_attention", "default")
def _forward(
    q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor, scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(impl).bidirectional_attention(q, v, map_q, map_v, scale)


@torch.library.register_fake("utnetv2_fast::bidirectional_attention")
def _forward_fake(
    q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor, scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    statistics_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), torch.empty_like(map_q), map_q.new_empty(map_q.shape[:3], dtype=statistics_dtype)


@torch.library.impl("utnetv2_fast::bidirectional_attention_backward", "default")
def _backward(
    grad_out: Tensor,
    grad_map_out: Tensor,
    q: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_v: Tensor,
    map_out: Tensor,
    column_lse: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return implementation(impl).bidirectional_attention_backward(
        grad_out, grad_map_out, q, v, map_q, map_v, map_out, column_lse, scale
    )


@torch.library.register_fake("utnetv2_fast::bidirectional_attention_backward")
def _backward_fake(
    grad_out: Tensor,
    grad_map_out: Tensor,
    q: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_v: Tensor,
    map_out: Tensor,
    column_lse: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(v), torch.empty_like(map_q), torch.empty_like(map_v)


@torch.library.impl("utnetv2_fast::token_attention", "default")
def _token_forward(q: Tensor, map_q: Tensor, map_v: Tensor, scale: float, impl: str) -> Tensor:
    return implementation(impl).token_attention(q, map_q, map_v, scale)


@torch.library.register_fake("utnetv2_fast::token_attention")
def _token_forward_fake(q: Tensor, map_q: Tensor, map_v: Tensor, scale: float, impl: str) -> Tensor:
    return torch.empty_like(q)


@torch.library.impl("utnetv2_fast::token_attention_backward", "default")
def _token_backward(
    grad_out: Tensor, q: Tensor, map_q: Tensor, map_v: Tensor, scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(impl).token_attention_backward(grad_out, q, map_q, map_v, scale)


@torch.library.register_fake("utnetv2_fast::token_attention_backward")
def _token_backward_fake(
    grad_out: Tensor, q: Tensor, map_q: Tensor, map_v: Tensor, scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(map_q), torch.empty_like(map_v)


_forward_op = torch.ops.utnetv2_fast.bidirectional_attention.default
_backward_op = torch.ops.utnetv2_fast.bidirectional_attention_backward.default
_token_forward_op = torch.ops.utnetv2_fast.token_attention.default
_token_backward_op = torch.ops.utnetv2_fast.token_attention_backward.default


class _BidirectionalAttention(torch.autograd.Function):
    """Outside the ops: cheaper than an autograd formula registered with the dispatcher, and the same under compile."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor, scale: float, impl: str
    ) -> tuple[Tensor, Tensor]:
        out, map_out, column_lse = _forward_op(q, v, map_q, map_v, scale, impl)
        ctx.save_for_backward(q, v, map_q, map_v, map_out, column_lse)
        ctx.scale, ctx.impl = scale, impl
        return out, map_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_map_out: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward_op(grad_out, grad_map_out, *ctx.saved_tensors, ctx.scale, ctx.impl)
        return (*gradients, None, None)


class _TokenAttention(torch.autograd.Function):
    """The case `need_map=False`, which has fewer inputs and outputs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, map_q: Tensor, map_v: Tensor, scale: float, impl: str) -> Tensor:
        ctx.save_for_backward(q, map_q, map_v)
        ctx.scale, ctx.impl = scale, impl
        return _token_forward_op(q, map_q, map_v, scale, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return (*_token_backward_op(grad_out, *ctx.saved_tensors, ctx.scale, ctx.impl), None, None)
