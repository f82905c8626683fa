/* The matrix products inside attention: many query rows against a block of keys or values, and few. */
#pragma once
#include "vectors.h"

/* ---- many rows against the same keys: blocks of keys and values are repacked once, then multiplied from registers */

/* `rows` rows of c (+)= a times b, NW columns wide. With `paired`, words of a and b hold two bfloat16 each. */
INLINE void register_block(const int rows, const int paired, const uint32_t *a, int64_t lda, const uint32_t *b,
                           int64_t ldb, float *c, int64_t ldc, int64_t steps, int add) {
    vf sum[MR][NV];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < NV; j++) sum[i][j] = add ? load(c + i * ldc + j * VL) : splat(0.f);
    for (int64_t s = 0; s < steps; s++) {
        vu right[NV];
        for (int j = 0; j < NV; j++) right[j] = *(const vu_any *)(b + s * ldb + j * VL);
        for (int i = 0; i < rows; i++) {
            uint32_t word = a[i * lda + s];
            vu left = word - (vu){};
            for (int j = 0; j < NV; j++)
                if (paired) sum[i][j] = add_pairs(sum[i][j], left, right[j]);
                else sum[i][j] += (vf)left * (vf)right[j];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < NV; j++) store(c + i * ldc + j * VL, sum[i][j]);
}

INLINE void multiply(int64_t rows, int64_t columns, int64_t steps, const uint32_t *a, int64_t lda, const uint32_t *b,
                     int64_t ldb, float *c, int64_t ldc, int add, const int paired) {
    for (int64_t j = 0; j < columns; j += NW)
        for (int64_t i = 0; i < rows;) {
#define BLOCK(n)                                                                                                \
    if (rows - i >= n) {                                                                                        \
        register_block(n, paired, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, steps, add);              \
        i += n;                                                                                                 \
        continue;                                                                                   \
    }
            BLOCK(MR)
#if MR == 12
            BLOCK(8)
#endif
            BLOCK(4) BLOCK(2) BLOCK(1)
        }
}

/* Keys, transposed: out[step][key], a step being one dimension or, paired, two. */
INLINE void pack_keys(uint32_t *out, const char *k, int64_t keys, int64_t dim, const int bf16, const int paired) {
    int64_t steps = paired ? (dim + 1) / 2 : dim, wide = paired ? 2 : 1;
    for (int64_t key = 0; key < PAD(keys, NW); key += VL)
        for (int64_t s = 0; s < steps; s += VL) {
            vu t[VL];
            for (int i = 0; i < VL; i++) {
                int64_t row = (key + i) * dim, left = dim - s * wide;
                if (key + i >= keys) t[i] = (vu){};
                else if (paired) t[i] = load_pairs((const uint16_t *)k + row + 2 * s, left);
                else t[i] = (vu)load_some(k, row + s, left, bf16);
            }
            transpose(t);
            for (int i = 0; i < VL; i++) *(vu_any *)(out + (s + i) * KEYS + key) = t[i];
        }
}

/* Values as float32 rows of `padded` numbers or, paired, rows 2i and 2i + 1 woven into words. */
INLINE void pack_values(uint32_t *out, const char *v, int64_t keys, int64_t dim, int64_t padded, const int bf16,
                        const int paired) {
    for (int64_t key = 0; key < keys; key += paired ? 2 : 1)
        for (int64_t d = 0; d < dim; d += VL) {
            vu x = (vu)load_some(v, key * dim + d, dim - d, bf16);
            if (paired) {
                vu y = key + 1 < keys ? (vu)load_some(v, (key + 1) * dim + d, dim - d, bf16) : (vu){};
                *(vu_any *)(out + key / 2 * padded + d) = (x >> 16) | y;
            } else {
                *(vu_any *)(out + key * padded + d) = x;
            }
        }
}

/* ---- few rows: keys and values are used straight from where they lie ----------------------------------------------
 *
 * Memory is what this waits for: while one block is used, the next is fetched from `ahead`, row by row. Hardware starts
 * anew at every page, and these runs are a few pages long. */

