/* Kernels of the packed engine for the CPU: keys and values, attention, linear layers, RMSNorm, rotary, SiLU * up.
 *
 * Plain C with vector extensions (GCC >= 10 or clang), for x86-64 and arm64, compiled where it runs by build.py.
 * Numbers are stored as float32 or bfloat16 and accumulated as float32. cpu.py checks every argument before a call;
 * here nothing is checked. reference.py says the same in plain torch.
 *
 * Every sum is taken in an order that depends on the row's own keys alone: a row's answer is the same bit for bit
 * whatever its neighbours, the number of threads or the block it falls into. So no -fassociative-math here. */
#include "linear.h"
#include "products.h"

#ifdef _OPENMP
int omp_get_thread_num(void);
#else
static int omp_get_thread_num(void) { return 0; }
#endif

/* ---- attention --------------------------------------------------------------------------------------------------- */

/* A step's batch; cpu.py writes it as one array of int64, in this order. Lengths in tokens, strides in elements. */
typedef struct {
    int64_t q_heads, kv_heads, dim, num_own_units, num_prefix_units, scratch_bytes;
    const int64_t *position;                       /* [num_tokens]: where each token stands in its text */
    const int64_t *item_start, *item_count, *own_past, *own_k, *own_v, *own_head_stride, *own_layer_stride, *before;
    const int64_t *group_start, *group_count, *prefix_length, *prefix_k, *prefix_v, *prefix_head_stride,
        *prefix_layer_stride;
    const int64_t *own_units, *prefix_units;       /* [num_units, 3]: item or group, key head, first row */
    float *partial_out, *partial_max, *partial_sum; /* [num_tokens, q_heads, padded dim], [num_tokens, q_heads] twice */
    char *scratch;                                 /* [num_threads, scratch_bytes] */
} Plan;

typedef struct {
    const Plan *plan;
    const char *q;
    char *out;
    int64_t layer, token_stride, head_stride, window;
    float scale, softcap;
} Call;

typedef struct {
    float most[ROWS], sum[ROWS];
    int64_t low[ROWS], high[ROWS];                 /* the keys a row sees: [low, high) */
    uint32_t *q, *keys, *values;
    uint16_t *halves;
    float *scores, *out;
} Unit;

#define PADDED(dim) PAD(dim, 32)
EXPORT int64_t expert_scratch_bytes(int64_t dim) {
    int64_t words = 2 * ROWS * PADDED(dim) + 2 * KEYS * PADDED(dim) + 2 * ROWS * KEYS;
    return PAD((int64_t)sizeof(Unit), 64) + 4 * words + 4096;
}
EXPORT int64_t expert_rows(void) { return ROWS; }

/* One row's scores of a block of keys become weights; its maximum, sum and output so far are rescaled. */
INLINE void soften(Unit *u, int64_t r, int64_t first, int64_t columns, int64_t padded, float scale, float softcap,
                   const int halves) {
    float *scores = u->scores + r * KEYS;
    vi lane;
    for (int i = 0; i < VL; i++) lane[i] = i;
    int64_t low = u->low[r] - first, high = u->high[r] - first;
    low = low < 0 ? 0 : low > KEYS ? KEYS : low;
    high = high < 0 ? 0 : high > KEYS ? KEYS : high;
    int masked = low > 0 || high < columns;
    vf most = splat(-INFINITY);
    for (int64_t c = 0; c < columns; c += VL) {
        vf s = load(scores + c) * scale;
        if (softcap != 0.f) s = softcap * tangent(s / softcap);
        if (masked) {
            vi at = lane + (int32_t)c;
            s = choose((at >= (int32_t)low) & (at < (int32_t)high), s, splat(-INFINITY));
        }
        most = larger(most, s);
        store(scores + c, s);
    }
    float before = u->most[r], now = lanes_max(most);
    now = now > before ? now : before;
    float shift = now == -INFINITY ? 0.f : now;
    vf sum = splat(0.f);
    for (int64_t c = 0; c < columns; c += VL) {
        vf weight = exponential(load(scores + c) - shift);
        if (halves) {
            vh half = narrow(weight);
            *(vh_any *)(u->halves + r * KEYS + c) = half;
            weight = widen(half);
        } else {
            store(scores + c, weight);
        }
        sum += weight;
    }
    if (now != before) {
        float factor = exponential(splat(before - shift))[0];
        u->sum[r] *= factor;
        float *out = u->out + r * padded;
        for (int64_t d = 0; d < padded; d += VL) store(out + d, load(out + d) * factor);
        u->most[r] = now;
    }
    u->sum[r] += lanes_sum(sum);
}

