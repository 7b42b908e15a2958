"""Triton kernels of one token: a row's projections with norm and residual, and what a mixer does between its own.

A cache's states are reached through a table of their addresses, so that one CUDA graph serves any cache.

Each kernel may begin while the one before still runs, from compute capability 9.0 on (programmatic dependent launch):
it reads weights and its own states first, then waits, and only then reads or writes what others use.

Shape legend: `b` batch, `d` width, `k` convolution taps, `h` head, `p` head_dim, `g` group, `n` state.
"""

import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

WIDEST_NORM = 2048
"""Width up to which a projection makes its own norm."""

MOST_TOGETHER = 4
"""Projections that `linears` makes in one kernel."""

NORMS = {nn.RMSNorm: 1, nn.LayerNorm: 2}
PROGRAMS = 132  # an H100's multiprocessors; a smaller GPU runs two rounds
_ELEMENTS = 16384  # weights that a program holds in registers
_LINEAR_PROGRAMS = 4 * PROGRAMS  # of one row's projection
_ROWS, _ROW_FEATURES, _ROW_WARPS = 16, 32, 4  # of a program that multiplies 16 rows: `benchmarks/speed/projections.py`
_ROW_COLUMNS = 256  # that it reads at once; with a norm fewer, where more than two such programs share weights
_ROW_COLUMNS_OF_MANY = 128


