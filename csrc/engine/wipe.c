/* free() for the whole process, libtpms and libcrypto included: memory is overwritten first.
 *
 * libtpms keeps state, keys and authorisation values in ordinary allocations and frees them as they
 * are. This takes free()'s place in the symbol table; allocation stays the C library's.
 */
#include "wipe.h"

#include <malloc.h>
#include <string.h>

extern void __libc_free(void *memory);

void wipe_init(void)
{
    /* From this size on the kernel gets the pages back at once, and gives them to nobody with
     * their content. A fixed threshold, as the C library would raise it. */
    mallopt(M_MMAP_THRESHOLD, WIPE_UNMAPPED_BYTES_MIN);
    /* One arena: the second thread would cost memory, and the two never allocate at once. */
    mallopt(M_ARENA_MAX, 1);
}

/* Of all that allocates. Without mremap(), realloc() copies and frees.
 * sandbox: brk mmap(arg2 lacks PROT_EXEC, arg4 == -1) munmap mremap=ENOMEM */
void free(void *memory)
{
    if (!memory)
        return;
    size_t n_bytes = malloc_usable_size(memory);
    if (n_bytes < WIPE_UNMAPPED_BYTES_MIN)
        explicit_bzero(memory, n_bytes);
    __libc_free(memory);
}
