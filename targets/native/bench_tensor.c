/* Tensors as ONNX stores them (TensorProto in onnx.proto, whose field numbers never change), and how two are compared. */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { DIMS = 1, DATA_TYPE = 2, STRING_DATA = 6, NAME = 8, RAW_DATA = 9, DOC_STRING = 12 };
enum { VARINT = 0, BYTES = 2 };

static const uint64_t MAX_COUNT = (uint64_t)1 << 56; /* of elements; far from an overflow when it becomes bytes */

typedef struct {
    const uint8_t *at, *end;
} reader;

/* Read a number of 7 bits a byte, lowest first. Return whether there is one. */
static int read_varint(reader *from, uint64_t *value)
{
    *value = 0;
    for (int shift = 0; shift < 64 && from->at < from->end; shift += 7) {
        uint8_t byte = *from->at++;
        *value |= (uint64_t)(byte & 0x7F) << shift;
        if (!(byte & 0x80))
            return 1;
    }
    return 0;
}

static char *copy_text(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1);
    if (text) {
        memcpy(text, data, size);
        text[size] = 0;
    }
    return text;
}

size_t tensor_element_size(int type)
{
    static const uint8_t sizes[] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2, 8, 4, 8, 8, 16, 2};
    return type > 0 && type < (int)sizeof sizes ? sizes[type] : 0;
}

static const char *add_dimension(tensor *out, uint64_t value)
{
    if (out->rank == TENSOR_MAX_RANK || value > INT64_MAX)
        return "its shape is not supported";
    out->shape[out->rank++] = (int64_t)value;
    return NULL;
}

static const char *add_text(tensor *out, const uint8_t *data, size_t size, size_t *room)
{
    if (out->count == *room) {
        size_t more = *room ? 2 * *room : 16;
        char **grown = realloc(out->texts, more * sizeof *grown);
        if (!grown)
            return "there is not enough memory for it";
        out->texts = grown;
        *room = more;
    }
    out->texts[out->count] = copy_text(data, size);
    return out->texts[out->count++] ? NULL : "there is not enough memory for it";
}

/* Take in one field of the message; raw is where raw_data lies. */
static const char *read_field(reader *from, tensor *out, reader *raw, size_t *room)
{
    uint64_t key, value;
    if (!read_varint(from, &key) || !read_varint(from, &value))
        return "it is truncated";
    int field = key >> 3 > 100 ? 100 : (int)(key >> 3);
    if ((key & 7) == VARINT) {
        if (field == DIMS)
            return add_dimension(out, value);
        if (field == DATA_TYPE)
            out->type = value > 1000 ? 1000 : (int)value;
        return field == DATA_TYPE ? NULL : "its data lie in a form other than raw_data";
    }
    if ((key & 7) != BYTES || value > (uint64_t)(from->end - from->at))
        return "it is no TensorProto";
    reader inner = {from->at, from->at + value};
    from->at = inner.end;
    switch (field) {
    case DIMS: /* packed: one after the other */
        for (const char *problem; inner.at < inner.end;)
            if (!read_varint(&inner, &key) || (problem = add_dimension(out, key)))
                return "its shape is not supported";
        return NULL;
    case STRING_DATA:
        return add_text(out, inner.at, (size_t)value, room);
    case NAME:
        free(out->name);
        out->name = copy_text(inner.at, (size_t)value);
        return out->name ? NULL : "there is not enough memory for it";
    case RAW_DATA:
        *raw = inner;
        return NULL;
    case DOC_STRING:
        return NULL;
    default:
        return "its data lie in a form other than raw_data";
    }
}

const char *tensor_read(const uint8_t *data, size_t size, tensor *out)
{
    reader from = {data, data + size}, raw = {data, data};
    size_t room = 0;
    memset(out, 0, sizeof *out);
    while (from.at < from.end) {
        const char *problem = read_field(&from, out, &raw, &room);
        if (problem)
            return problem;
    }
    uint64_t count = 1;
    for (size_t axis = 0; axis < out->rank; axis++) {
        uint64_t length = (uint64_t)out->shape[axis];
        if (length && count > MAX_COUNT / length)
            return "its shape is not supported";
        count *= length;
    }
    if (!out->name)
        return "it has no name";
    if (out->type == TENSOR_STRING)
        return out->count == count ? NULL : "its shape does not fit its data";
    size_t width = tensor_element_size(out->type), length = (size_t)(raw.end - raw.at);
    if (!width)
        return "its data type is not supported";
    if (out->count || length % width || length / width != count)
        return "its shape does not fit its data";
    out->count = (size_t)count;
    out->data = malloc(length + 1);
    if (!out->data)
        return "there is not enough memory for it";
    memcpy(out->data, raw.at, length);
    return NULL;
}

