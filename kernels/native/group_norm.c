/* GroupNorm, one affine per channel or per (image, channel), and SiLU, of channels-last maps on the CPU:

       y = silu?( GN(cat(x + x_bias, x2)) * a + b )

   Statistics: every channel is summed over chunks of CHUNK pixels, as deviations from the mean of a sample of the
   chunk, and the chunks are merged in double precision (Chan). The mean of one pixel in SAMPLE is at most
   sqrt(SAMPLE) standard deviations of the chunk away from its mean, whatever the data: so the sum of squares loses at
   most a factor 1 + SAMPLE of float32's rounding, however large the mean.

   Chunks, and the order in which they are merged, do not depend on the number of threads: neither do results.

   Vectors are those of GNU C, which gcc and clang translate to whatever the processor has. Threads are those of the
   OpenMP runtime that the caller's process runs already, handed in by `pdae_threads`: linking one here could load a
   second one, whose threads would fight the first one's for the processor. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#define AVX512
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define CHUNK 64
#define SAMPLE 16
#define ROWS 4
#define GRAIN 16384 /* elements a thread: for fewer, waking it costs more than it saves */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* As group_norm_native.py packs it. */
struct norm {
    const void *x, *x2;   /* [batch, pixels, c1] and [batch, pixels, c2], or NULL when c2 is 0 */
    void *y;              /* [batch, pixels, c1 + c2]; may be x when c2 is 0 */
    const float *a, *b;   /* rows of c1 + c2 */
    const float *x_bias;  /* [c1] or NULL */
    float *mean, *rstd;   /* [batch, groups], or NULL when nobody wants them */
    int64_t a_stride, b_stride; /* elements from one image's row to the next; 0: one row for all */
    int64_t batch, pixels, c1, c2, groups;
    int64_t bfloat16, silu, threads;
    double eps;
};

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);
static parallel_function run_parallel;
static int (*thread_number)(void), (*team_size)(void);
static void (*wait_for_team)(void);

/* GOMP_parallel, omp_get_thread_num, omp_get_num_threads, GOMP_barrier. */
void pdae_threads(parallel_function parallel, int (*number)(void), int (*size)(void), void (*barrier)(void)) {
    thread_number = number, team_size = size, wait_for_team = barrier, run_parallel = parallel;
}

/* Compilers find the single instructions for these only where they may disregard NaNs. */
#if defined(AVX512)
static inline floats between(floats v, float low, float high) {
    return (floats)_mm512_max_ps(_mm512_set1_ps(low), _mm512_min_ps(_mm512_set1_ps(high), (__m512)v));
}
static inline floats widen(halves h) { return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16); }
#elif defined(__AVX__)
static inline floats between(floats v, float low, float high) {
    return (floats)_mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), (__m256)v));
}
#else
static inline floats between(floats v, float low, float high) {
    ints less = v < low, more = v > high;
    floats lows = (floats){0} + low, highs = (floats){0} + high;
    return (floats)(((ints)lows & less) | ((ints)highs & more) | ((ints)v & ~(less | more)));
}
#endif
#ifndef AVX512
static inline floats widen(halves h) { return (floats)(__builtin_convertvector(h, words) << 16); }
#endif

/* To bfloat16, to the nearest, ties to even; a NaN stays one. */
static inline halves narrow(floats v) {
#if defined(AVX512) && defined(__AVX512BF16__)
    return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
    words bits = (words)v, nan = (words)(v != v);
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), halves);
#endif
}

/* v / w, to 6e-5 of it where that is `rough` enough. 0 < w < 1e35. */
static inline floats quotient(floats v, floats w, int rough) {
#ifdef AVX512
    floats inverse = (floats)_mm512_rcp14_ps((__m512)w);
    return v * (rough ? inverse : inverse + inverse * (1.0f - w * inverse));
#else
    (void)rough;
    return v / w;
#endif
}

/* The n first lanes (all of them in the usual case, which then is one instruction); the others are zero. */
static inline floats load(const void *p, int bfloat16, int64_t n) {
    if (bfloat16) {
        halves h = {0};
        memcpy(&h, p, n == LANES ? sizeof h : 2 * (size_t)n);
        return widen(h);
    }
    floats v = {0};
    memcpy(&v, p, n == LANES ? sizeof v : 4 * (size_t)n);
    return v;
}

