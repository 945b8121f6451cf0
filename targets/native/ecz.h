/* Decoder of .ecz files: lossless containers of ONNX models (edgecompress/container/SPEC.md, version 2).
 *
 * C99 without dependencies. No global state: one container may be used by one thread at a time, any number of containers
 * by any number of threads. Memory comes from the caller's allocator. Whatever the bytes, every call returns.
 */
#ifndef ECZ_H
#define ECZ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ecz_status {
    ECZ_OK = 0,
    ECZ_NOT_ECZ,      /* does not start with the signature */
    ECZ_VERSION,      /* a version that this decoder does not know */
    ECZ_MALFORMED,    /* breaks a rule of the format, or is truncated */
    ECZ_CHECKSUM,     /* damaged */
    ECZ_NO_MEMORY,    /* the allocator returned NULL */
    ECZ_BAD_ARGUMENT  /* no such file or stream, or a buffer of another size */
};

typedef struct {
    void *user;
    void *(*allocate)(void *user, size_t size); /* NULL where there is no memory; aligned as malloc does */
    void (*release)(void *user, void *memory);  /* never called with NULL */
} ecz_allocator;

typedef struct ecz_container ecz_container;

/* Check prefix and meta block of the size bytes at data, which must stay there until ecz_close. */
int ecz_open(const uint8_t *data, size_t size, const ecz_allocator *allocator, ecz_container **container);
void ecz_close(ecz_container *container);

/* The files that come out: number 0 is the model, whose name is "", the others are its external data. Names are UTF-8
 * and plain: they lead into no other folder and are not hidden. Before a file other than the model is written somewhere,
 * check that the model refers to it (see ecz_unpack.c). */
size_t ecz_file_count(const ecz_container *container);
const char *ecz_file_name(const ecz_container *container, size_t number);
uint64_t ecz_file_size(const ecz_container *container, size_t number);

/* Decode a file into out, which holds size = ecz_file_size bytes. After an error its content is not to be used. */
int ecz_read_file(ecz_container *container, size_t number, uint8_t *out, size_t size);

/* The streams, for access to one tensor alone; which bytes of which file they are is in the meta block. */
size_t ecz_stream_count(const ecz_container *container);
size_t ecz_stream_size(const ecz_container *container, size_t number);
int ecz_read_stream(ecz_container *container, size_t number, uint8_t *out, size_t size);

/* What a status means, in English. */
const char *ecz_message(int status);

#ifdef __cplusplus
}
#endif

#endif
