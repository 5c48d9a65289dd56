// Matrix products of bfloat16 numbers with AVX512-BF16, and the packing of their operands.
//
// Every product is C (rows, columns) += A (rows, 2 pairs) B (2 pairs, columns).  A is read where it lies in memory.
// B is packed in the instruction's format: units of 32 bits with two neighbours of the inner dimension, in panels of
// 64 columns; each panel is a dense (pairs, 64).

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;

constexpr int LANES = 16;   // fp32 numbers of a register
constexpr int PANEL = 64;   // columns of a panel, 4 registers
constexpr int ROWS = 6;     // rows of a tile: 24 registers of sums, 4 of a panel
constexpr float LOG2E = 1.44269504088896341f;

int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// A mask of those of LANES positions from `begin` on that lie before `end`.
__mmask16 before(int64_t begin, int64_t end) {
    return static_cast<__mmask16>((1u << std::clamp<int64_t>(end - begin, 0, LANES)) - 1);
}

__m512i units_of(__m256i numbers) { return _mm512_cvtepu16_epi32(numbers); }
__m512 floats_of(__m256i numbers) { return (__m512)_mm512_slli_epi32(units_of(numbers), 16); }
__m256i rounded(__m512 numbers) { return (__m256i)_mm512_cvtneps_pbh(numbers); }
__m256i load(const bf16 *from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }
void store(bf16 *to, __m256i numbers) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), numbers); }

__m512i multiples_of(int64_t step) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(step)));
}

// 2 ** x for x <= 0, relative error below 3e-7; 0 where the result underflows fp32.
__m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // in this order it lets NaN through
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.33976470e-3f);  // a polynomial for -0.5 to 0.5
    for (float coefficient : {9.61800531e-3f, 5.55033222e-2f, 2.40226522e-1f, 6.93147182e-1f, 1.0f})
        y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(y, whole);
}

// --- products -------------------------------------------------------------------------------------------------------

template <int R, int C>
void tile(const bf16 *a, int64_t a_stride, const uint32_t *b, int64_t pairs, float *c, int64_t c_stride, bool add) {
    __m512 sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int j = 0; j < C; j++)
            sum[r][j] = add ? _mm512_loadu_ps(c + r * c_stride + j * LANES) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh column[C];
#pragma GCC unroll 8
        for (int j = 0; j < C; j++) column[j] = (__m512bh)_mm512_loadu_si512(b + p * PANEL + j * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, a + r * a_stride + 2 * p, sizeof pair);
            const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int j = 0; j < C; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], row, column[j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int j = 0; j < C; j++) _mm512_storeu_ps(c + r * c_stride + j * LANES, sum[r][j]);
}

using Tile = decltype(&tile<1, 1>);
constexpr Tile TILES[ROWS][PANEL / LANES] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}, {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>},
    {tile<5, 1>, tile<5, 2>, tile<5, 3>, tile<5, 4>}, {tile<6, 1>, tile<6, 2>, tile<6, 3>, tile<6, 4>},
};

// C (rows, columns) = A B, or += with `add`.  Up to ROWS rows; columns `begin` to `end`, multiples of LANES, of B,
// whose panels lie `panel` units apart.  Column 0 of B goes to `c`.
void product(int rows, int begin, int end, const bf16 *a, int64_t a_stride, const uint32_t *b, int64_t panel,
             int64_t pairs, float *c, int64_t c_stride, bool add) {
    while (begin < end) {
        const int stop = std::min(end, begin / PANEL * PANEL + PANEL);
        TILES[rows - 1][(stop - begin) / LANES - 1](a, a_stride, b + begin / PANEL * panel + begin % PANEL, pairs,
                                                    c + begin, c_stride, add);
        begin = stop;
    }
}

// --- packing --------------------------------------------------------------------------------------------------------

// A matrix (rows, size) with contiguous rows.
struct Matrix {
    bf16 *data;
    int64_t stride;
    bf16 *row(int64_t number) const { return data + number * stride; }
};

// Pack the rows of `from` as columns of B: panels of 64 rows, each (size / 2, 64).  Rows from `rows` to a whole panel are 0.
void pack_as_columns(Matrix from, int64_t rows, int size, uint32_t *to) {
    const __m512i offsets = multiples_of(from.stride * static_cast<int64_t>(sizeof(bf16)));
    for (int64_t row = 0; row < round_up(rows, PANEL); row += LANES)
        for (int pair = 0; pair < size / 2; pair++)
            _mm512_storeu_si512(to + row / PANEL * PANEL * (size / 2) + pair * PANEL + row % PANEL,
                                _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), before(row, rows), offsets,
                                                            from.row(row) + 2 * pair, 1));
}

// Pack the rows of `from` as rows of B: panels of 64 of a row's numbers, each (length / 2, 64).  Rows from `rows` to
// `length` are 0.
void pack_as_rows(Matrix from, int64_t rows, int64_t length, int size, uint32_t *to) {
    const __m256i zero = _mm256_setzero_si256();
    for (int64_t row = 0; row < length; row += 2)
        for (int j = 0; j < size; j += LANES) {
            const __m256i even = row < rows ? load(from.row(row) + j) : zero;
            const __m256i odd = row + 1 < rows ? load(from.row(row + 1) + j) : zero;
            _mm512_storeu_si512(to + (j / PANEL * length + row) / 2 * PANEL + j % PANEL,
                                _mm512_or_si512(units_of(even), _mm512_slli_epi32(units_of(odd), 16)));
        }
}

// Transpose `from` into (size, length).  Columns from `rows` to `length` are 0.
void transpose(Matrix from, int64_t rows, int64_t length, int size, bf16 *to) {
    for (int j = 0; j < size; j++)
        for (int64_t row = 0; row < length; row++) to[j * length + row] = row < rows ? from.row(row)[j] : 0;
}

}  // namespace
