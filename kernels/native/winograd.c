/* 3x3 convolution, stride 1, padding 1, of channels-last maps on the CPU, by Winograd's minimal filtering:

       y = A^T [ (G w G^T) * (B^T x B) ] A + bias + residual

   in tiles of m x m output pixels from (m + 2)^2 input pixels. m = 4 on the points 0, +-5/8, +-3/2 and infinity needs
   a quarter of the multiplications, m = 2 on 0, +-1 and infinity 4/9 of them. The points are exact in binary, as are
   all constants of B; whatever is divided by is divided by in the weights, in double precision, once.

   After nearest-2x upsampling a row of 6 input pixels has only 4 different ones, x0 .. x3, and 5 products are enough for
   4 output pixels, with s = w0 + w1 + w2:

       a = w0 (x0 - x2)    b = s (x1 + x2) / 2    c = w2 (x3 - x1)    d = (s/2 - w0) (x2 - x1)    e = (w2 - s/2) (x2 - x1)
       y0 = a + b - d      y1 = b + e             y2 = b + d          y3 = b + c - e

   so tiles of 4 x 4 pixels have 25 products of 16 inputs (UPSAMPLED, 25/144 of the multiplications) and constants that
   round as little as those of m = 2.

   A block of tiles is transformed, multiplied point by point and transformed back while it is in the second-level
   cache. Products are sums over the channels in their order, each in one register: so a pixel's result depends neither
   on the block that its tile is in, nor on the batch, nor on the number of threads.

   With bfloat16 maps, products are those of bfloat16 numbers, summed in float32.

   Threads are those of the OpenMP runtime that the caller's process runs already, as in group_norm.c. */

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "product.h"

#define BLOCK_BYTES 1572864  /* of transformed input and products, so that they stay in the second-level cache */
#define LEAST 24             /* tiles in a block, where there are so many: fewer would read the weights too often */
#define MOST 96

#define UPSAMPLED 3          /* instead of m */
#define POINTS(m) ((m) + 2)  /* products of a tile's side */
#define INPUTS(m) ((m) == UPSAMPLED ? 4 : (m) + 2)
#define PIXELS(m) ((m) == UPSAMPLED ? 4 : (m))
#define INPUT(m, point) ((point) < INPUTS(m) ? (point) : INPUTS(m) - 1) /* that it multiplies */

typedef double doubles __attribute__((vector_size(8 * LANES)));

/* As winograd.py packs it. */
struct convolution {
    const void *x;        /* [batch, height, width, channels], or [batch, height / 2, width / 2, channels] with `up` */
    const void *weight;   /* as pdae_winograd_weights leaves them */
    const float *bias;    /* [outputs] or NULL */
    const void *residual; /* as y, or NULL */
    void *y;              /* [batch, height, width, outputs] */
    int64_t batch, height, width, channels, outputs;
    int64_t tile;         /* m: 2 or 4, or UPSAMPLED with `up` */
    int64_t up;           /* reads pixel (y / 2, x / 2): nearest-2x before the convolution */
    int64_t bfloat16, threads;
};

struct weights {
    const float *weight; /* [outputs, channels, 3, 3], with these strides */
    void *u;             /* [points, panels, channels, PANEL]; of bfloat16 [points, panels, channels / 2, PANEL, 2] */
    int64_t stride[4];
    int64_t outputs, channels, tile, bfloat16, threads;
};

/* -- transforms --------------------------------------------------------------------------------------------------- */

#define P 0.625f
#define Q 1.5f
#define PP (P * P)
#define QQ (Q * Q)

/* B^T d: at every point the product of (x - other points), at infinity of all, its powers replaced by d. */
INLINE void input_points(int m, const floats *d, floats *t) {
    if (m == 2) {
        t[0] = d[0] - d[2], t[1] = d[2] + d[1], t[2] = d[2] - d[1], t[3] = d[3] - d[1];
        return;
    }
    if (m == UPSAMPLED) {
        t[0] = d[0] - d[2], t[1] = 0.5f * (d[1] + d[2]), t[2] = d[3] - d[1], t[3] = d[2] - d[1];
        return;
    }
    floats even = d[4] - QQ * d[2], odd = d[3] - QQ * d[1];
    t[0] = PP * QQ * d[0] - (PP + QQ) * d[2] + d[4];
    t[1] = even + P * odd, t[2] = even - P * odd;
    even = d[4] - PP * d[2], odd = d[3] - PP * d[1];
    t[3] = even + Q * odd, t[4] = even - Q * odd;
    t[5] = PP * QQ * d[1] - (PP + QQ) * d[3] + d[5];
}

