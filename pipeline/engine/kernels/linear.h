/* Linear layers in bfloat16, the weight as it was loaded: [outputs, inputs].
 *
 * Each sum is taken in one order, whatever the other rows are: see cpu.c. */
#pragma once
#include "vectors.h"

#define HAS_LINEAR HAS_PAIRS
#define OUTPUTS 16 /* weight rows that stay in the cache while all rows pass */
#define SUMS 16    /* of a tile: as many as fit the registers beside what is multiplied */
#define FEW 8      /* up to so many rows, weights are read row by row: memory likes that best */

#if HAS_LINEAR

/* Half as many vectors, each with the sums of two: what lies S lanes apart is added. */
#define HALVE(S, LOW, HIGH)                                    \
    for (int i = 0; i < S; i++) {                              \
        vf a = sum[i], b = sum[i + S];                         \
        sum[i] = SHUFFLE(a, b, LOW) + SHUFFLE(a, b, HIGH);     \
    }

INLINE vf sums_of(vf sum[SUMS]) { /* lane i: the sum of vector i */
    HALVE(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
          LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    HALVE(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
          LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    HALVE(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
          LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    HALVE(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
          LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
    return sum[0];
}

typedef struct {
    const uint16_t *x, *weight, *bias; /* bias may be NULL */
    uint16_t *out;
    int64_t x_stride, out_stride, rows, inputs, outputs;
} Linear;

/* `rows` rows from `row` times `outputs` weight rows from `output`; rows * outputs <= SUMS. */
INLINE void linear_tile(const Linear *c, const int rows, const int outputs, int64_t row, int64_t output) {
    const uint16_t *x = c->x + row * c->x_stride, *w = c->weight + output * c->inputs;
    vf sum[SUMS];
    for (int i = 0; i < SUMS; i++) sum[i] = splat(0.f);
    int64_t d = 0;
    for (; d + 2 * VL <= c->inputs; d += 2 * VL)
        for (int i = 0; i < rows; i++) {
            vu a = *(const vu_any *)(x + i * c->x_stride + d);
            for (int j = 0; j < outputs; j++)
                sum[i * outputs + j] = add_pairs(sum[i * outputs + j], a, *(const vu_any *)(w + j * c->inputs + d));
        }
    if (d < c->inputs)
        for (int i = 0; i < rows; i++) {
            vu a = load_pairs(x + i * c->x_stride + d, c->inputs - d);
            for (int j = 0; j < outputs; j++)
                sum[i * outputs + j] =
                    add_pairs(sum[i * outputs + j], a, load_pairs(w + j * c->inputs + d, c->inputs - d));
        }
    vf total = sums_of(sum);
    if (c->bias) {
        float bias[SUMS] = {0};
        for (int j = 0; j < outputs; j++) {
            uint32_t bits = (uint32_t)c->bias[output + j] << 16;
            for (int i = 0; i < rows; i++) memcpy(bias + i * outputs + j, &bits, sizeof bits);
        }
        total += load(bias);
    }
    vh half = narrow(total);
    for (int i = 0; i < rows; i++)
        memcpy(c->out + (row + i) * c->out_stride + output, (const uint16_t *)&half + i * outputs, 2 * outputs);
}

/* `count` weight rows, in tiles of `outputs`, times `rows` rows; between tiles a share of [ahead, end) is fetched. */
INLINE const char *linear_pass(const Linear *c, const int rows, const int outputs, int64_t row, int64_t first,
                               int64_t count, const char *ahead, const char *end) {
    const int64_t share = PAD((end - ahead) / (count / outputs + 1) + 1, 64);
    int64_t j = 0;
    for (; j + outputs <= count; j += outputs, ahead += share) {
        fetch_ahead(ahead, ahead + share < end ? share : end - ahead);
        linear_tile(c, rows, outputs, row, first + j);
    }
    for (; j < count; j++) linear_tile(c, rows, 1, row, first + j);
    return ahead < end ? ahead : end;
}

/* All rows times the weight rows of one block; the next block's are fetched meanwhile. */
INLINE void linear_block(const Linear *c, int64_t first) {
    const int64_t left = c->outputs - first, count = left < OUTPUTS ? left : OUTPUTS;
    const char *ahead = (const char *)(c->weight + (first + count) * c->inputs);
    const int64_t next = left - count < OUTPUTS ? left - count : OUTPUTS, bytes = 2 * next * c->inputs;
    const char *const end = ahead + bytes;
    const int64_t share = PAD(bytes / PAD(c->rows, 4) * 4, 64); /* of a pass of four rows */
    for (int64_t i = 0; i < c->rows;) {
        const char *stop = end - ahead > share && c->rows - i > 4 ? ahead + share : end;
#define PASS(rows, outputs)                                                        \
    {                                                                              \
        ahead = linear_pass(c, rows, outputs, i, first, count, ahead, stop);       \
        i += rows;                                                                 \
        continue;                                                                  \
    }
        if (c->rows <= FEW) {
            if (c->rows - i >= 4) PASS(4, 1)
            if (c->rows - i >= 2) PASS(2, 1)
            PASS(1, 1)
        }
        if (c->rows - i >= 4) PASS(4, 4)
        if (c->rows - i >= 2) PASS(2, 8)
        PASS(1, 16)
#undef PASS
    }
}

#endif
