/* Usage: ecz_unpack MODEL.ecz MODEL.onnx
 *
 * Restores an ONNX file, and its external data files beside it, byte for byte. Nothing that exists is replaced.
 * Exit code: 0, or 2 for wrong usage, 4 for a malformed file, 9 where something cannot be read or written.
 */
#include "ecz.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { USAGE = 2, MALFORMED = 4, OUTPUT = 9, MAX_DEPTH = 100, MAX_PATH_BYTES = 4096 };

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

static int fail(int code, const char *path, const char *what)
{
    fprintf(stderr, "error: %s: %s\n", path, what);
    return code;
}

/* --- the names that the model has its external data in --- */

enum message { NOTHING, MODEL, TRAINING, FUNCTION, GRAPH, NODE, ATTRIBUTE, SPARSE, TENSOR };

/* Field numbers of onnx.proto, which never change. */
static enum message child_of(enum message parent, uint64_t field)
{
    switch (parent) {
    case MODEL:
        return field == 7 ? GRAPH : field == 20 ? TRAINING : field == 25 ? FUNCTION : NOTHING;
    case TRAINING:
        return field == 1 || field == 2 ? GRAPH : NOTHING;
    case FUNCTION:
        return field == 7 ? NODE : field == 11 ? ATTRIBUTE : NOTHING;
    case GRAPH:
        return field == 1 ? NODE : field == 5 ? TENSOR : field == 15 ? SPARSE : NOTHING;
    case NODE:
        return field == 5 ? ATTRIBUTE : NOTHING;
    case ATTRIBUTE:
        return field == 5 || field == 10   ? TENSOR
               : field == 6 || field == 11 ? GRAPH
               : field == 22 || field == 23 ? SPARSE
                                            : NOTHING;
    case SPARSE:
        return field == 1 || field == 2 ? TENSOR : NOTHING;
    default:
        return NOTHING;
    }
}

typedef struct {
    const uint8_t *at, *end;
} span;

static int varint(span *in, uint64_t *value)
{
    *value = 0;
    for (unsigned shift = 0; shift < 70 && in->at < in->end; shift += 7) {
        uint8_t byte = *in->at++;
        *value |= shift < 64 ? (uint64_t)(byte & 127) << shift : 0;
        if (byte < 128)
            return 1;
    }
    return 0;
}

/* Read a field; a number goes to value, bytes go to inside. Return 0 at the end, or where there is no field. */
static int next_field(span *in, uint64_t *field, uint64_t *value, span *inside)
{
    uint64_t tag, size;
    if (in->at == in->end || !varint(in, &tag))
        return 0;
    inside->at = inside->end = NULL;
    *field = tag >> 3;
    *value = 0;
    switch (tag & 7) {
    case 0:
        return varint(in, value);
    case 1:
        size = 8;
        break;
    case 5:
        size = 4;
        break;
    case 2:
        if (!varint(in, &size))
            return 0;
        break;
    default:
        return 0;
    }
    if (size > (uint64_t)(in->end - in->at))
        return 0;
    if ((tag & 7) == 2) {
        inside->at = in->at;
        inside->end = in->at + size;
    }
    in->at += size;
    return 1;
}

static int has_text(span text, const char *wanted)
{
    size_t size = strlen(wanted);
    return text.at && (size_t)(text.end - text.at) == size && memcmp(text.at, wanted, size) == 0;
}

static int tensor_is_in(span tensor, const char *name)
{
    uint64_t field, value, location = 0;
    span inside, path = {NULL, NULL};
    while (next_field(&tensor, &field, &value, &inside))
        if (field == 14) {
            location = value;
        } else if (field == 13 && inside.at) {
            span key = {NULL, NULL}, text = {NULL, NULL}, part;
            while (next_field(&inside, &field, &value, &part))
                *(field == 1 ? &key : field == 2 ? &text : &part) = part;
            if (has_text(key, "location"))
                path = text;
        }
    while (path.at && path.end - path.at > 2 && path.at[0] == '.' && path.at[1] == '/')
        path.at += 2;
    return location == 1 && has_text(path, name);
}

static int model_refers_to(const uint8_t *model, size_t size, const char *name)
{
    struct {
        enum message message;
        span rest;
    } stack[MAX_DEPTH];
    size_t depth = 1;
    stack[0].message = MODEL;
    stack[0].rest.at = model;
    stack[0].rest.end = model + size;
    while (depth > 0) {
        uint64_t field, value;
        span inside;
        if (!next_field(&stack[depth - 1].rest, &field, &value, &inside)) {
            depth--;
            continue;
        }
        enum message child = inside.at ? child_of(stack[depth - 1].message, field) : NOTHING;
        if (child == TENSOR && tensor_is_in(inside, name))
            return 1;
        if (child == NOTHING || child == TENSOR || depth == MAX_DEPTH)
            continue;
        stack[depth].message = child;
        stack[depth++].rest = inside;
    }
    return 0;
}

