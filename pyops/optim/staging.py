"""offload=True: a parameter on a GPU whose states live in CPU memory steps there, through staging memory.

Weights and gradients come down in chunks of about CHUNK bytes, large tensors cut between rows, the CPU kernels step a chunk in place, and its
weights go up again. While one chunk is stepped the next one comes down and the last one goes up. The weight on the device stays
the only one: whoever changes it between two steps (a checkpoint, an average of weights) needs no care. Bytes over the bus, each
way its own: gradient + weight down, weight up; an element's random bits are those of its number in the whole tensor, so that
a step has the same bits as anywhere else.
"""
from __future__ import annotations

import torch

from gradmill.weight import QuantizedWeight

CHUNK = 32 << 20  # bytes that come down together: 1.3 ms of a 25 GB/s bus, large beside what starting a copy costs (some 10 us)
SMALL = 64 << 10  # a tensor of fewer bytes shares one copy with all such of its chunk: by itself it would take longer to start than to copy
SLOTS = 2         # chunks in staging memory: one is stepped, one comes down or goes up
ALIGNMENT = 64


def staged(device: torch.device) -> bool:
    """Whether offload=True takes a step on this device to the CPU."""
    return device.type not in ("cpu", "meta")


# --- what moves -------------------------------------------------------------------------------------------
def pieces(param: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The plain tensors that a weight is made of."""
    return (param.codes, param.scales, param.zeros) if isinstance(param, QuantizedWeight) else (param.detach(),)


def of_pieces(param: torch.Tensor, made: list[torch.Tensor], rows: int | None = None) -> torch.Tensor:
    """A weight like ``param`` (of so many rows) made of other pieces."""
    if not isinstance(param, QuantizedWeight):
        return made[0]
    return QuantizedWeight(*made, param.format, param.shape if rows is None else (rows, *param.shape[1:]), param.dtype)


def room(t: torch.Tensor) -> int:
    """Bytes that t takes in staging memory."""
    return -(-t.nbytes // ALIGNMENT) * ALIGNMENT


def moved(item) -> int:
    """Bytes of an item that come down."""
    return sum(room(t) for t in (*pieces(item.param), item.grad))


def parts(item):
    """The item (gradmill.optim._base.Item), or runs of its rows where it is larger than a chunk."""
    rows = item.param.shape[0] if item.param.dim() > 1 else 1
    count = min(rows, -(-moved(item) // CHUNK))
    if count < 2:
        yield item
        return
    step, columns = -(-rows // count), item.param.shape[1:].numel()
    for first in range(0, rows, step):
        run = slice(first, min(rows, first + step))
        state = {k: v[run] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in item.state.items()}  # rows come first in all of them
        yield item._replace(param=of_pieces(item.param, [t[run] for t in pieces(item.param)], run.stop - first), grad=item.grad[run], state=state,
                            offset=item.offset + first * columns)


class Chunk:
    """Items that move together, and where in staging memory: small tensors that go up again, other small ones, large ones."""

    def __init__(self, items):
        self.items = items
        self.there = [t for item in items for t in pieces(item.param)] + [item.grad for item in items]
        self.written = len(self.there) - len(items)  # the weights' pieces
        self._starts, self.size, self.small_written, self.small = [0] * len(self.there), 0, 0, 0
        for i in sorted(range(len(self.there)), key=lambda i: (self.is_large(i), i >= self.written)):
            self._starts[i] = self.size
            self.size += room(self.there[i])
            if not self.is_large(i):
                self.small = self.size
                self.small_written = self.size if i < self.written else self.small_written

    def is_large(self, i: int) -> bool:
        return self.there[i].nbytes >= SMALL

    def view(self, buffer: torch.Tensor, i: int) -> torch.Tensor:
        """Tensor i in a buffer of bytes."""
        t = self.there[i]
        return buffer[self._starts[i]:self._starts[i] + t.nbytes].view(t.dtype).view(t.shape)

    def here(self, buffer: torch.Tensor) -> list:
        """The items with weights and gradients in the buffer."""
        views, grads = iter([self.view(buffer, i) for i in range(self.written)]), [self.view(buffer, i) for i in range(self.written, len(self.there))]
        return [item._replace(param=of_pieces(item.param, [next(views) for _ in pieces(item.param)]), grad=g) for item, g in zip(self.items, grads)]


def chunks(items):
    """Chunks of items, in order."""
    some, size = [], 0
    for item in items:
        for part in parts(item):
            if some and size + moved(part) > CHUNK:
                yield Chunk(some)
                some, size = [], 0
            some.append(part)
            size += moved(part)
    if some:
        yield Chunk(some)


# --- how it moves -----------------------------------------------------------------------------------------
class Transport:
    """Copies between a device and staging memory, each done before the next: for devices without streams, and for tests."""

    pinned = False

    def __init__(self, device: torch.device):
        self.device, self._memory = device, [torch.empty(0, dtype=torch.uint8, device="cpu")] * SLOTS

    def begin(self):
        """What comes down is what the caller's work so far leaves behind."""

    def down(self, slot: int, chunk: Chunk):
        """Starts to bring the chunk into the slot's memory."""
        if self._memory[slot].numel() < chunk.size:
            self._memory[slot] = torch.empty(chunk.size, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        self._copy_down(self._memory[slot], chunk)

    def arrived(self, slot: int, chunk: Chunk) -> list:
        """Waits for it; its items, to be stepped in place."""
        return chunk.here(self._memory[slot])

    def up(self, slot: int, chunk: Chunk):
        """Starts to bring the chunk's weights back."""
        self._copy_up(self._memory[slot], chunk)

    def end(self):
        """The caller's work from now on sees the weights that went up."""

    def _copy_down(self, buffer, chunk):
        few = [i for i in range(len(chunk.there)) if not chunk.is_large(i)]
        if few:
            gathered = torch.empty(chunk.small, dtype=torch.uint8, device=self.device)
            torch._foreach_copy_([as_bytes(chunk.view(gathered, i)) for i in few], [as_bytes(chunk.there[i].contiguous().resolve_neg()) for i in few])
            buffer[:chunk.small].copy_(gathered, non_blocking=True)
        for i, t in enumerate(chunk.there):
            if chunk.is_large(i):
                chunk.view(buffer, i).copy_(t, non_blocking=True)

    def _copy_up(self, buffer, chunk):
        few = [i for i in range(chunk.written) if not chunk.is_large(i)]
        if few:
            gathered = torch.empty(chunk.small_written, dtype=torch.uint8, device=self.device)
            gathered.copy_(buffer[:chunk.small_written], non_blocking=True)
            dense = [i for i in few if chunk.there[i].is_contiguous()]
            if dense:
                torch._foreach_copy_([as_bytes(chunk.there[i]) for i in dense], [as_bytes(chunk.view(gathered, i)) for i in dense])
            for i in set(few) - set(dense):
                chunk.there[i].copy_(chunk.view(gathered, i))
        for i in range(chunk.written):
            if chunk.is_large(i):
                chunk.there[i].copy_(chunk.view(buffer, i), non_blocking=True)


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.view(-1).view(torch.uint8)


class CudaTransport(Transport):
    """Copies on two streams of their own, from and to pinned memory; this thread waits only for what is about to be stepped.

    Who waits for whom: a copy down for the caller's work until `begin` (gradients) and for the last copy up from its slot; this thread for
    the copy down; a copy up for the caller's work until `begin` too (it may still read the weights); the caller's stream, at the end,
    for both. So gradients may be freed, and weights read, right after the step.
    """

    pinned = True

    def __init__(self, device):
        super().__init__(device)
        self._down, self._up = self._stream(), self._stream()
        self._ready, self._free = [None] * SLOTS, [None] * SLOTS

    def _stream(self):
        return torch.cuda.Stream(self.device)

    def _current(self):
        return torch.cuda.current_stream(self.device)

    def _on(self, stream, work):
        with torch.cuda.stream(stream):
            work()

    def begin(self):
        now = self._current().record_event()
        self._down.wait_event(now)
        self._up.wait_event(now)

    def down(self, slot, chunk):
        if self._free[slot] is not None:
            self._down.wait_event(self._free[slot])
        super().down(slot, chunk)
        self._ready[slot] = self._down.record_event()

    def arrived(self, slot, chunk):
        self._ready[slot].synchronize()
        return super().arrived(slot, chunk)

    def up(self, slot, chunk):
        super().up(slot, chunk)
        self._free[slot] = self._up.record_event()

    def end(self):
        for stream in (self._down, self._up):
            self._current().wait_event(stream.record_event())

    def _copy_down(self, buffer, chunk):
        self._on(self._down, lambda: super(CudaTransport, self)._copy_down(buffer, chunk))

    def _copy_up(self, buffer, chunk):
        self._on(self._up, lambda: super(CudaTransport, self)._copy_up(buffer, chunk))


def transport_of(device: torch.device) -> Transport:
    return CudaTransport(device) if device.type == "cuda" else Transport(device)


def through(transport: Transport, items, step):
    """step(items on the CPU) for all items, chunk by chunk: the next one comes down while one is stepped."""
    waiting, slot = chunks(items), 0
    chunk = next(waiting, None)
    if chunk is None:
        return
    transport.begin()
    try:
        transport.down(slot, chunk)
        while chunk is not None:
            here, following = slot, next(waiting, None)
            if following is not None:
                slot = (slot + 1) % SLOTS
                transport.down(slot, following)
            step(transport.arrived(here, chunk))
            transport.up(here, chunk)
            chunk = following
    finally:
        transport.end()
