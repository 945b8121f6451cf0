/* Codes made from levels of values, and blocks of phrases (SPEC.md, "Tables" and "Blocks"). */
#include "ecz_internal.h"

#include <string.h>

enum { SHARE_BITS = 16, ROOT_BITS = 30, FACTOR = 16, LANES = 4 };

enum kind { WHOLE, CUT, RARE };

typedef struct {
    uint64_t likelihood;
    uint8_t size;
    uint8_t kind;
} phrase;

unsigned ecz_most_splits(unsigned used, unsigned common, unsigned longest)
{
    if (common == 0)
        return 0;
    unsigned shorter = 0, power = 1;
    for (unsigned size = 1; size < longest && shorter < ECZ_PHRASES; size++) {
        power *= common;
        shorter += power;
    }
    unsigned room = (ECZ_PHRASES - used) / (common - (used == common));
    return room < shorter ? room : shorter;
}

static uint64_t at_least_one(uint64_t value)
{
    return value ? value : 1;
}

/* Fill phrases, and longest values for each; return how many phrases there are. */
static unsigned grow(const ecz_table *table, phrase *phrases, uint8_t *values)
{
    const size_t longest = table->longest;
    uint64_t shares[ECZ_PHRASES], common_shares[ECZ_PHRASES], total = 0, rare_share = 0;
    uint8_t common_values[ECZ_PHRASES];
    unsigned end = 0, common = 0;
    memset(values, 0, ECZ_PHRASES * longest);
    for (unsigned index = 0; index < table->alphabet; index++)
        if (table->levels[index]) {
            unsigned level = table->levels[index] - 1u;
            total += (uint64_t)(8 + level % 8) << level / 8;
        }
    for (unsigned index = 0; index < table->alphabet; index++)
        if (table->levels[index]) {
            unsigned level = table->levels[index] - 1u;
            shares[end] = at_least_one(((uint64_t)(8 + level % 8) << level / 8 << SHARE_BITS) / total);
            values[end * longest] = (uint8_t)(table->base + index);
            phrases[end].likelihood = shares[end] << (ROOT_BITS - SHARE_BITS);
            phrases[end].size = 1;
            phrases[end].kind = WHOLE;
            if (table->levels[index] >= table->common) {
                common_values[common] = values[end * longest];
                common_shares[common++] = shares[end];
            } else {
                phrases[end].kind = RARE;
                rare_share += shares[end];
            }
            end++;
        }
    for (unsigned split = 0; split < table->splits; split++) {
        unsigned chosen = 0;
        uint64_t most = 0;
        for (unsigned index = 0; index < end; index++)
            if (phrases[index].kind == WHOLE && phrases[index].size < longest &&
                phrases[index].likelihood > most) {
                most = phrases[index].likelihood;
                chosen = index;
            }
        unsigned size = phrases[chosen].size;
        for (unsigned index = 0; index < common; index++) {
            unsigned place = index == 0 && rare_share == 0 ? chosen : end++;
            uint8_t *to = values + place * longest;
            if (place != chosen)
                memcpy(to, values + chosen * longest, size);
            to[size] = common_values[index];
            phrases[place].likelihood = at_least_one(most * common_shares[index] >> SHARE_BITS);
            phrases[place].size = (uint8_t)(size + 1);
            phrases[place].kind = WHOLE;
        }
        if (rare_share) {
            phrases[chosen].kind = CUT;
            phrases[chosen].likelihood = at_least_one(most * rare_share >> SHARE_BITS);
        }
    }
    return end;
}

static void favour_rare(phrase *phrases, unsigned count)
{
    uint64_t rare = 0, cut = 0;
    for (unsigned index = 0; index < count; index++) {
        rare += phrases[index].kind == RARE ? phrases[index].likelihood : 0;
        cut += phrases[index].kind == CUT ? phrases[index].likelihood : 0;
    }
    if (rare == 0)
        return;
    uint64_t factor = (rare + cut) * FACTOR / rare;
    for (unsigned index = 0; index < count; index++)
        if (phrases[index].kind == RARE)
            phrases[index].likelihood = phrases[index].likelihood * factor / FACTOR;
}

/* Package-merge: lengths of an optimal code of at most ECZ_CODE_BITS bits, for 2 to 256 phrases. */
static void code_lengths(const phrase *phrases, unsigned count, uint8_t *lengths)
{
    uint64_t coins[ECZ_PHRASES], list[2 * ECZ_PHRASES], packages[ECZ_PHRASES];
    uint16_t order[ECZ_PHRASES];
    uint8_t is_coin[ECZ_CODE_BITS][2 * ECZ_PHRASES];
    unsigned package_count = 0;
    for (unsigned index = 0; index < count; index++) {
        unsigned place = index;
        for (; place > 0 && phrases[order[place - 1]].likelihood > phrases[index].likelihood; place--)
            order[place] = order[place - 1];
        order[place] = (uint16_t)index;
    }
    for (unsigned index = 0; index < count; index++)
        coins[index] = phrases[order[index]].likelihood;
    for (int level = 0; level < ECZ_CODE_BITS; level++) {
        unsigned coin = 0, package = 0, size = 0;
        while (coin < count || package < package_count) {
            int take_coin = package == package_count || (coin < count && coins[coin] <= packages[package]);
            list[size] = take_coin ? coins[coin++] : packages[package++];
            is_coin[level][size++] = (uint8_t)take_coin;
        }
        package_count = size / 2;
        for (unsigned index = 0; index < package_count; index++)
            packages[index] = list[2 * index] + list[2 * index + 1];
    }
    memset(lengths, 0, count);
    unsigned taken = 2 * count - 2;
    for (int level = ECZ_CODE_BITS - 1; level >= 0; level--) {
        unsigned coin = 0;
        for (unsigned index = 0; index < taken; index++)
            coin += is_coin[level][index];
        for (unsigned index = 0; index < coin; index++)
            lengths[order[index]]++;
        taken = 2 * (taken - coin);
    }
}

