/* Freed memory is overwritten, whoever frees it. */
#pragma once

enum {
    WIPE_UNMAPPED_BYTES_MIN = 64 << 10,
};

/* Set up the C library's allocator; before the first allocation that matters. */
void wipe_init(void);