/* Rows [from, from + rows) of the queries that share a key head, over the keys of one item or one shared prefix. */
INLINE void attend(const Call *call, const int64_t *unit, int is_prefix, const int bf16) {
    const Plan *p = call->plan;
    const int64_t which = unit[0], kv_head = unit[1], from = unit[2], dim = p->dim, padded = PADDED(dim);
    const int64_t heads = p->q_heads / p->kv_heads, size = bf16 ? 2 : 4;
    const int64_t start = is_prefix ? p->group_start[which] : p->item_start[which];
    const int64_t count = is_prefix ? p->group_count[which] : p->item_count[which];
    const int64_t before = is_prefix ? 0 : p->before[which];
    const int64_t offset = is_prefix
                               ? kv_head * p->prefix_head_stride[which] + call->layer * p->prefix_layer_stride[which]
                               : kv_head * p->own_head_stride[which] + call->layer * p->own_layer_stride[which];
    const char *k = (const char *)(is_prefix ? p->prefix_k : p->own_k)[which] + offset * size;
    const char *v = (const char *)(is_prefix ? p->prefix_v : p->own_v)[which] + offset * size;
    const char *next = k; /* the keys of the next unit, which this thread probably takes */
    if (!is_prefix && unit + 3 < p->own_units + 3 * p->num_own_units) {
        const int64_t item = unit[3], head = unit[4];
        next = (const char *)p->own_k[item] +
               (head * p->own_head_stride[item] + call->layer * p->own_layer_stride[item]) * size;
    }
    const int64_t rows = count * heads - from < ROWS ? count * heads - from : ROWS;
    const int direct = !is_prefix && count == 1 && heads <= 8;
    const int paired = bf16 && HAS_PAIRS;

    char *place = p->scratch + omp_get_thread_num() * p->scratch_bytes;
    Unit *u = (Unit *)place;
    place += PAD((int64_t)sizeof(Unit), 64);
#define TAKE(field, words) u->field = (void *)place, place += 4 * (words);
    TAKE(q, ROWS * padded) TAKE(out, ROWS * padded) TAKE(keys, KEYS * padded) TAKE(values, KEYS * padded)
    TAKE(scores, ROWS * KEYS) TAKE(halves, ROWS * KEYS)

    int64_t lowest = INT64_MAX, highest = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = start + (from + r) / heads, head = kv_head * heads + (from + r) % heads;
        const int64_t at = p->position[token] - before, row = token * p->q_heads + head;
        u->low[r] = call->window > 0 && at - call->window + 1 > 0 ? at - call->window + 1 : 0;
        u->high[r] = is_prefix ? p->prefix_length[which] : at + 1;
        lowest = u->low[r] < lowest ? u->low[r] : lowest;
        highest = u->high[r] > highest ? u->high[r] : highest;
        const char *q = call->q + (token * call->token_stride + head * call->head_stride) * size;
        for (int64_t d = 0; d < padded; d += paired ? 2 * VL : VL)
            if (paired) *(vu_any *)(u->q + r * padded + d / 2) = load_pairs((const uint16_t *)q + d, dim - d);
            else *(vu_any *)(u->q + r * padded + d) = d < dim ? (vu)load_some(q, d, dim - d, bf16) : (vu){};
        if (before > 0) {
            u->most[r] = p->partial_max[row], u->sum[r] = p->partial_sum[row];
            memcpy(u->out + r * padded, p->partial_out + row * padded, 4 * padded);
        } else {
            u->most[r] = -INFINITY, u->sum[r] = 0.f;
            memset(u->out + r * padded, 0, 4 * padded);
        }
    }
    for (int64_t key = lowest / KEYS * KEYS; key < highest; key += KEYS) {
        const int64_t keys = highest - key < KEYS ? highest - key : KEYS, columns = PAD(keys, NW);
        const char *k_block = k + key * dim * size, *v_block = v + key * dim * size;
        int64_t first = 0, end = rows; /* rows that see none of these keys, at either end, are left out */
        while (first < end && u->high[first] <= key) first++;
        while (end > first && u->low[end - 1] >= key + keys) end--;
        if (first == end) continue;
        float *scores = u->scores + first * KEYS, *out = u->out + first * padded;
        if (direct) {
            direct_scores(rows, keys, u->q, padded, k_block, dim, u->scores, v_block, bf16, paired);
        } else {
            pack_keys(u->keys, k_block, keys, dim, bf16, paired);
            multiply(end - first, columns, paired ? (dim + 1) / 2 : dim, u->q + first * padded, padded, u->keys, KEYS,
                     scores, KEYS, 0, paired);
        }
        for (int64_t r = first; r < end; r++)
            soften(u, r, key, columns, padded, call->scale, call->softcap, paired && !direct);
        if (direct) {
            const char *ahead = key + KEYS < highest ? k_block + KEYS * dim * size : next;
            direct_values(rows, u->scores, v_block, keys, dim, u->out, padded, ahead, bf16);
        } else {
            pack_values(u->values, v_block, keys, dim, padded, bf16, paired);
            if (paired)
                multiply(end - first, padded, (keys + 1) / 2, (uint32_t *)u->halves + first * KEYS / 2, KEYS / 2,
                         u->values, padded, out, padded, 1, 1);
            else
                multiply(end - first, padded, keys, (uint32_t *)scores, KEYS, u->values, padded, out, padded, 1, 0);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = start + (from + r) / heads, head = kv_head * heads + (from + r) % heads;
        const int64_t row = token * p->q_heads + head;
        if (is_prefix) {
            p->partial_max[row] = u->most[r], p->partial_sum[row] = u->sum[r];
            memcpy(p->partial_out + row * padded, u->out + r * padded, 4 * padded);
        } else {
            float share = 1.f / u->sum[r];
            for (int64_t d = 0; d < dim; d += VL)
                store_some(call->out + row * dim * size, d, dim - d, load(u->out + r * padded + d) * share, bf16);
        }
    }
}

