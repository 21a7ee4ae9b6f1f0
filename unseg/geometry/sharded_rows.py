"""Rows that several processes hold, cut into fixed chunks, so that sums over them do not depend on
how many processes there are.

Legend: N rows of all ranks, n own rows, D columns, M picked rows.
"""

from collections.abc import Iterable
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ROWS = 8192


class ShardedRows:
    """The rows of all ranks, one rank after the other; each rank works on whole chunks of them.

    Chunk i holds the rows [i * chunk_rows, (i + 1) * chunk_rows) of all ranks together; neighbours
    exchange rows so that each rank owns consecutive whole chunks, as many as the others, one more
    or less. All that depends on floating-point order happens inside a chunk or by `add_up`, in the
    order of the chunks: 1, 2 and 3 ranks on machines of one kind give the same bits. With one
    process nothing is copied or sent.

    Args:
        rows: (n, D), this rank's; n may be 0. The same D, dtype and kind of device on all ranks.
        distributed: whether there are other ranks; every rank calls every method.
        group: the ranks; None: all. The backend must suit the device (gloo: CPU, nccl: CUDA).
        chunk_rows: the same on all ranks. Sums depend on it in their last bits.

    Attributes:
        total: N.
        start: of all rows, the index of the first that this rank works on.
        own: (number of those, D).
    """

    def __init__(
        self,
        rows: Tensor,
        *,
        distributed: bool = False,
        group: dist.ProcessGroup | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ):
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
        self._group = group
        self._distributed = distributed
        self.rank = dist.get_rank(group) if distributed else 0
        self.world = dist.get_world_size(group) if distributed else 1
        self.chunk_rows = chunk_rows
        self._given = [0, *accumulate(self._counts(rows))]
        self.total = self._given[-1]
        chunks = -(-self.total // chunk_rows)
        owned = [rank * chunks // self.world for rank in range(self.world + 1)]
        self._owned = [min(self.total, chunk * chunk_rows) for chunk in owned]
        self.start = self._owned[self.rank]
        self.own = self._move(rows, self._given, self._owned)

    def chunks(self, values: Tensor | None = None) -> tuple[Tensor, ...]:
        """This rank's chunks of the rows, or of `values`, which belong to its own rows."""
        values = self.own if values is None else values
        return values.split(self.chunk_rows) if len(values) else ()

    def add_up(self, parts: Iterable[Tensor], like: Tensor) -> Tensor:
        """Sum over the chunks of all ranks, in the order of the chunks.

        Args:
            parts: one tensor for each of this rank's chunks, in order.
            like: zeros of their shape, dtype and device; the result, with one process, is in it.
        """
        if self.world > 1:
            parts = list(parts)  # the work; what follows waits for the rank before
            if self.rank:
                dist.recv(like, self._peer(self.rank - 1), group=self._group)
        for part in parts:
            like += part
        if self.world > 1:
            if self.rank + 1 < self.world:
                dist.send(like, self._peer(self.rank + 1), group=self._group)
            dist.broadcast(like, self._peer(self.world - 1), group=self._group)
        return like

    def add_exact(self, value: Tensor) -> Tensor:
        """Sum over the ranks of what has no rounding (integers, or one rank's numbers and zeros
        elsewhere); overwrites `value`."""
        if self.world > 1:
            dist.all_reduce(value, group=self._group)
        return value

    def from_first(self, value: Tensor) -> Tensor:
        """The first rank's; overwrites `value`."""
        if self.world > 1:
            dist.broadcast(value, self._peer(0), group=self._group)
        return value

    def take(self, indices: Tensor) -> Tensor:
        """(M, D): on every rank, the rows with these indices (M,) int64 among all rows."""
        if self.world == 1:
            return self.own[indices]
        mine = (indices >= self.start) & (indices < self.start + len(self.own))
        rows = self.own.new_zeros(len(indices), self.own.shape[1])
        rows[mine] = self.own[indices[mine] - self.start]
        return self.add_exact(rows)

    def gather(self, values: Tensor) -> Tensor:
        """(N,): on every rank, all ranks' numbers of their own rows."""
        if self.world == 1:
            return values
        everything = values.new_zeros(self.total)
        everything[self.start : self.start + len(values)] = values
        return self.add_exact(everything)

    def give_back(self, values: Tensor) -> Tensor:
        """(n, ...): what belongs to the rows that this rank had given, of the owners' `values`."""
        return self._move(values, self._owned, self._given)

    def _peer(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    def _counts(self, rows: Tensor) -> list[int]:
        counts = torch.zeros(self.world, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        return self.add_exact(counts).tolist()

    def _move(self, rows: Tensor, source: list[int], target: list[int]) -> Tensor:
        """Rows cut as in `source` become rows cut as in `target`; both are bounds (ranks + 1)."""
        if source == target:
            return rows
        rank, wanted = self.rank, list(pairwise(target))
        received = rows.new_empty(wanted[rank][1] - wanted[rank][0], *rows.shape[1:])
        exchange = []
        for peer, (start, stop) in enumerate(pairwise(source)):
            low, high = max(source[rank], wanted[peer][0]), min(source[rank + 1], wanted[peer][1])
            if low < high:
                part = rows[low - source[rank] : high - source[rank]]
                if peer == rank:
                    received[low - target[rank] : high - target[rank]] = part
                else:
                    operation = (dist.isend, part.contiguous(), self._peer(peer), self._group)
                    exchange.append(dist.P2POp(*operation))
            low, high = max(start, target[rank]), min(stop, target[rank + 1])
            if low < high and peer != rank:
                part = received[low - target[rank] : high - target[rank]]
                exchange.append(dist.P2POp(dist.irecv, part, self._peer(peer), self._group))
        for request in dist.batch_isend_irecv(exchange) if exchange else ():
            request.wait()
        return received
