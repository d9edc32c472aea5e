/* What the engine gives up before it reads a byte from outside. */
#pragma once

#include "link_types.h"

/* Close what was inherited beyond the descriptors of the link, rule out new privileges, core dumps
 * and tracing, and leave signals of the terminal to vtpmd. Returns 0 or a negative errno. */
int sandbox_enter(void);

/* Keep state out of swap, as far as RLIMIT_MEMLOCK allows. */
enum link_locked sandbox_lock_memory(void);

/* From here on all threads have the system calls that the comments beside their places name, and
 * the process is killed (SIGSYS) by any other. All threads run by then. Returns 0 or a negative
 * errno. */
int sandbox_seal(void);