size_t ecz_code_size(const ecz_table *table)
{
    return sizeof(ecz_code) + ECZ_PHRASES * (size_t)table->longest;
}

void ecz_build_code(const ecz_table *table, ecz_code *code)
{
    phrase phrases[ECZ_PHRASES];
    uint8_t lengths[ECZ_PHRASES];
    unsigned count = grow(table, phrases, code->values);
    favour_rare(phrases, count);
    code_lengths(phrases, count, lengths);
    code->longest = table->longest;
    for (unsigned index = 0; index < count; index++)
        code->sizes[index] = phrases[index].size;
    unsigned value = 0;
    for (unsigned length = 1; length <= ECZ_CODE_BITS; length++, value <<= 1)
        for (unsigned index = 0; index < count; index++)
            if (lengths[index] == length) {
                unsigned mirrored = 0;
                for (unsigned bit = 0; bit < length; bit++)
                    mirrored |= (value >> bit & 1) << (length - 1 - bit);
                for (; mirrored < 1u << ECZ_CODE_BITS; mirrored += 1u << length)
                    code->entries[mirrored] =
                        (uint16_t)(index << 8 | (phrases[index].size - 1u) % 8 << 4 | length);
                value++;
            }
}

/* The next 57 bits at least from bit position on; zeros where the data has ended. */
static uint64_t peek(const uint8_t *data, size_t size, uint64_t position)
{
    uint64_t at = position >> 3;
    uint64_t bits = 0;
    if (at + 8 <= size) {
        const uint8_t *from = data + at;
        bits = (uint64_t)ecz_load32(from) | (uint64_t)ecz_load32(from + 4) << 32;
    } else {
        for (unsigned byte = 0; at + byte < size; byte++)
            bits |= (uint64_t)data[at + byte] << 8 * byte;
    }
    return bits >> (position & 7);
}

/* Only where longest is a constant, copying the values of a phrase is one load and one store, or four. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#define TAKE_PHRASE(bits, used, out, longest)                                                                \
    do {                                                                                                     \
        unsigned entry = code->entries[(bits) & 4095];                                                       \
        memcpy((out), code->values + (entry >> 8) * (longest), (longest));                                   \
        (out) += (longest) == ECZ_PHRASE_VALUES ? (entry >> 4 & 7) + 1u : (unsigned)code->sizes[entry >> 8]; \
        (bits) >>= entry & 15;                                                                               \
        (used) += entry & 15;                                                                                \
    } while (0)

/* Decode phrases of one lane; out has room for longest bytes for each. Return where the values end. */
INLINE uint8_t *decode_lane(const ecz_code *code, const uint8_t *data, size_t size, uint64_t *position, size_t phrases,
                            uint8_t *out, const size_t longest)
{
    for (; phrases > 0; phrases -= phrases < 4 ? phrases : 4) {
        uint64_t bits = peek(data, size, *position);
        unsigned used = 0;
        for (size_t each = phrases < 4 ? phrases : 4; each > 0; each--)
            TAKE_PHRASE(bits, used, out, longest);
        *position += used;
    }
    return out;
}

/* Decode LANES whole lanes side by side, so that the processor has something to do while a look-up is under way. */
INLINE void decode_lanes(const ecz_code *code, const uint8_t *data, size_t size, uint64_t *positions, size_t phrases,
                         uint8_t **outs, const size_t longest)
{
    uint8_t *out0 = outs[0], *out1 = outs[1], *out2 = outs[2], *out3 = outs[3];
    uint64_t at0 = positions[0], at1 = positions[1], at2 = positions[2], at3 = positions[3];
    for (size_t left = phrases / 4; left > 0; left--) {
        uint64_t bits0 = peek(data, size, at0), bits1 = peek(data, size, at1);
        uint64_t bits2 = peek(data, size, at2), bits3 = peek(data, size, at3);
        for (int each = 0; each < 4; each++) {
            TAKE_PHRASE(bits0, at0, out0, longest);
            TAKE_PHRASE(bits1, at1, out1, longest);
            TAKE_PHRASE(bits2, at2, out2, longest);
            TAKE_PHRASE(bits3, at3, out3, longest);
        }
    }
    positions[0] = at0;
    positions[1] = at1;
    positions[2] = at2;
    positions[3] = at3;
    outs[0] = out0;
    outs[1] = out1;
    outs[2] = out2;
    outs[3] = out3;
    for (int lane = 0; lane < LANES; lane++)
        outs[lane] = decode_lane(code, data, size, &positions[lane], phrases % 4, outs[lane], longest);
}

