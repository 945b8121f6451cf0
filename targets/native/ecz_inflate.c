/* DEFLATE, RFC 1951, and the checksum of RFC 1952. */
#include "ecz_internal.h"

#include <string.h>

uint32_t ecz_load32(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

void ecz_crc_init(ecz_crc *crc)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
        crc->table[0][byte] = value;
    }
    for (int slice = 1; slice < 8; slice++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t value = crc->table[slice - 1][byte];
            crc->table[slice][byte] = value >> 8 ^ crc->table[0][value & 255];
        }
}

uint32_t ecz_crc_update(const ecz_crc *crc, uint32_t value, const uint8_t *data, size_t size)
{
    value = ~value;
    for (; size >= 8; size -= 8, data += 8) {
        uint32_t low = ecz_load32(data) ^ value, high = ecz_load32(data + 4);
        value = crc->table[7][low & 255] ^ crc->table[6][low >> 8 & 255] ^ crc->table[5][low >> 16 & 255] ^
                crc->table[4][low >> 24] ^ crc->table[3][high & 255] ^ crc->table[2][high >> 8 & 255] ^
                crc->table[1][high >> 16 & 255] ^ crc->table[0][high >> 24];
    }
    for (; size > 0; size--, data++)
        value = value >> 8 ^ crc->table[0][(value ^ *data) & 255];
    return ~value;
}

enum { MAX_BITS = 15, FAST_BITS = 9, LITERALS = 288, DISTANCES = 32 };

typedef struct {
    const uint8_t *data;
    size_t size, at;
    uint64_t bits;
    unsigned count; /* of bits; those above are zero */
    int overrun;    /* more bits were asked for than there are */
} bit_reader;

static void refill(bit_reader *in)
{
    while (in->count <= 56 && in->at < in->size) {
        in->bits |= (uint64_t)in->data[in->at++] << in->count;
        in->count += 8;
    }
}

static void drop(bit_reader *in, unsigned count)
{
    if (count > in->count) {
        in->overrun = 1;
        count = in->count;
    }
    in->bits >>= count;
    in->count -= count;
}

static unsigned take(bit_reader *in, unsigned count)
{
    refill(in);
    unsigned value = (unsigned)(in->bits & ((1u << count) - 1));
    drop(in, count);
    return value;
}

/* Codes of up to FAST_BITS bits are looked up (symbol << 4 | length), longer ones are compared length by length. */
typedef struct {
    uint16_t fast[1 << FAST_BITS];
    uint16_t counts[MAX_BITS + 1];
    uint16_t symbols[LITERALS];
} prefix_code;

/* Return 0 unless the lengths are a complete code; one single code of one bit is allowed where RFC 1951 does. */
static int build(prefix_code *code, const uint8_t *lengths, unsigned size, int may_be_short)
{
    uint16_t first[MAX_BITS + 2] = {0}, next[MAX_BITS + 2];
    int left = 1;
    memset(code, 0, sizeof *code);
    for (unsigned symbol = 0; symbol < size; symbol++)
        code->counts[lengths[symbol]]++;
    unsigned used = size - code->counts[0];
    code->counts[0] = 0;
    for (unsigned length = 1; length <= MAX_BITS; length++) {
        left = 2 * left - code->counts[length];
        if (left < 0)
            return 0;
        first[length + 1] = (uint16_t)(first[length] + code->counts[length]);
    }
    if (left > 0 && !(may_be_short && (used == 0 || (used == 1 && code->counts[1] == 1))))
        return 0;
    memcpy(next, first, sizeof next);
    for (unsigned symbol = 0; symbol < size; symbol++)
        if (lengths[symbol])
            code->symbols[next[lengths[symbol]]++] = (uint16_t)symbol;
    unsigned value = 0, place = 0;
    for (unsigned length = 1; length <= FAST_BITS; length++, value <<= 1)
        for (unsigned each = 0; each < code->counts[length]; each++, value++, place++) {
            unsigned mirrored = 0;
            for (unsigned bit = 0; bit < length; bit++)
                mirrored |= (value >> bit & 1) << (length - 1 - bit);
            for (; mirrored < 1u << FAST_BITS; mirrored += 1u << length)
                code->fast[mirrored] = (uint16_t)(code->symbols[place] << 4 | length);
        }
    return 1;
}

/* Return the next symbol, or -1 where no code matches. */
static int decode(bit_reader *in, const prefix_code *code)
{
    refill(in);
    unsigned entry = code->fast[in->bits & ((1u << FAST_BITS) - 1)];
    if (entry) {
        drop(in, entry & 15);
        return (int)(entry >> 4);
    }
    unsigned value = 0, first = 0, place = 0;
    for (unsigned length = 1; length <= MAX_BITS; length++) {
        value |= (unsigned)(in->bits >> (length - 1)) & 1;
        unsigned count = code->counts[length];
        if (value < first + count) {
            drop(in, length);
            return code->symbols[place + value - first];
        }
        place += count;
        first = (first + count) << 1;
        value <<= 1;
    }
    return -1;
}

