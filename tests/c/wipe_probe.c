/* What is left of memory that was freed by the engine's free() and realloc(). It is built by
 * tests/unit/test_wipe.py, without sanitizers, which have a free() of their own.
 *
 *     wipe_probe free|shrink|grow SIZE     prints how much of the pattern is left, in bytes
 *     wipe_probe noted SIZE                the same, of the half that was written and noted as such
 *     wipe_probe untouched SIZE            prints how many pages freeing made
 */
#include <malloc.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/wipe.h"
#include "engine/written.h"

enum {
    PATTERN = 0xa5,
    PAGE_BYTES = 4096,
};

/* The compiler must not know what happens to it. */
static uint8_t *volatile block;

static uint8_t *allocate(size_t n_bytes)
{
    uint8_t *bytes = malloc(n_bytes);

    if (!bytes)
        exit(1);
    block = bytes;
    return block;
}

/* Whole words of it, as the C library's own pointers may have such a byte. */
static size_t count_pattern(const uint8_t *bytes, size_t n_bytes)
{
    uint64_t word, pattern;
    size_t n = 0;

    memset(&pattern, PATTERN, sizeof(pattern));
    for (size_t i = 0; i + sizeof(word) <= n_bytes; i += sizeof(word)) {
        memcpy(&word, bytes + i, sizeof(word));
        n += word == pattern;
    }
    return n * sizeof(word);
}

static size_t dirty_kib(void)
{
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    size_t kib = 0;
    char line[256];

    while (file && fgets(line, sizeof(line), file))
        sscanf(line, "Private_Dirty: %zu", &kib);
    if (file)
        fclose(file);
    return kib;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    size_t n_bytes = strtoul(argv[2], NULL, 10), kept = 0;
    wipe_init();
    dirty_kib(); /* what the C library needs for that is there from now on */
    uint8_t *bytes = allocate(n_bytes);
    uint8_t *barrier = malloc(1); /* a block at the heap's end would be given back */
    uintptr_t address = (uintptr_t)bytes;
    if (strcmp(argv[1], "untouched") == 0) {
        size_t before = dirty_kib();
        free(block);
        printf("%zu\n", (dirty_kib() - before) * 1024 / PAGE_BYTES);
        return 0;
    }
    bool is_noted = strcmp(argv[1], "noted") == 0;
    memset(bytes, PATTERN, is_noted ? n_bytes / 2 : malloc_usable_size(bytes));
    if (is_noted)
        written_note(bytes, n_bytes / 2);
    if (is_noted || strcmp(argv[1], "free") == 0) {
        free(block);
    } else if (strcmp(argv[1], "shrink") == 0) {
        kept = n_bytes / 2;
        block = realloc(block, kept);
        if (count_pattern(block, kept) != kept)
            return 1;
        bytes = block;
    } else {
        block = realloc(block, 2 * n_bytes);
        if (count_pattern(block, n_bytes) != n_bytes || (uintptr_t)block == address)
            return 1;
    }
    printf("%zu\n", count_pattern((const uint8_t *)address + kept, n_bytes - kept));
    free(barrier);
    return 0;
}
