/* Reading .ecz files. The order of the checks is that of SPEC.md; every count is bounded before memory is asked for. */
#include "ecz_internal.h"

#include <string.h>

enum {
    PREFIX_BYTES = 32,
    CRC_OFFSET = 12,
    VERSION = 2,
    MIN_LANE_PHRASES = 64,
    MAX_LANE_PHRASES = 1 << 12,
    MAX_TABLES = 1 << 10,
    MAX_FILES = 1 << 12,
    MAX_PIECES = 1 << 18,
    MAX_STREAM_BYTES = 1 << 26,
    SMALL_META_BYTES = 1 << 26,
    MAX_META_BYTES = 1 << 28,
    META_MAX_RATIO = 8,
    DEFLATE_MAX_RATIO = 1032,
    MAX_LEVEL = 128,
    LONG_PHRASES = 256, /* what a table of long phrases adds to its common level */
    MAX_CLASS_LEVEL = 15,
    CLASS_BIAS = 8,
    MAX_NAME_BYTES = 255
};

enum mode { RAW, HUFFMAN, DEFLATE };

typedef struct {
    const uint8_t *at, *end;
    int failed; /* something ended too early, or a number was too long */
} reader;

typedef struct {
    size_t table, count, stored, phrases;
} block;

typedef struct {
    unsigned mode, classes, block_count;
    size_t stored, rows, columns;
    const uint8_t *row_levels, *column_levels;
    block blocks[ECZ_CLASSES];
} plane;

typedef struct {
    const uint8_t *planes; /* in the meta block; NULL: a copy */
    const uint8_t *data;
    size_t stored, count, left, source, rows;
    uint32_t width, crc;
    uint8_t *decoded; /* where a part of it was read */
} stream;

typedef struct {
    uint64_t gap;
    size_t length, stream, offset;
} segment;

typedef struct {
    char name[MAX_NAME_BYTES + 1];
    uint64_t length, skeleton; /* where its part of the skeleton starts */
    uint32_t crc;
    segment *segments;
    size_t segment_count;
} entry;

struct ecz_container {
    ecz_allocator allocator;
    ecz_crc crc;
    ecz_code **codes; /* of the tables, each made when it is needed first */
    size_t lane_phrases, longest, table_count, stream_count, file_count, pieces_left;
    ecz_table *tables;
    stream *streams;
    entry *files;
    uint8_t *meta, *skeleton;
};

static void *allocate(const ecz_container *from, uint64_t size)
{
    return size > SIZE_MAX ? NULL : from->allocator.allocate(from->allocator.user, size ? (size_t)size : 1);
}

static void *allocate_zeroed(const ecz_container *from, uint64_t count, size_t size)
{
    void *memory = allocate(from, count * size);
    if (memory)
        memset(memory, 0, (size_t)count * size);
    return memory;
}

static void release(const ecz_container *from, void *memory)
{
    if (memory)
        from->allocator.release(from->allocator.user, memory);
}

/* A fuzzer would never get past a checksum. */
static int is_damaged(uint32_t found, uint32_t expected)
{
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
    (void)found;
    (void)expected;
    return 0;
#else
    return found != expected;
#endif
}

/* --- the meta block --- */

static size_t left_in(const reader *in)
{
    return (size_t)(in->end - in->at);
}

static const uint8_t *take(reader *in, uint64_t size)
{
    const uint8_t *found = in->at;
    if (size > left_in(in)) {
        in->failed = 1;
        in->at = in->end;
        return NULL;
    }
    in->at += size;
    return found;
}

static uint64_t number(reader *in)
{
    uint64_t value = 0;
    for (unsigned shift = 0; shift < 63; shift += 7) {
        const uint8_t *byte = take(in, 1);
        if (!byte)
            return 0;
        value |= (uint64_t)(*byte & 127) << shift;
        if (*byte < 128)
            return value;
    }
    in->failed = 1;
    return 0;
}

static uint32_t fixed32(reader *in)
{
    const uint8_t *found = take(in, 4);
    return found ? ecz_load32(found) : 0;
}

