/* Vectors of float32, in the widest registers of the machine, and bfloat16 to and from them. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define VL 16           /* float32 lanes in a vector */
#define NV 2            /* vectors side by side in a register block */
#define MR 12           /* rows of a register block */
#elif defined(__AVX2__)
#define VL 8
#define NV 2
#define MR 6
#else
#define VL 4
#define NV 4
#define MR 6
#endif
#define NW (NV * VL)    /* columns of a register block */
#define ROWS 96         /* query rows of a unit: ROWS / (query heads a key head) tokens */
#define KEYS 64         /* keys of a block */
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_PAIRS 1     /* an instruction that multiplies pairs of bfloat16 into float32 */
#else
#define HAS_PAIRS 0
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * VL), aligned(2), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * VL), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define PAD(n, to) (((n) + (to) - 1) / (to) * (to))

INLINE void fetch_ahead(const char *p, int64_t bytes) { /* into the second-level cache; any address will do */
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 0, 2);
}

INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE void store(float *p, vf x) { *(vf_any *)p = x; }
#if VL == 16 /* GCC splits these conversions */
INLINE vu longer(vh x) { return (vu)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE vh shorter(vu x) { return (vh)_mm512_cvtepi32_epi16((__m512i)x); }
#else
INLINE vu longer(vh x) { return __builtin_convertvector(x, vu); }
INLINE vh shorter(vu x) { return __builtin_convertvector(x, vh); }
#endif
INLINE vf widen(vh x) { return (vf)(longer(x) << 16); }

INLINE vh narrow(vf x) { /* to bfloat16, to the nearest, ties to even; NaN stays NaN */
#if HAS_PAIRS
    return (vh)_mm512_cvtneps_pbh((__m512)x); /* makes 0 of numbers below 1.2e-38 */
#else
    vu bits = (vu)x;
    vu round = bits + 0x7fff + ((bits >> 16) & 1);
    vu nan = (vu)(x != x);
    return shorter((nan & 0x7fc0) | (~nan & (round >> 16)));
#endif
}

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf larger(vf a, vf b) {
#if VL == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE float lanes_sum(vf x) {
#if VL == 16
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1)));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
#else
    float lane[VL];
    memcpy(lane, &x, sizeof lane);
    for (int width = VL / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
#endif
}

INLINE float lanes_max(vf x) {
#if VL == 16
    return _mm512_reduce_max_ps((__m512)x);
#else
    float lane[VL];
    memcpy(lane, &x, sizeof lane);
    for (int i = 1; i < VL; i++) lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
    return lane[0];
#endif
}

/* `count` values at element `at`, the rest of the vector zero. */
INLINE vf load_some(const void *p, int64_t at, int64_t count, const int bf16) {
    if (bf16) {
        const uint16_t *from = (const uint16_t *)p + at;
        if (count >= VL) return widen(*(const vh_any *)from);
        vh x = {};
        memcpy(&x, from, 2 * count);
        return widen(x);
    }
    if (count >= VL) return load((const float *)p + at);
    vf x = {};
    memcpy(&x, (const float *)p + at, 4 * count);
    return x;
}

INLINE void store_some(void *p, int64_t at, int64_t count, vf x, const int bf16) {
    if (bf16) {
        vh half = narrow(x);
        if (count >= VL) *(vh_any *)((uint16_t *)p + at) = half;
        else memcpy((uint16_t *)p + at, &half, 2 * count);
    } else if (count >= VL) {
        store((float *)p + at, x);
    } else {
        memcpy((float *)p + at, &x, 4 * count);
    }
}

INLINE vf rounded(vf x, const int bf16) { return bf16 ? widen(narrow(x)) : x; }

/* 2 * VL bfloat16 as VL words of two. */
INLINE vu load_pairs(const uint16_t *p, int64_t count) {
    if (count >= 2 * VL) return *(const vu_any *)p;
    vu x = {};
    if (count > 0) memcpy(&x, p, 2 * count);
    return x;
}

INLINE vf add_pairs(vf sum, vu a, vu b) {
#if HAS_PAIRS
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
    (void)a, (void)b;
    return sum;
#endif
}

/* e^x within 2 ulp (Cephes expf); 0 below -87.3, infinite above 88.7. */
INLINE vf exponential(vf x) {
#if VL == 16
    vf n = (vf)_mm512_roundscale_ps((__m512)(larger(x, splat(-200.f)) * 1.44269504f), 8);
    vf clamped = larger(x, splat(-200.f));
#else
    vf clamped = choose(x > -87.3f, x, splat(-87.3f));
    clamped = choose(clamped < 88.3f, clamped, splat(88.3f));
    vf n = clamped * 1.44269504f + 12582912.f;
    n -= 12582912.f;
#endif
    vf r = clamped - n * 0.693359375f;
    r += n * 2.12194440e-4f;
    vf y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.f;
#if VL == 16
    return (vf)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    y *= (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    y = choose(x < -87.3f, splat(0.f), y);
    return choose(x > 88.7f, splat(INFINITY), y);
#endif
}

INLINE vf tangent(vf x) { /* tanh: a series near 0, where the quotient would cancel */
    vf square = x * x;
    vf series = square * (62.f / 2835.f) - 17.f / 315.f;
    series = series * square + 2.f / 15.f;
    series = x + x * square * (series * square - 1.f / 3.f);
    return choose(square < .04f, series, 1.f - 2.f / (exponential(x + x) + 1.f));
}

#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
/* One stage of Eklundh's transpose: rows i and i + S swap the blocks of S lanes off their diagonal. */
#define STAGE(S, LOW, HIGH)                                  \
    for (int i = 0; i < VL; i++)                             \
        if (!(i & S)) {                                      \
            vu a = t[i], b = t[i + S];                       \
            t[i] = SHUFFLE(a, b, LOW);                       \
            t[i + S] = SHUFFLE(a, b, HIGH);                  \
        }
#define LIST(...) __VA_ARGS__

INLINE void transpose(vu t[VL]) {
#if VL == 16
    STAGE(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
          LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    STAGE(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
          LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    STAGE(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
          LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    STAGE(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
          LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#elif VL == 8
    STAGE(4, LIST(0, 1, 2, 3, 8, 9, 10, 11), LIST(4, 5, 6, 7, 12, 13, 14, 15))
    STAGE(2, LIST(0, 1, 8, 9, 4, 5, 12, 13), LIST(2, 3, 10, 11, 6, 7, 14, 15))
    STAGE(1, LIST(0, 8, 2, 10, 4, 12, 6, 14), LIST(1, 9, 3, 11, 5, 13, 7, 15))
#else
    STAGE(2, LIST(0, 1, 4, 5), LIST(2, 3, 6, 7))
    STAGE(1, LIST(0, 4, 2, 6), LIST(1, 5, 3, 7))
#endif
}
