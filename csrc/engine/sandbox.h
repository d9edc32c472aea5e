/* What the engine gives up before it reads a byte from outside. */
#pragma once

#include "link_types.h"

/* Rule out new privileges, core dumps and tracing. What it was given beyond the descriptors of the
 * link, as a lock, is kept for as long as it lives. Returns 0 or a negative errno. */
int sandbox_enter(void);

/* What could be locked into memory. */
enum locked {
    LOCKED_NOTHING,
    LOCKED_PRESENT, /* what was mapped at the start, but not what comes later */
    LOCKED_ALL,
};

/* Keep state out of swap, as far as RLIMIT_MEMLOCK allows. */
enum locked sandbox_lock_memory(void);

/* From here on all threads have the system calls that the comments beside their places name, and
 * the process is killed (SIGSYS) by any other. All threads run by then. Returns 0 or a negative
 * errno. */
int sandbox_seal(void);
