#include "standing.h"

#include <string.h>

#include "check.h"

/* What comes after each place, and after each last commit, by the first letter; '-' cannot be. */
struct row {
    char place[STANDING_PLACES + 1], last[STANDING_LASTS + 1];
};

static const char places[] = "EFJBRH", lasts[] = "SDU";

static const struct row rows[STANDING_EVENTS] = {
    /* of                                          EFJBRH             SDU */
    [STANDING_LOADED] = {.place = "FF---F", .last = "S-U"},
    [STANDING_LOADED_ELSEWHERE] = {.place = "EE---H", .last = "S-U"},
    [STANDING_WRITTEN] = {.place = "FF---F", .last = "S-S"},
    [STANDING_NOT_WRITTEN] = {.place = "EE---H", .last = "S-U"},
    [STANDING_IN_ROOM] = {.place = "EE---E", .last = "S-U"},
    [STANDING_OPENING] = {.place = "-B----", .last = "S-U"},
    [STANDING_OPENED] = {.place = "---J--", .last = "S-U"},
    [STANDING_CLOSING] = {.place = "--BBR-", .last = "S-U"},
    [STANDING_CLOSED] = {.place = "---FF-", .last = "S-S"},
    [STANDING_SWITCHED] = {.place = "--JJ--", .last = "SSU"},
    [STANDING_NOT_SWITCHED] = {.place = "--BB--", .last = "SSU"},
    [STANDING_DEFERRED] = {.place = "--J---", .last = "D-D"},
    [STANDING_SYNCED] = {.place = "--J---", .last = "-S-"},
    [STANDING_NOT_SYNCED] = {.place = "--J---", .last = "-U-"},
    [STANDING_COMMITTED] = {.place = "EFJ---", .last = "SDS"},
    [STANDING_NOT_COMMITTED] = {.place = "EFJBRH", .last = "U-U"},
    [STANDING_UNSEEN] = {.place = "EEB--H", .last = "S-U"},
    [STANDING_ADOPTING] = {.place = "HHRRRH", .last = "S-U"},
    [STANDING_REMOVED] = {.place = "----H-", .last = "S-U"},
    [STANDING_ADOPTED] = {.place = "-----E", .last = "S-S"},
    [STANDING_ADOPTED_FILE] = {.place = "-----F", .last = "S-S"},
    [STANDING_NOT_ADOPTED] = {.place = "EEJBRH", .last = "S-U"},
    [STANDING_RECLAIMED] = {.place = "EE---H", .last = "S-U"},
};

/* The state that a letter stands for. */
static uint8_t state_of(const char *letters, char letter)
{
    const char *found = strchr(letters, letter);

    check(found); /* it is none that there can be */
    return (uint8_t)(found - letters);
}

struct standing standing_after(enum standing_event event, struct standing now)
{
    const struct row *row = &rows[event];

    return (struct standing){
        .place = state_of(places, row->place[now.place]),
        .last = state_of(lasts, row->last[now.last]),
    };
}
