# ruff: noqa: ANN001, ANN201, ANN202 (the compiler infers the types of a kernel's arguments)
"""The Triton kernel of norm decay. What it is given, and in which order, ``triton_decay.py`` says.

An *age* counts steps back: the newest term has age 0, and stands in the ring at slot ``clock % terms``.
"""

import triton
import triton.language as tl

from .triton_decay_schedule import NO_GRADIENT

NOWHERE = tl.constexpr(NO_GRADIENT)
TICKET = tl.constexpr(1 << 32)  # from here on the clock counts programs, below it steps


@triton.jit(do_not_specialize=["found_step", "terms", "length", "layers"])
def add_terms_kernel(
    weights,  # [layers] int64: the addresses of their weights
    grads,  # int64, one after another: the hidden_address of the gradient of each layer of this launch
    records,  # int64: a Slice for each layer, and the lists that it points to
    owners,  # [blocks] int64: where in records the layer of each block stands
    values,  # [layers]: the norms, as measured
    found,  # [layers, found_step] int64: channel and window where they are attained
    norms,  # out, [layers]: of the state, as are the next four
    winners,  # out, [layers, 2] int64
    signs,  # in and out, [terms, length] int8 or int32
    channels,  # in and out, [terms, layers] int64
    clock,  # in and out, [1] int64
    rates,  # [layers] float64
    momentum: tl.float64,  # a float would come as float32
    found_step,
    terms,
    length,
    layers,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    SUM: tl.constexpr,  # float32 or float64
    COPIES: tl.constexpr,  # whether norms and winners are to be copied into the state, or came from there
    ADVANCES: tl.constexpr,  # whether this is the last launch of a step
    BLOCK: tl.constexpr,  # elements of a slice
    AGES: tl.constexpr,  # of a program
    CHUNK: tl.constexpr,  # terms that are read at once
    BITS: tl.constexpr,  # of the largest age
):
    """One block of the slice of one layer, and of its terms a few that follow each other in age.

    Programs of the newest term find it from the weights and write it down. Of the terms of one channel the newest adds
    them all to the gradient, so no two programs touch one element of it, nor does one read of the ring what another
    writes: of the newest slot, where the channel is the winner's, nothing is read.
    """
    block = tl.program_id(0)
    first_age = tl.program_id(1) * AGES
    layer = records + tl.load(owners + block)
    first_block = tl.load(layer + 0).to(tl.int32)
    index = tl.load(layer + 2)
    place = tl.load(layer + 3).to(tl.int32)
    begin = tl.load(layer + 4)
    size = tl.load(layer + 5)
    taps = tl.load(layer + 6)
    per_group = tl.load(layer + 7)

    step = tl.load(clock) % TICKET
    now = step % terms
    winner = tl.load(found + index * found_step)
    position = (block - first_block).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < size
    other, tap = position // taps, position % taps
    ring = signs + begin + position
    ring_channels = channels + index

    newest = tl.zeros([BLOCK], tl.int32)
    if first_age == 0:
        window = tl.load(found + index * found_step + 1)
        weight = tl.load(weights + index).to(tl.pointer_type(WEIGHT))
        weight += winner // per_group * tl.load(layer + 8) + winner % per_group * tl.load(layer + 9)
        weight += other * tl.load(layer + 10)
        newest = _newest_term(weight, records, layer, tap, window, inside)
        tl.store(ring + now * length, newest.to(signs.dtype.element_ty), mask=inside)
        if block == first_block:
            tl.store(ring_channels + now * layers, winner)
            if COPIES:
                tl.store(norms + index, tl.load(values + index))
                tl.store(winners + 2 * index, winner)
                tl.store(winners + 2 * index + 1, window)

    hidden = grads[0]
    for i in tl.static_range(1, len(grads)):
        hidden = tl.where(place == i, grads[i], hidden)
    if hidden != NOWHERE:
        offset = tl.load(records + tl.load(layer + 14) + tap, mask=inside, other=0)
        grad = (hidden - 1).to(tl.pointer_type(GRAD)) + other * tl.load(layer + 13) + offset
        rate = tl.load(rates + index) * (1 - momentum)
        for age in range(first_age, tl.minimum(first_age + AGES, terms)):
            channel = _channel(ring_channels, winner, now, age, terms, layers)
            if (channel >= 0) & (_younger(ring_channels, winner, now, age, terms, layers, channel) == 0):
                total = _sum_terms(
                    newest, ring, ring_channels, winner, now, age, terms, layers, length, channel, rate, momentum,
                    inside, SUM, CHUNK, BITS,
                )  # fmt: skip
                to = grad + channel // per_group * tl.load(layer + 11) + channel % per_group * tl.load(layer + 12)
                total += tl.load(to, mask=inside, other=0).to(total.dtype)
                tl.store(to, total.to(GRAD), mask=inside)

    if ADVANCES:
        programs = tl.num_programs(0) * tl.num_programs(1)
        tl.debug_barrier()  # every thread has read the clock before one of them takes the ticket
        if tl.atomic_add(clock, TICKET, sem="acq_rel") // TICKET == programs - 1:
            tl.store(clock, step + 1)


