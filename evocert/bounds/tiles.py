"""Work in tiles of one fixed shape, members x images, so that memory is bounded and the bits do not depend on the split.

torch picks its matrix kernels by shape, and rounding depends on the kernel. So a tile always has the same shape: the last
one is padded with repeated rows, and what the padding gives is cut off.

On a CPU each tile is worked on by one thread, several tiles at a time. torch's own threads share out each operation, of
which a small tile has dozens of a few microseconds: the cores then spend their time waiting for each other, and on a busy
machine, where one of them is late every time, a generation of CNN3 (w=4) on 8x8 digits was seen to take 78 ms instead of 6.
It also takes the number of threads out of what the bits depend on.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from evocert.bounds.cost import Cost
from evocert.bounds.network import Network

OnTile = Callable[..., Tensor]  # (members, *inputs) -> [P, B, ...]


class Tile(NamedTuple):
    """How many members and images are worked on at once.

    A member's bits depend on nothing but itself, the images and this shape, if ``members`` is 1, or for bounds without
    back-substitution even with ``images`` a multiple of ``LANES``. ``choose_tile`` gives such tiles, but where it may take
    members ``together``.
    """

    members: int
    images: int
    at_once: int = 2**16
    """On how many a CPU may work at once, for the memory's sake; a member's bits do not depend on it."""
    chunk_parts: int = 1
    """By what the chunks of neurons within a tile are smaller than usual, likewise for the memory's sake."""


# Images of a tile come in multiples of this: torch works on so many float32 numbers at a time, and rounds sigmoid, exp and
# the like otherwise in the few that are left over. Without a remainder in any member's block, a member's bits do not depend
# on where in the tile it lies, and so not on how a population is split among actors.
LANES = 16

# Temporaries of about this many bytes are worked on at once by one CPU thread: they stay in the caches and cost no page
# faults. Measured on 2 cores with 1 MiB of L2 each and 32 MiB of L3 (torch 2.15).
CPU_WORKING_SET = 8 * 2**20
CPU_MEMBERS = 32
# Of one member alone a tile has so many images, or as many as fill these bytes: each of some 200 operations costs a few
# microseconds whatever its size. Measured for CROWN-IBP and CNN3 with w=16: 32 images take 0.8 of the time of twice 16.
ALONE_IMAGES = 32
ALONE_WORKING_SET = 64 * 2**20
# Of small networks and few images several members share these operations, as many as stay within these bytes. Measured for
# CROWN-IBP and 16 images: CNN3-tiny takes 0.45 of its time with 4 members, CNN3 with w=16 takes 1.1 times its time with 2.
SHARED_WORKING_SET = 24 * 2**20
SHARED_MEMBERS = 8
# glibc hands freed memory back to the system once there is more of it than twice the largest block it has seen freed, and the
# next tile then faults it in again, page by page: a third of the time of a small tile. After this block it keeps some.
KEPT_BLOCK = 31 * 2**20
# Smaller chunks cost speed: CNN3 w=16 takes 1.2 times as long with half of the usual size, twice as long with a quarter.
CHUNK_PARTS = (1, 2, 4, 8)
# A GPU wants few large launches.
GPU_WORKING_SET = 4 * 2**30
GPU_MEMBERS = 256


