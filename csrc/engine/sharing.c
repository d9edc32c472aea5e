#include "sharing.h"

#include <string.h>

#include "check.h"

/* In their order. */
static const char sharing_letters[] = "OLBD";

/* What comes after each of them, by its letter; '-' cannot be. */
static const char sharing_rows[SHARING_EVENTS][SHARINGS + 1] = {
    [SHARING_UNLOCKED] = "LLBB",
    [SHARING_LOCKED] = "-OD-",
    [SHARING_WARNED] = "OBBD",
};

enum sharing sharing_after(enum sharing_event event, enum sharing now)
{
    const char *found = strchr(sharing_letters, sharing_rows[event][now]);

    check(found); /* it is none that there can be */
    return (enum sharing)(found - sharing_letters);
}