static uint8_t *decode_one(const ecz_code *code, const uint8_t *data, size_t size, uint64_t *position, size_t phrases,
                           uint8_t *out)
{
    if (code->longest == ECZ_PHRASE_VALUES)
        return decode_lane(code, data, size, position, phrases, out, ECZ_PHRASE_VALUES);
    return decode_lane(code, data, size, position, phrases, out, ECZ_LONG_PHRASE_VALUES);
}

static void decode_group(const ecz_code *code, const uint8_t *data, size_t size, uint64_t *positions, size_t phrases,
                         uint8_t **outs)
{
    if (code->longest == ECZ_PHRASE_VALUES)
        decode_lanes(code, data, size, positions, phrases, outs, ECZ_PHRASE_VALUES);
    else
        decode_lanes(code, data, size, positions, phrases, outs, ECZ_LONG_PHRASE_VALUES);
}

size_t ecz_scratch_size(size_t lane_phrases, size_t longest)
{
    return LANES * longest * lane_phrases;
}

typedef struct {
    const uint8_t *packed;
    unsigned least, width;
} lane_lengths;

/* Read the head of a block of several lanes; return the bytes that it takes, or 0 where it is malformed. */
static size_t read_lane_lengths(const uint8_t *data, size_t size, size_t known, lane_lengths *lanes)
{
    if (size < 3)
        return 0;
    lanes->least = data[0] | (unsigned)data[1] << 8;
    lanes->width = data[2];
    lanes->packed = data + 3;
    if (lanes->width > 16)
        return 0;
    uint64_t bits = (uint64_t)known * lanes->width;
    if ((bits + 7) / 8 > size - 3)
        return 0;
    if (bits % 8 && lanes->packed[bits / 8] >> bits % 8)
        return 0;
    return 3 + (size_t)((bits + 7) / 8);
}

static uint64_t lane_length(const lane_lengths *lanes, size_t number)
{
    uint64_t at = (uint64_t)number * lanes->width, value = 0;
    for (unsigned bit = 0; bit < lanes->width; bit++, at++)
        value |= (uint64_t)(lanes->packed[at >> 3] >> (at & 7) & 1) << bit;
    return lanes->least + value;
}

int ecz_decode_block(const ecz_code *code, const uint8_t *data, size_t size, size_t phrases, size_t lane_phrases,
                     uint8_t *scratch, uint8_t *out, size_t count)
{
    size_t lane_count = (phrases + lane_phrases - 1) / lane_phrases, filled = 0, last_size = 0;
    lane_lengths lanes = {0, 0, 0};
    uint64_t start = 0;
    if (lane_count > 1) {
        size_t head = read_lane_lengths(data, size, lane_count - 1, &lanes);
        if (head == 0)
            return ECZ_MALFORMED;
        data += head;
        size -= head;
    }
    for (size_t lane = 0; lane < lane_count;) {
        uint64_t positions[LANES], ends[LANES];
        uint8_t *outs[LANES];
        size_t group = lane_count - 1 - lane >= LANES ? LANES : 1;
        size_t number = lane + 1 < lane_count ? lane_phrases : phrases - lane * lane_phrases;
        for (size_t each = 0; each < group; each++) {
            positions[each] = start;
            if (lane + each + 1 < lane_count)
                start += lane_length(&lanes, lane + each);
            ends[each] = start;
            outs[each] = scratch + each * code->longest * lane_phrases;
        }
        if (group == LANES) {
            decode_group(code, data, size, positions, number, outs);
        } else if (lane + 1 < lane_count) {
            outs[0] = decode_one(code, data, size, positions, number, outs[0]);
        } else { /* the last phrase alone may reach beyond the last value */
            uint8_t *before = decode_one(code, data, size, positions, number - 1, outs[0]);
            outs[0] = decode_one(code, data, size, positions, 1, before);
            last_size = (size_t)(outs[0] - before);
            ends[0] = positions[0];
            start = positions[0];
        }
        for (size_t each = 0; each < group; each++) {
            const uint8_t *from = scratch + each * code->longest * lane_phrases;
            size_t values = (size_t)(outs[each] - from), room = count - filled;
            if (positions[each] != ends[each] || (values > room && lane + 1 < lane_count))
                return ECZ_MALFORMED;
            if (values > room) {
                if (values - room >= last_size)
                    return ECZ_MALFORMED;
                values = room;
            }
            memcpy(out + filled, from, values);
            filled += values;
        }
        lane += group;
    }
    uint64_t bits = (uint64_t)size * 8;
    if (filled != count || start > bits || bits - start >= 8 || (start % 8 && data[size - 1] >> start % 8))
        return ECZ_MALFORMED;
    return ECZ_OK;
}
