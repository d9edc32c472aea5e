#include "activity.h"

#include <string.h>

#include "check.h"

/* In their order. */
static const char activity_letters[] = "USC";

/* What comes after each of them, by its letter; '-' cannot be. */
static const char activity_rows[ACTIVITY_EVENTS][ACTIVITIES + 1] = {
    [ACTIVITY_STARTED] = "UUU", [ACTIVITY_CAME] = "C--", [ACTIVITY_RESET] = "USU",
    [ACTIVITY_WORKED] = "UUU",  [ACTIVITY_SAID] = "S--",
};

enum activity activity_after(enum activity_event event, enum activity now)
{
    const char *found = strchr(activity_letters, activity_rows[event][now]);

    check(found); /* it is none that there can be */
    return (enum activity)(found - activity_letters);
}