/* A^T t: the powers of the points. */
INLINE void output_pixels(int m, const floats *t, floats *y) {
    if (m == 2) {
        y[0] = t[0] + (t[1] + t[2]), y[1] = (t[1] - t[2]) + t[3];
        return;
    }
    if (m == UPSAMPLED) {
        y[0] = (t[1] - t[3]) + t[0], y[1] = t[1] + t[4], y[2] = t[1] + t[3], y[3] = (t[1] - t[4]) + t[2];
        return;
    }
    floats even = t[1] + t[2], odd = t[1] - t[2], even2 = t[3] + t[4], odd2 = t[3] - t[4];
    y[0] = t[0] + even + even2;
    y[1] = P * odd + Q * odd2;
    y[2] = PP * even + QQ * even2;
    y[3] = P * PP * odd + Q * QQ * odd2 + t[5];
}

/* G w, of the weights of LANES outputs. */
INLINE void weight_points(int m, const doubles *w, int step, doubles *g) {
    const doubles a = w[0], b = w[step], c = w[2 * step];
    if (m == 2) {
        g[0] = a, g[1] = (a + b + c) / 2, g[2] = (a - b + c) / 2, g[3] = c;
        return;
    }
    if (m == UPSAMPLED) {
        g[0] = a, g[1] = a + b + c, g[2] = c, g[3] = (b + c - a) / 2, g[4] = (c - a - b) / 2;
        return;
    }
    const double p = P, q = Q, pp = p * p, qq = q * q, at_p = 1 / (2 * pp * (pp - qq)), at_q = 1 / (2 * qq * (qq - pp));
    g[0] = a / (pp * qq);
    g[1] = (a + p * b + pp * c) * at_p, g[2] = (a - p * b + pp * c) * at_p;
    g[3] = (a + q * b + qq * c) * at_q, g[4] = (a - q * b + qq * c) * at_q;
    g[5] = c;
}

/* -- weights ------------------------------------------------------------------------------------------------------ */

#define SLICE 16 /* channels of a panel that a thread transforms at a time */

/* One channel's weights of the n <= LANES outputs that begin at `from`; lane 0 of the first point goes to `to`. */
static void weight_lanes(const struct weights *w, const float *from, int64_t n, int64_t point, char *to, int m) {
    const int a = POINTS(m), bfloat16 = (int)w->bfloat16;
    doubles g[9] = {{0}}, columns[6 * 3], points[6];
    for (int64_t lane = 0; lane < n; lane++)
        for (int i = 0; i < 9; i++) g[i][lane] = from[lane * w->stride[0] + i / 3 * w->stride[2] + i % 3 * w->stride[3]];
    for (int x = 0; x < 3; x++) {
        weight_points(m, g + x, 3, points);
        for (int i = 0; i < a; i++) columns[3 * i + x] = points[i];
    }
    for (int i = 0; i < a; i++) {
        weight_points(m, columns + 3 * i, 1, points);
        for (int j = 0; j < a; j++, to += point) {
            const floats values = __builtin_convertvector(points[j], floats);
            if (bfloat16) {
                const halves h = narrow(values);
                for (int lane = 0; lane < LANES; lane++) ((uint16_t *)to)[2 * lane] = h[lane];
            } else {
#if LANES == 16
                _mm512_stream_ps((float *)to, (__m512)values); /* a whole line, of points that share ways of the cache */
#else
                *(floats *)to = values;
#endif
            }
        }
    }
}

INLINE void weight_slice(const struct weights *w, int64_t panel, int64_t slice, int m) {
    const int64_t size = w->bfloat16 ? 2 : 4, panels = (w->outputs + PANEL - 1) / PANEL;
    const int64_t last = (slice + 1) * SLICE < w->channels ? (slice + 1) * SLICE : w->channels;
    for (int64_t c = slice * SLICE; c < last; c++)
        for (int64_t half = 0; half < PANEL; half += LANES) {
            const int64_t first = panel * PANEL + half, left = w->outputs - first;
            const int64_t row = panel * w->channels + (w->bfloat16 ? c / 2 * 2 : c);
            char *to = (char *)w->u + (row * PANEL + half * (4 / size)) * size + (w->bfloat16 ? c % 2 * 2 : 0);
            weight_lanes(w, w->weight + first * w->stride[0] + c * w->stride[1], left < LANES ? left : LANES,
                         panels * w->channels * PANEL * size, to, m);
        }
}

