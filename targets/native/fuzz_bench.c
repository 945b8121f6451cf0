/* Feeds bytes to the readers of the bench runner. With libFuzzer:
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined fuzz_bench.c bench_tensor.c bench_files.c -o fuzz_bench
 *
 * With -DBENCH_COMPARE a program that reads pairs of tensor files, each after a share of tolerance, and says for each pair
 * whether they agree; and that flips every bit of the files and cuts them anywhere, to see that nothing is read too far.
 */
#include "bench.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

void fail(int code, const char *hint, const char *format, ...)
{
    (void)hint;
    (void)format;
    exit(code);
}

void *allocate(size_t size)
{
    void *memory = malloc(size ? size : 1);
    if (!memory)
        exit(EXIT_MACHINE);
    return memory;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char problem[160];
    tensor value;
    if (!tensor_read(data, size, &value) && tensor_difference(&value, &value, 0, problem, sizeof problem))
        abort(); /* every tensor is like itself */
    tensor_free(&value);
    char *line = allocate(size + 1);
    uint8_t digest[SHA256_BYTES];
    const char *path;
    memcpy(line, data, size);
    line[size] = 0;
    parse_sum(line, digest, &path);
    free(line);
    return 0;
}

#ifdef BENCH_COMPARE

/* Try what is nearly this file. */
static void spoil(uint8_t *data, size_t size)
{
    for (size_t bit = 0; bit < 8 * size; bit++) {
        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        LLVMFuzzerTestOneInput(data, size);
        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    for (size_t length = 0; length < size; length++) {
        uint8_t *exact = allocate(length); /* so that a byte read too far is noticed */
        memcpy(exact, data, length);
        LLVMFuzzerTestOneInput(exact, length);
        free(exact);
    }
}

/* Read a file, spoiled ones first; return 0, or say what is wrong with it. */
static int read_one(const char *path, tensor *value)
{
    size_t size;
    uint8_t *data = read_file(path, &size, EXIT_DAMAGED);
    if (size < 200)
        spoil(data, size);
    const char *wrong = tensor_read(data, size, value);
    free(data);
    if (wrong)
        printf("%s: %s\n", path, wrong);
    return wrong != NULL;
}

int main(int argc, char **argv)
{
    int wrong = 0;
    for (int at = 1; at + 2 < argc; at += 3) {
        char problem[160];
        tensor values[2];
        int bad = read_one(argv[at + 1], &values[0]);
        bad |= read_one(argv[at + 2], &values[1]);
        if (!bad)
            puts(tensor_difference(&values[0], &values[1], atof(argv[at]), problem, sizeof problem) ? problem : "same");
        wrong |= bad;
        tensor_free(&values[0]);
        tensor_free(&values[1]);
    }
    return wrong ? EXIT_DAMAGED : 0;
}

#endif
