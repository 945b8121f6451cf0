/* Feeds bytes to the decoder. With libFuzzer:
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined fuzz_ecz.c ecz.c ecz_huffman.c ecz_inflate.c -o fuzz_ecz
 *
 * (which also turns the checksums off), or with -DECZ_FLIP a program that flips every bit of the files it is given, one by
 * one, and fails if a damaged file decodes.
 */
#include "ecz.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PREFIX_BYTES = 32, MAX_BLOCK = 65535, MAX_OUTPUT = 1 << 22 };

static void *allocate(void *user, size_t size)
{
    (void)user;
    return malloc(size);
}

static void release(void *user, void *memory)
{
    (void)user;
    free(memory);
}

/* Decode all files; those above MAX_OUTPUT take long and show nothing new. */
static int decode_all(const uint8_t *data, size_t size)
{
    static const ecz_allocator allocator = {NULL, allocate, release};
    ecz_container *container;
    int status = ecz_open(data, size, &allocator, &container);
    if (status)
        return status;
    for (size_t number = 0; number < ecz_file_count(container) && !status; number++) {
        uint64_t length = ecz_file_size(container, number);
        if (length > MAX_OUTPUT)
            continue;
        uint8_t *out = malloc((size_t)length + 1);
        status = out ? ecz_read_file(container, number, out, (size_t)length) : ECZ_NO_MEMORY;
        free(out);
    }
    ecz_close(container);
    return status;
}

#ifdef ECZ_FLIP

int main(int argc, char **argv)
{
    static uint8_t data[1 << 20];
    for (int index = 1; index < argc; index++) {
        FILE *file = fopen(argv[index], "rb");
        size_t size = file ? fread(data, 1, sizeof data, file) : 0;
        if (!file || fclose(file) != 0 || decode_all(data, size) != ECZ_OK) {
            fprintf(stderr, "%s does not decode\n", argv[index]);
            return 1;
        }
        for (size_t bit = 0; bit < 8 * size; bit++) {
            data[bit / 8] ^= (uint8_t)(1u << bit % 8);
            if (decode_all(data, size) == ECZ_OK) {
                fprintf(stderr, "%s decodes with bit %lu flipped\n", argv[index], (unsigned long)bit);
                return 1;
            }
            data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
        for (size_t length = 0; length < size; length++) {
            uint8_t *exact = malloc(length + 1); /* so that a byte read too far is noticed */
            if (!exact)
                return 1;
            memcpy(exact + 1, data, length);
            int status = decode_all(exact + 1, length);
            free(exact);
            if (status == ECZ_OK) {
                fprintf(stderr, "%s decodes with %lu bytes\n", argv[index], (unsigned long)length);
                return 1;
            }
        }
    }
    return 0;
}

#else

static void put32(uint8_t *at, size_t value)
{
    for (int byte = 0; byte < 4; byte++)
        at[byte] = (uint8_t)(value >> 8 * byte);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The first byte says what the others are: a file as it is, or (two bytes of length) a payload and a meta block. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint8_t signature[12] = {0x89, 'E', 'C', 'Z', '\r', '\n', 0x1A, '\n', 2};
    if (size < 3 || data[0] & 1) {
        decode_all(data + (size > 0), size - (size > 0));
        return 0;
    }
    size_t payload = data[1] | (size_t)data[2] << 8;
    data += 3;
    size -= 3;
    payload = payload < size ? payload : size;
    size_t meta = size - payload < MAX_BLOCK ? size - payload : MAX_BLOCK;
    uint8_t *file = calloc(1, PREFIX_BYTES + payload + 5 + meta);
    if (!file)
        return 0;
    memcpy(file, signature, sizeof signature);
    put32(file + 16, PREFIX_BYTES + payload);
    put32(file + 24, 5 + meta);
    put32(file + 28, meta);
    memcpy(file + PREFIX_BYTES, data, payload);
    uint8_t *block = file + PREFIX_BYTES + payload;
    block[0] = 1;
    put32(block + 1, meta | (~meta & 0xFFFF) << 16);
    memcpy(block + 5, data + payload, meta);
    decode_all(file, PREFIX_BYTES + payload + 5 + meta);
    free(file);
    return 0;
}

#endif
