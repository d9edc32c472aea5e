/* Freed memory is overwritten, whoever frees it. */
#pragma once

enum {
    /* From this size on memory goes back to the kernel. What libtpms marshals its permanent state
     * into at each commit is smaller, 271 KB in version 0.9: page faults were a third of a commit.
     */
    WIPE_UNMAPPED_BYTES_MIN = 320 << 10,
    /* So much stays at the heap's end, for the next commit. */
    WIPE_KEPT_BYTES_MAX = 512 << 10,
};

/* Set up the C library's allocator; before the first allocation that matters. */
void wipe_init(void);