/* Not inlined: a parallel region would turn the constant into a variable. */
__attribute__((noinline)) static void attend_bf16(const Call *call, const int64_t *unit, int is_prefix) {
    attend(call, unit, is_prefix, 1);
}
__attribute__((noinline)) static void attend_f32(const Call *call, const int64_t *unit, int is_prefix) {
    attend(call, unit, is_prefix, 0);
}

EXPORT void expert_attention(const Plan *plan, int64_t layer, const void *q, int64_t token_stride, int64_t head_stride,
                             void *out, double scale, int64_t window, double softcap, int bf16, int threads) {
    const Call call = {plan, q, out, layer, token_stride, head_stride, window, (float)scale, (float)softcap};
    const int chunk = plan->num_own_units >= 64 * threads ? 4 : 1; /* neighbours to one thread: see `next` */
    void (*const work)(const Call *, const int64_t *, int) = bf16 ? attend_bf16 : attend_f32;
#pragma omp parallel num_threads(threads)
    {
        if (plan->num_prefix_units > 0) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < plan->num_prefix_units; i++) work(&call, plan->prefix_units + 3 * i, 1);
        }
#pragma omp for schedule(dynamic, chunk)
        for (int64_t i = 0; i < plan->num_own_units; i++) work(&call, plan->own_units + 3 * i, 0);
    }
}

/* New keys and values of every item, to the end of its own. */
EXPORT void expert_store(const Plan *p, int64_t num_items, int64_t layer, const char *k, int64_t k_token,
                         int64_t k_head, const char *v, int64_t v_token, int64_t v_head, int bf16, int threads) {
    const int64_t size = bf16 ? 2 : 4, row = p->dim * size;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t unit = 0; unit < num_items * p->kv_heads; unit++) {
        const int64_t i = unit / p->kv_heads, head = unit % p->kv_heads;
        const int64_t first = layer * p->own_layer_stride[i] + head * p->own_head_stride[i];
        const int64_t to = (first + p->own_past[i] * p->dim) * size;
        for (int64_t j = 0; j < p->item_count[i]; j++) {
            const int64_t token = p->item_start[i] + j;
            memcpy((char *)p->own_k[i] + to + j * row, k + (token * k_token + head * k_head) * size, row);
            memcpy((char *)p->own_v[i] + to + j * row, v + (token * v_token + head * v_head) * size, row);
        }
    }
}

/* ---- linear layers ----------------------------------------------------------------------------------------------- */

EXPORT int64_t expert_has_linear(void) { return HAS_LINEAR; }

/* bfloat16: rows x [rows, inputs] times weight [outputs, inputs], transposed, and a bias. */
EXPORT void expert_linear(const uint16_t *x, int64_t x_stride, const uint16_t *weight, const uint16_t *bias,
                          uint16_t *out, int64_t out_stride, int64_t rows, int64_t inputs, int64_t outputs,
                          int threads) {
#if HAS_LINEAR
    const Linear call = {x, weight, bias, out, x_stride, out_stride, rows, inputs, outputs};
    const int64_t blocks = rows > 0 ? (outputs + OUTPUTS - 1) / OUTPUTS : 0, share = blocks / (8 * threads);
    const int64_t chunk = share > 1 ? share : 1; /* neighbours to one thread: the next block's weights are fetched */
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads)
    for (int64_t i = 0; i < blocks; i++) linear_block(&call, i * OUTPUTS);
#else
    (void)x, (void)x_stride, (void)weight, (void)bias, (void)out, (void)out_stride;
    (void)rows, (void)inputs, (void)outputs, (void)threads;
#endif
}

/* ---- element-wise ------------------------------------------------------------------------------------------------ */

