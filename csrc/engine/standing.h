/* Where the permanent state's image is on the disk, and what that has of the last commit: one
 * table, which durable.c asks for everything that happens to its files.
 *
 *     elsewhere ──it is written──► file ──opening──► broken ──opened──► journal
 *                                   ▲                 │  ▲                 │
 *                                   └─────closed──────┘  └─────closing─────┘
 *
 * Two states say it. The place is where the image is:
 *
 *     elsewhere  not in its file: it is durable elsewhere, as in room.h's, or nowhere, as a file
 *                that was to be replaced may have either; or there is none
 *     file       in its file, and no journal continues that
 *     journal    in the file and a journal that continues it
 *     broken     the same, but one of them may not have its name: the journal takes no more, and is
 *                closed before anything else
 *     removing   another state has begun to take the place of all: the journal may be gone
 *     half       so it has, and the journal is: the directory may have nothing but what is
 *                elsewhere, until the image is written
 *
 * And the last commit may be
 *
 *     settled    on the disk, as far as it was acknowledged
 *     deferred   acknowledged, and there by the journal's next sync
 *     unsure     none, as it has failed: what it was to store may be on the disk
 *
 * A commit is deferred only in a journal. docs/ARCHITECTURE.md has the table, and
 * tests/c/test_standing.c walks all of it.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum standing_place {
    PLACE_ELSEWHERE,
    PLACE_FILE,
    PLACE_JOURNAL,
    PLACE_BROKEN,
    PLACE_REMOVING,
    PLACE_HALF,
};

enum standing_last {
    LAST_SETTLED,
    LAST_DEFERRED,
    LAST_UNSURE,
};

enum {
    STANDING_PLACES = 6,
    STANDING_LASTS = 3,
};

enum standing_event {
    STANDING_LOADED,           /* what is in its file */
    STANDING_LOADED_ELSEWHERE, /* what is durable, but not in its file; or that has failed */
    STANDING_WRITTEN,          /* the file is replaced, and nothing continues it */
    STANDING_NOT_WRITTEN,      /* that has failed: it may have either image */
    STANDING_IN_ROOM,          /* the commit is durable where it came */
    STANDING_OPENING,          /* there is a journal, without its name */
    STANDING_OPENED,           /* it has its name, and the file says that it is continued */
    STANDING_CLOSING,          /* the file is to say that it is not */
    STANDING_CLOSED,           /* it does, and there is no journal */
    STANDING_SWITCHED,         /* a new journal has the name */
    STANDING_NOT_SWITCHED,     /* it, or the one before, has */
    STANDING_DEFERRED,         /* a commit is in the journal, and not synced */
    STANDING_SYNCED,           /* it is */
    STANDING_NOT_SYNCED,       /* that has failed: it is no commit any more, and may be there */
    STANDING_COMMITTED,
    STANDING_NOT_COMMITTED,
    STANDING_UNSEEN,       /* by the anchor: the commit is none */
    STANDING_ADOPTING,     /* from here on the directory may have nothing but what is elsewhere */
    STANDING_REMOVED,      /* the journal is, for that */
    STANDING_ADOPTED,      /* what is elsewhere is the image */
    STANDING_ADOPTED_FILE, /* so it is, and in its file */
    STANDING_NOT_ADOPTED,  /* it has failed, from where it was */
    STANDING_RECLAIMED,    /* another process may have written to the directory */
    STANDING_EVENTS,
};

/* In one word, as some look without the lock. */
struct standing {
    uint8_t place; /* enum standing_place */
    uint8_t last;  /* enum standing_last */
};

/* How the image stands after an event, which is one that there can be. */
struct standing standing_after(enum standing_event event, struct standing now);