static int parse_table(reader *in, ecz_table *table)
{
    uint64_t base = number(in), alphabet = number(in), splits = number(in), common = splits ? number(in) : 0;
    unsigned used = 0, many = 0;
    if (in->failed || base > 255 || alphabet < 2 || alphabet > 256)
        return ECZ_MALFORMED;
    const uint8_t *levels = take(in, alphabet);
    if (!levels)
        return ECZ_MALFORMED;
    table->longest = common >= LONG_PHRASES ? ECZ_LONG_PHRASE_VALUES : ECZ_PHRASE_VALUES;
    common -= common >= LONG_PHRASES ? LONG_PHRASES : 0;
    for (unsigned index = 0; index < alphabet; index++) {
        if (levels[index] > MAX_LEVEL)
            return ECZ_MALFORMED;
        used += levels[index] > 0;
        many += common > 0 && levels[index] >= common;
    }
    if (used < 2 || splits > ecz_most_splits(used, many, table->longest))
        return ECZ_MALFORMED;
    table->levels = levels;
    table->alphabet = (uint16_t)alphabet;
    table->base = (uint8_t)base;
    table->splits = (uint8_t)splits;
    table->common = (uint8_t)common;
    return ECZ_OK;
}

static unsigned class_of(const plane *from, unsigned row_level, unsigned column_level)
{
    unsigned sum = row_level + column_level, highest = from->classes - 1;
    unsigned found = sum > CLASS_BIAS ? sum - CLASS_BIAS : 0;
    return found < highest ? found : highest;
}

static int parse_block(reader *in, const ecz_container *from, block *found, uint64_t count)
{
    uint64_t table = number(in), stored = number(in);
    if (in->failed || table >= from->table_count || stored > MAX_STREAM_BYTES * 2u)
        return ECZ_MALFORMED;
    unsigned splits = from->tables[table].splits, longest = from->tables[table].longest;
    uint64_t phrases = splits ? number(in) : count;
    if (phrases > count || phrases > 8 * stored || phrases * (splits ? longest : 1) < count)
        return ECZ_MALFORMED;
    found->table = (size_t)table;
    found->count = (size_t)count;
    found->stored = (size_t)stored;
    found->phrases = (size_t)phrases;
    return ECZ_OK;
}

static int parse_map(reader *in, plane *found, uint64_t count, uint64_t *sizes)
{
    uint64_t of_rows[MAX_CLASS_LEVEL + 1] = {0}, of_columns[MAX_CLASS_LEVEL + 1] = {0};
    uint64_t rows = number(in), columns = number(in);
    if (rows == 0 || columns == 0 || rows > count || columns > count / rows || count % (rows * columns))
        return ECZ_MALFORMED;
    found->row_levels = take(in, rows);
    found->column_levels = take(in, columns);
    if (in->failed)
        return ECZ_MALFORMED;
    for (uint64_t row = 0; row < rows; row++) {
        if (found->row_levels[row] > MAX_CLASS_LEVEL)
            return ECZ_MALFORMED;
        of_rows[found->row_levels[row]]++;
    }
    for (uint64_t column = 0; column < columns; column++) {
        if (found->column_levels[column] > MAX_CLASS_LEVEL)
            return ECZ_MALFORMED;
        of_columns[found->column_levels[column]]++;
    }
    found->rows = (size_t)rows;
    found->columns = (size_t)columns;
    for (unsigned row = 0; row <= MAX_CLASS_LEVEL; row++)
        for (unsigned column = 0; column <= MAX_CLASS_LEVEL; column++)
            sizes[class_of(found, row, column)] += of_rows[row] * of_columns[column] * (count / (rows * columns));
    return ECZ_OK;
}

