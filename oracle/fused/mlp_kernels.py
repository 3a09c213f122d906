"""The Triton kernels of `mlp.py`; imported when the first CUDA tensor comes, as Triton is only where CUDA is.

Both products of that file have 16-bit factors, a float32 accumulator, and an epilogue on it before anything is
written. There are two kernels: for Hopper one whose programs stay and walk over the tiles, with TMA in both
directions, and for other GPUs one of plain pointers.
"""

import functools

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from triton.tools.tensor_descriptor import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    TensorDescriptor,
)

# Of Hopper's kernel: a tile, the depth of the factors' blocks, how many of those are in flight, warps of a program. Of
# seven choices the fastest on an H200 forward, and within 1 % of it backward, at 512 x 2048 channels.
ROWS, COLUMNS, DEPTH, STAGES, WARPS = 128, 256, 64, 3, 8
GROUP = 8  # rows of tiles that are done together, so that their factors are still in the L2 cache


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Give the row and column of a tile: GROUP rows of tiles at a time, column by column."""
    first = tile // (GROUP * column_tiles) * GROUP
    height = min(row_tiles - first, GROUP)
    inside = tile % (GROUP * column_tiles)
    return first + inside % height, inside // height


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _square(h):  # type: ignore[no-untyped-def]
    """relu(h)**2; nan stays nan."""
    return tl.where(h < 0.0, 0.0, h * h)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _slope(grad, a):  # type: ignore[no-untyped-def]
    """The slope of relu(h)**2 times what comes in, from a = relu(h)**2."""
    return grad * (2.0 * tl.sqrt(a.to(tl.float32)))


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _prefetch(a, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bring a tile into the L2 cache, a line of 128 bytes an element."""
    r = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
    c = tl.minimum(column + tl.arange(0, COLUMNS // 64) * 64, columns - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [a + (r[:, None] * columns + c[None, :])],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _hopper(  # type: ignore[no-untyped-def]
    left,
    right,
    a,
    a_pointer,
    out,
    rows,
    columns,
    inner,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Descriptors of left [rows, inner], a and out [rows, columns], and right: [inner, columns] if BACKWARD, else T."""
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    done = tl.program_id(0)  # a count of its own for the epilogue, which lags behind the loads
    HALF: tl.constexpr = COLUMNS // 2
    # flat: a tile's first loads overlap with the epilogue before it
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        i, j = _place(tile, row_tiles, column_tiles, GROUP)
        if BACKWARD:
            _prefetch(a_pointer, i * ROWS, j * COLUMNS, rows, columns, ROWS, COLUMNS)
        acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in range(0, inner, DEPTH):
            if BACKWARD:
                acc = tl.dot(left.load([i * ROWS, k]), right.load([k, j * COLUMNS]), acc)
            else:
                acc = tl.dot(left.load([i * ROWS, k]), right.load([j * COLUMNS, k]).T, acc)
        i, j = _place(done, row_tiles, column_tiles, GROUP)
        done += PROGRAMS
        row = i * ROWS
        column = j * COLUMNS
        first, second = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
        first = _slope(first, a.load([row, column])) if BACKWARD else _square(first)
        out.store([row, column], first.to(out.dtype))
        second = _slope(second, a.load([row, column + HALF])) if BACKWARD else _square(second)
        out.store([row, column + HALF], second.to(out.dtype))


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _anywhere(  # type: ignore[no-untyped-def]
    left,
    right,
    a,
    out,
    rows,
    columns,
    inner,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The same for pointers to contiguous matrices, a tile a program."""
    i, j = _place(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    row = (i * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # rows * columns passes 2**31
    column = (j * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, inner, DEPTH):
        k = start + tl.arange(0, DEPTH)
        l_block = tl.load(left + row * inner + k[None, :], mask=(row < rows) & (k[None, :] < inner), other=0.0)
        r_place = right + (k[:, None] * columns + column if BACKWARD else column * inner + k[:, None])
        r_block = tl.load(r_place, mask=(k[:, None] < inner) & (column < columns), other=0.0)
        acc = tl.dot(l_block, r_block, acc)
    place = row * columns + column
    inside = (row < rows) & (column < columns)
    acc = _slope(acc, tl.load(a + place, mask=inside, other=0.0)) if BACKWARD else _square(acc)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


def activation(x: Tensor, w_in: Tensor) -> Tensor:
    """Give relu(x @ w_in.T)**2."""
    out = x.new_empty(x.size(0), w_in.size(0))
    launch(x, w_in, None, out)
    return out


def hidden_gradient(grad: Tensor, w_out: Tensor, a: Tensor) -> Tensor:
    """Give (grad @ w_out) * 2 * sqrt(a)."""
    out = torch.empty_like(a, memory_format=torch.contiguous_format)
    launch(grad, w_out, a, out)
    return out


def launch(left: Tensor, right: Tensor, a: Tensor | None, out: Tensor) -> None:
    """Write one of the two products into `out`, which is contiguous: that of the way back if there is an `a`."""
    left, right = left.contiguous(), right.contiguous()
    a_or_out = out if a is None else a.contiguous()
    (rows, inner), columns = left.shape, out.size(1)
    if not (rows and inner and columns):
        out.zero_()
        return
    sizes = (rows, columns, inner)
    backward = a is not None
    with torch.cuda.device(left.device):
        if not tma(left, right, a_or_out, out):
            grid = (triton.cdiv(rows, 128) * triton.cdiv(columns, 128),)
            _anywhere[grid](
                left, right, a_or_out, out, *sizes, BACKWARD=backward, ROWS=128, COLUMNS=128, DEPTH=32, GROUP=GROUP,
                num_warps=8, num_stages=3,
            )  # fmt: skip
            return
        right_block, part = [DEPTH, COLUMNS] if backward else [COLUMNS, DEPTH], [ROWS, COLUMNS // 2]
        tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
        programs = min(tiles, multiprocessors(left.device))
        _hopper[(programs,)](
            TensorDescriptor.from_tensor(left, [ROWS, DEPTH]),
            TensorDescriptor.from_tensor(right, right_block),
            TensorDescriptor.from_tensor(a_or_out, part),
            a_or_out,
            TensorDescriptor.from_tensor(out, part),
            *sizes,
            BACKWARD=backward,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            DEPTH=DEPTH,
            GROUP=GROUP,
            PROGRAMS=programs,
            num_warps=WARPS,
            num_stages=STAGES,
        )


def tma(*tensors: Tensor) -> bool:
    """Can the TMA kernel take these? Its blocks are cut for the shared memory of Hopper, its rows start at 16 bytes."""
    hopper = torch.cuda.get_device_capability(tensors[0].device)[0] == 9
    return hopper and all(t.size(1) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