static void weight_share(void *argument) {
    const struct weights *w = argument;
    const int64_t team = w->threads > 1 ? team_size() : 1, number = team > 1 ? thread_number() : 0;
    const int64_t panels = (w->outputs + PANEL - 1) / PANEL, slices = (w->channels + SLICE - 1) / SLICE;
    const int64_t all = panels * slices;
    for (int64_t i = all * number / team; i < all * (number + 1) / team; i++) {
        if (w->tile == 4) weight_slice(w, i / slices, i % slices, 4);
        else if (w->tile == UPSAMPLED) weight_slice(w, i / slices, i % slices, UPSAMPLED);
        else weight_slice(w, i / slices, i % slices, 2);
    }
}

int pdae_winograd_weights(const struct weights *given) {
    struct weights w = *given;
    if (!run_parallel) w.threads = 1;
#ifdef MADV_HUGEPAGE
    /* Fewer page faults now, and fewer misses of the table of pages at every call; where it fails, all is as it was. */
    const uintptr_t page = 1 << 21, panels = (w.outputs + PANEL - 1) / PANEL;
    const uintptr_t bytes = (uintptr_t)(POINTS(w.tile) * POINTS(w.tile) * w.channels * (w.bfloat16 ? 2 : 4)) * panels * PANEL;
    const uintptr_t first = ((uintptr_t)w.u + page - 1) / page * page, last = ((uintptr_t)w.u + bytes) / page * page;
    if (first < last) (void)!madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
    if (w.threads > 1) run_parallel(weight_share, &w, (unsigned)w.threads, 0);
    else weight_share(&w);
    return 0;
}

/* -- the convolution ---------------------------------------------------------------------------------------------- */

struct work {
    const struct convolution *c;
    int64_t across, down, tiles;     /* tiles of a row, of a column, of the batch */
    int64_t block, blocks, panels;   /* tiles in a block */
    int64_t v_row, v_point, v_bytes; /* bytes of a tile's channels at one point, and of all tiles' */
    int64_t m_row, m_point, m_bytes; /* the same of the products */
    int64_t by_outputs;              /* threads share every block and divide its output channels */
    char *zeros, *space;
};

/* Channels [first, last) of a tile's inputs at all points, from pixels of the map or zeros beyond it. */
INLINE void transform_tile(const struct work *w, int64_t tile, char *v, int64_t first, int64_t last, int m,
                           int bfloat16) {
    const struct convolution *c = w->c;
    const int a = INPUTS(m), step = m == UPSAMPLED ? 2 : m;
    const int64_t size = bfloat16 ? 2 : 4, pixel = c->channels * size;
    const int64_t up = m == UPSAMPLED ? 0 : c->up; /* a pixel is read once there */
    const int64_t height = c->height >> (c->up - up), width = c->width >> (c->up - up), wide = width >> up;
    const int64_t y0 = tile / w->across % w->down * step - 1, x0 = tile % w->across * step - 1;
    const char *image = (const char *)c->x + tile / (w->across * w->down) * (height >> up) * wide * pixel;
    const char *from[36];
    for (int i = 0; i < a; i++)
        for (int j = 0; j < a; j++) {
            const int64_t y = y0 + i, x = x0 + j;
            const int inside = y >= 0 && y < height && x >= 0 && x < width;
            from[i * a + j] = inside ? image + ((y >> up) * wide + (x >> up)) * pixel : w->zeros;
        }
    for (int64_t k = first; k < last; k += LANES) {
        floats columns[6][6];
        UNROLL for (int j = 0; j < a; j++) {
            floats d[6], t[6];
            UNROLL for (int i = 0; i < a; i++) d[i] = load(from[i * a + j] + k * size, bfloat16, LANES);
            input_points(m, d, t);
            UNROLL for (int i = 0; i < a; i++) columns[i][j] = t[i];
        }
        UNROLL for (int i = 0; i < a; i++) {
            floats t[6];
            input_points(m, columns[i], t);
            UNROLL for (int j = 0; j < a; j++)
                store(v + (i * a + j) * w->v_point + k * size, bfloat16, LANES, t[j]);
        }
    }
}

