/* What the parts of the decoder share. Nothing here is for users. */
#ifndef ECZ_INTERNAL_H
#define ECZ_INTERNAL_H

#include "ecz.h"

enum {
    ECZ_CODE_BITS = 12,
    ECZ_PHRASES = 256,
    ECZ_PHRASE_VALUES = 8, /* the most of a phrase, or */
    ECZ_LONG_PHRASE_VALUES = 64,
    ECZ_CLASSES = 8
};

/* A table as it lies in the meta block. */
typedef struct {
    const uint8_t *levels;
    uint16_t alphabet;
    uint8_t base;
    uint8_t splits;
    uint8_t common;
    uint8_t longest; /* the most values of a phrase */
} ecz_table;

/* entries: for the next 12 bits, phrase << 8 | (size - 1) % 8 << 4 | bits. Each phrase has `longest` bytes of values. */
typedef struct {
    uint16_t entries[1 << ECZ_CODE_BITS];
    uint8_t sizes[ECZ_PHRASES];
    size_t longest;
    uint8_t values[];
} ecz_code;

/* Eight tables for eight bytes at once. */
typedef struct {
    uint32_t table[8][256];
} ecz_crc;

uint32_t ecz_load32(const uint8_t *at);

void ecz_crc_init(ecz_crc *crc);
uint32_t ecz_crc_update(const ecz_crc *crc, uint32_t value, const uint8_t *data, size_t size);

/* Decode one DEFLATE stream (RFC 1951) of exactly out_size bytes that ends in the last byte of data. */
int ecz_inflate(const uint8_t *data, size_t size, uint8_t *out, size_t out_size);

/* The most splits of a table of used values of which common extend phrases up to longest values. */
unsigned ecz_most_splits(unsigned used, unsigned common, unsigned longest);
size_t ecz_code_size(const ecz_table *table);
void ecz_build_code(const ecz_table *table, ecz_code *code);

/* Decode a block; scratch holds ecz_scratch_size bytes, for phrases of up to longest values. */
size_t ecz_scratch_size(size_t lane_phrases, size_t longest);
int ecz_decode_block(const ecz_code *code, const uint8_t *data, size_t size, size_t phrases, size_t lane_phrases,
                     uint8_t *scratch, uint8_t *out, size_t count);

#endif
