"""Depthwise convolution of channels_last images as Triton kernels: forward, and gradients of images and weights.

On a GPU this is bound by instructions, not by memory: what counts is how few accompany each multiply-add. A thread
keeps `ROWS` x `STRIP` outputs of a channel or two; each input is loaded and converted to float32 once and serves all of
them. All loops over rows, columns and taps are unrolled, so that sums and weights stay in registers and taps beyond the
edges of a map that fits into one block cost nothing. A program has `UNITS` such blocks of `CHANNELS` channels. Nothing
is added atomically: results have the same bits each time.
"""

import triton
import triton.language as tl


@triton.jit
def _add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@triton.jit
def _strip(  # type: ignore[no-untyped-def]
    row,  # pointers [UNITS, CHANNELS] to the first column wanted
    first,  # its number, negative where the strip reaches beyond the map
    inside,  # whether there is such a row; [UNITS, CHANNELS]
    MASKED: tl.constexpr,  # whether that has to be asked
    COUNT: tl.constexpr,
    MARGIN: tl.constexpr,  # so many at either end may lie outside; COUNT where any may
    WHOLE: tl.constexpr,  # the strip is the map's whole width, with MARGIN columns of zeros that are not read
    WIDTH: tl.constexpr,
    C: tl.constexpr,
):
    # COUNT pixels of a row, float32, with zeros outside of the map.
    values = ()
    for j in tl.static_range(COUNT):
        if WHOLE and (j < MARGIN or j >= COUNT - MARGIN):
            values += (tl.full(row.shape, 0, tl.float32),)  # type: ignore[assignment]
        elif (j < MARGIN or j >= COUNT - MARGIN) and not WHOLE:
            there = inside & (first + j >= 0) & (first + j < WIDTH)
            values += (tl.load(row + j * C, there, 0.0).to(tl.float32),)  # type: ignore[assignment]
        elif MASKED:
            values += (tl.load(row + j * C, inside, 0.0).to(tl.float32),)  # type: ignore[assignment]
        else:
            values += (tl.load(row + j * C).to(tl.float32),)  # type: ignore[assignment]
    return values