/* n <= LANES output channels of a tile's pixels. */
INLINE void finish_lanes(const struct convolution *c, const char *m_tile, int64_t m_point, int64_t offset, int64_t y_row,
                         int64_t high, int64_t wide, floats bias, int64_t n, int m, int bfloat16) {
    const int a = POINTS(m), side = PIXELS(m);
    const int64_t pixel = c->outputs * (bfloat16 ? 2 : 4);
    floats rows[4][6];
    UNROLL for (int j = 0; j < a; j++) {
        floats t[6], y[4];
        UNROLL for (int i = 0; i < a; i++) t[i] = *(const floats *)(m_tile + (i * a + j) * m_point);
        output_pixels(m, t, y);
        UNROLL for (int i = 0; i < side; i++) rows[i][j] = y[i];
    }
    UNROLL for (int i = 0; i < side; i++) {
        if (i >= high) break;
        floats y[4];
        output_pixels(m, rows[i], y);
        UNROLL for (int j = 0; j < side; j++) {
            if (j >= wide) break;
            const int64_t at = offset + i * y_row + j * pixel;
            floats v = y[j] + bias;
            if (c->residual) v += load((const char *)c->residual + at, bfloat16, n);
            store((char *)c->y + at, bfloat16, n, v);
        }
    }
}

/* Output channels of the panels [first, last) of a tile, whose products begin with those of panel `first`. */
INLINE void finish_tile(const struct work *w, int64_t tile, const char *m_tile, int64_t first, int64_t last, int m,
                        int bfloat16) {
    const struct convolution *c = w->c;
    const int64_t size = bfloat16 ? 2 : 4, y_row = c->width * c->outputs * size;
    const int64_t y0 = tile / w->across % w->down * PIXELS(m), x0 = tile % w->across * PIXELS(m);
    const int64_t high = c->height - y0, wide = c->width - x0, image = tile / (w->across * w->down);
    const int64_t offset = ((image * c->height + y0) * c->width + x0) * c->outputs * size;
    int64_t n = first * PANEL, end = last * PANEL < c->outputs ? last * PANEL : c->outputs;
    for (; n + LANES <= end; n += LANES, m_tile += 4 * LANES) {
        const floats bias = c->bias ? load((const char *)(c->bias + n), 0, LANES) : (floats){0};
        finish_lanes(c, m_tile, w->m_point, offset + n * size, y_row, high, wide, bias, LANES, m, bfloat16);
    }
    if (n < end) {
        const floats bias = c->bias ? load((const char *)(c->bias + n), 0, end - n) : (floats){0};
        finish_lanes(c, m_tile, w->m_point, offset + n * size, y_row, high, wide, bias, end - n, m, bfloat16);
    }
}

static int64_t tiles_in(const struct work *w, int64_t block) {
    const int64_t left = w->tiles - block * w->block;
    return left < w->block ? left : w->block;
}

#define BY_KIND(call)                                     \
    if (w->c->tile == 4) {                                                \
        if (w->c->bfloat16) call(4, 1); else call(4, 0);                  \
    } else if (w->c->tile == UPSAMPLED) {                                 \
        if (w->c->bfloat16) call(UPSAMPLED, 1); else call(UPSAMPLED, 0);  \
    } else {                                                              \
        if (w->c->bfloat16) call(2, 1); else call(2, 0);                  \
    }

static void transform(const struct work *w, int64_t block, char *v, int64_t first, int64_t last) {
    const int64_t tiles = tiles_in(w, block), start = block * w->block;
#define TRANSFORM(m, bfloat16) \
    for (int64_t i = 0; i < tiles; i++) transform_tile(w, start + i, v + i * w->v_row, first, last, m, bfloat16)
    BY_KIND(TRANSFORM)
#undef TRANSFORM
}

static void multiply(const struct work *w, int64_t block, const char *v, char *m, int64_t first, int64_t last) {
    const struct convolution *c = w->c;
    const int64_t tiles = tiles_in(w, block), a = POINTS(c->tile);
    const int64_t steps = c->bfloat16 ? c->channels / 2 : c->channels, panel_bytes = steps * PANEL * 4;
    const int64_t parts = (tiles + ROWS - 1) / ROWS;
    for (int64_t p = 0; p < a * a; p++) {
        const char *input = v + (INPUT(c->tile, p / a) * INPUTS(c->tile) + INPUT(c->tile, p % a)) * w->v_point;
        for (int64_t n = first; n < last; n++) {
            const char *u = (const char *)c->weight + (p * w->panels + n) * panel_bytes;
            for (int64_t part = 0; part < parts; part++) {
                const int64_t row = tiles * part / parts, rows = tiles * (part + 1) / parts - row;
                const char *from = input + row * w->v_row;
                char *to = m + p * w->m_point + row * w->m_row + (n - first) * PANEL * 4;
                if (c->bfloat16) product_bfloat16(rows, from, w->v_row, u, steps, to, w->m_row);
                else product_float32(rows, from, w->v_row, u, steps, to, w->m_row);
            }
        }
    }
}

