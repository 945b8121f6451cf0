/* Checks a bundle's files, runs its model, compares the outputs with the expected ones, times it: see usage below.
 *
 * Several models, each group after --next, take turns, so that a change of the machine's speed hits all alike.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_MODELS = 64, MAX_RUNS = 1000000, MAX_THREADS = 1024, SCHEMA_VERSION = 2 };

static const char *const USAGE =
    "usage: bench [options] --model M --input F... --expect F... [--next --model M2 --input F... --expect F...]...\n"
    "of a model:\n"
    "  --model FILE        .onnx, .ort or .ecz\n"
    "  --input FILE...     tensors (ONNX TensorProto) to run it on\n"
    "  --expect FILE...    tensors that have to come out\n"
    "  --tolerance X       share of the largest value by which floats may differ (default: 0.001)\n"
    "of the run:\n"
    "  --check FILE        check the files that a SHA256SUMS lists before anything else; repeatable\n"
    "  --library FILE      the runtime (default: lib/libonnxruntime.so.1)\n"
    "  --runs N            timed runs (default: 50)\n"
    "  --threads N         threads (default: 1)\n"
    "  --cores 0,1         run on these cores only\n"
    "  --pause-above C     wait between blocks while the machine is hotter than that, five minutes at most\n"
    "  --target NAME       to be named in the report\n"
    "  --json              print everything as JSON\n";

typedef struct {
    model models[MAX_MODELS];
    size_t count;
    const char *checks[MAX_MODELS], *library, *target, *cores;
    size_t check_count;
    int threads, json;
    timing_rule rule;
} options;

void fail(int code, const char *hint, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    fputs("error: ", stderr);
    vfprintf(stderr, format, values);
    va_end(values);
    fprintf(stderr, *hint ? "\nhint: %s\n" : "\n", hint);
    exit(code);
}

void *allocate(size_t size)
{
    void *memory = malloc(size ? size : 1);
    if (!memory)
        fail(EXIT_MACHINE, "use a smaller model or free some memory", "there is not enough memory");
    return memory;
}

/* --- the command line --- */

static const char *const SEE_HELP = "bench --help says what is allowed";

static double number(const char *name, const char *text, double least, double most, int whole)
{
    char *end;
    double value = strtod(text, &end);
    if (!*text || *end || !(value >= least && value <= most) || (whole && value != (double)(long)value))
        fail(EXIT_USAGE, SEE_HELP, "%s %s: it is not a %snumber from %g to %g", name, text, whole ? "whole " : "", least,
             most);
    return value;
}

/* Point at the arguments behind *at that are no options; of an option that is given twice the last one counts. */
static void take_list(int argc, char **argv, int *at, char ***list, size_t *count)
{
    *list = argv + *at + 1;
    for (*count = 0; *at + 1 < argc && strncmp(argv[*at + 1], "--", 2); ++*at)
        ++*count;
}

static void set_option(options *out, const char *name, const char *value)
{
    model *current = &out->models[out->count - 1];
    if (!strcmp(name, "--model"))
        current->path = value;
    else if (!strcmp(name, "--tolerance"))
        current->tolerance = number(name, value, 0, 1, 0);
    else if (!strcmp(name, "--library"))
        out->library = value;
    else if (!strcmp(name, "--target"))
        out->target = value;
    else if (!strcmp(name, "--cores"))
        out->cores = value;
    else if (!strcmp(name, "--runs"))
        out->rule.runs = (int)number(name, value, 1, MAX_RUNS, 1);
    else if (!strcmp(name, "--threads"))
        out->threads = (int)number(name, value, 1, MAX_THREADS, 1);
    else if (!strcmp(name, "--pause-above"))
        out->rule.pause_above = number(name, value, 1, 200, 0);
    else
        fail(EXIT_USAGE, SEE_HELP, "there is no option %s", name);
}

static void next_model(options *out)
{
    if (out->count == MAX_MODELS)
        fail(EXIT_USAGE, "measure fewer models at once", "more than %d models", MAX_MODELS);
    memset(&out->models[out->count], 0, sizeof *out->models);
    out->models[out->count++].tolerance = 1e-3;
}

static void parse(int argc, char **argv, options *out)
{
    memset(out, 0, sizeof *out);
    out->library = "lib/libonnxruntime.so.1";
    out->threads = 1;
    out->rule.runs = 50;
    next_model(out);
    for (int at = 1; at < argc; at++) {
        model *current = &out->models[out->count - 1];
        const char *name = argv[at];
        if (!strcmp(name, "--help")) {
            fputs(USAGE, stdout);
            exit(0);
        } else if (!strcmp(name, "--json")) {
            out->json = 1;
        } else if (!strcmp(name, "--next")) {
            next_model(out);
        } else if (!strcmp(name, "--input")) {
            take_list(argc, argv, &at, &current->inputs, &current->input_count);
        } else if (!strcmp(name, "--expect")) {
            take_list(argc, argv, &at, &current->outputs, &current->output_count);
        } else if (at + 1 == argc || !strncmp(argv[at + 1], "--", 2)) {
            fail(EXIT_USAGE, SEE_HELP, "%s: unknown, or its value is missing", name);
        } else if (!strcmp(name, "--check")) {
            if (out->check_count == MAX_MODELS)
                fail(EXIT_USAGE, SEE_HELP, "more than %d times --check", MAX_MODELS);
            out->checks[out->check_count++] = argv[++at];
        } else {
            set_option(out, name, argv[++at]);
        }
    }
    for (size_t at = 0; at < out->count; at++)
        if (!out->models[at].path || !out->models[at].output_count)
            fail(EXIT_USAGE, SEE_HELP, "every model needs --model and --expect");
}

