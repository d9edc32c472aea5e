/* What is left to write of several pieces. */
#pragma once

#include <stddef.h>
#include <sys/uio.h>

#include "check.h"

/* Take away the first `n_bytes` bytes, which have been written. */
static inline void vectors_advance(struct iovec **vectors, size_t *n_vectors, size_t n_bytes)
{
    while (*n_vectors > 0 && n_bytes >= (*vectors)->iov_len) {
        n_bytes -= (*vectors)->iov_len;
        (*vectors)++;
        (*n_vectors)--;
    }
    check(n_bytes == 0 || *n_vectors > 0);
    if (n_bytes > 0) {
        (*vectors)->iov_base = (char *)(*vectors)->iov_base + n_bytes;
        (*vectors)->iov_len -= n_bytes;
    }
}
