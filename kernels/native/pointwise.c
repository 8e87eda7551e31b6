/* 1x1 convolution of channels-last maps on the CPU: rows of pixels times a matrix, of one map or of two that lie side by
   side in the channels without being joined, with bias and residual added before the one rounding.

   A block of rows stays in the second-level cache while the panels of weights pass by. Sums run over the channels in
   their order, each in one register: so a pixel's result depends neither on its block, nor on the batch, nor on the
   number of threads. With bfloat16 maps, products are those of bfloat16 numbers, summed in float32. */

#include "product.h"

#define BLOCK_BYTES 262144 /* of a block's input */

/* As pointwise.py packs it. */
struct pointwise {
    const void *x;        /* [rows, channels] */
    const void *x2;       /* [rows, channels2], or NULL where channels2 is 0 */
    const void *weight;   /* [panels, channels + channels2, PANEL]; of bfloat16 pairs of channels side by side */
    const float *bias;    /* [outputs] or NULL */
    const void *residual; /* as y, or NULL */
    void *y;              /* [rows, outputs] */
    int64_t rows, channels, channels2, outputs;
    int64_t bfloat16, threads;
};

/* `rows` rows from `row` by panel `panel`, in float32 to m [rows, PANEL]. */
INLINE void tile(const struct pointwise *p, int64_t row, int64_t panel, float *m, int rows, int bfloat16) {
    const int64_t size = bfloat16 ? 2 : 4, x_row = p->channels * size, x2_row = p->channels2 * size;
    const int64_t bytes = (x_row + x2_row) * PANEL;
    const char *u = (const char *)p->weight + panel * bytes;
    floats sums[ROWS][2] = {{{0}}};
    accumulate(sums, (const char *)p->x + row * x_row, x_row, u, x_row / 4, bytes, rows, bfloat16);
    if (p->channels2)
        accumulate(sums, (const char *)p->x2 + row * x2_row, x2_row, u + x_row * PANEL, x2_row / 4, bytes, rows, bfloat16);
    UNROLL for (int r = 0; r < rows; r++)
        *(floats *)(m + r * PANEL) = sums[r][0], *(floats *)(m + r * PANEL + LANES) = sums[r][1];
}

static __attribute__((noinline)) void
tile_float32(const struct pointwise *p, int64_t row, int64_t panel, float *m, int64_t rows) {
#define TILE(n) tile(p, row, panel, m, n, 0)
    BY_ROWS(rows, TILE)
#undef TILE
}

static __attribute__((noinline)) void
tile_bfloat16(const struct pointwise *p, int64_t row, int64_t panel, float *m, int64_t rows) {
#define TILE(n) tile(p, row, panel, m, n, 1)
    BY_ROWS(rows, TILE)
#undef TILE
}

/* n <= LANES outputs of `rows` rows, the first of which is output `at` of y. */
INLINE void finish(const struct pointwise *p, const float *m, int64_t rows, int64_t at, floats bias, int64_t n,
                   int bfloat16) {
    const int64_t size = bfloat16 ? 2 : 4;
    for (int64_t r = 0; r < rows; r++, at += p->outputs) {
        floats value = *(const floats *)(m + r * PANEL) + bias;
        if (p->residual) value += load((const char *)p->residual + at * size, bfloat16, n);
        store((char *)p->y + at * size, bfloat16, n, value);
    }
}

static void finish_tile(const struct pointwise *p, const float *m, int64_t row, int64_t rows, int64_t panel) {
    for (int64_t first = panel * PANEL, end = first + PANEL; first < end && first < p->outputs; first += LANES, m += LANES) {
        const int64_t at = row * p->outputs + first, n = p->outputs - first < LANES ? p->outputs - first : LANES;
        const floats bias = p->bias ? load((const char *)(p->bias + first), 0, n) : (floats){0};
        if (n < LANES) finish(p, m, rows, at, bias, n, (int)p->bfloat16);
        else if (p->bfloat16) finish(p, m, rows, at, bias, LANES, 1);
        else finish(p, m, rows, at, bias, LANES, 0);
    }
}

/* Rows [from, to) by panels [first, last). */
static void multiply(const struct pointwise *p, int64_t from, int64_t to, int64_t first, int64_t last) {
    const int64_t most = BLOCK_BYTES / ((p->channels + p->channels2) * (p->bfloat16 ? 2 : 4));
    const int64_t block = most < ROWS ? ROWS : most / ROWS * ROWS;
    float m[ROWS * PANEL] __attribute__((aligned(LINE)));
    for (; from < to; from += block) {
        const int64_t rows = to - from < block ? to - from : block, parts = (rows + ROWS - 1) / ROWS;
        for (int64_t panel = first; panel < last; panel++)
            for (int64_t part = 0; part < parts; part++) {
                const int64_t row = rows * part / parts, end = rows * (part + 1) / parts;
                if (p->bfloat16) tile_bfloat16(p, from + row, panel, m, end - row);
                else tile_float32(p, from + row, panel, m, end - row);
                finish_tile(p, m, from + row, end - row, panel);
            }
    }
}

static void share(void *argument) {
    const struct pointwise *p = argument;
    const int64_t team = p->threads > 1 ? team_size() : 1, number = team > 1 ? thread_number() : 0;
    const int64_t panels = (p->outputs + PANEL - 1) / PANEL;
    if (p->rows >= panels * PANEL) multiply(p, p->rows * number / team, p->rows * (number + 1) / team, 0, panels);
    else multiply(p, 0, p->rows, panels * number / team, panels * (number + 1) / team);
}

int pdae_pointwise(const struct pointwise *given) {
    struct pointwise p = *given;
    if (!run_parallel) p.threads = 1;
    if (p.threads > 1) run_parallel(share, &p, (unsigned)p.threads, 0);
    else share(&p);
    return 0;
}