INLINE void few_scores(const int rows, const int keys, const uint32_t *q, int64_t ldq, const char *k, int64_t dim,
                       float *scores, const int bf16, const int paired) {
    vf sum[4][2];
    const int width = paired ? 2 * VL : VL, size = bf16 ? 2 : 4;
    for (int i = 0; i < keys; i++)
        for (int r = 0; r < rows; r++) sum[i][r] = splat(0.f);
    for (int64_t d = 0; d < dim; d += width)
        for (int i = 0; i < keys; i++) {
            const char *row = k + i * dim * size;
            vu key = paired ? load_pairs((const uint16_t *)row + d, dim - d) : (vu)load_some(row, d, dim - d, bf16);
            for (int r = 0; r < rows; r++) {
                vu query = *(const vu_any *)(q + r * ldq + (paired ? d / 2 : d));
                if (paired) sum[i][r] = add_pairs(sum[i][r], query, key);
                else sum[i][r] += (vf)query * (vf)key;
            }
        }
    for (int i = 0; i < keys; i++)
        for (int r = 0; r < rows; r++) scores[r * KEYS + i] = lanes_sum(sum[i][r]);
}

INLINE void direct_scores(int64_t rows, int64_t keys, const uint32_t *q, int64_t ldq, const char *k, int64_t dim,
                          float *scores, const char *ahead, const int bf16, const int paired) {
    const int size = bf16 ? 2 : 4;
    for (int64_t i = 0; i < keys; i += 4) {
        fetch_ahead(ahead + i * dim * size, 4 * dim * size);
        for (int64_t r = 0; r < rows; r += 2) {
            const char *from = k + i * dim * size;
            float *to = scores + r * KEYS + i;
            if (i + 4 <= keys) {
                if (r + 2 <= rows) few_scores(2, 4, q + r * ldq, ldq, from, dim, to, bf16, paired);
                else few_scores(1, 4, q + r * ldq, ldq, from, dim, to, bf16, paired);
            } else {
                for (int64_t j = i; j < keys; j++, from += dim * size, to++)
                    if (r + 2 <= rows) few_scores(2, 1, q + r * ldq, ldq, from, dim, to, bf16, paired);
                    else few_scores(1, 1, q + r * ldq, ldq, from, dim, to, bf16, paired);
            }
        }
    }
}

INLINE void few_values(const int rows, const int wide, const float *weights, const char *v, int64_t at, int64_t count,
                       int64_t keys, int64_t dim, float *out, int64_t ldo, const char *ahead, const int bf16) {
    const int size = bf16 ? 2 : 4;
    vf sum[2][8];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < wide; j++) sum[r][j] = load(out + r * ldo + at + j * VL);
    for (int64_t key = 0; key < keys; key++) {
        if (wide > 1) fetch_ahead(ahead + (key * dim + at) * size, wide * VL * size);
        for (int j = 0; j < wide; j++) {
            vf value = load_some(v, key * dim + at + j * VL, wide == 1 ? count : VL, bf16);
            for (int r = 0; r < rows; r++) sum[r][j] += weights[r * KEYS + key] * value;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < wide; j++) store(out + r * ldo + at + j * VL, sum[r][j]);
}

INLINE void direct_values(int64_t rows, const float *weights, const char *v, int64_t keys, int64_t dim, float *out,
                          int64_t ldo, const char *ahead, const int bf16) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t d = 0; d < dim;) {
            const float *w = weights + r * KEYS;
            float *to = out + r * ldo;
            int64_t left = dim - d;
#define WIDE(n)                                                                                     \
    if (left >= n * VL || n == 1) {                                                                 \
        if (r + 2 <= rows) few_values(2, n, w, v, d, left, keys, dim, to, ldo, ahead, bf16);        \
        else few_values(1, n, w, v, d, left, keys, dim, to, ldo, ahead, bf16);                      \
        d += n * VL;                                                                                \
        continue;                                                                                   \
    }
            WIDE(8) WIDE(4) WIDE(1)
        }
}