static int read_codes(bit_reader *in, prefix_code *literals, prefix_code *distances)
{
    static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t lengths[LITERALS + DISTANCES] = {0};
    unsigned literal_count = take(in, 5) + 257, distance_count = take(in, 5) + 1, count = take(in, 4) + 4;
    if (literal_count > 286 || distance_count > 30)
        return 0;
    for (unsigned index = 0; index < count; index++)
        lengths[order[index]] = (uint8_t)take(in, 3);
    if (!build(literals, lengths, 19, 0))
        return 0;
    memset(lengths, 0, sizeof lengths);
    for (unsigned at = 0; at < literal_count + distance_count;) {
        int symbol = decode(in, literals);
        if (symbol < 0 || in->overrun)
            return 0;
        if (symbol < 16) {
            lengths[at++] = (uint8_t)symbol;
            continue;
        }
        if (symbol == 16 && at == 0)
            return 0;
        uint8_t value = symbol == 16 ? lengths[at - 1] : 0;
        unsigned repeat = symbol == 16 ? 3 + take(in, 2) : symbol == 17 ? 3 + take(in, 3) : 11 + take(in, 7);
        if (repeat > literal_count + distance_count - at)
            return 0;
        memset(lengths + at, value, repeat);
        at += repeat;
    }
    return lengths[256] && build(literals, lengths, literal_count, 1) &&
           build(distances, lengths + literal_count, distance_count, 1);
}

static void fixed_codes(prefix_code *literals, prefix_code *distances)
{
    uint8_t lengths[LITERALS];
    memset(lengths, 8, 144);
    memset(lengths + 144, 9, 112);
    memset(lengths + 256, 7, 24);
    memset(lengths + 280, 8, 8);
    build(literals, lengths, LITERALS, 0);
    memset(lengths, 5, DISTANCES);
    build(distances, lengths, DISTANCES, 0);
}

static int stored_block(bit_reader *in, uint8_t *out, size_t out_size, size_t *filled)
{
    drop(in, in->count & 7);
    unsigned size = take(in, 16), check = take(in, 16);
    if (in->overrun || (size ^ check) != 0xFFFF || size > out_size - *filled)
        return 0;
    for (; size > 0 && in->count > 0; size--)
        out[(*filled)++] = (uint8_t)take(in, 8);
    if (size > in->size - in->at)
        return 0;
    if (size)
        memcpy(out + *filled, in->data + in->at, size);
    in->at += size;
    *filled += size;
    return 1;
}

static int coded_block(bit_reader *in, const prefix_code *literals, const prefix_code *distances, uint8_t *out,
                       size_t out_size, size_t *filled)
{
    static const uint16_t length_base[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                             31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static const uint8_t length_bits[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                            2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static const uint16_t distance_base[30] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,
                                               33,  49,  65,  97,  129, 193,  257,  385,  513,  769,
                                               1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
    size_t at = *filled;
    for (;;) {
        int symbol = decode(in, literals);
        if (symbol < 0 || in->overrun)
            return 0;
        if (symbol < 256) {
            if (at == out_size)
                return 0;
            out[at++] = (uint8_t)symbol;
            continue;
        }
        if (symbol == 256)
            break;
        if (symbol > 285)
            return 0;
        size_t length = length_base[symbol - 257] + (size_t)take(in, length_bits[symbol - 257]);
        int code = decode(in, distances);
        if (code < 0 || code > 29)
            return 0;
        size_t distance = distance_base[code] + (size_t)take(in, code < 2 ? 0 : (unsigned)code / 2 - 1);
        if (in->overrun || distance > at || length > out_size - at)
            return 0;
        for (; length > 0; length--, at++)
            out[at] = out[at - distance];
    }
    *filled = at;
    return 1;
}

int ecz_inflate(const uint8_t *data, size_t size, uint8_t *out, size_t out_size)
{
    bit_reader in = {data, size, 0, 0, 0, 0};
    prefix_code literals, distances;
    size_t filled = 0;
    unsigned last;
    do {
        last = take(&in, 1);
        unsigned kind = take(&in, 2);
        int good = 0;
        if (kind == 0) {
            good = stored_block(&in, out, out_size, &filled);
        } else if (kind < 3) {
            good = 1;
            if (kind == 1)
                fixed_codes(&literals, &distances);
            else
                good = read_codes(&in, &literals, &distances);
            good = good && coded_block(&in, &literals, &distances, out, out_size, &filled);
        }
        if (!good || in.overrun)
            return ECZ_MALFORMED;
    } while (!last);
    return filled == out_size && in.at == in.size && in.count < 8 ? ECZ_OK : ECZ_MALFORMED;
}
