/* softmax(scale q k^T) v on the CPU, q, k and v read from where a matrix product left them side by side.

   A head's keys and values are laid out once for the micro-kernel; then a few queries at a time have their products,
   softmax and weighted sum while they are in the first- or second-level cache. Sums run over the keys in their order:
   a result depends neither on the batch nor on the number of threads.

   With bfloat16, products are those of bfloat16 numbers, summed in float32; the softmax is float32, its weights are
   rounded before they are multiplied, and their sum is divided by after. */

#include <math.h>

#include "product.h"

/* As attention.py packs it. Strides are in elements; those of a head's columns are 1. */
struct attention {
    const void *q, *k, *v; /* [images, tokens, heads, width] with the same strides */
    void *y;               /* likewise, with strides of its own */
    int64_t images, tokens, heads, width;
    int64_t image, row, head;
    int64_t y_image, y_row, y_head;
    int64_t bfloat16, threads;
    double scale;
};

typedef int32_t ints __attribute__((vector_size(4 * LANES)));

/* exp(v) for v <= 0: 2^n exp(r) with |r| <= ln(2) / 2, and Taylor's polynomial for exp(r), the remainder of which is
   below the rounding of float32. Below -80 it is exp(-80). A NaN stays one. */
INLINE floats exponential(floats v) {
    const float shift = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
    const ints low = v < -80.0f;
    v = (floats)(((ints)v & ~low) | ((ints)((floats){0} - 80.0f) & low));
    const floats t = v * 0x1.715476p0f + shift, n = t - shift;
    const floats r = (v - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f; /* ln(2) in two parts; n times the first is exact */
    floats p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120, p = p * r + 1.0f / 24, p = p * r + 1.0f / 6, p = p * r + 0.5f, p = p * r + 1, p = p * r + 1;
    return (floats)((words)p + ((words)t << 23));
}

INLINE float lanes_sum(floats v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

INLINE float lanes_most(floats v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

/* s [n], padded to whole vectors -> exp(scale (s - its maximum)), of bfloat16 in place in the first half of the memory;
   zeros in the padding. Returns one over their sum. */
INLINE float soften(char *s, int64_t n, float scale, int bfloat16) {
    const int64_t whole = n / LANES * LANES;
    floats most = (floats){0} - INFINITY, sum = {0};
    for (int64_t i = 0; i < whole; i += LANES) {
        const floats v = *(const floats *)(s + 4 * i);
        const ints more = v > most;
        most = (floats)(((ints)v & more) | ((ints)most & ~more));
    }
    float top = lanes_most(most);
    for (int64_t i = whole; i < n; i++) {
        float v;
        memcpy(&v, s + 4 * i, 4);
        top = v > top ? v : top;
    }
    for (int64_t i = 0; i < n; i += LANES) {
        floats v = exponential((*(const floats *)(s + 4 * i) - top) * scale);
        if (n - i < LANES)
            for (int j = (int)(n - i); j < LANES; j++) v[j] = 0;
        sum += v;
        store(s + (bfloat16 ? 2 : 4) * i, bfloat16, LANES, v);
    }
    return 1 / lanes_sum(sum);
}

/* The micro-kernel's u of which rows are the columns: [panels][steps][PANEL] words of 4 bytes; zeros beyond `count`. */
static void lay_columns(const char *rows, int64_t row, int64_t count, int64_t steps, char *u) {
    for (int64_t first = 0; first < count; first += PANEL) {
        const int64_t n = count - first < PANEL ? count - first : PANEL;
        for (int64_t s = 0; s < steps; s++, u += 4 * PANEL) {
            const char *from = rows + first * row + 4 * s;
            for (int64_t j = 0; j < n; j++) memcpy(u + 4 * j, from + j * row, 4);
            if (n < PANEL) memset(u + 4 * n, 0, 4 * (size_t)(PANEL - n));
        }
    }
}

/* The micro-kernel's u of which rows are the steps, of bfloat16 a pair of rows: [panels][steps][PANEL] words; zeros
   beyond the last row and the last of `width` columns. */
INLINE void lay_rows(const char *rows, int64_t row, int64_t count, int64_t width, char *u, int bfloat16) {
    for (int64_t first = 0; first < width; first += PANEL) {
        const int64_t n = width - first < PANEL ? width - first : PANEL;
        for (int64_t i = 0; i < count; i += 1 + bfloat16, u += 4 * PANEL) {
            const char *from = rows + i * row;
            if (!bfloat16) {
                memcpy(u, from + 4 * first, 4 * (size_t)n);
            } else {
                const uint16_t *a = (const uint16_t *)from + first, *b = (const uint16_t *)(from + row) + first;
                uint16_t *pairs = (uint16_t *)u;
                if (i + 1 < count)
                    for (int64_t j = 0; j < n; j++) pairs[2 * j] = a[j], pairs[2 * j + 1] = b[j];
                else
                    for (int64_t j = 0; j < n; j++) pairs[2 * j] = a[j], pairs[2 * j + 1] = 0;
            }
            if (n < PANEL) memset(u + 4 * n, 0, 4 * (size_t)(PANEL - n));
        }
    }
}

struct work {
    const struct attention *a;
    int64_t parts;           /* shares of a head's queries: more threads than heads have something to do */
    int64_t key_steps;       /* of the second product */
    int64_t s_row, o_row;    /* bytes of a query's scores, and of its result before it is rounded */
    int64_t k_bytes, v_bytes, bytes;
    char *space;
};

/* The queries [first, last) of one head of one image. */
INLINE void attend(const struct work *w, int64_t image, int64_t head, int64_t first, int64_t last, char *space,
                   int bfloat16) {
    const struct attention *a = w->a;
    const int64_t size = bfloat16 ? 2 : 4, row = a->row * size, start = image * a->image + head * a->head;
    const int64_t steps = a->width * size / 4;
    const char *q = (const char *)a->q + start * size;
    char *y = (char *)a->y + (image * a->y_image + head * a->y_head) * size;
    char *k = space, *v = k + w->k_bytes, *s = v + w->v_bytes, *o = s + ROWS * w->s_row;
    lay_columns((const char *)a->k + start * size, row, a->tokens, steps, k);
    lay_rows((const char *)a->v + start * size, row, a->tokens, a->width, v, bfloat16);
    const int64_t blocks = (last - first + ROWS - 1) / ROWS;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t at = first + (last - first) * b / blocks, rows = first + (last - first) * (b + 1) / blocks - at;
        float inverse[ROWS];
#define PRODUCT (bfloat16 ? product_bfloat16 : product_float32)
        for (int64_t n = 0; n < a->tokens; n += PANEL)
            PRODUCT(rows, q + at * row, row, k + n * steps * 4, steps, s + 4 * n, w->s_row);
        for (int64_t r = 0; r < rows; r++)
            inverse[r] = soften(s + r * w->s_row, a->tokens, (float)a->scale, bfloat16);
        for (int64_t n = 0; n < a->width; n += PANEL)
            PRODUCT(rows, s, w->s_row, v + n * w->key_steps * 4, w->key_steps, o + 4 * n, w->o_row);
#undef PRODUCT
        for (int64_t r = 0; r < rows; r++)
            for (int64_t n = 0; n < a->width; n += LANES) {
                const int64_t lanes = a->width - n < LANES ? a->width - n : LANES;
                store(y + ((at + r) * a->y_row + n) * size, bfloat16, lanes,
                      *(const floats *)(o + r * w->o_row + 4 * n) * inverse[r]);
            }
    }
}

static void share(void *argument) {
    const struct work *w = argument;
    const struct attention *a = w->a;
    const int64_t team = a->threads > 1 ? team_size() : 1, number = team > 1 ? thread_number() : 0;
    const int64_t all = a->images * a->heads * w->parts;
    char *space = w->space + number * w->bytes;
    for (int64_t i = all * number / team; i < all * (number + 1) / team; i++) {
        const int64_t part = i % w->parts, head = i / w->parts % a->heads, image = i / w->parts / a->heads;
        const int64_t first = a->tokens * part / w->parts, last = a->tokens * (part + 1) / w->parts;
        if (a->bfloat16) attend(w, image, head, first, last, space, 1);
        else attend(w, image, head, first, last, space, 0);
    }
}

/* 0, or 1 where memory is short: nothing was written then. */
int pdae_attention(const struct attention *given) {
    struct attention a = *given;
    struct work w = {.a = &a};
    const int64_t size = a.bfloat16 ? 2 : 4, heads = a.images * a.heads;
    if (!run_parallel || a.threads < 1) a.threads = 1;
    if (!heads || !a.tokens || !a.width) return 0;
    w.parts = (a.threads + heads - 1) / heads;
    w.key_steps = (a.tokens * size + 3) / 4;
    const int64_t columns = (a.tokens + PANEL - 1) / PANEL * PANEL, across = (a.width + PANEL - 1) / PANEL * PANEL;
    w.s_row = columns * 4 + LINE, w.o_row = across * 4 + LINE;
    w.k_bytes = columns * a.width * size, w.v_bytes = across * w.key_steps * 4;
    w.bytes = w.k_bytes + w.v_bytes + ROWS * (w.s_row + w.o_row);
    w.space = aligned_alloc(LINE, (size_t)(a.threads * w.bytes));
    if (!w.space) return 1;
    if (a.threads > 1) run_parallel(share, &w, (unsigned)a.threads, 0);
    else share(&w);
    free(w.space);
    return 0;
}