#define SMALL 32768 /* below this many numbers, waking threads takes longer than the work */

INLINE void norm_row(const char *x, const char *weight, char *out, int64_t dim, float eps, int add_one,
                     const int bf16) {
    vf sum = splat(0.f);
    for (int64_t d = 0; d < dim; d += VL) {
        vf value = load_some(x, d, dim - d, bf16);
        sum += value * value;
    }
    float scale = 1.f / sqrtf(lanes_sum(sum) / (float)dim + eps);
    for (int64_t d = 0; d < dim; d += VL) {
        vf value = load_some(x, d, dim - d, bf16) * scale, w = load_some(weight, d, dim - d, bf16);
        value = add_one ? value * (1.f + w) : rounded(value, bf16) * w;
        store_some(out, d, dim - d, value, bf16);
    }
}

/* Rows [outer, inner, dim]; `out` may be `x`. */
EXPORT void expert_rms_norm(const char *x, int64_t x_outer, int64_t x_inner, const char *weight, char *out,
                            int64_t out_outer, int64_t out_inner, int64_t outer, int64_t inner, int64_t dim, double eps,
                            int add_one, int bf16, int threads) {
    const int64_t size = bf16 ? 2 : 4;
#pragma omp parallel for num_threads(threads) if (outer * inner * dim > SMALL)
    for (int64_t i = 0; i < outer; i++)
        for (int64_t j = 0; j < inner; j++) {
            const char *from = x + (i * x_outer + j * x_inner) * size;
            char *to = out + (i * out_outer + j * out_inner) * size;
            if (bf16) norm_row(from, weight, to, dim, (float)eps, add_one, 1);
            else norm_row(from, weight, to, dim, (float)eps, add_one, 0);
        }
}

INLINE void rotate_row(const char *x, const char *cos, const char *sin, char *out, int64_t dim, int64_t rotary,
                       const int bf16) {
    const int64_t half = rotary / 2, size = bf16 ? 2 : 4;
    for (int64_t d = 0; d < half; d += VL) {
        int64_t left = half - d;
        vf a = load_some(x, d, left, bf16), b = load_some(x, half + d, left, bf16);
        vf a_cos = rounded(a * load_some(cos, d, left, bf16), bf16);
        vf b_cos = rounded(b * load_some(cos, half + d, left, bf16), bf16);
        vf b_sin = rounded(b * load_some(sin, d, left, bf16), bf16);
        vf a_sin = rounded(a * load_some(sin, half + d, left, bf16), bf16);
        store_some(out, d, left, a_cos - b_sin, bf16);
        store_some(out, half + d, left, b_cos + a_sin, bf16);
    }
    if (rotary < dim && out != x) memmove(out + rotary * size, x + rotary * size, (dim - rotary) * size);
}

/* Rows [tokens, heads, dim], the first `rotary` dimensions of each turned; `out` may be `x`. */
EXPORT void expert_rotary(const char *x, int64_t x_token, int64_t x_head, const char *cos, const char *sin, char *out,
                          int64_t out_token, int64_t out_head, int64_t tokens, int64_t heads, int64_t dim,
                          int64_t rotary, int bf16, int threads) {
    const int64_t size = bf16 ? 2 : 4;
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim > SMALL)
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t j = 0; j < heads; j++) {
            const char *from = x + (i * x_token + j * x_head) * size;
            char *to = out + (i * out_token + j * out_head) * size;
            if (bf16) rotate_row(from, cos + i * rotary * size, sin + i * rotary * size, to, dim, rotary, 1);
            else rotate_row(from, cos + i * rotary * size, sin + i * rotary * size, to, dim, rotary, 0);
        }
}

INLINE void gate_row(const char *gate, const char *up, char *out, int64_t dim, const int bf16) {
    for (int64_t d = 0; d < dim; d += VL) {
        vf x = load_some(gate, d, dim - d, bf16);
        vf y = rounded(x / (1.f + exponential(-x)), bf16) * load_some(up, d, dim - d, bf16);
        store_some(out, d, dim - d, y, bf16);
    }
}

EXPORT void expert_silu_mul(const char *gate, int64_t gate_row_stride, const char *up, int64_t up_row_stride, char *out,
                            int64_t out_row_stride, int64_t rows, int64_t dim, int bf16, int threads) {
    const int64_t size = bf16 ? 2 : 4;
#pragma omp parallel for num_threads(threads) if (rows * dim > SMALL)
    for (int64_t i = 0; i < rows; i++) {
        const char *left = gate + i * gate_row_stride * size, *right = up + i * up_row_stride * size;
        char *to = out + i * out_row_stride * size;
        if (bf16) gate_row(left, right, to, dim, 1);
        else gate_row(left, right, to, dim, 0);
    }
}