/* --- files --- */

static uint8_t *read_all(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    uint8_t *data = NULL;
    long end = -1;
    if (file && fseek(file, 0, SEEK_END) == 0 && (end = ftell(file)) >= 0 && fseek(file, 0, SEEK_SET) == 0)
        data = malloc((size_t)end + 1);
    if (data && fread(data, 1, (size_t)end, file) != (size_t)end) {
        free(data);
        data = NULL;
    }
    if (file)
        fclose(file);
    *size = data ? (size_t)end : 0;
    return data;
}

/* The path of a file beside the model: its folder, name, ending. */
static int path_of(char *out, const char *model, const char *name, const char *ending)
{
    const char *slash = strrchr(model, '/');
    int folder = slash && *name ? (int)(slash - model) + 1 : 0;
    int size = snprintf(out, MAX_PATH_BYTES, "%.*s%s%s", folder, model, *name ? name : model, ending);
    return size > 0 && size < MAX_PATH_BYTES;
}

static int exists(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (file)
        fclose(file);
    return file != NULL;
}

static int write_all(const char *path, const uint8_t *data, size_t size)
{
    FILE *file = fopen(path, "wb");
    if (!file)
        return 0;
    int good = fwrite(data, 1, size, file) == size;
    return fclose(file) == 0 && good;
}

/* Decode file by file to NAME.partial; the model is kept to look for the names of the others. Count what was begun. */
static int write_partial(ecz_container *container, const char *target, const char *input, size_t *begun)
{
    uint8_t *model = NULL;
    size_t model_size = 0;
    int code = 0;
    for (size_t number = 0; number < ecz_file_count(container) && code == 0; number++) {
        const char *name = ecz_file_name(container, number);
        uint64_t size = ecz_file_size(container, number);
        char path[MAX_PATH_BYTES], partial[MAX_PATH_BYTES];
        uint8_t *data = size < SIZE_MAX ? malloc((size_t)size + 1) : NULL;
        int status = data ? ecz_read_file(container, number, data, (size_t)size) : ECZ_NO_MEMORY;
        if (status)
            code = fail(MALFORMED, input, ecz_message(status));
        else if (number > 0 && !model_refers_to(model, model_size, name))
            code = fail(MALFORMED, input, "it has a file that its model does not refer to");
        else if (!path_of(path, target, name, "") || !path_of(partial, target, name, ".partial"))
            code = fail(OUTPUT, target, "the path is too long");
        else if (exists(path) || exists(partial))
            code = fail(OUTPUT, path, "the file exists");
        else {
            *begun = number + 1;
            if (!write_all(partial, data, (size_t)size))
                code = fail(OUTPUT, partial, "cannot be written");
        }
        if (number == 0) {
            model = data;
            model_size = (size_t)size;
        } else {
            free(data);
        }
    }
    free(model);
    return code;
}

/* Give the files their names, the model last; or remove them. */
static int finish(const ecz_container *container, const char *target, size_t begun, int code)
{
    for (size_t number = begun; number-- > 0;) {
        const char *name = ecz_file_name(container, number);
        char path[MAX_PATH_BYTES], partial[MAX_PATH_BYTES];
        if (!path_of(path, target, name, "") || !path_of(partial, target, name, ".partial"))
            continue;
        if (code)
            remove(partial);
        else if (rename(partial, path) != 0)
            code = fail(OUTPUT, path, "cannot be written");
    }
    return code;
}

int main(int argc, char **argv)
{
    static const ecz_allocator allocator = {NULL, allocate, release};
    ecz_container *container;
    size_t size;
    if (argc != 3) {
        fprintf(stderr, "usage: ecz_unpack MODEL.ecz MODEL.onnx\n");
        return USAGE;
    }
    uint8_t *data = read_all(argv[1], &size);
    if (!data)
        return fail(OUTPUT, argv[1], "cannot be read");
    int status = ecz_open(data, size, &allocator, &container);
    int code = status ? fail(MALFORMED, argv[1], ecz_message(status)) : 0;
    if (!status) {
        size_t begun = 0;
        code = write_partial(container, argv[2], argv[1], &begun);
        code = finish(container, argv[2], begun, code);
        ecz_close(container);
    }
    free(data);
    return code;
}