static int parse_plane(reader *in, const ecz_container *from, uint64_t count, plane *found)
{
    uint64_t sizes[ECZ_CLASSES] = {0};
    memset(found, 0, sizeof *found);
    uint64_t mode = number(in), value = number(in); /* stored length, or classes */
    if (in->failed)
        return ECZ_MALFORMED;
    if (mode != HUFFMAN) {
        int raw = mode == RAW && value == count;
        int packed = mode == DEFLATE && value <= MAX_STREAM_BYTES * 2u && DEFLATE_MAX_RATIO * value >= count;
        found->mode = (unsigned)mode;
        found->stored = (size_t)value;
        return raw || packed ? ECZ_OK : ECZ_MALFORMED;
    }
    if (value < 1 || value > ECZ_CLASSES)
        return ECZ_MALFORMED;
    found->mode = HUFFMAN;
    found->classes = (unsigned)value;
    sizes[0] = count;
    if (value > 1) {
        sizes[0] = 0;
        if (parse_map(in, found, count, sizes))
            return ECZ_MALFORMED;
    }
    for (unsigned index = 0; index < found->classes; index++)
        if (sizes[index]) {
            block *next = &found->blocks[found->block_count++];
            if (parse_block(in, from, next, sizes[index]))
                return ECZ_MALFORMED;
            found->stored += next->stored;
        }
    return in->failed ? ECZ_MALFORMED : ECZ_OK;
}

static int parse_copy(reader *in, ecz_container *into, uint64_t count, stream *found, size_t index)
{
    uint64_t source = number(in), rows = number(in);
    if (in->failed || source >= index || !into->streams[source].planes || into->streams[source].count != count ||
        rows < 1 || rows > count || count % rows)
        return ECZ_MALFORMED;
    found->source = (size_t)source;
    found->rows = (size_t)rows;
    found->count = (size_t)count;
    found->width = into->streams[source].width;
    return ECZ_OK;
}

/* room: bytes of the payload from data on. */
static int parse_stream(reader *in, ecz_container *into, size_t index, const uint8_t *data, size_t room)
{
    stream *found = &into->streams[index];
    uint64_t count = number(in), width = number(in), stored = 0;
    if (in->failed)
        return ECZ_MALFORMED;
    if (width == 0)
        return parse_copy(in, into, count, found, index);
    if ((width != 1 && width != 2 && width != 4 && width != 8) || count < 1 || count > MAX_STREAM_BYTES / width)
        return ECZ_MALFORMED;
    found->planes = in->at;
    found->data = data;
    found->count = (size_t)count;
    found->width = (uint32_t)width;
    for (unsigned number_of_plane = 0; number_of_plane < width; number_of_plane++) {
        plane each;
        if (parse_plane(in, into, count, &each))
            return ECZ_MALFORMED;
        stored += each.stored;
        if (each.block_count > into->pieces_left)
            return ECZ_MALFORMED;
        into->pieces_left -= each.block_count;
    }
    found->crc = fixed32(in);
    if (in->failed || stored > room)
        return ECZ_MALFORMED;
    found->stored = (size_t)stored;
    return ECZ_OK;
}

/* Read one code point of strict UTF-8; return the bytes that it takes, 0 where it is none. */
static unsigned code_point(const uint8_t *at, size_t size, uint32_t *point)
{
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned length = at[0] < 0x80 ? 1 : at[0] >> 5 == 6 ? 2 : at[0] >> 4 == 14 ? 3 : at[0] >> 3 == 30 ? 4 : 0;
    if (length == 0 || length > size)
        return 0;
    *point = length == 1 ? at[0] : at[0] & (0x7Fu >> length);
    for (unsigned index = 1; index < length; index++) {
        if (at[index] >> 6 != 2)
            return 0;
        *point = *point << 6 | (at[index] & 63u);
    }
    int surrogate = *point >= 0xD800 && *point <= 0xDFFF;
    return *point < least[length] || *point > 0x10FFFF || surrogate ? 0 : length;
}

static int is_plain_name(const uint8_t *name, size_t size)
{
    static const uint32_t refused[][2] = {{0x00, 0x1F},     {0x2F, 0x2F},     {0x5C, 0x5C},     {0x7F, 0x9F},
                                          {0x200B, 0x200F}, {0x2028, 0x202E}, {0x2060, 0x206F}, {0xFEFF, 0xFEFF}};
    if (size < 1 || size > MAX_NAME_BYTES || name[0] == '.')
        return 0;
    while (size > 0) {
        uint32_t point = 0;
        unsigned length = code_point(name, size, &point);
        if (length == 0)
            return 0;
        for (size_t index = 0; index < sizeof refused / sizeof refused[0]; index++)
            if (point >= refused[index][0] && point <= refused[index][1])
                return 0;
        name += length;
        size -= length;
    }
    return 1;
}