if triton is not None:

    @triton.jit
    def _let_the_next_begin(OVERLAP: tl.constexpr):
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def _wait(OVERLAP: tl.constexpr):
        """Until all that earlier kernels wrote is there."""
        if OVERLAP:
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def _fetch(weight, first, last, LINES: tl.constexpr):
        """Asks for the memory from one element of 16 bits to another, in lines of 64, without waiting for it."""
        place = tl.minimum(first + tl.arange(0, LINES) * 64, last)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [(weight + place).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def _silu(x):
        return x * tl.sigmoid(x)

    @triton.jit
    def _softplus(x):
        exponential = tl.exp(tl.minimum(x, 20.0))
        total = 1.0 + exponential
        small = tl.where(total == 1.0, exponential, tl.log(total) * (exponential / (total - 1.0)))
        return tl.where(x > 20.0, x, small)

    @triton.jit
    def _normed(x, norm, norm_bias, column, is_column, eps, WIDTH: tl.constexpr, NORM: tl.constexpr):
        x = x.to(norm.dtype.element_ty).to(tl.float32)
        if NORM == 2:
            x = tl.where(is_column, x - tl.sum(x) / WIDTH, 0.0)
        x *= tl.rsqrt(tl.sum(x * x) / WIDTH + eps)
        x *= tl.load(norm + column, mask=is_column, other=0.0).to(tl.float32)
        if norm_bias is not None:
            x += tl.load(norm_bias + column, mask=is_column, other=0.0).to(tl.float32)
        return x.to(norm.dtype.element_ty)

    @triton.jit
    def _of_a_row(
        x,  # (WIDTH,)
        weight,  # (OUT, WIDTH), contiguous
        gate_weight,  # the same, or nothing
        bias,  # (OUT,) or nothing
        norm,  # (WIDTH,) or nothing
        norm_bias,  # (WIDTH,) or nothing
        residual,  # (OUT,) or nothing
        out,  # (OUT,), made
        block,  # which of its features
        eps,
        WIDTH: tl.constexpr,
        OUT: tl.constexpr,
        NORM: tl.constexpr,
        FEATURES: tl.constexpr,
        COLUMNS: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """Some features of `residual + weight(norm(x))`, of one row; with a gate of its SiLU times the other."""
        feature = block * FEATURES + tl.arange(0, FEATURES)
        is_feature = feature < OUT
        shift = tl.zeros((FEATURES,), dtype=tl.float32)
        if bias is not None:
            shift += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)
        added = tl.zeros((FEATURES,), dtype=tl.float32)
        total = tl.zeros((FEATURES,), dtype=tl.float32)
        gate_total = tl.zeros((FEATURES,), dtype=tl.float32)
        for start in tl.static_range(0, WIDTH, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            is_column = column < WIDTH
            is_weight = is_feature[:, None] & is_column[None, :]
            place = feature[:, None].to(tl.int64) * WIDTH + column[None, :]
            part = tl.load(weight + place, mask=is_weight, other=0.0)
            if gate_weight is not None:
                gate_part = tl.load(gate_weight + place, mask=is_weight, other=0.0)
            if start == 0:
                _wait(OVERLAP)
                if residual is not None:
                    added += tl.load(residual + feature, mask=is_feature, other=0.0).to(tl.float32)
            read = tl.load(x + column, mask=is_column, other=0.0)
            if NORM:
                read = _normed(read, norm, norm_bias, column, is_column, eps, WIDTH, NORM)
            read = read.to(weight.dtype.element_ty).to(tl.float32)
            total += tl.sum(part.to(tl.float32) * read[None, :], axis=1)
            if gate_weight is not None:
                gate_total += tl.sum(gate_part.to(tl.float32) * read[None, :], axis=1)
        # rounded where the modules round
        total = (total + shift).to(weight.dtype.element_ty).to(tl.float32)
        if gate_weight is not None:
            gate_total = gate_total.to(weight.dtype.element_ty).to(tl.float32)
            total *= _silu(gate_total).to(weight.dtype.element_ty).to(tl.float32)
        tl.store(out + feature, total + added, mask=is_feature)

    @triton.jit
    def _of_rows(
        x,  # (b, WIDTH), rows `of_row` apart
        weight,  # (OUT, WIDTH), contiguous
        gate_weight,  # the same, or nothing
        bias,  # (OUT,) or nothing
        norm,  # (WIDTH,) or nothing
        norm_bias,  # (WIDTH,) or nothing
        residual,  # as out, or nothing
        out,  # (b, OUT), rows `of_out` apart, made
        block,  # which of its features
        rows,
        of_row,
        of_out,
        eps,
        WIDTH: tl.constexpr,
        OUT: tl.constexpr,
        NORM: tl.constexpr,
        ROWS: tl.constexpr,
        FEATURES: tl.constexpr,
        COLUMNS: tl.constexpr,
        LINES: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """The same of rows."""
        feature = block * FEATURES + tl.arange(0, FEATURES)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        is_feature, is_row = feature < OUT, row < rows
        of_rows = row[:, None].to(tl.int64) * of_row
        to = row[:, None].to(tl.int64) * of_out + feature[None, :]
        is_out = is_row[:, None] & is_feature[None, :]
        shift = tl.zeros((FEATURES,), dtype=tl.float32)
        if bias is not None:
            shift += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)
        if OVERLAP and tl.program_id(1) == 0:
            first = block.to(tl.int64) * FEATURES * WIDTH
            last = tl.minimum(first + FEATURES * WIDTH, OUT * WIDTH) - 1
            _fetch(weight, first, last, LINES)
            if gate_weight is not None:
                _fetch(gate_weight, first, last, LINES)
        _wait(OVERLAP)
        added = tl.zeros((ROWS, FEATURES), dtype=tl.float32)
        if residual is not None:
            added += tl.load(residual + to, mask=is_out, other=0.0).to(tl.float32)
        if NORM:
            mean = tl.zeros((ROWS,), dtype=tl.float32)
            if NORM == 2:
                for start in tl.static_range(0, WIDTH, COLUMNS):
                    column = start + tl.arange(0, COLUMNS)
                    is_read = is_row[:, None] & (column < WIDTH)[None, :]
                    read = tl.load(x + of_rows + column[None, :], mask=is_read, other=0.0)
                    mean += tl.sum(read.to(norm.dtype.element_ty).to(tl.float32), axis=1)
                mean /= WIDTH
            square = tl.zeros((ROWS,), dtype=tl.float32)
            for start in tl.static_range(0, WIDTH, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                is_read = is_row[:, None] & (column < WIDTH)[None, :]
                read = tl.load(x + of_rows + column[None, :], mask=is_read, other=0.0)
                read = tl.where(is_read, read.to(norm.dtype.element_ty).to(tl.float32) - mean[:, None], 0.0)
                square += tl.sum(read * read, axis=1)
            scale = tl.rsqrt(square / WIDTH + eps)
        total = tl.zeros((ROWS, FEATURES), dtype=tl.float32)
        gate_total = tl.zeros((ROWS, FEATURES), dtype=tl.float32)
        for start in tl.static_range(0, WIDTH, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            is_column = column < WIDTH
            is_weight = is_feature[:, None] & is_column[None, :]
            place = feature[:, None].to(tl.int64) * WIDTH + column[None, :]
            part = tl.load(weight + place, mask=is_weight, other=0.0)
            if gate_weight is not None:
                gate_part = tl.load(gate_weight + place, mask=is_weight, other=0.0)
            read = tl.load(x + of_rows + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
            if NORM:
                read = read.to(norm.dtype.element_ty).to(tl.float32)
                read = (read - mean[:, None]) * scale[:, None]
                read *= tl.load(norm + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
                if norm_bias is not None:
                    read += tl.load(norm_bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
                read = read.to(norm.dtype.element_ty)
            read = read.to(weight.dtype.element_ty)
            total = tl.dot(read, tl.trans(part), total)
            if gate_weight is not None:
                gate_total = tl.dot(read, tl.trans(gate_part), gate_total)
        # rounded where the modules round
        total = (total + shift[None, :]).to(weight.dtype.element_ty).to(tl.float32)
        if gate_weight is not None:
            gate_total = gate_total.to(weight.dtype.element_ty).to(tl.float32)
            total *= _silu(gate_total).to(weight.dtype.element_ty).to(tl.float32)
        tl.store(out + to, total + added, mask=is_out)

    @triton.jit
    def _part(
        x, weight, gate_weight, bias, norm, norm_bias, residual, out, block, rows, of_row, of_out, eps,
        WIDTH: tl.constexpr, OUT: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
        COLUMNS: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        if ROWS == 1:
            _of_a_row(
                x, weight, gate_weight, bias, norm, norm_bias, residual, out, block, eps,
                WIDTH, OUT, NORM, FEATURES, COLUMNS, OVERLAP,
            )  # fmt: skip
        else:
            _of_rows(
                x, weight, gate_weight, bias, norm, norm_bias, residual, out, block, rows, of_row, of_out, eps,
                WIDTH, OUT, NORM, ROWS, FEATURES, COLUMNS, LINES, OVERLAP,
            )  # fmt: skip

    @triton.jit
    def _linear_kernel(
        x,  # (b, WIDTH), rows `of_row` apart
        weight,  # (OUT, WIDTH), contiguous
        gate_weight,  # the same, or nothing
        bias,  # (OUT,) or nothing
        norm,  # (WIDTH,) or nothing
        norm_bias,  # (WIDTH,) or nothing
        residual,  # (b, OUT), contiguous, or nothing
        out,  # (b, OUT), made
        rows,
        of_row,
        eps,
        WIDTH: tl.constexpr,
        OUT: tl.constexpr,
        NORM: tl.constexpr,
        ROWS: tl.constexpr,
        FEATURES: tl.constexpr,
        COLUMNS: tl.constexpr,
        LINES: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        _let_the_next_begin(OVERLAP)
        _part(
            x, weight, gate_weight, bias, norm, norm_bias, residual, out, tl.program_id(0), rows, of_row, OUT, eps,
            WIDTH, OUT, NORM, ROWS, FEATURES, COLUMNS, LINES, OVERLAP,
        )  # fmt: skip

    @triton.jit
    def _linears_kernel(
        x,  # (b, WIDTH), rows `of_row` apart
        weight,  # (OUT, WIDTH), contiguous
        second,  # (SECOND, WIDTH), contiguous, or nothing
        third,  # (THIRD, WIDTH), contiguous, or nothing
        fourth,  # (FOURTH, WIDTH), contiguous, or nothing
        bias,  # (OUT,) or nothing, as the next three
        second_bias,
        third_bias,
        fourth_bias,
        out,  # (b, OUT + SECOND + THIRD + FOURTH), made
        rows,
        of_row,
        WIDTH: tl.constexpr,
        OUT: tl.constexpr,
        SECOND: tl.constexpr,
        THIRD: tl.constexpr,
        FOURTH: tl.constexpr,
        ROWS: tl.constexpr,
        FEATURES: tl.constexpr,
        COLUMNS: tl.constexpr,
        LINES: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        _let_the_next_begin(OVERLAP)
        block = tl.program_id(0)
        ALL: tl.constexpr = OUT + SECOND + THIRD + FOURTH
        A: tl.constexpr = (OUT + FEATURES - 1) // FEATURES
        B: tl.constexpr = A + (SECOND + FEATURES - 1) // FEATURES
        C: tl.constexpr = B + (THIRD + FEATURES - 1) // FEATURES
        if block < A:
            _part(
                x, weight, None, bias, None, None, None, out, block, rows, of_row, ALL, 0.0,
                WIDTH, OUT, 0, ROWS, FEATURES, COLUMNS, LINES, OVERLAP,
            )  # fmt: skip
        if second is not None:
            if (block >= A) & (block < B):
                _part(
                    x, second, None, second_bias, None, None, None, out + OUT, block - A, rows, of_row, ALL, 0.0,
                    WIDTH, SECOND, 0, ROWS, FEATURES, COLUMNS, LINES, OVERLAP,
                )  # fmt: skip
        if third is not None:
            if (block >= B) & (block < C):
                _part(
                    x, third, None, third_bias, None, None, None, out + OUT + SECOND, block - B, rows, of_row, ALL,
                    0.0, WIDTH, THIRD, 0, ROWS, FEATURES, COLUMNS, LINES, OVERLAP,
                )  # fmt: skip
        if fourth is not None:
            if block >= C:
                _part(
                    x, fourth, None, fourth_bias, None, None, None, out + OUT + SECOND + THIRD, block - C, rows,
                    of_row, ALL, 0.0, WIDTH, FOURTH, 0, ROWS, FEATURES, COLUMNS, LINES, OVERLAP,
                )  # fmt: skip

    @triton.jit
    def _norm_kernel(
        x,  # (b, WIDTH), contiguous
        norm,  # (WIDTH,)
        norm_bias,  # (WIDTH,) or nothing
        out,  # (b, WIDTH), made
        eps,
        WIDTH: tl.constexpr,
        NORM: tl.constexpr,
        COLUMNS: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        _let_the_next_begin(OVERLAP)
        _wait(OVERLAP)
        column = tl.arange(0, COLUMNS)
        is_column = column < WIDTH
        start = tl.program_id(0).to(tl.int64) * WIDTH
        read = tl.load(x + start + column, mask=is_column, other=0.0)
        read = _normed(read, norm, norm_bias, column, is_column, eps, WIDTH, NORM)
        tl.store(out + start + column, read, mask=is_column)

    @triton.jit
    def _before(state, weight, bias, channel, is_channel, TAPS: tl.constexpr, K: tl.constexpr):
        """What a convolution of channels of one row has before its token: earlier inputs (channels, K), taps, bias."""
        tap = tl.arange(0, K)
        place = channel[:, None] * TAPS + tap[None, :]
        past = tl.load(state + place + 1, mask=is_channel[:, None] & (tap < TAPS - 1)[None, :], other=0.0)
        taps = tl.load(weight + place, mask=is_channel[:, None] & (tap < TAPS)[None, :], other=0.0)
        shift = 0.0 * channel
        if bias is not None:
            shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
        return past, taps, shift

    @triton.jit
    def _window(stream, past, channel, is_taken, TAPS: tl.constexpr, K: tl.constexpr):
        """The last inputs (channels, K) of channels of one row, this token's last; zeros behind TAPS of them."""
        new = tl.load(stream + channel, mask=is_taken, other=0.0)
        return tl.where((tl.arange(0, K) == TAPS - 1)[None, :], new[:, None], past)

    @triton.jit
    def _take(window, state, channel, is_taken, TAPS: tl.constexpr, K: tl.constexpr):
        """Makes a window a row's new state; every thread must have read the old one."""
        tap = tl.arange(0, K)
        place = state + channel[:, None] * TAPS + tap[None, :]
        tl.store(place, window, mask=is_taken[:, None] & (tap < TAPS)[None, :])

    @triton.jit
    def _convolved(window, taps, shift, SILU: tl.constexpr):
        y = tl.sum(window.to(tl.float32) * taps.to(tl.float32), axis=1) + shift
        if SILU:
            y = _silu(y)
        return y.to(window.dtype).to(tl.float32)

    @triton.jit
    def _conv_kernel(
        stream,  # (b, d), rows `of_row` apart
        addresses,  # (layers, 2), of convolution and recurrent states
        real,  # (b,), 0 at padding
        weight,  # (d, k)
        bias,  # (d,) or nothing
        out,  # (b, d), made
        layer,
        of_row,
        CHANNELS: tl.constexpr,
        TAPS: tl.constexpr,
        SILU: tl.constexpr,
        K: tl.constexpr,
        BLOCK: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        _let_the_next_begin(OVERLAP)
        row = tl.program_id(0).to(tl.int64)
        channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_channel = channel < CHANNELS
        state = tl.load(addresses + 2 * layer).to(tl.pointer_type(stream.dtype.element_ty)) + row * CHANNELS * TAPS
        is_taken = is_channel & (tl.load(real + row + 0 * channel) > 0)
        past, taps, shift = _before(state, weight, bias, channel, is_channel, TAPS, K)
        _wait(OVERLAP)
        window = _window(stream + row * of_row, past, channel, is_taken, TAPS, K)
        tl.debug_barrier()
        _take(window, state, channel, is_taken, TAPS, K)
        y = _convolved(window, taps, shift, SILU)
        tl.store(out + row * CHANNELS + channel, y, mask=is_channel)

    @triton.jit
    def _ssd_kernel(
        stream,  # (b, gate (d), x (d), B (g, n), C (g, n), dt (h)), rows `of_row` apart
        convolved,  # (b, d + 2 g n), contiguous; nothing where this kernel convolves and norms
        addresses,  # (layers, 2), of convolution and recurrent states
        real,  # (b,), 0 at padding
        conv_weight,  # (d + 2 g n, k)
        conv_bias,  # (d + 2 g n,) or nothing
        dt_bias,  # (h,)
        A_log,  # (h,)
        D,  # (h,)
        norm,  # (d,)
        frequencies,  # (PAIRS,) or nothing
        out,  # (b, d), made
        layer,
        of_row,
        eps,
        least,
        most,
        PAIRS: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        GROUPS: tl.constexpr,
        STATE: tl.constexpr,
        TAPS: tl.constexpr,
        SILU: tl.constexpr,
        K: tl.constexpr,
        P: tl.constexpr,
        N: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        _let_the_next_begin(OVERLAP)
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        p, n = tl.arange(0, P), tl.arange(0, N)
        is_p, is_n = p < HEAD_DIM, n < STATE
        WIDTH: tl.constexpr = HEADS * HEAD_DIM
        CHANNELS: tl.constexpr = WIDTH + 2 * GROUPS * STATE
        stream += row * of_row
        at_x = head * HEAD_DIM + p
        at_B = WIDTH + head // (HEADS // GROUPS) * STATE + n
        at_C = at_B + GROUPS * STATE
        is_real = tl.load(real + row) > 0
        states = tl.load(addresses + 2 * layer + 1).to(tl.pointer_type(tl.float32))
        states += (row * HEADS + head) * HEAD_DIM * STATE
        place = states + p[:, None] * STATE + n[None, :]
        is_state = is_p[:, None] & is_n[None, :]
        state = tl.load(place, mask=is_state, other=0.0)
        if PAIRS:  # the state turns back by a token
            is_first = n % 2 == 0 if INTERLEAVED else n < PAIRS
            step: tl.constexpr = 1 if INTERLEAVED else PAIRS
            pair = n // 2 if INTERLEAVED else n % PAIRS
            turns = n < 2 * PAIRS
            angle = tl.load(frequencies + pair, mask=turns, other=0.0).to(tl.float32)
            angle = tl.where(is_real & turns, angle, 0.0)
            partner = place + tl.where(is_first, step, -step)[None, :]
            other = tl.load(partner, mask=is_state & turns[None, :], other=0.0)
            sine = tl.where(is_first, tl.sin(angle), -tl.sin(angle))
            state = state * tl.cos(angle)[None, :] + other * sine[None, :]
            tl.debug_barrier()  # each thread reads what another will write
        dt_shift = tl.load(dt_bias + head).to(tl.float32)
        rate = -tl.exp(tl.load(A_log + head).to(tl.float32))
        skip = tl.load(D + head).to(tl.float32)
        if convolved is None:
            past = tl.load(addresses + 2 * layer).to(tl.pointer_type(stream.dtype.element_ty))
            past += row * CHANNELS * TAPS
            x_past, x_taps, x_shift = _before(past, conv_weight, conv_bias, at_x, is_p, TAPS, K)
            B_past, B_taps, B_shift = _before(past, conv_weight, conv_bias, at_B, is_n, TAPS, K)
            C_past, C_taps, C_shift = _before(past, conv_weight, conv_bias, at_C, is_n, TAPS, K)
            is_x = is_p & (tl.load(real + row + 0 * p) > 0)
            is_BC = is_n & (tl.load(real + row + 0 * n) > 0)
            norm_scale = tl.load(norm + at_x, mask=is_p, other=0.0).to(tl.float32)
            _wait(OVERLAP)
            gate = tl.load(stream + at_x, mask=is_p, other=0.0).to(tl.float32)
            xBC = stream + WIDTH
            x_window = _window(xBC, x_past, at_x, is_x, TAPS, K)
            B_window = _window(xBC, B_past, at_B, is_BC, TAPS, K)
            C_window = _window(xBC, C_past, at_C, is_BC, TAPS, K)
            tl.debug_barrier()
            _take(x_window, past, at_x, is_x, TAPS, K)
            _take(B_window, past, at_B, is_BC, TAPS, K)
            _take(C_window, past, at_C, is_BC, TAPS, K)
            x = _convolved(x_window, x_taps, x_shift, SILU)
            B = _convolved(B_window, B_taps, B_shift, SILU)
            C = _convolved(C_window, C_taps, C_shift, SILU)
        else:
            _wait(OVERLAP)
            convolved += row * CHANNELS
            x = tl.load(convolved + at_x, mask=is_p, other=0.0).to(tl.float32)
            B = tl.load(convolved + at_B, mask=is_n, other=0.0).to(tl.float32)
            C = tl.load(convolved + at_C, mask=is_n, other=0.0).to(tl.float32)
        dt = tl.load(stream + WIDTH + CHANNELS + head).to(tl.float32) + dt_shift
        dt = tl.minimum(tl.maximum(_softplus(dt), least), most)
        dt = tl.where(is_real, dt, 0.0)
        state = state * tl.exp(rate * dt) + (dt * x)[:, None] * B[None, :]
        tl.store(place, state, mask=is_state)
        y = tl.sum(state * C[None, :], axis=1) + skip * x
        if convolved is None:
            gated = y.to(stream.dtype.element_ty).to(tl.float32) * _silu(gate)
            scale = tl.rsqrt(tl.sum(gated * gated) / HEAD_DIM + eps)
            y = (gated * scale).to(stream.dtype.element_ty).to(tl.float32) * norm_scale
        tl.store(out + row * WIDTH + at_x, y, mask=is_p)

    @triton.jit
    def _s6_kernel(
        stream,  # (b, x (d), gate (d)), rows `of_row` apart
        convolved,  # (b, d), contiguous
        projected,  # (b, rank + B (n) + C (n)), contiguous
        steps,  # (b, d), contiguous, before softplus
        addresses,  # (layers, 2), of convolution and recurrent states
        real,  # (b,), 0 at padding
        A_log,  # (d, n)
        D,  # (d,)
        out,  # (b, d), made
        layer,
        of_row,
        WIDTH: tl.constexpr,
        RANK: tl.constexpr,
        STATE: tl.constexpr,
        P: tl.constexpr,
        N: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        _let_the_next_begin(OVERLAP)
        row = tl.program_id(0).to(tl.int64)
        p, n = tl.program_id(1) * P + tl.arange(0, P), tl.arange(0, N)
        is_p, is_n = p < WIDTH, n < STATE
        is_state = is_p[:, None] & is_n[None, :]
        states = tl.load(addresses + 2 * layer + 1).to(tl.pointer_type(tl.float32)) + row * WIDTH * STATE
        place = p[:, None] * STATE + n[None, :]
        A = -tl.exp(tl.load(A_log + place, mask=is_state, other=0.0).to(tl.float32))
        state = tl.load(states + place, mask=is_state, other=0.0)
        skip = tl.load(D + p, mask=is_p, other=0.0).to(tl.float32)
        is_real = tl.load(real + row) > 0
        _wait(OVERLAP)
        x = tl.load(convolved + row * WIDTH + p, mask=is_p, other=0.0).to(tl.float32)
        dt = _softplus(tl.load(steps + row * WIDTH + p, mask=is_p, other=0.0).to(tl.float32))
        dt = tl.where(is_real, dt, 0.0)
        projected += row * (RANK + 2 * STATE) + RANK
        B = tl.load(projected + n, mask=is_n, other=0.0).to(tl.float32)
        C = tl.load(projected + STATE + n, mask=is_n, other=0.0).to(tl.float32)
        gate = tl.load(stream + row * of_row + WIDTH + p, mask=is_p, other=0.0).to(tl.float32)
        state = state * tl.exp(A * dt[:, None]) + (dt * x)[:, None] * B[None, :]
        tl.store(states + place, state, mask=is_state)
        y = tl.sum(state * C[None, :], axis=1) + skip * x
        y = y.to(stream.dtype.element_ty).to(tl.float32) * _silu(gate).to(stream.dtype.element_ty).to(tl.float32)
        tl.store(out + row * WIDTH + p, y, mask=is_p)


def power_of_two(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()


@functools.cache
def overlapping(device: torch.device) -> dict[str, bool]:
    """Options of a launch on a device: whether a kernel may begin while the one before still runs."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9:
        # A build for other GPUs may have none; and an import statement would make a checkpoint's code ask for Triton.
        compiler = importlib.import_module("triton.backends.nvidia.compiler")
        if "launch_pdl" in compiler.CUDAOptions.__dataclass_fields__:
            return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


def linear(
    x: Tensor,
    module: nn.Linear,
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
    gate: nn.Linear | None = None,
) -> Tensor:
    """`residual + module(norm(x))`; with a gate `silu(gate(norm(x))) * module(norm(x))`. One kernel.

    Args:
        x: `(b, width)`. One row with a norm has at most `WIDEST_NORM` columns; several have weights of 16 bits.
        module, gate: without quantised weights; the gate has no bias.
        norm: an `nn.RMSNorm` or `nn.LayerNorm`.
        residual: `(b, out)`.

    Returns:
        `(b, out)` in the weight's dtype, or the residual's.
    """
    rows, weight, features = len(x), module.weight, module.out_features
    out = torch.empty(rows, features, dtype=weight.dtype if residual is None else residual.dtype, device=x.device)
    sizes = _sizes(x, features, norm is not None, gate is not None)
    _linear_kernel[(triton.cdiv(features, sizes["FEATURES"]), triton.cdiv(rows, sizes["ROWS"]))](
        x,
        weight,
        None if gate is None else gate.weight,
        module.bias,
        None if norm is None else norm.weight,
        getattr(norm, "bias", None),
        None if residual is None else residual.contiguous(),
        out,
        rows,
        x.stride(0),
        0.0 if norm is None else norm.eps,
        OUT=features,
        NORM=0 if norm is None else NORMS[type(norm)],
        **sizes,
    )
    return out


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Up to `MOST_TOGETHER` products of `(b, width)` with contiguous matrices `(out, width)`. One kernel.

    Returns:
        `(b, out)` each, side by side in one tensor.
    """
    rows, features = len(x), [len(weight) for weight in weights]
    none = [None] * (MOST_TOGETHER - len(weights))
    out = torch.empty(rows, sum(features), dtype=weights[0].dtype, device=x.device)
    sizes = _sizes(x, sum(features))
    blocks = sum(triton.cdiv(size, sizes["FEATURES"]) for size in features)
    names = dict(zip(("OUT", "SECOND", "THIRD", "FOURTH"), features + [0] * len(none)))
    _linears_kernel[(blocks, triton.cdiv(rows, sizes["ROWS"]))](
        x,
        *weights,
        *none,
        *biases,
        *none,
        out,
        rows,
        x.stride(0),
        **names,
        **sizes,
    )
    return list(out.split(features, dim=-1))


def _sizes(x: Tensor, features: int, has_norm: bool = False, has_gate: bool = False) -> dict[str, int]:
    """How a product of `(b, width)` is cut into programs, and their options."""
    rows, width = x.shape
    if rows > 1:
        most = _ROW_COLUMNS_OF_MANY if has_norm and rows > 32 else _ROW_COLUMNS
        columns = max(min(power_of_two(width), most), 16)  # the fewest that a GPU's matrix units take
        cut = {"ROWS": _ROWS, "FEATURES": _ROW_FEATURES, "COLUMNS": columns}
        cut |= {"LINES": power_of_two(triton.cdiv(_ROW_FEATURES * width, 64)), "num_warps": _ROW_WARPS}
    else:
        columns = min(power_of_two(width), WIDEST_NORM)
        most = max(_ELEMENTS // columns // (2 if has_gate else 1), 1)
        block = max(min(power_of_two(features // _LINEAR_PROGRAMS + 1) // 2, most), 1)
        cut = {"ROWS": 1, "FEATURES": block, "COLUMNS": columns, "LINES": 1}
    return {"WIDTH": width, **cut, **overlapping(x.device)}


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """`norm(x)` of `(b, width)` in the dtype of the norm's weight, an `nn.RMSNorm` or `nn.LayerNorm`. One kernel."""
    return _normed_rows(x, norm.weight, getattr(norm, "bias", None), norm.eps, NORMS[type(norm)])


def rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last dimension, in the weight's dtype. One kernel."""
    return _normed_rows(x.reshape(-1, x.shape[-1]), weight, None, eps, NORMS[nn.RMSNorm]).view(x.shape)


def _normed_rows(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: int) -> Tensor:
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=weight.dtype, device=x.device)
    sizes = {"WIDTH": width, "NORM": kind, "COLUMNS": power_of_two(width)}
    _norm_kernel[(rows,)](x.contiguous(), weight, bias, out, eps, **sizes, **overlapping(x.device))
    return out


def convolve(stream: Tensor, mixer: nn.Module, addresses: Tensor, real: Tensor, layer: int) -> Tensor:
    """`mixer.conv1d` of a token `(b, d)` behind the state at `addresses[layer, 0]`, which takes it in."""
    conv = mixer.conv1d
    (rows, channels), taps = stream.shape, conv.weight.shape[-1]
    out = torch.empty(rows, channels, dtype=stream.dtype, device=stream.device)
    _conv_kernel[(rows, triton.cdiv(channels, 256))](
        stream,
        addresses,
        real,
        conv.weight,
        conv.bias,
        out,
        layer,
        stream.stride(0),
        CHANNELS=channels,
        TAPS=taps,
        SILU=mixer.config.conv_activation == "silu",
        K=power_of_two(taps),
        BLOCK=256,
        **overlapping(stream.device),
    )
    return out


def ssd_step(stream: Tensor, mixer: nn.Module, addresses: Tensor, real: Tensor, layer: int) -> Tensor:
    """From the input projection's output `(b, d + d + 2 g n + h)` of an SSD mixer to what its output projection reads.

    The convolution's and the scan's states at `addresses[layer]` take the token in; nothing changes where `real`
    `(b,)` is 0. One kernel where each head has its own B and C.
    """
    config, rows = mixer.config, stream.shape[0]
    heads, groups = config.num_heads, config.n_groups
    channels = mixer.conv1d.weight.shape[0]
    convolved = None
    if heads != groups:
        convolved = convolve(stream[:, config.mixer_width :][:, :channels], mixer, addresses, real, layer)
    out = torch.empty(rows, config.mixer_width, dtype=stream.dtype, device=stream.device)
    least, most = config.time_step_limit
    _ssd_kernel[(rows, heads)](
        stream,
        convolved,
        addresses,
        real,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        mixer.dt_bias,
        mixer.A_log,
        mixer.D,
        mixer.norm.weight,
        mixer.rotary_frequencies if mixer.pairs else None,
        out,
        layer,
        stream.stride(0),
        mixer.norm.eps,
        float(least),
        float(most),
        PAIRS=mixer.pairs,
        INTERLEAVED=config.rotary_interleaved,
        HEADS=heads,
        HEAD_DIM=config.head_dim,
        GROUPS=groups,
        STATE=config.state_size,
        TAPS=config.conv_kernel,
        SILU=config.conv_activation == "silu",
        K=power_of_two(config.conv_kernel),
        P=power_of_two(config.head_dim),
        N=power_of_two(config.state_size),
        **overlapping(stream.device),
    )
    return out if convolved is None else mixer.norm(out, stream[:, : config.mixer_width])


def s6_step(
    stream: Tensor,
    convolved: Tensor,
    projected: Tensor,
    steps: Tensor,
    mixer: nn.Module,
    addresses: Tensor,
    real: Tensor,
    layer: int,
) -> Tensor:
    """The scan and the gate of an S6 mixer: one token `(b, d)`, which the state at `addresses[layer, 1]` takes in.

    Args:
        stream: `(b, 2 d)`, x and the gate.
        convolved: `(b, d)`, x behind its convolution.
        projected: `(b, rank + 2 n)`, with B and C.
        steps: `(b, d)`, time steps before softplus.
        real: `(b,)`, 0 at padding.
    """
    config, (rows, width) = mixer.config, convolved.shape
    out = torch.empty(rows, width, dtype=stream.dtype, device=stream.device)
    states = power_of_two(config.state_size)
    block = max(4096 // states, 1)
    _s6_kernel[(rows, triton.cdiv(width, block))](
        stream,
        convolved,
        projected,
        steps,
        addresses,
        real,
        mixer.A_log,
        mixer.D,
        out,
        layer,
        stream.stride(0),
        WIDTH=width,
        RANK=config.time_step_rank,
        STATE=config.state_size,
        P=block,
        N=states,
        **overlapping(stream.device),
    )
    return out
