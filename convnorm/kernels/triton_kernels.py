# ruff: noqa: ANN001, ANN201, ANN202 (the compiler infers the types of a kernel's arguments)
"""The two Triton kernels. What they are given, and in which order, ``triton_measure.py`` says.

Nothing here knows a convolution: a layer is a matrix of rows and columns, a window a list of entries to sum.
"""

import triton
import triton.language as tl

LAST = tl.constexpr(2**63 - 1)  # after every index
NAN = tl.constexpr(0x7FF8 << 48)  # every NaN has this score


@triton.jit(do_not_specialize=["norms"])
def sum_tiles_kernel(
    weights,  # [layers] int64: the addresses of their weights
    records,  # int64: a TiledLayer for each layer, and the lists that it points to
    owners,  # [tiles, 2] int64: where in records the layer of each tile stands, and which weight it is
    tables,  # out, float32 or float64: partial sums of columns and of rows
    tickets,  # out, [norms] int64: zeros, which the next launch counts from
    norms,
    WEIGHT: tl.constexpr,
    GATHERS: tl.constexpr,  # whether any layer needs a gathered tile, which takes more registers
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a dense tile
    WIDE: tl.constexpr,  # columns of a gathered tile
):
    """Sum one tile of one layer along both sides, so that each weight is read once for the two norms."""
    tile = tl.program_id(0)
    if tile == 0:
        for start in range(0, norms, 128):
            norm = start + tl.arange(0, 128)
            tl.store(tickets + norm, tl.zeros([128], tl.int64), mask=norm < norms)

    layer = records + tl.load(owners + 2 * tile)
    weight = tl.load(weights + tl.load(owners + 2 * tile + 1))
    first_tile = tl.load(layer + 0).to(tl.int32)
    mode = tl.load(layer + 2)
    row_tiles = tl.load(layer + 3).to(tl.int32)
    column_tiles = tl.load(layer + 4).to(tl.int32)
    groups = tl.load(layer + 5)
    rows = tl.load(layer + 6)
    columns = tl.load(layer + 7)
    row_stride = tl.load(layer + 8)
    channel_stride = tl.load(layer + 9)
    entries = tl.load(layer + 10)
    divisor = tl.load(layer + 11)
    taps_each = tl.load(layer + 12)
    taps = records + tl.load(layer + 13)
    windows = tl.load(layer + 14)
    counts = tl.load(layer + 15)
    column_table = tables + tl.load(layer + 16)
    row_table = tables + tl.load(layer + 17)

    place = tile - first_tile
    column_tile = (place % column_tiles).to(tl.int64)
    row_tile = (place // column_tiles % row_tiles).to(tl.int64)
    group = (place // column_tiles // row_tiles).to(tl.int64)
    first_row = row_tile * ROWS
    column_sums = column_table + (row_tile * groups + group) * columns  # [row tiles, groups, columns]
    row_sums = row_table + column_tile * windows * groups * rows + group * rows  # [column tiles, windows, groups, rows]
    all_rows = groups * rows

    # A dense row is one run of memory. Where runs begin on 16 bytes and are a multiple of 16 bytes long, the compiler
    # is told so (x // 4 * 4 is a multiple of 4) and loads 16 bytes at a time: a warp then takes one row of the tile.
    # Its sums along the row stay inside the warp, those along columns inside a thread but for one last step.
    if mode == 0:  # ALIGNED
        ALIGN: tl.constexpr = 128 // WEIGHT.primitive_bitwidth
        _dense_tile(
            tl.multiple_of(weight.to(tl.pointer_type(WEIGHT)), 16),
            group * rows, row_stride // ALIGN * ALIGN, first_row, rows, column_tile, columns // ALIGN * ALIGN,
            column_sums, row_sums, all_rows, records, windows, counts, entries, divisor, ROWS, COLUMNS,
        )  # fmt: skip
    elif mode == 1:  # DENSE
        _dense_tile(
            weight.to(tl.pointer_type(WEIGHT)),
            group * rows, row_stride, first_row, rows, column_tile, columns,
            column_sums, row_sums, all_rows, records, windows, counts, entries, divisor, ROWS, COLUMNS,
        )  # fmt: skip
    elif GATHERS:
        _gathered_tile(
            weight.to(tl.pointer_type(WEIGHT)),
            group * rows, row_stride, channel_stride, taps, taps_each, first_row, rows, column_tile, columns,
            column_sums, row_sums, all_rows, records, windows, counts, entries, divisor, ROWS, WIDE,
        )  # fmt: skip


@triton.jit
def _dense_tile(
    weight, group_row, row_stride, first_row, rows, column_tile, columns,
    column_sums, row_sums, all_rows, records, windows, counts, entries, divisor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One load of the whole tile: many independent reads in flight, and both sums from the same registers."""
    row = first_row + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(weight + (group_row + row)[:, None] * row_stride + column[None, :], mask=inside, other=0)
    x = tl.abs(x.to(column_sums.dtype.element_ty))
    tl.store(column_sums + column, tl.sum(x, 0), mask=column < columns)
    _sum_rows(x, row, rows, column, row_sums, all_rows, records, windows, counts, entries, divisor)


@triton.jit
def _gathered_tile(
    weight, group_row, row_stride, channel_stride, taps, taps_each, first_row, rows, column_tile, columns,
    column_sums, row_sums, all_rows, records, windows, counts, entries, divisor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same where a column is a merged tap, the sum of ``taps_each`` weights at most, or where rows have gaps.

    In float64, since what is merged may cancel. Wide, since here the windows of a row may be many and each has a sum
    for every tile of columns; so a few rows at a time.
    """
    CHUNK: tl.constexpr = 4
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    entry = column % entries
    channel = weight + column // entries * channel_stride
    total = tl.zeros([CHUNK, COLUMNS], tl.float64)
    for start in range(0, ROWS, CHUNK):
        row = first_row + start + tl.arange(0, CHUNK)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        x = tl.zeros([CHUNK, COLUMNS], tl.float64)
        for i in range(taps_each):
            tap = tl.load(taps + entry * taps_each + i)  # its offset, -1 where the merged tap has fewer
            place = channel[None, :] + (group_row + row)[:, None] * row_stride + tap[None, :]
            x += tl.load(place, mask=inside & (tap >= 0)[None, :], other=0).to(tl.float64)
        x = tl.abs(x)
        total += x
        _sum_rows(x, row, rows, column, row_sums, all_rows, records, windows, counts, entries, divisor)
    tl.store(column_sums + column, tl.sum(total, 0).to(column_sums.dtype.element_ty), mask=column < columns)


@triton.jit
def _sum_rows(x, row, rows, column, row_sums, all_rows, records, windows, counts, entries, divisor):
    """The rows of a tile as each output window sees them; ``counts`` is -1 where one window sees everything once."""
    if counts < 0:
        tl.store(row_sums + row, tl.sum(x, 1).to(row_sums.dtype.element_ty), mask=row < rows)
    else:
        entry = column // divisor % entries
        for window in range(windows):
            count = tl.load(records + counts + window * entries + entry).to(x.dtype)[None, :]
            seen = tl.where(count > 0, x * count, 0)  # 0 * NaN would be NaN
            sums = tl.sum(seen, 1).to(row_sums.dtype.element_ty)
            tl.store(row_sums + window * all_rows + row, sums, mask=row < rows)


@triton.jit
def find_largest_kernel(
    weights,  # [layers] int64: the addresses of their weights
    records,  # int64: a Job for each window, and the lists that it points to
    owners,  # [blocks, 2] int64: where in records the job of each block stands, and its weight, or -1: the tables
    tables,  # the partial sums
    tickets,  # [layers, 2] int64: how many blocks of a norm are done
    candidates,  # work, [blocks, 2] int64: the largest score of a block, and its first index
    l1,  # out, [layers]
    linf,  # out, [layers]
    winners,  # out, [layers, 2, 2] int64
    WEIGHT: tl.constexpr,
    CHANNELS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """The largest sum of one window over a block of channels; the last block of a norm to finish compares them all.

    A score is the bit pattern of a sum. Sums are not negative, so scores are ordered as sums are, with NaN above all:
    one comparison of integers, whose result no order of execution changes. The index is ``channel * windows + window``.
    """
    pid = tl.program_id(0)
    job = records + tl.load(owners + 2 * pid)
    source = tl.load(owners + 2 * pid + 1)
    first_block = tl.load(job + 0).to(tl.int32)
    layer = tl.load(job + 2)
    norm = tl.load(job + 3)
    norm_first = tl.load(job + 4)
    norm_blocks = tl.load(job + 5)
    window = tl.load(job + 6)
    windows = tl.load(job + 7)
    channels = tl.load(job + 8)

    channel = (pid - first_block) * CHANNELS + tl.arange(0, CHANNELS)
    if source < 0:
        sums = _window_sums(tables, records, job, channel, channels, TERMS)
    else:
        weight = tl.load(weights + source).to(tl.pointer_type(WEIGHT))
        sums = _window_sums(weight, records, job, channel, channels, TERMS)
    score = tl.where(sums == sums, sums.to(tl.int64, bitcast=True), NAN)
    score = tl.where(channel < channels, score, -1)
    index = channel * windows + window
    top, first = _first_largest(score, index)

    tl.store(candidates + 2 * pid, top)
    tl.store(candidates + 2 * pid + 1, first)
    tl.debug_barrier()  # every thread has stored before one of them takes the ticket
    if tl.atomic_add(tickets + layer * 2 + norm, 1, sem="acq_rel") == norm_blocks - 1:
        top, first = _largest_of_blocks(candidates + 2 * norm_first, norm_blocks)
        value = top.to(tl.float64, bitcast=True).to(l1.dtype.element_ty)
        tl.store(tl.where(norm == 0, l1, linf) + layer, value)
        tl.store(winners + layer * 4 + norm * 2, first // windows)
        tl.store(winners + layer * 4 + norm * 2 + 1, first % windows)


@triton.jit
def _window_sums(source, records, job, channel, channels, TERMS: tl.constexpr):
    """The sum of a window's terms for each channel, in float64. Reads of ``TERMS`` terms are independent."""
    per_group = tl.load(job + 9).to(tl.int32)
    group_stride = tl.load(job + 10)
    channel_stride = tl.load(job + 11)
    origin = tl.load(job + 12)
    terms = tl.load(job + 13)
    taps_each = tl.load(job + 14)
    taps = records + tl.load(job + 15)

    place = source + origin + channel // per_group * group_stride + channel % per_group * channel_stride
    total = tl.zeros([TERMS, channel.shape[0]], tl.float64)
    for start in range(0, terms, TERMS):
        term = start + tl.arange(0, TERMS)
        x = tl.zeros([TERMS, channel.shape[0]], tl.float64)
        for i in range(taps_each):
            tap = tl.load(taps + term * taps_each + i, mask=term < terms, other=-1)
            inside = (tap >= 0)[:, None] & (channel < channels)[None, :]
            x += tl.load(place[None, :] + tap[:, None], mask=inside, other=0).to(tl.float64)
        total += tl.abs(x)
    return tl.sum(total, 0)


@triton.jit
def _largest_of_blocks(candidates, blocks):
    """The largest score of all blocks of a norm and its first index."""
    LANES: tl.constexpr = 128
    top = tl.full([LANES], -1, tl.int64)
    first = tl.full([LANES], LAST, tl.int64)
    for start in range(0, blocks, LANES):
        block = start + tl.arange(0, LANES)
        score = tl.load(candidates + 2 * block, mask=block < blocks, other=-1, cache_modifier=".cg")  # no stale L1
        index = tl.load(candidates + 2 * block + 1, mask=block < blocks, other=LAST, cache_modifier=".cg")
        better = (score > top) | ((score == top) & (index < first))
        top = tl.where(better, score, top)
        first = tl.where(better, index, first)
    return _first_largest(top, first)


@triton.jit
def _first_largest(score, index):
    top = tl.max(score, 0)
    return top, tl.min(tl.where(score == top, index, LAST), 0)