static int parse_segments(reader *in, ecz_container *into, entry *file)
{
    uint64_t count = number(in), end = 0;
    if (in->failed || count > into->pieces_left || count > left_in(in) / 3)
        return ECZ_MALFORMED;
    into->pieces_left -= (size_t)count;
    file->segments = allocate_zeroed(into, count, sizeof *file->segments);
    if (!file->segments)
        return ECZ_NO_MEMORY;
    file->segment_count = (size_t)count;
    for (size_t index = 0; index < count; index++) {
        segment *each = &file->segments[index];
        uint64_t gap = number(in), length = number(in), from = number(in);
        if (in->failed || from >= into->stream_count)
            return ECZ_MALFORMED;
        stream *source = &into->streams[from];
        if (length < 1 || length > source->left || gap > file->length || end + gap + length > file->length)
            return ECZ_MALFORMED;
        each->gap = gap;
        each->length = (size_t)length;
        each->stream = (size_t)from;
        each->offset = source->count * source->width - source->left;
        source->left -= (size_t)length;
        end += gap + length;
    }
    return ECZ_OK;
}

static int parse_file(reader *in, ecz_container *into, size_t index)
{
    entry *file = &into->files[index];
    uint64_t size = number(in);
    const uint8_t *name = take(in, size);
    if (in->failed)
        return ECZ_MALFORMED;
    if (index == 0 ? size != 0 : !is_plain_name(name, (size_t)size))
        return ECZ_MALFORMED;
    memcpy(file->name, name, (size_t)size);
    for (size_t other = 0; other < index; other++)
        if (strcmp(into->files[other].name, file->name) == 0)
            return ECZ_MALFORMED;
    file->length = number(in);
    file->crc = fixed32(in);
    if (in->failed || (file->length == 0 && index > 0))
        return ECZ_MALFORMED;
    return parse_segments(in, into, file);
}

static int parse_streams(reader *in, ecz_container *into, const uint8_t *data, size_t size)
{
    uint64_t count = number(in);
    if (in->failed || count > MAX_PIECES || count > left_in(in) / 4)
        return ECZ_MALFORMED;
    into->streams = allocate_zeroed(into, count, sizeof *into->streams);
    if (!into->streams)
        return ECZ_NO_MEMORY;
    into->stream_count = (size_t)count;
    into->pieces_left = MAX_PIECES - (size_t)count;
    size_t at = 0;
    for (size_t index = 0; index < count; index++) {
        if (parse_stream(in, into, index, data + at, size - at))
            return ECZ_MALFORMED;
        at += into->streams[index].stored;
        into->streams[index].left = into->streams[index].count * into->streams[index].width;
    }
    return at == size ? ECZ_OK : ECZ_MALFORMED;
}

static int parse_tables(reader *in, ecz_container *into)
{
    uint64_t count = number(in);
    if (in->failed || count > MAX_TABLES)
        return ECZ_MALFORMED;
    into->tables = allocate_zeroed(into, count, sizeof *into->tables);
    if (!into->tables)
        return ECZ_NO_MEMORY;
    into->codes = allocate_zeroed(into, count, sizeof *into->codes);
    if (!into->codes)
        return ECZ_NO_MEMORY;
    into->table_count = (size_t)count;
    for (size_t index = 0; index < count; index++) {
        const ecz_table *table = &into->tables[index];
        if (parse_table(in, &into->tables[index]))
            return ECZ_MALFORMED;
        into->longest = table->longest > into->longest ? table->longest : into->longest;
    }
    return ECZ_OK;
}