static void finish(const struct work *w, int64_t block, const char *m_block, int64_t first, int64_t last) {
    const int64_t tiles = tiles_in(w, block), start = block * w->block;
#define FINISH(m, bfloat16) \
    for (int64_t i = 0; i < tiles; i++) finish_tile(w, start + i, m_block + i * w->m_row, first, last, m, bfloat16)
    BY_KIND(FINISH)
#undef FINISH
}

static void share(void *argument) {
    const struct work *w = argument;
    const struct convolution *c = w->c;
    const int64_t team = c->threads > 1 ? team_size() : 1, number = team > 1 ? thread_number() : 0;
    if (!w->by_outputs) {
        char *v = w->space + number * (w->v_bytes + w->m_bytes), *m = v + w->v_bytes;
        for (int64_t b = w->blocks * number / team; b < w->blocks * (number + 1) / team; b++) {
            transform(w, b, v, 0, c->channels);
            multiply(w, b, v, m, 0, w->panels);
            finish(w, b, m, 0, w->panels);
        }
        return;
    }
    /* A team may be smaller than was asked for, and memory is for shares of this size: then a thread has several. */
    const int64_t vectors = c->channels / LANES, shares = c->threads;
    char *v = w->space, *m = v + w->v_bytes + number * w->m_bytes;
    for (int64_t b = 0; b < w->blocks; b++) {
        for (int64_t s = number; s < shares; s += team)
            transform(w, b, v, vectors * s / shares * LANES, vectors * (s + 1) / shares * LANES);
        if (team > 1) wait_for_team();
        for (int64_t s = number; s < shares; s += team) {
            const int64_t first = w->panels * s / shares, last = w->panels * (s + 1) / shares;
            multiply(w, b, v, m, first, last);
            finish(w, b, m, first, last);
        }
        if (team > 1) wait_for_team(); /* nobody reads the transformed input any more */
    }
}

/* 0, or 1 where memory is short: nothing was written then. */
int pdae_winograd(const struct convolution *given) {
    struct convolution c = *given;
    struct work w = {.c = &c};
    const int64_t size = c.bfloat16 ? 2 : 4, pixels = PIXELS(c.tile);
    const int64_t points = POINTS(c.tile) * POINTS(c.tile), inputs = INPUTS(c.tile) * INPUTS(c.tile);
    w.across = (c.width + pixels - 1) / pixels, w.down = (c.height + pixels - 1) / pixels;
    w.tiles = c.batch * w.across * w.down, w.panels = (c.outputs + PANEL - 1) / PANEL;
    if (!run_parallel || c.threads < 1) c.threads = 1;
    if (!w.tiles || !w.panels) return 0;

    /* As many tiles as the cache takes, in blocks of equal size, as many of them as threads divide evenly. */
    int64_t most = BLOCK_BYTES / (inputs * c.channels * size + points * w.panels * PANEL * 4);
    most = most < LEAST ? LEAST : most < MOST ? most : MOST;
    w.blocks = (w.tiles + most - 1) / most;
    if (w.blocks > 1 || c.threads > 1) {
        const int64_t even = (w.blocks + c.threads - 1) / c.threads * c.threads;
        if (w.tiles / even >= LEAST) w.blocks = even;
        else w.by_outputs = c.threads > 1;
    }
    w.block = (w.tiles + w.blocks - 1) / w.blocks;
    w.blocks = (w.tiles + w.block - 1) / w.block;

    /* A line more than a power of two keeps what is read together out of the same ways of the cache. */
    const int64_t own = w.by_outputs ? (w.panels + c.threads - 1) / c.threads : w.panels;
    w.v_row = (c.channels * size + LINE - 1) / LINE * LINE + LINE, w.v_point = w.block * w.v_row + LINE;
    w.m_row = (own * PANEL * 4 + LINE - 1) / LINE * LINE + LINE, w.m_point = w.block * w.m_row + LINE;
    w.v_bytes = inputs * w.v_point, w.m_bytes = points * w.m_point;
    const int64_t zero_bytes = (c.channels * size + LINE - 1) / LINE * LINE;
    const int64_t bytes = (w.by_outputs ? 1 : c.threads) * w.v_bytes + c.threads * w.m_bytes;
    char *memory = aligned_alloc(LINE, (size_t)(zero_bytes + bytes));
    if (!memory) return 1;
    w.zeros = memory, w.space = memory + zero_bytes;
    memset(w.zeros, 0, (size_t)zero_bytes);
    if (c.threads > 1) run_parallel(share, &w, (unsigned)c.threads, 0);
    else share(&w);
    free(memory);
    return 0;
}
