/* Whole files, SHA-256 (FIPS 180-4), and the check of a bundle's files. */
#define _GNU_SOURCE
#include "bench.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { BLOCK = 64, MAX_PATH_BYTES = 4096, HEX_DIGITS = 2 * SHA256_BYTES };

static const char *const COPY_AGAIN = "copy or build the bundle again";

static const uint32_t ROUND_CONSTANTS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotated(uint32_t word, int bits)
{
    return word >> bits | word << (32 - bits);
}

/* One round on the eight words of the work, the oldest of which becomes the newest. */
static void do_round(const uint32_t a, const uint32_t b, const uint32_t c, uint32_t *d, const uint32_t e,
                     const uint32_t f, const uint32_t g, uint32_t *h, uint32_t added)
{
    uint32_t first = *h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + (g ^ (e & (f ^ g))) + added;
    *d += first;
    *h = first + (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) | (c & (a | b)));
}

static void add_block(uint32_t state[8], const uint8_t *block)
{
    uint32_t words[64];
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int at = 0; at < 16; at++, block += 4)
        words[at] = (uint32_t)block[0] << 24 | (uint32_t)block[1] << 16 | (uint32_t)block[2] << 8 | block[3];
    for (int at = 16; at < 64; at++) {
        uint32_t low = words[at - 15], high = words[at - 2];
        words[at] = words[at - 16] + words[at - 7] + (rotated(low, 7) ^ rotated(low, 18) ^ low >> 3) +
                    (rotated(high, 17) ^ rotated(high, 19) ^ high >> 10);
    }
    for (int at = 0; at < 64; at += 8) { /* eight at a time, so that no word has to be moved */
        do_round(a, b, c, &d, e, f, g, &h, ROUND_CONSTANTS[at] + words[at]);
        do_round(h, a, b, &c, d, e, f, &g, ROUND_CONSTANTS[at + 1] + words[at + 1]);
        do_round(g, h, a, &b, c, d, e, &f, ROUND_CONSTANTS[at + 2] + words[at + 2]);
        do_round(f, g, h, &a, b, c, d, &e, ROUND_CONSTANTS[at + 3] + words[at + 3]);
        do_round(e, f, g, &h, a, b, c, &d, ROUND_CONSTANTS[at + 4] + words[at + 4]);
        do_round(d, e, f, &g, h, a, b, &c, ROUND_CONSTANTS[at + 5] + words[at + 5]);
        do_round(c, d, e, &f, g, h, a, &b, ROUND_CONSTANTS[at + 6] + words[at + 6]);
        do_round(b, c, d, &e, f, g, h, &a, ROUND_CONSTANTS[at + 7] + words[at + 7]);
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

void sha256_start(sha256 *hash)
{
    static const uint32_t initial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(hash->state, initial, sizeof initial);
    hash->length = 0;
}

void sha256_add(sha256 *hash, const uint8_t *data, size_t size)
{
    while (size) {
        size_t used = hash->length % BLOCK, part = BLOCK - used < size ? BLOCK - used : size;
        memcpy(hash->block + used, data, part);
        hash->length += part;
        data += part;
        size -= part;
        if (used + part == BLOCK)
            add_block(hash->state, hash->block);
    }
}

void sha256_finish(sha256 *hash, uint8_t digest[SHA256_BYTES])
{
    uint64_t bits = hash->length * 8;
    uint8_t length[8];
    for (int at = 0; at < 8; at++)
        length[at] = (uint8_t)(bits >> (56 - 8 * at));
    static const uint8_t end[BLOCK] = {0x80};
    sha256_add(hash, end, 1 + (BLOCK + 55 - hash->length % BLOCK) % BLOCK);
    sha256_add(hash, length, sizeof length);
    for (int at = 0; at < SHA256_BYTES; at++)
        digest[at] = (uint8_t)(hash->state[at / 4] >> (24 - 8 * (at % 4)));
}

uint8_t *read_file(const char *path, size_t *size, int code)
{
    FILE *file = fopen(path, "rb");
    struct stat found;
    if (!file || fstat(fileno(file), &found) || !S_ISREG(found.st_mode))
        fail(code, "check the path", "cannot read %s: %s", path, file ? "not a plain file" : strerror(errno));
    *size = (size_t)found.st_size;
    uint8_t *data = allocate(*size + 1);
    if (fread(data, 1, *size, file) != *size)
        fail(code, "check the disk", "cannot read %s", path);
    fclose(file);
    data[*size] = 0;
    return data;
}

static int hex_value(char digit)
{
    return digit >= '0' && digit <= '9' ? digit - '0' : digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

/* Whether path is relative, without "." and ".." and empty parts, and of harmless characters. */
static int is_inside(const char *path)
{
    for (const char *part = path;; part++) {
        size_t length = strcspn(part, "/");
        if (!length || (length == 1 && part[0] == '.') || (length == 2 && part[0] == '.' && part[1] == '.'))
            return 0;
        for (size_t at = 0; at < length; at++)
            if ((unsigned char)part[at] < 32 || part[at] == '\\')
                return 0;
        part += length;
        if (!*part)
            return 1;
    }
}

const char *parse_sum(const char *line, uint8_t digest[SHA256_BYTES], const char **path)
{
    for (int at = 0; at < HEX_DIGITS; at += 2) {
        int high = hex_value(line[at]), low = high < 0 ? -1 : hex_value(line[at + 1]);
        if (low < 0)
            return "it does not begin with a SHA-256";
        digest[at / 2] = (uint8_t)(high << 4 | low);
    }
    if (line[HEX_DIGITS] != ' ' || (line[HEX_DIGITS + 1] != ' ' && line[HEX_DIGITS + 1] != '*'))
        return "two spaces have to follow the SHA-256";
    *path = line + HEX_DIGITS + 2;
    return is_inside(*path) ? NULL : "its path is not one inside the bundle";
}

/* Leave the program unless folder/path is a plain file, reached without a link, of that digest. */
static void check_file(const char *folder, const char *path, const uint8_t digest[SHA256_BYTES])
{
    static uint8_t buffer[1 << 16];
    char place[MAX_PATH_BYTES];
    struct stat found;
    size_t start = (size_t)snprintf(place, sizeof place, "%s/", folder);
    if (start + strlen(path) >= sizeof place)
        fail(EXIT_DAMAGED, COPY_AGAIN, "%s: its path is too long", path);
    for (const char *part = path; part; part = strchr(part, '/') ? strchr(part, '/') + 1 : NULL) {
        size_t length = (size_t)(part - path) + strcspn(part, "/");
        snprintf(place + start, sizeof place - start, "%.*s", (int)length, path);
        if (lstat(place, &found))
            fail(EXIT_DAMAGED, COPY_AGAIN, "%s is missing", path);
        if (path[length] ? !S_ISDIR(found.st_mode) : !S_ISREG(found.st_mode))
            fail(EXIT_DAMAGED, COPY_AGAIN, "%s is not a plain file", path);
    }
    FILE *file = fopen(place, "rb");
    if (!file)
        fail(EXIT_DAMAGED, COPY_AGAIN, "%s cannot be read: %s", path, strerror(errno));
    sha256 hash;
    uint8_t actual[SHA256_BYTES];
    sha256_start(&hash);
    for (size_t got; (got = fread(buffer, 1, sizeof buffer, file)) > 0;)
        sha256_add(&hash, buffer, got);
    int broken = ferror(file);
    fclose(file);
    sha256_finish(&hash, actual);
    if (broken || memcmp(actual, digest, sizeof actual))
        fail(EXIT_DAMAGED, COPY_AGAIN, "%s was altered: its SHA-256 is not that in SHA256SUMS", path);
}

/* Whether a line of sums ends in path; each line has been checked by then. */
static int is_listed(char *const *lines, size_t count, const char *path)
{
    for (size_t at = 0; at < count; at++)
        if (!strcmp(lines[at] + HEX_DIGITS + 2, path))
            return 1;
    return 0;
}

/* Leave the program if below folder/path, which need not exist, lies a file that is not listed. */
static void check_listed(const char *folder, const char *path, char *const *lines, size_t count)
{
    char place[MAX_PATH_BYTES], inner[MAX_PATH_BYTES];
    snprintf(place, sizeof place, "%s/%s", folder, path);
    DIR *entries = opendir(place);
    for (struct dirent *entry; entries && (entry = readdir(entries));) {
        struct stat found;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (snprintf(inner, sizeof inner, "%s/%s", path, entry->d_name) >= (int)sizeof inner ||
            snprintf(place, sizeof place, "%s/%s", folder, inner) >= (int)sizeof place || lstat(place, &found))
            fail(EXIT_DAMAGED, COPY_AGAIN, "%s cannot be read", entry->d_name);
        if (S_ISDIR(found.st_mode))
            check_listed(folder, inner, lines, count);
        else if (!is_listed(lines, count, inner))
            fail(EXIT_DAMAGED, "remove it, or copy the bundle again", "%s is not in SHA256SUMS", inner);
    }
    if (entries)
        closedir(entries);
}

void check_files(const char *sums)
{
    size_t size, count = 0;
    char folder[MAX_PATH_BYTES] = ".";
    const char *end = strrchr(sums, '/');
    if (end)
        snprintf(folder, sizeof folder, "%.*s", (int)(end - sums), sums);
    char *text = (char *)read_file(sums, &size, EXIT_DAMAGED);
    char **lines = allocate((size / HEX_DIGITS + 1) * sizeof *lines);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        uint8_t digest[SHA256_BYTES];
        const char *path, *problem = parse_sum(line, digest, &path);
        if (problem)
            fail(EXIT_DAMAGED, COPY_AGAIN, "%s: the line \"%.100s\" is malformed: %s", sums, line, problem);
        check_file(folder, path, digest);
        lines[count++] = line;
    }
    if (!count)
        fail(EXIT_DAMAGED, COPY_AGAIN, "%s lists no file", sums);
    check_listed(folder, "lib", lines, count);
    free(lines);
    free(text);
}