static int parse_files(reader *in, ecz_container *into, uint64_t most)
{
    uint64_t count = number(in), gaps = 0, total = 0;
    if (in->failed || count < 1 || count > MAX_FILES || count > left_in(in) / 7)
        return ECZ_MALFORMED;
    into->files = allocate_zeroed(into, count, sizeof *into->files);
    if (!into->files)
        return ECZ_NO_MEMORY;
    into->file_count = (size_t)count;
    for (size_t index = 0; index < count; index++) {
        entry *file = &into->files[index];
        int status = parse_file(in, into, index);
        if (status)
            return status;
        if (file->length > most - total)
            return ECZ_MALFORMED;
        total += file->length;
        file->skeleton = gaps;
        gaps += file->length;
        for (size_t each = 0; each < file->segment_count; each++)
            gaps -= file->segments[each].length;
    }
    for (size_t index = 0; index < into->stream_count; index++)
        if (into->streams[index].left)
            return ECZ_MALFORMED;
    into->skeleton = into->meta + (in->at - into->meta);
    return gaps == left_in(in) ? ECZ_OK : ECZ_MALFORMED;
}

static uint64_t load64(const uint8_t *at)
{
    return (uint64_t)ecz_load32(at) | (uint64_t)ecz_load32(at + 4) << 32;
}

static int parse(ecz_container *into, const uint8_t *data, size_t size)
{
    static const uint8_t signature[8] = {0x89, 'E', 'C', 'Z', '\r', '\n', 0x1A, '\n'}, zeros[4] = {0};
    if (size < sizeof signature || memcmp(data, signature, sizeof signature) != 0)
        return ECZ_NOT_ECZ;
    if (size < PREFIX_BYTES)
        return ECZ_MALFORMED;
    if (ecz_load32(data + 8) != VERSION)
        return ECZ_VERSION;
    uint64_t offset = load64(data + 16), stored = ecz_load32(data + 24), raw = ecz_load32(data + 28);
    if (offset < PREFIX_BYTES || offset > size || stored != size - offset)
        return ECZ_MALFORMED;
    uint64_t large = META_MAX_RATIO * (uint64_t)size;
    if (raw > MAX_META_BYTES || raw > DEFLATE_MAX_RATIO * stored || raw > (large > SMALL_META_BYTES ? large : SMALL_META_BYTES))
        return ECZ_MALFORMED;
    uint32_t crc = ecz_crc_update(&into->crc, 0, data, CRC_OFFSET);
    crc = ecz_crc_update(&into->crc, crc, zeros, sizeof zeros);
    crc = ecz_crc_update(&into->crc, crc, data + CRC_OFFSET + 4, PREFIX_BYTES - CRC_OFFSET - 4);
    crc = ecz_crc_update(&into->crc, crc, data + offset, (size_t)stored);
    if (is_damaged(crc, ecz_load32(data + CRC_OFFSET)))
        return ECZ_CHECKSUM;
    into->meta = allocate(into, raw);
    if (!into->meta)
        return ECZ_NO_MEMORY;
    int status = ecz_inflate(data + offset, (size_t)stored, into->meta, (size_t)raw);
    if (status)
        return status;
    reader in = {into->meta, into->meta + raw, 0};
    uint64_t lane_phrases = number(&in);
    if (in.failed || lane_phrases < MIN_LANE_PHRASES || lane_phrases > MAX_LANE_PHRASES)
        return ECZ_MALFORMED;
    into->lane_phrases = (size_t)lane_phrases;
    status = parse_tables(&in, into);
    if (!status)
        status = parse_streams(&in, into, data + PREFIX_BYTES, (size_t)offset - PREFIX_BYTES);
    return status ? status : parse_files(&in, into, DEFLATE_MAX_RATIO * (uint64_t)size);
}

int ecz_open(const uint8_t *data, size_t size, const ecz_allocator *allocator, ecz_container **container)
{
    *container = NULL;
    ecz_container *into = allocator->allocate(allocator->user, sizeof *into);
    if (!into)
        return ECZ_NO_MEMORY;
    memset(into, 0, sizeof *into);
    into->allocator = *allocator;
    ecz_crc_init(&into->crc);
    int status = parse(into, data, size);
    if (status)
        ecz_close(into);
    else
        *container = into;
    return status;
}

void ecz_close(ecz_container *container)
{
    if (!container)
        return;
    for (size_t index = 0; index < container->file_count; index++)
        release(container, container->files[index].segments);
    for (size_t index = 0; index < container->stream_count; index++)
        release(container, container->streams[index].decoded);
    for (size_t index = 0; index < container->table_count; index++)
        release(container, container->codes[index]);
    release(container, container->files);
    release(container, container->streams);
    release(container, container->codes);
    release(container, container->tables);
    release(container, container->meta);
    ecz_allocator allocator = container->allocator;
    allocator.release(allocator.user, container);
}

