"""Attention whose keys and values go round the mesh axis `stream` instead of being gathered over it.

Ring attention (Liu et al. 2023, arXiv 2310.01889), with streams in place of blocks of rows: a device attends to the keys
of its own streams, passes them on to its neighbour and goes on with those that it gets, until it has met them all. It
holds the keys and values of two devices at a time, and every device has the same work. Outputs over parts of the keys
are merged by their log-sum-exp. The backward pass goes round again, the gradients of keys and values with them; each part
is given output and log-sum-exp over all keys, which make it the gradient of one softmax.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from msllm.sharding import axis_index, axis_size
from msllm.streams import Cells


def ring_attention(q, k, v, cells: Cells, lag, kernel: Callable):
    """As `attention` (see there), of one device inside `shard_map`; `lag` with the streams that fill up the mesh axis.

    The backend's `forward_part` and `backward_part` are told the first stream of the keys, None for the streams of the
    queries: only these hold the cells of the queries themselves.
    """
    size, devices = q.shape[2], axis_size("stream")
    backend, options = (
        sys.modules[getattr(kernel, "func", kernel).__module__],
        getattr(kernel, "keywords", {}),
    )
    forward_part, backward_part = (
        functools.partial(f, **options) for f in (backend.forward_part, backend.backward_part)
    )

    def pass_on(arrays):
        to_neighbours = [(i, (i + 1) % devices) for i in range(devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, "stream", to_neighbours), arrays)

    def with_keys(part, q, cells, *after):
        """The part as a function of (keys, turn): in turn i, the keys are those of the i-th device before this one."""
        place = axis_index("stream")
        streams = place * size + jnp.arange(size)

        def run(keys, turn):
            start = (place - turn) % devices * size if turn is not None else None
            k, v, present, seen = keys
            return part(
                q,
                k,
                v,
                cells,
                cells._replace(present=present, seen=seen),
                lag,
                streams,
                start,
                *after,
            )

        return run

    @jax.custom_vjp
    def attend(q, k, v, cells):
        return forward(q, k, v, cells)[0]

    def forward(q, k, v, cells):
        run, keys = with_keys(forward_part, q, cells), (k, v, cells.present, cells.seen)

        # The last turn passes on what nobody needs any more: cheaper to say than to leave out.
        def turn(i, carry):
            return (pass_on(carry[0]), _merge(carry[1], run(carry[0], i)))

        first, lse = run(keys, None)
        _, (out, lse) = lax.fori_loop(
            1, devices, turn, (pass_on(keys), (first.astype(jnp.float32), lse))
        )
        out, lse = (checkpoint_name(x, "attention") for x in (out.astype(q.dtype), lse))
        return out, (q, k, v, cells, out, lse)

    def backward(saved, d_out):
        q, k, v, cells, out, lse = saved
        keys, part = (
            (k, v, cells.present, cells.seen),
            with_keys(backward_part, q, cells, out, lse, d_out),
        )

        def run(keys, turn):
            return [x.astype(jnp.float32) for x in part(keys, turn)]

        def turn(i, carry):
            keys, d_q, d_keys = carry
            more_q, *more = run(keys, i)
            return pass_on(keys), d_q + more_q, pass_on(jax.tree.map(jnp.add, d_keys, more))

        d_q, *d_keys = run(keys, None)
        _, d_q, d_keys = lax.fori_loop(1, devices, turn, (pass_on(keys), d_q, pass_on(d_keys)))
        return *(d.astype(x.dtype) for d, x in zip((d_q, *d_keys), (q, k, v))), None

    attend.defvjp(forward, backward)
    return attend(q, k, v, cells)


def _merge(one, other):
    """(output, log-sum-exp) over the keys of two parts. A query may see none in the second: its output is anything."""
    (out, lse), (more, more_lse) = one, other
    both = jnp.logaddexp(lse, more_lse)

    def share(x, lse):
        return jnp.where((weight := jnp.exp(lse - both)[..., None]) > 0, weight * x, 0)

    return share(out, lse) + share(more, more_lse), both
