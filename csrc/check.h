/* Assertions that stay on in every build: what must hold if this program is right.
 *
 * They are for the programmer's errors only. What the guest, QEMU, a disk or a peer can cause is
 * handled where it is read, with an error.
 */
#pragma once

#include <stdio.h>
#include <stdlib.h>

/* sandbox: write rt_sigprocmask=0 getpid gettid tgkill(arg0 == getpid(), arg2 == SIGABRT) */
#define check(condition)                                                                           \
    do {                                                                                           \
        if (__builtin_expect(!(condition), 0)) {                                                   \
            fprintf(stderr, "%s:%d: %s: check failed: %s\n", __FILE__, __LINE__, __func__,         \
                    #condition);                                                                   \
            abort();                                                                               \
        }                                                                                          \
    } while (0)