/* --- the payload --- */

/* Put the values of the classes, which lie one after the other, in the order of the plane. */
static void order_runs(const plane *from, const uint8_t *values, uint8_t *out, size_t count, size_t step)
{
    const uint8_t *next[ECZ_CLASSES];
    size_t run = count / (from->rows * from->columns), sizes[ECZ_CLASSES] = {0};
    for (size_t row = 0; row < from->rows; row++)
        for (size_t column = 0; column < from->columns; column++)
            sizes[class_of(from, from->row_levels[row], from->column_levels[column])] += run;
    for (unsigned index = 0; index < from->classes; index++) {
        next[index] = values;
        values += sizes[index];
    }
    for (size_t row = 0; row < from->rows; row++)
        for (size_t column = 0; column < from->columns; column++) {
            const uint8_t **source = &next[class_of(from, from->row_levels[row], from->column_levels[column])];
            for (size_t each = 0; each < run; each++, out += step)
                *out = *(*source)++;
        }
}

static int decode_huffman(ecz_container *from, const plane *what, const uint8_t *data, uint8_t *scratch, uint8_t *out)
{
    for (unsigned index = 0; index < what->block_count; index++) {
        const block *each = &what->blocks[index];
        ecz_code **code = &from->codes[each->table];
        if (!*code) {
            *code = allocate(from, ecz_code_size(&from->tables[each->table]));
            if (!*code)
                return ECZ_NO_MEMORY;
            ecz_build_code(&from->tables[each->table], *code);
        }
        int status = ecz_decode_block(*code, data, each->stored, each->phrases, from->lane_phrases, scratch, out,
                                      each->count);
        if (status)
            return status;
        data += each->stored;
        out += each->count;
    }
    return ECZ_OK;
}

/* Decode a plane into every step-th byte of out; buffer holds count bytes. */
static int decode_plane(ecz_container *from, const plane *what, const uint8_t *data, uint8_t *scratch, uint8_t *buffer,
                        uint8_t *out, size_t count, size_t step)
{
    int direct = step == 1 && what->classes <= 1;
    uint8_t *to = direct ? out : buffer;
    int status = ECZ_OK;
    if (what->mode == RAW)
        memcpy(to, data, count);
    else if (what->mode == DEFLATE)
        status = ecz_inflate(data, what->stored, to, count);
    else
        status = decode_huffman(from, what, data, scratch, to);
    if (status || direct)
        return status;
    if (what->classes > 1)
        order_runs(what, buffer, out, count, step);
    else
        for (size_t index = 0; index < count; index++)
            out[index * step] = buffer[index];
    return ECZ_OK;
}

static int decode_planes(ecz_container *from, const stream *what, uint8_t *memory, uint8_t *out)
{
    /* The plane table was checked when the file was opened. */
    reader in = {what->planes, from->skeleton, 0};
    const uint8_t *data = what->data;
    uint8_t *buffer = memory + ecz_scratch_size(from->lane_phrases, from->longest);
    if (is_damaged(ecz_crc_update(&from->crc, 0, what->data, what->stored), what->crc))
        return ECZ_CHECKSUM;
    for (uint32_t index = 0; index < what->width; index++) {
        plane each;
        int status = parse_plane(&in, from, what->count, &each);
        if (!status)
            status = decode_plane(from, &each, data, memory, buffer, out + index, what->count, what->width);
        if (status)
            return status;
        data += each.stored;
    }
    return ECZ_OK;
}

static int decode_stream(ecz_container *from, const stream *what, uint8_t *out)
{
    uint8_t *memory = allocate(from, (uint64_t)ecz_scratch_size(from->lane_phrases, from->longest) + what->count);
    if (!memory)
        return ECZ_NO_MEMORY;
    int status = decode_planes(from, what, memory, out);
    release(from, memory);
    return status;
}