/* --- the report --- */

static void put_text(const char *name, const char *text, const char *end)
{
    printf("\"%s\": ", name);
    if (!text || !*text) {
        printf("null%s", end);
        return;
    }
    putchar('"');
    for (; *text; text++) {
        if ((unsigned char)*text < 32 || *text == '"' || *text == '\\')
            printf("\\u%04x", (unsigned char)*text);
        else
            putchar(*text);
    }
    printf("\"%s", end);
}

static void put_number(const char *name, double value, const char *end)
{
    if (value < 0)
        printf("\"%s\": null%s", name, end);
    else
        printf("\"%s\": %.10g%s", name, value, end);
}

static void put_samples(const char *name, const samples *of)
{
    printf("\"%s\": [", name);
    for (size_t at = 0; at < of->count; at++)
        printf("%s%.6f", at ? ", " : "", of->values[at]);
    fputs("], ", stdout);
}

static void print_json(const options *given, const timings *times, const device *before, const char *version,
                       const char *notes)
{
    device after;
    read_device(&after);
    printf("{\"schema_version\": %d, ", SCHEMA_VERSION);
    put_text("target", given->target, ", ");
    printf("\"threads\": %d, \"results\": [", given->threads);
    for (size_t at = 0; at < given->count; at++) {
        const model *of = &given->models[at];
        printf(at ? ", {" : "{");
        put_text("model", of->path, ", \"outputs_match\": true, ");
        put_number("init_ms", of->init_ms, ", ");
        put_number("first_ms", times[at].first_ms, ", ");
        put_samples("warmup_ms", &times[at].warmup);
        put_samples("values_ms", &times[at].steady);
        put_number("median_ms", percentile(&times[at].steady, 0.5), ", ");
        put_number("p90_ms", percentile(&times[at].steady, 0.9), ", ");
        printf("\"samples\": %lu, \"peak_rss_bytes\": %lld}", (unsigned long)times[at].steady.count, peak_rss_bytes());
    }
    fputs("], \"device\": {", stdout);
    put_text("cpu_model", before->cpu_model, ", ");
    put_text("machine", before->machine, ", ");
    printf("\"cores\": %d, ", before->cores);
    put_text("governor", before->governor, ", ");
    put_number("frequency_mhz", before->frequency_mhz, ", ");
    put_number("temperature_c", before->temperature_c, ", ");
    put_text("os", before->os, ", ");
    put_number("load_average", before->load_average, ", ");
    put_text("onnxruntime", version, "");
    printf("%s}, \"after\": {", given->count > 1 ? ", \"memory_shared\": true" : "");
    put_number("frequency_mhz", after.frequency_mhz, ", ");
    put_number("temperature_c", after.temperature_c, "}, ");
    printf("\"notes\": [%s]}\n", notes);
}

static void print_table(const options *given, const timings *times, const device *found, const char *version,
                        const char *notes)
{
    printf("device      %s, %d cores, %s\nruntime     onnxruntime %s, %d thread(s)\n", found->cpu_model, found->cores,
           found->os, version, given->threads);
    for (size_t at = 0; at < given->count; at++) {
        printf("model       %s\n", given->models[at].path);
        printf("outputs     as expected (within %g of the largest)\n", given->models[at].tolerance);
        printf("start       %.1f ms\n", given->models[at].init_ms);
        printf("first run   %.3f ms\n", times[at].first_ms);
        printf("median      %.3f ms   (%lu runs)\n", percentile(&times[at].steady, 0.5),
               (unsigned long)times[at].steady.count);
        printf("p90         %.3f ms\n", percentile(&times[at].steady, 0.9));
    }
    printf("memory      %.1f MB at most\n", (double)peak_rss_bytes() / 1e6);
    if (*notes)
        printf("notes       %s\n", notes);
}

/* Say what a reader has to know of the waiting, as a list of JSON texts. */
static void describe_pauses(double above, int waited, char *notes, size_t size)
{
    int at = 0;
    notes[0] = 0;
    if (above > 0 && hottest_c() < 0)
        snprintf(notes, size, "\"no temperature can be read here: never paused\"");
    else if (waited)
        at = snprintf(notes, size, "\"paused for %d s in all\"", waited);
    if (waited >= PAUSE_LIMIT_S)
        snprintf(notes + at, size - (size_t)at,
                 ", \"it did not cool to %g degrees within that time: the rest ran hot\"", above);
}

static void interrupted(int signal)
{
    (void)signal;
    _exit(EXIT_INTERRUPTED);
}

int main(int argc, char **argv)
{
    static options given;
    static timings times[MAX_MODELS];
    device found;
    char notes[200];
    signal(SIGINT, interrupted);
    parse(argc, argv, &given);
    for (size_t at = 0; at < given.check_count; at++)
        check_files(given.checks[at]);
    int pinned = given.cores ? pin_cores(given.cores) : 0;
    if (pinned)
        fail(pinned, "give numbers of cores that the machine has, as in 0,1", "--cores %s: %s", given.cores,
             pinned == EXIT_USAGE ? "it is no list of cores" : "not possible here");
    read_device(&found);
    const char *version = open_runtime(given.library);
    for (size_t at = 0; at < given.count; at++)
        load_model(&given.models[at], given.threads);
    int waited = measure(given.models, given.count, &given.rule, times);
    describe_pauses(given.rule.pause_above, waited, notes, sizeof notes);
    if (given.json)
        print_json(&given, times, &found, version, notes);
    else
        print_table(&given, times, &found, version, notes);
    fflush(stdout);
    _exit(ferror(stdout) ? EXIT_MACHINE : 0); /* destructors of the runtime's threads are not ours to wait for */
}
