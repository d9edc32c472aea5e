/* Who may write to the state's files, on storage that hosts share: one table, which nvram.c asks.
 *
 *     ours     this vTPM alone, which has the lock
 *     let go   another host's may have the lock
 *     beset    so it may; and what has served the state may write once more without it
 *     doubted  the lock is here; but nothing depends on what the files say any more
 *
 * Whether this vTPM writes is custody's. docs/ARCHITECTURE.md has the table, and
 * tests/c/test_sharing.c walks all of it.
 */
#pragma once

enum sharing {
    SHARING_OURS,
    SHARING_LET_GO,
    SHARING_BESET,
    SHARING_DOUBTED,
    SHARINGS,
};

enum sharing_event {
    SHARING_UNLOCKED, /* the lock is let go, or was another's from the start */
    SHARING_LOCKED,   /* it is had, and the files are as they are here */
    SHARING_WARNED,   /* another program has served what comes */
    SHARING_EVENTS,
};

/* Who may write after an event, which is one that there can be. */
enum sharing sharing_after(enum sharing_event event, enum sharing now);