@triton.jit(do_not_specialize=["batch", "biased"])
def convolve(  # type: ignore[no-untyped-def]
    images,  # [B, HEIGHT, WIDTH, C]
    weight,  # float32 [K * K, C]
    bias,  # float32 [C]
    out,  # as the images
    batch,
    first,  # offset of the first tap in `weight`, and from each to the next: forwards, or backwards for the gradient
    step,
    biased,  # 1, or 0 where there is no bias to read
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STRIP: tl.constexpr,
    UNITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    PAD: tl.constexpr = K // 2
    STRIPS: tl.constexpr = (WIDTH + STRIP - 1) // STRIP
    BLOCKS: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    GROUPS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    EVEN: tl.constexpr = C % CHANNELS == 0
    pid = tl.program_id(0)
    left = (pid % STRIPS) * STRIP
    channel = (pid // STRIPS) % GROUPS * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    unit = (pid // (STRIPS * GROUPS)) * UNITS + tl.arange(0, UNITS)[:, None]
    live = (unit < batch * BLOCKS) & (channel < C)
    unit = tl.minimum(unit, batch * BLOCKS - 1)
    top = unit % BLOCKS * ROWS
    start = (unit // BLOCKS).to(tl.int64) * (HEIGHT * WIDTH * C) + ((top * WIDTH + left) * C + channel)
    source = images + start - (PAD * WIDTH + PAD) * C
    target = out + start
    kernel = weight + first + (channel + tl.full((UNITS, 1), 0, tl.int32))
    none = tl.load(bias + (channel + tl.full((UNITS, 1), 0, tl.int32)), live & (biased > 0), 0.0)
    weights = ()
    sums = ()
    for i in tl.static_range(ROWS + K - 1):
        if i < K:
            for j in tl.static_range(K):
                place = kernel + (i * K + j) * step
                if EVEN:
                    weights += (tl.load(place),)  # type: ignore[assignment]
                else:
                    weights += (tl.load(place, live, 0.0),)  # type: ignore[assignment]
            if i < ROWS:
                for _ in tl.static_range(STRIP):
                    sums += (none,)  # type: ignore[assignment]
        elif i < ROWS:
            for _ in tl.static_range(STRIP):
                sums += (none,)  # type: ignore[assignment]
        if BLOCKS > 1 or (i >= PAD and i < HEIGHT + PAD):
            y = top + (i - PAD)
            inside = (y >= 0) & (y < HEIGHT) & (channel < C)
            pixels = _strip(
                source + i * WIDTH * C,
                left - PAD,
                inside,
                not EVEN or (BLOCKS > 1 and (HEIGHT % ROWS > 0 or i < PAD or i >= ROWS + PAD)),
                STRIP + K - 1,
                PAD if WIDTH % STRIP == 0 else STRIP + K - 1,
                WIDTH == STRIP,
                WIDTH,
                C,
            )
            before = sums
            sums = ()
            for r in tl.static_range(ROWS):
                if r <= i:
                    for s in tl.static_range(STRIP):
                        value = before[r * STRIP + s]  # type: ignore[var-annotated]
                        if i - r < K:
                            for j in tl.static_range(K):
                                if WIDTH != STRIP or (s + j >= PAD and s + j < WIDTH + PAD):
                                    value = tl.fma(weights[(i - r) * K + j], pixels[s + j], value)
                        sums += (value,)  # type: ignore[assignment]
        if i >= K - 1:
            for s in tl.static_range(STRIP):
                there = live
                if HEIGHT % ROWS > 0:
                    there &= top + (i - K + 1) < HEIGHT
                if WIDTH % STRIP > 0:
                    there &= left + s < WIDTH
                value = sums[(i - K + 1) * STRIP + s].to(out.dtype.element_ty)
                tl.store(target + ((i - K + 1) * WIDTH + s) * C, value, there)


@triton.jit(do_not_specialize=["batch"])  # one kernel for batches of any size
def correlate(  # type: ignore[no-untyped-def]
    images,  # [B, HEIGHT, WIDTH, C]
    gradient,  # as the images: of what came out
    out,  # float32 [SPLITS, K * K + 1, C]: parts of the gradients of the weights, and last of the bias
    batch,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STRIP: tl.constexpr,
    UNITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    PAD: tl.constexpr = K // 2
    STRIPS: tl.constexpr = (WIDTH + STRIP - 1) // STRIP
    BLOCKS: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    GROUPS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    EVEN: tl.constexpr = C % CHANNELS == 0
    split = tl.program_id(0) // GROUPS
    splits = tl.num_programs(0) // GROUPS
    channel = tl.program_id(0) % GROUPS * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    units = batch * (BLOCKS * STRIPS)
    sums = ()
    for _ in tl.static_range(K * K + 1):
        sums += (tl.full((UNITS, CHANNELS), 0, tl.float32),)  # type: ignore[assignment]
    for part in range(split, (units + UNITS - 1) // UNITS, splits):
        unit = part * UNITS + tl.arange(0, UNITS)[:, None]
        live = (unit < units) & (channel < C)
        unit = tl.minimum(unit, units - 1)
        left = unit % STRIPS * STRIP
        top = unit // STRIPS % BLOCKS * ROWS
        image = (unit // (STRIPS * BLOCKS)).to(tl.int64) * (HEIGHT * WIDTH * C)
        start = image + ((top * WIDTH + left) * C + channel)
        source = images + start - (PAD * WIDTH + PAD) * C
        given = ()
        for i in tl.static_range(ROWS + K - 1):
            if i < ROWS:
                given += _strip(
                    gradient + start + i * WIDTH * C,
                    left,
                    live & (top + i < HEIGHT),
                    True,
                    STRIP,
                    0 if WIDTH % STRIP == 0 else STRIP,
                    False,
                    WIDTH,
                    C,
                )
            if BLOCKS > 1 or (i >= PAD and i < HEIGHT + PAD):
                y = top + (i - PAD)
                inside = (y >= 0) & (y < HEIGHT) & (channel < C)
                pixels = _strip(
                    source + i * WIDTH * C,
                    left - PAD,
                    inside,
                    not EVEN or (BLOCKS > 1 and (HEIGHT % ROWS > 0 or i < PAD or i >= ROWS + PAD)),
                    STRIP + K - 1,
                    PAD if WIDTH % STRIP == 0 else STRIP + K - 1,
                    WIDTH == STRIP,
                    WIDTH,
                    C,
                )
                before = sums
                sums = ()
                for k in tl.static_range(K):
                    for j in tl.static_range(K):
                        value = before[k * K + j]  # type: ignore[var-annotated]
                        if i - k >= 0 and i - k < ROWS:
                            for s in tl.static_range(STRIP):
                                if WIDTH != STRIP or (s + j >= PAD and s + j < WIDTH + PAD):
                                    value = tl.fma(given[(i - k) * STRIP + s], pixels[s + j], value)
                        sums += (value,)  # type: ignore[assignment]
                sums += (before[K * K],)  # type: ignore[assignment]
        before = sums
        sums = ()
        for t in tl.static_range(K * K):
            sums += (before[t],)  # type: ignore[assignment]
        value = before[K * K]
        for t in tl.static_range(ROWS * STRIP):
            value += given[t]
        sums += (value,)  # type: ignore[assignment]
    one = tl.program_id(0) % GROUPS * CHANNELS + tl.arange(0, CHANNELS)
    for t in tl.static_range(K * K + 1):
        tl.store(out + (split * (K * K + 1) + t) * C + one, tl.reduce(sums[t], 0, _add), one < C)