def choose_tile(
    cost: Cost,
    images: int,
    budget: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    together: bool = False,
) -> Tile:
    """The tile for minibatches of ``images``, whose temporaries in ``dtype`` stay within ``budget`` bytes.

    The population's size has no part in it, and the number of actors but whether there are any: the same tile, and so the same
    bits, serve any split.

    Args:
        cost: of the bound.
        images: B.
        budget: bytes.
        device: where it is computed.
        dtype: of the temporaries.
        together: the population is never split. A member's bits may then depend on its place in the population, which lets
            several members of a small network share a tile of back-substitution.

    Raises:
        ValueError: not even one member and one image fit; the message says what would do.
    """
    member, pair, whole = (dtype.itemsize * numbers for numbers in (cost.member, cost.pair, cost.chunk))
    cpu = device.type == "cpu"
    alone = cpu and cost.alone
    lanes = 1 if alone else LANES
    workers = worker_count() if cpu else 1
    # Smaller chunks before fewer threads, and those before nothing.
    fits = [parts for parts in CHUNK_PARTS if workers * (whole // parts + member + lanes * pair) <= budget]
    chunk_parts = fits[0] if fits else CHUNK_PARTS[-1]
    chunk = whole // chunk_parts
    smallest = chunk + member + lanes * pair
    if smallest > budget:
        raise ValueError(
            f"memory_budget={budget} bytes is too small for one member and {lanes} image{'s' * (lanes > 1)} of this network: "
            f"at least {-(-smallest // 2**20)}MiB would do"
        )
    at_once = min(workers, budget // smallest)
    budget = budget // at_once - chunk
    working_set = min(budget, CPU_WORKING_SET if cpu else GPU_WORKING_SET)
    wanted = min(ALONE_IMAGES, ALONE_WORKING_SET // pair) if alone else working_set // (8 * pair)
    tile_images = max(lanes, min((budget - member) // pair, wanted) // lanes * lanes)
    # Images in equal parts, so that the padding of the last tile is small.
    tile_images = -(-images // -(-images // tile_images))
    tile_images = -(-tile_images // lanes) * lanes
    shared = min(budget, SHARED_WORKING_SET) if alone and together else working_set
    tile_members = max(1, min(shared // (tile_images * pair), budget // (member + tile_images * pair)))
    # A power of two divides the usual population sizes and their shares among actors.
    most = GPU_MEMBERS if not cpu else CPU_MEMBERS if not alone else SHARED_MEMBERS if together else 1
    return Tile(min(1 << (tile_members.bit_length() - 1), most), tile_images, at_once, chunk_parts)


def over_tiles(
    on_tile: OnTile, network: Network, parameters: Tensor, inputs: tuple[Tensor, ...], tile: Tile | None
) -> Tensor:
    """``on_tile`` for every member and image: ``[P, B, ...]``, put together from tiles of one shape.

    Args:
        on_tile: (members, *inputs) -> ``[P', B', ...]``, each entry depending on its own member and image alone.
        parameters: ``[P, D]``.
        inputs: tensors ``[B, ...]``.
        tile: its shape, or None for everything at once.
    """
    if not (len(parameters) and len(inputs[0])):  # one tile of zeros tells what shape and dtype nothing has
        zeros = (tensor.new_zeros(1, *tensor.shape[1:]) for tensor in inputs)
        like = on_tile(network.bind(parameters.new_zeros(1, parameters.shape[1])), *zeros)
        return like.new_zeros(len(parameters), len(inputs[0]), *like.shape[2:])
    if tile is None:
        return on_tile(network.bind(parameters), *inputs)
    columns = _columns(inputs, tile)

    def members_row(rows: slice | Tensor, kept_members: int) -> Tensor:
        members = network.bind(parameters[rows], tile.chunk_parts)
        row = [on_tile(members, *part)[:kept_members, :kept] for part, kept in columns]
        return row[0] if len(row) == 1 else torch.cat(row, 1)

    parts = _parts(len(parameters), tile.members, parameters.device)
    if parameters.device.type == "cpu" and not torch.is_grad_enabled():
        workers = _workers(min(worker_count(), tile.at_once))
        pieces = list(workers.map(lambda part: _without_graph(partial(members_row, *part)), parts))
    else:
        pieces = [members_row(*part) for part in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def value_and_gradient(
    on_tile: OnTile, network: Network, parameters: Tensor, inputs: tuple[Tensor, ...], tile: Tile
) -> tuple[Tensor, Tensor]:
    """Values ``[P, B, n]`` for every member and image, and the gradient ``[P, D]`` of each member's sum of the first of them.

    Tile by tile, each with a graph of its own: the memory is that of the tiles that are worked on at once, where the graph of
    a sum over all tiles would keep them all.

    Args:
        on_tile: (members, *inputs) -> ``[P', B', n]``.
        parameters: ``[P, D]``.
        inputs: tensors ``[B, ...]``, B >= 1.
        tile: its shape.
    """
    columns = _columns(inputs, tile)
    # A few members alone, as the gradient methods have them, need no padding: their bits are compared with nobody's.
    rows = _parts(len(parameters), min(tile.members, len(parameters)), parameters.device)

    def work(job: tuple[tuple[slice | Tensor, int], tuple[tuple[Tensor, ...], int]]) -> tuple[Tensor, Tensor]:
        (members, kept_members), (part, kept) = job
        with torch.enable_grad():
            own = parameters[members].detach().requires_grad_()
            values = on_tile(network.bind(own, tile.chunk_parts), *part)[:kept_members, :kept]
            (gradient,) = torch.autograd.grad(values[..., 0].sum(), own)
        return values.detach(), gradient[:kept_members]

    jobs = [(row, column) for row in rows for column in columns]
    run: Callable[..., Iterable[tuple[Tensor, Tensor]]]
    run = _workers(min(worker_count(), tile.at_once)).map if parameters.device.type == "cpu" else map
    done = iter(run(work, jobs))
    values, gradients = [], []
    for _ in rows:
        pieces = [next(done) for _ in columns]  # always added in this order
        values.append(torch.cat([piece[0] for piece in pieces], 1))
        gradients.append(torch.stack([piece[1] for piece in pieces]).sum(0))
    return torch.cat(values), torch.cat(gradients)


def _columns(inputs: tuple[Tensor, ...], tile: Tile) -> list[tuple[tuple[Tensor, ...], int]]:
    """The inputs cut into image tiles: (inputs, how many of them are not padding)."""
    parts = _parts(len(inputs[0]), tile.images, inputs[0].device)
    return [(tuple(tensor[rows] for tensor in inputs), kept) for rows, kept in parts]


_worker_count: int | None = None


def worker_count() -> int:
    """How many tiles a CPU works on at a time: by default as many as torch uses threads."""
    return _worker_count or torch.get_num_threads()


def give_threads_to_tiles() -> None:
    """From now on the threads that torch has are for tiles alone, and operations outside them use one.

    For a process that does nothing but evolve: what a generation does outside its tiles is small or bound by memory, and
    threads that wait for each other cost it more than they bring.
    """
    global _worker_count
    _worker_count = worker_count()
    torch.set_num_threads(1)


@lru_cache(maxsize=4)
def _workers(threads: int) -> ThreadPoolExecutor:
    """As many workers as torch may use threads; inside a worker torch uses one."""
    torch.empty(KEPT_BLOCK, dtype=torch.uint8)
    return ThreadPoolExecutor(threads, "evocert-tile", initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # a forked process has the pool, but none of its threads


def _without_graph(work: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():  # grad mode belongs to a thread
        return work()


def _parts(total: int, size: int, device: torch.device) -> list[tuple[slice | Tensor, int]]:
    """Cuts 0 .. total into parts of one size: (rows, how many of them are not padding)."""
    parts: list[tuple[slice | Tensor, int]] = [(slice(a, a + size), size) for a in range(0, total - size + 1, size)]
    if rest := total % size:
        # Padding repeats a row that is there: its values are as harmless as any.
        parts.append((torch.arange(total - rest, total - rest + size, device=device).clamp_(max=total - 1), rest))
    return parts