void tensor_free(tensor *value)
{
    for (size_t at = 0; value->texts && at < value->count; at++)
        free(value->texts[at]);
    free(value->texts);
    free(value->name);
    free(value->data);
    memset(value, 0, sizeof *value);
}

/* --- comparing --- */

/* The value of half precision, or of the upper half of single precision (brain float). */
static double half_value(const uint8_t *at, int brain)
{
    unsigned bits = at[0] | (unsigned)at[1] << 8;
    int exponent_bits = brain ? 8 : 5, mantissa_bits = brain ? 7 : 10;
    unsigned mantissa = bits & ((1u << mantissa_bits) - 1), top = (1u << exponent_bits) - 1;
    unsigned exponent = bits >> mantissa_bits & top;
    double value = mantissa;
    int shift = (int)(exponent ? exponent : 1) - (1 << (exponent_bits - 1)) + 1 - mantissa_bits;
    if (exponent == top)
        value = mantissa ? (double)NAN : (double)INFINITY;
    else
        value += exponent ? 1u << mantissa_bits : 0;
    for (; shift > 0; shift--)
        value *= 2;
    for (; shift < 0; shift++)
        value /= 2;
    return bits >> 15 ? -value : value;
}

static double value_at(const tensor *of, size_t index)
{
    const uint8_t *at = of->data + index * tensor_element_size(of->type);
    float single;
    double twice;
    switch (of->type) {
    case TENSOR_FLOAT:
        memcpy(&single, at, sizeof single);
        return (double)single;
    case TENSOR_DOUBLE:
        memcpy(&twice, at, sizeof twice);
        return twice;
    default:
        return half_value(at, of->type == TENSOR_BFLOAT16);
    }
}

/* The step between 1 and the next value of a floating type; 0 for all other types. */
static double step_of(int type)
{
    static const struct {
        int type, bits;
    } floating[] = {{TENSOR_FLOAT, 23}, {TENSOR_DOUBLE, 52}, {TENSOR_FLOAT16, 10}, {TENSOR_BFLOAT16, 7}};
    for (size_t at = 0; at < sizeof floating / sizeof *floating; at++)
        if (floating[at].type == type)
            return 1 / (double)((uint64_t)1 << floating[at].bits);
    return 0;
}

static int floats_differ(const tensor *actual, const tensor *wanted, double relative, char *problem, size_t size)
{
    double worst = 0, largest = 0;
    for (size_t at = 0; at < wanted->count; at++) {
        double found = value_at(actual, at), exact = value_at(wanted, at);
        if (isfinite(exact) && isfinite(found)) {
            double error = found > exact ? found - exact : exact - found;
            double magnitude = exact < 0 ? -exact : exact;
            worst = error > worst ? error : worst;
            largest = magnitude > largest ? magnitude : largest;
        } else if (isnan(exact) ? !isnan(found) : found != exact) {
            snprintf(problem, size, "NaN or Inf at other places");
            return 1;
        }
    }
    double least = 16 * step_of(wanted->type), allowed = (relative > least ? relative : least) * largest;
    snprintf(problem, size, "off by %.3g, allowed %.3g", worst, allowed);
    return worst > allowed;
}

int tensor_difference(const tensor *actual, const tensor *wanted, double relative, char *problem, size_t size)
{
    if (actual->rank != wanted->rank || memcmp(actual->shape, wanted->shape, wanted->rank * sizeof *wanted->shape)) {
        snprintf(problem, size, "another shape");
        return 1;
    }
    if (actual->type != wanted->type) {
        snprintf(problem, size, "type %d instead of %d", actual->type, wanted->type);
        return 1;
    }
    if (step_of(wanted->type) > 0)
        return floats_differ(actual, wanted, relative, problem, size);
    size_t width = tensor_element_size(wanted->type), wrong = 0;
    for (size_t at = 0; at < wanted->count; at++)
        wrong += wanted->texts ? strcmp(actual->texts[at], wanted->texts[at]) != 0
                               : memcmp(actual->data + at * width, wanted->data + at * width, width) != 0;
    snprintf(problem, size, "%lu of %lu values differ", (unsigned long)wrong, (unsigned long)wanted->count);
    return wrong > 0;
}