@triton.jit
def _newest_term(weight, records, layer, tap, window, inside):
    """sign(K') u at the winner, carried back through the merged taps: for each tap the sum over those that hold it.

    In float64, since what is merged may cancel. 0 where the sum is 0 or NaN.
    """
    merged_each = tl.load(layer + 15)
    holding = records + tl.load(layer + 16)
    taps_each = tl.load(layer + 17)
    entries = records + tl.load(layer + 18)
    counts = records + tl.load(layer + 20) + window * tl.load(layer + 19)
    term = tl.zeros(tap.shape, tl.int32)
    for i in range(merged_each):
        entry = tl.load(holding + tap * merged_each + i, mask=inside, other=-1)
        x = tl.zeros(tap.shape, tl.float64)
        for j in range(taps_each):
            offset = tl.load(entries + entry * taps_each + j, mask=entry >= 0, other=-1)
            x += tl.load(weight + offset, mask=offset >= 0, other=0).to(tl.float64)
        count = tl.load(counts + entry, mask=entry >= 0, other=0).to(tl.int32)
        term += tl.where(x > 0, count, 0) - tl.where(x < 0, count, 0)
    return term


@triton.jit
def _slot(now, age, terms):
    return now - age + tl.where(age > now, terms, 0)


@triton.jit
def _channel(ring_channels, winner, now, age, terms, layers):
    """The channel of the term of an age; -1 where there is none."""
    kept = (age > 0) & (age < terms)
    channel = tl.load(ring_channels + _slot(now, age, terms) * layers, mask=kept, other=-1)
    return tl.where(age == 0, winner, channel)


@triton.jit
def _younger(ring_channels, winner, now, age, terms, layers, channel):
    """How many younger terms are of the same channel."""
    LANES: tl.constexpr = 32
    number = 0
    for start in range(0, age, LANES):
        ages = start + tl.arange(0, LANES)
        same = _channel(ring_channels, winner, now, ages, terms, layers) == channel
        number += tl.sum((same & (ages < age)).to(tl.int32), 0)
    return number


@triton.jit
def _sum_terms(
    newest, ring, ring_channels, winner, now, age, terms, layers, length, channel, rate, momentum,
    inside, SUM: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """rate momentum^age p of all terms p of one channel from an age on, in a fixed order."""
    total = tl.where(age == 0, newest, 0).to(SUM) * rate.to(SUM)
    for start in range(age // CHUNK * CHUNK, terms, CHUNK):
        ages = start + tl.arange(0, CHUNK)
        same = (ages > 0) & (_channel(ring_channels, winner, now, ages, terms, layers) == channel)
        coefficient = tl.where(same, rate * _power(momentum, ages, BITS), 0).to(SUM)
        slots = _slot(now, ages, terms)
        part = tl.load(ring[None, :] + (slots * length)[:, None], mask=same[:, None] & inside[None, :], other=0)
        total += tl.sum(coefficient[:, None] * part.to(SUM), 0)
    return total


@triton.jit
def _power(base, exponent, BITS: tl.constexpr):
    base, power = tl.full(exponent.shape, base, tl.float64), tl.full(exponent.shape, 1, tl.float64)
    for i in tl.static_range(BITS):
        power = tl.where((exponent >> i) & 1 == 1, power * base, power)
        base = base * base
    return power
