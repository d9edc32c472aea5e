/* free() and realloc() for the whole process, libtpms and libcrypto included: memory is overwritten
 * first.
 *
 * libtpms keeps state, keys and authorisation values in ordinary allocations and frees them as they
 * are. These take the C library's place in the symbol table; allocation stays its own.
 */
#include "wipe.h"

#include <malloc.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "written.h"

enum {
    PAGE_BYTES = 4096,
};

extern void __libc_free(void *memory);
extern void *__libc_realloc(void *memory, size_t n_bytes);

void wipe_init(void)
{
    /* The kernel gets the pages back at once, and gives them to nobody with their content. A fixed
     * threshold, as the C library would raise it. */
    mallopt(M_MMAP_THRESHOLD, WIPE_UNMAPPED_BYTES_MIN);
    mallopt(M_TRIM_THRESHOLD, WIPE_KEPT_BYTES_MAX);
    /* One arena: the second thread would cost memory, and the two never allocate at once. */
    mallopt(M_ARENA_MAX, 1);
}

static bool is_empty(const uint8_t *bytes, size_t n_bytes)
{
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, n_bytes - 1) == 0;
}

/* A page that was never written is none until it is: libtpms allocates for the largest state. */
static void wipe(uint8_t *bytes, size_t n_bytes)
{
    while (n_bytes > 0) {
        size_t n = PAGE_BYTES - (uintptr_t)bytes % PAGE_BYTES;
        if (n > n_bytes)
            n = n_bytes;
        if (n < PAGE_BYTES || !is_empty(bytes, n))
            explicit_bzero(bytes, n);
        bytes += n;
        n_bytes -= n;
    }
}

/* Of all that allocates. Without mremap(), realloc() leaves a mapping as it is.
 * sandbox: brk mmap(arg2 lacks PROT_EXEC, arg4 == -1) munmap mremap=ENOMEM */
void free(void *memory)
{
    if (!memory)
        return;
    size_t n_bytes = malloc_usable_size(memory);
    size_t written_bytes = written_take(memory, n_bytes);
    if (n_bytes < WIPE_UNMAPPED_BYTES_MIN)
        wipe(memory, written_bytes);
    __libc_free(memory);
}

/* The C library's would leave what was in memory that it moves, or takes the end of. */
void *realloc(void *memory, size_t n_bytes)
{
    size_t before_bytes = memory ? malloc_usable_size(memory) : 0;

    written_take(memory, 0); /* it may be written to, once it has moved */
    if (memory && n_bytes <= before_bytes) {
        if (before_bytes < WIPE_UNMAPPED_BYTES_MIN)
            wipe((uint8_t *)memory + n_bytes, before_bytes - n_bytes);
        return __libc_realloc(memory, n_bytes); /* where it is */
    }
    void *moved = malloc(n_bytes);
    if (moved && memory) {
        memcpy(moved, memory, before_bytes);
        free(memory);
    }
    return moved;
}