static inline void store(void *p, int bfloat16, int64_t n, floats v) {
    if (bfloat16) {
        halves h = narrow(v);
        memcpy(p, &h, n == LANES ? sizeof h : 2 * (size_t)n);
    } else {
        memcpy(p, &v, n == LANES ? sizeof v : 4 * (size_t)n);
    }
}

/* y / (1 + exp(-y)). exp(-y) = 2^-n exp(-r) with |r| <= ln(2) / 2, and Taylor's polynomial for exp(-r), the remainder
   of which is below the rounding of float32, or of bfloat16 where that is what the result is rounded to. The limits
   keep 2^-n finite; beyond them the result is y, or less than 2e-35 of it. A NaN stays one: y is a factor. */
static inline floats silu(floats y, int bfloat16) {
    const float shift = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
    floats v = between(y, -80.0f, 80.0f), t = v * 0x1.715476p0f + shift, n = t - shift, r, p;
    if (bfloat16) {
        r = v - n * 0x1.62e43p-1f;
        p = r * (1.0f / 24) - 1.0f / 6;
    } else {
        r = (v - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f; /* ln(2) in two parts; n times the first is exact */
        p = r * (1.0f / 720) - 1.0f / 120;
        p = p * r + 1.0f / 24;
        p = p * r - 1.0f / 6;
    }
    p = p * r + 0.5f;
    p = p * r - 1.0f;
    p = p * r + 1.0f;
    floats e = (floats)((words)p - ((words)t << 23));
    return quotient(y, 1.0f + e, bfloat16);
}

/* Channels [0, channels) of `pixels` rows of x: per channel the level that is subtracted, and the sums of what
   remains and of its squares. Rows are `channels` elements long. */
static inline __attribute__((always_inline)) void
sums(const char *x, int bfloat16, int64_t pixels, int64_t channels, float *level, float *sum, float *square) {
    const int64_t size = bfloat16 ? 2 : 4, row = channels * size;
    const int64_t samples = (pixels + SAMPLE - 1) / SAMPLE, stride = pixels / samples;
    for (int64_t c = 0; c < channels; c += 2 * LANES) {
        /* Two vectors a round, so that their additions overlap. */
        int64_t n0 = channels - c < LANES ? channels - c : LANES, n1 = channels - c - n0;
        n1 = n1 < LANES ? n1 : LANES;
        const char *p0 = x + c * size, *p1 = p0 + n0 * size;
        floats l0 = {0}, l1 = {0}, s0 = {0}, s1 = {0}, q0 = {0}, q1 = {0};
        for (int64_t i = stride / 2; i < samples * stride; i += stride) {
            l0 += load(p0 + i * row, bfloat16, n0);
            if (n1) l1 += load(p1 + i * row, bfloat16, n1);
        }
        l0 *= 1.0f / (float)samples, l1 *= 1.0f / (float)samples;
        if (n1 == LANES) {
            for (int64_t i = 0; i < pixels; i++) {
                floats v0 = load(p0 + i * row, bfloat16, LANES) - l0, v1 = load(p1 + i * row, bfloat16, LANES) - l1;
                s0 += v0, s1 += v1, q0 += v0 * v0, q1 += v1 * v1;
            }
        } else {
            for (int64_t i = 0; i < pixels; i++) {
                floats v0 = load(p0 + i * row, bfloat16, n0) - l0;
                s0 += v0, q0 += v0 * v0;
                if (n1) {
                    floats v1 = load(p1 + i * row, bfloat16, n1) - l1;
                    s1 += v1, q1 += v1 * v1;
                }
            }
        }
        store(level + c, 0, n0, l0), store(sum + c, 0, n0, s0), store(square + c, 0, n0, q0);
        if (n1) store(level + c + n0, 0, n1, l1), store(sum + c + n0, 0, n1, s1), store(square + c + n0, 0, n1, q1);
    }
}

/* y = silu?((x - offset) * a + b) of the n <= LANES channels from the given ones, in `rows` rows. */
static inline __attribute__((always_inline)) void
apply_lanes(const char *x, char *y, int bfloat16, int with_silu, int64_t rows, int64_t n, int64_t x_row, int64_t y_row,
            const float *offset, const float *a, const float *b) {
    const floats o = load(offset, 0, n), slope = load(a, 0, n), level = load(b, 0, n);
    for (int64_t i = 0; i < rows; i++) {
        floats v = (load(x + i * x_row, bfloat16, n) - o) * slope + level;
        store(y + i * y_row, bfloat16, n, with_silu ? silu(v, bfloat16) : v);
    }
}

/* The same of all channels of `pixels` rows, ROWS rows at a time: so a table's entry, once read, serves them all. */
static inline __attribute__((always_inline)) void
apply(const char *x, char *y, int bfloat16, int with_silu, int64_t pixels, int64_t channels, int64_t width,
      const float *offset, const float *a, const float *b) {
    const int64_t size = bfloat16 ? 2 : 4, x_row = channels * size, y_row = width * size;
    for (int64_t i = 0; i < pixels; i += ROWS, x += ROWS * x_row, y += ROWS * y_row) {
        const int64_t rows = pixels - i < ROWS ? pixels - i : ROWS;
        int64_t c = 0;
#define LANES_AT(rows, n) \
    apply_lanes(x + c * size, y + c * size, bfloat16, with_silu, rows, n, x_row, y_row, offset + c, a + c, b + c)
        if (rows == ROWS) {
            for (; c + LANES <= channels; c += LANES) LANES_AT(ROWS, LANES);
        } else {
            for (; c + LANES <= channels; c += LANES) LANES_AT(rows, LANES);
        }
        if (c < channels) LANES_AT(rows, channels - c);
#undef LANES_AT
    }
}

struct work {
    const struct norm *n;
    float *partial; /* [batch, chunks, 3, channels]: level, sum, square */
    char *tables;   /* a `struct tables` for every thread */
    int64_t chunks;
};

static int64_t channels_of(const struct norm *n) { return n->c1 + n->c2; }

static int64_t table_bytes(const struct norm *n) {
    return (channels_of(n) * (2 * sizeof(double) + 3 * sizeof(float)) + 63) / 64 * 64;
}

static int64_t rows_of(const struct norm *n, int64_t chunk) {
    int64_t left = n->pixels - chunk * CHUNK;
    return left < CHUNK ? left : CHUNK;
}

static const char *input(const void *x, const struct norm *n, int64_t channels, int64_t image, int64_t chunk) {
    return (const char *)x + (image * n->pixels + chunk * CHUNK) * channels * (n->bfloat16 ? 2 : 4);
}

static void sum_chunk(const struct work *w, int64_t image, int64_t chunk) {
    const struct norm *n = w->n;
    const int64_t channels = channels_of(n), rows = rows_of(n, chunk);
    float *level = w->partial + (image * w->chunks + chunk) * 3 * channels, *sum = level + channels;
    float *square = sum + channels;
    const char *x = input(n->x, n, n->c1, image, chunk);
    if (n->bfloat16) sums(x, 1, rows, n->c1, level, sum, square);
    else sums(x, 0, rows, n->c1, level, sum, square);
    if (!n->c2) return;
    x = input(n->x2, n, n->c2, image, chunk), level += n->c1, sum += n->c1, square += n->c1;
    if (n->bfloat16) sums(x, 1, rows, n->c2, level, sum, square);
    else sums(x, 0, rows, n->c2, level, sum, square);
}

/* Merge an image's chunks and groups to what every channel is moved and multiplied by. */
static void finish(const struct work *w, int64_t image, char *table) {
    const struct norm *n = w->n;
    const int64_t channels = channels_of(n), wide = channels / n->groups;
    double *mean = (double *)table, *m2 = mean + channels;
    float *offset = (float *)(m2 + channels), *a = offset + channels, *b = a + channels;
    const float *partial = w->partial + image * w->chunks * 3 * channels;

    memset(mean, 0, (size_t)channels * 2 * sizeof(double));
    for (int64_t k = 0; k < w->chunks; k++) {
        const float *level = partial + k * 3 * channels, *sum = level + channels;
        const double rows = (double)rows_of(n, k);
        for (int64_t c = 0; c < channels; c++) mean[c] += rows * level[c] + sum[c];
    }
    for (int64_t c = 0; c < channels; c++) mean[c] /= (double)n->pixels;
    for (int64_t k = 0; k < w->chunks; k++) {
        const float *level = partial + k * 3 * channels, *sum = level + channels, *square = sum + channels;
        const double rows = (double)rows_of(n, k), inverse = 1 / rows;
        for (int64_t c = 0; c < channels; c++) {
            double moved = sum[c] * inverse, delta = level[c] + moved - mean[c];
            m2[c] += square[c] - sum[c] * moved + rows * delta * delta;
        }
    }
    const float *a_row = n->a + image * n->a_stride, *b_row = n->b + image * n->b_stride;
    for (int64_t g = 0; g < n->groups; g++) {
        const int64_t first = g * wide;
        double centre = 0, total = 0;
        for (int64_t c = first; c < first + wide; c++) {
            if (n->x_bias && c < n->c1) mean[c] += n->x_bias[c];
            centre += mean[c];
        }
        centre /= (double)wide;
        for (int64_t c = first; c < first + wide; c++) {
            double delta = mean[c] - centre;
            total += m2[c] + (double)n->pixels * delta * delta;
        }
        const double rstd = 1 / sqrt(total / ((double)n->pixels * (double)wide) + n->eps);
        if (n->mean) n->mean[image * n->groups + g] = (float)centre;
        if (n->rstd) n->rstd[image * n->groups + g] = (float)rstd;
        for (int64_t c = first; c < first + wide; c++) {
            const double exact = n->x_bias && c < n->c1 ? centre - n->x_bias[c] : centre, slope = rstd * a_row[c];
            offset[c] = (float)exact;
            a[c] = (float)slope;
            b[c] = (float)(b_row[c] + (offset[c] - exact) * slope);
        }
    }
}

static void apply_chunk(const struct work *w, int64_t image, int64_t chunk, const char *table) {
    const struct norm *n = w->n;
    const int64_t channels = channels_of(n), rows = rows_of(n, chunk);
    const float *offset = (const float *)((const double *)table + 2 * channels), *a = offset + channels;
    const float *b = a + channels;
    const char *x = input(n->x, n, n->c1, image, chunk);
    char *y = (char *)input(n->y, n, channels, image, chunk);
    for (int64_t c = 0, part = n->c1;; part = n->c2) {
        if (n->bfloat16) {
            if (n->silu) apply(x, y, 1, 1, rows, part, channels, offset + c, a + c, b + c);
            else apply(x, y, 1, 0, rows, part, channels, offset + c, a + c, b + c);
        } else {
            if (n->silu) apply(x, y, 0, 1, rows, part, channels, offset + c, a + c, b + c);
            else apply(x, y, 0, 0, rows, part, channels, offset + c, a + c, b + c);
        }
        if (c || !n->c2) return;
        c = part, y += part * (n->bfloat16 ? 2 : 4), x = input(n->x2, n, n->c2, image, chunk);
    }
}

/* One thread's share. Where the images divide evenly every thread takes whole ones, which then stay in its cache;
   else all threads sum chunks, meet, and apply chunks. */
static void share(void *argument) {
    const struct work *w = argument;
    const struct norm *n = w->n;
    const int64_t team = n->threads > 1 ? team_size() : 1, number = team > 1 ? thread_number() : 0;
    const int64_t all = n->batch * w->chunks, useful = all * CHUNK * channels_of(n) / GRAIN;
    int64_t size = team < useful ? team : useful;
    size = size < 1 ? 1 : size < all ? size : all;
    char *table = w->tables + number * table_bytes(n);
    if (n->batch % size == 0) {
        for (int64_t image = number; image < n->batch && number < size; image += size) {
            for (int64_t k = 0; k < w->chunks; k++) sum_chunk(w, image, k);
            finish(w, image, table);
            for (int64_t k = 0; k < w->chunks; k++) apply_chunk(w, image, k, table);
        }
        return;
    }
    const int64_t first = number < size ? all * number / size : all;
    const int64_t last = number < size ? all * (number + 1) / size : all;
    for (int64_t i = first; i < last; i++) sum_chunk(w, i / w->chunks, i % w->chunks);
    wait_for_team();
    for (int64_t i = first, image = -1; i < last; i++) {
        if (image != i / w->chunks) finish(w, image = i / w->chunks, table);
        apply_chunk(w, image, i % w->chunks, table);
    }
}

/* 0, or 1 where memory is short: nothing was written then. */
int pdae_group_norm(const struct norm *given) {
    struct norm n = *given;
    struct work w = {&n, NULL, NULL, (n.pixels + CHUNK - 1) / CHUNK};
    /* All threads or one: teams of other sizes would make the runtime end threads and start them again. */
    if (!run_parallel || n.batch * n.pixels * channels_of(&n) < 2 * GRAIN) n.threads = 1;
    const size_t tables = (size_t)(n.threads * table_bytes(&n));
    w.tables = malloc(tables + (size_t)(n.batch * w.chunks * 3 * channels_of(&n)) * sizeof(float));
    if (!w.tables) return 1;
    w.partial = (float *)(w.tables + tables);
    if (n.threads > 1) run_parallel(share, &w, (unsigned)n.threads, 0);
    else share(&w);
    free(w.tables);
    return 0;
}
