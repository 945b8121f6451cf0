/* The bench runner: checks a bundle's files, runs its model, compares the outputs, times it. See docs/native.md. */
#ifndef BENCH_H
#define BENCH_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* --- bench.c: exit codes, those of every bundle's program --- */

enum { EXIT_USAGE = 2, EXIT_MODEL = 3, EXIT_DAMAGED = 4, EXIT_WRONG = 5, EXIT_MACHINE = 7, EXIT_INTERRUPTED = 130 };

/* Print "error: ..." and, unless it is empty, "hint: ..."; leave with that code. */
void fail(int code, const char *hint, const char *format, ...) __attribute__((format(printf, 3, 4), noreturn));

/* As malloc, but never NULL. */
void *allocate(size_t size);

/* --- bench_files.c: whole files, SHA-256 --- */

enum { SHA256_BYTES = 32 };

typedef struct {
    uint32_t state[8];
    uint64_t length;
    uint8_t block[64];
} sha256;

void sha256_start(sha256 *hash);
void sha256_add(sha256 *hash, const uint8_t *data, size_t size);
void sha256_finish(sha256 *hash, uint8_t digest[SHA256_BYTES]);

/* Return the file's bytes (to be freed); leaves the program where it cannot be read. */
uint8_t *read_file(const char *path, size_t *size, int code);

/* Split a line of SHA256SUMS, without its end: the digest, and the path, which lies within line.
 * Return NULL, or what is wrong with it: every path has to be a plain one below the folder. */
const char *parse_sum(const char *line, uint8_t digest[SHA256_BYTES], const char **path);

/* Check all files that a SHA256SUMS lists, and that nothing else lies in lib/ beside it. Leaves the program if not so. */
void check_files(const char *sums);

/* --- bench_tensor.c: tensors in ONNX's own form --- */

enum { TENSOR_MAX_RANK = 16 };
enum tensor_type {
    TENSOR_FLOAT = 1,
    TENSOR_UINT8,
    TENSOR_INT8,
    TENSOR_UINT16,
    TENSOR_INT16,
    TENSOR_INT32,
    TENSOR_INT64,
    TENSOR_STRING,
    TENSOR_BOOL,
    TENSOR_FLOAT16,
    TENSOR_DOUBLE,
    TENSOR_UINT32,
    TENSOR_UINT64,
    TENSOR_COMPLEX64,
    TENSOR_COMPLEX128,
    TENSOR_BFLOAT16
};

typedef struct {
    char *name;
    int type; /* a tensor_type */
    size_t rank, count; /* of elements */
    int64_t shape[TENSOR_MAX_RANK];
    uint8_t *data; /* count elements, little-endian */
    char **texts;  /* of a TENSOR_STRING, instead */
} tensor;

/* Bytes of an element, 0 for texts and for types that are not known. */
size_t tensor_element_size(int type);

/* Read a TensorProto with raw_data or string_data. Return NULL, or what is wrong; tensor_free in either case. */
const char *tensor_read(const uint8_t *data, size_t size, tensor *out);
void tensor_free(tensor *value);

/* Compare as edgecompress.runtime.measure.output_differences does. Return 0 where they agree, else say in problem why
 * not. Floating values may differ by relative times the largest finite magnitude expected, all else has to be equal. */
int tensor_difference(const tensor *actual, const tensor *wanted, double relative, char *problem, size_t size);

/* --- bench_session.c: models in the runtime --- */

typedef struct {
    const char *path;
    char **inputs, **outputs; /* paths of tensors */
    size_t input_count, output_count;
    double tolerance;
    double init_ms;
    struct loaded *loaded;
} model;

/* Load the shared library and return its version. */
const char *open_runtime(const char *library);
void load_model(model *which, int threads);
/* Run once and return the milliseconds; the outputs are kept for check_outputs. */
double run_model(model *which);
/* Leave the program if the outputs of the last run are not as expected. */
void check_outputs(const model *which);

/* --- bench_time.c: what edgecompress.runtime.measure does, step by step --- */

enum { PAUSE_LIMIT_S = 300 };

typedef struct {
    double *values;
    size_t count, room;
} samples;

typedef struct {
    double first_ms;
    samples warmup, steady;
} timings;

typedef struct {
    int runs;
    double pause_above; /* degrees; wait between blocks while the machine is hotter; 0: never */
} timing_rule;

double now_ms(void);
/* Time all models in turns; return the seconds that were spent waiting for a cooler machine. */
int measure(model *models, size_t count, const timing_rule *rule, timings *out);
double percentile(const samples *of, double share);

/* --- bench_device.c: what is known of the machine; unknown is negative or empty --- */

typedef struct {
    char cpu_model[128], machine[65], governor[64], os[140];
    int cores;
    double frequency_mhz, temperature_c, load_average;
} device;

void read_device(device *out);
double hottest_c(void);
long long peak_rss_bytes(void);
/* Run on these cores only ("0,2"). Return 0, EXIT_USAGE for what is no list, EXIT_MACHINE where they are not there. */
int pin_cores(const char *list);

#endif