static int decode_copy(ecz_container *from, const stream *what, uint8_t *out)
{
    const stream *source = &from->streams[what->source];
    size_t width = what->width, columns = what->count / what->rows;
    if (what->rows == 1)
        return decode_stream(from, source, out);
    uint8_t *matrix = allocate(from, (uint64_t)what->count * width);
    if (!matrix)
        return ECZ_NO_MEMORY;
    int status = decode_stream(from, source, matrix);
    if (!status)
        for (size_t column = 0; column < columns; column++)
            for (size_t row = 0; row < what->rows; row++, out += width)
                memcpy(out, matrix + (row * columns + column) * width, width);
    release(from, matrix);
    return status;
}

static size_t stream_size(const stream *what)
{
    return what->count * what->width;
}

static int read_whole(ecz_container *from, size_t index, uint8_t *out)
{
    const stream *what = &from->streams[index];
    return what->planes ? decode_stream(from, what, out) : decode_copy(from, what, out);
}

/* Copy a part of a stream. It is kept decoded until its last part was read: it may have very many. */
static int read_part(ecz_container *from, const segment *part, uint8_t *out)
{
    stream *what = &from->streams[part->stream];
    size_t size = stream_size(what);
    if (part->length == size)
        return read_whole(from, part->stream, out);
    if (!what->decoded) {
        what->decoded = allocate(from, size);
        if (!what->decoded)
            return ECZ_NO_MEMORY;
        int status = read_whole(from, part->stream, what->decoded);
        if (status) {
            release(from, what->decoded);
            what->decoded = NULL;
            return status;
        }
    }
    memcpy(out, what->decoded + part->offset, part->length);
    if (part->offset + part->length == size) {
        release(from, what->decoded);
        what->decoded = NULL;
    }
    return ECZ_OK;
}

int ecz_read_file(ecz_container *container, size_t number_of_file, uint8_t *out, size_t size)
{
    if (number_of_file >= container->file_count || container->files[number_of_file].length != size)
        return ECZ_BAD_ARGUMENT;
    const entry *file = &container->files[number_of_file];
    const uint8_t *skeleton = container->skeleton + file->skeleton;
    uint8_t *at = out;
    for (size_t index = 0; index < file->segment_count; index++) {
        const segment *each = &file->segments[index];
        if (each->gap)
            memcpy(at, skeleton, (size_t)each->gap);
        skeleton += each->gap;
        at += each->gap;
        int status = read_part(container, each, at);
        if (status)
            return status;
        at += each->length;
    }
    size_t rest = size - (size_t)(at - out);
    if (rest)
        memcpy(at, skeleton, rest);
    return is_damaged(ecz_crc_update(&container->crc, 0, out, size), file->crc) ? ECZ_CHECKSUM : ECZ_OK;
}

int ecz_read_stream(ecz_container *container, size_t number_of_stream, uint8_t *out, size_t size)
{
    if (number_of_stream >= container->stream_count || ecz_stream_size(container, number_of_stream) != size)
        return ECZ_BAD_ARGUMENT;
    return read_whole(container, number_of_stream, out);
}

size_t ecz_file_count(const ecz_container *container)
{
    return container->file_count;
}

const char *ecz_file_name(const ecz_container *container, size_t number_of_file)
{
    return number_of_file < container->file_count ? container->files[number_of_file].name : NULL;
}

uint64_t ecz_file_size(const ecz_container *container, size_t number_of_file)
{
    return number_of_file < container->file_count ? container->files[number_of_file].length : 0;
}

size_t ecz_stream_count(const ecz_container *container)
{
    return container->stream_count;
}

size_t ecz_stream_size(const ecz_container *container, size_t number_of_stream)
{
    return number_of_stream < container->stream_count ? stream_size(&container->streams[number_of_stream]) : 0;
}

const char *ecz_message(int status)
{
    switch (status) {
    case ECZ_OK:
        return "no error";
    case ECZ_NOT_ECZ:
        return "not an .ecz file";
    case ECZ_VERSION:
        return "a version of the .ecz format that is not known";
    case ECZ_MALFORMED:
        return "malformed or truncated .ecz file";
    case ECZ_CHECKSUM:
        return "damaged .ecz file: checksum mismatch";
    case ECZ_NO_MEMORY:
        return "not enough memory";
    default:
        return "no such file or stream, or a buffer of another size";
    }
}
