/* What native code that multiplies matrices shares: numbers as vectors, threads, and the micro-kernel. */

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#define ROWS 14 /* of the micro-kernel: 28 of 32 registers are sums */
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define ROWS 6 /* 12 of 16 registers */
#else
#define LANES 4 /* compiled, and reported as unsupported */
#define ROWS 4
#endif
#define PANEL (2 * LANES) /* columns of the micro-kernel */
#define LINE 64
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);
static parallel_function run_parallel;
static int (*thread_number)(void), (*team_size)(void);
static void (*wait_for_team)(void);

/* GOMP_parallel, omp_get_thread_num, omp_get_num_threads, GOMP_barrier. */
void pdae_threads(parallel_function parallel, int (*number)(void), int (*size)(void), void (*barrier)(void)) {
    thread_number = number, team_size = size, wait_for_team = barrier, run_parallel = parallel;
}

/* PANEL, negative where no vectors are worth it. */
int64_t pdae_panel(void) {
    return LANES == 4 ? -PANEL : PANEL;
}

/* -- numbers ------------------------------------------------------------------------------------------------------ */

INLINE floats widen(halves h) {
    return (floats)(__builtin_convertvector(h, words) << 16);
}

/* To bfloat16, to the nearest, ties to even; a NaN stays one. */
INLINE halves narrow(floats v) {
#ifdef __AVX512BF16__
    return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
    words bits = (words)v, nan = (words)(v != v);
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), halves);
#endif
}

/* The n first lanes; the others are zero. */
INLINE floats load(const char *p, int bfloat16, int64_t n) {
    if (bfloat16) {
        halves h = {0};
        memcpy(&h, p, n == LANES ? sizeof h : 2 * (size_t)n);
        return widen(h);
    }
    if (n == LANES) return *(const unaligned *)p;
    floats v = {0};
    memcpy(&v, p, 4 * (size_t)n);
    return v;
}

INLINE void store(char *p, int bfloat16, int64_t n, floats v) {
    if (bfloat16) {
        halves h = narrow(v);
        memcpy(p, &h, n == LANES ? sizeof h : 2 * (size_t)n);
    } else if (n == LANES) {
        *(unaligned *)p = v;
    } else {
        memcpy(p, &v, 4 * (size_t)n);
    }
}

/* -- the micro-kernel --------------------------------------------------------------------------------------------- */

/* Numbers as float32: with `part` 0 they are, with 1 and 2 they are the lower and the upper ones of bfloat16 pairs. */
INLINE floats numbers(words v, int part) {
    return (floats)(part == 0 ? v : part == 1 ? v << 16 : v & 0xffff0000);
}

/* One step of `accumulate`, of one part of its numbers. */
INLINE void add_products(floats sums[ROWS][2], const char *v, int64_t v_row, words u0, words u1, int rows, int part) {
    const floats own0 = numbers(u0, part), own1 = numbers(u1, part);
    UNROLL for (int r = 0; r < rows; r++) {
        float given;
        memcpy(&given, v + r * v_row, 4);
        const floats bits = given - (floats){0}; /* the same, of zero too: a broadcast */
        const floats each = numbers((words)bits, part);
        sums[r][0] += each * own0, sums[r][1] += each * own1;
    }
}

/* To the sums of `rows` rows by one panel of columns: v u, where v has 4 bytes a step and row, one float32 or two
   bfloat16, and u has as many a step and column. What lies a panel of `panel` bytes ahead is fetched meanwhile. */
INLINE void accumulate(floats sums[ROWS][2], const char *v, int64_t v_row, const char *u, int64_t steps, int64_t panel,
                       int rows, int bfloat16) {
    for (int64_t k = 0; k < steps; k++, u += 4 * PANEL, v += 4) {
        const words u0 = *(const words *)u, u1 = *(const words *)(u + 4 * LANES);
        __builtin_prefetch(u + panel, 0, 2);
        if (LANES == 16) __builtin_prefetch(u + panel + 64, 0, 2);
        if (!bfloat16) {
            add_products(sums, v, v_row, u0, u1, rows, 0);
            continue;
        }
#if LANES == 16 && defined(__AVX512BF16__)
        UNROLL for (int r = 0; r < rows; r++) {
            int given;
            memcpy(&given, v + r * v_row, 4);
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(given);
            sums[r][0] = (floats)_mm512_dpbf16_ps((__m512)sums[r][0], pair, (__m512bh)u0);
            sums[r][1] = (floats)_mm512_dpbf16_ps((__m512)sums[r][1], pair, (__m512bh)u1);
        }
#else
        add_products(sums, v, v_row, u0, u1, rows, 1);
        __asm__("" ::: "memory"); /* read again: there are no registers to keep all rows' numbers in */
        add_products(sums, v, v_row, u0, u1, rows, 2);
#endif
    }
}

/* m = v u */
INLINE void product(const char *v, int64_t v_row, const char *u, int64_t steps, char *m, int64_t m_row, int rows,
                    int bfloat16) {
    floats sums[ROWS][2] = {{{0}}};
    accumulate(sums, v, v_row, u, steps, 4 * PANEL * steps, rows, bfloat16);
    UNROLL for (int r = 0; r < rows; r++) {
        *(floats *)(m + r * m_row) = sums[r][0];
        *(floats *)(m + r * m_row + 4 * LANES) = sums[r][1];
    }
}

/* `call(n)` with the constant n that `rows` is. */
#if ROWS >= 14
#define BY_ROWS(rows, call)                                                                                    \
    switch (rows) {                                                                                            \
        case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; case 4: call(4); break;        \
        case 5: call(5); break; case 6: call(6); break; case 7: call(7); break; case 8: call(8); break;        \
        case 9: call(9); break; case 10: call(10); break; case 11: call(11); break; case 12: call(12); break;  \
        case 13: call(13); break; case 14: call(14); break;                                                    \
    }
#elif ROWS >= 6
#define BY_ROWS(rows, call)                                                                              \
    switch (rows) {                                                                                      \
        case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; case 4: call(4); break;  \
        case 5: call(5); break; case 6: call(6); break;                                                  \
    }
#else
#define BY_ROWS(rows, call)                                                                              \
    switch (rows) {                                                                                      \
        case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; case 4: call(4); break;  \
    }
#endif

INLINE void product_of(int64_t rows, const char *v, int64_t v_row, const char *u, int64_t steps, char *m, int64_t m_row,
                       int bfloat16) {
#define PRODUCT(n) product(v, v_row, u, steps, m, m_row, n, bfloat16)
    BY_ROWS(rows, PRODUCT)
#undef PRODUCT
}

static __attribute__((noinline, unused)) void
product_float32(int64_t rows, const char *v, int64_t v_row, const char *u, int64_t steps, char *m, int64_t m_row) {
    product_of(rows, v, v_row, u, steps, m, m_row, 0);
}

static __attribute__((noinline, unused)) void
product_bfloat16(int64_t rows, const char *v, int64_t v_row, const char *u, int64_t steps, char *m, int64_t m_row) {
    product_of(rows, v, v_row, u, steps, m, m_row, 1);
}
