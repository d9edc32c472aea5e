/* Storage that stalls: it is waited for, for ever, and a person is told.
 *
 * A file system that is frozen for a snapshot, or whose server restarts, holds up whatever is asked
 * of it. Nothing is lost meanwhile, and to give up would cost the guest its TPM; but who wonders
 * why the guest stands still should find one line that says so, and one when it is over.
 *
 * It is told by a thread that does nothing else. Each of the others may be the one that waits: the
 * guest's and vtpmd's for what they store, the control channel's for those two, at the end all that
 * are left, and the one that folds for what it writes beside all of them. It sleeps while nothing
 * is asked of the storage, and wakes once per limit while something is.
 */
#pragma once

#include "io.h"

enum {
    WATCHDOG_LIMIT_MS = 10000,
};

struct watchdog;

/* Watch what is asked of `io`, which `place` is for people: a text that stays. Returns 0 or a
 * negative errno. */
int watchdog_new(struct watchdog **watchdog, struct io *io, const char *place, int limit_ms);

/* End the thread, and free it. */
void watchdog_free(struct watchdog *watchdog);

/* The same storage, watched. It is for any thread. */
struct io *watchdog_io(struct watchdog *watchdog);
