/* The one measuring rule, as in edgecompress.runtime.measure: first run, warm-up, then blocks that take turns. */
#define _GNU_SOURCE
#include "bench.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { WARMUP_LIMIT_RUNS = 200, MAX_BATCH = 20, BLOCKS = 10 };

static const double WARMUP_BATCH_MS = 50, WARMUP_LIMIT_MS = 1000, STABLE = 0.05;

double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static void keep(samples *into, double value)
{
    if (into->count == into->room) {
        size_t room = into->room ? 2 * into->room : 64;
        double *grown = allocate(room * sizeof *grown);
        if (into->count)
            memcpy(grown, into->values, into->count * sizeof *grown);
        free(into->values);
        into->values = grown;
        into->room = room;
    }
    into->values[into->count++] = value;
}

static int compare(const void *left, const void *right)
{
    double first = *(const double *)left, second = *(const double *)right;
    return (first > second) - (first < second);
}

double percentile(const samples *of, double share)
{
    double *sorted = allocate(of->count * sizeof *sorted);
    memcpy(sorted, of->values, of->count * sizeof *sorted);
    qsort(sorted, of->count, sizeof *sorted, compare);
    double place = share * (double)(of->count - 1);
    size_t below = (size_t)place;
    size_t above = below + 1 < of->count ? below + 1 : below;
    double value = sorted[below] + (place - (double)below) * (sorted[above] - sorted[below]);
    free(sorted);
    return value;
}

/* Run a batch; return its median. */
static double run_batch(model *which, size_t size, samples *into)
{
    for (size_t run = 0; run < size; run++)
        keep(into, run_model(which));
    samples batch = {into->values + into->count - size, size, size};
    return percentile(&batch, 0.5);
}

static double total_ms(const samples *of)
{
    double total = 0;
    for (size_t at = 0; at < of->count; at++)
        total += of->values[at];
    return total;
}

/* Run in batches until two in a row have medians within 5 %, or for a second, or 200 times. */
static void warm_up(model *which, double first_ms, samples *into)
{
    double wanted = WARMUP_BATCH_MS / (first_ms > 1e-3 ? first_ms : 1e-3);
    size_t size = wanted >= MAX_BATCH ? MAX_BATCH : (size_t)wanted + ((double)(size_t)wanted < wanted);
    double before = run_batch(which, size, into);
    while (total_ms(into) < WARMUP_LIMIT_MS && into->count < WARMUP_LIMIT_RUNS) {
        double median = run_batch(which, size, into);
        double change = median > before ? median - before : before - median;
        if (change <= STABLE * before)
            return;
        before = median;
    }
}

/* Wait until the machine is cool enough, or the time for that is used up; return the seconds waited. */
static int cool_down(double above, int waited)
{
    int seconds = 0;
    for (; above > 0 && hottest_c() > above && waited + seconds < PAUSE_LIMIT_S; seconds++) {
        struct timespec second = {1, 0};
        nanosleep(&second, NULL);
    }
    return seconds;
}

int measure(model *models, size_t count, const timing_rule *rule, timings *out)
{
    int blocks = rule->runs < BLOCKS ? rule->runs : BLOCKS, waited = 0;
    for (size_t at = 0; at < count; at++) {
        memset(&out[at], 0, sizeof out[at]);
        out[at].first_ms = run_model(&models[at]);
        check_outputs(&models[at]);
    }
    for (size_t at = 0; at < count; at++)
        warm_up(&models[at], out[at].first_ms, &out[at].warmup);
    for (int block = 0; block < blocks; block++) {
        int size = rule->runs / blocks + (block < rule->runs % blocks);
        waited += cool_down(rule->pause_above, waited);
        for (size_t at = 0; at < count; at++) {
            if (count > 1) /* the other model has just emptied the caches */
                run_model(&models[at]);
            for (int run = 0; run < size; run++)
                keep(&out[at].steady, run_model(&models[at]));
        }
    }
    return waited;
}
